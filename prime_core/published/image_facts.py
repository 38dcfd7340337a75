"""What a published image checkpoint says about its network beside the tensors: arguments, or metadata."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from prime_core.config import PolynomialConfig, ScheduleConfig
from prime_core.published.layout import look_up
from prime_core.weights import CheckpointError


@dataclass(frozen=True)
class ImageFacts:
    """What is known beside the tensors; None where nothing is known.

    Attributes:
        target_length: digits a token.
        base: symbols of a digit.
        vocab_size: V, with or without the mask.
        seq_length: tokens of a picture.
        size: (height, width) of the pictures.
        dataset: name of the data.
        head_channels: width of an attention head.
        model_channels: what the widths of all levels are multiples of.
        dropout: share of activations dropped in training.
        schedule: the noise schedule.
    """

    target_length: int | None = None
    base: int | None = None
    vocab_size: int | None = None
    seq_length: int | None = None
    size: tuple[int, int] | None = None
    dataset: str | None = None
    head_channels: int | None = None
    model_channels: int | None = None
    dropout: float | None = None
    schedule: ScheduleConfig | None = None


def facts_of_arguments(where: str, record: Any) -> ImageFacts:
    """Read facts from the argument namespace of a checkpoint, or from the metadata of a safetensors file.

    Raises:
        CheckpointError: the stored schedule is no schedule.
    """
    side = _first_integer(record, "image_size", "size")
    height, width = (_first_integer(record, *names) or side for names in (("height", "H"), ("width", "W")))
    power, dropout = _number(look_up(record, "schedule_n")), _number(look_up(record, "dropout"))
    dataset = look_up(record, "dataset")
    try:
        schedule = None if power is None else PolynomialConfig(power=power)
    except ValidationError:
        raise CheckpointError(f"{where}: schedule_n {power} is out of range; pass --schedule") from None
    return ImageFacts(
        target_length=_first_integer(record, "target_length", "l"),
        base=_first_integer(record, "base"),
        vocab_size=_first_integer(record, "vocab_size", "V"),
        seq_length=_first_integer(record, "seq_length"),
        size=None if height is None or width is None else (height, width),
        dataset=dataset if isinstance(dataset, str) else None,
        head_channels=_first_integer(record, "num_head_channels", "head_channels"),
        model_channels=_first_integer(record, "model_channels", "num_channels"),
        dropout=dropout,
        schedule=schedule,
    )


def _first_integer(record: Any, *names: str) -> int | None:
    """Return the first positive integer of these names; -1 stands for "not set" in such arguments."""
    for name in names:
        value = look_up(record, name)
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
            value = int(value)
        if type(value) is int and value > 0:
            return value
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
        value = float(value)
    return float(value) if type(value) in (int, float) and abs(value) < 1e9 else None
