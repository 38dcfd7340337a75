"""The training loss: chunks and a fused head change nothing, and the logits of all tokens never exist."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prime_core.codec import SubtokenCodec
from prime_core.likelihood import estimate_grid_nelbo, estimate_likelihood
from prime_core.models.dit import DiT
from prime_core.objectives import Objective, training_loss
from prime_core.schedule import LinearSchedule
from tests.prime_core.random_dit import random_dit


def test_weights_can_be_left_out() -> None:
    model, codec, schedule = tiny_dit()
    x_0, t, uniforms = torch.zeros(1, 8, dtype=torch.long), torch.tensor([0.25]), torch.ones(1, 8, 2)
    with torch.no_grad():
        losses = [
            float(training_loss(model, codec, schedule, x_0, t, uniforms, weighted=w)) for w in (True, False)
        ]
    assert losses[0] == pytest.approx(4 * losses[1])


def tiny_dit() -> tuple[DiT, SubtokenCodec, LinearSchedule]:
    codec = SubtokenCodec(11, 2)
    return random_dit(codec), codec, LinearSchedule(1e-3)


@pytest.mark.parametrize("objective", ["coded", "nelbo"])
def test_chunks_change_nothing(objective: Objective, generator: torch.Generator) -> None:
    model, codec, schedule = tiny_dit()
    x_0, t = torch.randint(0, 11, (3, 8), generator=generator), torch.tensor([0.2, 0.5, 0.9])
    uniforms = torch.rand(3, 8, 2, generator=generator)
    gradients = []
    for chunk_rows in (1, 5, 1000):
        model.zero_grad()
        training_loss(
            model, codec, schedule, x_0, t, uniforms, objective=objective, chunk_rows=chunk_rows
        ).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5) and torch.allclose(
        gradients[0], gradients[2], atol=1e-5
    )
    assert float(gradients[0].abs().max()) > 1e-3


def test_carry_over_matters_for_coded_only(generator: torch.Generator) -> None:
    model, codec, schedule = tiny_dit()
    x_0, t, uniforms = (
        torch.randint(0, 11, (3, 8), generator=generator),
        torch.full((3,), 0.5),
        torch.rand(3, 8, 2, generator=generator),
    )

    def loss(objective: Objective, carry_over: bool) -> float:
        with torch.no_grad():
            return float(
                training_loss(
                    model, codec, schedule, x_0, t, uniforms, objective=objective, carry_over=carry_over
                )
            )

    assert loss("coded", True) < loss("coded", False)
    assert loss("nelbo", True) == loss("nelbo", False)


def test_nothing_masked_costs_nothing_and_has_a_gradient() -> None:
    model, codec, schedule = tiny_dit()
    loss = training_loss(
        model,
        codec,
        schedule,
        torch.zeros(1, 8, dtype=torch.long),
        torch.tensor([1e-9]),
        torch.full((1, 8, 2), 0.5),
    )
    loss.backward()
    assert loss.item() == 0.0


class Unfused:
    """A network that hides that its head is linear, as one with another head: its logits are made a chunk at a time."""

    linear_head = None

    def __init__(self, inner: DiT) -> None:
        self.inner = inner

    def features(self, *arguments: Any) -> Tensor:
        return self.inner.features(*arguments)

    def head(self, features: Tensor) -> Tensor:
        return self.inner.head(features)


def gradient_of(model: DiT, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("objective", "carry_over"), [("coded", True), ("coded", False), ("nelbo", True)])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("chunk_rows", [5, 1000])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_fused_head_changes_nothing(
    objective: Objective,
    carry_over: bool,
    weighted: bool,
    chunk_rows: int,
    precision: str,
    generator: torch.Generator,
) -> None:
    model, codec, schedule = tiny_dit()
    x_0, t = torch.randint(0, 11, (6, 8), generator=generator), torch.linspace(0.1, 1, 6)
    uniforms = torch.rand(6, 8, 2, generator=generator)

    def loss(denoiser: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return training_loss(
                denoiser,
                codec,
                schedule,
                x_0,
                t,
                uniforms,
                objective=objective,
                carry_over=carry_over,
                weighted=weighted,
                chunk_rows=chunk_rows,
            )

    want, got = loss(Unfused(model)), loss(model)
    assert got.dtype == torch.float32
    tolerance = 1e-5 if precision == "float32" else 2e-2
    assert got.item() == pytest.approx(want.item(), rel=tolerance / 10)
    theirs, mine = gradient_of(model, want), gradient_of(model, got)
    assert float(theirs.norm()) > 1e-2
    assert float((mine - theirs).norm()) < tolerance * float(theirs.norm())


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest floating-point tensor that any operation returned, in either pass."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor) and each.is_floating_point():
                self.numel = max(self.numel, each.numel())
        return result


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("what", ["coded", "nelbo", "likelihood", "grid"])
def test_logits_of_all_tokens_never_exist(what: str, fused: bool) -> None:
    vocab_size, num_rows, length, chunk_rows = 300, 12, 8, 32
    codec, schedule = SubtokenCodec(vocab_size, 1), LinearSchedule(1e-3)  # one digit: no token is spared
    model = random_dit(codec)
    denoiser: Any = model if fused else Unfused(model)
    x_0 = torch.zeros(num_rows, length, dtype=torch.long)

    def largest(chunk_rows: int) -> int:
        generator = torch.Generator().manual_seed(0)
        with LargestTensor() as seen:
            if what == "likelihood":
                estimate_likelihood(
                    denoiser, codec, schedule, x_0, generator=generator, chunk_rows=chunk_rows
                )
            elif what == "grid":
                estimate_grid_nelbo(
                    denoiser, codec, schedule, x_0, 1, generator=generator, chunk_rows=chunk_rows
                )
            else:
                training_loss(
                    denoiser,
                    codec,
                    schedule,
                    x_0,
                    torch.ones(num_rows),
                    torch.ones(num_rows, length, 1),
                    objective="coded" if what == "coded" else "nelbo",
                    chunk_rows=chunk_rows,
                ).backward()
        return seen.numel

    assert largest(chunk_rows) == chunk_rows * vocab_size < x_0.numel() * vocab_size
    everything = largest(x_0.numel())
    if what == "likelihood":  # some of its tokens are visible
        assert everything > chunk_rows * vocab_size
    else:
        assert everything == x_0.numel() * vocab_size  # so the measurement would notice them
