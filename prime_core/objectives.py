"""Training objectives.

Two integrals over noise time, with w(t) = -alpha'_t / (1 - alpha_t):

    coded_loss = int w(t) E sum_i  -log p(x_i | y_t) dt            (the published training loss, MDM-Prime eq. 7)
    nelbo      = int w(t) E sum_{ij masked} -log p(y_0^ij | y_t) dt   (the valid bound)

For target_length 1 they agree. For more digits `coded_loss` is a proper scoring rule, good for training, but NOT
an upper bound of -log p(x_0): it counts a token once where the chain pays for every digit. Only `nelbo` may be
called a likelihood bound, a perplexity or bits per byte.

Shapes: B rows, L tokens a row, S digits a token, R tokens with a masked digit, D features, V vocab_size.
Logits exist for at most `chunk_rows` tokens at a time, in the backward pass too.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.linear_nll import Targets, linear_nll
from kernels.nll import coded_nll, subtoken_nll
from prime_core.codec import SubtokenCodec
from prime_core.corruption import mask_subtokens
from prime_core.models.denoiser import Denoiser
from prime_core.schedule import Schedule

Objective = Literal["coded", "nelbo"]


def training_loss(
    denoiser: Denoiser,
    codec: SubtokenCodec,
    schedule: Schedule,
    x_0: Tensor,
    t: Tensor,
    uniforms: Tensor,
    *,
    objective: Objective = "coded",
    carry_over: bool = True,
    weighted: bool = True,
    chunk_rows: int = 1024,
    labels: Tensor | None = None,
) -> Tensor:
    """Return a one-sample estimate of the objective, in nats per token.

    It is unbiased if a row picked at random has a time that is uniform on (0, 1], and weighted. Times on [eps, 1]
    leave the part of the integral below eps out.

    Args:
        denoiser: the network.
        codec: tokens <-> digits.
        schedule: gives alpha_t and w(t).
        x_0: (B, L) clean tokens.
        t: (B,) noise times in (0, 1].
        uniforms: (B, L, S) uniform on [0, 1): which digits are masked.
        objective: "coded" or "nelbo".
        carry_over: for "coded" only, whether tokens that contradict visible digits are ruled out; "nelbo" always
            rules them out, since it is the bound of a sampler that does.
        weighted: multiply by w(t); False is the unweighted cross-entropy that published image models use.
        chunk_rows: tokens whose logits exist at the same time.
        labels: (B,) int64, for networks with labels.

    Returns:
        scalar float32.
    """
    y_t = mask_subtokens(codec.encode(x_0), schedule.alpha_t(t), uniforms, codec.mask_index)
    positions = (y_t == codec.mask_index).any(-1).flatten().nonzero().squeeze(-1)
    num_rows, length = x_0.shape
    y_packed = y_t.flatten(0, 1)
    features = denoiser.features(y_packed, [length] * num_rows, t, positions, labels)
    y_masked, x_masked, digits = y_packed[positions], x_0.flatten()[positions], codec.digits_on(x_0.device)
    weights = (schedule.weight(t).float() if weighted else torch.ones_like(t).float())[positions // length]
    if (head := denoiser.linear_head) is not None:
        total = linear_nll(
            features,
            head,
            Targets(y_masked, x_masked, digits, codec.mask_index),
            weights,
            objective="coded" if objective == "coded" else "digits",
            carry_over=carry_over,
            chunk_rows=chunk_rows,
        )
        return total / x_0.numel()
    nll = _chunked_nll(
        denoiser, codec, features, y_masked, x_masked, digits, objective, carry_over, chunk_rows
    )
    return (nll * weights).sum() / x_0.numel()


def _chunked_nll(
    denoiser: Denoiser,
    codec: SubtokenCodec,
    features: Any,
    y_t: Tensor,
    x_0: Tensor,
    digits: Tensor,
    objective: Objective,
    carry_over: bool,
    chunk_rows: int,
) -> Tensor:
    """Return the negative log-likelihood of every token with a masked digit, for heads of any kind: (R,), nats.

    The head of a chunk runs again in the backward pass, so that its logits need not be kept.

    Args:
        denoiser: gives the head.
        codec: tokens <-> digits.
        features: what the trunk gave for R positions.
        y_t: (R, S) partly masked digits.
        x_0: (R,) tokens.
        digits: (V, S) the digits of every token.
        objective: "coded" or "nelbo".
        carry_over: see `training_loss`.
        chunk_rows: tokens whose logits exist at the same time.
    """

    def nll_of(chunk: Any, y_chunk: Tensor, x_chunk: Tensor) -> Tensor:
        logits = denoiser.head(chunk)
        if objective == "coded":
            return coded_nll(logits, y_chunk, x_chunk, digits, codec.mask_index, carry_over=carry_over)
        return subtoken_nll(logits, y_chunk, x_chunk, digits, codec.mask_index).digits

    if len(x_0) <= chunk_rows:
        return nll_of(features, y_t, x_0)
    parts = zip(features.split(chunk_rows), y_t.split(chunk_rows), x_0.split(chunk_rows), strict=True)
    return torch.cat([checkpoint(nll_of, *part, use_reentrant=False) for part in parts])
