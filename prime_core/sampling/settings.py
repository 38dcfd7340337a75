"""How a row's tokens are drawn from its logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from prime_core.codec import SubtokenCodec
from prime_core.integers import check_count
from prime_core.sampling.curves import MAX_TEMPERATURE, TemperatureCurve, is_number

Draw = Literal["joint", "marginal"]
# What users call the ways of drawing images: the sampler of a request and of a preset.
ImageSampler = Literal["ancestral", "published"]
DRAWS: Mapping[ImageSampler, Draw] = MappingProxyType({"ancestral": "joint", "published": "marginal"})


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How a row's tokens are drawn.

    Attributes:
        temperature: 0..100, or a curve over noise time; 0 takes the most probable token.
        top_p: (0, 1], the smallest set of tokens with at least this probability is kept.
        top_k: number of most probable tokens to keep, 0 = all.
        draw: "joint" draws one token among those that agree with the visible digits and reveals its digits
            (`kernels.reveal`). "marginal" draws every digit alone, from the law of that digit under all tokens
            (`kernels.marginal`): what the published image sampler does. It needs `check_draw`.
    """

    temperature: float | TemperatureCurve = 1.0
    top_p: float = 1.0
    top_k: int = 0
    draw: Draw = "joint"

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: naming the setting and its range.
        """
        if not isinstance(self.temperature, TemperatureCurve):
            if not is_number(self.temperature) or not 0 <= self.temperature <= MAX_TEMPERATURE:
                raise ValueError(f"temperature must be a number in [0, {MAX_TEMPERATURE:g}]")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError("top_p must be a number in (0, 1]")
        check_count("top_k", self.top_k, 0)
        if self.draw not in get_args(Draw):
            raise ValueError("draw must be 'joint' or 'marginal'")

    def temperature_at(self, t: float) -> float:
        """Return the temperature of a step at noise time t."""
        return self.temperature.at(t) if isinstance(self.temperature, TemperatureCurve) else self.temperature


def check_draw(codec: SubtokenCodec, draw: Draw) -> None:
    """Check that a way of drawing gives tokens of this codec. Whoever makes rows calls it.

    Raises:
        ValueError: if digits are drawn alone and some of their combinations stand for no token. No permutation of the
            tokens helps: it moves codes about, but base**digits of them exist and only ``vocab_size`` are tokens.
    """
    num_codes = codec.base**codec.target_length
    if draw == "marginal" and num_codes != codec.vocab_size:
        raise ValueError(
            f"draw 'marginal' draws digits alone, but {num_codes - codec.vocab_size} of this model's "
            f"{codec.base}**{codec.target_length} = {num_codes} codes stand for no token "
            f"(vocab_size {codec.vocab_size}); use draw 'joint'"
        )
