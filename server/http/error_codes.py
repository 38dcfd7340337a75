"""Every code of an error answer, with its status and what it means: for /openapi.json and /docs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

Group = Literal["outside", "any", "body", "query", "fields", "model", "sampling"]
"""Where a code can come from: outside any route, any route, its JSON body, its query, the fields of either, the name of
a model, the engine."""


class ErrorCode(NamedTuple):
    """One way in which a request can fail.

    Attributes:
        status: of the answer.
        code: the field `code` of its body.
        group: where it can come from.
        meaning: in words, with the remedy where there is one.
    """

    status: int
    code: str
    group: Group
    meaning: str


ERROR_CODES = (
    ErrorCode(400, "invalid_http", "outside", "this is not HTTP/1.1, or its head is too large"),
    ErrorCode(400, "ambiguous_length", "body", "Content-Length and Transfer-Encoding together"),
    ErrorCode(400, "invalid_utf8", "body", "the body is not UTF-8"),
    ErrorCode(400, "invalid_json", "body", "the body is not JSON, or is nested too deeply"),
    ErrorCode(401, "invalid_api_key", "any", "no API key, or one that is not accepted"),
    ErrorCode(403, "unknown_host", "any", "the server does not go by this name; see --allowed-hosts"),
    ErrorCode(403, "cross_site", "any", "a page of another site has caused this request, which is work"),
    ErrorCode(404, "not_found", "outside", "there is no such route"),
    ErrorCode(404, "model_not_found", "model", "no model of this name is loaded, or none of this kind"),
    ErrorCode(405, "method_not_allowed", "outside", "the route does not take this method; Allow lists them"),
    ErrorCode(408, "receive_timeout", "body", "the body did not arrive in time"),
    ErrorCode(413, "body_too_large", "body", "the body is over the limit"),
    ErrorCode(415, "unsupported_media_type", "body", "the body is not declared as application/json in UTF-8"),
    ErrorCode(415, "unsupported_encoding", "body", "the body is compressed"),
    ErrorCode(422, "invalid_body", "body", "the body is JSON, but no object"),
    ErrorCode(422, "invalid_query", "query", "the query is not fields name=value in UTF-8, or too many"),
    ErrorCode(422, "unknown_key", "fields", "there is no such field"),
    ErrorCode(422, "duplicate_key", "fields", "a field is there twice"),
    ErrorCode(422, "invalid_value", "fields", "a value breaks a rule; the message holds the rule"),
    ErrorCode(422, "wrong_route", "fields", "the model is of another kind; the message names its routes"),
    ErrorCode(422, "invalid_header", "sampling", "X-Request-Timeout is no number in its range"),
    ErrorCode(
        422, "request_too_large", "sampling", "its plan is larger than the queue; the message names fields"
    ),
    ErrorCode(
        429, "server_busy", "any", "all connections are at work, or too many large bodies on their way"
    ),
    ErrorCode(429, "queue_full", "sampling", "the queue is full; try again after Retry-After seconds"),
    ErrorCode(431, "headers_too_large", "any", "the head of the request is over the limit"),
    ErrorCode(500, "non_finite", "sampling", "the model gave no finite probabilities for this request"),
    ErrorCode(500, "engine_error", "sampling", "the denoiser failed in a call of this request; try again"),
    ErrorCode(500, "internal_error", "any", "a failure that nobody expected; the log has it under the id"),
    ErrorCode(503, "draining", "sampling", "the server is shutting down; send it to another instance"),
    ErrorCode(503, "unavailable", "sampling", "the engine has stopped; send it to another instance"),
    ErrorCode(503, "model_failed", "sampling", "this model is out of service; send it to another instance"),
    ErrorCode(503, "out_of_memory", "sampling", "the request does not fit in the memory that is free"),
    ErrorCode(504, "deadline_unreachable", "sampling", "its denoiser calls take longer than its time"),
    ErrorCode(504, "deadline_exceeded", "sampling", "it was not finished in time, in the queue or in work"),
)


def codes_of(groups: Collection[Group]) -> dict[int, list[ErrorCode]]:
    """Return the codes of some groups by their status, both in order."""
    found: dict[int, list[ErrorCode]] = {}
    for each in ERROR_CODES:
        if each.group in groups:
            found.setdefault(each.status, []).append(each)
    return found
