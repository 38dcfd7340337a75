"""From a request to samples: the offline loop, and the two ends of it that the server shares.

`prepare_rows` turns a request into rows, the stepper advances them, `finish_row` turns a row into a `Sample` or an
`ImageSample`.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.noise import Purpose, row_seed, uniform
from prime_core.canvas import Canvas, CanvasError, check_stop, digits_canvas, text_canvas
from prime_core.config import Config, UNetConfig
from prime_core.image_canvas import image_canvas
from prime_core.pixels import PixelCodec
from prime_core.plan import Steps
from prime_core.render import render
from prime_core.request import ImageRequest, Request, TextRequest, make_request
from prime_core.settings import SamplingSettings, check_draw
from prime_core.stepper import Row, Stepper, new_row

if TYPE_CHECKING:
    from prime_core.checkpoint import Checkpoint


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
        steps_skipped: steps of the grid that cost no call.
    """

    text: str | None
    token_ids: list[int]
    gaps: list[str]
    finish_reason: str
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
        steps_skipped: steps of the grid that cost no call.
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


def prepare_rows(checkpoint: Checkpoint, request: Request | None = None, **fields: Any) -> PreparedRows:
    """Turn a request into rows with their reveal plans; the network is not called.

    Args:
        checkpoint: the model.
        request: what is asked for; None takes the fields.
        **fields: the fields of a `TextRequest`, or for image models of an `ImageRequest`.

    Raises:
        CanvasError: if a field does not fit the model; ``param`` names it.
        ValueError: if a value is out of range.
    """
    if request is None:
        request = make_request(checkpoint.config, fields)
    elif fields:
        raise ValueError("give a request or its fields, not both")
    if isinstance(request.n, bool) or not isinstance(request.n, int) or request.n < 1:
        raise ValueError("n must be an integer of at least 1")
    first_seed = secrets.randbits(64) if request.seed is None else request.seed
    seeds = [row_seed(first_seed, row) for row in range(request.n)]
    if isinstance(request, TextRequest):
        return _prepare_text(checkpoint, request, seeds)
    return _prepare_images(checkpoint, request, seeds)


def finish_row(checkpoint: Checkpoint, prepared: PreparedRows, row: Row) -> Sample | ImageSample:
    """Turn a finished row into a sample.

    Args:
        checkpoint: the model.
        prepared: the request that the row belongs to.
        row: a row that is done.

    Raises:
        NonFiniteError: if the row failed.
    """
    if row.failed:
        raise NonFiniteError("the network gave NaN, infinity or no possible token; are its weights sound?")
    assert row.done, "only a finished row can be rendered"
    request, nfe = prepared.request, row.plan.nfe
    skipped = 0 if request.steps == "exact" else max(request.steps - nfe, 0)
    x_0 = checkpoint.codec.decode(row.y.cpu())
    if isinstance(request, ImageRequest):
        pixels = PixelCodec(_image_model(checkpoint.config)).decode(x_0)
        return ImageSample(pixels, row.label, row.seed, nfe, request.steps, skipped)
    rendered = render(prepared.canvas, x_0, checkpoint.tokenizer, request.stop)
    return Sample(
        text=rendered.text,
        token_ids=rendered.token_ids,
        gaps=rendered.gaps,
        finish_reason=rendered.finish_reason,
        seed=row.seed,
        nfe=nfe,
        steps=request.steps,
        steps_skipped=skipped,
    )


