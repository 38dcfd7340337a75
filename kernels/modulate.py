"""What lies between the matrix products of a transformer block: norm and modulation, gated residual, rotation.

Shapes: T packed tokens, D features, H heads, E = D / H features of a head.

Blocks are modulated by their conditioning (adaLN, Peebles and Xie, arXiv 2212.09748): shift, scale and gate are
(1, D) where all tokens share one conditioning, and (T, D) where each has its own.

The kernels are for inference. Where a gradient is wanted, the same function is computed by differentiable torch
operations, whatever the backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import Backend, choose_backend

EPS = 1e-5


class ResidualModulated(NamedTuple):
    """Result of `residual_norm_modulate`.

    Attributes:
        x: (T, D) float32, the residual stream after the branch.
        h: (T, D), its normalised and modulated values: the next branch's input.
    """

    x: Tensor
    h: Tensor


class RotatedHeads(NamedTuple):
    """Result of `rotate_qk`: q, k and v, each (T, H, E)."""

    q: Tensor
    k: Tensor
    v: Tensor


def norm_modulate(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    out_dtype: torch.dtype,
    eps: float = EPS,
    backend: Backend = "auto",
) -> Tensor:
    """Return LayerNorm(x) weight (1 + scale) + shift, computed in float32.

    Args:
        x: (T, D) float32 or bfloat16.
        weight: (D,), the norm's weight; it has no bias.
        shift: (1, D) or (T, D).
        scale: (1, D) or (T, D).
        out_dtype: dtype of the result.
        eps: added to the variance.
        backend: see `choose_backend`.

    Returns:
        (T, D) in ``out_dtype``.

    Raises:
        ValueError: if a shape does not fit, or the backend is not available.
    """
    _check_tokens(x, weight, shift=shift, scale=scale)
    if choose_backend(backend, x) == "reference" or _wants_gradient(x, weight, shift, scale):
        return _norm_modulate(x, weight, shift, scale, out_dtype, eps)
    from kernels.triton_ops.modulate import launch_norm_modulate

    return launch_norm_modulate(x, weight, shift, scale, out_dtype, eps)


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor, *, inplace: bool = False, backend: Backend = "auto"
) -> Tensor:
    """Return x + gate branch.

    Args:
        x: (T, D) float32, the residual stream.
        branch: (T, D), any floating dtype.
        gate: (1, D) or (T, D).
        inplace: write the result into x; only where no gradient is wanted.
        backend: see `choose_backend`.

    Returns:
        (T, D) float32; x itself if ``inplace``.

    Raises:
        ValueError: if a shape does not fit, x is not float32, ``inplace`` meets a gradient, or the backend is not
            available.
    """
    _check_tokens(x, None, branch=branch, gate=gate)
    gradient = _wants_gradient(x, branch, gate)
    _check_stream(x)
    _check_inplace(inplace, gradient)
    if choose_backend(backend, x) == "reference" or gradient:
        return _gated_residual(x, branch, gate, inplace)
    from kernels.triton_ops.modulate import launch_gated_residual

    return launch_gated_residual(x, branch, gate, inplace)


def residual_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    out_dtype: torch.dtype,
    eps: float = EPS,
    inplace: bool = False,
    backend: Backend = "auto",
) -> ResidualModulated:
    """Return `gated_residual` and `norm_modulate` of its result: one read of x and branch, one write of each result.

    Args:
        x: (T, D) float32, the residual stream.
        branch: (T, D), any floating dtype: what the last matrix product gave.
        gate: (1, D) or (T, D).
        weight: (D,), the next norm's weight.
        shift: (1, D) or (T, D), the next modulation.
        scale: (1, D) or (T, D).
        out_dtype: dtype of ``h``.
        eps: added to the variance.
        inplace: write the residual stream into x; only where no gradient is wanted.
        backend: see `choose_backend`.

    Raises:
        ValueError: if a shape does not fit, x is not float32, ``inplace`` meets a gradient, or the backend is not
            available.
    """
    _check_tokens(x, weight, branch=branch, gate=gate, shift=shift, scale=scale)
    gradient = _wants_gradient(x, branch, gate, weight, shift, scale)
    _check_stream(x)
    _check_inplace(inplace, gradient)
    if choose_backend(backend, x) == "reference" or gradient:
        x_new = _gated_residual(x, branch, gate, inplace)
        return ResidualModulated(x_new, _norm_modulate(x_new, weight, shift, scale, out_dtype, eps))
    from kernels.triton_ops.modulate import launch_residual_norm_modulate

    return ResidualModulated(
        *launch_residual_norm_modulate(x, branch, gate, weight, shift, scale, out_dtype, eps, inplace)
    )


def rotate_qk(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    *,
    inplace: bool = False,
    backend: Backend = "auto",
) -> RotatedHeads:
    """Turn q and k by the angles of their tokens (rotary embedding, Su et al., arXiv 2104.09864).

    In the published layout feature i of a head turns with feature i + E / 2: (a, b) becomes (a cos - b sin,
    b cos + a sin), in float32.

    Args:
        qkv: (T, 3D), q, k and v side by side, each as H heads of E features.
        cos: (T, E / 2) float32.
        sin: (T, E / 2) float32.
        num_heads: H.
        inplace: write q and k into ``qkv``; only where no gradient is wanted.
        backend: see `choose_backend`.

    Returns:
        q and k turned, v as it is, each (T, H, E) in the dtype of ``qkv``; v is a view of ``qkv``, and so are q and k
        if ``inplace``.

    Raises:
        ValueError: if a shape does not fit, ``inplace`` meets a gradient, or the backend is not available.
    """
    head_size, rest = divmod(qkv.shape[-1], 3 * num_heads)
    if qkv.ndim != 2 or rest or head_size % 2:
        raise ValueError(
            f"qkv must be (tokens, 3 * {num_heads} heads * an even size), got {tuple(qkv.shape)}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (len(qkv), head_size // 2):
            raise ValueError(f"{name} must be ({len(qkv)}, {head_size // 2}), got {tuple(table.shape)}")
    gradient = _wants_gradient(qkv)
    _check_inplace(inplace, gradient)
    if choose_backend(backend, qkv) == "reference" or gradient:
        turned = _rotate_qk(qkv, cos, sin, num_heads, inplace)
    else:
        from kernels.triton_ops.rotary import launch_rotate_qk

        turned = launch_rotate_qk(qkv, cos, sin, num_heads, inplace)
    q, k = turned.unflatten(-1, (2, num_heads, head_size)).unbind(1)
    return RotatedHeads(q, k, qkv.unflatten(-1, (3, num_heads, head_size))[:, 2])


def _norm_modulate(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, out_dtype: torch.dtype, eps: float
) -> Tensor:
    """One pass where all tokens share the modulation (it folds into the norm's weight and bias), else three.

    One more narrows the result. Fresh memory costs a CPU more than a pass, so the passes share one tensor.
    """
    x, weight, shift, scale = x.float(), weight.float(), shift.float(), scale.float()
    if len(shift) == len(scale) == 1:
        return F.layer_norm(x, weight.shape, weight * (1 + scale[0]), shift[0], eps).to(out_dtype)
    h = F.layer_norm(x, weight.shape, weight, None, eps)
    if _wants_gradient(h, shift, scale):
        return torch.addcmul(shift, h, 1 + scale).to(out_dtype)
    return h.addcmul_(h, scale).add_(shift).to(out_dtype)


def _gated_residual(x: Tensor, branch: Tensor, gate: Tensor, inplace: bool) -> Tensor:
    """One pass, and one to widen a branch of lower precision."""
    gate, branch = gate.float(), branch.float()
    return x.addcmul_(gate, branch) if inplace else torch.addcmul(x, gate, branch)


def _rotate_qk(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, inplace: bool) -> Tensor:
    """Turn all heads of q and k together; (T, 2D)."""
    size = qkv.shape[-1] // 3 * 2
    source: Tensor = qkv[:, :size].unflatten(-1, (2 * num_heads, 2, -1)).float()  # (T, 2H, 2, E / 2)
    cos, sin = cos[:, None, None].float(), sin[:, None].float()
    turned = source * cos
    turned[:, :, 0].addcmul_(source[:, :, 1], sin, value=-1)
    turned[:, :, 1].addcmul_(source[:, :, 0], sin)
    if inplace:
        target = qkv[:, :size]
        return target.copy_(turned.flatten(1))
    return turned.to(qkv.dtype).flatten(1)


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _check_inplace(inplace: bool, gradient: bool) -> None:
    if inplace and gradient:
        raise ValueError(
            "inplace must be False where a gradient is wanted: the backward pass needs the old values"
        )


def _check_stream(x: Tensor) -> None:
    if x.dtype != torch.float32:
        raise ValueError(f"x must be float32, got {x.dtype}: the residual stream sums many small branches")


def _check_tokens(x: Tensor, weight: Tensor | None, **per_token: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"x must be (tokens, features), got {tuple(x.shape)}")
    if weight is not None and weight.shape != x.shape[1:]:
        raise ValueError(f"weight must be ({x.shape[1]},), got {tuple(weight.shape)}")
    for name, tensor in per_token.items():
        shared = name != "branch" and tensor.shape == (1, x.shape[1])
        if tensor.shape != x.shape and not shared:
            raise ValueError(
                f"{name} must have the tokens and features of x {tuple(x.shape)}, got {tuple(tensor.shape)}"
            )
