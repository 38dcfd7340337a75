"""The published image network a second time: float64, straight from its description, from a dictionary of tensors.

Letters: B pictures, C channels, H and W tokens high and wide, S digits a token, F features, V vocab_size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Net:
    """What a random network is made of; `widths` are the features of the levels, `outputs` those of a channel."""

    channels: int
    target_length: int
    base: int
    outputs: int
    widths: tuple[int, ...]
    blocks: int = 1
    rates: tuple[int, ...] = ()
    head: int = 32
    labels: int = 1

    def tensors(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """`model.*` tensors in the order of a published `state_dict`."""
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, Tensor] = {}

        def add(name: str, *shape: int, fan: int = 0) -> None:
            noise = torch.randn(shape, generator=generator)
            value = noise / fan**0.5 if fan else 0.3 * noise + (1.0 if name.endswith("weight") else 0.0)
            found[f"model.unet.{name}"] = value.to(dtype)

        def layer(name: str, dim_in: int, dim: int, *kernel: int) -> None:
            fan = dim_in * (kernel[0] ** 2 if kernel else 1)
            add(f"{name}.weight", dim, dim_in, *kernel, fan=fan)
            add(f"{name}.bias", dim, fan=dim_in)

        def norm(name: str, dim: int) -> None:
            add(f"{name}.weight", dim)
            add(f"{name}.bias", dim)

        def residual(name: str, dim_in: int, dim: int) -> None:
            norm(f"{name}.in_layers.0", dim_in)
            layer(f"{name}.in_layers.2", dim_in, dim, 3, 3)
            add(f"{name}.emb_layers.embedding_table", self.labels, 2 * dim)
            norm(f"{name}.out_layers.0", dim)
            layer(f"{name}.out_layers.3", dim, dim, 3, 3)
            if dim_in != dim:
                layer(f"{name}.skip_connection", dim_in, dim, 1, 1)

        def attention(name: str, dim: int) -> None:
            norm(f"{name}.norm", dim)
            layer(f"{name}.qkv", dim, 3 * dim, 1)
            layer(f"{name}.proj_out", dim, dim, 1)

        embedding = torch.randn(
            (self.base + 1, self.widths[0] // self.channels // self.target_length), generator=generator
        )
        found["model.pixel_embedding.embedding_table.weight"] = embedding.to(dtype)
        stage, dim, skips = 1, self.widths[0], [self.widths[0]]
        for level, width in enumerate(self.widths):
            for _ in range(self.blocks):
                residual(f"input_blocks.{stage}.0", dim, width)
                if 2**level in self.rates:
                    attention(f"input_blocks.{stage}.1", width)
                stage, dim = stage + 1, width
                skips.append(dim)
            if level < len(self.widths) - 1:
                stage += 1
                skips.append(dim)
        residual("middle_block.0", dim, dim)
        attention("middle_block.1", dim)
        residual("middle_block.2", dim, dim)
        for stage in range(len(self.widths) * (self.blocks + 1)):
            level = len(self.widths) - 1 - stage // (self.blocks + 1)
            residual(f"output_blocks.{stage}.0", dim + skips.pop(), self.widths[level])
            dim = self.widths[level]
            if 2**level in self.rates:
                attention(f"output_blocks.{stage}.1", dim)
        norm("out.0", dim)
        layer("out.2", dim, self.channels * self.outputs, 3, 3)
        return found

    def digits(self, side: int = 8, batch: int = 2, seed: int = 0) -> Tensor:
        """Partly masked digits (B, C, H, W, S)."""
        size = (batch, self.channels, side, side, self.target_length)
        return torch.randint(0, self.base + 1, size, generator=torch.Generator().manual_seed(seed))

    def logits(self, tensors: dict[str, Tensor], y_t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, C, H, W, outputs) float64 of digits (B, C, H, W, S)."""
        w = {name.removeprefix("model.").removeprefix("unet."): t.double() for name, t in tensors.items()}
        rows = torch.zeros(len(y_t), dtype=torch.int64) if labels is None else labels

        def stage(name: str, h: Tensor) -> Tensor:
            h = _residual(w, f"{name}.0", h, rows)
            return _attention(w, f"{name}.1", h, self.head) if f"{name}.1.qkv.weight" in w else h

        table = w["pixel_embedding.embedding_table.weight"]
        planes = [table[y_t[:, c, :, :, s]] for c in range(self.channels) for s in range(self.target_length)]
        h = torch.cat(planes, -1).permute(0, 3, 1, 2)
        skips = [h]
        num_stages = len(self.widths) * (self.blocks + 1)
        for index in range(1, num_stages):
            is_halving = index % (self.blocks + 1) == 0
            h = _halved(h) if is_halving else stage(f"input_blocks.{index}", h)
            skips.append(h)
        h = _residual(w, "middle_block.0", h, rows)
        h = _attention(w, "middle_block.1", h, self.head)
        h = _residual(w, "middle_block.2", h, rows)
        for index in range(num_stages):
            h = stage(f"output_blocks.{index}", torch.cat([h, skips.pop()], 1))
            if (index + 1) % (self.blocks + 1) == 0 and index + 1 < num_stages:
                h = h.repeat_interleave(2, -1).repeat_interleave(2, -2)
        assert not skips
        out = _conv(w, "out.2", _silu(_norm(w, "out.0", h)))
        batch, _, height, width = out.shape
        return out.reshape(batch, self.channels, self.outputs, height, width).permute(0, 1, 3, 4, 2)


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    groups = x.reshape(len(x), 32, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    shape = (1, -1, *[1] * (x.ndim - 2))
    return scaled.reshape(x.shape) * w[f"{name}.weight"].view(shape) + w[f"{name}.bias"].view(shape)


def _conv(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    kernel = w[f"{name}.weight"]
    return F.conv2d(x, kernel, w[f"{name}.bias"], padding=kernel.shape[-1] // 2)


def _halved(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def _residual(w: dict[str, Tensor], name: str, x: Tensor, labels: Tensor) -> Tensor:
    h = _conv(w, f"{name}.in_layers.2", _silu(_norm(w, f"{name}.in_layers.0", x)))
    condition = w[f"{name}.emb_layers.embedding_table"][labels][:, :, None, None]
    scale, shift = condition[:, : h.shape[1]], condition[:, h.shape[1] :]
    h = _norm(w, f"{name}.out_layers.0", h) * (1 + scale) + shift
    h = _conv(w, f"{name}.out_layers.3", _silu(h))
    skip = f"{name}.skip_connection"
    return h + (_conv(w, skip, x) if f"{skip}.weight" in w else x)


def _attention(w: dict[str, Tensor], name: str, x: Tensor, head: int) -> Tensor:
    dim = x.shape[1]
    flat = x.flatten(2)
    mixed = torch.einsum("oi,bip->bop", w[f"{name}.qkv.weight"][..., 0], _norm(w, f"{name}.norm", flat))
    mixed = mixed + w[f"{name}.qkv.bias"][:, None]
    parts = []
    for first in range(0, dim, head):
        q, k, v = (mixed[:, part * dim + first : part * dim + first + head] for part in range(3))
        weight = (torch.einsum("bcp,bcq->bpq", q, k) / head**0.5).softmax(-1)
        parts.append(torch.einsum("bpq,bcq->bcp", weight, v))
    out = torch.einsum("oi,bip->bop", w[f"{name}.proj_out.weight"][..., 0], torch.cat(parts, 1))
    return (flat + out + w[f"{name}.proj_out.bias"][:, None]).reshape(x.shape)