def run_rows(
    stepper: Stepper,
    rows: Sequence[Row],
    max_rows: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Advance rows until all are done.

    Rows never run in lockstep: each jumps to its own next event, and a finished row makes room for a waiting
    one.

    Args:
        stepper: the network.
        rows: any rows.
        max_rows: most rows in one denoiser call, at least 1.
        progress: called after every denoiser call with (events done, events in all), summed over the rows.

    Raises:
        ValueError: if ``max_rows`` is out of range.
    """
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    waiting = deque(row for row in rows if not row.done)
    total = sum(row.remaining for row in waiting)
    running: list[Row] = []
    while waiting or running:
        while waiting and len(running) < max_rows:
            running.append(waiting.popleft())
        stepper.step(running)
        running = [row for row in running if not row.done]
        if progress is not None:
            progress(total - sum(row.remaining for row in (*running, *waiting)), total)


def sample(
    checkpoint: Checkpoint,
    request: Request | None = None,
    *,
    max_rows: int = 64,
    progress: Callable[[int, int], None] | None = None,
    **fields: Any,
) -> list[Any]:
    """Sample from a model; the same arguments give the same samples as the server gives.

    The law is that of ancestral sampling on a grid of ``steps`` steps, but only steps that reveal something call
    the network.

        sample(checkpoint, prompt="In the beginning", n=4, steps=64, seed=1)
        sample(checkpoint, label="Sneaker", n=16, steps=64, seed=1)

    Args:
        checkpoint: the model.
        request: what is asked for; None takes the fields.
        max_rows: most rows in one denoiser call.
        progress: called after every denoiser call with (events done, events in all).
        **fields: the fields of a `TextRequest`, or for image models of an `ImageRequest` and ``preset``, the name of
            published settings.

    Returns:
        ``n`` `Sample` of a text model or ``n`` `ImageSample` of an image model, in the order of their row seeds.

    Raises:
        CanvasError: if a field does not fit the model; ``param`` names it.
        ValueError: if a value is out of range.
        NonFiniteError: if the network gave no finite logits for a row.
    """
    prepared = prepare_rows(checkpoint, request, **fields)
    run_rows(Stepper(checkpoint.denoiser, checkpoint.codec), prepared.rows, max_rows, progress)
    return [finish_row(checkpoint, prepared, row) for row in prepared.rows]


def _prepare_text(checkpoint: Checkpoint, request: TextRequest, seeds: Sequence[int]) -> PreparedRows:
    if isinstance(checkpoint.config.model, UNetConfig):
        raise ValueError("this is an image model: it takes an ImageRequest")
    settings = SamplingSettings(request.temperature, request.top_p, request.top_k)
    if request.y is None:
        canvas = text_canvas(
            checkpoint.tokenizer,
            checkpoint.codec,
            checkpoint.config.model.length,
            prompt=request.prompt,
            suffix=request.suffix,
            template=request.template,
            max_tokens=request.max_tokens,
        )
    else:
        canvas = _known_digits(checkpoint, request, request.y)
    check_stop(canvas, request.stop, checkpoint.tokenizer)
    rows = tuple(new_row(canvas, checkpoint.schedule, settings, request.steps, seed) for seed in seeds)
    return PreparedRows(rows, canvas, request)


def _prepare_images(checkpoint: Checkpoint, request: ImageRequest, seeds: Sequence[int]) -> PreparedRows:
    model = _image_model(checkpoint.config)
    if request.sampler not in ("ancestral", "published"):
        raise CanvasError("sampler", "sampler must be 'ancestral' or 'published'")
    draw = "marginal" if request.sampler == "published" else "joint"
    settings = SamplingSettings(request.temperature, request.top_p, request.top_k, draw)
    try:
        check_draw(checkpoint.codec, draw)
    except ValueError as error:
        raise CanvasError("sampler", f"sampler 'published': {error}") from None
    canvas = image_canvas(model, checkpoint.codec, request.known, request.y)
    label = _label_index(checkpoint.config, model, request.label)
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


def _image_model(config: Config) -> UNetConfig:
    if not isinstance(config.model, UNetConfig):
        raise ValueError("this is a text model: it takes a TextRequest")
    return config.model


def _label_index(config: Config, model: UNetConfig, label: int | str | None) -> int | None:
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
        if label not in config.label_names:
            names = ", ".join(config.label_names[:20]) or "none: give a number"
            raise CanvasError("label", f"label must be a number in 0..{last} or one of its names ({names})")
        return config.label_names.index(label)
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label <= last:
        raise CanvasError("label", f"label must be in 0..{last}")
    return label


def _row_label(model: UNetConfig, label: int | None, seed: int) -> int | None:
    """Return the label of a row: the one that is asked for, or one that is drawn from the row's seed."""
    if model.labels == "none" or label is not None:
        return label
    zero = torch.zeros((), dtype=torch.int64)
    return int(uniform(seed, zero, zero, Purpose.LABEL) * model.num_labels)


def _known_digits(checkpoint: Checkpoint, request: TextRequest, y: Tensor) -> Canvas:
    """Canvas of known digits, which exclude any other layout."""
    for param in ("prompt", "suffix", "template", "max_tokens"):
        if getattr(request, param) is not None:
            raise CanvasError(param, f"{param} and y exclude each other: known digits fix the whole layout")
    context = checkpoint.config.model.length
    canvas = digits_canvas(checkpoint.codec, y)
    if canvas.length > context:
        raise CanvasError("y", f"y has {canvas.length} tokens, but the context holds {context}")
    return canvas
