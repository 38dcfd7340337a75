"""The log: one bounded line a record whatever is in it, one line a request, no prompt and no key (fault 17)."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.http.keys import KeyRing, take_environment_keys
from server.logs import MAX_LINE_BYTES, JsonFormatter, TextFormatter, configure_logs
from tests.server.processes import Served
from tests.server.running import Running, assert_error, serving, wait_until

NASTY = [
    "a\r\nb",
    "\x1b[31mred\x1b[0m",
    "x" * 2**20,
    "é\u2028\u2029" * 2**16,
    "\ud800",
    "\x00\x7f\x9b",
    "\u202eabc",
]
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202e\ud800-\udfff]")
KEY = "sk-a-key-that-must-not-be-logged"
PROMPT = "prompt that must not be logged"


def record(
    text: str, *, error: Exception | None = None, fields: dict[str, Any] | None = None
) -> logging.LogRecord:
    made = logging.LogRecord("prime.test", logging.INFO, "file", 1, "said %s", (text,), None)
    if error is not None:
        try:
            raise error
        except type(error) as raised:
            made.exc_info = (type(raised), raised, raised.__traceback__)
    if fields is not None:
        made.fields = fields
    return made


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_fault_17_anything_is_one_escaped_line(text: str) -> None:
    for error in (None, RuntimeError(text)):
        made = record(text, error=error)
        line = JsonFormatter().format(made)
        assert len(line.encode()) <= MAX_LINE_BYTES
        assert not CONTROL.search(line)
        parsed = json.loads(line)
        assert parsed["message"].startswith("said ")
        assert (parsed["level"], parsed["logger"]) == ("info", "prime.test")
        shown = TextFormatter().format(made)
        assert len(shown.encode()) <= MAX_LINE_BYTES
        first, *others = shown.split("\n")
        assert not CONTROL.search(shown.replace("\n", ""))
        assert " INFO prime.test said " in first
        assert all(other.startswith("    ") for other in others)  # a traceback cannot pass for a record
        assert bool(others) == (error is not None)


def test_asyncio_does_not_repeat_that_a_client_has_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging, "root", logging.RootLogger(logging.WARNING))
    configure_logs("info", "text")
    (handler,) = logging.root.handlers
    for name, text in (
        ("asyncio", "socket.send() raised exception."),
        ("asyncio", "another"),
        ("prime", "third"),
    ):
        handler.handle(logging.LogRecord(name, logging.WARNING, "file", 1, text, (), None))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[-1] for line in lines] == ["another", "third"]


def test_short_texts_are_whole_and_the_end_of_a_traceback_is_kept() -> None:
    assert json.loads(JsonFormatter().format(record("é ü")))["message"] == "said é ü"
    line = JsonFormatter().format(record("x", error=RuntimeError("y" * 10_000 + " the end")))
    assert json.loads(line)["exception"].endswith(" the end")


@pytest.fixture
def locked(model_path: Path) -> Iterator[Running]:
    keys = KeyRing(fixed=take_environment_keys({"PRIME_API_KEY": KEY, "PRIME_API_KEYS": f"ops:{KEY}2"}))
    with serving(model_path, keys=keys) as running:
        yield running


def lines_of(caplog: pytest.LogCaptureFixture, count: int) -> list[dict[str, Any]]:
    """The fields of the access lines, of which there must be so many."""
    found: list[dict[str, Any]] = []

    def enough() -> bool:
        found[:] = [vars(record)["fields"] for record in caplog.records if record.name == "prime.access"]
        return len(found) >= count

    wait_until(enough)
    assert len(found) == count
    return found


def test_the_line_of_a_request_says_what_it_cost(locked: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "prime")
    headers = {"authorization": f"Bearer {KEY}2", "x-request-id": "job-7.a_B"}
    body = {"prompt": PROMPT, "max_tokens": 5, "n": 2, "steps": 3, "seed": 1}
    reply = locked.client.post("/generate?secret=1", json=body, headers=headers)
    assert reply.headers["x-request-id"] == reply.json()["id"] == "job-7.a_B"
    (line,) = lines_of(caplog, 1)
    assert {
        name: line[name] for name in ("request_id", "method", "route", "status", "model", "rows", "key")
    } == {
        "request_id": "job-7.a_B",
        "method": "POST",
        "route": "/generate",
        "status": 200,
        "model": "tiny",
        "rows": 2,
        "key": "ops",
    }
    assert line["nfe"] == reply.json()["usage"]["denoiser_calls"]
    assert 0 <= line["queue_s"] <= line["duration_s"] < 60
    assert line["queue_s"] == pytest.approx(
        reply.json()["timings"]["queue_s"], abs=1e-6
    )  # from its arrival on
    text = caplog.records[-1].getMessage()
    assert re.fullmatch(
        r"job-7\.a_B POST /generate 200 [0-9.]+ ms key=ops model=tiny rows=2 nfe=\d+ queue_s=[0-9.e-]+", text
    )


def test_nothing_of_a_client_but_a_plain_id_is_logged(
    locked: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpcore").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    ids = ["", "a b", "a" * 65, "-a", "é", "a\x1b[31m", 'a"b', "../x", "a:b"]
    for number, given in enumerate(ids):
        headers = [("authorization", f"Bearer {KEY}"), ("x-request-id", given.encode("latin-1"))]
        reply = locked.client.request("GET", f"/{PROMPT}{number}?{PROMPT}", headers=headers)  # type: ignore[arg-type]
        assert_error(reply, 404, "not_found")  # and with an id of ours
    twice = [("authorization", f"Bearer {KEY}"), ("x-request-id", "a"), ("x-request-id", "b")]
    assert_error(locked.client.get("/nope", headers=twice), 404, "not_found")
    assert_error(
        locked.client.get("/nope", headers={"authorization": f"Bearer {KEY}x"}), 401, "invalid_api_key"
    )
    key = {"authorization": f"Bearer {KEY}"}
    locked.client.post("/generate", json={"model": PROMPT, "prompt": PROMPT}, headers=key)
    locked.client.post("/generate", json={"prompt": PROMPT, "seed": PROMPT}, headers=key)
    locked.client.post("/generate", json={"prompt": PROMPT * 40}, headers=key)
    # An exception whose text is the prompt.
    monkeypatch.setattr("server.text.generate.prepare_text", lambda *_: {}[PROMPT])
    reply = locked.client.post("/generate", json={"prompt": PROMPT}, headers=key)
    assert_error(reply, 500, "internal_error")
    wait_until(
        lambda: len([record for record in caplog.records if record.name == "prime.access"]) == len(ids) + 6
    )
    lines = [vars(record)["fields"] for record in caplog.records if record.name == "prime.access"]
    assert {line["route"] for line in lines} == {"other", "/generate"}
    logged = "\n".join(TextFormatter().format(each) + JsonFormatter().format(each) for each in caplog.records)
    assert "must" not in logged
    assert "unexpected KeyError at test_logs.py" in logged


def test_json_is_one_object_a_line_from_start_to_end(model_path: Path) -> None:
    flags = ["--model", str(model_path), "--log-format", "json"]
    with Served(*flags, faults=[{"fault": "raise"}], environment={"PRIME_API_KEY": KEY}) as served:
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=served.url, headers=headers, timeout=60) as client:
            assert client.post("/generate", json={"prompt": PROMPT}).status_code == 500  # with a traceback
            assert client.post("/generate", json={"prompt": PROMPT, "max_tokens": 3}).status_code == 200
        served.popen.terminate()
        assert served.wait() == 0
        lines = [json.loads(line) for line in served.log.splitlines()]
        assert {"time", "level", "logger"} <= set.intersection(*map(set, lines))
        assert [line["status"] for line in lines if line["logger"] == "prime.access"] == [500, 200]
        assert any("exception" in line for line in lines)
        assert lines[-1]["message"] == "drained"
        assert KEY not in served.log
        assert PROMPT not in served.log
