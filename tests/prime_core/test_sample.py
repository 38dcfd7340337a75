"""The offline loop: requests to samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kernels.noise import row_seed
from prime_core.codec import SubtokenCodec
from prime_core.sampling.canvas import CanvasError
from prime_core.sampling.prepare import NonFiniteError, finish_row, prepare_rows
from prime_core.sampling.sample import run_rows, sample
from prime_core.sampling.stepper import Stepper
from prime_core.sampling.time_grid import Steps
from prime_core.scoring.score import score
from tests.stubs import TableDenoiser, byte_tokenizer, stub_checkpoint

CODEC = SubtokenCodec(257, 2)


def checkpoint(**options: Any) -> Any:
    return stub_checkpoint(CODEC, TableDenoiser(CODEC), tokenizer=byte_tokenizer(), **options)


def test_same_arguments_same_samples_and_n_outputs_differ() -> None:
    first, second = (sample(checkpoint(), n=4, seed=5, prompt="ab", steps=8) for _ in range(2))
    assert first == second
    assert len({tuple(output.token_ids) for output in first}) == 4
    assert [output.seed for output in first] == [row_seed(5, row) for row in range(4)]


def test_numbers_may_be_numpys() -> None:
    want = sample(checkpoint(), n=2, seed=2**63, prompt="ab", max_tokens=3, steps=8, temperature=0.5, top_k=4)
    numbers = {"n": np.int64(2), "seed": np.uint64(2**63), "max_tokens": np.int32(3), "steps": np.int16(8)}
    draws = {"temperature": torch.tensor(0.5), "top_k": np.array(4)}
    assert sample(checkpoint(), prompt=np.array([97, 98]), **numbers, **draws) == want


@pytest.mark.parametrize("call", [sample, score])
def test_a_text_is_no_request(call: Any) -> None:
    with pytest.raises(ValueError, match=r"a request must be .*, got str; give fields by name"):
        call(checkpoint(), "And it")


def test_each_reported_seed_reproduces_its_output_alone() -> None:
    outputs = sample(checkpoint(), n=3, seed=2**64 - 1, suffix="z", steps=5, temperature=0.9)
    for output in outputs:
        assert sample(checkpoint(), seed=output.seed, suffix="z", steps=5, temperature=0.9) == [output]


def test_without_a_seed_one_is_drawn_and_reported() -> None:
    first, second = (sample(checkpoint(), max_tokens=4, steps=3)[0] for _ in range(2))
    assert first.seed != second.seed
    assert sample(checkpoint(), max_tokens=4, steps=3, seed=first.seed) == [first]


@pytest.mark.parametrize("max_rows", [1, 2, 5, 64])
def test_batching_changes_nothing(max_rows: int) -> None:
    expected = sample(checkpoint(), n=7, seed=1, steps=6)
    assert sample(checkpoint(), n=7, seed=1, steps=6, max_rows=max_rows) == expected


def test_rows_do_not_run_in_lockstep() -> None:
    model = checkpoint()
    outputs = sample(model, n=12, seed=0, steps=1000, max_tokens=5, max_rows=4)
    events = sum(output.nfe for output in outputs)
    assert model.denoiser.calls < 1.5 * events / 4  # every call is full while rows are waiting
    assert max(len(lengths) for lengths in model.denoiser.lengths) >= 4


def test_a_top_k_beyond_every_integer_type_keeps_all() -> None:
    huge = sample(checkpoint(), seed=3, steps=4, max_tokens=5, top_k=10**30)
    assert huge == sample(checkpoint(), seed=3, steps=4, max_tokens=5)


@pytest.mark.parametrize("steps", [1, 7, 1000, "exact"])
def test_calls_are_reported(steps: Steps) -> None:
    model = checkpoint()
    (output,) = sample(model, seed=3, steps=steps, max_tokens=6)
    assert output.nfe == model.denoiser.calls
    assert output.steps == steps
    assert output.steps_skipped == (0 if steps == "exact" else steps - output.nfe)
    if steps == "exact":
        assert output.nfe == 12


def test_fixed_ends_and_templates_come_back() -> None:
    (output,) = sample(checkpoint(), seed=1, steps=4, prompt="be", suffix="end", max_tokens=3)
    assert output.text is not None
    assert output.text.startswith("be")
    assert output.text.endswith("end")
    assert output.text == f"be{output.gaps[0]}end"
    (output,) = sample(checkpoint(), seed=1, steps=4, template=["x", 2, "y", 1])
    assert output.text == f"x{output.gaps[0]}y{output.gaps[1]}"
    assert len(output.token_ids) == 5


def test_stop_strings_end_the_text() -> None:
    (plain,) = sample(checkpoint(), seed=4, steps=4, prompt="", max_tokens=12)
    (whole,) = sample(checkpoint(), seed=4, steps=4, max_tokens=12)
    assert whole == plain
    char = next(c for c in plain.gaps[0][2:] if c != "\ufffd")
    (cut,) = sample(checkpoint(), seed=4, steps=4, max_tokens=12, stop=[char])
    assert cut.finish_reason == "stop"
    assert cut.text == plain.gaps[0][: plain.gaps[0].index(char)]


def test_known_digits() -> None:
    y = CODEC.encode(torch.tensor([10, 20, 30]))
    y[1, 1] = CODEC.mask_index
    (output,) = sample(checkpoint(), seed=0, steps=3, y=y)
    assert output.token_ids[0] == 10
    assert output.token_ids[2] == 30
    assert output.token_ids[1] // CODEC.base == 20 // CODEC.base
    assert output.nfe == 1


def test_all_known_needs_no_call() -> None:
    model = checkpoint()
    (output,) = sample(model, seed=0, y=CODEC.encode(torch.tensor([10, 20])), steps=5)
    assert (output.token_ids, output.nfe, output.steps_skipped) == ([10, 20], 0, 5)
    assert model.denoiser.calls == 0


def test_progress_counts_events() -> None:
    seen: list[tuple[int, int]] = []
    outputs = sample(
        checkpoint(), n=3, seed=0, steps=4, progress=lambda done, total: seen.append((done, total))
    )
    total = sum(output.nfe for output in outputs)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_without_a_tokenizer_there_are_token_ids() -> None:
    model = stub_checkpoint(CODEC, TableDenoiser(CODEC))
    (output,) = sample(model, seed=0, steps=2, prompt=[5, 6], max_tokens=2)
    assert output.text is None
    assert output.token_ids[:2] == [5, 6]
    assert len(output.token_ids) == 4


def test_prepared_rows_can_be_run_by_anyone() -> None:
    model = checkpoint()
    prepared = prepare_rows(model, n=2, seed=9, prompt="q", steps=3)
    assert model.denoiser.calls == 0
    assert all(row.remaining == row.plan.nfe > 0 for row in prepared.rows)
    run_rows(Stepper(model.denoiser, model.codec), prepared.rows[::-1])
    outputs = [finish_row(model, prepared, row) for row in prepared.rows]
    assert outputs == sample(checkpoint(), n=2, seed=9, prompt="q", steps=3)


def test_a_broken_network_is_an_error() -> None:
    model = checkpoint()
    model.denoiser.table[:] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        sample(model, seed=0, steps=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be"),
        ({"n": True}, "n must be"),
        ({"steps": 0}, "steps must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"temperature": -1}, "temperature must be"),
        ({"max_rows": 0}, "max_rows must be"),
        ({"max_tokens": 17}, "max_tokens must be at most 16"),
        ({"stop": ["a"], "suffix": "x"}, "stop needs an open end"),
        ({"y": torch.zeros(17, 2, dtype=torch.int64)}, "y has 17 tokens, but the context holds 16"),
        ({"y": torch.zeros(1, 2, dtype=torch.int64), "prompt": "a"}, "prompt and y exclude each other"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        sample(checkpoint(), **arguments)
    if isinstance(caught.value, CanvasError):
        assert caught.value.param in arguments
