"""What surrounds every request: its id, its line in the log, the bound of its head, and unexpected failures."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from server.http.access import MAX_HEADER_BYTES, AccessMiddleware, HalfAnswerError
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


def _run(app: Any, **scope: Any) -> list[Message]:
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
        asyncio.run(AccessMiddleware(app, Metrics().http, ["/"])(filled, _gone, send))
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
    [("whole", 200), ("cut", 499), ("left", 499), ("failed", 500), ("refused", 404), ("silent", 0)],
)
def test_the_status_of_an_answer_tells_whether_its_end_was_sent(
    ending: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "prime.access")

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if ending == "silent":
            return
        status_sent = 404 if ending == "refused" else 200
        await send({"type": "http.response.start", "status": status_sent, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        if ending in ("left", "refused"):
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
    assert _run(_unused, **head)[0]["status"] == 431
