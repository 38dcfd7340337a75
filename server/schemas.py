"""What requests and answers look like. Strict: no unknown keys, no silent conversions, no NaN.

The bounds of a request depend on the loaded model and the settings, so `request_model` builds the class with
them filled in. The description of each field is a rule ("an integer from 1 to 64"): it is the documentation
in /openapi.json and, after "n must be", the message of the 422.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, create_model

MAX_SEED = 2**64 - 1
MAX_TEMPERATURE = 100
MAX_STOPS = 8
MAX_STOP_CHARS = 256
MAX_TEMPLATE_PARTS = 1024
DEFAULT_STEPS = 64

_Rule = tuple[Any, str, dict[str, Any]]  # type of a field, its rule in words, and its bounds for pydantic
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]


class Strict(BaseModel):
    """Frozen, without silent conversions; unknown keys and non-finite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Limits:
    """The largest values a request may hold.

    Attributes:
        context: tokens of a row: the model's context.
        vocab_size: V.
        max_n: outputs of one request.
        max_steps: steps of one request.
        max_work: n * tokens * steps of one request.
        max_body_bytes: bytes of the body.
        max_chars: characters of a fixed text: what fits the context at best; None without a tokenizer.
    """

    context: int
    vocab_size: int
    max_n: int
    max_steps: int
    max_work: int
    max_body_bytes: int
    max_chars: int | None


class Gap(Strict):
    """Part of a template: tokens for the model to write."""

    gap: int = Field(ge=1)


class GenerateRequest(Strict):
    """Body of POST /generate, before the bounds of `request_model`."""

    model: str | None = None
    prompt: str | list[int] | None = None
    suffix: str | None = None
    template: list[str | Gap] | None = None
    max_tokens: int | None = None
    n: int = 1
    steps: int | Literal["exact"] = DEFAULT_STEPS
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: list[StopString] = []
    stream: bool = False


def _must_be_false(value: bool) -> bool:
    # A Literal[False] would let 0 pass.
    if value:
        raise ValueError("must be false")
    return value


def request_model(limits: Limits) -> type[GenerateRequest]:
    """Return `GenerateRequest` with the bounds of a loaded model and their rules filled in."""
    filled: dict[str, Any] = {}
    for name, (kind, rule, bounds) in {**_layout_rules(limits), **_sampling_rules(limits)}.items():
        default = GenerateRequest.model_fields[name].default
        filled[name] = (kind, Field(**{"default": default, "description": rule, **bounds}))
    return create_model("GenerateRequest", __base__=GenerateRequest, **filled)


def _layout_rules(limits: Limits) -> dict[str, _Rule]:
    """Which model writes, and where: the fixed text and the gaps."""
    context, top_token = limits.context, limits.vocab_size - 1
    token_id = Annotated[int, Field(ge=0, le=top_token)]
    gap: Any = create_model("Gap", __base__=Gap, gap=(int, Field(ge=1, le=context)))
    return {
        "model": (str | None, "the name of a loaded model, or null", {}),
        "prompt": (
            str | Annotated[list[token_id], Field(max_length=context)] | None,
            f"Unicode text, or a list of at most {context} token ids from 0 to {top_token}, or null",
            {},
        ),
        "suffix": (str | None, "Unicode text, or null", {}),
        "template": (
            list[str | gap] | None,
            f"null or a list of 1 to {MAX_TEMPLATE_PARTS} parts, each Unicode text or "
            f'{{"gap": number of tokens from 1 to {context}}}',
            {"min_length": 1, "max_length": MAX_TEMPLATE_PARTS},
        ),
        "max_tokens": (
            int | None,
            f"an integer from 1 to {context} (the context), or null to fill the context",
            {"ge": 1, "le": context},
        ),
    }


def _sampling_rules(limits: Limits) -> dict[str, _Rule]:
    """How many outputs are drawn, from which distribution, and where they end."""
    return {
        "n": (int, f"an integer from 1 to {limits.max_n}", {"ge": 1, "le": limits.max_n}),
        "steps": (
            Annotated[int, Field(ge=1, le=limits.max_steps)] | Literal["exact"],
            f'an integer from 1 to {limits.max_steps}, or "exact"',
            {"default": min(DEFAULT_STEPS, limits.max_steps)},
        ),
        "temperature": (
            float,
            f"a finite number from 0 (greedy) to {MAX_TEMPERATURE}",
            {"ge": 0, "le": MAX_TEMPERATURE},
        ),
        "top_p": (float, "a number above 0 and at most 1 (off)", {"gt": 0, "le": 1}),
        "top_k": (int, f"an integer from 0 (off) to {limits.vocab_size}", {"ge": 0, "le": limits.vocab_size}),
        "seed": (
            int | None,
            "an integer from 0 to 2^64 - 1, or null for one that the server draws",
            {"ge": 0, "le": MAX_SEED},
        ),
        "stop": (
            list[StopString],
            f"a list of at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters",
            {"max_length": MAX_STOPS},
        ),
        "stream": (
            Annotated[bool, AfterValidator(_must_be_false)],
            "false: streaming is not supported yet",
            {},
        ),
    }


def find_unknown_key(model: type[BaseModel], body: Mapping[str, object]) -> str | None:
    """Return the message about the first key of a body that `model` does not have, without repeating it."""
    for place, key in enumerate(body, 1):
        if key not in model.model_fields:
            close = difflib.get_close_matches(key[:64], model.model_fields, 1)
            hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(model.model_fields)}"
            return f"key number {place} of the body is unknown; {hint}"
    return None


def has_odd_part(template: object) -> bool:
    """Return whether a template holds an object with other keys than "gap", of which there may be many."""
    parts = template if isinstance(template, list) else []
    return any(isinstance(part, dict) and part.keys() != {"gap"} for part in parts)


def inlined_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a model without $defs, as it can stand inside an OpenAPI document."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolve(definitions[node["$ref"].rsplit("/", 1)[1]])
        return {key: resolve(value) for key, value in node.items()}

    resolved: dict[str, Any] = resolve(schema)
    return resolved


class Output(Strict):
    """One generated row."""

    text: str | None = Field(
        description="fixed text and generated text; null for a model without a tokenizer"
    )
    gaps: list[str] = Field(description="the generated text of each gap, in order")
    token_ids: list[int] = Field(description="tokens of the text, fixed and generated")
    finish_reason: Literal["stop", "length"] = Field(description="stop: an end or a stop string was met")
    seed: int = Field(description="with n=1 and the same request, this seed gives this output again")
    nfe: int = Field(description="denoiser calls that this row took part in")
    steps: int | Literal["exact"] = Field(description="steps asked for")
    steps_skipped: int = Field(description="steps that would have changed nothing, and so cost nothing")


class Usage(Strict):
    """Tokens of a request: a prompt counts once, generated tokens over all outputs."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    denoiser_calls: int = Field(description="sum of nfe over the outputs")


class Timings(Strict):
    """Seconds: waiting for the first denoiser call, from there to the last, and all in all."""

    queue_s: float
    run_s: float
    total_s: float


class GenerateResponse(Strict):
    """Answer of POST /generate."""

    id: str
    model: str
    outputs: list[Output]
    usage: Usage
    timings: Timings


class ErrorInfo(Strict):
    """What went wrong, and which field of the request is at fault."""

    message: str
    type: str
    code: str
    param: str | None


class ErrorBody(Strict):
    """Every error answer."""

    error: ErrorInfo


class Status(Strict):
    """Answer of /health and /ready."""

    status: str
