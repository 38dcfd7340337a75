"""The fused head against a head whose logits exist: values, gradients, number types, memory."""

from __future__ import annotations

from typing import Literal, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels.linear_nll
from kernels.backend import Backend
from kernels.candidates import group_by_visible_digit
from kernels.linear_nll import LinearHead, Targets, linear_nll, linear_subtoken_nll
from kernels.nll import coded_nll, subtoken_nll
from prime_core.codec import SubtokenCodec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM = 8


class Case(NamedTuple):
    features: Tensor
    head: LinearHead
    targets: Targets
    weights: Tensor


def make_case(
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    rows: int = 40,
    dtype: torch.dtype = torch.float64,
    permuted: bool = True,
) -> Case:
    vocab_size, target_length = size
    permutation = torch.randperm(vocab_size, generator=generator) if permuted else None
    codec = SubtokenCodec(vocab_size, target_length, permutation)
    x_0 = torch.randint(0, vocab_size, (rows,), generator=generator)
    masked = torch.rand(rows, target_length, generator=generator) < torch.linspace(0, 1, rows)[:, None]
    y_t = torch.where(masked, codec.mask_index, codec.encode(x_0))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    return Case(
        draw(rows, DIM),
        LinearHead(draw(vocab_size, DIM), draw(vocab_size)),
        Targets(y_t.to(DEVICE), x_0.to(DEVICE), codec.digits.to(DEVICE), codec.mask_index),
        torch.rand(rows, generator=generator).to(DEVICE),
    )


Objective = Literal["coded", "digits"]


def plain_loss(case: Case, objective: Objective, carry_over: bool) -> Tensor:
    """The same sum from logits that exist, under whatever autocast there is."""
    logits = F.linear(case.features, *case.head)
    if logits.dtype == torch.bfloat16:
        logits = logits.float()
    if objective == "digits":
        nll = subtoken_nll(logits, *case.targets, backend="reference").digits
    else:
        nll = coded_nll(logits, *case.targets, carry_over=carry_over, backend="reference")
    return (nll * case.weights).sum()


def gradients(loss: Tensor, case: Case) -> list[Tensor]:
    return list(torch.autograd.grad(3 * loss, (case.features, *case.head)))  # 3: the upstream gradient counts


KINDS = [("coded", True), ("coded", False), ("digits", True)]


@pytest.mark.parametrize(("objective", "carry_over"), KINDS)
@pytest.mark.parametrize(
    ("size", "permuted"), [((11, 2), True), ((300, 3), False), ((81, 4), True), ((7, 1), True)]
)
@pytest.mark.parametrize("chunk_rows", [1, 7, 40, 4096])
def test_equals_logits_that_exist(
    objective: Objective,
    carry_over: bool,
    size: tuple[int, int],
    permuted: bool,
    chunk_rows: int,
    generator: torch.Generator,
) -> None:
    case = make_case(size, generator, permuted=permuted)
    want = plain_loss(case, objective, carry_over)
    got = linear_nll(
        *case, objective=objective, carry_over=carry_over, chunk_rows=chunk_rows, backend="reference"
    )
    assert abs(got - want) < 1e-10 * abs(want)
    for mine, theirs in zip(gradients(got, case), gradients(want, case), strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("objective", "carry_over"), KINDS)
