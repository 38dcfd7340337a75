"""The requests of a mixed load: of every kind that the server answers, refuses, or loses on the way.

Whatever a client can choose (prompts, seeds, names, paths, ids) differs from request to request: what is kept by value,
in a cache say, shows only then.
"""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from tests.server.image_model import LABELS, SIDE
from tests.server.image_model import NAME as IMAGES
from tests.server.running import NAME as TEXT

# Of the server: a request of so many outputs is refused while anything else is held.
MAX_N = 16
FLAGS = ["--max-batch-rows", "8", "--max-queue-rows", str(MAX_N), "--max-n", str(MAX_N)]

SAMPLED = frozenset({200, 429})


def is_json(content: bytes) -> bool:
    return isinstance(json.loads(content), dict)


def is_error(content: bytes) -> bool:
    return set(json.loads(content)) == {"error"} and len(content) < 4096


def is_ended_stream(content: bytes) -> bool:
    return content.endswith(b"data: [DONE]\n\n") and b"event: error" not in content


def is_file(content: bytes) -> bool:
    return content.startswith((b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"))


def is_anything(content: bytes) -> bool:
    return len(content) > 0


@dataclass(frozen=True)
class Ask:
    """A request, and what may come of it.

    Attributes:
        kind: under which it is counted.
        statuses: that the server may answer with.
        whole: whether the content of a 200 is all there; the others are errors in the one shape.
        patience_s: the client goes away after so many seconds, in the middle of whatever is then; None: it stays.
    """

    kind: str
    method: str
    path: str
    statuses: frozenset[int]
    whole: Callable[[bytes], bool]
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    patience_s: float | None = None


def word(rng: random.Random, most: int = 12) -> str:
    return "".join(
        rng.choice("abcdefghij klmnopqrst\u00e9\u05d0\U0001f469") for _ in range(rng.randint(1, most))
    )


def post(kind: str, path: str, body: Mapping[str, Any], whole: Callable[[bytes], bool]) -> Ask:
    return Ask(kind, "POST", path, SAMPLED, whole, json.dumps(body).encode())


def has_outputs(key: str, number: int) -> Callable[[bytes], bool]:
    return lambda content: len(json.loads(content)[key]) == number


def text_body(rng: random.Random) -> dict[str, Any]:
    steps = "exact" if rng.random() < 0.5 else rng.randint(1, 16)
    drawn = {"temperature": rng.choice([1.0, rng.uniform(0.5, 1.5)]), "top_p": rng.choice([1.0, 0.9])}
    known = (
        {"prompt": word(rng)} if rng.random() < 0.7 else {"template": [word(rng), {"gap": rng.randint(1, 9)}]}
    )
    length = {} if "template" in known else {"max_tokens": rng.randint(1, 16)}
    return {**known, **length, **drawn, "n": rng.randint(1, 3), "steps": steps, "seed": rng.getrandbits(64)}


def image_body(rng: random.Random) -> dict[str, Any]:
    label = rng.choice([None, rng.randrange(len(LABELS)), rng.choice(LABELS)])
    known = [[rng.choice([None, rng.randrange(16)]) for _ in range(SIDE)] for _ in range(SIDE)]
    corrector = {"kind": "corrected", "scale": 2.0, "power": 1.0, "final_power": 1.0}
    return {
        "n": rng.randint(1, 3),
        "steps": rng.randint(2, 12),
        "label": label,
        "seed": rng.getrandbits(64),
        **rng.choice(
            [{}, {}, {"known": {"pixels": known}}, {"corrector": corrector}, {"sampler": "published"}]
        ),
    }


def text(rng: random.Random) -> Ask:
    body = text_body(rng)
    return post("text", "/generate", body, has_outputs("outputs", body["n"]))


def completion(rng: random.Random) -> Ask:
    n = rng.randint(1, 2)
    body = {"model": TEXT, "prompt": word(rng), "max_tokens": rng.randint(1, 16), "n": n}
    return post("completion", "/v1/completions", body, has_outputs("choices", n))


def images(rng: random.Random) -> Ask:
    if rng.random() < 0.2:
        path = f"/images?n=2&steps=4&seed={rng.getrandbits(64)}"
        return Ask("images", "GET", path, SAMPLED, is_file, headers={"Accept": "image/png"})
    body = image_body(rng)
    shape = rng.choice(["b64_json", "grid", "npy"])
    whole = has_outputs("images", body["n"]) if shape == "b64_json" else is_file
    return post("images", "/images", {**body, "response_format": shape}, whole)


def generation(rng: random.Random) -> Ask:
    n = rng.randint(1, 2)
    body = {"model": IMAGES, "prompt": rng.choice(["", "0", *LABELS]), "n": n, "steps": 4}
    return post("generation", "/v1/images/generations", body, has_outputs("data", n))


def png(rng: random.Random) -> bytes:
    file = io.BytesIO()
    Image.frombytes("L", (SIDE, SIDE), bytes(rng.randrange(16) for _ in range(SIDE**2))).save(file, "PNG")
    return file.getvalue()


def score(rng: random.Random) -> Ask:
    content: dict[str, Any]
    if rng.random() < 0.5:
        content = {"text": word(rng)}
    else:
        content = {"png": base64.b64encode(png(rng)).decode(), "label": rng.randrange(len(LABELS))}
    body = {**content, "num_samples": rng.randint(1, 6), "seed": rng.getrandbits(64), "per_token": True}
    return post("score", "/score", body, has_outputs("scores", 1))


def stream(rng: random.Random) -> Ask:
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/generate", text_body(rng)),
        ("/generate", text_body(rng)),
        ("/images", {**image_body(rng), "response_format": "b64_json", "preview_every": 2}),
        ("/v1/completions", {"model": TEXT, "prompt": word(rng), "max_tokens": 16}),
        ("/v1/images/generations", {"model": IMAGES, "prompt": "", "steps": 8, "partial_images": 2}),
    ]
    path, body = rng.choice(asked)
    return post("stream", path, {**body, "stream": True}, is_ended_stream)


def gone(rng: random.Random) -> Ask:
    """Leaves in the middle: of its own request, of the queue, of a call, or of a stream."""
    body = {"prompt": word(rng, 4), "max_tokens": 40, "steps": "exact", "stream": rng.random() < 0.5}
    patience_s = rng.choice([0.0, 0.0, rng.uniform(0, 0.1)])
    return replace(post("gone", "/generate", body, is_anything), patience_s=patience_s)


def late(rng: random.Random) -> Ask:
    """Gives the server next to no time."""
    headers = {"X-Request-Timeout": f"{rng.uniform(0.001, 0.05):.4f}"}
    asked = post("late", "/generate", text_body(rng), is_json)
    return replace(asked, statuses=SAMPLED | {504}, headers=headers)


def wrong(rng: random.Random) -> Ask:
    """Cannot be honoured; what is wrong is never the same twice."""
    odd = word(rng, 40)
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/generate", {f"key {odd}": 1}),
        ("/generate", {"prompt": odd * 512}),
        ("/generate", {"n": MAX_N + 1 + rng.getrandbits(40)}),
        ("/images", {"label": odd}),
        ("/images", {"known": {"pixels": [[rng.getrandbits(30)]]}}),
        ("/score", {"text": odd, "token_ids": [rng.getrandbits(8)]}),
        ("/v1/completions", {"model": TEXT, "prompt": odd, "logprobs": rng.randint(1, 5)}),
    ]
    path, body = rng.choice(bodies)
    return Ask("wrong", "POST", path, frozenset({422, 429}), is_error, json.dumps(body).encode())


