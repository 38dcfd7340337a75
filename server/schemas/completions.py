"""POST /v1/completions: what a request and an answer hold, in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from server.schemas.base import Limits, Rule, SamplingRequest, Strict, bounded, shared_rules
from server.schemas.openai import NO_USER, Nothing, Zero, or_null
from server.schemas.text import StopString, drawing_rules, layout_rules

DEFAULT_MAX_TOKENS = 16

Prompt = str | list[int]


class StreamOptions(Strict):
    """How a stream ends."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class CompletionRequest(SamplingRequest):
    """Body of POST /v1/completions, before the bounds of `completion_request`; null stands for the default."""

    nulls_are_defaults = True

    prompt: Prompt | list[str] | list[list[int]] = ""
    suffix: str | None = None
    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 1.0
    stop: str | list[StopString] = Field(default=[])
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    best_of: int = 1
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Nothing = Nothing()
    logprobs: None = None
    user: None = None

    @classmethod
    def find_malformed_field(cls, fields: Mapping[str, object]) -> str | None:
        """Return the name of a field with keys it may not have, or items of types it may not hold: they may be many."""
        objects: dict[str, type[Strict]] = {"stream_options": StreamOptions, "logit_bias": Nothing}
        for name, schema in objects.items():
            value = fields.get(name)
            if isinstance(value, dict) and not value.keys() <= schema.model_fields.keys():
                return name
        prompt, stop = fields.get("prompt"), fields.get("stop")
        if isinstance(prompt, list) and not _is_one_kind_of_prompt(prompt):
            return "prompt"
        return "stop" if isinstance(stop, list) and not set(map(type, stop)) <= {str} else None

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts in order, each with n outputs."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        several: list[Prompt] = [prompt for prompt in self.prompt if not isinstance(prompt, int)]
        return several or [[token for token in self.prompt if isinstance(token, int)]]

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def num_outputs(self) -> int:
        """Choices of the answer."""
        return self.n * len(self.prompts)


def _is_one_kind_of_prompt(items: Sequence[object]) -> bool:
    """Whether all items are texts, all token ids, or all lists of token ids."""
    if all(isinstance(item, list) for item in items):
        return all(type(token) is int for tokens in items if isinstance(tokens, list) for token in tokens)
    return set(map(type, items)) in ({str}, {int})


def completion_request(limits: Limits) -> type[CompletionRequest]:
    """Return `CompletionRequest` with the bounds of a loaded model and their rules filled in."""
    text = layout_rules(limits)
    n, n_rule, n_bounds = shared_rules(limits)["n"]
    rules = {
        **shared_rules(limits),
        "n": (
            n,
            f"{n_rule}, or null for 1: outputs of each prompt; n times the number of prompts has the same limit",
            n_bounds,
        ),
        "prompt": _prompt_rule(limits),
        "suffix": text["suffix"],
        "max_tokens": (
            int,
            f"an integer from 1 to {limits.context} (the context, which the prompt shares)",
            {"ge": 1, "le": limits.context, "default": min(DEFAULT_MAX_TOKENS, limits.context)},
        ),
        "temperature": drawing_rules()["temperature"],
        "stop": drawing_rules()["stop"],
        "echo": (bool, "true or false; true puts the prompt before the text", {}),
        **_stream_rules(),
        **_off_rules(),
    }
    return bounded(CompletionRequest, or_null(rules))


def _prompt_rule(limits: Limits) -> Rule:
    token_id = Annotated[int, Field(ge=0, le=limits.vocab_size - 1)]
    tokens: Any = Annotated[list[token_id], Field(min_length=1, max_length=limits.context)]
    several = Field(min_length=1, max_length=limits.max_n)
    types: Any = str | tokens | Annotated[list[str], several] | Annotated[list[tokens], several]
    return (
        types,
        f"Unicode text, or a list of 1 to {limits.context} token ids from 0 to {limits.vocab_size - 1}, or a list of "
        f"1 to {limits.max_n} such texts or lists, or null for none",
        {},
    )


def _stream_rules() -> dict[str, Rule]:
    return {
        "stream": (
            bool,
            "true or false; true sends server-sent events: chunks of the answer with text as it is settled from left "
            "to right, then [DONE]",
            {},
        ),
        "stream_options": (
            StreamOptions,
            'with stream, {"include_usage": true or false}; "include_obfuscation" must be false or left out: chunks '
            "are not padded; else null",
            {},
        ),
    }


def _off_rules() -> dict[str, Rule]:
    """Fields of OpenAI's that a diffusion sampler, or this server, cannot honour."""
    any_order = "tokens are uncovered in any order, not after those on their left"
    return {
        "best_of": (
            int,
            "1 (off) or null: outputs are not ranked; ask for them all with n",
            {"ge": 1, "le": 1},
        ),
        "frequency_penalty": (Zero, f"0 (off) or null: {any_order}", {}),
        "presence_penalty": (Zero, f"0 (off) or null: {any_order}", {}),
        "logit_bias": (Nothing, "{} (off) or null: logits are drawn from as the model gives them", {}),
        "logprobs": (None, f"null: {any_order}, so they have no such probabilities", {}),
        "user": NO_USER,
    }


class CompletionChoice(Strict):
    """One output."""

    index: int = Field(description="number of the output: n of the first prompt come first")
    text: str = Field(
        description="the generated text; with echo the prompt before it; in a stream, what is new"
    )
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = Field(
        description="stop: an end or a stop string was met; null in a stream before the output's last chunk"
    )


class CompletionUsage(Strict):
    """Tokens: each prompt counts once, with the suffix; generated tokens over all outputs."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChunk(Strict):
    """One piece of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(description="Unix time of the request in seconds")
    model: str
    choices: list[CompletionChoice]


class CompletionChunkWithUsage(CompletionChunk):
    """One piece of a stream that ends in its usage."""

    usage: CompletionUsage | None


class Completion(CompletionChunk):
    """Answer of POST /v1/completions."""

    usage: CompletionUsage
