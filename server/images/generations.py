"""POST /v1/images/generations between its route and the engine: the prompt is a label, the answer in OpenAI's shape."""

from __future__ import annotations

from functools import partial

from prime_core.checkpoint import Checkpoint
from prime_core.labels import parse_label
from prime_core.pixels import PixelCodec
from prime_core.sampling.canvas import CanvasError
from prime_core.sampling.prepare import PreparedRows
from server.engine.model_queue import ModelQueue
from server.http.errors import ApiError
from server.images.image_answer import images_response
from server.images.images import count_images, prepare_images
from server.metrics import Metrics
from server.request import Recipe, Service
from server.schemas.base import Limits
from server.schemas.generations import (
    GeneratedImage,
    Generation,
    GenerationRequest,
    GenerationUsage,
    TokenDetails,
)
from server.schemas.images import ImageOutput, ImagesRequest, ImagesResponse


def generation_recipe(
    service: Service, queue: ModelQueue, body: GenerationRequest
) -> Recipe[PreparedRows, ImagesResponse]:
    """Return how a checked request is answered, in the project's own shape; see `generation_of`.

    Args:
        service: the limits.
        queue: the model.
        body: of the request, checked against the schema of the model.

    Raises:
        ApiError: 422 if fields contradict each other.
    """
    _check_together(body)
    return Recipe(
        body.n,
        partial(prepare_generation, queue.checkpoint, body, service.limits[queue.name]),
        partial(images_response, "", queue),
        _count,
    )


def _count(metrics: Metrics, answer: ImagesResponse) -> None:
    rows = [(image.nfe, image.steps_skipped) for image in answer.images]
    count_images(metrics, answer.model, answer.timings, rows)


def _check_together(body: GenerationRequest) -> None:
    if body.stream and body.n > 1:
        message = "n must be 1 in a stream, whose events do not say which picture they are of"
        raise ApiError(422, "invalid_value", message, param="n")
    if body.partial_images and not body.stream:
        raise ApiError(
            422, "invalid_value", "partial_images must be 0 without stream", param="partial_images"
        )


def prepare_generation(checkpoint: Checkpoint, body: GenerationRequest, limits: Limits) -> PreparedRows:
    """Return the rows of a request, with their reveal plans.

    Raises:
        CanvasError: if the prompt is no label of the model, or the request is over the limit of work.
    """
    fields = ImagesRequest(
        n=body.n,
        steps=body.steps,
        seed=body.seed,
        top_p=body.top_p,
        top_k=body.top_k,
        label=parse_label(body.prompt) if body.prompt else None,
    )
    try:
        return prepare_images(checkpoint, fields, "b64_json", limits)
    except CanvasError as error:  # two fields have other names here, or no other choice
        if error.param == "label":
            rule = type(body).model_fields["prompt"].description
            raise CanvasError("prompt", f"prompt must be {rule}") from None
        if error.param == "response_format":
            message = (
                "model must make pictures that PNG holds; for those of this one see POST /images, format npy"
            )
            raise CanvasError("model", message) from None
        raise


def size_of(checkpoint: Checkpoint) -> str:
    """Return the size of an image model's pictures, as in "32x32": width, then height."""
    height, width, _ = PixelCodec(checkpoint.config.image_model).picture_shape
    return f"{width}x{height}"


def generation_of(created: int, queue: ModelQueue, answer: ImagesResponse) -> Generation:
    """Return the answer in OpenAI's shape."""
    return Generation(
        created=created,
        size=size_of(queue.checkpoint),
        data=[
            GeneratedImage(b64_json=image.b64_json, revised_prompt=_label_of(queue.checkpoint, image))
            for image in answer.images
        ],
        usage=usage_of(queue.checkpoint, len(answer.images)),
    )


def usage_of(checkpoint: Checkpoint, num_images: int) -> GenerationUsage:
    """Return the tokens of some images."""
    num_tokens = num_images * checkpoint.config.model.length
    return GenerationUsage(
        input_tokens=0,
        input_tokens_details=TokenDetails(text_tokens=0, image_tokens=0),
        output_tokens=num_tokens,
        output_tokens_details=TokenDetails(text_tokens=0, image_tokens=num_tokens),
        total_tokens=num_tokens,
    )


def _label_of(checkpoint: Checkpoint, image: ImageOutput) -> str | None:
    if not checkpoint.config.image_model.num_choosable_labels:
        return None  # drawn for the network, but of no meaning
    return str(image.label) if image.label_name is None else image.label_name