def astray(rng: random.Random) -> Ask:
    """Asks for what is not there."""
    number = rng.getrandbits(64)
    path = rng.choice([f"/nowhere/{number}", f"/v1/models/{number}"])
    return Ask("astray", "GET", path, frozenset({404}), is_error, headers={"X-Request-Id": f"id-{number}"})


def crowd(rng: random.Random) -> Ask:
    """Needs all of the queue: refused while anything else is held, and then refuses the others."""
    body = {"prompt": word(rng), "max_tokens": 4, "steps": rng.randint(1, 4), "n": MAX_N}
    return post("crowd", "/generate", body, has_outputs("outputs", MAX_N))


def look(rng: random.Random) -> Ask:
    path = rng.choice(
        ["/metrics", "/metrics", "/health", "/ready", "/info", "/", "/docs", "/openapi.json", "/v1/models"]
    )
    return Ask("look", "GET", path, frozenset({200}), is_anything)


# Each kind with its share.
KINDS: list[tuple[Callable[[random.Random], Ask], int]] = [
    (text, 6),
    (completion, 2),
    (images, 3),
    (generation, 1),
    (score, 2),
    (stream, 4),
    (gone, 4),
    (late, 1),
    (wrong, 3),
    (astray, 1),
    (crowd, 2),
    (look, 2),
]
EXPECTED = [
    *((kind.__name__, 200) for kind, _ in KINDS if kind not in (gone, late, wrong, astray, crowd)),
    ("gone", 0),
    ("late", 504),
    ("wrong", 422),
    ("astray", 404),
    ("crowd", 429),
]
