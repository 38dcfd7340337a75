"""Published sampling settings of images, by name (MDM-Prime, arXiv 2505.18495; FID over 50,000 samples).

A preset holds what is published and invents nothing: where a parameter is not published, the preset has the default
and its note says so. Only "cifar10-l2-512" is published in full. "-corrected" variants have the same corrector
strength with the corrector that keeps the visible share on the schedule; nobody published their FID.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from prime_core.sampling.correctors import Corrector
from prime_core.sampling.curves import TemperatureCurve, TimeWarp
from prime_core.sampling.settings import ImageSampler


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings of one published row.

    Attributes:
        steps: grid steps; the published count of network calls.
        temperature: number or curve.
        warp: warp of the time grid, or None.
        corrector: corrector, or None.
        sampler: how digits are drawn.
        published_fid: FID published for these settings; None where there is none.
        note: what is published and what is a default.
    """

    steps: int
    temperature: float | TemperatureCurve = 1.0
    warp: TimeWarp | None = None
    corrector: Corrector | None = None
    sampler: ImageSampler = "published"
    published_fid: float | None = None
    note: str = "Only the number of steps is published; temperature, warp and corrector are defaults."


_CIFAR10 = Preset(
    steps=512,
    temperature=TemperatureCurve(-0.2, 2.0, 1.0),
    warp=TimeWarp(1.0, 1.7, 0.0),
    corrector=Corrector("published", 16.0, 2.0),
    published_fid=3.26,
    note="Published in full. The published third corrector parameter, 0.75, has no effect there.",
)
_IMAGENET32 = Preset(
    steps=1024,
    corrector=Corrector("published", 6.0, 2.0),
    published_fid=6.98,
    note="Steps and corrector are published (its third parameter, 1.0, has no effect there); temperature and warp are "
    "defaults.",
)
_CORRECTED = "Not published: the settings above it with the corrector that keeps to the schedule. "

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "cifar10-l2-512": _CIFAR10,
        "cifar10-l2-512-corrected": replace(
            _CIFAR10,
            corrector=Corrector("corrected", 16.0, 2.0, 0.75),
            published_fid=None,
            note=_CORRECTED + "The third corrector parameter, 0.75, has its effect here.",
        ),
        "cifar10-l2-256": Preset(256, published_fid=3.73),
        "cifar10-l2-128": Preset(128, published_fid=5.22),
        "cifar10-mdm-512": Preset(512, published_fid=4.66),
        "imagenet32-l2-1024": _IMAGENET32,
        "imagenet32-l2-1024-corrected": replace(
            _IMAGENET32,
            corrector=Corrector("corrected", 6.0, 2.0, 1.0),
            published_fid=None,
            note=_CORRECTED
            + "The third corrector parameter, 1.0, has its effect here; temperature and warp are "
            "defaults.",
        ),
        "imagenet32-l2-512": Preset(512, published_fid=7.31),
        "imagenet32-l2-256": Preset(256, published_fid=7.64),
        "imagenet32-l2-128": Preset(128, published_fid=7.85),
        "imagenet32-mdm-1024": Preset(1024, published_fid=7.91),
    }
)


def list_presets() -> str:
    """Return the presets by name, each with its published FID over 50,000 samples, or that it has none."""
    return ", ".join(
        f"{name} ({'not published' if preset.published_fid is None else preset.published_fid})"
        for name, preset in PRESETS.items()
    )
