"""The two ends of every sampling loop: from a request to rows, and from a finished row to a sample.

`prepare_rows` turns a request into rows, the stepper advances them (`prime_core.sampling.sample` offline, the engine
in the server), `finish_row` turns a row into a `Sample` or an `ImageSample`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.noise import Purpose, row_seed, uniform
from prime_core.checkpoint import Checkpoint
from prime_core.config import Config, UNetConfig
from prime_core.integers import check_count, is_integer
from prime_core.labels import find_label
from prime_core.pixels import PixelCodec
from prime_core.sampling.canvas import Canvas, CanvasError, Numbers, check_stop, digits_canvas, text_canvas
from prime_core.sampling.correctors import Corrector
from prime_core.sampling.curves import TimeWarp
from prime_core.sampling.image_canvas import image_canvas
from prime_core.sampling.render import FinishReason, render
from prime_core.sampling.request import ImageRequest, Request, TextRequest, make_request
from prime_core.sampling.row import Row, new_row
from prime_core.sampling.settings import DRAWS, SamplingSettings, check_draw
from prime_core.sampling.time_grid import Steps


class NonFiniteError(RuntimeError):
    """The network gave NaN, infinity or no possible token for a row."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished text.

    Attributes:
        text: the whole text, fixed parts verbatim; None if the model has no tokenizer.
        token_ids: its tokens.
        gaps: the text of every gap.
        finish_reason: "stop" or "length".
        seed: seed that gives this output alone, with n = 1.
        nfe: denoiser calls it took.
        steps: steps of the grid, or "exact".
        steps_skipped: steps of the grid that cost no call, see `RevealPlan.steps_skipped`.
    """

    text: str | None
    token_ids: list[int]
    gaps: list[str]
    finish_reason: FinishReason
    seed: int
    nfe: int
    steps: Steps
    steps_skipped: int


@dataclass(frozen=True, eq=False, slots=True)
class ImageSample:
    """One finished image.

    Attributes:
        pixels: (H, W, C) uint8.
        label: the label it was sampled under, None for models without labels; of no meaning if labels are "uniform".
        seed: seed that gives this image alone, with n = 1.
        nfe: denoiser calls it took.
        steps: steps of the grid, or "exact".
        steps_skipped: steps of the grid that cost no call, see `RevealPlan.steps_skipped`.
    """

    pixels: Tensor
    label: int | None
    seed: int
    nfe: int
    steps: Steps
    steps_skipped: int


@dataclass(frozen=True, eq=False, slots=True)
class PreparedRows:
    """The rows of one request, ready for a stepper, and what `finish_row` needs to render them."""

    rows: tuple[Row, ...]
    canvas: Canvas
    request: Request


def prepare_rows(
    checkpoint: Checkpoint, request: Request | None = None, *, canvas: Canvas | None = None, **fields: Any
) -> PreparedRows:
    """Turn a request into rows with their reveal plans; the network is not called.

    Args:
        checkpoint: the model.
        request: what is asked for; None takes the fields.
        canvas: what `text_canvas_of` gives for a text request, if it was asked already.
        **fields: the fields of a `TextRequest`, or for image models of an `ImageRequest`.

    Raises:
        CanvasError: if a field does not fit the model; ``param`` names it.
        ValueError: if a value is out of range.
    """
    if request is None:
        request = make_request(checkpoint.config, fields)
    elif fields:
        raise ValueError("give a request or its fields, not both")
    elif not isinstance(request, (TextRequest, ImageRequest)):
        raise ValueError(
            f"a request must be a TextRequest or an ImageRequest, got {type(request).__name__}; give fields by name, "
            "as prompt=..."
        )
    check_count("n", request.n)
    first_seed = secrets.randbits(64) if request.seed is None else request.seed
    seeds = [row_seed(first_seed, row) for row in range(request.n)]
    if isinstance(request, TextRequest):
        return _prepare_text(checkpoint, request, seeds, canvas)
    if canvas is not None:
        raise ValueError("canvas is for text requests; leave it out")
    return _prepare_images(checkpoint, request, seeds)


def finish_row(checkpoint: Checkpoint, prepared: PreparedRows, row: Row) -> Sample | ImageSample:
    """Turn a finished row into a sample of its kind: `finish_text` or `finish_image`."""
    finish = finish_image if isinstance(prepared.request, ImageRequest) else finish_text
    return finish(checkpoint, prepared, row)


def finish_text(checkpoint: Checkpoint, prepared: PreparedRows, row: Row) -> Sample:
    """Turn a finished row of a text request into a sample.

    Args:
        checkpoint: the model.
        prepared: the request that the row belongs to.
        row: a row that is done.

    Raises:
        NonFiniteError: if the row failed.
    """
    request = prepared.request
    assert isinstance(request, TextRequest), "the rows of a text request"
    rendered = render(prepared.canvas, _tokens_of(checkpoint, row), checkpoint.tokenizer, request.stop)
    return Sample(
        text=rendered.text,
        token_ids=rendered.token_ids,
        gaps=rendered.gaps,
        finish_reason=rendered.finish_reason,
        seed=row.seed,
        nfe=row.plan.nfe,
        steps=request.steps,
        steps_skipped=row.plan.steps_skipped,
    )


def finish_image(checkpoint: Checkpoint, prepared: PreparedRows, row: Row) -> ImageSample:
    """Turn a finished row of an image request into a sample; see `finish_text`."""
    return ImageSample(
        pixels=PixelCodec(checkpoint.config.image_model).decode(_tokens_of(checkpoint, row)),
        label=row.label,
        seed=row.seed,
        nfe=row.plan.nfe,
        steps=prepared.request.steps,
        steps_skipped=row.plan.steps_skipped,
    )


def _tokens_of(checkpoint: Checkpoint, row: Row) -> Tensor:
    """Return the tokens (L,) of a row that is done.

    Raises:
        NonFiniteError: if the row failed.
    """
    if row.failed:
        raise NonFiniteError("the network gave NaN, infinity or no possible token; are its weights sound?")
    assert row.done, "only a finished row can be rendered"
    return checkpoint.codec.decode(row.y.cpu())


def text_canvas_of(checkpoint: Checkpoint, request: TextRequest) -> Canvas:
    """Return what a text request fixes and leaves free; for that its texts are tokenized.

    Args:
        checkpoint: the model.
        request: what is asked for.

    Raises:
        CanvasError: if a field does not fit the model; ``param`` names it.
    """
    if request.y is not None:
        return _known_digits(checkpoint, request, request.y)
    return text_canvas(
        checkpoint.tokenizer,
        checkpoint.codec,
        checkpoint.config.model.length,
        prompt=request.prompt,
        suffix=request.suffix,
        template=request.template,
        max_tokens=request.max_tokens,
    )


def _prepare_text(
    checkpoint: Checkpoint, request: TextRequest, seeds: Sequence[int], canvas: Canvas | None
) -> PreparedRows:
    if isinstance(checkpoint.config.model, UNetConfig):
        raise ValueError("this is an image model: it takes an ImageRequest")
    settings = SamplingSettings(request.temperature, request.top_p, request.top_k)
    canvas = text_canvas_of(checkpoint, request) if canvas is None else canvas
    check_stop(canvas, request.stop, checkpoint.tokenizer)
    rows = tuple(new_row(canvas, checkpoint.schedule, settings, request.steps, seed) for seed in seeds)
    return PreparedRows(rows, canvas, request)


def _prepare_images(checkpoint: Checkpoint, request: ImageRequest, seeds: Sequence[int]) -> PreparedRows:
    if not isinstance(checkpoint.config.model, UNetConfig):
        raise ValueError("this is a text model: it takes a TextRequest")
    model = checkpoint.config.model
    draw = DRAWS.get(request.sampler)
    if draw is None:
        raise CanvasError("sampler", f"sampler must be {' or '.join(map(repr, DRAWS))}")
    for param, kind in (("corrector", Corrector), ("warp", TimeWarp)):
        value = getattr(request, param)
        if value is not None and not isinstance(value, kind):
            raise CanvasError(param, f"{param} must be a {kind.__module__}.{kind.__name__}, or None for none")
    settings = SamplingSettings(request.temperature, request.top_p, request.top_k, draw)
    try:
        check_draw(checkpoint.codec, draw)
    except ValueError as error:
        raise CanvasError("sampler", f"sampler {request.sampler!r}: {error}") from None
    canvas = image_canvas(model, checkpoint.codec, request.known, request.y)
    label = label_index(checkpoint.config, model, request.label)
    rows = tuple(
        new_row(
            canvas,
            checkpoint.schedule,
            settings,
            request.steps,
            seed,
            label=_row_label(model, label, seed),
            warp=request.warp,
            corrector=request.corrector,
        )
        for seed in seeds
    )
    return PreparedRows(rows, canvas, request)


def label_index(config: Config, model: UNetConfig, label: int | str | None) -> int | None:
    """Return the index of a label that is given as a number or by name.

    Raises:
        CanvasError: the model has no labels, or no such label.
    """
    if label is None:
        return None
    if model.labels != "class":
        raise CanvasError("label", "this model has no labels to choose from; leave label out")
    last = model.num_labels - 1
    if isinstance(label, str):
        index = find_label(config.label_names, label)
        if index is None:
            names = ", ".join(config.label_names[:20]) or "none: give a number"
            raise CanvasError("label", f"label must be a number in 0..{last} or one of its names ({names})")
        return index
    if not is_integer(label) or not 0 <= label <= last:
        raise CanvasError("label", f"label must be in 0..{last}")
    return label


def _row_label(model: UNetConfig, label: int | None, seed: int) -> int | None:
    """Return the label of a row: the one that is asked for, or one that is drawn from the row's seed."""
    if model.labels == "none" or label is not None:
        return label
    zero = torch.zeros((), dtype=torch.int64)
    return int(uniform(seed, zero, zero, Purpose.LABEL) * model.num_labels)


def _known_digits(checkpoint: Checkpoint, request: TextRequest, y: Numbers) -> Canvas:
    """Canvas of known digits, which exclude any other layout."""
    for param in ("prompt", "suffix", "template", "max_tokens"):
        if getattr(request, param) is not None:
            raise CanvasError(param, f"{param} and y exclude each other: known digits fix the whole layout")
    context = checkpoint.config.model.length
    canvas = digits_canvas(checkpoint.codec, y)
    if canvas.length > context:
        raise CanvasError("y", f"y has {canvas.length} tokens, but the context holds {context}")
    return canvas
