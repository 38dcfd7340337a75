"""POST /generate: what a request and an answer hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, create_model

from prime_core.sampling.curves import MAX_TEMPERATURE
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

MAX_STOPS = 8
MAX_STOP_CHARS = 256
MAX_TEMPLATE_PARTS = 1024

StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]


class Gap(Strict):
    """Part of a template: tokens for the model to write."""

    gap: int = Field(ge=1)


class GenerateRequest(SamplingRequest):
    """Body of POST /generate, before the bounds of `text_request`."""

    prompt: str | list[int] | None = None
    suffix: str | None = None
    template: list[str | Gap] | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    stop: str | list[StopString] = Field(default=[])
    stream: bool = False

    @classmethod
    def find_malformed_field(cls, fields: Mapping[str, object]) -> str | None:
        """Return a field with objects of other keys than "gap", or items that are no texts: they may be many."""
        template, stop = fields.get("template"), fields.get("stop")
        if isinstance(stop, list) and not set(map(type, stop)) <= {str}:
            return "stop"
        parts = template if isinstance(template, list) else []
        malformed = any(isinstance(part, dict) and part.keys() != {"gap"} for part in parts)
        return "template" if malformed else None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


def text_request(limits: Limits) -> type[GenerateRequest]:
    """Return `GenerateRequest` with the bounds of a loaded model and their rules filled in."""
    rules = {**shared_rules(limits), **layout_rules(limits), **drawing_rules()}
    return bounded(GenerateRequest, rules)


def layout_rules(limits: Limits) -> dict[str, Rule]:
    """Where the model writes: the fixed text and the gaps."""
    context, top_token = limits.context, limits.vocab_size - 1
    token_id = Annotated[int, Field(ge=0, le=top_token)]
    gap: Any = create_model("Gap", __base__=Gap, gap=(int, Field(ge=1, le=context)))
    return {
        "prompt": (
            str | Annotated[list[token_id], Field(min_length=1, max_length=context)] | None,
            f"Unicode text, or a list of 1 to {context} token ids from 0 to {top_token}, or null",
            {},
        ),
        "suffix": (str | None, "Unicode text; null or empty for none", {}),
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


def drawing_rules() -> dict[str, Rule]:
    """How text is drawn, and where it ends."""
    return {
        "temperature": (
            float,
            f"a finite number from 0 (greedy) to {MAX_TEMPERATURE:g}",
            {"ge": 0, "le": MAX_TEMPERATURE},
        ),
        "stop": (
            StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)],
            f"a string of 1 to {MAX_STOP_CHARS} characters, or a list of at most {MAX_STOPS} of them",
            {},
        ),
        "stream": (bool, STREAM_RULE, {}),
    }


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
    steps_skipped: int = Field(
        description="steps of the grid that would have changed nothing, and so cost no denoiser call"
    )


class Usage(Strict):
    """Tokens of a request: a prompt counts once, generated tokens over all outputs."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    denoiser_calls: int = Field(description="sum of nfe over the outputs")


class GenerateResponse(Strict):
    """Answer of POST /generate."""

    id: str
    model: str
    outputs: list[Output]
    usage: Usage
    timings: Timings
