"""Negative log-likelihoods straight from features: a linear output head whose logits exist a chunk at a time.

Shapes: R rows (one token position each), D features, V tokens, S digits a token, b = base.

`linear_nll` returns the weighted sum over rows of a negative log-likelihood. The weights are known before the sum, so
the gradient of every chunk's logits is known while they exist: it takes their place, and the gradients of features,
weight and bias are products with it. So the head runs once, not twice as under activation checkpointing, and nothing
of size (R, V) is kept (the idea of fused linear cross-entropy losses, for the sets of `kernels.nll`).

Cost: 3 products of 2 R D V FLOPs and two passes over the logits. On a CPU, carry-over lowers it further: rows with a
visible digit need only the V / b tokens that have it (`kernels.candidates`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.backend import Backend
from kernels.candidates import Group, all_candidates, group_by_visible_digit
from kernels.nll import RowState, Scores, SubtokenNLL, backward_scores, forward_scores
from kernels.packed_digits import pack_digits
from kernels.token_sets import TokenSets, wide_dtype

GPU_VOCAB_STEP = 64
"""On a GPU the head is filled up to a multiple of so many tokens: tensor cores read 16 bytes of a row at a time, and
rows of 50257 logits are not aligned to them. What it gains is not measured yet."""


class LinearHead(NamedTuple):
    """An output head that is one linear map: logits = features weight^T + bias.

    Attributes:
        weight: (V, D).
        bias: (V,).
    """

    weight: Tensor
    bias: Tensor


class Targets(NamedTuple):
    """What rows are, and what is visible of them.

    Attributes:
        y_t: (R, S) int64, digits in 0..b-1, or b where masked.
        x_0: (R,) int64, the tokens.
        digits: (V, S) int64, the digits of every token.
        mask_index: b.
    """

    y_t: Tensor
    x_0: Tensor
    digits: Tensor
    mask_index: int


def linear_nll(
    features: Tensor,
    head: LinearHead,
    targets: Targets,
    token_weights: Tensor,
    *,
    objective: Literal["coded", "digits"],
    carry_over: bool = True,
    chunk_rows: int = 1024,
    backend: Backend = "auto",
) -> Tensor:
    """Return the weighted sum of the negative log-likelihoods of R tokens; differentiable in features and head.

    Under autocast the products are in its number type and the gradients of the head are summed in float32.

    Args:
        features: (R, D).
        head: the linear map to logits.
        targets: tokens and their visible digits.
        token_weights: (R,), constants.
        objective: "coded", as `coded_nll`, or "digits", as `subtoken_nll`.
        carry_over: for "coded" only, whether tokens that contradict visible digits are ruled out.
        chunk_rows: rows whose logits exist at the same time.
        backend: see `choose_backend`.

    Returns:
        scalar float32 (float64 for float64 features), nats.

    Raises:
        ValueError: if the backend is not available.
    """
    plan = _Plan(targets, objective, carry_over, chunk_rows, backend, torch.is_grad_enabled())
    loss = _LinearNLL.apply(features, *head, token_weights, plan)  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)


def linear_subtoken_nll(
    features: Tensor,
    head: LinearHead,
    targets: Targets,
    *,
    chunk_rows: int = 1024,
    backend: Backend = "auto",
) -> SubtokenNLL:
    """Return what `subtoken_nll` gives for the logits of R rows, without a gradient.

    Args:
        features: (R, D).
        head: the linear map to logits.
        targets: tokens and their visible digits.
        chunk_rows: rows whose logits exist at the same time.
        backend: see `choose_backend`.

    Returns:
        SubtokenNLL.

    Raises:
        ValueError: if the backend is not available.
    """
    plan = _Plan(targets, "digits", True, chunk_rows, backend, False)
    coded = torch.zeros(len(features), dtype=wide_dtype(features), device=features.device)
    per_digit = torch.zeros_like(coded)
    with torch.no_grad():
        for chunk in _chunks(features, head, plan):
            scores = forward_scores(chunk.logits, chunk.sets, chunk.x_0, backend)
            coded[chunk.group.rows] = chunk.state.coded(*scores, carry_over=True)
            per_digit[chunk.group.rows] = chunk.state.per_digit(scores.lse)
    return SubtokenNLL(coded, per_digit)


class _Plan(NamedTuple):
    targets: Targets
    objective: Literal["coded", "digits"]
    carry_over: bool
    chunk_rows: int
    backend: Backend
    with_gradient: bool

    def groups(self) -> list[Group]:
        y_t, x_0, digits, mask_index = self.targets
        filtered = self.carry_over or self.objective == "digits"
        # On a GPU the sizes of the groups would have to be waited for.
        if not filtered or y_t.device.type != "cpu":
            return all_candidates(len(x_0), self.chunk_rows)
        return group_by_visible_digit(y_t, digits[x_0], digits, mask_index, self.chunk_rows)

    def sets(self, state: RowState) -> TokenSets:
        if self.objective == "digits":
            return state.digit_sets()
        return state.visible_set() if self.carry_over else state.all_tokens()

    def nll(self, state: RowState, scores: Scores) -> Tensor:
        if self.objective == "digits":
            return state.per_digit(scores.lse)
        return state.coded(*scores, carry_over=self.carry_over)


class _Chunk(NamedTuple):
    """Rows whose logits exist.

    Attributes:
        group: the rows and their C candidates.
        features: (G, D).
        weight: (W, D) the part of the head for the candidates, W at least C, filled up with zeros.
        filled: (G, W) what it gives, zeros behind the candidates.
        logits: (G, C) the view of it that counts.
        state: of the rows.
        sets: of the rows.
        x_0: (G,) where their tokens are among the candidates.
    """

    group: Group
    features: Tensor
    weight: Tensor
    filled: Tensor
    logits: Tensor
    state: RowState
    sets: TokenSets
    x_0: Tensor


def _chunks(features: Tensor, head: LinearHead, plan: _Plan) -> Iterator[_Chunk]:
    """Compute logits chunk by chunk, in the number type of the products."""
    y_t, x_0, digits, mask_index = plan.targets
    device_type = features.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else head.weight.dtype
    weight, bias = (each.detach().to(dtype) for each in head)  # once, not once a chunk
    vocab_size = len(weight)
    num_filled = 0 if device_type == "cpu" else -vocab_size % GPU_VOCAB_STEP
    if num_filled:  # on a GPU every row may be any token
        weight, bias = F.pad(weight, (0, 0, 0, num_filled)), F.pad(bias, (0, num_filled))
    packed = pack_digits(digits, mask_index)
    for group in plan.groups():
        rows, tokens = group
        own = features.detach()[rows].to(dtype)
        own_weight = weight[tokens]
        with torch.autocast(device_type, enabled=False):
            filled = torch.addmm(bias[tokens], own, own_weight.T)
        logits = filled[:, :vocab_size]
        state = RowState.of(y_t[rows], x_0[rows], digits, packed, mask_index)
        state = state._replace(packed=packed[tokens])
        target = _index_among(tokens, x_0[rows])
        yield _Chunk(group, own, own_weight, filled, logits, state, plan.sets(state), target)
        del filled, logits, own_weight, own


def _index_among(tokens: Tensor | slice, x_0: Tensor) -> Tensor:
    """Return where x_0 (G,) are among ascending tokens."""
    if isinstance(tokens, slice):
        return x_0 - (tokens.start or 0)
    return torch.searchsorted(tokens, x_0)


class _LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, token_weights: Tensor, plan: _Plan
    ) -> Tensor:
        wide = wide_dtype(features)
        needed = [plan.with_gradient and each for each in ctx.needs_input_grad[:3]]
        gradients = [
            torch.zeros(each.shape, dtype=wide, device=each.device) if wanted else None
            for each, wanted in zip((features, weight, bias), needed, strict=True)
        ]
        loss = torch.zeros((), dtype=wide, device=features.device)
        for chunk in _chunks(features, LinearHead(weight, bias), plan):
            chunk_weights = token_weights[chunk.group.rows]
            scores = forward_scores(chunk.logits, chunk.sets, chunk.x_0, plan.backend)
            if not any(needed):
                loss += (plan.nll(chunk.state, scores) * chunk_weights).sum()
                continue
            with torch.enable_grad():
                leaves = Scores(*(each.requires_grad_() for each in scores))
                part = (plan.nll(chunk.state, leaves) * chunk_weights).sum()
            upstream = Scores(*torch.autograd.grad(part, leaves, materialize_grads=True))
            loss += part.detach()
            # Nobody else reads these logits, so their gradient takes their place.
            backward_scores(
                chunk.logits, chunk.sets, chunk.x_0, scores.lse.detach(), upstream, chunk.logits, plan.backend
            )
            _accumulate(chunk, *gradients)
        ctx.gradients = gradients
        ctx.dtypes = [each.dtype for each in (features, weight, bias)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_nll keeps its gradients for one backward pass only")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if each is None else each.mul_(upstream).to(dtype)
            for each, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


def _accumulate(chunk: _Chunk, features: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    """Add one chunk's share, now that ``chunk.logits`` holds d(loss) / d(logits), to the gradients."""
    rows, tokens = chunk.group
    upstream, num_tokens = chunk.filled, chunk.logits.shape[1]
    with torch.autocast(upstream.device.type, enabled=False):
        if features is not None:
            features[rows] = (upstream @ chunk.weight).to(features.dtype)
        if weight is not None:
            if isinstance(tokens, slice) and weight.dtype == upstream.dtype:
                weight[tokens].addmm_(chunk.logits.T, chunk.features)
            else:
                _add(weight, tokens, (upstream.T @ chunk.features)[:num_tokens])
        if bias is not None:
            _add(bias, tokens, chunk.logits.sum(0, dtype=bias.dtype))


def _add(total: Tensor, tokens: Tensor | slice, part: Tensor) -> None:
    """Add to some rows of a total, none of them twice."""
    if isinstance(tokens, slice):
        total[tokens] += part
    else:
        total.index_add_(0, tokens, part.to(total.dtype))
