"""The blocks of the image U-Net.

Shapes: B images, C planes of tokens, H and W high and wide, S digits a token, F features.

Features are laid out in memory as `trunk_memory_format` says, from the embedding on; every layer keeps the layout it
gets.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.embed import embed_planes
from kernels.group_norm import group_norm_silu, is_channels_last
from prime_core.config import UNetConfig

NUM_GROUPS = 32

_M = TypeVar("_M", bound=nn.Module)


def trunk_memory_format(device: torch.device) -> torch.memory_format:
    """Return how features (B, F, H, W) lie in memory: the one place that decides.

    Tensor cores multiply channels that lie side by side, so on CUDA other layouts are copied before and after every
    convolution. On a CPU oneDNN blocks them itself, and GroupNorm of bfloat16 is 20 to 35 times slower over
    channels-last than over planes.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def group_norm(
    norm: nn.Module,
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    activation: bool = True,
) -> Tensor:
    """Run a `GroupNorm` with what follows it; arguments and result as `kernels.group_norm.group_norm_silu`."""
    assert isinstance(norm, nn.GroupNorm)
    return group_norm_silu(
        x,
        norm.weight,
        norm.bias,
        norm.num_groups,
        scale=scale,
        shift=shift,
        activation=activation,
        eps=norm.eps,
    )


class PixelEmbedding(nn.Module):
    """Digit planes -> features: every digit is embedded, the planes are concatenated channel-wise."""

    def __init__(self, base: int, dim: int) -> None:
        super().__init__()
        table = torch.empty(base + 1, dim)
        # Without numbers to draw, on the meta device, a normal draw would still load torch's compiler: two seconds.
        if not table.is_meta:
            nn.init.normal_(table)
        self.embedding_table = nn.Embedding.from_pretrained(table, freeze=False)

    def forward(self, y_t: Tensor, out_dtype: torch.dtype) -> Tensor:
        """Map y_t (B, C, H, W, S) to (B, F, H, W) in a number type; plane c S + s holds digit s of channel c."""
        table = self.embedding_table.weight
        memory_format = trunk_memory_format(y_t.device)
        return embed_planes(y_t, table, out_dtype=out_dtype, memory_format=memory_format)


class Conditioning(nn.Module):
    """A block's scale and shift: a learned row per label, plus a linear map of the time embedding if there is one."""

    def __init__(self, config: UNetConfig, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Parameter(torch.zeros(config.num_labels, 2 * dim))
        self.linear = nn.Linear(4 * config.model_channels, 2 * dim) if config.time_conditioned else None

    def forward(self, labels: Tensor, time: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return scale and shift, each (B, dim), of labels (B,) and time embeddings of at least B rows."""
        embedded = F.embedding(labels, self.embedding_table)
        if self.linear is not None:
            embedded = embedded + self.linear(time)[: len(labels)]
        scale, shift = embedded.chunk(2, 1)
        return scale, shift


class ResidualBlock(nn.Module):
    """Two convolutions; the second norm is scaled and shifted by the conditioning."""

    def __init__(self, config: UNetConfig, dim_in: int, dim: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, dim_in), nn.SiLU(), nn.Conv2d(dim_in, dim, 3, padding=1)
        )
        self.emb_layers = Conditioning(config, dim)
        self.out_layers = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, dim),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            zeroed(nn.Conv2d(dim, dim, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if dim_in == dim else nn.Conv2d(dim_in, dim, 1)

    def forward(self, x: Tensor, labels: Tensor, time: Tensor | None) -> Tensor:
        """Map x (B, dim_in, H, W) to (B, dim, H, W)."""
        # The norms take the activations that follow them along; those layers only keep their places in the names.
        norm, _, convolution = self.in_layers
        h = convolution(group_norm(norm, x))
        norm, _, dropout, convolution = self.out_layers
        scale, shift = self.emb_layers(labels, time)
        h = convolution(dropout(group_norm(norm, h, scale, shift)))
        return self.skip_connection(x) + h  # type: ignore[no-any-return]


class AttentionBlock(nn.Module):
    """Full self-attention over the pixels of an image."""

    def __init__(self, dim: int, head_channels: int) -> None:
        super().__init__()
        self.num_heads = dim // head_channels
        self.norm = nn.GroupNorm(NUM_GROUPS, dim)
        self.qkv = nn.Conv1d(dim, 3 * dim, 1)
        self.proj_out = zeroed(nn.Conv1d(dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, dim, H, W) to the same shape."""
        h = group_norm(self.norm, x, activation=False)
        if is_channels_last(x):
            return self._over_tokens(x, h)
        flat = x.flatten(2)
        # The split into q, k and v comes before the split into heads; each (B, heads, H W, head_channels).
        parts = self.qkv(h.flatten(2)).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        q, k, v = (part.transpose(-1, -2) for part in parts)
        h = _attention(q, k, v).transpose(-1, -2).flatten(1, 2)
        out: Tensor = flat + self.proj_out(h)
        return out.view_as(x)

    def _over_tokens(self, x: Tensor, h: Tensor) -> Tensor:
        """The same where the features of a pixel lie side by side: convolutions of width 1 are linear maps of them."""
        tokens = h.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, dim)
        qkv = F.linear(tokens, self.qkv.weight[..., 0], self.qkv.bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        h = _attention(q, k, v).transpose(1, 2).flatten(2)
        h = F.linear(h, self.proj_out.weight[..., 0], self.proj_out.bias)
        out: Tensor = x + h.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return out


class Stage(nn.Sequential):
    """Layers between two skip connections."""

    def forward(self, x: Tensor, labels: Tensor, time: Tensor | None) -> Tensor:  # type: ignore[override]
        """Map x (B, dim_in, H, W) to (B, dim, H', W')."""
        h = x
        for layer in self:
            h = layer(h, labels, time) if isinstance(layer, ResidualBlock) else layer(h)
        return h


def stage_layers(config: UNetConfig, level: int, dim_in: int, dim: int) -> list[nn.Module]:
    """A residual block, and attention at the rates that have it."""
    layers: list[nn.Module] = [ResidualBlock(config, dim_in, dim)]
    if 2**level in config.attention_rates:
        layers.append(AttentionBlock(dim, config.head_channels))
    return layers


def zeroed(module: _M) -> _M:
    """Set all parameters of a module to zero and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention with a float32 softmax; q, k and v (B, heads, H W, head_channels)."""
    if q.device.type == "cpu":
        # The fused kernel's backward pass on a CPU is many times slower than these two products.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return torch.softmax(scores.float(), -1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)
