"""What requests in OpenAI's shapes share: null stands for the default, and some fields may only say "off".

Clients in many languages send null for what was not set, so null means the default in every field. A field that
cannot be honoured takes nothing but the values that ask for nothing; its rule says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from server.schemas.base import Rule, Strict

Zero = Annotated[float, Field(ge=0, le=0)]

NO_USER: Rule = (None, "null or left out: this server keeps no account of its clients' end users", {})


class Nothing(Strict):
    """An object without keys."""


def or_null(rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """Return the rules of fields that also take null for their default (see `without_nulls`)."""
    return {
        name: (_or_none(value_type), rule if "null" in rule else f"{rule}, or null for the default", bounds)
        for name, (value_type, rule, bounds) in rules.items()
    }


def _or_none(value_type: Any) -> Any:
    return None if value_type is None else value_type | None


def without_nulls(fields: Mapping[str, object]) -> dict[str, Any]:
    """Return the fields of a request that are set to something."""
    return {name: value for name, value in fields.items() if value is not None}
