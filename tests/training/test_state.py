"""The saved state: round trip, damage, and states that belong elsewhere."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from training.optim import ExponentialMovingAverage
from training.state import STATE_NAME, StateError, exclusive_run, load_state, save_state

RUN = '{"learning_rate": 1, "model": {"length": 8, "num_blocks": 2}}'


class _Run:
    """A layer with its optimiser and average."""

    def __init__(self, seed: int, steps: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Linear(3, 2)
        for parameter in self.model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.ema = ExponentialMovingAverage(self.model.named_parameters(), 0.9)
        for _ in range(steps):
            self.advance(generator)

    def advance(self, generator: torch.Generator) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()
        self.ema.update(self.model.named_parameters())

    def save(self, output: Path, step: int, run: str = RUN) -> None:
        save_state(output, step, self.model, self.optimizer, self.ema, run)

    def load(self, output: Path, run: str = RUN) -> int | None:
        return load_state(output, self.model, self.optimizer, self.ema, run)


def test_saving_holds_no_second_copy_of_the_state(tmp_path: Path) -> None:
    run = _Run(1)
    run.model = nn.Linear(1000, 1000)
    run.ema = ExponentialMovingAverage(run.model.named_parameters(), 0.9)
    tracemalloc.start()
    try:
        run.save(tmp_path, 0)
        assert tracemalloc.get_traced_memory()[1] < 2**20  # the state is 8 MB
    finally:
        tracemalloc.stop()


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert _Run(1).load(tmp_path) is None


@pytest.mark.parametrize("steps", [0, 3])
def test_round_trip_goes_on_with_the_same_bits(steps: int, tmp_path: Path) -> None:
    saved, loaded = _Run(1, steps), _Run(2)
    saved.save(tmp_path, steps)
    assert loaded.load(tmp_path) == steps
    for run in (saved, loaded):
        generator = torch.Generator().manual_seed(9)
        for _ in range(3):
            run.advance(generator)
    for name, parameter in saved.model.named_parameters():
        assert torch.equal(parameter, dict(loaded.model.named_parameters())[name])
        assert torch.equal(saved.ema.shadow[name], loaded.ema.shadow[name])
    assert loaded.ema.num_updates == saved.ema.num_updates == steps + 3


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_state_is_refused_and_changes_nothing(size: int, tmp_path: Path) -> None:
    _Run(1, 3).save(tmp_path, 3)
    path = tmp_path / STATE_NAME
    path.write_bytes(path.read_bytes()[:size])
    run = _Run(2)
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(StateError, match=r"state.safetensors is damaged .*; move it away to start"):
        run.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_other_settings_are_named_with_both_values(tmp_path: Path) -> None:
    _Run(1, 1).save(tmp_path, 1)
    other = RUN.replace('"length": 8', '"length": 16').replace('"learning_rate": 1', '"learning_rate": 2')
    with pytest.raises(
        StateError, match=r"\(learning_rate: 1 there, 2 here, model.length: 8 there, 16 here\); use these"
    ):
        _Run(1).load(tmp_path, other)


def _rewrite(output: Path, **changes: torch.Tensor | None) -> None:
    with safe_open(output / STATE_NAME, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in changes.items():
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, output / STATE_NAME, metadata)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.weight", torch.zeros(1, 3), r"model.weight is of shape \(1, 3\), expected \(2, 3\)"),
        ("ema.bias", None, "ema.bias is missing"),
        ("optimizer.exp_avg_sq.bias", torch.zeros(1), r"optimizer.exp_avg_sq.bias is of shape \(1,\)"),
        ("optimizer.exp_avg.weight", None, "optimizer.exp_avg.weight is missing"),
        ("optimizer.step.bias", None, "lacks optimizer.step.bias"),
    ],
)
def test_a_state_of_another_network_is_refused(
    name: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    _Run(1, 2).save(tmp_path, 2)
    _rewrite(tmp_path, **{name: tensor})
    with pytest.raises(StateError, match=message):
        _Run(1).load(tmp_path)


def test_a_file_that_is_no_state_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / STATE_NAME)
    with pytest.raises(StateError, match="damaged"):
        _Run(1).load(tmp_path)


def test_the_lock_excludes_and_ends(tmp_path: Path) -> None:
    second = exclusive_run(tmp_path / "new")
    with exclusive_run(tmp_path / "new"), pytest.raises(StateError, match="another trainer"), second:
        pass
    with exclusive_run(tmp_path / "new"):
        pass
