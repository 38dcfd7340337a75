"""Presets hold what is published, and say what is not."""

from __future__ import annotations

import pytest
import torch

from prime_core.sampling.correctors import Corrector
from prime_core.sampling.curves import TemperatureCurve, TimeWarp
from prime_core.sampling.plan import draw_plan
from prime_core.sampling.presets import PRESETS, list_presets
from prime_core.sampling.settings import DRAWS, SamplingSettings
from prime_core.schedule import PolynomialSchedule


def test_the_one_row_that_is_published_in_full() -> None:
    preset = PRESETS["cifar10-l2-512"]
    assert preset.temperature == TemperatureCurve(-0.2, 2.0, 1.0)
    assert preset.warp == TimeWarp(1.0, 1.7, 0.0)
    assert preset.corrector == Corrector("published", 16.0, 2.0)
    assert preset.published_fid == 3.26


def test_the_list_tells_what_is_published() -> None:
    listed = list_presets()
    assert "cifar10-l2-512 (3.26)" in listed and "cifar10-l2-512-corrected (not published)" in listed
    assert all(f"{name} (" in listed for name in PRESETS)


def test_published_rows_have_their_steps_and_fid() -> None:
    assert {
        name: (p.steps, p.published_fid) for name, p in PRESETS.items() if p.published_fid is not None
    } == {
        "cifar10-l2-512": (512, 3.26),
        "cifar10-l2-256": (256, 3.73),
        "cifar10-l2-128": (128, 5.22),
        "cifar10-mdm-512": (512, 4.66),
        "imagenet32-l2-1024": (1024, 6.98),
        "imagenet32-l2-512": (512, 7.31),
        "imagenet32-l2-256": (256, 7.64),
        "imagenet32-l2-128": (128, 7.85),
        "imagenet32-mdm-1024": (1024, 7.91),
    }


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_what_is_not_published(name: str) -> None:
    preset = PRESETS[name]
    if name.endswith("-corrected"):
        assert preset.published_fid is None and preset.note.startswith("Not published")
        assert preset.corrector is not None and preset.corrector.kind == "corrected"
    elif name != "cifar10-l2-512":
        assert "defaults" in preset.note
        assert (preset.temperature, preset.warp) == (1.0, None)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_run(name: str) -> None:
    preset = PRESETS[name]
    settings = SamplingSettings(preset.temperature, draw=DRAWS[preset.sampler])
    free = torch.ones(8, 2, dtype=torch.bool)
    plan = draw_plan(
        free, PolynomialSchedule(3), preset.steps, 1, warp=preset.warp, corrector=preset.corrector
    )
    assert settings.draw == "marginal"
    assert 1 <= plan.nfe <= preset.steps
