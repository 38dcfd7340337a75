"""What the tensors of a published image network say about it, and what only its arguments can say.

Sizes come from tensors wherever they can. The width of a level tells model_channels * mult, never the two apart; the
width of an attention head and the size of the pictures leave no trace in the weights at all.

Letters: C channels, S digits a token, V vocab_size, b base, e width of a digit's embedding.
"""

from __future__ import annotations

import re
from math import gcd, isqrt
from typing import Any, NamedTuple

from pydantic import ValidationError

from prime_core.codec import smallest_base
from prime_core.config import CodecConfig, Config, PolynomialConfig, ScheduleConfig, UNetConfig, explain
from prime_core.published.image_facts import ImageFacts
from prime_core.published.layout import Shapes
from prime_core.weights import CheckpointError

EMBEDDING = "pixel_embedding.embedding_table.weight"
HEAD = ("out.2.weight", "out.2.bias")
_LABELS = "middle_block.0.emb_layers.embedding_table"
_STAGE = re.compile(r"input_blocks\.([0-9]{1,4})\.")
_TIME = re.compile(r"time_embed\.|.*\.emb_layers\.([0-9]|linear\.)")
_SIDES = {"cifar10": 32, "imagenet32": 32}
_DEFAULT_SIDE = 32
_PUBLISHED_DROPOUT = 0.4
_SUPER_BASE = 4096


class ImageLayout(NamedTuple):
    """What was inferred: the configuration, the head's outputs for a channel (V, or V + 1), and remarks."""

    config: Config
    num_outputs: int
    notes: tuple[str, ...]


