"""Intermediate-state embedding: the digit embeddings of a partly masked token, concatenated.

Shapes: S digits a token, D hidden_size; for images B images, C planes of tokens, H and W high and wide, e columns of
the table, F = C S e features.

On both backends one pass writes the result in the layout and the number type that its user wants. The gradient goes to
the table only.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import Backend, choose_backend


def embed_subtokens(
    y_t: Tensor,
    table: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Embed every digit (or mask) and concatenate the digits of a token (MDM-Prime, section 3.3).

    The text network adds no embedding of positions to this (its positions turn queries and keys, and its conditioning
    modulates later), so nothing but the cast is left to be done in the same pass.

    Args:
        y_t: (..., S) int64 in 0..b, b = masked. A wrong digit is an error on a CPU; a kernel cannot stop, and gives
            NaN for it.
        table: (b + 1, D / S) floating, one row per digit value and one for the mask.
        out_dtype: number type of the result; None for that of ``table``.
        deterministic: whether the gradient of the table must have the same bits in every run;
            `torch.use_deterministic_algorithms` asks for that too. Without it the kernel may add up the gradients of
            one row of a large table in another order each time, which is faster. The reference has the same bits
            either way.
        backend: see `choose_backend`.

    Returns:
        (..., D). The gradient of the table is summed in float32 (float64 for a float64 table).

    Raises:
        ValueError: if the backend is not available.
    """
    dtype = table.dtype if out_dtype is None else out_dtype
    if choose_backend(backend, table) == "triton":
        flat = _embed_by_kernel(y_t, table, dtype, "tokens", deterministic)
        return flat.view(*y_t.shape[:-1], y_t.shape[-1] * table.shape[1])
    return F.embedding(y_t, _summable(table)).flatten(-2).to(dtype)


def embed_planes(
    y_t: Tensor,
    table: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    deterministic: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Embed the digit planes of images; channel (c S + s) e + k is column k of digit s of plane c.

    Args:
        y_t: (B, C, H, W, S) int64 in 0..b, b = masked.
        table: (b + 1, e) floating.
        out_dtype: as for `embed_subtokens`.
        memory_format: `torch.contiguous_format` (NCHW) or `torch.channels_last` (NHWC) memory of the result.
        deterministic: as for `embed_subtokens`.
        backend: see `choose_backend`.

    Returns:
        (B, C S e, H, W).

    Raises:
        ValueError: if the backend or the memory format is not available.
    """
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            f"memory_format must be torch.contiguous_format or channels_last, got {memory_format}"
        )
    dtype = table.dtype if out_dtype is None else out_dtype
    num_images, num_planes, height, width, num_digits = y_t.shape
    num_features = num_planes * num_digits * table.shape[1]
    channels_last = memory_format == torch.channels_last
    if choose_backend(backend, table) == "triton":
        if channels_last:
            flat = _embed_by_kernel(y_t, table, dtype, "channels_last", deterministic)
            return flat.view(num_images, height, width, num_features).permute(0, 3, 1, 2)
        flat = _embed_by_kernel(y_t, table, dtype, "channels_first", deterministic)
        return flat.view(num_images, num_features, height, width)
    embedded = F.embedding(y_t.permute(0, 2, 3, 1, 4).flatten(-2), _summable(table)).flatten(-2)
    return embedded.permute(0, 3, 1, 2).to(dtype, memory_format=memory_format)


def _summable(table: Tensor) -> Tensor:
    """Widen a table that gradients are added to: 16 bits would lose most of a long sum."""
    wants_gradient = table.requires_grad and torch.is_grad_enabled()
    return table.float() if wants_gradient and table.dtype.itemsize < 4 else table


def _embed_by_kernel(
    y_t: Tensor,
    table: Tensor,
    dtype: torch.dtype,
    layout: Literal["tokens", "channels_last", "channels_first"],
    deterministic: bool,
) -> Tensor:
    """Return the flat embeddings in a layout of `kernels.triton_ops.embed`."""
    from kernels.triton_ops.embed import Embed

    flat: Tensor = Embed.apply(y_t, table, dtype, layout, deterministic)  # type: ignore[no-untyped-call]
    return flat
