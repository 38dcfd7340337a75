"""GroupNorm of images, their conditioning's scale and shift, and SiLU: what comes before every convolution.

Shapes: B images, C channels in G groups, H and W high and wide.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import Backend, choose_backend

EPS = 1e-5


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: bool = True,
    eps: float = EPS,
    backend: Backend = "auto",
) -> Tensor:
    """Return SiLU(GroupNorm(x) (1 + scale) + shift), normalised in float32.

    The kernel is for inference. Where a gradient is wanted, the same function is computed by differentiable torch
    operations, whatever the backend.

    Args:
        x: (B, C, H, W) float32 or bfloat16, contiguous or channels-last; other strides are copied.
        weight: (C,), the norm's weight.
        bias: (C,), the norm's bias.
        num_groups: G, a divisor of C.
        scale: (B, C), or None for 0; given together with ``shift``.
        shift: (B, C), or None for 0.
        activation: whether SiLU follows.
        eps: added to the variance.
        backend: see `choose_backend`.

    Returns:
        (B, C, H, W) in the dtype and the memory format of x.

    Raises:
        ValueError: if a shape does not fit, only one of ``scale`` and ``shift`` is given, or the backend is not
            available.
    """
    _check(x, weight, bias, num_groups, scale, shift)
    leaves = [tensor for tensor in (x, weight, bias, scale, shift) if tensor is not None]
    gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in leaves)
    if choose_backend(backend, x) == "reference" or gradient:
        return _group_norm_silu(x, weight, bias, num_groups, scale, shift, activation, eps)
    from kernels.triton_ops.group_norm import launch_group_norm_silu

    return launch_group_norm_silu(x, weight, bias, num_groups, scale, shift, activation, eps)


def is_channels_last(x: Tensor) -> bool:
    """Return whether x (B, C, H, W) holds the channels of a pixel side by side, and not also the reverse."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: bool,
    eps: float,
) -> Tensor:
    channels_last = is_channels_last(x)
    # Torch's channels-last kernel for CPUs subtracts squares of the mean, which loses the digits of x, and is slow.
    on_planes = channels_last and x.device.type == "cpu"
    h = F.group_norm(x.contiguous() if on_planes else x, num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        shift, scale = shift[..., None, None], scale[..., None, None]
        h = torch.addcmul(shift.to(h.dtype), h, (1 + scale).to(h.dtype))
    # Under autocast the norm may answer in float32; the convolution behind it narrows that again.
    h = (F.silu(h) if activation else h).to(x.dtype)
    # On CUDA torch answers in planes whatever it is given: the convolution behind it would copy them, forward and back.
    return h.contiguous(memory_format=torch.channels_last) if channels_last else h


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, scale: Tensor | None, shift: Tensor | None
) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be (images, channels, height, width), got {tuple(x.shape)}")
    num_images, channels = x.shape[:2]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels, got {num_groups}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != (channels,):
            raise ValueError(f"{name} must be ({channels},), got {tuple(vector.shape)}")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together")
    for name, condition in (("scale", scale), ("shift", shift)):
        if condition is not None and condition.shape != (num_images, channels):
            raise ValueError(f"{name} must be ({num_images}, {channels}), got {tuple(condition.shape)}")
