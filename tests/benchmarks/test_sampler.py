"""How the samplers are timed on a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from benchmarks import sampler
from benchmarks.machine import PeakGrowth
from benchmarks.rates import Elapsed
from benchmarks.sampler_settings import SamplerSettings
from benchmarks.workloads import Workload


def test_compiling_is_not_timed_and_takes_a_few_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, int]] = []

    def build(name: str, checkpoint: Any, workload: Workload, *options: int) -> Callable[[], Any]:
        def run() -> Any:
            ran.append((name, workload.num_steps))
            return sampler.Outcome(None, 1, 1)

        return run

    @contextmanager
    def timed(device: torch.device) -> Iterator[Elapsed]:
        ran.append(("timed", 0))
        elapsed = Elapsed()
        yield elapsed
        elapsed.seconds = 1.0

    @contextmanager
    def growth(device: torch.device) -> Iterator[PeakGrowth]:
        yield PeakGrowth()

    for name, other in {
        "build_sampler": build,
        "timed": timed,
        "peak_growth": growth,
        "_full_call": lambda *arguments: None,
    }.items():
        monkeypatch.setattr(sampler, name, other)
    monkeypatch.setattr(SamplerSettings, "torch_device", torch.device("cuda", 0))
    settings = SamplerSettings(
        against="dense_published", model="tiny", steps=300, dtype="bfloat16", repeats=1, device="cpu"
    )
    sampler._measure(settings, {"bfloat16": object()}, lambda line: None)  # type: ignore[dict-item]
    timed_runs = [("timed", 0), ("planned", 300), ("timed", 0), ("dense_published", 300)]
    assert ran == [("planned", sampler.WARM_UP_STEPS), *timed_runs]
