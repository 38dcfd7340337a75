"""Diffusion transformer in the published text layout (MDLM, arXiv 2406.07524; MDM-Prime, arXiv 2505.18495).

Shapes: B rows, L tokens a row, T tokens of all rows laid end to end (packed), S digits a token, D hidden_size,
C cond_dim, H heads, E = D / H, R output positions, V vocab_size.

Rows of different lengths are packed without padding: everything but attention works on (T, D), and attention stays
inside rows. The last block computes keys and values of all tokens, and queries and MLP only where features are asked
for. That is exact: no other token sees what is left out. The blocks are in `dit_layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.linear_nll import LinearHead
from kernels.modulate import RotatedHeads
from prime_core.config import CodecConfig, DiTConfig
from prime_core.integers import holds_integers
from prime_core.models.attention import attend, attend_at
from prime_core.models.denoiser import filled_size
from prime_core.models.dit_layers import (
    Block,
    Modulation,
    OutputLayer,
    ScaleNorm,
    SigmaEmbedding,
    SubtokenEmbedding,
)
from prime_core.models.graphs import GraphedNetwork
from prime_core.models.packed_linear import pack_linears
from prime_core.models.packing import Packing, Queries, pack, place_queries
from prime_core.schedule import Schedule

__all__ = ["DiT", "ScaleNorm", "TrunkState"]

_Modulations = tuple[list[tuple[Modulation, Modulation]], tuple[Tensor, Tensor]]


class TrunkState(NamedTuple):
    """What the trunk computes before it matters which positions are asked for.

    With CUDA graphs it is good until the next call.

    Attributes:
        x: (T, D) float32, the residual stream before the last block.
        heads: the last block's queries, keys and values of all tokens.
        modulations: of the last block's attention and MLP.
        output: shift and scale of the output layer.
        packing: of the rows.
    """

    x: Tensor
    heads: RotatedHeads
    modulations: tuple[Modulation, Modulation]
    output: tuple[Tensor, Tensor]
    packing: Packing


class DiT(GraphedNetwork):
    """The text denoiser: partly masked digits -> logits of p_theta(x_i | y_t) over whole tokens."""

    def __init__(self, config: DiTConfig, codec: CodecConfig, schedule: Schedule) -> None:
        """Build the network with random weights (output and modulations start at zero)."""
        super().__init__()
        self.config = config
        self.schedule = schedule
        self.codec = codec
        self.vocab_embed = SubtokenEmbedding(codec.base, config.hidden_size // codec.target_length)
        self.sigma_map = SigmaEmbedding(config.cond_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.output_layer = OutputLayer(config, codec.vocab_size)
        frequencies = 1e4 ** -(
            torch.arange(0, config.hidden_size // config.num_heads, 2).float()
            / (config.hidden_size // config.num_heads)
        )
        angles = torch.outer(torch.arange(config.length).float(), frequencies)
        self.register_buffer("rotary_cos", angles.cos(), persistent=False)
        self.register_buffer("rotary_sin", angles.sin(), persistent=False)
        self._modulations: _Modulations | None = None

    def features(
        self,
        y_t: Tensor,
        lengths: Sequence[int],
        t: Tensor | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Run the trunk over packed rows and return the features of the positions that are asked for.

        Args:
            y_t: (T, S) integers in 0..b: the rows laid end to end.
            lengths: tokens of each row; they sum to T, each at most ``config.length``.
            t: (B,) noise time of each row in [0, 1]; needed by time-conditioned models, ignored by time-free ones.
            positions: (R,) indices into T, on any device; on the CPU they cost a GPU no synchronisation. None for all.
            labels: None: this network has none.

        Returns:
            (R, D) in the dtype of the weights.

        Raises:
            ValueError: if a row is longer than the context, a time-conditioned model gets no t, or labels are given.
        """
        if labels is not None:
            raise ValueError("this model has no labels")
        if max(lengths) > self.config.length:
            raise ValueError(f"a row has {max(lengths)} tokens, but the context holds {self.config.length}")
        inputs = {"y_t": y_t}
        if self.config.time_conditioned:
            if t is None:
                raise ValueError("this model is time-conditioned: t is required")
            inputs["t"] = t
        # What goes to a GPU goes before the first block: later it would be waited for behind the blocks.
        queries = None if positions is None else place_queries(positions, lengths, y_t.device)
        state = self._run_trunk(tuple(lengths), lambda: partial(self._trunk, self._pack(lengths)), inputs)
        return self._features_at(state, queries)

    def prepare(self) -> None:
        """Compute once what inference would repeat: weights packed for a CPU, the modulation of a time-free network.

        Later changes of the weights are not seen; training mode drops what was prepared, and to move the network drops
        its modulation.
        """
        self._forget_graphs()  # they read what was prepared before
        pack_linears(self)
        if not self.config.time_conditioned:
            with torch.no_grad():
                self._modulations = self._modulate(self._conditioning(None, None))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._modulations = None  # it would stay on the old device, in the old number type
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> DiT:
        """Set training or evaluation mode."""
        if mode:
            self._modulations = None
        super().train(mode)
        return self

    def head(self, features: Tensor) -> Tensor:
        """Map features (R, D) to logits (R, V) float32: unnormalised log-probabilities of whole tokens."""
        return self.output_layer.linear(features).float()  # type: ignore[no-any-return]

    @property
    def linear_head(self) -> LinearHead:
        """The linear map of `head`."""
        linear = self.output_layer.linear
        return LinearHead(linear.weight, linear.bias)

    def fill(self, lengths: Sequence[int]) -> list[int]:
        """Return the lengths of masked rows that fill a call up to `filled_size` tokens, none above the longest row.

        Args:
            lengths: tokens of each row of the call.
        """
        num_tokens, longest = sum(lengths), max(lengths)
        whole, rest = divmod(filled_size(num_tokens) - num_tokens, longest)
        return [longest] * whole + [rest] * (rest > 0)

    def forward(self, y_t: Tensor, t: Tensor | None = None) -> Tensor:
        """Run the whole network.

        Args:
            y_t: (B, L, S) integers in 0..b, b = masked.
            t: (B,) noise times in [0, 1]; needed by time-conditioned models only.

        Returns:
            logits (B, L, V) float32, before any carry-over filter.

        Raises:
            ValueError: if ``y_t`` has another shape, type or range, or t is missing.
        """
        self._check_digits(y_t)
        num_rows, length, _ = y_t.shape
        logits = self.head(self.features(y_t.flatten(0, 1), [length] * num_rows, t))
        return logits.view(num_rows, length, -1)

    def _check_digits(self, y_t: Tensor) -> None:
        base, target_length = self.codec.base, self.codec.target_length
        if y_t.ndim != 3 or y_t.shape[-1] != target_length or y_t.numel() == 0:
            raise ValueError(
                f"y_t must be (rows, tokens, {target_length}) digits, got shape {tuple(y_t.shape)}"
            )
        if not holds_integers(y_t):
            raise ValueError(f"y_t must hold integers, got {y_t.dtype}")
        if not (int(y_t.min()) >= 0 and int(y_t.max()) <= base):
            raise ValueError(f"y_t must hold digits 0..{base - 1}, or {base} where masked")

    def _modulate(self, cond: Tensor) -> _Modulations:
        """Return the modulation of every block, and shift and scale of the output."""
        blocks = cast("list[Block]", list(self.blocks))
        return [block.modulate(cond) for block in blocks], self.output_layer.modulate(cond)

    def _conditioning(self, t: Tensor | None, rows: Tensor | None) -> Tensor:
        """Return the conditioning: (1, C) of a time-free network, else (T, C), given times (B,) and rows (T,)."""
        if t is None or rows is None:
            return F.silu(self.sigma_map(torch.zeros(1, device=self.get_buffer("rotary_cos").device)))
        sigma = -torch.log(self.schedule.alpha_t(t.double()).clamp_min(1e-12)).float()
        filled = F.pad(sigma, (0, filled_size(len(sigma)) - len(sigma)))
        return F.silu(self.sigma_map(filled))[: len(sigma)].index_select(0, rows)

    def _pack(self, lengths: Sequence[int]) -> Packing:
        cos, sin = self.get_buffer("rotary_cos").float(), self.get_buffer("rotary_sin").float()
        return pack(lengths, cos, sin, with_rows=self.config.time_conditioned)

    def _trunk(self, packing: Packing, y_t: Tensor, t: Tensor | None = None) -> TrunkState:
        """Run all that does not depend on positions: what can be recorded, so it reads tensors of the device alone."""
        x = self.vocab_embed(y_t)
        modulations, output = self._modulations or self._modulate(self._conditioning(t, packing.rows))
        for block, modulation in zip(self.blocks, modulations[:-1], strict=False):
            x = block(x, modulation, packing)
        heads = self._last_block.project(x, modulations[-1][0], packing)
        return TrunkState(x, heads, modulations[-1], output, packing)

    def _features_at(self, state: TrunkState, queries: Queries | None) -> Tensor:
        """Run the rest: features (R, D) of some tokens (R,), or of all."""
        x, (q, k, v), (attention, mlp), (shift, scale), packing = state
        if queries is None:
            h = attend(q, k, v, packing.groups)
        else:
            at = queries.tokens
            h = attend_at(queries, q[at], k, v, packing.groups)
            x, attention, mlp = x[at], attention.at(at), mlp.at(at)
            if len(shift) > 1:
                shift, scale = shift[at], scale[at]
        x = self._last_block.finish(x, h, (attention, mlp))
        return self.output_layer(x, shift, scale)  # type: ignore[no-any-return]

    @property
    def _last_block(self) -> Block:
        return cast(Block, self.blocks[-1])
