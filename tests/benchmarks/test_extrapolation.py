"""What a dense run would do is counted without its network, and what is not measured says so."""

import pytest
import torch

from benchmarks.contenders import build_checkpoint, build_dense, build_sampler
from benchmarks.dense_published import PUBLISHED_EPS, DensePublished
from benchmarks.extrapolation import Extrapolation, count_calls, expected_calls, extrapolate
from benchmarks.workloads import Workload
from prime_core.codec import SubtokenCodec
from prime_core.schedule import LinearSchedule
from tests.stubs import TableDenoiser

SCHEDULE = LinearSchedule(eps=1e-3)


@pytest.mark.parametrize(("num_steps", "eps"), [(12, PUBLISHED_EPS), (2, 0.6)])
def test_calls_are_those_that_the_sampler_makes(num_steps: int, eps: float) -> None:
    codec = SubtokenCodec(4, 2)
    sampler = DensePublished(TableDenoiser(codec), codec, SCHEDULE, num_rows=1, length=2, eps=eps)
    generator = torch.Generator().manual_seed(0)
    made = torch.tensor([sampler.sample(num_steps, generator).num_calls for _ in range(300)]).double()
    counted = torch.tensor(
        [count_calls(SCHEDULE, num_steps, 4, eps, generator)[0] for _ in range(1500)]
    ).double()
    expected = expected_calls(SCHEDULE, num_steps, 4, eps)
    assert float(counted.mean()) == pytest.approx(expected, abs=0.1)
    assert float(made.mean()) == pytest.approx(expected, abs=0.2)
    assert {int(calls) for calls in made} <= {int(calls) for calls in counted}


def test_calls_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    # So many digits that every step reveals one: a call in each step, and one for what is left at t = 0.5.
    assert count_calls(SCHEDULE, 4, 10_000, 0.0, generator) == (4, 0)
    assert count_calls(SCHEDULE, 4, 10_000, 0.5, generator) == (5, 0)
    # One digit: the first call, and one more after the step that reveals it, unless that is the last.
    calls = [count_calls(SCHEDULE, 4, 1, 0.0, generator) for _ in range(2000)]
    assert {calls for calls, _ in calls} == {1, 2} and {sum(pair) for pair in calls} == {4}
    assert sum(pair[0] == 1 for pair in calls) == pytest.approx(500, abs=80)
    assert expected_calls(SCHEDULE, 4, 1, 0.0) == pytest.approx(1.75)


def test_time_is_calls_and_redraws_times_their_steps() -> None:
    extrapolation = Extrapolation(3, 1024, 600, 424, call_step_s=0.5, redraw_step_s=0.25)
    assert extrapolation.seconds == 406.0
    assert extrapolation.label == "extrapolated from 3 of 1024 steps"
    assert extrapolation.as_dict()["label"] == extrapolation.label


@pytest.mark.parametrize("model", ["tiny", "images-tiny"])
def test_a_run_of_some_steps_is_marked(model: str) -> None:
    sizes = {"tiny": (300, 4), "images-tiny": (256, 16)}[model]
    workload = Workload(model, sizes[0], 2, sizes[1], num_rows=2, num_steps=64, seed=0)  # type: ignore[arg-type]
    checkpoint = build_checkpoint(workload, "float32")
    outcome = build_sampler("dense_published", checkpoint, workload, dense_steps=2)()
    found = outcome.extrapolation
    assert found is not None and outcome.x_0 is None
    assert found.timed_steps == 2 and found.num_steps == 64
    assert found.call_step_s > 0 and found.seconds > 0
    assert outcome.num_row_steps == 2 * outcome.num_calls
    if model == "tiny":  # 16 digits: 17 calls at most, the other steps draw again
        assert 5 < found.num_calls <= 17 and found.redraw_step_s > 0
    else:
        assert (found.num_calls, found.num_redraws, found.redraw_step_s) == (64, 0, 0.0)


def test_no_more_steps_are_timed_than_there_are() -> None:
    workload = Workload("tiny", 300, 2, 4, num_rows=1, num_steps=3, seed=0)
    sampler = build_dense(build_checkpoint(workload, "float32"), workload)
    assert extrapolate(sampler, 3, 50, torch.Generator().manual_seed(0)).timed_steps == 3
