"""Sampling settings that vary with time or draw digits alone, and which codecs allow the latter."""

from __future__ import annotations

import pytest
import torch

from prime_core.codec import SubtokenCodec
from prime_core.sampling.curves import TemperatureCurve
from prime_core.sampling.settings import SamplingSettings, check_draw


def test_the_temperature_is_a_number_or_a_curve_at_its_time() -> None:
    assert SamplingSettings(0.7).temperature_at(0.2) == 0.7
    assert SamplingSettings(TemperatureCurve(-0.2, 2, 1)).temperature_at(0.5) == pytest.approx(0.95)


def test_a_way_of_drawing_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="draw must be 'joint' or 'marginal'"):
        SamplingSettings(draw="other")  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", [SubtokenCodec(256, 2), SubtokenCodec(4096, 1), SubtokenCodec(27, 3)])
def test_digits_may_be_drawn_alone_where_every_code_is_a_token(codec: SubtokenCodec) -> None:
    check_draw(codec, "marginal")
    pairs = torch.cartesian_prod(*[torch.arange(codec.base)] * codec.target_length)
    assert len(codec.decode(pairs.view(-1, codec.target_length)).unique()) == codec.vocab_size


@pytest.mark.parametrize("permuted", [False, True])
def test_digits_must_not_be_drawn_alone_where_codes_stand_for_no_token(permuted: bool) -> None:
    codec = SubtokenCodec(50, 2, torch.arange(50).flip(0) if permuted else None)
    check_draw(codec, "joint")
    with pytest.raises(
        ValueError, match=r"14 of this model's 8\*\*2 = 64 codes stand for no token.*use draw"
    ):
        check_draw(codec, "marginal")
