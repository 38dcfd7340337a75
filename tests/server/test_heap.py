"""The garbage collector does not look at what stays: not while requests are parsed, and again after a reload."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import server.lifetime as lifetime
import server.reload as reload
from server.heap import settle
from server.http.keys import KeyRing
from server.lifetime import Server, serve
from server.main import http_config
from server.reload import Reloader
from server.settings import Settings
from tests.server.running import make_engine


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


class Knot:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


def test_what_is_alive_is_looked_at_no_more_and_garbage_is_found_later() -> None:
    knot = Knot()
    settle()
    assert gc.get_freeze_count() > 100_000
    assert len(gc.get_objects()) < 1000
    gone = weakref.ref(knot)
    del knot
    gc.collect()
    assert gone() is not None
    settle()
    assert gone() is None


def test_a_server_settles_before_it_says_that_it_is_ready(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(model=model_path)
    engine, _ = make_engine(settings)
    server = Server(http_config(engine, settings), engine, drain_timeout_s=1.0)
    happened: list[str] = []

    def announce(banner: str) -> None:
        happened.append(banner)
        server.should_exit = True

    monkeypatch.setattr(lifetime, "settle", lambda: happened.append("settled"))
    monkeypatch.setattr(lifetime, "_announce", announce)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        asyncio.run(asyncio.wait_for(serve(server, listener, "ready", Reloader(KeyRing())), 60))
    assert happened == ["settled", "ready"]


def test_a_reload_settles_again(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-0123456789abcdef")
    engine, _ = make_engine(Settings(model=model_path))
    happened: list[Any] = []
    monkeypatch.setattr(reload, "settle", lambda: happened.append("settled"))
    monkeypatch.setattr(reload, "reload_model", lambda engine, name, load: happened.append(name))

    async def ask() -> None:
        reloader = Reloader(KeyRing(file), engine, lambda name: pytest.fail("it was read"))
        running = asyncio.create_task(reloader.run())
        await asyncio.sleep(1.5)  # keys are looked at once a second, and that is no reason
        assert not happened
        reloader.ask()
        async with asyncio.timeout(20):
            while len(happened) < 2:
                await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(ask())
    assert happened == ["tiny", "settled"]
