"""Philox noise: the published vectors, the open interval, independence of the batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from kernels import noise
from kernels.noise import MAX_SEED, Purpose, philox, row_seed, seed_words, uniform, unit_interval

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXTREME_WORDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)
SEEDS = (0, 1, 2**31, 2**32 - 1, 2**32, 2**63, MAX_SEED)

# Known-answer vectors of philox4x32-10 (Random123 distribution): counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def test_philox_known_answers_in_one_batch() -> None:
    counters = torch.tensor([counter for counter, _, _ in KNOWN_ANSWERS])
    keys = torch.tensor([key for _, key, _ in KNOWN_ANSWERS])
    assert philox(counters.T, keys.T).T.tolist() == [list(output) for _, _, output in KNOWN_ANSWERS]


def test_known_answers_in_the_kernel() -> None:
    pytest.importorskip("triton")
    from tests.kernels.philox_words_kernel import kernel_words

    known = [*KNOWN_ANSWERS, KNOWN_ANSWERS[0]]  # a kernel's block is a power of two
    counters = torch.tensor([counter for counter, _, _ in known], device=DEVICE)
    keys = torch.tensor([key for _, key, _ in known], device=DEVICE)
    assert kernel_words(counters.T, keys.T).T.tolist() == [list(output) for _, _, output in known]


def test_counter_is_position_index_zero_purpose() -> None:
    first, second, _, _ = philox(
        torch.tensor([7, 3, 0, int(Purpose.DRAW)]), torch.tensor(seed_words(2**63 + 11))
    )
    expected = unit_interval(first, second)
    assert uniform(2**63 + 11, torch.tensor(7), torch.tensor(3), Purpose.DRAW) == expected


def test_uniform_lies_strictly_inside_the_unit_interval() -> None:
    ends = unit_interval(torch.tensor([0, 0xFFFFFFFF]), torch.tensor([0, 0xFFFFFFFF]))
    assert ends.tolist() == [2.0**-53, 1 - 2.0**-53]


def test_uniform_is_uniform_for_every_purpose() -> None:
    positions = torch.arange(20_000)
    for purpose in Purpose:
        u = uniform(5, positions, torch.zeros_like(positions), purpose)
        assert kstest(u.numpy(), "uniform").pvalue > 1e-4


def test_every_argument_matters_and_neighbours_do_not() -> None:
    positions, index = torch.arange(100), torch.arange(100) % 4
    u = uniform(1, positions, index, Purpose.PLAN)
    assert torch.equal(u[40:41], uniform(1, positions[40:41], index[40:41], Purpose.PLAN))
    others = [
        uniform(2, positions, index, Purpose.PLAN),
        uniform(1 + 2**32, positions, index, Purpose.PLAN),
        uniform(1, positions + 1, index, Purpose.PLAN),
        uniform(1, positions, index + 1, Purpose.PLAN),
        uniform(1, positions, index, Purpose.DRAW),
    ]
    assert all(not bool((u == other).any()) for other in others)


def test_a_seed_per_element_equals_one_seed_at_a_time() -> None:
    seeds = [0, 1, 2**32, MAX_SEED]
    positions, index = torch.tensor([0, 5, 9, 2]), torch.tensor([0, 1, 0, 3])
    together = uniform(torch.tensor([seed_words(seed) for seed in seeds]), positions, index, Purpose.DRAW)
    alone = [uniform(s, p, i, Purpose.DRAW).item() for s, p, i in zip(seeds, positions, index, strict=True)]
    assert together.tolist() == alone


@pytest.mark.parametrize("seed", SEEDS)
def test_few_numbers_have_the_bits_that_many_have(
    seed: int, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """Few are numpy's work, many torch's."""
    positions, index = torch.tensor([*itertools.product(EXTREME_WORDS, EXTREME_WORDS)]).T
    column, row = (torch.randint(0, 2**32, shape, generator=generator) for shape in ((7, 1), (5,)))
    own = torch.tensor([seed_words(each) for each in SEEDS])
    operands = [
        (seed, positions, index),
        (seed, column, row),
        (own[:, None], column, row),
        (own[0], row, row),
    ]
    of_numpy = [uniform(*each, Purpose.PLAN) for each in operands]
    monkeypatch.setattr(noise, "_MAX_FOR_NUMPY", -1)
    for one, each in zip(of_numpy, operands, strict=True):
        assert torch.equal(one, uniform(*each, Purpose.PLAN)) and len(one.unique()) == one.numel()


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, True, 1.0, "1"])
def test_a_seed_out_of_range_is_refused(seed: object) -> None:
    with pytest.raises(ValueError, match=r"seed must be an integer in 0\.\.2\*\*64-1"):
        seed_words(seed)  # type: ignore[arg-type]


def test_row_seeds_reproduce_alone_and_differ() -> None:
    for seed in (0, 12345, MAX_SEED):
        seeds = [row_seed(seed, row) for row in range(200)]
        assert seeds[0] == seed
        assert len(set(seeds)) == 200
        assert all(0 <= s <= MAX_SEED for s in seeds)
        assert max(seeds) > 2**60
        for row in (1, 17, 2**32 - 1):
            high, low, _, _ = philox(
                torch.tensor([row, 0, 0, int(Purpose.ROW)]), torch.tensor(seed_words(seed))
            ).tolist()
            assert row_seed(seed, row) == high << 32 | low
    for row in (-1, 2**32):
        with pytest.raises(ValueError, match="row must be"):
            row_seed(0, row)


def words(generator: torch.Generator, *shape: int) -> Tensor:
    """Random 32-bit words on the device of the tests."""
    return torch.randint(0, 2**32, shape, generator=generator).to(DEVICE)


def assert_same_bits(seed: int | Tensor, positions: Tensor, index: Tensor, purpose: Purpose) -> None:
    """Kernel and reference agree in every bit, and the numbers are not all equal."""
    pytest.importorskip("triton")
    expected = uniform(seed, positions, index, purpose, backend="reference")
    actual = uniform(seed, positions, index, purpose, backend="triton")
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == torch.float64
    assert torch.equal(actual.view(torch.int64), expected.view(torch.int64))
    assert expected.numel() < 2 or len(expected.unique()) > 1


@pytest.mark.parametrize("seed", SEEDS)
def test_kernel_has_the_same_bits_for_extreme_words(seed: int) -> None:
    positions, index = torch.tensor([*itertools.product(EXTREME_WORDS, EXTREME_WORDS)], device=DEVICE).T
    assert_same_bits(seed, positions, index, Purpose.MASK)
    own = torch.tensor([seed_words(seed)], device=DEVICE).expand(len(positions), 2)
    assert_same_bits(own, positions, index, Purpose.MASK)


@pytest.mark.parametrize("purpose", Purpose)
def test_kernel_has_the_same_bits_for_random_words(purpose: Purpose, generator: torch.Generator) -> None:
    assert_same_bits(2**40 + 5, words(generator, 300), words(generator, 300), purpose)  # more than one block
    assert_same_bits(words(generator, 300, 2), words(generator, 300), words(generator, 300), purpose)


def test_kernel_broadcasts_and_reads_any_strides(generator: torch.Generator) -> None:
    column, row, plane = words(generator, 7, 1), words(generator, 1, 5), words(generator, 3, 1, 1)
    transposed = words(generator, 5, 7).T
    for positions, index in (
        (column, row),
        (column.expand(7, 5), transposed),
        (plane, transposed),
        (column, plane),
    ):
        assert_same_bits(9, positions, index, Purpose.DRAW)
        shape = torch.broadcast_shapes(positions.shape, index.shape)
        assert_same_bits(words(generator, *shape, 2), positions, index, Purpose.DRAW)
        assert_same_bits(words(generator, 7, 1, 2), positions, index, Purpose.DRAW)
        assert_same_bits(words(generator, 2, 7, 1).movedim(0, -1), positions, index, Purpose.DRAW)


@pytest.mark.parametrize("shape", [(), (0,), (1, 1), (3, 0, 2)])
def test_kernel_takes_single_numbers_and_none(shape: tuple[int, ...], generator: torch.Generator) -> None:
    assert_same_bits(4, words(generator, *shape), words(generator, *shape), Purpose.LABEL)
    assert_same_bits(
        words(generator, *shape, 2), words(generator, *shape), words(generator, *shape), Purpose.LABEL
    )


def test_operands_that_fold_into_two_dimensions_are_not_copied(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    pytest.importorskip("triton")
    copies = []
    contiguous = Tensor.contiguous

    def counted(tensor: Tensor) -> Tensor:
        copies.append(tensor.shape)
        return contiguous(tensor)

    monkeypatch.setattr(Tensor, "contiguous", counted)
    uniform(
        words(generator, 7, 1, 2), words(generator, 7, 1), words(generator, 5), Purpose.DRAW, backend="triton"
    )
    assert not copies
    uniform(1, words(generator, 3, 1, 1), words(generator, 5, 7).T, Purpose.DRAW, backend="triton")
    assert copies == [(3, 7, 5), (3, 7, 5)]


def test_the_path_that_was_asked_for_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    import kernels.triton_ops.noise as triton_noise

    ran = []
    monkeypatch.setattr(triton_noise, "launch_uniform", lambda *args: ran.append(args))
    number = torch.tensor(3, device=DEVICE)
    uniform(1, number, number, Purpose.DRAW, backend="reference")
    assert not ran
    uniform(1, number, number, Purpose.DRAW, backend="triton")
    assert len(ran) == 1
    with pytest.raises(ValueError, match="backend must be"):
        uniform(1, number, number, Purpose.DRAW, backend="numpy")  # type: ignore[arg-type]
