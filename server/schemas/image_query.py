"""GET /images: the fields that an address can hold, in words that are true of an address: no objects, no null."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from kernels.noise import MAX_SEED
from prime_core.sampling.curves import MAX_TEMPERATURE
from prime_core.sampling.presets import PRESETS
from server.schemas.base import Rule, bounded
from server.schemas.images import ImagesRequest, name_type, shown_names

QUERY_FIELDS = ("n", "steps", "temperature", "top_p", "seed", "label", "model", "preset")


def image_query(
    request_type: type[ImagesRequest], num_labels: int, label_names: Sequence[str]
) -> type[ImagesRequest]:
    """Return a class of requests to a model with the rules of GET in the place of those of POST.

    Args:
        request_type: of POST, with the bounds of the model; fields that an address cannot hold stay as they are there.
        num_labels: labels that can be chosen; 0 for a model without.
        label_names: their names; may be empty.
    """
    preset: Any = Literal[tuple(PRESETS)]
    rules: dict[str, Rule] = {
        "model": (str, "the name of a loaded model; without it, the first image model answers", {}),
        "temperature": (
            Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)],
            f"a finite number from 0 (greedy) to {MAX_TEMPERATURE:g}; POST /images also takes a curve",
            {},
        ),
        "seed": (
            int,
            "an integer from 0 to 2^64 - 1; without it, the server draws one",
            {"ge": 0, "le": MAX_SEED},
        ),
        "label": _label_rule(num_labels, label_names),
        "preset": (
            preset,
            "the name of published settings, which fields that are given replace; /info tells what is published of "
            f"each, and its FID: {', '.join(PRESETS)}",
            {},
        ),
    }
    return bounded(request_type, rules)


def _label_rule(num_labels: int, names: Sequence[str]) -> Rule:
    if not num_labels:
        return (None, "left out: this model has no labels to choose from", {})
    number: Any = Annotated[int, Field(ge=0, le=num_labels - 1)]
    end = "; without it, one is drawn for every image"
    if not names:
        return (number, f"an integer from 0 to {num_labels - 1}{end}", {})
    text = f"an integer from 0 to {num_labels - 1}, or one of the names {shown_names(names)}"
    return (number | name_type(names), f"{text}{end}", {})
