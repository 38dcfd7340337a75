"""Linear layers for inference on a CPU: weights in the layout of the matrix units, activation in the product.

oneDNN multiplies by a weight in blocks that suit the processor's vector or matrix units. `torch.nn.functional.linear`
brings the weight into such a layout at every call. For a few hundred rows that costs as much time as the product itself
where there are tile units (AMX), and for a few dozen rows of float32 it costs more. `pack_weight` does it once.
A packed product can also apply the activation to its float32 sums, before they are rounded, which saves two passes
over the result.

Bytes of a call: the weight once (2 K N), input and result once (2 R (K + N)). FLOPs: 2 R K N.

Shapes: R rows, K features in, N features out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["none", "gelu_tanh"]

_PACKED_DTYPES = (torch.bfloat16, torch.float32)
_POST_OPS: dict[Activation, tuple[str, str]] = {"none": ("none", ""), "gelu_tanh": ("gelu", "tanh")}


def pack_weight(weight: Tensor) -> Tensor | None:
    """Return a copy of a weight in the layout of the matrix units, for `packed_linear`.

    Args:
        weight: (N, K).

    Returns:
        The copy, as large as the weight; None where packing does not pay or torch cannot do it: on other devices than
        a CPU, for other number types than bfloat16 and float32, for bfloat16 on a processor without it, for float32 on
        one that is no x86, and in builds of torch without oneDNN.
    """
    if weight.device.type != "cpu" or weight.dtype not in _PACKED_DTYPES or weight.numel() == 0:
        return None
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_linear_pointwise"):
        return None
    if weight.dtype == torch.bfloat16 and not operators._is_mkldnn_bf16_supported():
        return None
    if weight.dtype == torch.float32 and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None
    packed: Tensor = operators._reorder_linear_weight(weight.detach().contiguous())
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, activation: Activation = "none") -> Tensor:
    """Return activation(x W^T + bias), rounded once.

    Args:
        x: (R, K) on the CPU, in the number type of W.
        packed: what `pack_weight` made of W (N, K).
        bias: (N,) in the same number type, or None.
        activation: "none", or "gelu_tanh": GELU in its tanh approximation.

    Returns:
        (R, N) in that number type. It has no gradient.
    """
    attribute, algorithm = _POST_OPS[activation]
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, attribute, [], algorithm)
    return result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "none") -> Tensor:
    """Return activation(x W^T + bias): the specification of `packed_linear`, for every device and number type.

    Args:
        x: (R, K).
        weight: (N, K).
        bias: (N,), or None.
        activation: as for `packed_linear`.
    """
    h = F.linear(x, weight, bias)
    return F.gelu(h, approximate="tanh") if activation == "gelu_tanh" else h