def test_triton(objective: Objective, carry_over: bool, generator: torch.Generator) -> None:
    pytest.importorskip("triton")
    case = make_case((81, 4), generator, rows=12, dtype=torch.float32)
    want = plain_loss(case, objective, carry_over)
    got = linear_nll(*case, objective=objective, carry_over=carry_over, chunk_rows=5, backend="triton")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients(got, case), gradients(want, case), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ["coded", "digits"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_autocast(objective: Objective, backend: Backend, generator: torch.Generator) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    case = make_case((81, 4), generator, dtype=torch.float32)
    exact = gradients(plain_loss(case, objective, True), case)
    with torch.autocast(DEVICE, torch.bfloat16):
        want = plain_loss(case, objective, True)
        got = linear_nll(*case, objective=objective, chunk_rows=16, backend=backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0.0)
    for mine, theirs, true in zip(gradients(got, case), gradients(want, case), exact, strict=True):
        assert mine.dtype == torch.float32
        error = (mine - true).norm() / true.norm()
        assert error < 1.2 * (theirs - true).norm() / true.norm() + 1e-3  # no further off than without fusing
        assert 1e-5 < error < 0.03  # and the products were in bfloat16


@pytest.mark.parametrize("size", [(11, 2), (81, 4), (7, 1)])
def test_likelihoods_of_every_row(size: tuple[int, int], generator: torch.Generator) -> None:
    case = make_case(size, generator)
    want = subtoken_nll(F.linear(case.features, *case.head), *case.targets, backend="reference")
    got = linear_subtoken_nll(*case[:3], chunk_rows=9, backend="reference")
    torch.testing.assert_close(got.coded, want.coded, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.digits, want.digits, rtol=1e-12, atol=1e-12)


def test_only_what_needs_a_gradient_gets_one(generator: torch.Generator) -> None:
    case = make_case((11, 2), generator)
    frozen = case._replace(head=LinearHead(*(each.detach() for each in case.head)))
    loss = linear_nll(*frozen, objective="coded", backend="reference")
    (gradient,) = torch.autograd.grad(loss, case.features)
    whole = gradients(plain_loss(case, "coded", True), case)[0] / 3
    torch.testing.assert_close(gradient, whole)
    with torch.no_grad():
        assert not linear_nll(*case, objective="coded", backend="reference").requires_grad


def test_a_second_backward_pass_is_refused(generator: torch.Generator) -> None:
    loss = linear_nll(*make_case((11, 2), generator), objective="coded", backend="reference")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()


def test_a_group_holds_the_tokens_with_its_digit(generator: torch.Generator) -> None:
    targets = make_case((300, 3), generator, permuted=False).targets
    y_t, x_0, digits, mask_index = (each.cpu() if isinstance(each, Tensor) else each for each in targets)
    groups = group_by_visible_digit(y_t, digits[x_0], digits, mask_index, 4)
    assert sorted(torch.cat([torch.as_tensor(group.rows) for group in groups]).tolist()) == list(range(40))
    narrow = 0
    for rows, tokens in groups:
        assert len(rows) <= 4
        allowed = torch.arange(300)[tokens]
        narrow += len(allowed) < 300
        for row in rows:
            fits = ((digits == y_t[row]) | (y_t[row] == mask_index)).all(1).nonzero()[:, 0]
            assert torch.isin(fits, allowed).all()
    assert narrow > 3
    assert any(isinstance(tokens, slice) and tokens.stop for _, tokens in groups)  # views of the head
    assert any(isinstance(tokens, Tensor) for _, tokens in groups)


@pytest.mark.skipif(DEVICE != "cpu", reason="rows are grouped on a CPU only")
def test_groups_spare_the_head(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = kernels.linear_nll.forward_scores

    def measured(logits: Tensor, *rest: object) -> object:
        sizes.append(logits.numel())
        return real(logits, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels.linear_nll, "forward_scores", measured)
    case = make_case((81, 4), generator, rows=400)
    linear_nll(*case, objective="coded", backend="reference")
    filtered = sum(sizes)
    sizes.clear()
    linear_nll(*case, objective="coded", carry_over=False, backend="reference")
    assert sum(sizes) == 400 * 81 and filtered < 0.6 * 400 * 81


def test_a_token_that_contradicts_what_is_visible_is_impossible(generator: torch.Generator) -> None:
    case = make_case((11, 2), generator)
    y_t = case.targets.y_t.clone()
    y_t[:, 0] = (case.targets.digits[case.targets.x_0, 0] + 1) % 3
    y_t[:, 1] = case.targets.mask_index
    case = case._replace(targets=case.targets._replace(y_t=y_t))
    assert linear_nll(*case, objective="coded", backend="reference") == torch.inf
