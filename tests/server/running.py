"""A small real model with hooks in it, and servers on real sockets around it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from torch import Tensor, nn

from prime_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from prime_core.config import CodecConfig, Config, DiTConfig
from prime_core.models.dit import DiT
from prime_core.rank_files import write_rank_file
from prime_core.sampling.prepare import prepare_rows
from prime_core.tokenizer import TokenizerSpec
from server.engine.batcher import Job
from server.engine.engine import Engine
from server.engine.model_queue import LoadedModel
from server.http.keys import KeyRing
from server.main import http_config
from server.model_sources import ModelSource
from server.settings import Settings

CONTEXT = 64
NAME = "tiny"


def write_checkpoint(folder: Path) -> Path:
    """A checkpoint with random weights whose tokens are the 256 bytes and an end of text."""
    spec = TokenizerSpec(kind="tiktoken_file", file="bytes.tiktoken", special_tokens={"<|endoftext|>": 256})
    ranks = folder / "bytes.tiktoken"
    write_rank_file(ranks, [bytes([value]) for value in range(256)])
    config = Config(
        model=DiTConfig(hidden_size=32, num_blocks=1, num_heads=2, cond_dim=8, length=CONTEXT),
        codec=CodecConfig(vocab_size=257, target_length=2),
        tokenizer=spec,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a new network draws from the global state, which depends on earlier tests
        fresh = DiT(config.model, config.codec, config.schedule.build()).state_dict()
    state = {
        name: value + 0.2 * torch.randn(value.shape, generator=generator) for name, value in fresh.items()
    }
    save_checkpoint(folder / NAME, config, state, tokenizer_file=ranks)
    return folder / NAME


def write_without_tokenizer(path: Path, folder: Path) -> Path:
    """The same model as at a path, but of tokens that stand for no text."""
    told = load_checkpoint(path)
    config = told.config.model_copy(update={"tokenizer": TokenizerSpec(kind="none")})
    save_checkpoint(folder / NAME, config, told.denoiser.state_dict())
    return folder / NAME


Hook = Callable[[Sequence[int]], None]


class Hooked(nn.Module):
    """A denoiser that calls `hook(lengths)` first, and spoils rows of `broken_length` tokens with NaN."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner: Any = inner
        self.hook: Hook | None = None
        self.broken_length: int | None = None
        self.lengths: list[list[int]] = []

    def features(
        self,
        y_t: Tensor,
        lengths: Sequence[int],
        t: Tensor | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        self.lengths.append(list(lengths))
        if self.hook is not None:
            self.hook(lengths)
        features = self.inner.features(y_t, lengths, t, positions, labels)
        if self.broken_length is None:
            return features
        features = features.clone()
        row_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        broken = torch.tensor([length == self.broken_length for length in lengths])[row_of]
        features[broken if positions is None else broken[positions]] = torch.nan
        return features

    def head(self, features: Any) -> Tensor:
        return self.inner.head(features)  # type: ignore[no-any-return]

    def fill(self, lengths: Sequence[int]) -> list[int]:
        return self.inner.fill(lengths)  # type: ignore[no-any-return]

    def forward(self, y_t: Tensor, t: Tensor | None = None) -> Tensor:
        return self.inner(y_t, t)  # type: ignore[no-any-return]


class Gate:
    """A hook that holds the engine in a denoiser call until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, lengths: Sequence[int]) -> None:
        self.entered.set()
        assert self.opened.wait(60)


@dataclasses.dataclass
class Running:
    """A server that listens."""

    url: str
    engine: Engine
    settings: Settings
    client: httpx.Client

    @property
    def denoiser(self) -> Hooked:
        """The network of the first model."""
        return self.denoiser_of(next(iter(self.engine.queues)))

    def denoiser_of(self, name: str) -> Hooked:
        denoiser: Any = self.engine.queues[name].checkpoint.denoiser
        assert isinstance(denoiser, Hooked)
        return denoiser

    def post(self, **body: object) -> httpx.Response:
        return self.client.post("/generate", json=body)

    def metric(self, name: str, **labels: str) -> float:
        """The value of a series; of the first model if no model is given."""
        labels = {"model": next(iter(self.engine.queues)), **labels}
        value = self.engine.metrics.registry.get_sample_value(name, labels)
        assert value is not None, name
        return value


def make_engine(settings: Settings) -> tuple[Engine, Hooked]:
    """An engine of hooked models, and the network of the first."""
    models = [
        LoadedModel(name, hooked(load_checkpoint(path, dtype="float32"))) for name, path in settings.models
    ]
    engine = Engine(
        models,
        max_batch_rows=settings.max_batch_rows,
        max_batch_tokens=settings.max_batch_tokens,
        max_queue_rows=settings.max_queue_rows,
        max_queue_bytes=settings.max_queue_bytes,
    )
    denoiser: Any = models[0].checkpoint.denoiser
    return engine, denoiser


def submit(engine: Engine, num_tokens: int, deadline_s: float = math.inf) -> Job:
    """One row of the first model, without HTTP."""
    queue = next(iter(engine.queues.values()))
    rows = prepare_rows(queue.checkpoint, max_tokens=num_tokens, steps=3, seed=0).rows
    engine.reserve(queue.name, len(rows))
    job = Job(queue.name, list(rows), time.monotonic(), deadline_s=deadline_s)
    engine.submit(job)
    return job


def hooked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with hooks in its network."""
    denoiser: Any = Hooked(checkpoint.denoiser)
    return dataclasses.replace(checkpoint, denoiser=denoiser)


@contextlib.contextmanager
def serving(*models: Path | ModelSource, keys: KeyRing | None = None, **changes: object) -> Iterator[Running]:
    """Serve checkpoints on a free port of the loopback interface with settings changed."""
    settings = Settings.model_validate({"model": models, "max_n": 16, **changes})
    engine, _ = make_engine(settings)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(http_config(engine, settings, keys))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    engine.start()
    thread.start()
    try:
        wait_until(lambda: (server.started and engine.state == "ready") or not engine.alive)
        assert engine.alive, "the engine died as it started"
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Running(url, engine, settings, client)
    finally:
        server.should_exit = True
        thread.join(60)
        engine.stop()
        assert not thread.is_alive()
        assert not engine.alive


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "overloaded_error",
    504: "timeout_error",
}


def assert_error(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """The one error shape; returns the message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert len(response.content) < 4096
    assert response.headers["x-request-id"].startswith("req-")
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "code", "param"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param)
    other = "server_error" if status >= 500 else "invalid_request_error"
    assert body["error"]["type"] == ERROR_TYPES.get(status, other)
    return str(body["error"]["message"])
