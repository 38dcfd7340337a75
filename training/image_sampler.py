"""How images are sampled, as settings of a command line: `prime-sample` and `prime-eval` share these flags.

Curves are written as numbers in a row, "a n c", as the published settings are.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings

from prime_core.correctors import Corrector
from prime_core.curves import MAX_TEMPERATURE, TemperatureCurve, TimeWarp
from prime_core.request import ImageSampler, preset_fields


class ImageSamplerSettings(BaseSettings):
    """The settings of an image sampler; the base of configurations, not one itself."""

    steps: int | Literal["exact"] = Field(
        default=64, description="steps of the sampling grid, 1 or more, or exact: one sub-token at a time"
    )
    preset: str | None = Field(
        default=None,
        description="published settings by name, such as cifar10-l2-512, in place of steps, temperature, warp, "
        "corrector and sampler; those that are given come first",
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
    warp: str | None = Field(default=None, description='"a n c": time grid t -> a t^n - c')
    corrector: str | None = Field(
        default=None,
        description='"corrected a p [q]" or "published a p": digits are masked again, strength a (1 - t)^p t^q',
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        name = given.get("preset") if isinstance(given, dict) else None
        if name is None:
            return given
        published = preset_fields(str(name))
        spelled = {
            "steps": published["steps"],
            "sampler": published["sampler"],
            "temperature": _spell_temperature(published["temperature"]),
            "warp": None if published["warp"] is None else _spell_warp(published["warp"]),
            "corrector": None if published["corrector"] is None else _spell_corrector(published["corrector"]),
        }
        return {**spelled, **given}

    @field_validator("steps", mode="before")
    @classmethod
    def _check_steps(cls, value: Any) -> Any:
        return check_steps(value)

    @field_validator("temperature", mode="before")
    @classmethod
    def _check_temperature(cls, value: Any) -> str:
        return _spell_temperature(parse_temperature(str(value)))

    @field_validator("warp", mode="after")
    @classmethod
    def _check_warp(cls, value: str | None) -> str | None:
        return None if value is None else _spell_warp(parse_warp(value))

    @field_validator("corrector", mode="after")
    @classmethod
    def _check_corrector(cls, value: str | None) -> str | None:
        return None if value is None else _spell_corrector(parse_corrector(value))

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


def check_steps(value: Any) -> Any:
    """Return the steps of a sampling grid as an integer or "exact", whichever way they were written.

    Raises:
        ValueError: they are neither.
    """
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if value != "exact" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError("must be an integer of at least 1, or exact")
    return value


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


def parse_warp(text: str) -> TimeWarp:
    """Read "a n c".

    Raises:
        ValueError: not three numbers, or out of range.
    """
    return TimeWarp(*_numbers(text, "three numbers: a n c", 3))


def parse_corrector(text: str) -> Corrector:
    """Read "corrected a p [q]" or "published a p".

    Raises:
        ValueError: something else, or a number out of range.
    """
    kind, _, rest = text.strip().partition(" ")
    if kind not in ("corrected", "published"):
        raise ValueError('must be "corrected a p [q]" or "published a p"')
    numbers = _numbers(rest, "two or three numbers after its kind: a p [q]", 2, 3)
    return Corrector("corrected" if kind == "corrected" else "published", *numbers)


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
