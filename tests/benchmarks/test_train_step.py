"""The plain loop computes the trainer's loss, so that both do the same task."""

from pathlib import Path

import pytest
import torch

from benchmarks.plain_training import PlainLoop
from benchmarks.train_step import TrainSettings, build_loops
from prime_core.models.dit import DiT
from prime_core.objectives import training_loss
from prime_core.schedule import LinearSchedule

SETTINGS = TrainSettings(
    model="tiny", vocab_size=300, target_length=2, length=8, batch_size=3, precision="float32", device="cpu"
)


def test_loss_and_gradient_are_those_of_the_trainer(tmp_path: Path) -> None:
    config = SETTINGS.run_config(tmp_path)
    schedule, codec = LinearSchedule(1e-3), config.codec.build()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiT(SETTINGS.network, config.codec, schedule).eval()  # without dropout
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    loop = PlainLoop(config, model, schedule, codec)
    generator = torch.Generator().manual_seed(1)
    x_0 = torch.randint(300, (3, 8), generator=generator)
    t, uniforms = torch.tensor([0.2, 0.6, 1.0]), torch.rand(3, 8, 2, generator=generator)
    plain = loop.loss(x_0, t, uniforms)
    theirs = training_loss(model, codec, schedule, x_0, t, uniforms)
    torch.testing.assert_close(plain, theirs)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(plain, parameters, allow_unused=True)
    for mine, other in zip(ours, torch.autograd.grad(theirs, parameters, allow_unused=True), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_both_loops_learn_from_the_bundled_text(tmp_path: Path) -> None:
    steps = build_loops(SETTINGS, tmp_path)
    for name, step in steps.items():
        losses = [step() for _ in range(3)]
        assert all(0 < loss < 20 for loss in losses), name


def test_network_and_digits_must_fit() -> None:
    with pytest.raises(ValueError, match="must divide the network's width 192"):
        TrainSettings(model="tiny", vocab_size=50257, target_length=5)
