"""New weights in a running server: nothing is dropped, and what is damaged changes nothing (fault 29)."""

from __future__ import annotations

import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from prime_core.checkpoint import load_checkpoint, save_checkpoint
from prime_core.config import CodecConfig
from prime_core.models.build import build_denoiser
from prime_core.sampling.sample import sample
from server.engine.model_queue import LoadedModel
from server.reload import reload_model
from tests.server.background import Background
from tests.server.processes import Served
from tests.server.running import NAME, Gate, Running, hooked, serving, wait_until

CANARY: dict[str, Any] = {"prompt": "canary", "max_tokens": 9, "seed": 3, "n": 2}


@pytest.fixture
def folder(model_path: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may change."""
    return Path(shutil.copytree(model_path, tmp_path / NAME))


def write_new_weights(folder: Path, scale: float = -1.0) -> None:
    checkpoint = load_checkpoint(folder)
    state = {name: scale * value for name, value in checkpoint.denoiser.state_dict().items()}
    save_checkpoint(folder, checkpoint.config, state, tokenizer_file=folder / "bytes.tiktoken")


def load(name: str, folder: Path) -> LoadedModel:
    return LoadedModel(name, hooked(load_checkpoint(folder, dtype="float32")))


def texts(folder: Path, **fields: Any) -> list[str | None]:
    return [item.text for item in sample(load_checkpoint(folder, dtype="float32"), **fields)]


def served_texts(server: Running, **fields: Any) -> list[str]:
    return [output["text"] for output in server.post(**fields).json()["outputs"]]


def test_rows_that_run_finish_on_the_weights_they_began_with(folder: Path) -> None:
    body: dict[str, Any] = {"max_tokens": 20, "steps": "exact", "seed": 1}
    with serving(folder) as server:
        background = Background(server)
        old_texts = texts(folder, **body)
        gate = server.denoiser.hook = Gate()
        running = background.post(**body)
        assert gate.entered.wait(60)
        write_new_weights(folder)
        assert reload_model(server.engine, NAME, lambda name: load(name, folder))
        waiting = background.post(**body)
        wait_until(lambda: server.engine.held_rows == 2)
        gate.opened.set()
        assert [output["text"] for output in running.result().json()["outputs"]] == old_texts
        new_texts = texts(folder, **body)
        assert new_texts != old_texts
        assert [output["text"] for output in waiting.result().json()["outputs"]] == new_texts
        assert served_texts(server, **body) == new_texts
        assert server.metric("prime_model_reloads_total", outcome="taken") == 1
        background.pool.shutdown()


def test_new_requests_do_not_wait_for_rows_of_the_old_weights(folder: Path) -> None:
    with serving(folder) as server:
        background = Background(server)
        old = server.denoiser
        gate = old.hook = Gate()
        body: dict[str, Any] = {"max_tokens": 30, "steps": "exact", "seed": 1}
        old_texts, canary = texts(folder, **body), texts(folder, **CANARY)
        running = background.post(**body)
        assert gate.entered.wait(60)
        write_new_weights(folder)
        assert reload_model(server.engine, NAME, lambda name: load(name, folder))
        old.hook = lambda lengths: time.sleep(0.05)
        gate.opened.set()
        assert server.post(**CANARY).status_code == 200
        new_texts = texts(folder, **CANARY)
        assert new_texts != canary
        assert served_texts(server, **CANARY) == new_texts
        assert not running.done()  # 60 calls of 50 ms
        write_new_weights(folder, scale=-2.0)  # taken when the first ones are gone: two at a time at most
        assert reload_model(server.engine, NAME, lambda name: load(name, folder))
        assert served_texts(server, **CANARY) == new_texts
        assert [output["text"] for output in running.result().json()["outputs"]] == old_texts
        assert served_texts(server, **CANARY) == texts(folder, **CANARY) != new_texts
        assert server.engine.queues[NAME].checkpoint.denoiser is not old
        assert len(list(server.engine.queues[NAME]._generations)) == 1
        background.pool.shutdown()


def test_an_idle_server_lets_go_of_old_weights_at_once(folder: Path) -> None:
    with serving(folder) as server:
        before = server.engine.queues[NAME].checkpoint
        write_new_weights(folder)
        assert reload_model(server.engine, NAME, lambda name: load(name, folder))
        wait_until(lambda: server.engine.queues[NAME].checkpoint is not before)


def test_nobody_waits_while_the_memory_of_old_weights_is_given_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the device; /metrics and new requests need the lock around the lists of jobs meanwhile."""
    giving_back, go_on = threading.Event(), threading.Event()

    def give_back() -> None:
        giving_back.set()
        assert go_on.wait(60)

    monkeypatch.setattr("server.engine.model_queue.free_cached_memory", give_back)
    with serving(folder) as server:
        write_new_weights(folder)
        assert reload_model(server.engine, NAME, lambda name: load(name, folder))
        assert giving_back.wait(60)
        try:
            assert server.client.get("/metrics", timeout=10).status_code == 200
        finally:
            go_on.set()


def test_who_waits_for_new_weights_may_leave(folder: Path) -> None:
    with serving(folder) as server:
        background = Background(server)
        gate = server.denoiser.hook = Gate()
        running = background.post(max_tokens=6)
        assert gate.entered.wait(60)
        assert reload_model(server.engine, NAME, lambda name: load(name, folder))
        reply = server.client.post("/generate", json={"max_tokens": 7}, headers={"X-Request-Timeout": "0.2"})
        assert reply.status_code == 504
        gate.opened.set()
        assert running.result().status_code == 200
        wait_until(lambda: server.engine.held_rows == 0)
        assert server.post(max_tokens=3).status_code == 200
        background.pool.shutdown()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def spoil(path: Path) -> None:
    """NaN in the last tensor of the file."""
    content = bytearray(path.read_bytes())
    content[-4:] = b"\xff\xff\xff\xff"
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": cut,
    "trailing": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "nan": spoil,
    "huge header": lambda path: path.write_bytes(b"\xff" * 7 + b"\x00{"),
    "pickle": lambda path: path.write_bytes(b"\x80\x04K\x01."),
}


