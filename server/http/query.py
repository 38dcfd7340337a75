"""The query of an address as the fields of a request: strict, and without repeating what was sent."""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import parse_qsl

from server.http.errors import ApiError
from server.http.json_text import parse_json
from server.schemas.base import find_unknown_key

MAX_FIELDS = 64
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")


def read_query(
    query: bytes, names: Collection[str], text_fields: Collection[str], body_only: Collection[str] = ()
) -> dict[str, object]:
    """Return the fields of a query.

    A value that is written like a JSON number becomes one, under the same bounds as in a body (see `parse_json`);
    others stay text, for the schema to judge.

    Args:
        query: the query as it was sent.
        names: of the fields there are.
        text_fields: fields whose values always stay text.
        body_only: fields that only the body of a POST can hold, for the message.

    Raises:
        ApiError: 422 for what is no query, and for an unknown or repeated field.
    """
    if not query:
        return {}
    try:
        pairs = parse_qsl(
            query.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=MAX_FIELDS,
        )
    except ValueError:
        message = f"the query must be fields written name=value in UTF-8 and joined by &, at most {MAX_FIELDS} of them"
        raise ApiError(422, "invalid_query", message) from None
    message_of_unknown = find_unknown_key(names, [name for name, _ in pairs], "the query", body_only)
    if message_of_unknown is not None:
        raise ApiError(422, "unknown_key", message_of_unknown)
    fields = {name: value if name in text_fields else _value(value) for name, value in pairs}
    if len(fields) < len(pairs):
        raise ApiError(422, "duplicate_key", "a field of the query is repeated; give each once")
    return fields


def _value(text: str) -> object:
    return parse_json(text.encode()) if _NUMBER.fullmatch(text) else text
