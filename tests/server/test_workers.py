"""Work in threads beside the engine's: none delays another kind, and none outlasts its request's time or client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import server.images.images as images
import server.text.generate as text
import server.text.text_stream as text_stream
from server.http.deadline import HEADER
from server.workers import ANSWER_THREADS, PREPARE_THREADS
from tests.server.image_model import NAME as IMAGES
from tests.server.running import NAME, Running, assert_error, serving, wait_until


class Held:
    """Stands in for a function, and holds whoever calls it until it is let go."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner
        self.calls = 0
        self.ended = 0
        self._go = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with self._lock:
            self.calls += 1
        assert self._go.wait(20)
        try:
            return self.inner(*arguments, **options)
        finally:
            with self._lock:
                self.ended += 1

    def let_go(self) -> None:
        self._go.set()


@pytest.fixture
def server(model_path: Path, images_path: Path) -> Iterator[Running]:
    with serving(model_path, images_path) as running:
        yield running


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any, str], Held]]:
    """Replaces a function of a module by one that holds; it is let go at the end in any case."""
    made: list[Held] = []

    def replace(module: Any, name: str) -> Held:
        held = Held(getattr(module, name))
        made.append(held)
        monkeypatch.setattr(module, name, held)
        return held

    yield replace
    for held in made:
        held.let_go()


Hold = Callable[[Any, str], Held]


def post_in_time(server: Running, seconds: str, path: str = "/generate", **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, headers={HEADER: seconds}, timeout=60)


def leave_early(server: Running, **body: object) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/generate", json=body, timeout=httpx.Timeout(60, read=0.3))


def failures(server: Running, reason: str) -> float:
    return server.metric("prime_request_failure_total", reason=reason)


def assert_never_run(server: Running, held: Held) -> None:
    """What was held is let go, and still nothing comes of it."""
    assert server.engine.held_rows == 0
    held.let_go()
    wait_until(lambda: held.ended == held.calls)
    assert server.post(max_tokens=3, steps=2).status_code == 200
    assert all(7 not in lengths for lengths in server.denoiser.lengths)
    assert server.engine.held_rows == 0


def test_a_deadline_holds_while_rows_are_prepared(server: Running, hold: Hold) -> None:
    held = hold(text, "prepare_rows")
    started = time.monotonic()
    assert_error(post_in_time(server, "0.3", max_tokens=7, steps=2), 504, "deadline_exceeded")
    assert 0.3 <= time.monotonic() - started < 10
    assert (held.calls, failures(server, "deadline")) == (1, 1)
    assert_never_run(server, held)


def test_a_client_that_goes_while_rows_are_prepared_frees_their_room(server: Running, hold: Hold) -> None:
    held = hold(text, "prepare_rows")
    leave_early(server, max_tokens=7, steps=2, n=3)
    wait_until(lambda: failures(server, "cancelled") == 1)
    assert held.calls == 1
    assert_never_run(server, held)
    assert failures(server, "cancelled") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_what_waits_for_a_thread_and_is_given_up_is_never_begun(
    server: Running, hold: Hold, stream: bool
) -> None:
    held = hold(text, "prepare_rows")
    with ThreadPoolExecutor(PREPARE_THREADS) as pool:
        busy = [pool.submit(server.post, max_tokens=3, steps=2) for _ in range(PREPARE_THREADS)]
        wait_until(lambda: held.calls == PREPARE_THREADS)
        body = {"max_tokens": 7, "steps": 2, "stream": stream}
        assert_error(post_in_time(server, "0.3", **body), 504, "deadline_exceeded")
        leave_early(server, **body)
        wait_until(lambda: server.engine.held_rows == PREPARE_THREADS)
        held.let_go()
        assert [response.result().status_code for response in busy] == [200] * PREPARE_THREADS
    assert held.calls == PREPARE_THREADS
    assert_never_run(server, held)


def test_images_that_are_prepared_delay_no_text(server: Running, hold: Hold) -> None:
    held = hold(images, "prepare_rows")
    with ThreadPoolExecutor(4) as pool:
        heavy: list[Future[httpx.Response]] = [
            pool.submit(server.client.post, "/images", json={"steps": 2, "n": 2}) for _ in range(4)
        ]
        wait_until(lambda: held.calls == PREPARE_THREADS)
        assert post_in_time(server, "10", max_tokens=3, steps=2).status_code == 200
        body = {"model": IMAGES, "pixels": [[0] * 8] * 8, "label": 0}
        assert_error(post_in_time(server, "0.3", "/score", **body), 504, "deadline_exceeded")
        held.let_go()
        assert [response.result().status_code for response in heavy] == [200] * 4


def test_deadlines_and_clients_are_seen_while_answers_are_made(server: Running, hold: Hold) -> None:
    held = hold(text, "text_response")
    assert_error(post_in_time(server, "0.5", max_tokens=7, steps=2), 504, "deadline_exceeded")
    assert (held.calls, failures(server, "deadline")) == (1, 1)
    leave_early(server, max_tokens=7, steps=2)
    wait_until(lambda: failures(server, "cancelled") == 1)
    assert held.calls == ANSWER_THREADS == 2
    assert server.engine.held_rows == 0
    held.let_go()
    assert server.post(max_tokens=3, steps=2).status_code == 200
    assert server.metric("prime_request_success_total", finished_reason="length", model=NAME) == 1


def test_frames_that_are_made_delay_no_answer(server: Running, hold: Hold) -> None:
    held = hold(text_stream, "text_frames")
    with ThreadPoolExecutor(3) as pool:
        body = {"max_tokens": 8, "steps": 8, "stream": True}
        streams = [pool.submit(server.post, **body) for _ in range(3)]
        wait_until(lambda: held.calls == 1)
        assert post_in_time(server, "10", max_tokens=3, steps=2).status_code == 200
        held.let_go()
        for stream in streams:
            assert stream.result().text.endswith("data: [DONE]\n\n")
