"""The image baseline has the law of the published sampler: every digit drawn alone, in every step."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contenders import build_checkpoint, build_dense, build_sampler
from benchmarks.dense_images import DenseImages
from benchmarks.workloads import Workload
from prime_core.codec import SubtokenCodec
from prime_core.exact.laws import TokenLaw, dense_ancestral_law
from prime_core.sampling.canvas import digits_canvas
from prime_core.sampling.settings import SamplingSettings
from prime_core.schedule import PolynomialSchedule
from tests.chi_square import p_value
from tests.stubs import TableDenoiser

SCHEDULE = PolynomialSchedule(2.0)


class Pictures:
    """A table of random logits that takes pictures (B, 1, 1, L, S) as an image network does."""

    def __init__(self, codec: SubtokenCodec, length: int, seed: int) -> None:
        self.table = TableDenoiser(codec, seed)
        self.config = SimpleNamespace(channels=1, height=1, width=length)
        self.labels: list[Tensor | None] = []

    def __call__(self, y_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.labels.append(labels)
        return self.table(y_t[:, 0, 0], t)


def exact_law(
    codec: SubtokenCodec, length: int, num_steps: int, seed: int, *, joint: bool = False
) -> TokenLaw:
    masked = torch.full((length, codec.target_length), codec.mask_index)
    return dense_ancestral_law(
        TableDenoiser(codec, seed),
        codec,
        SCHEDULE,
        SCHEDULE.time_grid(num_steps),
        digits_canvas(codec, masked),
        SamplingSettings(draw="joint" if joint else "marginal"),
    )


def draws(codec: SubtokenCodec, length: int, num_steps: int, seed: int) -> list[tuple[int, ...]]:
    model: Any = Pictures(codec, length, seed)
    sampler = DenseImages(model, codec, SCHEDULE, num_rows=4000, length=length)
    run = sampler.sample(num_steps, torch.Generator().manual_seed(0))
    assert run.num_calls == num_steps
    return [tuple(row) for row in codec.decode(run.y).tolist()]


@pytest.mark.parametrize(("vocab_size", "target_length", "length"), [(4, 2, 2), (3, 1, 2), (8, 3, 1)])
def test_law_is_that_of_digits_drawn_alone(vocab_size: int, target_length: int, length: int) -> None:
    codec = SubtokenCodec(vocab_size, target_length)
    samples = draws(codec, length, 3, seed=1)
    assert p_value(samples, exact_law(codec, length, 3, seed=1)) > 1e-4
    assert p_value(samples, exact_law(codec, length, 3, seed=2)) < 1e-6
    if target_length > 1:
        assert p_value(samples, exact_law(codec, length, 3, seed=1, joint=True)) < 1e-6


@pytest.mark.parametrize("codec", [SubtokenCodec(7, 3), SubtokenCodec(4, 2, torch.tensor([1, 0, 2, 3]))])
def test_codes_that_are_no_tokens_in_order_are_refused(codec: SubtokenCodec) -> None:
    model: Any = Pictures(codec, 2, 0)
    with pytest.raises(ValueError, match="drawn alone"):
        DenseImages(model, codec, SCHEDULE, num_rows=1, length=2)


def test_labels_reach_the_network() -> None:
    codec, labels = SubtokenCodec(4, 2), torch.tensor([2, 0])
    model: Any = Pictures(codec, 2, 0)
    DenseImages(model, codec, SCHEDULE, num_rows=2, length=2, labels=labels).sample(
        2, torch.Generator().manual_seed(0)
    )
    assert all(seen is not None and torch.equal(seen, labels) for seen in model.labels)


def test_both_samplers_fill_the_pictures_of_a_real_network() -> None:
    workload = Workload(
        "images-tiny", vocab_size=256, target_length=2, length=16, num_rows=2, num_steps=3, seed=1
    )
    checkpoint = build_checkpoint(workload, "float32")
    assert isinstance(build_dense(checkpoint, workload), DenseImages)
    planned = build_sampler("planned", checkpoint, workload)()
    dense = build_sampler("dense_published", checkpoint, workload)()
    assert planned.tokens.shape == dense.tokens.shape == (2, 16)
    assert dense.num_row_steps == 6 >= planned.num_row_steps
    assert int(dense.tokens.max()) > 3  # not all in one corner of the 256 values
