"""Negative log-likelihoods of every backend against sums over tokens that are spelled out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import kernels.nll
from kernels.backend import Backend
from kernels.nll import SubtokenNLL, coded_nll, revealed_nll, subtoken_nll
from kernels.packed_digits import pack_digits
from prime_core.codec import SubtokenCodec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (11, 2) and (5, 3) have codes that stand for no token; (2187, 7) takes several blocks, for one set and for eight.
SIZES = [(11, 2), (5, 3), (300, 1), (256, 2), (2187, 7)]
BACKENDS: list[Backend] = ["reference", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param  # type: ignore[no-any-return]


class Case(NamedTuple):
    logits: Tensor
    y_t: Tensor
    x_0: Tensor
    digits: Tensor
    mask_index: int


def make_case(
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    rows: int = 8,
    dtype: torch.dtype = torch.float32,
    scale: float = 2.0,
) -> Case:
    vocab_size, target_length = size
    codec = SubtokenCodec(vocab_size, target_length, torch.randperm(vocab_size, generator=generator))
    x_0 = torch.randint(0, vocab_size, (rows,), generator=generator)
    share = torch.linspace(0, 1, rows)[:, None]  # the first row has nothing masked, the last one everything
    masked = torch.rand(rows, target_length, generator=generator) < share
    y_t = torch.where(masked, codec.mask_index, codec.encode(x_0))
    logits = scale * torch.randn(rows, vocab_size, generator=generator)
    return Case(
        logits.to(DEVICE, dtype), y_t.to(DEVICE), x_0.to(DEVICE), codec.digits.to(DEVICE), codec.mask_index
    )


def spelled_out(case: Case, *, carry_over: bool = True) -> SubtokenNLL:
    """The definitions, row by row and token by token, in float64."""
    logits, y_t, x_0, digits, mask_index = case
    coded, per_digit = [], []
    for row, y, x in zip(logits.double(), y_t, x_0, strict=True):
        allowed = (
            ((digits == y) | (y == mask_index)).all(1) if carry_over else torch.ones_like(digits[:, 0] > 0)
        )
        total = row[allowed].logsumexp(0)
        coded.append(total - row[x])
        terms = [
            total - row[allowed & (digits[:, j] == digits[x, j])].logsumexp(0)
            for j in range(len(y))
            if y[j] == mask_index
        ]
        per_digit.append(torch.stack(terms).sum() if terms else total * 0)
    return SubtokenNLL(torch.stack(coded), torch.stack(per_digit))


def gradient_of(nll: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nll(leaf), leaf)
    return gradient


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values(
    size: tuple[int, int], dtype: torch.dtype, backend: Backend, generator: torch.Generator
) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels sum in float32; refused, see below")
    case = make_case(size, generator, dtype=dtype)
    want = spelled_out(case)
    exact = dtype == torch.float64
    close = {"rtol": 1e-12 if exact else 1e-5, "atol": 1e-12 if exact else 2e-5}
    got = subtoken_nll(*case, backend=backend)
    assert got.coded.dtype == (torch.float64 if exact else torch.float32)
    torch.testing.assert_close(got.coded.double(), want.coded, **close)
    torch.testing.assert_close(got.digits.double(), want.digits, **close)
    torch.testing.assert_close(coded_nll(*case, backend=backend).double(), want.coded, **close)
    unfiltered = coded_nll(*case, carry_over=False, backend=backend).double()
    torch.testing.assert_close(unfiltered, spelled_out(case, carry_over=False).coded, **close)
    nothing_masked = (case.y_t != case.mask_index).all(1)
    assert nothing_masked.any() and (unfiltered[nothing_masked] > 0.1).any()
    assert not got.coded[nothing_masked].any() and not got.digits[nothing_masked].any()


@pytest.mark.parametrize(
    ("size", "dtype"),
    [*((size, torch.float32) for size in SIZES), ((11, 2), torch.bfloat16), ((11, 2), torch.float16)],
)
def test_gradients(
    size: tuple[int, int], dtype: torch.dtype, backend: Backend, generator: torch.Generator
) -> None:
    case = make_case(size, generator, rows=5, dtype=dtype)
    rest = case[1:]
    weights = torch.rand(2, len(case.x_0), generator=generator).to(DEVICE)

    def both(logits: Tensor, backend: Backend) -> Tensor:
        nll = subtoken_nll(logits, *rest, backend=backend)
        return (nll.coded * weights[0] + nll.digits * weights[1]).sum()

    losses: list[Callable[[Tensor, Backend], Tensor]] = [
        both,
        lambda logits, b: (subtoken_nll(logits, *rest, backend=b).digits * weights[1]).sum(),
        lambda logits, b: (coded_nll(logits, *rest, backend=b) * weights[0]).sum(),
        lambda logits, b: (coded_nll(logits, *rest, carry_over=False, backend=b) * weights[0]).sum(),
    ]
    # Triton's interpreter truncates to bfloat16.
    close = {"rtol": 1e-4 if dtype == torch.float32 else 2**-7, "atol": 1e-6}
    for loss in losses:
        want = gradient_of(lambda logits, loss=loss: loss(logits, "reference"), case.logits.double())
        got = gradient_of(lambda logits, loss=loss: loss(logits, backend), case.logits)
        assert got.dtype == dtype and want.abs().max() > 0.01
        torch.testing.assert_close(got.double(), want, **close)
    nothing_masked = (case.y_t != case.mask_index).all(1)
    assert not gradient_of(lambda logits: both(logits, backend), case.logits)[nothing_masked].any()


@pytest.mark.parametrize("size", [(11, 2), (5, 3), (6, 1)])
def test_finite_differences(size: tuple[int, int], generator: torch.Generator) -> None:
    case = make_case(size, generator, rows=6, dtype=torch.float64)
    logits, rest = case.logits.requires_grad_(), case[1:]
    assert torch.autograd.gradcheck(lambda z: tuple(subtoken_nll(z, *rest, backend="reference")), logits)
    for carry_over in (True, False):
        assert torch.autograd.gradcheck(
            lambda z, c=carry_over: coded_nll(z, *rest, carry_over=c, backend="reference"), logits
        )


def test_digits_far_less_likely_than_the_rest(backend: Backend, generator: torch.Generator) -> None:
    """Their terms vanish next to the largest one of the row: sums and gradients must not."""
    case = make_case((256, 2), generator)
    far = case.logits.clone()
    unlikely = case.digits[:, 0] == 3
    far[:, unlikely] -= 150.0
    y_t, x_0 = torch.full_like(case.y_t, case.mask_index), case.x_0.clone()
    x_0[:] = unlikely.nonzero()[0, 0]
    case = case._replace(logits=far, y_t=y_t, x_0=x_0)
    want = spelled_out(case)
    assert want.digits.min() > 140
    got = subtoken_nll(*case, backend=backend)
    torch.testing.assert_close(got.digits.double(), want.digits, rtol=1e-5, atol=1e-4)

    def loss(logits: Tensor, backend: Backend) -> Tensor:
        return subtoken_nll(logits, *case[1:], backend=backend).digits.sum()

    gradient = gradient_of(lambda z: loss(z, backend), far)
    leaf = far.double().requires_grad_()
    (expected,) = torch.autograd.grad(spelled_out(case._replace(logits=leaf)).digits.sum(), leaf)
    assert expected[:, unlikely].abs().max() > 0.1
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


def test_excluded_tokens(backend: Backend, generator: torch.Generator) -> None:
    case = make_case((11, 2), generator, rows=8)
    logits = case.logits.clone()
    others = torch.arange(11, device=DEVICE) != case.x_0[:, None]
    logits[0] = -torch.inf  # nothing is masked here: still 0
    logits[-1, case.x_0[-1]] = -torch.inf  # everything is masked: x_0 is impossible
    logits[-2, others[-2]] = -torch.inf  # only x_0 is possible
    case = case._replace(logits=logits)
    nll = subtoken_nll(*case, backend=backend)
    assert nll.coded[0] == 0 and nll.digits[0] == 0
    assert nll.coded[-1] == torch.inf and nll.digits[-1].isfinite()
    assert nll.coded[-2] == 0 and nll.digits[-2] == 0
    gradient = gradient_of(lambda z: subtoken_nll(z, *case[1:], backend=backend).digits.sum(), logits)
    assert gradient.isfinite().all() and not gradient[logits == -torch.inf].any()
    same_digit = case.digits[:, 0] == case.digits[case.x_0[-1], 0]
    logits[-1, same_digit] = -torch.inf  # and so is its first digit
    assert subtoken_nll(*case, backend=backend).digits[-1] == torch.inf
    gradient = gradient_of(lambda z: subtoken_nll(z, *case[1:], backend=backend).digits.sum(), logits)
    assert gradient.isfinite().all()


def test_not_a_number_is_not_hidden(backend: Backend, generator: torch.Generator) -> None:
    case = make_case((11, 2), generator, rows=8)
    case.logits[-1, 4] = torch.nan
    nll = subtoken_nll(*case, backend=backend)
    assert nll.coded[-1].isnan() and nll.digits[-1].isnan()
    assert nll.coded[:-1].isfinite().all()


def test_a_token_that_contradicts_what_is_visible_is_impossible(
    backend: Backend, generator: torch.Generator
) -> None:
    case = make_case((11, 2), generator)
    y_t = torch.stack([(case.digits[case.x_0, 0] + 1) % 3, torch.full_like(case.x_0, case.mask_index)], 1)
    assert (coded_nll(case.logits, y_t, *case[2:], backend=backend) == torch.inf).all()


@pytest.mark.parametrize("size", [(11, 2), (2187, 7)])
def test_revealed_digits(size: tuple[int, int], backend: Backend, generator: torch.Generator) -> None:
    case = make_case(size, generator)
    hidden = torch.rand(case.y_t.shape, generator=generator).to(DEVICE) < 0.5
    after = torch.where(hidden, case.y_t, case.digits[case.x_0])
    got = revealed_nll(case.logits, case.y_t, after, case.digits, case.mask_index, backend=backend)
    for row, (before, revealed) in enumerate(zip(case.y_t, after, strict=True)):
        mass = [
            case.logits[row, ((case.digits == y) | (y == case.mask_index)).all(1)].double().logsumexp(0)
            for y in (before, revealed)
        ]
        assert float(got[row]) == pytest.approx(float(mass[0] - mass[1]), abs=2e-5)
        assert got[row] == 0 or (before != revealed).any()


def test_strides(backend: Backend, generator: torch.Generator) -> None:
    case = make_case((256, 2), generator)
    want = subtoken_nll(*case, backend=backend)
    wide = torch.zeros(len(case.x_0), 600, device=DEVICE)
    wide[:, 3:259] = case.logits
    for logits in (wide[:, 3:259], case.logits.T.contiguous().T):
        assert not logits.is_contiguous()
        got = subtoken_nll(logits, *case[1:], backend=backend)
        torch.testing.assert_close(got.coded, want.coded)
        torch.testing.assert_close(got.digits, want.digits)
        torch.testing.assert_close(
            gradient_of(lambda z: subtoken_nll(z, *case[1:], backend=backend).digits.sum(), logits),
            gradient_of(lambda z: subtoken_nll(z, *case[1:], backend=backend).digits.sum(), case.logits),
        )


def test_no_rows(backend: Backend, generator: torch.Generator) -> None:
    case = make_case((11, 2), generator)
    empty = case._replace(logits=case.logits[:0], y_t=case.y_t[:0], x_0=case.x_0[:0])
    assert subtoken_nll(*empty, backend=backend).digits.shape == (0,)


def test_which_path_runs(
    backend: Backend, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(kernels.nll, "set_lse", refuse)
    monkeypatch.setattr(kernels.nll, "set_gradient", refuse)
    case = make_case((11, 2), generator)
    if backend == "reference":
        with pytest.raises(AssertionError, match="the reference ran"):
            coded_nll(*case, backend=backend)
    else:
        gradient_of(lambda z: coded_nll(z, *case[1:], backend=backend).sum(), case.logits)


def test_kernels_refuse_float64(generator: torch.Generator) -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="float64 logits need backend='reference'"):
        coded_nll(*make_case((11, 2), generator, dtype=torch.float64), backend="triton")


@pytest.mark.parametrize(
    ("digits", "base", "dtype"),
    [
        ([[14, 0, 3, 14]], 15, torch.int16),  # sixteen bits: the sign is one of them
        ([[3, 1, 2, 0, 3, 2, 1, 3, 1]], 4, torch.int32),
        ([[2] * 23, [1] * 23], 3, torch.int64),
    ],
)
def test_packing_keeps_every_digit(digits: list[list[int]], base: int, dtype: torch.dtype) -> None:
    table = torch.tensor(digits)
    packed = pack_digits(table, base)
    assert packed.dtype == dtype
    bits = (base - 1).bit_length()
    for j in range(table.shape[1]):
        shift = bits * (table.shape[1] - 1 - j)
        assert torch.equal(packed.long() >> shift & (1 << bits) - 1, table[:, j])
