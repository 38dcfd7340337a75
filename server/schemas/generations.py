"""POST /v1/images/generations: what a request, an answer and the events of a stream hold, in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from server.schemas.base import Limits, Rule, SamplingRequest, Strict, bounded, shared_rules
from server.schemas.images import shown_names
from server.schemas.openai import NO_USER, or_null

MAX_PARTIAL_IMAGES = 3


class GenerationRequest(SamplingRequest):
    """Body of POST /v1/images/generations, before the bounds of `generation_request`; null stands for the default."""

    nulls_are_defaults = True

    prompt: str
    size: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    stream: bool = False
    partial_images: int = 0
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    output_compression: int = 100
    style: None = None
    moderation: None = None
    complexity: None = None
    frame_count: None = None
    frame_duration_ms: None = None
    svg: None = None
    safety_identifier: None = None
    user: None = None


def generation_request(
    limits: Limits, size: str, num_labels: int, label_names: Sequence[str]
) -> type[GenerationRequest]:
    """Return `GenerationRequest` with the bounds of a loaded model and their rules filled in.

    Args:
        limits: of the model and the settings.
        size: of its pictures, "WIDTHxHEIGHT".
        num_labels: labels that can be chosen; 0 for a model without.
        label_names: their names; may be empty.
    """
    sizes: Any = Literal["auto", size]
    rules: dict[str, Rule] = {
        **shared_rules(limits),
        "size": (sizes, f'"{size}", the size of this model\'s pictures, or "auto"', {}),
        "stream": (
            bool,
            "true or false; true, only with n = 1, sends server-sent events: image_generation.partial_image, "
            "image_generation.completed, then [DONE]",
            {},
        ),
        "partial_images": (
            int,
            f"an integer from 0 to {MAX_PARTIAL_IMAGES}: in a stream, most pictures before the finished one",
            {"ge": 0, "le": MAX_PARTIAL_IMAGES},
        ),
        **_off_rules(),
    }
    prompt: Rule = (str, _prompt_rule(num_labels, label_names), {})
    return bounded(GenerationRequest, {"prompt": prompt, **or_null(rules)})


def _prompt_rule(num_labels: int, names: Sequence[str]) -> str:
    if not num_labels:
        return '"": this model has no labels to choose from'
    named = f", one of the names {shown_names(names)}" if names else ""
    return (
        f'the label of the pictures as text: a number from 0 to {num_labels - 1}{named}, or "" for a label that is '
        "drawn for every picture"
    )


def _off_rules() -> dict[str, Rule]:
    """Fields of OpenAI's that choose among what this server has one of, or does not have."""
    only_png = "pictures are PNG files"
    return {
        "response_format": (
            Literal["b64_json"],
            '"b64_json" or null: no files are kept that a url could name',
            {},
        ),
        "output_format": (Literal["png"], f'"png" or null: {only_png}', {}),
        "output_compression": (int, f"100 (off) or null: {only_png}, without loss", {"ge": 100, "le": 100}),
        "quality": (
            Literal["auto", "standard"],
            '"auto", "standard" or null: the number of steps decides, see steps',
            {},
        ),
        "background": (
            Literal["auto", "opaque"],
            '"auto", "opaque" or null: pictures have no transparency',
            {},
        ),
        "style": (None, "null: a picture is chosen by its label alone", {}),
        "moderation": (None, "null: nothing is moderated here", {}),
        "complexity": (None, "null: pictures are not planned; see steps", {}),
        "frame_count": (None, f"null: {only_png}, without frames", {}),
        "frame_duration_ms": (None, f"null: {only_png}, without frames", {}),
        "svg": (None, f"null: {only_png}", {}),
        "safety_identifier": NO_USER,
        "user": NO_USER,
    }


class GeneratedImage(Strict):
    """One image."""

    b64_json: str = Field(description="a PNG file in base64")
    revised_prompt: str | None = Field(
        description="the label it was sampled under, its name if it has one; null for a model without labels"
    )


class TokenDetails(Strict):
    """Tokens by what they stand for."""

    text_tokens: int
    image_tokens: int


class GenerationUsage(Strict):
    """Tokens of a request: a label is no token, and an image has as many as the model's context."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int


class Generation(Strict):
    """Answer of POST /v1/images/generations."""

    created: int = Field(description="Unix time of the request in seconds")
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    size: str = Field(description="WIDTHxHEIGHT")
    data: list[GeneratedImage]
    usage: GenerationUsage


class ImageEvent(Strict):
    """What the events of a stream have in common."""

    b64_json: str
    created_at: int
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    quality: Literal["auto"] = "auto"
    size: str


class PartialImageEvent(ImageEvent):
    """A picture in the middle of sampling, masked digits at the middle of their range."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int


class CompletedImageEvent(ImageEvent):
    """The finished picture."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    usage: GenerationUsage
