"""POST /score: what a request and an answer hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from prime_core.scoring.score import DEFAULT_SAMPLES
from server.images.known import KnownShape
from server.schemas.base import Limits, ModelRequest, Rule, Strict, Timings, bounded, model_rules
from server.schemas.images import label_rule

MAX_SAMPLES = 1024
CODED_NOTE = "coded_loss is not a bound for more than one digit"


class ScoreFields(ModelRequest):
    """What every request for scores has."""

    num_samples: int = DEFAULT_SAMPLES
    per_token: bool = False


class TextScoreRequest(ScoreFields):
    """Body of POST /score to a text model, before the bounds of `text_score_request`."""

    text: str | None = None
    token_ids: list[int] | None = None
    inputs: list[str | list[int]] | None = None

    @classmethod
    def find_malformed_field(cls, fields: Mapping[str, object]) -> str | None:
        """Return "inputs" if it is longer than pydantic should describe."""
        inputs = fields.get("inputs")
        malformed = isinstance(inputs, list) and any(not isinstance(each, str | list) for each in inputs)
        return "inputs" if malformed else None


class ImageScoreRequest(ScoreFields):
    """Body of POST /score to an image model, before the bounds of `image_score_request`."""

    pixels: Any = None
    png: str | None = None
    label: int | str | None = None


def text_score_request(limits: Limits) -> type[TextScoreRequest]:
    """Return `TextScoreRequest` with the bounds of a loaded model and their rules filled in."""
    context, top_token = limits.context, limits.vocab_size - 1
    token_id = Annotated[int, Field(ge=0, le=top_token)]
    tokens = Annotated[list[token_id], Field(fail_fast=True, min_length=1, max_length=context)]
    rule_of_tokens = f"a list of 1 to {context} token ids from 0 to {top_token}"
    rules: dict[str, Rule] = {
        **_shared_rules(),
        "text": (
            str | None,
            f"Unicode text of 1 to {context} tokens, or null; one of text, token_ids and inputs is needed",
            {},
        ),
        "token_ids": (tokens | None, f"{rule_of_tokens}, or null", {}),
        "inputs": (
            Annotated[list[str | tokens], Field(fail_fast=True, min_length=1, max_length=limits.max_n)]
            | None,
            f"a list of 1 to {limits.max_n} inputs, each Unicode text of 1 to {context} tokens or {rule_of_tokens}; "
            "or null",
            {},
        ),
    }
    return bounded(TextScoreRequest, rules)


def image_score_request(
    shape: KnownShape, num_labels: int, label_names: Sequence[str]
) -> type[ImageScoreRequest]:
    """Return `ImageScoreRequest` with the bounds of a loaded model and their rules filled in.

    Args:
        shape: of the model's pictures.
        num_labels: labels that can be chosen; 0 for a model without.
        label_names: their names; may be empty.
    """
    height, width, channels = shape.picture
    schema = {"anyOf": [shape.schema_of_pixels, {"type": "null"}]}
    colours = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
    rules: dict[str, Rule] = {
        **_shared_rules(),
        "pixels": (
            Annotated[Any, WithJsonSchema(schema)],
            f"{shape.rule_of_pixels}; or null: give png then",
            {},
        ),
        "png": (
            str | None,
            f"base64 of a PNG file of {width} x {height} pixels (width x height), 8-bit {colours} without alpha, "
            f"values up to {shape.top_pixel}; or null: give pixels then",
            {},
        ),
        "label": label_rule(num_labels, label_names, drawn=False),
    }
    return bounded(ImageScoreRequest, rules)


def _shared_rules() -> dict[str, Rule]:
    """How many states, which, and how much is told."""
    return {
        **model_rules(),
        "num_samples": (
            int,
            f"an integer from 1 to {MAX_SAMPLES}: masked states drawn for each input, one denoiser call each",
            {"ge": 1, "le": MAX_SAMPLES},
        ),
        "per_token": (bool, "true or false; true tells what each token costs", {}),
    }


class Nelbo(Strict):
    """An estimate of the likelihood bound, and the only one that is told in units of likelihood."""

    nats: float = Field(description="of the whole input: on average an upper bound of its -log probability")
    standard_error: float | None = Field(description="of nats; null for num_samples 1")
    nats_per_token: float
    bits_per_token: float
    bits_per_byte: float | None = Field(description="of UTF-8; null for images and for tokens without text")
    bits_per_dimension: float | None = Field(description="per pixel and channel; null for text")
    ppl: float | None = Field(description="perplexity per token; null for images")
    is_bound: Literal[True] = True


class CodedLoss(Strict):
    """An estimate of the published training loss."""

    nats: float = Field(description="of the whole input")
    standard_error: float | None = Field(description="of nats; null for num_samples 1")
    nats_per_token: float
    is_bound: bool = Field(description="true only for models of one digit a token, where it equals nelbo")
    note: str = Field(description="says so in words")


class TokenCosts(Strict):
    """What each token costs in nats, rounded to six decimals; of an image in channel-major order."""

    token_ids: list[int] = Field(description="the tokens; of an image the values of its pixels")
    pieces: list[str] | None = Field(
        description="their texts, which add up to the whole one: a character of several tokens is with its last; null "
        "for images and for a model without a tokenizer"
    )
    nelbo: list[float] = Field(description="adds up to nelbo.nats; single ones depend on the states drawn")
    coded_loss: list[float] = Field(description="adds up to coded_loss.nats")


class InputScore(Strict):
    """What the model makes of one input."""

    nelbo: Nelbo
    coded_loss: CodedLoss
    num_tokens: int
    num_bytes: int | None = Field(
        description="of the text in UTF-8; null for images and for tokens without text"
    )
    num_dimensions: int | None = Field(description="pixels times channels; null for text")
    label: int | None = Field(
        description="the label it was scored under; null for a model without labels to choose"
    )
    seed: int = Field(
        description="with this input alone and the same num_samples, this seed gives this score again"
    )
    nfe: int = Field(description="denoiser calls that this input took part in: one for each masked state")
    per_token: TokenCosts | None = Field(description="null unless asked for")


class ScoreUsage(Strict):
    """What a request took."""

    inputs: int
    total_tokens: int
    denoiser_calls: int = Field(description="sum of nfe over the inputs")


class ScoreResponse(Strict):
    """Answer of POST /score."""

    id: str
    model: str
    scores: list[InputScore] = Field(description="one for each input, in order")
    usage: ScoreUsage
    timings: Timings
