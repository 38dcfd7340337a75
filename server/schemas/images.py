"""POST and GET /images: what a request and an answer hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from prime_core.labels import find_label
from prime_core.sampling.correctors import MAX_CORRECTOR_SCALE, CorrectorKind
from prime_core.sampling.curves import MAX_POWER, MAX_TEMPERATURE, MAX_WARP_SCALE
from prime_core.sampling.presets import PRESETS
from prime_core.sampling.settings import ImageSampler
from server.images.known import KnownShape
from server.schemas.base import (
    STREAM_RULE,
    Limits,
    Rule,
    SamplingRequest,
    Strict,
    Timings,
    bounded,
    shared_rules,
)

MAX_SHOWN_NAMES = 20

ResponseFormat = Literal["b64_json", "png", "grid", "npy"]


class Curve(Strict):
    """scale * (1 - t)^power + offset: a temperature over noise time t, 1 where all is masked and 0 at the end."""

    scale: float = Field(ge=-MAX_TEMPERATURE, le=MAX_TEMPERATURE)
    power: float = Field(ge=0, le=MAX_POWER)
    offset: float = Field(ge=-MAX_TEMPERATURE, le=MAX_TEMPERATURE)


class Warp(Strict):
    """t -> scale * t^power - offset: a warp of the time grid. Power 0 only as (1, 0, 0), which is no warp."""

    scale: float = Field(gt=0, le=MAX_WARP_SCALE)
    power: float = Field(ge=0, le=MAX_POWER)
    offset: float = Field(gt=-1, lt=MAX_WARP_SCALE)


class CorrectorFields(Strict):
    """Strength scale * (1 - t)^power * t^final_power with which digits are masked again at noise time t."""

    kind: CorrectorKind
    scale: float = Field(ge=0, le=MAX_CORRECTOR_SCALE)
    power: float = Field(ge=0, le=MAX_POWER)
    final_power: float | None = Field(default=None, ge=0, le=MAX_POWER)


class ImagesRequest(SamplingRequest):
    """Body of POST /images, before the bounds of `image_request`."""

    temperature: float | Curve = 1.0
    label: int | str | None = None
    sampler: ImageSampler = "ancestral"
    corrector: CorrectorFields | None = None
    warp: Warp | None = None
    preset: str | None = None
    known: Any = None
    response_format: ResponseFormat | None = None
    stream: bool = False
    preview_every: int = 8

    @classmethod
    def find_malformed_field(cls, fields: Mapping[str, object]) -> str | None:
        """Return the name of a field that is an object with other keys than it has, of which there may be many."""
        objects: dict[str, type[Strict]] = {"temperature": Curve, "corrector": CorrectorFields, "warp": Warp}
        for name, schema in objects.items():
            value = fields.get(name)
            if isinstance(value, dict) and not value.keys() <= schema.model_fields.keys():
                return name
        return None


def image_request(
    limits: Limits, shape: KnownShape, num_labels: int, label_names: Sequence[str]
) -> type[ImagesRequest]:
    """Return `ImagesRequest` with the bounds of a loaded model and their rules filled in.

    Args:
        limits: of the model and the settings.
        shape: of its pictures.
        num_labels: labels that can be chosen; 0 for a model without.
        label_names: their names; may be empty.
    """
    rules = {
        **shared_rules(limits),
        **_drawing_rules(),
        "label": label_rule(num_labels, label_names),
        "known": (Annotated[Any, WithJsonSchema(shape.json_schema)], shape.rule, {}),
        "response_format": (
            ResponseFormat | None,
            '"b64_json" (JSON with PNG files), "png" (only for n = 1), "grid" (one PNG with all images), "npy" (numpy '
            "array of shape (n, height, width, channels)), or null: JSON, or if the Accept header prefers image/png, "
            "png for n = 1 and else grid; a stream ends in JSON",
            {},
        ),
        "stream": (bool, STREAM_RULE, {}),
        "preview_every": (
            int,
            f"an integer from 0 to {limits.max_steps}: in a stream, denoiser calls of an image between two pictures of "
            "it; 0 for none",
            {"ge": 0, "le": limits.max_steps},
        ),
    }
    return bounded(ImagesRequest, rules)


def _drawing_rules() -> dict[str, Rule]:
    """How images are drawn."""
    names = tuple(PRESETS)
    preset: Any = Literal[names]
    return {
        "temperature": (
            Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | Curve,
            f'a finite number from 0 (greedy) to {MAX_TEMPERATURE:g}, or {{"scale": -100 to 100, "power": 0 to '
            f'{MAX_POWER:g}, "offset": 0 to 100}} for scale * (1 - t)^power + offset, which must stay in 0 to '
            f"{MAX_TEMPERATURE:g} for t from 1 (all masked) to 0",
            {},
        ),
        "sampler": (
            ImageSampler,
            '"ancestral" (draws whole tokens that agree with what is visible) or "published" (draws every digit alone)',
            {},
        ),
        "corrector": (
            CorrectorFields | None,
            'null, or {"kind": "corrected" or "published", "scale": 0 to '
            f'{MAX_CORRECTOR_SCALE:g}, "power": 0 to {MAX_POWER:g}, "final_power": the same, only for "corrected"}}: '
            "digits are masked again with strength scale * (1 - t)^power * t^final_power; not with exact steps",
            {},
        ),
        "warp": (
            Warp | None,
            f'null, or {{"scale": above 0 to {MAX_WARP_SCALE:g}, "power": above 0 to {MAX_POWER:g}, "offset": above -1 '
            "and below scale} (or 1, 0, 0, which is no warp): the time grid t becomes scale * t^power - offset; not "
            "with exact steps",
            {},
        ),
        "preset": (
            preset | None,
            "null, or the name of published settings, which fields that are given replace; /info tells what is "
            f"published of each, and its FID: {', '.join(names)}",
            {},
        ),
    }


def label_rule(num_labels: int, names: Sequence[str], *, drawn: bool = True) -> Rule:
    """Return the rule of `label`.

    Args:
        num_labels: labels that can be chosen; 0 for a model without.
        names: of the labels; may be empty.
        drawn: whether null is a label that is drawn; if not, a model with labels needs one.
    """
    if not num_labels:
        return (None, "null: this model has no labels to choose from", {})
    value_type: Any = Annotated[int, Field(ge=0, le=num_labels - 1)]
    text = f"an integer from 0 to {num_labels - 1}"
    if names:
        value_type = value_type | name_type(names)
        text += f", one of the names {shown_names(names)}"
    if not drawn:
        return (value_type, text, {"default": ...})
    return (value_type | None, f"{text}, or null for one that is drawn for every image", {})


def name_type(names: Sequence[str]) -> Any:
    """Return the type of the name of a label, which may be written in another case (see `find_label`)."""

    def written(value: object) -> object:
        number = find_label(names, value) if isinstance(value, str) else None
        return value if number is None else names[number]

    return Annotated[Literal[tuple(names)], BeforeValidator(written)]


def shown_names(names: Sequence[str]) -> str:
    """Return the names of labels for a rule, at most `MAX_SHOWN_NAMES` of them."""
    more = len(names) - MAX_SHOWN_NAMES
    return ", ".join(names[:MAX_SHOWN_NAMES]) + (f" and {more} more (see /info)" if more > 0 else "")


class ImageOutput(Strict):
    """One image."""

    b64_json: str = Field(description="a PNG file in base64")
    label: int | None = Field(description="the label it was sampled under; null for a model without labels")
    label_name: str | None = Field(description="the name of the label, if it has one")
    seed: int = Field(description="with n=1 and the same request, this seed gives this image again")
    nfe: int = Field(description="denoiser calls that this image took part in")
    steps: int | Literal["exact"] = Field(description="steps asked for")
    steps_skipped: int = Field(
        description="steps of the grid that cost no denoiser call; a call after the grid is no step of it"
    )


class ImagesUsage(Strict):
    """What a request took."""

    images: int
    denoiser_calls: int = Field(description="sum of nfe over the images")


class ImagesResponse(Strict):
    """Answer of /images in JSON."""

    id: str
    model: str
    images: list[ImageOutput]
    usage: ImagesUsage
    timings: Timings
