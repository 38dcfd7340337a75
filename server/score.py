"""POST /score between its route and the engine: from a checked request to rows, from finished rows to scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastapi import Request

from prime_core.checkpoint import Checkpoint
from prime_core.sampling.canvas import CanvasError
from prime_core.scoring.score import (
    Content,
    PreparedScores,
    ScoreRequest,
    contents_of,
    finish_scores,
    prepare_scores,
    rows_per_input,
)
from prime_core.scoring.scored import PerToken, Score
from prime_core.tokenizer import Tokenizer
from server.engine.batcher import Job
from server.engine.model_queue import ModelQueue
from server.images.given_picture import read_picture
from server.images.known import KnownShape
from server.metrics import Metrics
from server.request import Recipe, Service, timings_of
from server.schemas.base import Limits
from server.schemas.score import (
    CODED_NOTE,
    CodedLoss,
    ImageScoreRequest,
    InputScore,
    Nelbo,
    ScoreResponse,
    ScoreUsage,
    TextScoreRequest,
    TokenCosts,
)
from server.text.text_length import check_chars

# Every digit of every state takes a random number before the first call: seconds of a thread, for so many.
MAX_DRAWN_DIGITS = 2**22
# Rows that the inputs of a request share. The more there are, the sooner it is done on an idle GPU, but the sooner the
# queue, which counts rows, is full.
MOST_ROWS = 16


def score_recipe(
    service: Service, queue: ModelQueue, body: TextScoreRequest | ImageScoreRequest, request: Request
) -> Recipe[PreparedScores, ScoreResponse]:
    """Return how a checked request is answered.

    Args:
        service: the limits.
        queue: the model.
        body: of the request, checked against the schema of the model.
        request: the HTTP request.
    """
    limits = service.limits[queue.name]
    num_inputs = len(body.inputs or [None]) if isinstance(body, TextScoreRequest) else 1
    return Recipe(
        num_inputs * rows_per_input(num_inputs, body.num_samples, _most_rows(limits)),
        partial(prepare_score, queue.checkpoint, body, limits),
        partial(score_response, request.state.request_id, queue),
        _count,
    )


def _count(metrics: Metrics, answer: ScoreResponse) -> None:
    times, rows = answer.timings, [(each.nfe, 0) for each in answer.scores]
    metrics.request_done(answer.model, "scored", times.total_s, times.queue_s, rows)
    metrics.scores.labels(answer.model).inc(len(rows))


def prepare_score(
    checkpoint: Checkpoint, body: TextScoreRequest | ImageScoreRequest, limits: Limits
) -> PreparedScores:
    """Return the rows of a request, with their masked states.

    Raises:
        CanvasError: if the request does not fit the model or the limit of work.
    """
    if isinstance(body, TextScoreRequest):
        _check_chars(body, limits)
        score_request = ScoreRequest(
            text=body.text,
            token_ids=body.token_ids,
            inputs=body.inputs,
            num_samples=body.num_samples,
            seed=body.seed,
            per_token=body.per_token,
        )
    else:
        score_request = ScoreRequest(
            pixels=read_picture(body.pixels, body.png, KnownShape.of(checkpoint.config)),
            label=body.label,
            num_samples=body.num_samples,
            seed=body.seed,
            per_token=body.per_token,
        )
    contents = contents_of(checkpoint, score_request)
    _check_work(contents, body.num_samples, checkpoint.codec.target_length, limits)
    return prepare_scores(checkpoint, score_request, _most_rows(limits), contents=contents)


def _most_rows(limits: Limits) -> int:
    return min(limits.max_n, MOST_ROWS)


def _check_chars(body: TextScoreRequest, limits: Limits) -> None:
    """Refuse a text that cannot fit."""
    remedy = "cut it into parts"
    if body.text is not None:
        check_chars(len(body.text), limits, "text", remedy=remedy)
    for index, given in enumerate(body.inputs or []):
        if isinstance(given, str):
            name = f"inputs (number {index + 1})"
            check_chars(len(given), limits, f"inputs[{index}]", remedy=remedy, name=name)


def _check_work(contents: Sequence[Content], num_samples: int, target_length: int, limits: Limits) -> None:
    """Refuse a request whose inputs * tokens * denoiser calls are over the limit, before its states are drawn."""
    num_tokens = sum(len(each.x_0) for each in contents)
    most = min(limits.max_work, MAX_DRAWN_DIGITS // target_length)
    if num_tokens * num_samples > most:
        raise CanvasError(
            "num_samples",
            f"num_samples times the tokens of all inputs is at most {most}, and there are {num_tokens} tokens; lower "
            "num_samples or give fewer inputs",
        )


def score_response(request_id: str, queue: ModelQueue, prepared: PreparedScores, job: Job) -> ScoreResponse:
    """Return the answer to a request whose rows are finished.

    Raises:
        NonFiniteError: if a row failed.
    """
    scores = finish_scores(prepared)
    tokenizer = queue.checkpoint.tokenizer
    inputs = [each.content for each in prepared.inputs]
    return ScoreResponse(
        id=request_id,
        model=queue.name,
        scores=[_input_score(*each, tokenizer) for each in zip(scores, inputs, strict=True)],
        usage=ScoreUsage(
            inputs=len(scores),
            total_tokens=sum(each.num_tokens for each in scores),
            denoiser_calls=sum(each.nfe for each in scores),
        ),
        timings=timings_of(job),
    )


def _input_score(score: Score, content: Content, tokenizer: Tokenizer | None) -> InputScore:
    of_text = score.num_dimensions is None
    return InputScore(
        nelbo=Nelbo(
            nats=score.nelbo.nats,
            standard_error=score.nelbo.standard_error,
            nats_per_token=score.nelbo.nats / score.num_tokens,
            bits_per_token=score.bits_per_token,
            bits_per_byte=score.bits_per_byte,
            bits_per_dimension=score.bits_per_dimension,
            ppl=score.ppl if of_text else None,
        ),
        coded_loss=CodedLoss(
            nats=score.coded_loss.nats,
            standard_error=score.coded_loss.standard_error,
            nats_per_token=score.coded_loss.nats / score.num_tokens,
            is_bound=score.coded_loss_is_bound,
            note="one digit a token: equal to nelbo" if score.coded_loss_is_bound else CODED_NOTE,
        ),
        num_tokens=score.num_tokens,
        num_bytes=score.num_bytes,
        num_dimensions=score.num_dimensions,
        label=score.label,
        seed=score.seed,
        nfe=score.nfe,
        per_token=None if score.per_token is None else _token_costs(score.per_token, content, tokenizer),
    )


def _token_costs(costs: PerToken, content: Content, tokenizer: Tokenizer | None) -> TokenCosts:
    token_ids = content.x_0.tolist()
    return TokenCosts(
        token_ids=token_ids,
        pieces=None if tokenizer is None else tokenizer.decode_pieces(token_ids),
        nelbo=[round(each, 6) for each in costs.nelbo],
        coded_loss=[round(each, 6) for each in costs.coded_loss],
    )
