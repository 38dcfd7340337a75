"""What an image request fixes: nested lists to tensors, with nothing built from a wrong shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prime_core.config import CodecConfig, Config, UNetConfig
from prime_core.sampling.canvas import CanvasError
from server.images.known import KnownShape, parse_known

SHAPE = KnownShape(picture=(2, 3, 3), planes=2, digits=2, base=4, top_pixel=15)


def test_shape_of_models() -> None:
    network = UNetConfig(
        channels=2,
        height=8,
        width=4,
        packing="rgb24",
        model_channels=64,
        channel_mult=(1,),
        attention_rates=(),
    )
    shape = KnownShape.of(Config(model=network, codec=CodecConfig(vocab_size=4096, target_length=1)))
    assert shape == KnownShape((8, 4, 3), planes=2, digits=1, base=4096, top_pixel=255)


def test_nothing_known() -> None:
    assert parse_known(None, SHAPE) == (None, None)


def test_pixels() -> None:
    known = parse_known({"pixels": [[None, 7, [1, None, 15]], [[0, 0, 0], 0, None]]}, SHAPE)
    assert known.digits is None
    assert known.pixels is not None
    assert known.pixels.tolist() == [
        [[-1, -1, -1], [7, 7, 7], [1, -1, 15]],
        [[0, 0, 0], [0, 0, 0], [-1, -1, -1]],
    ]


def test_digits() -> None:
    values = torch.arange(24).view(2, 3, 2, 2) % 4
    lists: Any = values.tolist()
    lists[1][2][0][1] = None
    known = parse_known({"digits": lists}, SHAPE)
    assert known.pixels is None
    assert known.digits is not None
    assert known.digits.shape == (2, 2, 3, 2)  # planes first
    assert int(known.digits[0, 1, 2, 1]) == 4  # free
    expected = values.clone()
    expected[1, 2, 0, 1] = 4
    assert torch.equal(known.digits.permute(1, 2, 0, 3), expected)


GREY = [[0, 0, 0], [0, 0, 0]]
DIGITS = [[[[0, 0], [0, 0]]] * 3] * 2


@pytest.mark.parametrize(
    "value",
    [
        1,
        True,
        "pixels",
        [],
        GREY,
        {},
        {"pixels": GREY, "digits": DIGITS},
        {"pixel": GREY},
        {"pixels": None},
        {"pixels": GREY[:1]},
        {"pixels": [*GREY, GREY[0]]},
        {"pixels": [[0, 0], [0, 0]]},
        {"pixels": [[0, 0, 0], None]},
        {"pixels": [[0, 0, 0], [0, 0, 16]]},
        {"pixels": [[0, 0, 0], [0, 0, -1]]},
        {"pixels": [[0, 0, 0], [0, 0, 1.0]]},
        {"pixels": [[0, 0, 0], [0, 0, True]]},
        {"pixels": [[0, 0, 0], [0, 0, "1"]]},
        {"pixels": [[0, 0, 0], [0, 0, [0, 0]]]},
        {"pixels": [[0, 0, 0], [0, 0, [0, 0, [0]]]]},
        {"pixels": [[0, 0, 0], [0, 0, {}]]},
        {"digits": GREY},
        {"digits": [[[[0, 0]] * 3] * 3] * 2},
        {"digits": [[[[0]] * 2] * 3] * 2},
        {"digits": [[[[0, 4]] * 2] * 3] * 2},
        {"digits": [[None] * 3] * 2},
    ],
)
def test_wrong_values_name_the_shape(value: Any) -> None:
    with pytest.raises(
        CanvasError, match=r"known must be null, or .*2 rows of 3 pixels.*\(2, 3, 2, 2\)"
    ) as caught:
        parse_known(value, SHAPE)
    assert caught.value.param == "known"


def test_deep_and_wide_lists_are_not_walked() -> None:
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    for value in [deep, [[0] * 10**6] * 2]:
        with pytest.raises(CanvasError):
            parse_known({"pixels": value}, SHAPE)
    while isinstance(deep, list):  # taken apart by hand: its own end would recurse as deeply
        deep = deep[0]
