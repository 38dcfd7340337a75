"""The gradient of the digit embeddings' table: finite differences, number types, every way to sum, the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.embed import embed_planes, embed_subtokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ["tokens", "channels_first", "channels_last"]
# Number of values and whether sums are ordered -> the way that sums them, with `small_pieces`.
WAYS = [
    (4, False, "_few_values"),
    (4, True, "_few_values"),
    (6, False, "_atomics"),
    (6, True, "sum_sorted_runs"),
]


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows a piece, so that few rows are several pieces: the interpreter is slow."""
    if find_spec("triton") is not None:
        monkeypatch.setattr("kernels.triton_ops.embed_runs.CHUNK", 4)
        monkeypatch.setattr("kernels.triton_ops.embed_gradient.MIN_PIECE", 8)
        monkeypatch.setattr("kernels.triton_ops.embed_gradient.FEW_VALUES", 4)


@pytest.fixture
def no_deterministic_algorithms() -> Iterator[None]:
    """Undo `torch.use_deterministic_algorithms` after a test."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def embed(y_t: Tensor, table: Tensor, layout: str, **options: Any) -> Tensor:
    """Embed images (B, C, H, W, S) in a layout."""
    if layout == "tokens":
        return embed_subtokens(y_t, table, **options)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return embed_planes(y_t, table, memory_format=memory_format, **options)


def masked_digits(generator: torch.Generator, num_values: int, *shape: int) -> Tensor:
    """Half of the digits masked, as in training."""
    digits = torch.randint(0, num_values, shape, generator=generator)
    masked = torch.rand(shape, generator=generator) < 0.5
    return digits.masked_fill(masked, num_values - 1).to(DEVICE)


def gradient(out: Tensor, table: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of the table for random numbers (rounded to bfloat16) in place of the gradient of `out`."""
    numbers = torch.randn(out.shape, generator=generator).bfloat16().to(out.device, out.dtype)
    (result,) = torch.autograd.grad(out, table, numbers)
    return result


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_values", "deterministic", "way"), WAYS)
def test_finite_differences(
    num_values: int, deterministic: bool, way: str, layout: str, backend: Backend, generator: torch.Generator
) -> None:
    y_t = masked_digits(generator, num_values, 1, 2, 1, 3, 1)
    table = torch.randn(num_values, 1, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()

    def op(table: Tensor) -> Tensor:
        return embed(y_t, table, layout, deterministic=deterministic, backend=backend)

    assert torch.autograd.gradcheck(op, table, nondet_tol=0.0 if deterministic else 1e-12)


@pytest.mark.usefixtures("small_pieces")
# An ulp of bfloat16: Triton's interpreter cuts off where a GPU rounds.
@pytest.mark.parametrize(
    ("layout", "table_dtype", "out_dtype", "tolerance"),
    [
        ("channels_first", torch.float32, torch.float32, 1e-5),
        ("channels_last", torch.float32, torch.bfloat16, 1e-5),
        ("tokens", torch.bfloat16, torch.float32, 2**-7),
        ("channels_first", torch.bfloat16, torch.bfloat16, 2**-7),
    ],
)
@pytest.mark.parametrize(("num_values", "deterministic", "way"), WAYS)
def test_every_way_agrees_with_float64(
    layout: str,
    table_dtype: torch.dtype,
    out_dtype: torch.dtype,
    tolerance: float,
    num_values: int,
    deterministic: bool,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
) -> None:
    pytest.importorskip("triton")
    import kernels.triton_ops.embed_gradient as triton_gradient

    ran = []
    for name in ("_few_values", "_atomics", "sum_sorted_runs"):
        original = getattr(triton_gradient, name)
        monkeypatch.setattr(
            triton_gradient,
            name,
            lambda *args, name=name, original=original: ran.append(name) or original(*args),
        )
    y_t = masked_digits(generator, num_values, 2, 2, 3, 3, 2)
    table = torch.randn(num_values, 10, generator=generator).to(DEVICE, table_dtype).requires_grad_()
    state = generator.get_state()
    options: dict[str, Any] = {"out_dtype": out_dtype, "deterministic": deterministic}
    found = gradient(embed(y_t, table, layout, backend="triton", **options), table, generator)
    assert ran == [way] and found.dtype == table_dtype
    wide = table.detach().double().requires_grad_()
    expected = gradient(embed(y_t, wide, layout, backend="reference"), wide, generator.set_state(state))
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    own = gradient(
        embed(y_t, table, layout, backend="reference", **options), table, generator.set_state(state)
    )
    torch.testing.assert_close(own.double(), expected, rtol=tolerance, atol=tolerance)


RUNS = {
    "one long run": [3] * 150,
    "runs that end where pieces end": [0] * 64 + [7] * 128,
    "runs inside pieces": [value for value in range(40) for _ in range(3)],
    "a run over pieces between others": [0] * 30 + [1] * 100 + [39] * 3,
    "one of each": list(range(40)),
    "one row": [17],
}


@pytest.mark.parametrize("name", RUNS)
def test_sorted_runs_of_every_kind(name: str, generator: torch.Generator) -> None:
    pytest.importorskip("triton")
    digits = torch.tensor(RUNS[name])
    y_t = digits[torch.randperm(len(digits), generator=generator)][:, None].to(DEVICE)
    table = torch.zeros(40, 3, device=DEVICE, requires_grad=True)
    numbers = torch.randint(-8, 9, (len(digits), 3), generator=generator).float().to(DEVICE)
    (found,) = torch.autograd.grad(
        embed_subtokens(y_t, table, deterministic=True, backend="triton"), table, numbers
    )
    assert torch.equal(
        found, torch.zeros_like(found).index_add(0, y_t[:, 0], numbers)
    )  # whole numbers: exact


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("num_values", [4, 6])
def test_deterministic_gradients_have_the_same_bits_in_every_run(
    num_values: int, backend: Backend, generator: torch.Generator
) -> None:
    y_t = masked_digits(generator, num_values, 20, 3)
    table = torch.randn(num_values, 4, generator=generator).to(DEVICE).requires_grad_()
    out = embed_subtokens(y_t, table, deterministic=True, backend=backend)
    numbers = torch.randn(out.shape, generator=generator).to(DEVICE)
    first, second = (torch.autograd.grad(out, table, numbers, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.usefixtures("no_deterministic_algorithms")
def test_the_global_switch_asks_for_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    import kernels.triton_ops.embed_gradient as triton_gradient

    def refuse(*args: object) -> Tensor:
        raise AssertionError("atomics add in any order")

    monkeypatch.setattr(triton_gradient, "_atomics", refuse)
    monkeypatch.setattr("kernels.triton_ops.embed_runs.CHUNK", 4)
    table = torch.ones(40, 2, device=DEVICE, requires_grad=True)
    out = embed_subtokens(torch.tensor([[1, 39]], device=DEVICE), table, backend="triton").sum()
    with pytest.raises(AssertionError, match="any order"):
        torch.autograd.grad(out, table, retain_graph=True)
    torch.use_deterministic_algorithms(True)
    (found,) = torch.autograd.grad(out, table)
    assert found.sum(1).nonzero()[:, 0].tolist() == [1, 39]


def test_sixteen_bit_tables_do_not_lose_long_sums(backend: Backend) -> None:
    for num_values in (2, 40):
        table = torch.zeros(num_values, 1, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        y_t = torch.full((260, 1), num_values - 1, device=DEVICE)
        embed_subtokens(y_t, table, backend=backend).sum().backward()
        assert table.grad is not None
        assert table.grad[-1].item() == 260  # bfloat16 cannot count past 256
        assert not table.grad[:-1].any()


@pytest.mark.usefixtures("small_pieces")
def test_wrong_digits_and_no_digits_add_nothing() -> None:
    pytest.importorskip("triton")
    for num_values in (4, 6):
        for deterministic in (False, True):
            table = torch.zeros(num_values, 2, device=DEVICE, requires_grad=True)
            y_t = torch.tensor([[1], [-1], [num_values], [1]], device=DEVICE)
            options: dict[str, Any] = {"deterministic": deterministic, "backend": "triton"}
            embed_subtokens(y_t, table, **options).sum().backward()
            assert table.grad is not None
            assert table.grad[:, 0].nonzero().tolist() == [[1]] and table.grad[1].tolist() == [2, 2]
            (nothing,) = torch.autograd.grad(embed_subtokens(y_t[:0], table, **options).sum(), table)
            assert nothing.shape == table.shape and not nothing.any()
