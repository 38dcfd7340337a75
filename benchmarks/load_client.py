"""Clients that load a server: some that send one request after the other, or arrivals that wait for nobody.

Closed loop: C clients, each sends its next request when it has its answer; throughput is what the server can do, and
latency is what C clients at a time see. Open loop: requests arrive at random (exponential gaps, rate r) whether the
server keeps up or not; latency counts from the arrival, so that a slow answer cannot hide the ones behind it.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["text", "images", "scores"]

MAX_IN_FLIGHT = 256
_PATHS = {"text": "/generate", "images": "/images", "scores": "/score"}
# What is scored: any text will do, and its length is drawn.
_WORDS = (
    "and",
    "the",
    "light",
    "was",
    "good",
    "evening",
    "morning",
    "were",
    "first",
    "day",
    "in",
    "beginning",
)


@dataclass(frozen=True)
class Mix:
    """What is asked for, in which shares; what is neither images nor scores is text.

    Attributes:
        image_share: of all requests, in [0, 1].
        score_share: of all requests, in [0, 1]; both shares together are at most 1.
        stream_share: of the requests for text and images, in [0, 1]: their answers are streams.
        max_tokens: tokens of a text request, drawn from a quarter of this to this; as many words are scored.
        text_steps: steps of a text request.
        image_steps: steps of an image request.
        score_samples: masked states of a score, one denoiser call each.
    """

    image_share: float
    score_share: float
    stream_share: float
    max_tokens: int
    text_steps: int
    image_steps: int
    score_samples: int

    def body(self, kind: Kind, draw: random.Random) -> dict[str, Any]:
        """Return the body of one request without its seed."""
        size = draw.randint(-(-self.max_tokens // 4), self.max_tokens)
        if kind == "scores":
            text = " ".join(draw.choice(_WORDS) for _ in range(size))
            return {"text": text, "num_samples": self.score_samples}
        stream = {"stream": True} if draw.random() < self.stream_share else {}
        if kind == "images":
            return {"n": 1, "steps": self.image_steps, **stream}
        return {"max_tokens": size, "steps": self.text_steps, **stream}


@dataclass(frozen=True)
class LoadRequest:
    """One request: its kind and its JSON body."""

    kind: Kind
    body: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    Attributes:
        kind: of the request.
        status: HTTP status; 0 if there was no answer in time.
        latency_s: from the sending, or in the open loop from the arrival, to the whole answer.
        num_tokens: generated tokens of text.
        num_images: generated images.
        num_scores: scored texts.
    """

    kind: Kind
    status: int
    latency_s: float
    num_tokens: int = 0
    num_images: int = 0
    num_scores: int = 0


def mixed_requests(num: int, seed: int, mix: Mix) -> list[LoadRequest]:
    """Return a seeded mixture of requests in exactly its shares, each with a seed of its own.

    Args:
        num: how many.
        seed: of the mixture.
        mix: of what.
    """
    draw = random.Random(seed)
    num_images = round(num * mix.image_share)
    num_scores = min(round(num * mix.score_share), num - num_images)
    kinds: list[Kind] = [*["images"] * num_images, *["scores"] * num_scores]  # type: ignore[list-item]
    kinds.extend(["text"] * (num - len(kinds)))
    draw.shuffle(kinds)
    return [LoadRequest(kind, {**mix.body(kind, draw), "seed": number}) for number, kind in enumerate(kinds)]


def closed_loop(
    url: str, requests: Sequence[LoadRequest], *, num_clients: int, limit_s: float, timeout_s: float
) -> tuple[list[Answer], float]:
    """Send requests from so many clients; return the answers and the seconds until the last one.

    Args:
        url: of the server.
        requests: what to send, in order.
        num_clients: C.
        limit_s: no request is sent later than this.
        timeout_s: how long an answer is waited for.
    """
    waiting, lock, answers = iter(requests), threading.Lock(), list[Answer]()
    started = time.perf_counter()

    def take() -> Iterator[LoadRequest]:
        while time.perf_counter() - started < limit_s:
            with lock:
                request = next(waiting, None)
            if request is None:
                return
            yield request

    def client() -> None:
        for request in take():
            answers.append(_send(url, request, time.perf_counter(), timeout_s))

    with ThreadPoolExecutor(num_clients) as pool:
        for future in [pool.submit(client) for _ in range(num_clients)]:
            future.result()
    return answers, time.perf_counter() - started


def open_loop(
    url: str,
    requests: Sequence[LoadRequest],
    *,
    rate_per_s: float,
    seed: int,
    limit_s: float,
    timeout_s: float,
) -> tuple[list[Answer], float]:
    """Send requests at random times; return the answers and the seconds until the last one.

    Args:
        url: of the server.
        requests: what to send, in order.
        rate_per_s: mean number of arrivals in a second.
        seed: of the arrival times.
        limit_s: no request arrives later than this.
        timeout_s: how long an answer is waited for.
    """
    gaps = random.Random(seed)
    started = due = time.perf_counter()
    futures = []
    with ThreadPoolExecutor(MAX_IN_FLIGHT) as pool:
        for request in requests:
            due += gaps.expovariate(rate_per_s)
            if due - started > limit_s:
                break
            time.sleep(max(0.0, due - time.perf_counter()))
            futures.append(pool.submit(_send, url, request, due, timeout_s))
        answers = [future.result() for future in futures]
    return answers, time.perf_counter() - started


def get(url: str, path: str, timeout_s: float = 10.0) -> bytes:
    """Return the body of a GET.

    Raises:
        RuntimeError: if the server does not answer 200.
    """
    try:
        status, body = _exchange(url, "GET", path, None, timeout_s)
    except (OSError, http.client.HTTPException) as error:
        raise RuntimeError(f"GET {url}{path}: {error}") from None
    if status != 200:
        raise RuntimeError(f"GET {url}{path}: status {status}")
    return body


def _send(url: str, request: LoadRequest, since_s: float, timeout_s: float) -> Answer:
    """Send one request; ``since_s`` is when its latency begins."""
    try:
        status, body = _exchange(
            url, "POST", _PATHS[request.kind], json.dumps(request.body).encode(), timeout_s
        )
    except (OSError, http.client.HTTPException):
        return Answer(request.kind, 0, time.perf_counter() - since_s)
    latency_s = time.perf_counter() - since_s
    if status != 200:
        return Answer(request.kind, status, latency_s)
    answer = _last_frame(body) if request.body.get("stream") else json.loads(body)
    if "error" in answer:  # of a stream, whose status was sent before
        return Answer(request.kind, 0, latency_s)
    num_tokens = sum(len(output["token_ids"]) for output in answer.get("outputs", []))
    num_scores = len(answer.get("scores", []))
    return Answer(request.kind, status, latency_s, num_tokens, len(answer.get("images", [])), num_scores)


def _last_frame(body: bytes) -> dict[str, Any]:
    """Return the answer at the end of a stream of server-sent events: the last data frame but "[DONE]"."""
    frames = [line[len(b"data: ") :] for line in body.splitlines() if line.startswith(b"data: ")]
    answer: dict[str, Any] = json.loads(frames[-2])
    return answer


def _exchange(url: str, method: str, path: str, body: bytes | None, timeout_s: float) -> tuple[int, bytes]:
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout_s)
    try:
        headers = {} if body is None else {"content-type": "application/json"}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
