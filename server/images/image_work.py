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
    if _work(request, limits.context, num_digits, changes) <= limits.max_work:
        return  # whatever is known
    canvas = image_canvas(checkpoint.config.image_model, checkpoint.codec, request.known, request.y)
    num_free = int(canvas.free.sum())
    if _work(request, limits.context, num_free, changes) > limits.max_work:
        raise CanvasError(
            "steps",
            f"n * tokens * steps is at most {limits.max_work}, with {limits.context} tokens and steps counted up to "
            f"the {num_free} free sub-tokens (with a corrector every step counts, and one more), and so is n * "
            f"{num_free} * {changes * DRAWN_CHANGE_WORK:.4g}, for the times that each is revealed or masked again; "
            "lower n, steps or corrector.scale",
        )


def _work(request: ImageRequest, num_tokens: int, num_free: int, changes: float) -> float:
    """Return what n rows cost: tokens times calls, or the drawing of their plans if that is more."""
    if request.steps == "exact":
        calls = num_free
    elif request.corrector is None:
        # What a warped grid leaves is revealed in a call of its own.
        calls = min(request.steps + (request.warp is not None), num_free)
    else:
        calls = request.steps + 1
    return request.n * max(num_tokens * calls, num_free * changes * DRAWN_CHANGE_WORK)
