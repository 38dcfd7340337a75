"""The process as a whole under faults: what ends it, what does not, what a new one gives (faults 20, 21, 26, 28)."""

from __future__ import annotations

import os
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


def test_the_log_tells_when_a_hang_is_over(model_path: Path) -> None:
    with Served("--model", str(model_path), faults=[{"fault": "hang", "seconds": 6}]) as served:
        assert httpx.post(f"{served.url}/generate", json={"max_tokens": 2}, timeout=60).status_code == 200
        wait_until(lambda: served.get("/ready").status_code == 200)
        wait_until(lambda: "the engine goes on after " in served.log, timeout_s=5)
        assert served.log.index("the engine hangs") < served.log.index("the engine goes on after ")


def test_a_hang_ends_the_process_also_while_it_drains(model_path: Path) -> None:
    with Served("--model", str(model_path), "--stall-exit-s", "0.5", faults=[{"fault": "hang"}]) as served:
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(httpx.post, f"{served.url}/generate", json={"max_tokens": 2}, timeout=60)
            wait_until(lambda: 'prime_num_requests_running{model="tiny"} 1.0' in served.get("/metrics").text)
            served.signal(signal.SIGTERM)
            assert reply.result().json()["error"]["code"] == "unavailable"
        assert served.wait() == 1
        assert "the engine hangs" in served.log


@pytest.mark.parametrize("attempt", range(int(os.environ.get("MDM_DRAINS", "1"))))
def test_fault_26_a_drain_under_load_loses_nothing(model_path: Path, attempt: int) -> None:
    slow: list[Any] = [{"fault": "slow", "calls": 10**6, "seconds": 0.01}]
    codes: list[str] = []

    def ask(served: Served, worker: int) -> None:
        """Send one request after the other; each must be answered in full or refused in words."""
        with httpx.Client(base_url=served.url, timeout=60) as client:
            while True:
                body = {"max_tokens": 8, "steps": 4, "seed": worker, "n": 2}
                try:
                    reply = client.post("/generate", json=body).json()
                except httpx.TransportError:
                    assert "draining" in codes  # the process has ended; it may not before it refused
                    return
                codes.append("ok" if "outputs" in reply else reply["error"]["code"])
                time.sleep(0.01)

    with Served("--model", str(model_path), "--max-batch-rows", "4", faults=slow) as served:
        with ThreadPoolExecutor(9) as pool:
            asking = [pool.submit(ask, served, worker) for worker in range(8)]
            wait_until(lambda: codes.count("ok") > 8 + attempt)
            long = pool.submit(served.post, max_tokens=60, steps=60)
            wait_until(lambda: "prime_num_requests_running" in served.get("/metrics").text)
            time.sleep(0.2)
            served.signal(signal.SIGTERM)
            assert len(long.result().json()["outputs"]) == 1
            for each in asking:
                each.result()
        assert served.wait() == 0
        assert set(codes) == {"ok", "draining"}


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
    for text in ("", "{}", '[{"fault": "explode"}]', '[{"fault": "raise", "at": 3}]'):
        file.write_text(text)
        with pytest.raises(ValueError, match=VARIABLE):
            add_faults([], {VARIABLE: str(file)})
