"""Streams through real sockets: frames retell the sampling exactly, and no reader can hold anybody up."""

from __future__ import annotations

import base64
import io
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import server.text.text_stream as text_stream
from prime_core.checkpoint import load_checkpoint
from prime_core.sampling.provisional import UNKNOWN
from server.engine.feed import Changes, RowChange
from server.images.generation_stream import PartialPictures
from server.images.image_stream import Pictures
from tests.server.image_model import LENGTH, SIDE
from tests.server.running import (
    CONTEXT,
    Gate,
    Running,
    assert_error,
    serving,
    wait_until,
    write_without_tokenizer,
)

Frame = tuple[str | None, Any]


def frames_of(lines: Iterator[str]) -> list[Frame]:
    """(event, JSON) of every frame; a stream must end with [DONE]."""
    frames: list[Frame] = []
    event = None
    for line in lines:
        if line.startswith("event: "):
            event = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
            frames.append((event, data if data == "[DONE]" else json.loads(data)))
            event = None
        else:
            assert line == ""
    assert frames[-1] == (None, "[DONE]")
    return frames[:-1]


def stream(server: Running, path: str, **body: object) -> list[Frame]:
    with server.client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-accel-buffering"] == "no"  # nginx would collect the frames
        return frames_of(response.iter_lines())


def retold(frames: list[Frame], num_outputs: int, length: int, num_digits: int) -> list[list[list[Any]]]:
    """Digits of every output after all frames, from nothing known."""
    state: list[list[list[Any]]] = [[[None] * num_digits for _ in range(length)] for _ in range(num_outputs)]
    for event, frame in frames:
        if event == "denoise":
            for position, digits in zip(frame["positions"], frame["digits"], strict=True):
                state[frame["output"]][position] = digits
    return state


def test_text_frames_retell_the_answer(server: Running) -> None:
    body: dict[str, Any] = {"max_tokens": 20, "steps": 40, "n": 2, "seed": 3}
    frames = stream(server, "/generate", **body)
    *before, (event, answer) = frames
    assert event is None
    assert {event for event, _ in before} == {"denoise"}
    plain = server.post(**body).json()
    assert answer["outputs"] == plain["outputs"]
    assert answer["usage"] == plain["usage"]
    assert answer["id"].startswith("req-")

    final = retold(frames, 2, 20, 2)
    for output, row in zip(answer["outputs"], final, strict=True):
        tokens = [high * 17 + low for high, low in row]
        assert tokens[: len(output["token_ids"])] == output["token_ids"]
    progress = [frame["progress"] for _, frame in before]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    for _, frame in before:
        assert len(frame["positions"]) == len(frame["pieces"]) == len(frame["revealed"]) > 0
        for digits, piece, share in zip(frame["digits"], frame["pieces"], frame["revealed"], strict=True):
            assert share == sum(digit is not None for digit in digits) / 2
            assert (piece is None) == (share < 1)
    last = {frame["output"]: frame for _, frame in before}
    for number, output in enumerate(answer["outputs"]):
        assert last[number]["nfe"] == output["nfe"]
        assert UNKNOWN not in last[number]["text"]
        if output["finish_reason"] == "length":
            assert last[number]["text"] == output["text"]


def test_progress_and_eta_are_those_of_the_plan(server: Running) -> None:
    server.denoiser.hook = lambda lengths: time.sleep(0.06)  # so that no frame is merged with the next
    try:
        frames = [
            frame for event, frame in stream(server, "/generate", max_tokens=8, steps=12, seed=1) if event
        ]
    finally:
        server.denoiser.hook = None
    nfe = frames[-1]["nfe"]
    assert [frame["progress"] for frame in frames] == [(k + 1) / nfe for k in range(nfe)]
    assert [frame["nfe"] for frame in frames] == list(range(1, nfe + 1))
    assert frames[-1]["eta_s"] == 0
    for frame in frames[1:]:
        assert frame["eta_s"] >= 0.06 * (nfe - frame["nfe"])


