"""What surrounds every request: its id, its line in the log, the bound of its head, and unexpected failures."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from server.http.access import MAX_HEADER_BYTES, AccessMiddleware, HalfAnswerError
from server.http.errors import ApiError
from server.metrics import Metrics
from tests.server.running import Running, assert_error, wait_until


def test_an_unexpected_failure_has_an_id_that_its_log_names(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(server.engine.metrics, "render", lambda: 1 / 0)
    response = server.client.get("/metrics")
    assert_error(response, 500, "internal_error")
    assert len(response.headers.get_list("x-request-id")) == 1
    request_id = response.headers["x-request-id"]
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.name for record in errors] == ["prime.server"]
    assert request_id in errors[0].getMessage()
    # The line is written after the answer.
    wait_until(lambda: any(record.name == "prime.access" for record in caplog.records))
    assert "ZeroDivisionError" in caplog.text
    access = [record.getMessage() for record in caplog.records if record.name == "prime.access"]
    assert access[-1].startswith(f"{request_id} GET /metrics 500 ")
    assert server.client.get("/health").status_code == 200


async def _gone() -> Message:
    return {"type": "http.disconnect"}


async def _unused(*arguments: Any) -> Any:
    raise AssertionError("not to be called")


def _run(app: Any, metrics: Metrics | None = None, **scope: Any) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    filled = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "headers": [],
        **scope,
    }
    try:
        metrics = Metrics() if metrics is None else metrics
        asyncio.run(AccessMiddleware(app, metrics.http, ["/"])(filled, _gone, send))
    except HalfAnswerError:
        sent.append({"type": "raised"})
    return sent


def test_a_failure_after_half_an_answer_is_not_answered_again() -> None:
    async def fail_late(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError

    assert [message["type"] for message in _run(fail_late)] == ["http.response.start", "raised"]


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("whole", 200),
        ("cut", 499),
        ("left", 499),
        ("unchanged", 499),
        ("failed", 500),
        ("refused", 404),
        ("silent", 0),
    ],
)
def test_the_status_of_an_answer_tells_whether_its_end_was_sent(
    ending: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "prime.access")

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if ending == "silent":
            return
        status_sent = {"refused": 404, "unchanged": 304}.get(ending, 200)
        await send({"type": "http.response.start", "status": status_sent, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        if ending in ("left", "unchanged", "refused"):
            await receive()
        if ending == "failed":
            raise ZeroDivisionError
        if ending != "cut":
            await send({"type": "http.response.body", "body": b""})
        await receive()  # as a client that goes after the end

    _run(answer)
    assert [record.fields["status"] for record in caplog.records if record.name == "prime.access"] == [status]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "head",
    [
        {"query_string": b"a" * (MAX_HEADER_BYTES + 1)},
        {"raw_path": b"/" * (MAX_HEADER_BYTES + 1)},
        {"headers": [(b"a", b"b" * (MAX_HEADER_BYTES + 1))]},
        {"headers": [(b"a" * (MAX_HEADER_BYTES + 1), b"b")]},
        {"headers": [(b"", b"")] * (MAX_HEADER_BYTES // 4)},
    ],
)
def test_no_part_of_the_head_escapes_its_bound(head: dict[str, Any]) -> None:
    start, _ = _run(_unused, **head)
    assert start["status"] == 431
    assert (b"connection", b"close") in start[
        "headers"
    ]  # whoever sends so much is not listened to any longer


async def _answer(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_a_head_may_be_as_large_as_its_bound() -> None:
    assert _run(_answer, query_string=b"a" * (MAX_HEADER_BYTES - 1))[0]["status"] == 200


def test_the_line_and_the_metrics_tell_the_time_in_the_same_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "prime.access")
    times_s = iter([100.0, 102.5])
    monkeypatch.setattr("server.http.access.time", SimpleNamespace(monotonic=lambda: next(times_s)))
    metrics = Metrics()
    _run(_answer, metrics)
    (record,) = caplog.records
    assert record.fields["duration_s"] == 2.5  # type: ignore[attr-defined]
    assert record.getMessage().endswith(" GET / 200 2500.0 ms")
    name, labels = "prime_http_request_duration_seconds_sum", {"route": "/"}
    assert metrics.registry.get_sample_value(name, labels) == 2.5


def test_a_method_in_small_letters_is_another_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "prime.access")
    _run(_answer, method="get")
    (record,) = caplog.records
    assert record.getMessage().split()[1:4] == ["other", "/", "200"]


@pytest.mark.parametrize(("given", "kept"), [("a" * 64, True), ("a" * 65, False)])
def test_the_id_of_a_client_may_have_64_characters(server: Running, given: str, kept: bool) -> None:
    answer = server.client.get("/health", headers={"X-Request-Id": given})
    assert (answer.headers["x-request-id"] == given) == kept


def test_a_long_message_is_cut() -> None:
    error = ApiError(422, "invalid_value", "a" * 1999 + "bc")
    assert error.body().error.message == "a" * 1999 + "b"
