"""Scores: their law against exact enumeration, their errors, and that no row disturbs another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.nll import subtoken_nll
from prime_core.codec import SubtokenCodec
from prime_core.exact.bounds import exact_objectives
from prime_core.sampling import step_parts
from prime_core.sampling import stepper as stepper_module
from prime_core.sampling.canvas import digits_canvas
from prime_core.sampling.prepare import NonFiniteError
from prime_core.sampling.row import Row, new_row
from prime_core.sampling.sample import run_rows
from prime_core.sampling.settings import SamplingSettings
from prime_core.sampling.stepper import Stepper
from prime_core.schedule import CosineSchedule, LinearSchedule
from prime_core.scoring.score import ScoreRequest, finish_scores, prepare_scores, score
from prime_core.scoring.score_row import draw_states
from prime_core.scoring.scored import Score, estimate
from tests.prime_core.random_dit import random_dit
from tests.prime_core.test_likelihood import time_conditioned_nelbo
from tests.stubs import TableDenoiser, byte_tokenizer, stub_checkpoint

SCHEDULE = LinearSchedule(1e-3)
CASES = [(4, 1), (5, 2), (7, 3)]


def many_scores(
    checkpoint: Any, num_seeds: int, tokens: list[int], num_samples: int
) -> tuple[Tensor, Tensor]:
    """Nats of `nelbo` and `coded_loss`, and their standard errors, of independent seeds: (seeds, 2) each."""
    results = score(checkpoint, inputs=[tokens] * num_seeds, num_samples=num_samples, seed=0, max_rows=1024)
    pairs = [(each.nelbo, each.coded_loss) for each in results]
    nats = torch.tensor([[part.nats for part in pair] for pair in pairs])
    return nats, torch.tensor([[part.standard_error or 0.0 for part in pair] for pair in pairs])


@pytest.mark.parametrize(("vocab_size", "target_length"), CASES)
def test_scores_are_unbiased_and_so_bound_the_exact_likelihood(vocab_size: int, target_length: int) -> None:
    codec = SubtokenCodec(vocab_size, target_length)
    model = random_dit(codec)
    checkpoint = stub_checkpoint(codec, model, schedule=SCHEDULE)
    nats, _ = many_scores(checkpoint, 60, [1, 3], 36)
    mean, error = nats.mean(0), nats.std(0) / math.sqrt(len(nats))
    exact = exact_objectives(model, codec, torch.tensor([1, 3]))
    if target_length > 1:  # one in place of the other would be noticed
        assert abs(exact.nelbo - exact.coded_loss) > 5 * float(error.max())
    assert abs(mean[0] - exact.nelbo) < 4 * error[0]
    assert abs(mean[1] - exact.coded_loss) < 4 * error[1]
    assert mean[0] > exact.nll - 4 * error[0]


@pytest.mark.parametrize("num_samples", [2, 9])
def test_standard_errors_are_those_of_repeated_scores(num_samples: int) -> None:
    codec = SubtokenCodec(27, 3)
    checkpoint = stub_checkpoint(codec, TableDenoiser(codec), context=6)
    nats, errors = many_scores(checkpoint, 200, [1, 13, 26, 4], num_samples)
    real, told = nats.var(0), errors.square().mean(0)
    assert bool((told > 0.75 * real).all())
    if num_samples > 2:  # and not much larger, as they would be without regard to the strata
        assert bool((told < 2.5 * real).all())


def test_an_estimate_compares_neighbours() -> None:
    values = torch.tensor([1.0, 3.0, 10.0, 10.0], dtype=torch.float64)
    assert estimate(values).nats == 6
    assert estimate(values).standard_error == pytest.approx(math.sqrt((3 - 1) ** 2) / 4)
    three = estimate(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert three.standard_error == pytest.approx(math.sqrt(3 / 2 * 2) / 3)
    assert estimate(values[:1]).standard_error is None


def test_one_digit_a_token_makes_both_equal_and_bounds() -> None:
    codec = SubtokenCodec(6, 1)
    (result,) = score(stub_checkpoint(codec, TableDenoiser(codec)), token_ids=[1, 5, 0], seed=3)
    assert result.coded_loss.nats == pytest.approx(result.nelbo.nats, rel=1e-5)
    assert result.coded_loss_is_bound
    other = SubtokenCodec(6, 2)
    assert not score(stub_checkpoint(other, TableDenoiser(other)), token_ids=[1])[0].coded_loss_is_bound


def test_a_state_costs_what_the_whole_network_says() -> None:
    codec, model = SubtokenCodec(50, 3), TableDenoiser(SubtokenCodec(50, 3), slope=2.0)
    x_0 = torch.tensor([3, 49, 0, 7, 21])
    checkpoint = stub_checkpoint(codec, model, schedule=SCHEDULE)
    prepared = prepare_scores(checkpoint, ScoreRequest(token_ids=x_0.tolist(), num_samples=9, seed=5), 4)
    run_rows(Stepper(model, codec), prepared.rows)  # type: ignore[arg-type]
    states = draw_states((5, 3), 9, SCHEDULE, 5)
    y_0 = codec.encode(x_0)
    y_t = torch.where(states.masked.view(9, 5, 3), codec.mask_index, y_0)
    logits = model(y_t, states.t).flatten(0, 1)
    nll = subtoken_nll(logits, y_t.flatten(0, 1), x_0.repeat(9), codec.digits, codec.mask_index)
    weight = 15 / states.masked.sum(1).double()
    expected = torch.stack([part.double().view(9, 5).sum(1) * weight for part in (nll.digits, nll.coded)], 1)
    assert torch.allclose(torch.cat([row.nats for row in prepared.rows]), expected, rtol=1e-5)


def test_the_numbers_of_masked_digits_are_stratified_and_the_masks_uniform() -> None:
    num_states = 3000
    states = draw_states((4, 2), num_states, LinearSchedule(), 1)
    counts = states.masked.sum(1)
    assert torch.equal(counts.bincount(minlength=9)[1:], torch.full((8,), num_states // 8))
    assert bool((counts.diff() >= 0).all())
    for n in (1, 4, 7):
        chosen = counts == n
        share = states.masked[chosen].double().mean(0)
        assert bool((share - n / 8).abs().lt(5 * math.sqrt(n / 8 * (1 - n / 8) / 375)).all())
        # v given n is Beta(n, M - n + 1), and t = v for this schedule.
        deviation = math.sqrt(n * (9 - n) / (81 * 10) / 375)
        assert float(states.t[chosen].mean()) == pytest.approx(n / 9, abs=5 * deviation)


def test_time_conditioned_models_see_the_time_of_their_masks() -> None:
    codec, schedule = SubtokenCodec(4, 2), CosineSchedule()
    model = TableDenoiser(codec, 1, slope=6.0)
    nats, _ = many_scores(stub_checkpoint(codec, model, schedule=schedule), 40, [1, 3], 64)
    error = float(nats[:, 0].std()) / math.sqrt(40)
    exact = time_conditioned_nelbo(model, codec, schedule, torch.tensor([1, 3]))
    assert (
        abs(exact - exact_objectives(TableDenoiser(codec, 1), codec, torch.tensor([1, 3])).nelbo) > 10 * error
    )
    assert abs(float(nats[:, 0].mean()) - exact) < 4 * error


@pytest.mark.parametrize("max_logit_rows", [stepper_module.MAX_LOGIT_ROWS, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_and_samples_are_bitwise_the_same_alone_and_together(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, max_logit_rows: int
) -> None:
    """Also where the logits of both kinds come in several chunks."""
    monkeypatch.setattr(stepper_module, "MAX_LOGIT_ROWS", max_logit_rows)
    codec = SubtokenCodec(300, 3)
    model = random_dit(codec, length=40).to(dtype)
    checkpoint = stub_checkpoint(codec, model, context=40)
    inputs = [list(range(n)) for n in (1, 40, 3, 17)]

    def sampled() -> list[Row]:
        canvas = digits_canvas(codec, torch.full((23, 3), codec.mask_index))
        return [new_row(canvas, SCHEDULE, SamplingSettings(), 9, seed) for seed in range(3)]

    request = ScoreRequest(inputs=inputs, num_samples=5, seed=8, per_token=True)
    prepared, rows = prepare_scores(checkpoint, request, 12), sampled()
    mixed = [row for pair in zip(prepared.rows, rows, strict=False) for row in pair]
    run_rows(Stepper(model, codec), [*mixed, *prepared.rows[3:]], max_rows=7)
    together = finish_scores(prepared)
    for tokens, other in zip(inputs, together, strict=True):
        (alone,) = score(checkpoint, token_ids=tokens, num_samples=5, seed=other.seed, per_token=True)
        assert (alone.nelbo, alone.coded_loss) == (other.nelbo, other.coded_loss)
        assert alone.per_token is not None and other.per_token is not None
        assert alone.per_token.nelbo == pytest.approx(other.per_token.nelbo, rel=1e-12)
    alone_rows = sampled()
    run_rows(Stepper(model, codec), alone_rows)
    assert all(torch.equal(a.y, b.y) for a, b in zip(alone_rows, rows, strict=True))


def test_token_costs_add_up_and_units_are_right() -> None:
    codec = SubtokenCodec(257, 2)
    checkpoint = stub_checkpoint(codec, TableDenoiser(codec), tokenizer=byte_tokenizer())
    (result,) = score(checkpoint, text="héllo", seed=1, per_token=True)
    assert (result.num_tokens, result.num_bytes, result.num_dimensions, result.nfe) == (6, 6, None, 16)
    assert result.per_token is not None
    assert len(result.per_token.nelbo) == len(result.per_token.coded_loss) == 6
    assert sum(result.per_token.nelbo) == pytest.approx(result.nelbo.nats)
    assert sum(result.per_token.coded_loss) == pytest.approx(result.coded_loss.nats)
    assert result.bits_per_byte == result.bits_per_token == result.nelbo.nats / math.log(2) / 6
    assert result.ppl == pytest.approx(math.exp(result.nelbo.nats / 6))
    assert result.bits_per_dimension is None
    (ids,) = score(checkpoint, token_ids=[256], seed=1)  # the end of text has no bytes
    assert (ids.num_bytes, ids.bits_per_byte) == (0, None)


def test_seeds_give_scores_again_and_none_draws_one() -> None:
    codec = SubtokenCodec(50, 2)
    checkpoint = stub_checkpoint(codec, TableDenoiser(codec))

    def run(**fields: Any) -> Score:
        return score(checkpoint, token_ids=[3, 4], **fields)[0]

    drawn, other = run(), run()
    assert drawn.seed != other.seed
    assert run(seed=drawn.seed) == drawn
    assert run(seed=0) == run(seed=0) != run(seed=2**64 - 1)


class Broken(TableDenoiser):
    """NaN in every row of three tokens."""

    def _rows(self, y: Tensor, t: Tensor) -> Tensor:
        logits = super()._rows(y, t)
        return logits * math.nan if y.shape[1] == 3 else logits


def test_a_row_without_finite_likelihood_fails_alone() -> None:
    codec = SubtokenCodec(50, 2)
    good, bad = (
        prepare_scores(stub_checkpoint(codec, None), ScoreRequest(token_ids=ids, num_samples=2, seed=1))
        for ids in ([1, 2], [1, 2, 3])
    )
    results = Stepper(Broken(codec), codec).step([*bad.rows, *good.rows])
    assert [result.ok for result in results] == [False, False, True, True]
    assert all(row.failed and row.done for row in bad.rows)
    with pytest.raises(NonFiniteError):
        finish_scores(bad)
    assert finish_scores(good) == score(
        stub_checkpoint(codec, TableDenoiser(codec)), token_ids=[1, 2], num_samples=2, seed=1
    )


def test_a_call_that_raises_for_one_kind_of_rows_has_moved_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it could not be made again, as after memory ran out."""
    codec = SubtokenCodec(50, 2)
    stepper = Stepper(TableDenoiser(codec), codec)
    canvas = digits_canvas(codec, torch.full((5, 2), codec.mask_index))
    drawn = new_row(canvas, LinearSchedule(), SamplingSettings(), 4, seed=3)
    checkpoint = stub_checkpoint(codec, None)
    (scored,) = prepare_scores(checkpoint, ScoreRequest(token_ids=[1, 2], num_samples=1, seed=1)).rows
    alone = new_row(canvas, LinearSchedule(), SamplingSettings(), 4, seed=3)
    stepper.step([alone])

    def raises(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(step_parts, "subtoken_nll", raises)
        with pytest.raises(torch.OutOfMemoryError):
            stepper.step([drawn, scored])
    assert (drawn.next_event, scored.next_event) == (0, 0)
    assert torch.equal(drawn.y, canvas.y)
    assert all(result.ok for result in stepper.step([drawn, scored]))
    assert torch.equal(drawn.y, alone.y)
