"""The process as a whole under faults: what ends it, what does not, what a new one gives (faults 20, 21, 28)."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.fault_seam import VARIABLE, FaultyDenoiser, add_faults
from server.main import build_engine
from server.settings import Settings
from tests.server.processes import Served
from tests.server.running import Running, wait_until

CANARY: dict[str, Any] = {"prompt": "canary", "max_tokens": 9, "seed": 3, "n": 2}


@pytest.mark.alone
def test_fault_28_kill_and_restart_gives_the_same_bytes(model_path: Path) -> None:
    with Served("--model", str(model_path)) as first:
        before = first.outputs(**CANARY)
        first.signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
    with Served("--model", str(model_path)) as second:
        # Ready within 10 s on a machine that has a core to spare; the bound leaves room for one that has not.
        assert second.start_s < 30
        assert second.outputs(**CANARY) == before


def test_faults_one_after_the_other_leave_the_same_bytes_until_the_thread_dies(model_path: Path) -> None:
    faults: list[Any] = [
        {"fault": "raise", "call": 1},
        {"fault": "nan", "call": 2},
        {"fault": "oom", "call": 3, "rows": 1},
        {"fault": "slow", "call": 4, "seconds": 0.1},
        {"fault": "die", "call": 8},
    ]
    with Served("--model", str(model_path), faults=faults) as served:
        assert "FAILS ON PURPOSE" in served.log
        body = {"max_tokens": 8, "steps": 1, "n": 2, "seed": 5}
        started = time.monotonic()
        assert served.post(**body).json()["error"]["code"] == "engine_error"
        assert time.monotonic() - started < 1  # fault 20
        assert served.post(**body).json()["error"]["code"] == "non_finite"
        outputs = served.outputs(**body)  # out of memory with two rows, slow with one, and then as always
        assert served.outputs(**body) == outputs
        assert 'prime_out_of_memory_total{model="tiny"} 1.0' in served.get("/metrics").text
        assert served.get("/ready").status_code == served.get("/health").status_code == 200
        assert served.post(**body).json()["error"]["code"] == "unavailable"
        assert served.wait() == 1
        assert "the engine has stopped" in served.log


@pytest.mark.alone
def test_fault_21_a_hang_shows_within_five_seconds_and_ends_the_process_if_it_lasts(model_path: Path) -> None:
    with Served("--model", str(model_path), "--stall-exit-s", "1", faults=[{"fault": "hang"}]) as served:
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(httpx.post, f"{served.url}/generate", json={"max_tokens": 2}, timeout=60)
            started = time.monotonic()
            wait_until(lambda: served.get("/ready").status_code == 503)
            assert time.monotonic() - started < 5.5
            assert served.get("/health").status_code == 200
            assert reply.result().json()["error"]["code"] == "unavailable"
        assert served.wait() == 1
        assert "the engine hangs" in served.log


@pytest.mark.alone
def test_the_log_tells_when_a_hang_is_over(model_path: Path) -> None:
    with Served("--model", str(model_path), faults=[{"fault": "hang", "seconds": 6}]) as served:
        assert httpx.post(f"{served.url}/generate", json={"max_tokens": 2}, timeout=60).status_code == 200
        wait_until(lambda: served.get("/ready").status_code == 200)
        wait_until(lambda: "the engine goes on, " in served.log, timeout_s=5)
        assert served.log.index("the engine hangs") < served.log.index("the engine goes on, ")


@pytest.mark.alone
def test_a_hang_ends_the_process_also_while_it_drains(model_path: Path) -> None:
    with Served("--model", str(model_path), "--stall-exit-s", "0.5", faults=[{"fault": "hang"}]) as served:
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(httpx.post, f"{served.url}/generate", json={"max_tokens": 2}, timeout=60)
            wait_until(lambda: 'prime_num_requests_running{model="tiny"} 1.0' in served.get("/metrics").text)
            served.signal(signal.SIGTERM)
            assert reply.result().json()["error"]["code"] == "unavailable"
        assert served.wait() == 1
        assert "the engine hangs" in served.log


def test_no_fault_without_the_variable(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    engine = build_engine(Settings(model=model_path))
    for queue in engine.queues.values():
        assert not any(isinstance(part, FaultyDenoiser) for part in queue.checkpoint.denoiser.modules())


def test_no_fault_can_be_asked_for_from_outside(server: Running) -> None:
    document = server.client.get("/openapi.json").text
    assert "faults" not in document.lower()
    for headers in ({VARIABLE: "[]"}, {"X-Test-Faults": '[{"fault": "raise"}]'}):
        reply = server.client.post("/generate", json={"max_tokens": 1}, headers=headers)
        assert reply.status_code == 200
    assert not any("fault" in name for name in Settings.model_fields)


def test_a_bad_file_of_faults_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    leaks_nothing = '[{"fault": "leak", "leaked_bytes": 0}]'
    for text in ("", "{}", '[{"fault": "explode"}]', '[{"fault": "raise", "at": 3}]', leaks_nothing):
        file.write_text(text)
        with pytest.raises(ValueError, match=VARIABLE):
            add_faults([], {VARIABLE: str(file)})
