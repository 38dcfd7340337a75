"""FLOPs against the design's figures and against what the network multiplies; expected work against real plans."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import build_checkpoint
from benchmarks.costs import (
    Cost,
    dense_cost,
    head_flops,
    planned_cost,
    reveal_probabilities,
    trunk_flops,
)
from benchmarks.unet_costs import unet_head_flops, unet_trunk_flops
from benchmarks.workloads import MODELS, ModelName, Workload
from prime_core.config import CodecConfig, DiTConfig, UNetConfig
from prime_core.models.unet import UNet
from prime_core.sampling.plan import draw_plan
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


@pytest.mark.parametrize("model", ["images", "images-demo", "images-tiny"])
def test_flops_of_images_are_those_that_the_network_multiplies(model: ModelName) -> None:
    network = MODELS[model]
    assert isinstance(network, UNetConfig)
    denoiser = UNet(network, CodecConfig(vocab_size=256, target_length=2), LinearSchedule())
    y_t = torch.zeros(1, network.channels, network.height, network.width, 2, dtype=torch.int64)
    labels = None if network.labels == "none" else torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        denoiser(y_t, labels=labels)
    length = network.length
    counted = trunk_flops(network, length, length) + head_flops(network, length, 256)
    assert counted == counter.get_total_flops()


def test_dense_cost_by_hand() -> None:
    config = DiTConfig(hidden_size=8, num_blocks=1, num_heads=2)
    # 2 rows of 3 tokens, 5 steps, 4 of them with a call; per token 24 64 + 4 3 8 = 1632; the head 2 8 10 a position.
    cost = dense_cost(config, 2, 3, 5, num_digits=2, vocab_size=10, num_calls=4)
    assert (cost.num_row_steps, cost.num_positions) == (8, 24)
    assert (cost.trunk_flops, cost.head_flops) == (24 * 1632, 24 * 160)
    assert cost.draw_bytes == 24 * 10 * (20 * 2 + 12) + 30 * 10 * 56
    plain = dense_cost(config, 2, 3, 5, num_digits=1, vocab_size=10)
    assert plain.draw_bytes == 30 * 10 * (12 + 56)  # one digit a token needs no filter


def test_planned_cost_by_hand() -> None:
    config = DiTConfig(hidden_size=8, num_blocks=1, num_heads=2)
    reveal = torch.tensor([0.5, 0.5], dtype=torch.float64)
    cost = planned_cost(config, 2, 1, reveal, num_digits=2, vocab_size=10)
    assert cost.num_row_steps == cost.num_positions == 2 * 2 * 0.75
    assert cost.draw_bytes == 3 * 10 * (3 * 2 + 56)
    fused = planned_cost(config, 2, 1, reveal, num_digits=2, vocab_size=10, fused=True)
    assert fused.draw_bytes == 3 * 10 * 12


def test_image_costs_by_hand() -> None:
    network = MODELS["images-tiny"]
    assert isinstance(network, UNetConfig)
    # One level of width 32 on 16 pixels. Down: a block 32 to 32. Middle: two blocks, and attention. Up: two blocks 64
    # to 32, each with a 1 x 1 for its width.
    block, wide = 36 * 32 * 32, 18 * 64 * 32 + 18 * 32 * 32 + 2 * 64 * 32
    attention = 8 * 32 * 32 + 4 * 16 * 32
    assert unet_trunk_flops(network, 1) == 16 * (3 * block + 2 * wide + attention)
    assert unet_head_flops(network, 2, 256) == 2 * 2 * 9 * 32 * 256
    cost = dense_cost(network, 1, 16, 3, num_digits=2, vocab_size=256)
    assert cost.draw_bytes == 48 * (256 * (12 + 16) + 56 * 2 * 16)
