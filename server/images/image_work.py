"""How much work a request for images is, and the refusal of what is over the limit, before any plan is drawn."""

from __future__ import annotations

from prime_core.canvas import CanvasError
from prime_core.checkpoint import Checkpoint
from prime_core.image_canvas import image_canvas
from prime_core.request import ImageRequest
from server.schemas.base import Limits


def check_grid(request: ImageRequest, limits: Limits) -> None:
    """Refuse what does not go with exact steps, and steps that only a preset asks for.

    Raises:
        CanvasError: naming the field.
    """
    if request.steps == "exact":
        for param in ("warp", "corrector"):
            if getattr(request, param) is not None:
                raise CanvasError(
                    param, f"{param} must be null when steps is exact: it needs a grid of steps"
                )
    elif request.steps > limits.max_steps:
        raise CanvasError(
            "preset", f"the preset has {request.steps} steps; the limit is {limits.max_steps}: give steps too"
        )


def check_work(checkpoint: Checkpoint, request: ImageRequest, limits: Limits) -> None:
    """Refuse a request whose n * tokens * denoiser calls is over the limit.

    Raises:
        CanvasError: saying what to lower.
    """
    num_digits = limits.context * checkpoint.codec.target_length
    if _work(request, limits.context, num_digits) <= limits.max_work:
        return  # whatever is known
    canvas = image_canvas(checkpoint.config.image_model, checkpoint.codec, request.known, request.y)
    num_free = int(canvas.free.sum())
    if _work(request, limits.context, num_free) > limits.max_work:
        raise CanvasError(
            "steps",
            f"n * tokens * steps is at most {limits.max_work}, with {limits.context} tokens and steps counted up to "
            f"the {num_free} free sub-tokens (with a corrector every step counts, and one more, and each masking "
            "anew as a sub-token); lower n, steps or corrector.scale",
        )


def _work(request: ImageRequest, num_tokens: int, num_free: int) -> float:
    """Return what n rows cost: tokens times calls, or the size of their plans if that is larger."""
    if request.steps == "exact":
        return request.n * num_tokens * num_free
    if request.corrector is None:
        one_more = request.warp is not None  # what a warped grid leaves is revealed in a call of its own
        return request.n * num_tokens * min(request.steps + one_more, num_free)
    # A corrector masks a digit `scale` times on average, at most once a step: that bounds the plan.
    times_masked = min(request.corrector.scale, request.steps)
    return request.n * max(num_tokens * (request.steps + 1), num_free * (1 + times_masked))
