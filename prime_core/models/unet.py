"""ADM-style U-Net in the published image layout (Dhariwal and Nichol, arXiv 2105.05233; MDM-Prime, 2505.18495).

Shapes: B images, C planes of tokens, H and W tokens high and wide, L = C H W tokens an image (channel-major), T =
B L tokens of all images laid end to end, S digits a token, F features at full resolution, R output positions,
V vocab_size.

Every image has the same length, so packed rows are a plain batch. The last convolution is the output head: it
runs only where logits are asked for. The blocks are in `unet_layers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.transfers import queued
from prime_core.config import CodecConfig, UNetConfig
from prime_core.integers import holds_integers
from prime_core.models.denoiser import filled_size
from prime_core.models.graphs import GraphedNetwork
from prime_core.models.unet_layers import (
    NUM_GROUPS,
    AttentionBlock,
    PixelEmbedding,
    ResidualBlock,
    Stage,
    group_norm,
    stage_layers,
    trunk_memory_format,
    zeroed,
)
from prime_core.schedule import Schedule

# So many positions that fill half of their images are computed as a convolution over whole images. A sampler asks
# for fewer at a time, so that the path, and with it the last bit of a row, never depends on the row's neighbours.
MIN_DENSE_POSITIONS = 1024
# The head multiplies blocks of so many positions, filled up: products of other sizes split their sums in other ways,
# so a row's last bit would depend on how many neighbours it has. On a GPU the trunk's last bits depend on that anyway,
# and a launch costs more than such a block: there all positions of a plane are one product.
HEAD_BLOCK = 64
# Batch sizes of a call that is filled up: few enough that every one meets convolutions that are compiled already.
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True, eq=False, slots=True)
class PixelFeatures:
    """Features of some positions: what the head turns into logits.

    A position needs the 3 x 3 neighbourhood of its pixel, which the head gathers, so chunks share one map.

    Attributes:
        map: (B, F, H, W), the trunk's output; with CUDA graphs good until its next call.
        padded: (B, H + 2, W + 2, F), the same with the border that the convolution pads, a row of memory a pixel.
            None where gradients are wanted: a chunk that is computed again in the backward pass makes its own.
        positions: (R,) int64 indices into T, on any device; on the CPU they cost a GPU no synchronisation.
    """

    map: Tensor
    padded: Tensor | None
    positions: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: slice) -> PixelFeatures:
        return PixelFeatures(self.map, self.padded, self.positions[index])

    def split(self, split_size: int) -> list[PixelFeatures]:
        """Cut into chunks of ``split_size`` positions."""
        return [PixelFeatures(self.map, self.padded, part) for part in self.positions.split(split_size)]


class UNet(GraphedNetwork):
    """The image denoiser: partly masked digits -> logits of p_theta(x_i | y_t) over whole tokens."""

    def __init__(self, config: UNetConfig, codec: CodecConfig, schedule: Schedule) -> None:
        """Build the network with random weights (last layers of blocks and the output start at zero)."""
        super().__init__()
        self.config = config
        self.codec = codec
        self.schedule = schedule
        widths = [config.model_channels * mult for mult in config.channel_mult]
        self.pixel_embedding = PixelEmbedding(
            codec.base, widths[0] // (config.channels * codec.target_length)
        )
        self.time_embed = _time_embed(config.model_channels) if config.time_conditioned else None
        # The embedding is the input: stage 0 has no parameters, and its output is the first skip connection.
        self.input_blocks = nn.ModuleList([Stage()])
        skips, dim = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(Stage(*stage_layers(config, level, dim, width)))
                dim = width
                skips.append(dim)
            if level < len(widths) - 1:
                self.input_blocks.append(Stage(nn.AvgPool2d(2)))
                skips.append(dim)
        self.middle_block = Stage(
            ResidualBlock(config, dim, dim),
            AttentionBlock(dim, config.head_channels),
            ResidualBlock(config, dim, dim),
        )
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for index in range(config.num_res_blocks + 1):
                layers = stage_layers(config, level, dim + skips.pop(), width)
                dim = width
                if level and index == config.num_res_blocks:
                    layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
                self.output_blocks.append(Stage(*layers))
        self.out = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, dim),
            nn.SiLU(),
            zeroed(nn.Conv2d(dim, config.channels * codec.vocab_size, 3, padding=1)),
        )

    def features(
        self,
        y_t: Tensor,
        lengths: Sequence[int],
        t: Tensor | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> PixelFeatures:
        """Run the trunk over packed images.

        Args:
            y_t: (T, S) integers in 0..b: the images laid end to end.
            lengths: tokens of each image, all L.
            t: (B,) noise time of each image in [0, 1]; needed by time-conditioned models, ignored by time-free ones.
            positions: (R,) indices into T, on any device; None for all.
            labels: (B,) int64 in 0..num_labels-1; needed by models with labels, and by no other.

        Returns:
            The features of R positions.

        Raises:
            ValueError: if an image has another size, or t or labels are missing or not wanted.
        """
        config = self.config
        if any(length != config.length for length in lengths):
            raise ValueError(
                f"every image of this model has {config.length} tokens, got rows of {set(lengths)}"
            )
        x = y_t.view(len(lengths), config.channels, config.height, config.width, -1)
        h = self._run_trunk(None, lambda: self._trunk, self._inputs(x, labels, t))
        if positions is None:
            positions = torch.arange(len(y_t), device=y_t.device)
        return PixelFeatures(h, None if h.requires_grad else _padded(h), positions)

    def prepare(self) -> None:
        """Compute once what inference would repeat: nothing in this network."""

    def head(self, features: PixelFeatures) -> Tensor:
        """Map features of R positions to logits (R, V) float32: unnormalised log-probabilities of whole tokens.

        From `MIN_DENSE_POSITIONS` on, logits of up to 2 R positions exist for a moment.
        """
        length = self.config.length
        row, token = features.positions // length, features.positions % length
        if len(row) >= MIN_DENSE_POSITIONS:
            first, last = int(row.min()), int(row.max()) + 1
            if 2 * len(row) >= (last - first) * length:
                logits = self._dense_logits(features.map[first:last])
                row, token = (queued(part, logits.device) for part in (row, token))
                return logits[row - first, token].float()
        padded = _padded(features.map) if features.padded is None else features.padded
        return self._gathered_logits(padded, row, token).float()

    def forward(self, y_t: Tensor, t: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Run the whole network.

        Args:
            y_t: (B, C, H, W, S) integers in 0..b, b = masked; other sizes than the configuration's are computed too.
            t: (B,) noise times in [0, 1]; needed by time-conditioned models only.
            labels: (B,) int64; needed by models with labels only.

        Returns:
            logits (B, C, H, W, V) float32, before any carry-over filter.

        Raises:
            ValueError: if ``y_t`` has another shape, type or range, or t or labels are missing or not wanted.
        """
        self._check_digits(y_t)
        y_t = y_t.long()
        h = self._trunk(**self._inputs(y_t, labels, t))
        return self._dense_logits(h).view(*y_t.shape[:4], -1).float()

    @property
    def linear_head(self) -> None:
        """None: the head is a convolution over the neighbourhoods of the positions."""
        return None

    def fill(self, lengths: Sequence[int]) -> list[int]:
        """Return the lengths of the masked images that fill a call up to one of a few batch sizes.

        Args:
            lengths: tokens of each image of the call.
        """
        weight = self.out.get_parameter("2.weight")
        # On a CPU, float32 convolutions of one small picture are computed in another way than those of several.
        least = 2 if weight.device.type == "cpu" and weight.dtype == torch.float32 else 1
        num_rows = max(len(lengths), least)
        size = next((size for size in _BATCH_SIZES if size >= num_rows), -(-num_rows // 16) * 16)
        return [self.config.length] * (size - len(lengths))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `Module.to` does to all tensors; then the convolutions are laid out as their device wants them."""
        super()._apply(fn, recurse)
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(
                    memory_format=trunk_memory_format(parameter.device)
                )
        return self

    def _inputs(self, y_t: Tensor, labels: Tensor | None, t: Tensor | None) -> dict[str, Tensor]:
        """Return the arguments of `_trunk` for images y_t (B, C, H, W, S), checked, where the network is."""
        inputs = {"y_t": y_t, "labels": self._labels(labels, y_t)}
        if self.time_embed is None:
            return inputs
        if t is None:
            raise ValueError("this model is time-conditioned: t is required")
        if t.shape != (len(y_t),):
            raise ValueError(f"t must be ({len(y_t)},), one an image, got {tuple(t.shape)}")
        return inputs | {"t": t.to(self.time_embed.get_parameter("0.weight").device)}

    def _trunk(self, y_t: Tensor, labels: Tensor, t: Tensor | None = None) -> Tensor:
        """Map digits (B, C, H, W, S) to the last features (B, F, H, W); it reads tensors of the device alone."""
        time = None if t is None else self._time(t)
        h = self.pixel_embedding(y_t, _compute_dtype(self.out.get_parameter("2.weight")))
        skips = []
        for stage in self.input_blocks:
            h = stage(h, labels, time)
            skips.append(h)
        h = self.middle_block(h, labels, time)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], 1), labels, time)
        return group_norm(self.out[0], h)

    def _dense_logits(self, features: Tensor) -> Tensor:
        """Map (B, F, H, W) to logits (B, L, V)."""
        logits = self.out[2](features).unflatten(1, (self.config.channels, -1))
        return cast(Tensor, logits).permute(0, 1, 3, 4, 2).flatten(1, 3)

    def _gathered_logits(self, padded: Tensor, row: Tensor, token: Tensor) -> Tensor:
        """Return the logits (R, V) of single tokens: (R,) indices of their images, and inside their images."""
        height, width = self.config.height, self.config.width
        channel, pixel = token // (height * width), token % (height * width)
        offset = torch.arange(3, device=row.device)
        ys = pixel[:, None, None] // width + offset[:, None]
        xs = pixel[:, None, None] % width + offset
        weight = self.out.get_parameter("2.weight").permute(0, 2, 3, 1).flatten(1)
        bias = self.out.get_parameter("2.bias")
        planes = weight.unflatten(0, (self.config.channels, -1)), bias.view(self.config.channels, -1)
        # All at once, and only queued: to wait for a GPU here would be to wait for the trunk, chunk by chunk.
        places = [queued(part, padded.device) for part in (row[:, None, None], ys, xs)]
        # The empty sum ties the result to the features where no position is asked for: a backward pass needs it.
        logits = padded[:0].sum() + bias.new_zeros(len(row), self.codec.vocab_size)
        for index, (plane_weight, plane_bias) in enumerate(zip(*planes, strict=True)):
            mine = queued((channel == index).nonzero()[:, 0], padded.device)
            if not len(mine):
                continue
            blocks, filled = [], F.pad(mine, (0, -len(mine) % HEAD_BLOCK))
            # A block's patches are nine times its features: only one block of them exists at a time.
            for block in filled.split(HEAD_BLOCK if filled.device.type == "cpu" else len(filled)):
                where = tuple(part[block] for part in places)
                blocks.append(F.linear(padded[where].flatten(1), plane_weight, plane_bias))
            plane = torch.cat(blocks)[: len(mine)]
            logits = logits.to(plane.dtype).index_copy(0, mine, plane)
        return logits

    def _labels(self, labels: Tensor | None, y_t: Tensor) -> Tensor:
        if self.config.labels == "none":
            if labels is not None:
                raise ValueError("this model has no labels")
            return torch.zeros(len(y_t), dtype=torch.int64, device=y_t.device)
        num_labels = self.config.num_labels
        if labels is None:
            raise ValueError(f"this model needs labels in 0..{num_labels - 1}")
        if labels.shape != (len(y_t),) or labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be ({len(y_t)},) int64, one an image, got {tuple(labels.shape)} {labels.dtype}"
            )
        # Looking at labels on a GPU would wait for it; there the lookup itself stops at a wrong one.
        if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < num_labels:
            raise ValueError(f"labels must be in 0..{num_labels - 1}")
        return labels.to(y_t.device)

    def _time(self, t: Tensor) -> Tensor:
        """Map noise times (B,) to their embedding, of at least B rows."""
        assert self.time_embed is not None, "t is for time-conditioned networks"
        weight = self.time_embed.get_parameter("0.weight")
        half = weight.shape[1] // 2
        index = torch.arange(half, device=weight.device, dtype=torch.float32)
        # Products of few rows round otherwise; the surplus rows go where the labels tell how many images there are.
        filled = F.pad(t.float(), (0, filled_size(len(t)) - len(t)))
        angles = 1000 * filled[:, None] * torch.exp(-math.log(1e4) / half * index)
        features = torch.cat([angles.cos(), angles.sin()], -1).to(weight.dtype)
        return F.silu(self.time_embed(features))

    def _check_digits(self, y_t: Tensor) -> None:
        config, base = self.config, self.codec.base
        rate = 2 ** (len(config.channel_mult) - 1)
        height, width = y_t.shape[2:4] if y_t.ndim == 5 else (0, 0)
        shape = (config.channels, height, width, self.codec.target_length)
        if y_t.shape[1:] != shape or y_t.numel() == 0 or height % rate or width % rate:
            raise ValueError(
                f"y_t must be (images, {config.channels}, height, width, {self.codec.target_length}) digits, height "
                f"and width multiples of {rate}, got {tuple(y_t.shape)}"
            )
        if not holds_integers(y_t):
            raise ValueError(f"y_t must hold integers, got {y_t.dtype}")
        if not (int(y_t.min()) >= 0 and int(y_t.max()) <= base):
            raise ValueError(f"y_t must hold digits 0..{base - 1}, or {base} where masked")


def _padded(features: Tensor) -> Tensor:
    """Map (B, F, H, W) to (B, H + 2, W + 2, F), with a border of zeros."""
    return F.pad(features.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """The number type of convolutions: the residual stream has it too, or every layer would widen and narrow it."""
    device_type = weight.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return weight.dtype


def _time_embed(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, 4 * dim))
