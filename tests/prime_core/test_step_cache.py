"""The step cache: results as if every row had been evaluated, from evaluations of the rows that changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.transfers import HostCopy
from prime_core.codec import SubtokenCodec
from prime_core.models.denoiser import Denoiser
from prime_core.sampling import step_cache
from prime_core.sampling.step_cache import StepCache, bucket_size
from tests.prime_core.random_dit import random_dit
from tests.prime_core.random_unet import random_unet
from tests.stubs import TableDenoiser

CODEC = SubtokenCodec(16, 2)
LENGTH, NUM_ROWS = 6, 5


def advance(cache: StepCache, y: Tensor, wanted: Tensor | None = None) -> int:
    num_changed = cache.begin(y, wanted)
    assert num_changed.shape == (1,)
    (number,) = HostCopy(num_changed).wait().tolist()
    cache.finish(number)
    return number


def changes(length: int) -> list[tuple[Tensor, list[int]]]:
    """Digits of a batch step by step, and the rows that changed in each."""
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(0, CODEC.base + 1, (NUM_ROWS, length, 2), generator=generator)
    steps = [(y, list(range(NUM_ROWS)))]
    for rows in ([3], [], [0, 2, 4], [1, 0], list(range(NUM_ROWS))):
        y = y.clone()
        y[rows, -1, 0] = (y[rows, -1, 0] + 1) % (CODEC.base + 1)  # one digit of the row
        steps.append((y, rows))
    return steps


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("kind", ["text", "images", "labelled images"])
def test_features_are_those_of_a_full_evaluation(
    kind: str, power_of_two: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if power_of_two:  # what CUDA does
        monkeypatch.setattr(
            step_cache, "bucket_size", lambda n, rows, device: bucket_size(n, rows, torch.device("cuda"))
        )
    network: Denoiser
    if kind == "text":
        network, length, labels = random_dit(CODEC), LENGTH, None
    elif kind == "images":
        network, length, labels = random_unet(), 12, None
    else:
        network, length = random_unet(labels="class", num_labels=3), 12
        labels = torch.tensor([0, 2, 1, 1, 0])
    cache = StepCache(network, CODEC.mask_index, labels)
    positions = torch.arange(0, NUM_ROWS * length, 3)
    total = 0
    with torch.inference_mode():
        for y, rows in changes(length):
            assert advance(cache, y) == len(rows)
            total += len(rows)
            full = network.features(y.flatten(0, 1), [length] * NUM_ROWS, positions=positions, labels=labels)
            torch.testing.assert_close(
                network.head(cache.features(positions)), network.head(full), rtol=1e-5, atol=1e-5
            )
    assert cache.row_evaluations == total
    assert cache.num_calls == 5  # one step changed nothing


def test_calls_hold_the_rows_that_changed() -> None:
    model = TableDenoiser(CODEC)
    cache = StepCache(model, CODEC.mask_index)
    for y, _ in changes(LENGTH):
        advance(cache, y)
    assert [sum(lengths) for lengths in model.lengths] == [
        32,
        16,
        32,
        16,
        32,
    ]  # 30, 6, 18, 12 and 30, filled up
    assert cache.row_evaluations == 5 + 1 + 3 + 2 + 5


def test_a_row_that_is_not_wanted_stays_out_of_date_until_it_is() -> None:
    model = TableDenoiser(CODEC)
    cache = StepCache(model, CODEC.mask_index)
    (first, _), (second, _), *_ = changes(LENGTH)
    assert advance(cache, first) == NUM_ROWS
    before = cache.features(torch.arange(NUM_ROWS * LENGTH)).clone()
    nobody = torch.zeros(NUM_ROWS, dtype=torch.bool)
    assert advance(cache, second, nobody) == 0
    assert torch.equal(cache.features(torch.arange(NUM_ROWS * LENGTH)), before)
    assert advance(cache, second, ~nobody) == 1
    assert not torch.equal(cache.features(torch.arange(NUM_ROWS * LENGTH)), before)
    # Going back to what was seen before is a change: only the latest result is kept.
    assert advance(cache, first) == 1
    assert torch.equal(cache.features(torch.arange(NUM_ROWS * LENGTH)), before)


def test_buckets() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [bucket_size(n, 12, cpu) for n in range(1, 13)] == list(range(1, 13))
    assert [bucket_size(n, 12, cuda) for n in range(1, 13)] == [1, 2, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12]


def test_time_conditioned_networks_are_refused() -> None:
    for network in (random_dit(CODEC, time_conditioned=True), random_unet(time_conditioned=True)):
        with pytest.raises(ValueError, match="time-free"):
            StepCache(network, CODEC.mask_index)