@pytest.fixture(scope="module")
def server(model_path: Path) -> Any:
    with serving(model_path) as running:
        yield running


@pytest.mark.parametrize("damage", DAMAGES)
def test_fault_29_a_damaged_checkpoint_leaves_the_old_one_with_one_line_in_the_log(
    server: Running, folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = served_texts(server, **CANARY)
    refused = server.metric("prime_model_reloads_total", outcome="refused")
    caplog.set_level(logging.INFO, "prime.server")
    DAMAGES[damage](folder / "model.safetensors")
    assert not reload_model(server.engine, NAME, lambda name: load(name, folder))
    (line,) = [record.getMessage() for record in caplog.records if record.name == "prime.server"]
    assert line.startswith(f"model '{NAME}' stays as it is: ")
    assert "\n" not in line
    assert served_texts(server, **CANARY) == before
    assert server.metric("prime_model_reloads_total", outcome="refused") == refused + 1
    assert server.client.get("/health").status_code == server.client.get("/ready").status_code == 200


def test_another_model_and_one_that_cannot_run_are_refused(
    server: Running, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = served_texts(server, **CANARY)
    other = load_checkpoint(folder)
    config = other.config.model_copy(update={"codec": CodecConfig(vocab_size=257, target_length=4)})
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in build_denoiser(config).state_dict().items()
    }
    save_checkpoint(folder.parent / "other", config, state, tokenizer_file=folder / "bytes.tiktoken")
    assert not reload_model(server.engine, NAME, lambda name: load(name, folder.parent / "other"))
    assert "its configuration is not that of the model that serves" in caplog.text
    write_new_weights(folder, 1e38)
    assert not reload_model(server.engine, NAME, lambda name: load(name, folder))
    assert "not finite" in caplog.text
    assert served_texts(server, **CANARY) == before


def test_sighup_reads_keys_and_checkpoints_again(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one-key-of-some-length\n")
    with Served("--model", str(folder), "--api-keys-file", str(file), "--dtype", "float32") as served:

        def ask(key: str) -> Any:
            headers = {"authorization": f"Bearer {key}"}
            return httpx.post(f"{served.url}/generate", json=CANARY, headers=headers, timeout=60)

        def texts_of(key: str) -> list[str]:
            return [output["text"] for output in ask(key).json()["outputs"]]

        assert texts_of("one-key-of-some-length") == texts(folder, **CANARY)
        write_new_weights(folder)
        file.write_text("another-key-as-long\n")
        served.signal(signal.SIGHUP)
        wait_until(lambda: ask("another-key-as-long").status_code == 200)
        assert ask("one-key-of-some-length").status_code == 401
        wait_until(lambda: "was read again" in served.log)
        assert texts_of("another-key-as-long") == texts(folder, **CANARY)
        cut(folder / "model.safetensors")
        served.signal(signal.SIGHUP)
        wait_until(lambda: "stays as it is" in served.log)
        assert ask("another-key-as-long").status_code == 200
        file.write_text("a-third-key-as-long\n")  # without a signal it takes a second or two
        wait_until(lambda: ask("a-third-key-as-long").status_code == 200)
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
