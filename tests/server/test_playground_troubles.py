"""What the playground says, in a real browser, when the server refuses, is busy, ends or wants a key."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from server.engine.engine import Engine
from server.http.errors import ApiError
from server.main import http_config
from server.settings import Settings
from tests.server import running as running_module
from tests.server.browser import ENTER, ESCAPE, Browser
from tests.server.playground_page import TEXT, field, opened, run
from tests.server.running import Gate, Running, serving, wait_until


def test_what_the_server_refuses_is_shown_at_its_control(page: Browser) -> None:
    page.fill(field(TEXT, "prompt", "textarea"), "a" * 60)
    page.click(f"{TEXT} form button[type=submit]")
    message = page.wait("document.querySelector('#panel-text .fault:not([hidden])')?.textContent")
    assert "context" in message
    wrong = page.js("[...document.querySelectorAll('.wrong')].map((each) => each.dataset.param)")
    assert wrong == ["max_tokens"]
    assert page.js("document.activeElement.getAttribute('aria-invalid')") == "true"
    page.fill(field(TEXT, "max_tokens"), "65")
    page.click(f"{TEXT} form button[type=submit]")
    problem = page.js(f'document.querySelector("{field(TEXT, "max_tokens", ".problem")}").textContent')
    assert problem == "Must be a whole number from 1 to 64."
    page.fill(field(TEXT, "max_tokens"), "4")
    page.fill(field(TEXT, "seed", "input"), str(2**64))
    page.click(f"{TEXT} form button[type=submit]")
    assert page.js("document.activeElement.closest('[data-param]').dataset.param") == "seed"


def test_a_banner_names_the_field_of_the_form_and_goes_with_its_cause(page: Browser) -> None:
    page.fill(field(TEXT, "prompt", "textarea"), "a" * 65)
    page.click(f"{TEXT} form button[type=submit]")
    message = page.wait(f"document.querySelector('{TEXT} .fault:not([hidden])')?.textContent")
    assert message.startswith("“Begins with” has 65 characters")
    assert message.endswith("; shorten “Begins with”.")
    page.fill(field(TEXT, "prompt", "textarea"), "And")
    page.fill(field(TEXT, "seed", "input"), "abc")
    page.click(f"{TEXT} form button[type=submit]")
    assert page.js("document.activeElement.closest('.wrong').dataset.param") == "seed"
    assert page.js(f"document.querySelector('{TEXT} .fault').hidden")


def test_the_time_that_is_left_is_never_stale(page: Browser, both: Running) -> None:
    """A server that is slower than it foretold, and a request that is stopped."""
    gate, calls = Gate(), itertools.count()

    def stall(lengths: Sequence[int]) -> None:
        if next(calls) == 3:
            gate(lengths)

    both.denoiser.hook = stall
    left = (
        f"[...document.querySelectorAll('{TEXT} .facts dt')].find((each) => each.textContent === 'Left')"
        "?.nextSibling.textContent"
    )
    try:
        page.fill(field(TEXT, "steps"), "30")
        page.click(f"{TEXT} form button[type=submit]")
        assert gate.entered.wait(30)
        page.wait(f"{left} === 'more than foretold'")
        page.press(ESCAPE)
        page.wait(f"document.querySelector('{TEXT} .line').textContent === 'Stopped.'")
        assert page.js(f"{left} === undefined")
        assert page.js(f"document.querySelectorAll('{TEXT} .facts dt').length > 0")
    finally:
        gate.opened.set()
        both.denoiser.hook = None
        wait_until(lambda: both.engine.held_rows == 0)


def test_a_full_queue_counts_down_and_a_server_that_ends_says_so(window: Browser, model_path: Path) -> None:
    with serving(model_path, max_batch_rows=1, max_queue_rows=1, max_n=1) as server:
        page = opened(window, server)
        gate = Gate()
        server.denoiser.hook = gate
        other = threading.Thread(target=lambda: server.post(max_tokens=4))
        other.start()
        assert gate.entered.wait(30)
        page.click(f"{TEXT} form button[type=submit]")
        text = page.wait("document.querySelector('.fault:not([hidden]) .countdown')?.textContent")
        assert "try again in" in text
        assert page.js(f"document.querySelector('{TEXT} form button[type=submit]').disabled")
        gate.opened.set()
        server.denoiser.hook = None
        other.join(30)
        page.wait(f"!document.querySelector('{TEXT} form button[type=submit]').disabled")
        run(page, TEXT)
        server.engine.drain()
        page.click(f"{TEXT} form button[type=submit]")
        fault = page.wait("document.querySelector('.fault:not([hidden])')?.textContent")
        assert "shutting down" in fault
        # At once, though it looks every ten seconds only.
        page.wait("document.getElementById('state').dataset.state === 'draining'", 5)
        page.wait(f"!document.querySelector('{TEXT} form button[type=submit]').disabled")
    page.click(f"{TEXT} form button[type=submit]")
    page.wait("document.querySelector('.fault:not([hidden])')?.textContent.includes('lost')")
    assert page.complaints() == []


class Guard:
    """Asks for a key before everything but the page itself."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        allowed = scope["type"] != "http" or scope["path"].startswith(("/playground/", "/ready"))
        if allowed or scope["path"] == "/" or (b"authorization", b"Bearer sesame") in scope["headers"]:
            await self.app(scope, receive, send)
        else:
            await ApiError(401, "invalid_api_key", "give a key").response()(scope, receive, send)


def test_a_key_is_asked_for_and_kept_for_this_tab_only(
    window: Browser, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guarded(engine: Engine, settings: Settings, *others: object) -> uvicorn.Config:
        config = http_config(engine, settings, *others)  # type: ignore[arg-type]
        config.app = Guard(config.app)  # type: ignore[arg-type]
        return config

    monkeypatch.setattr(running_module, "http_config", guarded)
    with serving(model_path) as server:
        window.open(f"{server.url}/")
        for key in ["wrong", "sesame"]:
            fault = "document.getElementById('key-problem').hidden"
            window.wait(
                f"document.getElementById('key-dialog').open && {fault} === {json.dumps(key == 'wrong')}"
            )
            window.fill("#key", key)
            window.press(ENTER)
        window.wait("document.querySelectorAll('[role=tab]').length > 0")
        run(window, TEXT)
        assert window.js("sessionStorage.getItem('prime-key')") == "sesame"
        assert window.js("document.cookie + JSON.stringify(localStorage)") == "{}"
        window.js("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
        window.click(f"{TEXT} .buttons .quiet")
        copied = window.wait("window.copied")
        assert "$API_KEY" in copied and "sesame" not in copied
        window.js("sessionStorage.clear()")
