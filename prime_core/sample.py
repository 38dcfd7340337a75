"""From a request to samples: the offline loop, and the two ends of it that the server shares.

`prepare_rows` turns a request into rows, the stepper advances them, `finish_row` turns a row into a `Sample`.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kernels.noise import row_seed
from prime_core.canvas import (
    Canvas,
    CanvasError,
    Template,
    check_stop,
    digits_canvas,
    text_canvas,
)
from prime_core.plan import Steps
from prime_core.render import render
from prime_core.stepper import Row, SamplingSettings, Stepper, new_row

if TYPE_CHECKING:
    from prime_core.checkpoint import Checkpoint


class NonFiniteError(RuntimeError):
    """The network gave NaN, infinity or no possible token for a row."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished output.

    Attributes:
        text: the whole text, fixed parts verbatim; None if the model has no tokenizer.
        token_ids: its tokens.
        gaps: the text of every gap.
        finish_reason: "stop" or "length".
        seed: seed that gives this output alone, with n = 1.
        nfe: denoiser calls it took.
        steps: steps of the grid, or "exact".
        steps_skipped: steps of the grid that changed nothing and cost nothing.
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
class PreparedRows:
    """The rows of one request, ready for a stepper, and what `finish_row` needs to render them."""

    rows: tuple[Row, ...]
    canvas: Canvas
    steps: Steps
    stop: tuple[str, ...]


def prepare_rows(
    checkpoint: Checkpoint,
    *,
    n: int = 1,
    steps: Steps = 64,
    seed: int | None = None,
    prompt: str | Sequence[int] | None = None,
    suffix: str | None = None,
    template: Template | None = None,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[str] = (),
    y: Tensor | None = None,
) -> PreparedRows:
    """Turn a request into rows with their reveal plans; the network is not called.

    Args:
        checkpoint: the model.
        n: number of outputs, at least 1.
        steps: grid steps, or "exact".
        seed: 0..2**64-1; None draws one. Output r uses `row_seed(seed, r)`.
        prompt: text or token ids before the gap.
        suffix: text after the gap.
        template: strings and gaps `{"gap": number_of_tokens}` in order.
        max_tokens: tokens of the gap; None fills the context.
        temperature: 0..100.
        top_p: (0, 1].
        top_k: 0 keeps all.
        stop: strings that end the text of a prompt.
        y: (L, S) known digits with ``codec.mask_index`` where free, in place of prompt, suffix and template.

    Raises:
        CanvasError: if the layout is wrong; ``param`` names the field.
        ValueError: if another argument is out of range.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError("n must be an integer of at least 1")
    settings = SamplingSettings(temperature, top_p, top_k)
    if y is None:
        context = checkpoint.config.model.length
        canvas = text_canvas(
            checkpoint.tokenizer,
            checkpoint.codec,
            context,
            prompt=prompt,
            suffix=suffix,
            template=template,
            max_tokens=max_tokens,
        )
    else:
        canvas = _known_digits(
            checkpoint, y, prompt=prompt, suffix=suffix, template=template, max_tokens=max_tokens
        )
    check_stop(canvas, stop, checkpoint.tokenizer)
    first_seed = secrets.randbits(64) if seed is None else seed
    seeds = [row_seed(first_seed, row) for row in range(n)]
    rows = tuple(new_row(canvas, checkpoint.schedule, settings, steps, row) for row in seeds)
    return PreparedRows(rows, canvas, steps, tuple(stop))


def finish_row(checkpoint: Checkpoint, prepared: PreparedRows, row: Row) -> Sample:
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
    rendered = render(
        prepared.canvas, checkpoint.codec.decode(row.y.cpu()), checkpoint.tokenizer, prepared.stop
    )
    nfe = row.plan.nfe
    return Sample(
        text=rendered.text,
        token_ids=rendered.token_ids,
        gaps=rendered.gaps,
        finish_reason=rendered.finish_reason,
        seed=row.seed,
        nfe=nfe,
        steps=prepared.steps,
        steps_skipped=0 if prepared.steps == "exact" else max(prepared.steps - nfe, 0),
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
    *,
    n: int = 1,
    steps: Steps = 64,
    seed: int | None = None,
    prompt: str | Sequence[int] | None = None,
    suffix: str | None = None,
    template: Template | None = None,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[str] = (),
    y: Tensor | None = None,
    max_rows: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """Sample from a model; the same arguments give the same text as the server gives.

    The law is that of ancestral sampling on a uniform grid of ``steps`` steps, but only steps that reveal
    something call the network. Arguments are those of `prepare_rows`, and:

    Args:
        checkpoint: the model.
        n: see `prepare_rows`, as for all arguments up to ``y``.
        steps: grid steps, or "exact".
        seed: 0..2**64-1; None draws one.
        prompt: text or token ids before the gap.
        suffix: text after the gap.
        template: strings and gaps `{"gap": number_of_tokens}` in order.
        max_tokens: tokens of the gap; None fills the context.
        temperature: 0..100.
        top_p: (0, 1].
        top_k: 0 keeps all.
        stop: strings that end the text of a prompt.
        y: (L, S) known digits.
        max_rows: most rows in one denoiser call.
        progress: called after every denoiser call with (events done, events in all).

    Returns:
        ``n`` samples, in the order of their row seeds.

    Raises:
        CanvasError: if the layout is wrong; ``param`` names the field.
        ValueError: if another argument is out of range.
        NonFiniteError: if the network gave no finite logits for a row.
    """
    prepared = prepare_rows(
        checkpoint,
        n=n,
        steps=steps,
        seed=seed,
        prompt=prompt,
        suffix=suffix,
        template=template,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop,
        y=y,
    )
    run_rows(Stepper(checkpoint.denoiser, checkpoint.codec), prepared.rows, max_rows, progress)
    return [finish_row(checkpoint, prepared, row) for row in prepared.rows]


def _known_digits(checkpoint: Checkpoint, y: Tensor, **layout: object) -> Canvas:
    """Canvas of known digits, which exclude any other layout."""
    for param, value in layout.items():
        if value is not None:
            raise CanvasError(param, f"{param} and y exclude each other: known digits fix the whole layout")
    context = checkpoint.config.model.length
    canvas = digits_canvas(checkpoint.codec, y)
    if canvas.length > context:
        raise CanvasError("y", f"y has {canvas.length} tokens, but the context holds {context}")
    return canvas
