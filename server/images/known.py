"""What an image request holds fixed: pixels or digits as nested JSON lists, read within bounds.

Shapes: H and W pixels high and wide, C channels of the picture, P planes of tokens (C, or 2 for super-tokens), S
digits a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prime_core.config import Config
from prime_core.pixels import PixelCodec, top_pixel
from prime_core.sampling.canvas import CanvasError

FREE_PIXEL = -1


class KnownShape(NamedTuple):
    """What fits a model.

    Attributes:
        picture: (H, W, C).
        planes: P.
        digits: S.
        base: b; digits are 0..b-1.
        top_pixel: largest pixel value.
    """

    picture: tuple[int, int, int]
    planes: int
    digits: int
    base: int
    top_pixel: int

    @classmethod
    def of(cls, config: Config) -> KnownShape:
        """Return the shape of an image model's pictures."""
        model, codec = config.image_model, config.codec
        shape, top = PixelCodec(model).picture_shape, top_pixel(codec.vocab_size)
        return cls(shape, model.channels, codec.target_length, codec.base, top)

    @property
    def rule(self) -> str:
        """What `known` must be, in words."""
        height, width, channels = self.picture
        return (
            f'null, or {{"pixels": {height} rows of {width} pixels}}, each pixel null (free), a number from 0 to '
            f"{self.top_pixel} for all its channels, or a list of {channels} numbers or nulls, one a channel; or "
            f'{{"digits": lists of shape ({height}, {width}, {self.planes}, {self.digits})}} (height, width, planes, '
            f"digits) of numbers from 0 to {self.base - 1}, or null where free"
        )

    @property
    def rule_of_pixels(self) -> str:
        """What a whole picture must be, in words."""
        height, width, channels = self.picture
        return (
            f"{height} rows of {width} pixels, each a number from 0 to {self.top_pixel} for all its channels or a list "
            f"of {channels}, one a channel"
        )

    @property
    def schema_of_pixels(self) -> dict[str, Any]:
        """The JSON schema of a whole picture."""
        height, width, channels = self.picture
        value = {"type": "integer", "minimum": 0, "maximum": self.top_pixel}
        return _schema_of_list({"anyOf": [value, _schema_of_list(value, channels)]}, height, width)

    @property
    def json_schema(self) -> dict[str, Any]:
        """The JSON schema of `known`."""
        height, width, channels = self.picture
        value = _schema_of_number(self.top_pixel)
        pixel = {"anyOf": [*value["anyOf"], _schema_of_list(value, channels)]}
        digits = _schema_of_list(_schema_of_number(self.base - 1), self.planes, self.digits)
        return {
            "anyOf": [
                _schema_of_object("pixels", _schema_of_list(pixel, height, width)),
                _schema_of_object("digits", _schema_of_list(digits, height, width)),
                {"type": "null"},
            ]
        }


class Known(NamedTuple):
    """What is fixed, as `ImageRequest` takes it; at most one is given.

    Attributes:
        pixels: (H, W, C) int64, -1 where free.
        digits: (P, H, W, S) int64, b where free.
    """

    pixels: Tensor | None = None
    digits: Tensor | None = None


def parse_known(value: object, shape: KnownShape) -> Known:
    """Return what a parsed JSON value fixes. Nothing is built before the value has the right shape.

    Raises:
        CanvasError: if it does not follow the rule of the shape.
    """
    if value is None:
        return Known()
    height, width, channels = shape.picture
    if isinstance(value, Mapping) and value.keys() == {"pixels"}:
        sizes = (height, width, channels)
        flat = read_numbers(
            value["pixels"], sizes, shape.top_pixel, FREE_PIXEL, shape.rule, whole_pixels=True
        )
        return Known(pixels=torch.tensor(flat).view(sizes))
    if isinstance(value, Mapping) and value.keys() == {"digits"}:
        sizes_of_digits = (height, width, shape.planes, shape.digits)
        flat = read_numbers(value["digits"], sizes_of_digits, shape.base - 1, shape.base, shape.rule)
        return Known(digits=torch.tensor(flat).view(sizes_of_digits).permute(2, 0, 1, 3))
    raise CanvasError("known", f"known must be {shape.rule}")


def read_numbers(
    value: object,
    sizes: Sequence[int],
    top: int,
    free: int | None,
    rule: str,
    *,
    param: str = "known",
    whole_pixels: bool = False,
) -> list[int]:
    """Return the numbers of nested lists of the given sizes, with ``free`` for null.

    Args:
        value: the lists.
        sizes: length at each depth.
        top: largest number.
        free: what null becomes; None refuses it.
        rule: for the message.
        param: name of the field.
        whole_pixels: at depth 2 a number or null may stand for a list of them.

    Raises:
        CanvasError: if the value does not follow the rule.
    """

    def walk(part: object, depth: int) -> Iterator[int]:
        if depth == len(sizes):
            yield number(part)
        elif isinstance(part, list) and len(part) == sizes[depth]:
            for item in part:
                yield from walk(item, depth + 1)
        elif whole_pixels and depth == 2:
            yield from [number(part)] * sizes[depth]
        else:
            raise CanvasError(param, f"{param} must be {rule}")

    def number(part: object) -> int:
        if part is None and free is not None:
            return free
        if type(part) is not int or not 0 <= part <= top:  # bool is an int, but no number here
            raise CanvasError(param, f"{param} must be {rule}")
        return part

    return list(walk(value, 0))


def _schema_of_number(top: int) -> dict[str, Any]:
    return {"anyOf": [{"type": "integer", "minimum": 0, "maximum": top}, {"type": "null"}]}


def _schema_of_list(items: Mapping[str, Any], *sizes: int) -> dict[str, Any]:
    schema = dict(items)
    for size in reversed(sizes):
        schema = {"type": "array", "items": schema, "minItems": size, "maxItems": size}
    return schema


def _schema_of_object(key: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {key: schema}, "required": [key], "additionalProperties": False}
