"""FLOPs against the design's figures and against what the network multiplies; expected work against real plans."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import Workload, build_checkpoint
from benchmarks.costs import (
    Cost,
    dense_cost,
    head_flops,
    planned_cost,
    reveal_probabilities,
    trunk_flops,
)
from prime_core.config import DiTConfig
from prime_core.plan import draw_plan
from prime_core.schedule import LinearSchedule


def test_small_model_at_full_context() -> None:
    config = DiTConfig()
    assert trunk_flops(config, 1024, 1024) == pytest.approx(213e9, rel=0.01)
    assert head_flops(config, 1024, 50257) == pytest.approx(79e9, rel=0.01)


def test_flops_are_those_that_the_network_multiplies() -> None:
    workload = Workload("tiny", vocab_size=300, target_length=2, length=20, num_rows=3, num_steps=4, seed=0)
    denoiser = build_checkpoint(workload, "float32").denoiser
    with FlopCounterMode(display=False) as counter:
        denoiser.head(denoiser.features(torch.zeros(60, 2).long(), [20] * 3))
    counted = trunk_flops(denoiser.config, 60, 20) + head_flops(denoiser.config, 60, 300)
    # The counter also sees the modulations: one row of conditioning, so next to nothing.
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_reveal_probabilities_sum_to_one() -> None:
    reveal = reveal_probabilities(LinearSchedule(eps=1e-3), 7)
    assert reveal.shape == (7,) and float(reveal.sum()) == pytest.approx(1)
    assert torch.allclose(reveal, torch.full_like(reveal, 1 / 7))


def test_expected_work_is_that_of_the_plans() -> None:
    schedule, num_rows, length, num_digits, num_steps = LinearSchedule(), 200, 6, 3, 20
    free = torch.ones(length, num_digits, dtype=torch.bool)
    plans = [draw_plan(free, schedule, num_steps, seed) for seed in range(num_rows)]
    reveal = reveal_probabilities(schedule, num_steps)
    cost = planned_cost(DiTConfig(), num_rows, length, reveal, num_digits, vocab_size=8)
    assert sum(plan.nfe for plan in plans) == pytest.approx(cost.num_row_steps, rel=0.03)
    num_positions = sum(len(event.positions) for plan in plans for event in plan.events)
    assert num_positions == pytest.approx(cost.num_positions, rel=0.03)
    assert cost.num_positions < dense_cost(DiTConfig(), num_rows, length, num_steps, 3, 8).num_positions


def test_prediction_adds_products_and_traffic() -> None:
    cost = Cost(num_row_steps=1, num_positions=1, trunk_flops=6, head_flops=4, draw_bytes=9)
    assert cost.predicted_s(flops_per_s=5, bytes_per_s=3) == 5
