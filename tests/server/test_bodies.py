"""Large bodies, and many of them, through real sockets: nobody waits for them, and they take only their room."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

import server.http.body as body_module
from tests.server.running import Running, assert_error


def post(server: Running, content: bytes) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return httpx.post(f"{server.url}/generate", content=content, headers=headers, timeout=60)


def padded(num_bytes: int) -> bytes:
    return json.dumps({"max_tokens": 3, "steps": 2, "seed": 1}).encode().ljust(num_bytes)


def test_nobody_waits_while_a_large_body_is_parsed(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go, parse = threading.Event(), threading.Event(), body_module.parse_json

    def held_parse(body: bytearray) -> object:
        if len(body) > 2**16:
            entered.set()
            assert go.wait(20)
        return parse(body)

    monkeypatch.setattr(body_module, "parse_json", held_parse)
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(post, server, padded(2**16 + 1))
        try:
            assert entered.wait(20)
            assert httpx.get(f"{server.url}/health", timeout=5).status_code == 200
            small = post(server, padded(2**16))
        finally:
            go.set()
        assert small.json()["outputs"] == large.result().json()["outputs"]


def test_what_is_wrong_in_a_large_body_is_told(server: Running) -> None:
    assert_error(post(server, b"[" * 2**17), 400, "invalid_json")
    assert_error(post(server, b'{"n": 1, "n": 2}'.ljust(2**17)), 422, "duplicate_key")
    assert_error(post(server, b'{"prompt": "' + b"a" * 2**17 + b'"}'), 422, "invalid_value", "prompt")
