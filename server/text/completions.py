"""POST /v1/completions between its route and the engine: prompts become text requests that run as one."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from fastapi import Request

from kernels.noise import row_seed
from prime_core.checkpoint import Checkpoint
from prime_core.sampling.prepare import PreparedRows
from prime_core.sampling.request import TextRequest
from prime_core.sampling.row import Row
from server.engine.batcher import Job
from server.engine.model_queue import ModelQueue
from server.http.errors import ApiError
from server.request import Recipe, Service
from server.schemas.base import Limits
from server.schemas.completions import Completion, CompletionChoice, CompletionRequest, CompletionUsage
from server.schemas.text import GenerateResponse, Usage
from server.text.generate import count_text, prepare_together, text_response


@dataclass(frozen=True, eq=False, slots=True)
class PreparedPrompts:
    """The rows of all prompts of a request."""

    prompts: Sequence[PreparedRows]

    @property
    def rows(self) -> Sequence[Row]:
        """The rows in the order of the choices: those of the first prompt come first."""
        return [row for prompt in self.prompts for row in prompt.rows]

    def of_output(self, index: int) -> PreparedRows:
        """Return the prompt that a choice belongs to."""
        return self.prompts[index // len(self.prompts[0].rows)]


class Origin(NamedTuple):
    """What an answer, or every chunk of it, says about where it comes from.

    Attributes:
        id: of the completion; it holds that of the request.
        created: Unix time in seconds.
        model: name of the model.
    """

    id: str
    created: int
    model: str


def completion_recipe(
    service: Service, queue: ModelQueue, body: CompletionRequest
) -> Recipe[PreparedPrompts, GenerateResponse]:
    """Return how a checked request is answered, in the project's own shape; see `completion_of`.

    Args:
        service: the limits.
        queue: the model.
        body: of the request, checked against the schema of the model.

    Raises:
        ApiError: 422 if fields contradict each other or the model.
    """
    limits = service.limits[queue.name]
    _check_together(queue, body, limits)
    return Recipe(
        body.num_outputs,
        partial(prepare_prompts, queue.checkpoint, body, limits),
        partial(joined_response, queue),
        count_text,
    )


def _check_together(queue: ModelQueue, body: CompletionRequest, limits: Limits) -> None:
    if queue.checkpoint.tokenizer is None:
        message = (
            "model must have a tokenizer here; that one has none: POST /generate takes and gives token ids"
        )
        raise ApiError(422, "wrong_route", message, param="model")
    if body.num_outputs > limits.max_n:
        message = (
            f"n times the number of prompts must be at most {limits.max_n}; here it is {body.num_outputs}: lower n, "
            "or send the prompts in several requests"
        )
        raise ApiError(422, "invalid_value", message, param="n")
    if "stream_options" in body.model_fields_set and not body.stream:
        message = "stream_options must be null or left out without stream"
        raise ApiError(422, "invalid_value", message, param="stream_options")


def prepare_prompts(checkpoint: Checkpoint, body: CompletionRequest, limits: Limits) -> PreparedPrompts:
    """Return the rows of all prompts, with their reveal plans.

    The seeds of two prompts differ, or equal prompts would give equal texts: prompt number p takes that of choice
    p * n, and so the first choice has the seed of the request.

    Raises:
        CanvasError: if a prompt does not fit the model's context, or all together the limit of work.
    """
    seed = secrets.randbits(64) if body.seed is None else body.seed
    requests = [
        TextRequest(
            n=body.n,
            steps=body.steps,
            seed=row_seed(seed, number * body.n),
            prompt=prompt,
            suffix=body.suffix,
            max_tokens=body.max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            stop=body.stops,
        )
        for number, prompt in enumerate(body.prompts)
    ]
    return PreparedPrompts(prepare_together(checkpoint, requests, limits))


def origin_of(request: Request, queue: ModelQueue) -> Origin:
    """Return where the answer to a request that has come just now comes from."""
    request_id = str(request.state.request_id)
    return Origin(f"cmpl-{request_id.removeprefix('req-')}", int(time.time()), queue.name)


def joined_response(queue: ModelQueue, prepared: PreparedPrompts, job: Job) -> GenerateResponse:
    """Return the outputs of all prompts in one answer of the project's own shape.

    Raises:
        NonFiniteError: if a row failed.
    """
    answers = [text_response("", queue, prompt, job) for prompt in prepared.prompts]
    usages = [answer.usage for answer in answers]
    return GenerateResponse(
        id="",
        model=queue.name,
        outputs=[output for answer in answers for output in answer.outputs],
        usage=Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            total_tokens=sum(usage.total_tokens for usage in usages),
            denoiser_calls=sum(usage.denoiser_calls for usage in usages),
        ),
        timings=answers[-1].timings,
    )


def completion_of(
    origin: Origin,
    queue: ModelQueue,
    body: CompletionRequest,
    prepared: PreparedPrompts,
    answer: GenerateResponse,
) -> Completion:
    """Return the answer in OpenAI's shape."""
    choices = [
        CompletionChoice(
            index=index,
            text=echoed(queue, body, prepared.of_output(index)) + output.gaps[0],
            finish_reason=output.finish_reason,
        )
        for index, output in enumerate(answer.outputs)
    ]
    usage = CompletionUsage(**answer.usage.model_dump(exclude={"denoiser_calls"}))
    return Completion(**origin._asdict(), choices=choices, usage=usage)


def echoed(queue: ModelQueue, body: CompletionRequest, prompt: PreparedRows) -> str:
    """Return what comes before the generated text: with echo the prompt, else nothing."""
    if not body.echo:
        return ""
    segment = prompt.canvas.segments[0]
    if segment.text is not None:
        return segment.text
    tokenizer = queue.checkpoint.tokenizer
    assert tokenizer is not None, "checked at the start"
    return tokenizer.decode(queue.checkpoint.codec.decode(prompt.canvas.y[: segment.stop]).tolist())
