"""Diffusion transformer in the published text layout (MDLM, arXiv 2406.07524; MDM-Prime, arXiv 2505.18495).

Shapes: B rows, L tokens a row, T tokens of all rows laid end to end (packed), S digits a token, D hidden_size,
C cond_dim, H heads, E = D / H, R output positions, V vocab_size.

Rows of different lengths are packed without padding: everything but attention works on (T, D), and attention stays
inside rows. The last block computes keys and values of all tokens, and queries and MLP only where features are asked
for. That is exact: no other token sees what is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.embed import embed_subtokens
from kernels.linear_nll import LinearHead
from kernels.modulate import (
    RotatedHeads,
    gated_residual,
    norm_modulate,
    residual_norm_modulate,
    rotate_qk,
)
from prime_core.config import CodecConfig, DiTConfig
from prime_core.models.attention import attend, attend_at
from prime_core.models.denoiser import filled_size
from prime_core.models.graphs import GraphedNetwork
from prime_core.models.packed_linear import PackedLinear, pack_linears
from prime_core.models.packing import Packing, Queries, pack, place_queries
from prime_core.schedule import Schedule


class Modulation(NamedTuple):
    """What the conditioning does to a branch: (1, D) float32 each where all tokens share it, else (T, D).

    Attributes:
        shift: added to the normed and scaled input.
        scale: the normed input is multiplied by 1 + scale.
        gate: the branch's result is multiplied by it.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def at(self, positions: Tensor) -> Modulation:
        """Return the modulation of some tokens (R,)."""
        return self if len(self.shift) == 1 else Modulation(*(part[positions] for part in self))


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


class SigmaEmbedding(nn.Module):
    """Noise level sigma -> conditioning: an MLP on a 256-wide sinusoid (cosines first)."""

    def __init__(self, cond_dim: int, num_frequencies: int = 128) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(
            nn.Linear(2 * num_frequencies, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim)
        )

    def forward(self, sigma: Tensor) -> Tensor:
        """Map sigma (B,) float32 to (B, C)."""
        index = torch.arange(self.num_frequencies, device=sigma.device, dtype=torch.float32)
        angles = sigma[:, None] * torch.exp(-math.log(1e4) / self.num_frequencies * index)
        features = torch.cat([angles.cos(), angles.sin()], -1)
        first = self.mlp.get_parameter("0.weight")
        return self.mlp(features.to(first.dtype))  # type: ignore[no-any-return]


class SubtokenEmbedding(nn.Module):
    """Digit embeddings, concatenated per token: table (b + 1, D / S)."""

    def __init__(self, base: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(base + 1, dim))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, y_t: Tensor) -> Tensor:
        """Map y_t (T, S) to (T, D) float32, the number type of the residual stream, whatever the table's is."""
        return embed_subtokens(y_t, self.embedding, out_dtype=torch.float32)


class ScaleNorm(nn.Module):
    """The weight of a LayerNorm without bias; `norm_modulate` and `residual_norm_modulate` compute with it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the conditioning (adaLN-zero, arXiv 2212.09748)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.norm1 = ScaleNorm(dim)
        self.attn_qkv = PackedLinear(dim, 3 * dim, bias=False)
        self.attn_out = PackedLinear(dim, dim, bias=False)
        self.norm2 = ScaleNorm(dim)
        self.mlp = nn.Sequential(
            PackedLinear(dim, 4 * dim), nn.GELU(approximate="tanh"), PackedLinear(4 * dim, dim)
        )
        self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * dim)
        nn.init.zeros_(self.adaLN_modulation.weight)
        nn.init.zeros_(self.adaLN_modulation.bias)

    def modulate(self, cond: Tensor) -> tuple[Modulation, Modulation]:
        """Map the conditioning, (1, C) for all tokens or (T, C), to the modulation of attention and MLP."""
        parts = self.adaLN_modulation(cond).float().chunk(6, -1)
        return Modulation(*parts[:3]), Modulation(*parts[3:])

    def forward(self, x: Tensor, modulations: tuple[Modulation, Modulation], packing: Packing) -> Tensor:
        """Map x (T, D) float32 to the same shape."""
        heads = self.project(x, modulations[0], packing)
        return self.finish(x, attend(*heads, packing.groups), modulations)

    def project(self, x: Tensor, modulation: Modulation, packing: Packing) -> RotatedHeads:
        """Return the queries, keys and values of x (T, D), each (T, H, E)."""
        dtype = self.attn_qkv.weight.dtype
        h = norm_modulate(x, self.norm1.weight, modulation.shift, modulation.scale, out_dtype=dtype)
        return rotate_qk(self.attn_qkv(h), packing.rotation.cos, packing.rotation.sin, self.num_heads)

    def finish(self, x: Tensor, attended: Tensor, modulations: tuple[Modulation, Modulation]) -> Tensor:
        """Return what becomes of some tokens x (R, D), which may be written to, and their attention (R, D)."""
        attention, mlp = modulations
        branch = F.dropout(self.attn_out(attended), self.dropout, self.training)
        inplace = not torch.is_grad_enabled()
        x, h = residual_norm_modulate(
            x,
            branch,
            attention.gate,
            self.norm2.weight,
            mlp.shift,
            mlp.scale,
            out_dtype=self.attn_qkv.weight.dtype,
            inplace=inplace,
        )
        branch = F.dropout(self.mlp[2](self.mlp[0](h, activation="gelu_tanh")), self.dropout, self.training)
        return gated_residual(x, branch, mlp.gate, inplace=inplace)


class OutputLayer(nn.Module):
    """Final norm and modulation, then one linear map to the V tokens."""

    def __init__(self, config: DiTConfig, vocab_size: int) -> None:
        super().__init__()
        self.norm_final = ScaleNorm(config.hidden_size)
        self.linear = PackedLinear(config.hidden_size, vocab_size)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 2 * config.hidden_size)
        for parameter in (*self.linear.parameters(), *self.adaLN_modulation.parameters()):
            nn.init.zeros_(parameter)

    def modulate(self, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Map the conditioning, (1, C) for all tokens or (T, C), to shift and scale."""
        shift, scale = self.adaLN_modulation(cond).float().chunk(2, -1)
        return shift, scale

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Return the features (R, D) that `linear` maps to logits."""
        return norm_modulate(x, self.norm_final.weight, shift, scale, out_dtype=self.linear.weight.dtype)


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

        Later changes of the weights are not seen; training mode drops what was prepared.
        """
        self._forget_graphs()  # they read what was prepared before
        pack_linears(self)
        if not self.config.time_conditioned:
            with torch.no_grad():
                self._modulations = self._modulate(self._conditioning(None, None))

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
        if y_t.is_floating_point() or y_t.dtype == torch.bool:
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
