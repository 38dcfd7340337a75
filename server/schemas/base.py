"""What requests and answers look like. Strict: no unknown keys, no silent conversions, no NaN.

The bounds of a request depend on a loaded model and the settings, so `bounded` builds a class with them filled in.
The description of each field is a rule ("an integer from 1 to 64"): it is the documentation in /openapi.json and,
after "n must be", the message of the 422.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model

from kernels.noise import MAX_SEED
from prime_core.sampling.request import DEFAULT_STEPS

Rule = tuple[Any, str, dict[str, Any]]  # type of a field, its rule in words, and its bounds for pydantic


STREAM_RULE = "true (server-sent events: `denoise` frames, then the answer, then [DONE]) or false"


class Strict(BaseModel):
    """Frozen, without silent conversions; unknown keys and non-finite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Limits:
    """The largest values that a request to one model may hold.

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
    max_chars: int | None = None


class ModelRequest(Strict):
    """What every request to a model has."""

    nulls_are_defaults: ClassVar[bool] = False
    """Whether a field that is null is taken for one that is left out, whatever it is."""

    model: str | None = None
    seed: int | None = None

    @classmethod
    def find_malformed_field(cls, fields: Mapping[str, object]) -> str | None:
        """Return the name of a field whose value pydantic should not see: it would describe each part of it."""
        return None


class SamplingRequest(ModelRequest):
    """What every request for samples has, before the bounds of a model."""

    n: int = 1
    steps: int | Literal["exact"] = DEFAULT_STEPS
    top_p: float = 1.0
    top_k: int = 0


_Request = TypeVar("_Request", bound=ModelRequest)


def bounded(base: type[_Request], rules: Mapping[str, Rule]) -> type[_Request]:
    """Return a class of requests with the bounds of a loaded model and their rules filled in."""
    filled: dict[str, Any] = {}
    for name, (value_type, rule, bounds) in rules.items():
        default = base.model_fields[name].default
        filled[name] = (value_type, Field(**{"default": default, "description": rule, **bounds}))
    return create_model(base.__name__, __base__=base, **filled)


def model_rules() -> dict[str, Rule]:
    """Which model, and where its random numbers come from."""
    return {
        "model": (str | None, "the name of a loaded model, or null", {}),
        "seed": (
            int | None,
            "an integer from 0 to 2^64 - 1, or null for one that the server draws",
            {"ge": 0, "le": MAX_SEED},
        ),
    }


def shared_rules(limits: Limits) -> dict[str, Rule]:
    """Which model samples, how many outputs, and from which distribution."""
    return {
        **model_rules(),
        "n": (int, f"an integer from 1 to {limits.max_n}", {"ge": 1, "le": limits.max_n}),
        "steps": (
            Annotated[int, Field(ge=1, le=limits.max_steps)] | Literal["exact"],
            f'an integer from 1 to {limits.max_steps}, or "exact"',
            {"default": min(DEFAULT_STEPS, limits.max_steps)},
        ),
        "top_p": (float, "a number above 0 and at most 1 (off)", {"gt": 0, "le": 1}),
        "top_k": (int, f"an integer from 0 (off) to {limits.vocab_size}", {"ge": 0, "le": limits.vocab_size}),
    }


def find_unknown_key(
    known: Collection[str], keys: Collection[str], place: str, body_only: Collection[str] = ()
) -> str | None:
    """Return the message about the first key that is not known, without repeating it.

    Args:
        known: the keys there are.
        keys: those that were sent, in order.
        place: where they were, such as "the body".
        body_only: keys that a body may have in another place than here; a near miss would be no help for them.
    """
    for number, key in enumerate(keys, 1):
        if key not in known:
            if key in body_only:
                keys_there = ", ".join(known)
                return f"key number {number} of {place} can only be in the body of POST; the keys are {keys_there}"
            close = difflib.get_close_matches(key[:64], known, 1)
            hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(known)}"
            return f"key number {number} of {place} is unknown; {hint}"
    return None


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


class Timings(Strict):
    """Seconds: from the request's arrival to its first denoiser call, from there to its last, and all in all."""

    queue_s: float
    run_s: float
    total_s: float


class ErrorInfo(Strict):
    """What went wrong, and which field of the request is at fault."""

    message: str = Field(description="one sentence for people: which limit, and the remedy")
    type: str = Field(description="the sort of error, by OpenAI's names")
    code: str = Field(description="the error, for programs")
    param: str | None = Field(description="the field or header that is at fault; null if none is")


class ErrorBody(Strict):
    """Every error answer."""

    error: ErrorInfo


class Status(Strict):
    """Answer of /health and /ready."""

    status: str
