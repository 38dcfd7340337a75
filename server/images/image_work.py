"""How much work a request for images is, and the refusal of what is over the limit, before any plan is drawn."""

from __future__ import annotations

from prime_core.checkpoint import Checkpoint
from prime_core.sampling.canvas import CanvasError
from prime_core.sampling.image_canvas import image_canvas
from prime_core.sampling.plan import expected_changes
from prime_core.sampling.request import ImageRequest
from server.schemas.base import Limits

# Plans are drawn on a CPU, in the time that a fast denoiser needs for so many tokens a change. With a corrector of
# full strength a digit changes a hundred times.
DRAWN_CHANGE_WORK = 8


def check_grid(request: ImageRequest, limits: Limits) -> None:
    """Refuse what does not go with exact steps, and steps that only a preset asks for.

    Raises:
        CanvasError: naming the field.
    """
    if request.steps == "exact":
        warps = request.warp is not None and not request.warp.is_identity
        for param, given in (("warp", warps), ("corrector", request.corrector is not None)):
            if given:
                raise CanvasError(
                    param, f"{param} must be null when steps is exact: it needs a grid of steps"
                )
    elif request.steps > limits.max_steps:
        raise CanvasError(
            "preset", f"the preset has {request.steps} steps; the limit is {limits.max_steps}: give steps too"
        )


def check_work(checkpoint: Checkpoint, request: ImageRequest, limits: Limits) -> None:
    """Refuse a request whose n * tokens * denoiser calls is over the limit, or whose plans are too large for it.

    Raises:
        CanvasError: saying what to lower.
    """
    changes = expected_changes(
        checkpoint.schedule, request.steps, warp=request.warp, corrector=request.corrector
    )
    num_digits = limits.context * checkpoint.codec.target_length
    tokens = limits.context
    if (
        max(_call_work(request, tokens, num_digits), _plan_work(request, num_digits, changes))
        <= limits.max_work
    ):
        return  # whatever is known
    canvas = image_canvas(checkpoint.config.image_model, checkpoint.codec, request.known, request.y)
    num_free = int(canvas.free.sum())
    if _call_work(request, tokens, num_free) > limits.max_work:
        counted = f"the {num_free} free digits" if request.corrector is None else "one more, with a corrector"
        raise CanvasError(
            "steps",
            f"n * tokens * steps is at most {limits.max_work}, with {tokens} tokens and steps counted up to {counted}; "
            "lower n or steps",
        )
    if _plan_work(request, num_free, changes) > limits.max_work:
        raise CanvasError(
            "steps",
            f"n * digits * {DRAWN_CHANGE_WORK} * changes is at most {limits.max_work}, with {num_free} free digits, "
            f"each revealed or masked again {changes:.4g} times; lower n, steps or corrector.scale",
        )


def _call_work(request: ImageRequest, num_tokens: int, num_free: int) -> int:
    """Return the tokens of all denoiser calls of n rows."""
    if request.steps == "exact":
        calls = num_free
    elif request.corrector is None:
        # What a warped grid leaves is revealed in a call of its own.
        calls = min(request.steps + (request.warp is not None), num_free)
    else:
        calls = request.steps + 1
    return request.n * num_tokens * calls


def _plan_work(request: ImageRequest, num_free: int, changes: float) -> float:
    """Return what it takes to draw the plans of n rows, in tokens of denoiser calls."""
    return request.n * num_free * changes * DRAWN_CHANGE_WORK