def test_a_stream_rests_a_fiftieth_of_a_second_after_each_frame(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[tuple[float, float]] = []
    make = text_stream.text_frames

    def timed(*arguments: Any) -> Any:
        began = time.monotonic()
        frames = make(*arguments)
        times.append((began, time.monotonic()))
        return frames

    monkeypatch.setattr(text_stream, "text_frames", timed)
    frames = stream(server, "/generate", max_tokens=CONTEXT, steps="exact", seed=1)
    assert frames[-2][1]["progress"] == 1
    *rests, _ = [
        later[0] - earlier[1] for earlier, later in itertools.pairwise(times)
    ]  # the end is not waited for
    assert min(rests) > 0.0199


def test_known_text_is_in_the_frames_from_the_start(server: Running) -> None:
    frames = stream(server, "/generate", prompt="ab", suffix="yz", max_tokens=6, steps=6, seed=2)
    for event, frame in frames[:-1]:
        assert event == "denoise"
        assert frame["text"].startswith("ab")
        assert frame["text"].endswith("yz")
        assert set(frame["positions"]) <= set(range(2, 8))


def test_the_first_frame_of_every_output_tells_where_its_gaps_are(server: Running) -> None:
    template = ["ab", {"gap": 3}, "c", {"gap": 2}]
    server.denoiser.hook = lambda lengths: time.sleep(
        0.03
    )  # or all calls are over before a second frame is made
    try:
        frames = [
            frame for event, frame in stream(server, "/generate", template=template, n=2, seed=2) if event
        ]
    finally:
        server.denoiser.hook = None
    for output in range(2):
        first, *later = [frame["gaps"] for frame in frames if frame["output"] == output]
        assert first == [[2, 5], [6, 8]]
        assert later and not any(later)


def test_frames_of_tokens_without_text_hold_digits_alone(model_path: Path, tmp_path: Path) -> None:
    with serving(write_without_tokenizer(model_path, tmp_path)) as server:
        *frames, (event, answer) = stream(server, "/generate", max_tokens=8, steps=12, seed=1)
    assert event is None
    (output,) = answer["outputs"]
    assert output["text"] is None
    for _, frame in frames:
        assert frame["text"] == ""
        assert frame["pieces"] == [None] * len(frame["positions"])
        assert frame["revealed"] == [sum(d is not None for d in digits) / 2 for digits in frame["digits"]]
    (final,) = retold(frames, 1, 8, 2)
    assert [high * 17 + low for high, low in final] == output["token_ids"]


def test_image_frames_retell_the_answer(both: Running) -> None:
    body: dict[str, Any] = {"n": 2, "steps": 12, "seed": 4, "preview_every": 3, "response_format": "b64_json"}
    checkpoint = next(queue.checkpoint for queue in both.engine.queues.values() if queue.kind == "images")
    if checkpoint.config.model.labels == "class":
        body["label"] = 1
    *frames, (event, answer) = stream(both, "/images", **body)
    del body["preview_every"]
    plain = both.client.post("/images", json=body).json()
    assert event is None
    assert answer["images"] == plain["images"]
    final = [_pixels(image["b64_json"]) for image in answer["images"]]
    codec = checkpoint.codec
    length = final[0].size
    for row, pixels in zip(retold(frames, 2, length, codec.target_length), final, strict=True):
        codes = [sum(d * codec.base**k for k, d in enumerate(reversed(token))) for token in row]
        shape = pixels.shape if pixels.ndim == 3 else (*pixels.shape, 1)
        planes = np.array(codes).reshape(shape[2], shape[0], shape[1])
        assert np.array_equal(np.moveaxis(planes, 0, -1), pixels.reshape(shape))
    for output in range(2):
        mine = [frame for _, frame in frames if frame["output"] == output]
        shown = [frame["nfe"] for frame in mine if frame["b64_json"] is not None]
        assert shown
        assert all(later - earlier >= 3 for earlier, later in itertools.pairwise(shown))
    none = stream(both, "/images", **{**body, "preview_every": 0})
    assert all(frame["b64_json"] is None for event, frame in none if event)


def row_after(num_calls: int) -> RowChange:
    y = torch.zeros(LENGTH, 2, dtype=torch.int64)
    return RowChange(0, y, torch.tensor([0]), num_calls, num_calls)


def test_a_picture_is_shown_as_soon_as_it_is_due(images_path: Path) -> None:
    pictures = Pictures(load_checkpoint(images_path), 1, every=3)
    shown = [
        calls
        for calls in (1, 2, 3, 4, 6, 10, 12, 13)
        if pictures.frames(Changes([row_after(calls)], 0.5, None))[0].b64_json is not None
    ]
    assert shown == [3, 6, 10, 13]


def test_partial_pictures_are_due_at_equal_shares_and_never_at_the_end(images_path: Path) -> None:
    checkpoint = load_checkpoint(images_path)
    for calls, expected in [(range(1, 13), [3, 6, 9]), ((2, 7, 8, 12), [7]), ((12,), [])]:
        pictures = PartialPictures(checkpoint, 12, 3)
        assert [each for each in calls if pictures.next_of([row_after(each)])] == expected
        assert pictures.num_shown == len(expected)


def test_a_stream_of_what_is_all_known_is_its_answer(both: Running) -> None:
    known = {"pixels": [[7] * SIDE] * SIDE}
    ((event, answer),) = stream(both, "/images", known=known)
    assert (event, answer["images"][0]["nfe"]) == (None, 0)


def _pixels(b64: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def test_what_is_wrong_from_the_start_is_a_plain_answer(server: Running, both: Running) -> None:
    response = server.post(stream=True, max_tokens=CONTEXT, prompt="abc")
    assert_error(response, 422, "invalid_value", "max_tokens")
    response = both.client.post("/images", json={"stream": True, "response_format": "grid"})
    assert_error(response, 422, "invalid_value", "response_format")


def test_a_failure_on_the_way_is_an_error_frame(model_path: Path) -> None:
    with serving(model_path) as server:
        calls = itertools.count()

        def break_later(lengths: Any) -> None:
            if next(calls) == 3:
                server.denoiser.broken_length = 11

        server.denoiser.hook = break_later
        *frames, (event, error) = stream(server, "/generate", max_tokens=11, steps=64, seed=1)
        assert event == "error"
        assert set(error["error"]) == {"message", "type", "code", "param"}
        assert error["error"]["code"] == "non_finite"
        assert {event for event, _ in frames} == {"denoise"}
        wait_until(lambda: server.engine.held_rows == 0)


def test_a_reader_that_goes_frees_the_rows_within_a_step(model_path: Path) -> None:
    with serving(model_path) as server:
        gate = Gate()
        server.denoiser.hook = gate
        body = {"max_tokens": 30, "steps": "exact", "stream": True}
        with server.client.stream("POST", "/generate", json=body) as response:
            assert response.status_code == 200
            assert gate.entered.wait(60)
        wait_until(lambda: server.metric("prime_request_failure_total", reason="cancelled") == 1)
        calls = len(server.denoiser.lengths)
        gate.opened.set()
        wait_until(lambda: server.engine.held_rows == 0)
        assert len(server.denoiser.lengths) <= calls + 1
        # What the log and the metrics of HTTP say of it: nobody has had an answer.
        wait_until(lambda: num_generate(server, "499") == 1)
        assert num_generate(server, "200") == 0


def num_generate(server: Running, status: str) -> float:
    """How many requests of text were counted under a status."""
    labels = {"route": "/generate", "method": "POST", "status": status}
    return server.engine.metrics.registry.get_sample_value("prime_http_requests_total", labels) or 0


def test_a_stream_that_is_read_to_its_end_counts_as_answered(model_path: Path) -> None:
    with serving(model_path) as server:
        stream(server, "/generate", max_tokens=4)
        wait_until(lambda: num_generate(server, "200") == 1)
        assert num_generate(server, "499") == 0


@pytest.mark.parametrize("reason", ["cancelled", "internal_error"])
def test_rows_are_free_when_a_stream_ends_while_a_frame_is_made(
    server: Running, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """The client goes, or the frame fails."""
    rendering, go_on = threading.Event(), threading.Event()

    def frames(checkpoint: Any, changes: Any) -> Any:
        rendering.set()
        assert go_on.wait(60)
        raise RuntimeError("no frame")

    monkeypatch.setattr(text_stream, "text_frames", frames)
    server.denoiser.hook = lambda lengths: time.sleep(0.05)
    before = server.metric("prime_request_failure_total", reason=reason)
    calls = len(server.denoiser.lengths)
    try:
        body = {"max_tokens": 30, "steps": "exact", "stream": True}
        with server.client.stream("POST", "/generate", json=body):
            assert rendering.wait(60)
            if reason == "internal_error":
                go_on.set()
                wait_until(lambda: server.engine.held_rows == 0)
        wait_until(lambda: server.engine.held_rows == 0)
        assert len(server.denoiser.lengths) < calls + 40  # of 60
        assert server.metric("prime_request_failure_total", reason=reason) == before + 1
    finally:
        go_on.set()
        server.denoiser.hook = None


def test_a_reader_that_goes_when_the_engine_has_finished_is_counted(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendering, go_on = threading.Event(), threading.Event()
    make = text_stream.text_frames

    def frames(*arguments: Any) -> Any:
        rendering.set()
        assert go_on.wait(60)
        return make(*arguments)

    monkeypatch.setattr(text_stream, "text_frames", frames)
    with serving(model_path) as server:
        try:
            with server.client.stream("POST", "/generate", json={"max_tokens": 4, "stream": True}):
                assert rendering.wait(60)
                wait_until(lambda: server.engine.held_rows == 0)
        finally:
            wait_until(lambda: num_generate(server, "499") == 1)
            go_on.set()
        assert server.metric("prime_request_failure_total", reason="cancelled") == 1
        assert server.metric("prime_request_success_total", finished_reason="length") == 0
        assert server.metric("prime_request_success_total", finished_reason="stop") == 0


def test_a_reader_that_does_not_read_is_cut_off_and_nobody_waits_for_it(model_path: Path) -> None:
    """Long before its rows would be finished: their calls are slow, and its frames soon fill every buffer."""
    with serving(model_path, receive_timeout_s=1, max_batch_rows=64, max_n=64, max_queue_rows=128) as server:
        server.denoiser.hook = lambda lengths: time.sleep(0.1)
        body = json.dumps({"n": 64, "max_tokens": CONTEXT, "steps": "exact", "stream": True}).encode()
        head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n"
        address = httpx.URL(server.url)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((address.host, address.port))
            connection.sendall(head.encode() + b"\r\n" + body)
            wait_until(lambda: len(server.denoiser.lengths) > 3)
            mate = server.post(max_tokens=4, steps=2, seed=1)
            assert mate.status_code == 200
            wait_until(lambda: server.metric("prime_request_failure_total", reason="cancelled") == 1)
            wait_until(lambda: server.engine.held_rows == 0)
            wait_until(lambda: num_generate(server, "499") == 1)
            assert b"[DONE]" not in b"".join(iter(lambda: connection.recv(2**16), b""))
        assert len(server.denoiser.lengths) < CONTEXT  # of one call for each of two digits a token
        server.denoiser.hook = None
        assert server.post(max_tokens=4, steps=2, seed=1).json()["outputs"] == mate.json()["outputs"]


@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_stream_is_a_boolean(server: Running, value: object) -> None:
    assert_error(server.post(stream=value), 422, "invalid_value", "stream")
