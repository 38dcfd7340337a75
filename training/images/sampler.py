"""How images are sampled, as settings of a command line: `prime-sample` and `prime-eval` share these flags.

Curves are written as numbers in a row, "a n c", as the published settings are.
"""

from __future__ import annotations

from typing import Any, get_args

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings

from prime_core.sampling.correctors import Corrector, CorrectorKind
from prime_core.sampling.curves import MAX_POWER, MAX_TEMPERATURE, MAX_WARP_SCALE, TemperatureCurve, TimeWarp
from prime_core.sampling.presets import list_presets
from prime_core.sampling.request import DEFAULT_STEPS, fill_in_preset
from prime_core.sampling.settings import ImageSampler
from training.shared_settings import GridSteps


class ImageSamplerSettings(BaseSettings):
    """The settings of an image sampler; the base of configurations, not one itself."""

    steps: GridSteps = Field(
        default=DEFAULT_STEPS,
        description="steps of the sampling grid, 1 or more, or exact: one digit at a time",
    )
    preset: str | None = Field(
        default=None,
        description="published settings in place of steps, temperature, warp, corrector and sampler; those that are "
        f"given come first. By name, with the published FID: {list_presets()}",
    )
    sampler: ImageSampler = Field(
        default="ancestral",
        description="ancestral: one token at a time that agrees with its visible digits; published: digits "
        "drawn alone, as in the published image sampler",
    )
    temperature: str = Field(
        default="1.0", description='a number, 0 takes the most probable; or "a n c": a (1 - t)^n + c'
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="keep the likeliest tokens of this probability")
    top_k: int = Field(default=0, ge=0, description="keep so many of the likeliest tokens; 0 keeps all")
    warp: str | None = Field(
        default=None,
        description=f'"a n c": time grid t -> a t^n - c, a above 0 to {MAX_WARP_SCALE:g}, n above 0 to {MAX_POWER:g}, '
        "c above -1 and below a; none: no warp, also where the preset has one",
    )
    corrector: str | None = Field(
        default=None,
        description='"corrected a p [q]" or "published a p": digits are masked again, strength a (1 - t)^p t^q; none: '
        "no corrector, also where the preset has one",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("preset") is None:
            return given
        return {**fill_in_preset(given), "preset": given["preset"]}

    @field_validator("temperature", mode="before")
    @classmethod
    def _check_temperature(cls, value: Any) -> str:
        is_read = isinstance(value, TemperatureCurve)
        return _spell_temperature(value if is_read else parse_temperature(str(value)))

    @field_validator("warp", mode="before")
    @classmethod
    def _check_warp(cls, value: Any) -> str | None:
        warp = parse_warp(value) if isinstance(value, str) else value
        return None if warp is None else _spell_warp(warp)

    @field_validator("corrector", mode="before")
    @classmethod
    def _check_corrector(cls, value: Any) -> str | None:
        corrector = parse_corrector(value) if isinstance(value, str) else value
        return None if corrector is None else _spell_corrector(corrector)

    def sampler_fields(self) -> dict[str, Any]:
        """Return the fields of an `ImageRequest` that these settings fix."""
        return {
            "steps": self.steps,
            "sampler": self.sampler,
            "temperature": parse_temperature(self.temperature),
            "top_p": self.top_p,
            "top_k": self.top_k,
            "warp": None if self.warp is None else parse_warp(self.warp),
            "corrector": None if self.corrector is None else parse_corrector(self.corrector),
        }


def parse_temperature(text: str) -> float | TemperatureCurve:
    """Read "T" or "a n c".

    Raises:
        ValueError: not one or three numbers, or out of range.
    """
    numbers = _numbers(text, "one number or three: a n c", 1, 3)
    if len(numbers) == 3:
        return TemperatureCurve(*numbers)
    if not 0 <= numbers[0] <= MAX_TEMPERATURE:
        raise ValueError(f"must be in 0..{MAX_TEMPERATURE:g}")
    return numbers[0]


def parse_warp(text: str) -> TimeWarp | None:
    """Read "a n c" or "none".

    Raises:
        ValueError: not three numbers, or out of range.
    """
    if text.strip() == "none":
        return None
    return TimeWarp(*_numbers(text, 'three numbers, a n c, or "none"', 3))


def parse_corrector(text: str) -> Corrector | None:
    """Read "corrected a p [q]", "published a p" or "none".

    Raises:
        ValueError: something else, or a number out of range.
    """
    if text.strip() == "none":
        return None
    word, _, rest = text.strip().partition(" ")
    kind = next((kind for kind in get_args(CorrectorKind) if kind == word), None)
    if kind is None:
        raise ValueError('must be "corrected a p [q]", "published a p" or "none"')
    return Corrector(kind, *_numbers(rest, "two or three numbers after its kind: a p [q]", 2, 3))


def _numbers(text: str, wanted: str, *counts: int) -> list[float]:
    parts = text.replace(",", " ").split()
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        raise ValueError(f"must be {wanted}") from None
    if len(numbers) not in counts:
        raise ValueError(f"must be {wanted}")
    return numbers


def _spell(*numbers: float | None) -> str:
    """Write numbers so that they are read back exactly, and in one way only."""
    return " ".join(repr(float(number)) for number in numbers if number is not None)


def _spell_temperature(value: float | TemperatureCurve) -> str:
    if isinstance(value, TemperatureCurve):
        return _spell(value.scale, value.power, value.offset)
    return _spell(value)


def _spell_warp(warp: TimeWarp) -> str:
    return _spell(warp.scale, warp.power, warp.offset)


def _spell_corrector(corrector: Corrector) -> str:
    return f"{corrector.kind} {_spell(corrector.scale, corrector.power, corrector.final_power)}"
