"""The learning rate and the averaged weights, against their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.small_run import load_run, write_run
from training.config import TrainConfig
from training.optim import ExponentialMovingAverage, build_optimizer, learning_rate


def _config(folder: Path, **values: Any) -> TrainConfig:
    flags = [text for key, value in values.items() for text in (f"--{key}", str(value))]
    return load_run(write_run(folder), folder / "out", *flags)


def test_the_rate_rises_and_stays(tmp_path: Path) -> None:
    config = _config(tmp_path, learning_rate=1e-2, warmup_steps=4, steps=100)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:5] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2])
    assert rates[4:] == [1e-2] * 96


def test_the_rate_falls_over_the_last_steps(tmp_path: Path) -> None:
    config = _config(tmp_path, learning_rate=1e-2, warmup_steps=0, steps=10, decay_steps=4)
    rates = [learning_rate(config, step) for step in range(10)]
    assert rates == pytest.approx([1e-2] * 6 + [8e-3, 6e-3, 4e-3, 2e-3])


def test_without_warm_up_the_first_step_has_the_full_rate(tmp_path: Path) -> None:
    assert learning_rate(_config(tmp_path, learning_rate=0.5, warmup_steps=0), 0) == 0.5


def test_the_average_follows_its_formula() -> None:
    weights = {"w": torch.tensor([4.0, -2.0]), "v": torch.tensor([1.0])}
    ema = ExponentialMovingAverage(weights.items(), decay=0.3)
    expected = {name: tensor.clone() for name, tensor in weights.items()}
    for n in range(1, 8):
        for tensor in weights.values():
            tensor.add_(n)  # in place: the average must hold copies
        ema.update(weights.items())
        decay = min(0.3, (1 + n) / (10 + n))
        expected = {k: decay * expected[k] + (1 - decay) * weights[k] for k in expected}
        assert ema.num_updates == n
        for name in weights:
            torch.testing.assert_close(ema.shadow[name], expected[name])
    assert (1 + 2) / (10 + 2) < 0.3 < (1 + 3) / (10 + 3)  # both branches of the minimum were taken


def test_without_warm_up_the_average_has_its_decay_from_the_first_step_on() -> None:
    weight = torch.tensor([4.0])
    ema = ExponentialMovingAverage([("w", weight)], decay=0.75, warmup=False)
    weight.fill_(8.0)
    ema.update([("w", weight)])
    assert ema.shadow["w"].item() == 0.75 * 4 + 0.25 * 8


def test_the_optimizer_is_adamw_with_the_configured_moments_and_decay(tmp_path: Path) -> None:
    config = _config(tmp_path, beta1=0.8, beta2=0.7, weight_decay=0.5, learning_rate=0.1)
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(2.0)
    optimizer = build_optimizer(config, layer)
    layer.weight.grad = torch.tensor([[3.0]])
    optimizer.step()
    # Decoupled decay, then the first Adam step, whose length is the rate whatever the gradient.
    assert layer.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, rel=1e-5)
    state = optimizer.state[layer.weight]
    assert state["exp_avg"].item() == pytest.approx(0.2 * 3.0)
    assert state["exp_avg_sq"].item() == pytest.approx(0.3 * 9.0)
