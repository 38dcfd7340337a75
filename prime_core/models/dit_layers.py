"""The layers of the diffusion transformer: embeddings, blocks and the output layer.

Shapes: B rows, T tokens of all rows laid end to end (packed), S digits a token, b the base of the digits, D
hidden_size, C cond_dim, H heads, E = D / H, R tokens that something is asked of, V vocab_size.

Parameters have the names of the published text layout (MDLM, arXiv 2406.07524).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.embed import embed_subtokens
from kernels.modulate import (
    RotatedHeads,
    gated_residual,
    norm_modulate,
    residual_norm_modulate,
    rotate_qk,
)
from prime_core.config import DiTConfig
from prime_core.models.attention import attend
from prime_core.models.packed_linear import PackedLinear
from prime_core.models.packing import Packing


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
