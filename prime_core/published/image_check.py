"""Recorded outputs beside foreign weights: they tell the width of attention heads, which no weight tells.

A file of a published network may carry digits `y` (B, C S, H, W) and the `logits` (B, C, H, W, V) or (..., V + 1) that
the network gave for them. Letters: B pictures, C channels, S digits a token, H and W tokens high and wide, V
vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from prime_core.config import Config, UNetConfig
from prime_core.models.unet import UNet
from prime_core.published.image_layout import attended_width
from prime_core.published.tensors import Readable, is_dense

TOLERANCE = 1e-3
_MAX_PIXELS = 64 * 64


class Recorded(NamedTuple):
    """Digits y_t (1, C, H, W, S) int64, and the logits (1, C, H, W, V) float32 of them."""

    y_t: Tensor
    logits: Tensor


def recorded_size(tensors: Mapping[str, Readable]) -> tuple[int, int] | None:
    """Return (height, width) of recorded digits, if there are any."""
    digits = tensors.get("y")
    if not is_dense(digits) or len(digits.shape) != 4:
        return None
    height, width = digits.shape[2:]
    return height, width


def read_recorded(tensors: Mapping[str, Readable], config: Config) -> Recorded | None:
    """Return the first recorded picture; None if there is none, it is large, or it is of another kind."""
    model, codec = config.image_model, config.codec
    channels, rate = model.channels, 2 ** (len(model.channel_mult) - 1)
    digits, outputs = tensors.get("y"), tensors.get("logits")
    if not (is_dense(digits) and is_dense(outputs)):
        return None
    if len(digits.shape) != 4 or digits.dtype.is_floating_point or not outputs.dtype.is_floating_point:
        return None
    num_pictures, num_planes, height, width = digits.shape
    if num_planes != channels * codec.target_length or not num_pictures or height % rate or width % rate:
        return None
    if not 0 < height * width <= _MAX_PIXELS:
        return None
    if outputs.shape[:-1] != (num_pictures, channels, height, width):
        return None
    if outputs.shape[-1] not in (codec.vocab_size, codec.vocab_size + 1):
        return None
    planes = digits.read()[:1].long()
    if not 0 <= int(planes.min()) <= int(planes.max()) <= codec.base:
        return None
    y_t = planes.unflatten(1, (channels, codec.target_length)).movedim(2, -1)
    return Recorded(y_t, outputs.read()[:1, ..., : codec.vocab_size].float())


def find_head_channels(
    config: Config, state: Mapping[str, Tensor], recorded: Recorded, *, is_known: bool
) -> tuple[Config, str]:
    """Find the width of heads that reproduces recorded outputs.

    Args:
        config: of the network; its head_channels is tried first.
        state: weights, any floating dtype.
        recorded: digits and logits.
        is_known: config.model.head_channels was told, so no other is tried.

    Returns:
        The configuration with the width that agrees best, and a remark.
    """
    model = config.image_model
    widths = tuple(model.model_channels * mult for mult in model.channel_mult)
    common = attended_width(widths, model.attention_rates)
    others = [] if is_known else [n for n in (64, 32, *range(8, common + 1)) if common % n == 0]
    scale = max(1.0, float(recorded.logits.abs().max()))
    found: dict[int, float] = {}
    for width in dict.fromkeys([model.head_channels, *others]):
        found[width] = _difference(config, model.model_copy(update={"head_channels": width}), state, recorded)
        if found[width] <= TOLERANCE * scale:
            break
    best = min(found, key=lambda width: found[width])
    changed = config.model_copy(update={"model": model.model_copy(update={"head_channels": best})})
    verdict = "reproduced" if found[best] <= TOLERANCE * scale else "NOT reproduced"
    return changed, f"recorded logits {verdict} with head_channels {best}: within {found[best]:.2g}"


def _difference(config: Config, model: UNetConfig, state: Mapping[str, Tensor], recorded: Recorded) -> float:
    with torch.random.fork_rng(devices=[]):
        network = UNet(model, config.codec, config.schedule.build())
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    with torch.inference_mode():
        logits = network.eval().requires_grad_(False)(recorded.y_t)
    difference = float((logits - recorded.logits).abs().max())
    return difference if difference == difference else float("inf")