def infer_image_config(where: str, shapes: Shapes, facts: ImageFacts) -> ImageLayout:
    """Return what a published image network is.

    Args:
        where: what to name in messages.
        shapes: of every tensor of the network, names without `model.` and `unet.`.
        facts: what tensors cannot tell; checked against them where they can.

    Raises:
        CheckpointError: the tensors are not of this layout, contradict each other or the facts, or something is
            out of range.
    """
    if foreign := next((name for name in shapes if _TIME.match(name)), None):
        raise CheckpointError(
            f"{where}: {foreign} conditions the network on time; the published image networks ignore time, and this "
            "one is not supported"
        )
    dims = {EMBEDDING: 2, "input_blocks.1.0.in_layers.0.weight": 1, HEAD[0]: 4, HEAD[1]: 1, _LABELS: 2}
    for name, ndim in dims.items():
        if len(shapes.get(name, ())) != ndim or 0 in shapes[name]:
            raise CheckpointError(f"{where}: no usable tensor {name}; not a published image network")
    codec, channels, notes = _infer_codec(where, shapes, facts)
    widths, num_res_blocks, rates = _infer_levels(where, shapes)
    model_channels = _model_channels(where, widths, channels, facts)
    is_super = codec.vocab_size == _SUPER_BASE
    (height, width), size_notes = _picture_size(where, channels, is_super, facts)
    if facts.schedule is None:
        notes.append(
            "the file does not tell the noise schedule: alpha_t = (1 - t)^3; --schedule sets another"
        )
    num_labels = shapes[_LABELS][0]
    model = {
        "channels": channels,
        "height": height,
        "width": width,
        "packing": "rgb24" if is_super else "none",
        "model_channels": model_channels,
        "channel_mult": tuple(level // model_channels for level in widths),
        "num_res_blocks": num_res_blocks,
        "attention_rates": rates,
        "head_channels": _default_head(widths, rates) if facts.head_channels is None else facts.head_channels,
        "dropout": _PUBLISHED_DROPOUT if facts.dropout is None else facts.dropout,
        "labels": "none" if num_labels == 1 else "class",
        "num_labels": num_labels,
    }
    config = _build(where, model, codec, facts.schedule or PolynomialConfig())
    return ImageLayout(config, shapes[HEAD[0]][0] // channels, (*notes, *size_notes))


def _build(where: str, model: dict[str, Any], codec: CodecConfig, schedule: ScheduleConfig) -> Config:
    try:
        return Config(model=UNetConfig.model_validate(model), codec=codec, schedule=schedule)
    except ValidationError as error:
        raise CheckpointError(f"{where}: not a usable network: {explain(error)}") from None


def _default_head(widths: tuple[int, ...], rates: tuple[int, ...]) -> int:
    return 64 if attended_width(widths, rates) % 64 == 0 else 32


def attended_width(widths: tuple[int, ...], rates: tuple[int, ...]) -> int:
    """Return what the width of a head must divide: the greatest common divisor of all widths with attention."""
    attended = [width for level, width in enumerate(widths) if 2**level in rates]
    return gcd(widths[-1], *attended)


def _infer_codec(where: str, shapes: Shapes, facts: ImageFacts) -> tuple[CodecConfig, int, list[str]]:
    """Solve planes = C S, outputs = C V, b = smallest base for the codec and C; also return remarks."""
    (num_symbols, dim), width = shapes[EMBEDDING], shapes["input_blocks.1.0.in_layers.0.weight"][0]
    num_planes, rest = divmod(width, dim)
    if rest:
        raise CheckpointError(
            f"{where}: {EMBEDDING} is {dim} wide, the network's input {width}: no whole number of planes"
        )
    solutions = _solutions(num_planes, shapes[HEAD[0]][0], num_symbols - 1)
    if not solutions:
        raise CheckpointError(
            f"{where}: {num_planes} planes of digits, {shapes[HEAD[0]][0]} outputs ({HEAD[0]}) and "
            f"{num_symbols} symbols ({EMBEDDING}) do not fit: C S planes, C V outputs with V <= 256, and b + 1 "
            "symbols with b smallest such that b^S >= V are wanted"
        )
    doubts = [_contradiction(codec, facts) for codec, _ in solutions]
    if None not in doubts:
        raise CheckpointError(f"{where}: {doubts[0]}; the file contradicts itself")
    codec, channels = solutions[doubts.index(None)]
    others = doubts.count(None) - 1
    note = f"{others} other readings of the shapes are possible; taken: {channels} channels of V = {codec.vocab_size}"
    return codec, channels, [note] if others else []


def _solutions(num_planes: int, num_outputs: int, base: int) -> list[tuple[CodecConfig, int]]:
    """Return every (codec, C) that fits, the likeliest first: RGB, then grey, then few channels."""
    found = []
    divisors = [c for c in range(1, min(num_planes, 64) + 1) if num_planes % c == 0 and num_outputs % c == 0]
    for channels in sorted(divisors, key=lambda c: (c != 3, c)):
        digits, vocab_size = num_planes // channels, num_outputs // channels
        # A network without sub-tokens may have an output for the mask too, which is never sampled.
        if digits == 1 and vocab_size == base + 1:
            vocab_size = base
        is_super = (channels, digits, vocab_size) == (2, 1, _SUPER_BASE)
        is_pixel = digits <= 24 and 2 <= vocab_size <= 256
        if (is_super or is_pixel) and smallest_base(vocab_size, digits) == base:
            found.append((CodecConfig(vocab_size=vocab_size, target_length=digits), channels))
    return found


def _contradiction(codec: CodecConfig, facts: ImageFacts) -> str | None:
    """Say what the facts say against a codec; None if nothing."""
    if codec.vocab_size == _SUPER_BASE:
        return None  # whose arguments count digits and values of whole pixels
    plain = codec.target_length == 1
    # Some count the mask as a value, so one more is not a contradiction.
    told = {
        "target_length": (facts.target_length, codec.target_length, 0),
        "base": (facts.base, codec.base, int(plain)),
        "vocab_size": (facts.vocab_size, codec.vocab_size, 1),
    }
    for name, (fact, found, slack) in told.items():
        if fact is not None and not found <= fact <= found + slack:
            return f"says {name} = {fact}, but the tensors have {name} = {found}"
    return None


def _infer_levels(where: str, shapes: Shapes) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Return the width of each level, the blocks of a level, and the rates that have attention.

    Stage 0 and the stages that halve the picture have no parameters: they are the gaps in the numbering.
    """
    stages = sorted({int(match[1]) for name in shapes if (match := _STAGE.match(name))})
    num_res_blocks = next((i for i, stage in enumerate(stages) if stage != i + 1), len(stages))
    period = num_res_blocks + 1
    num_levels = (stages[-1] + 1) // period
    levels = [
        range(level * period + 1, level * period + 1 + num_res_blocks) for level in range(min(num_levels, 9))
    ]
    if [stage for level in levels for stage in level] != stages or num_levels > 8:
        raise CheckpointError(
            f"{where}: input_blocks {stages[:40]} are not 1 to 8 levels of equally many blocks with a "
            "parameterless halving between them; not a published image network"
        )
    widths, rates = [], []
    for index, level in enumerate(levels):
        name = f"input_blocks.{level[0]}.0.out_layers.3.weight"
        if len(shapes.get(name, ())) != 4 or 0 in shapes[name]:
            raise CheckpointError(f"{where}: no usable tensor {name}; not a published image network")
        widths.append(shapes[name][0])
        attends = [f"input_blocks.{stage}.1.qkv.weight" in shapes for stage in level]
        if any(attends) and not all(attends):
            missing = f"input_blocks.{level[attends.index(False)]}.1.qkv.weight"
            raise CheckpointError(
                f"{where}: tensor {missing} is missing: only some blocks of its level attend"
            )
        if any(attends):
            rates.append(2**index)
    return tuple(widths), num_res_blocks, tuple(rates)


def _model_channels(where: str, widths: tuple[int, ...], channels: int, facts: ImageFacts) -> int:
    """Return a divisor of all widths; only the products with the multiples have any effect."""
    common = gcd(*widths)
    if facts.model_channels is not None:
        if common % facts.model_channels:
            raise CheckpointError(
                f"{where}: says model_channels = {facts.model_channels}, but the levels are {widths} wide"
            )
        return facts.model_channels
    # Published networks take a first multiple that the three channels share.
    is_split = channels == 3 and widths[0] // common % 3 and common % 3 == 0
    return common // 3 if is_split else common


def _picture_size(
    where: str, channels: int, is_super: bool, facts: ImageFacts
) -> tuple[tuple[int, int], list[str]]:
    """Return (height, width), and remarks."""
    if facts.size is not None:
        return facts.size, []
    name = re.sub(r"[-_ ]", "", facts.dataset or "").lower()
    side = _SIDES.get(name)
    if facts.seq_length is not None:
        # Arguments of super-tokens may count tokens, pixels or values.
        planes = (2, 3, 1) if is_super else (channels,)
        sides = [isqrt(facts.seq_length // count) for count in planes]
        fits = [
            told for told, count in zip(sides, planes, strict=True) if count * told**2 == facts.seq_length
        ]
        if not fits or side not in (None, fits[0]):
            data = f" of {facts.dataset}" if side is not None else ""
            raise CheckpointError(
                f"{where}: says seq_length = {facts.seq_length}, which no square pictures{data} with {channels} "
                "channels have; pass --size HxW"
            )
        return (fits[0], fits[0]), []
    if side is not None:
        return (side, side), []
    note = f"the file does not tell the size of the pictures: {_DEFAULT_SIDE}x{_DEFAULT_SIDE}; --size sets another"
    return (_DEFAULT_SIDE, _DEFAULT_SIDE), [note]
