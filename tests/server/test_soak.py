"""Endurance: under a mixed load a server keeps its memory, threads and files, and gives the same bytes after it.

A short soak always runs; MDM_SOAK_S=600 makes it ten minutes. The bound of the memory is the same, so that the long one
finds leaks of some hundred bytes a request, and the short one those of some KB. The same check must reject a server
with a leak in it that is hardly larger than the smallest which it claims to find.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.mixed_load import Load, loading
from tests.server.mixed_requests import EXPECTED, FLAGS
from tests.server.process_watch import WINDOW, Reading, Watch, growth_bytes, read_process
from tests.server.processes import Served
from tests.server.running import wait_until

SHORT_S = 10.0
SOAK_S = float(os.environ.get("MDM_SOAK_S", str(SHORT_S)))
# The heaps have nearly their size after so many requests.
WARM_UP_REQUESTS = 600
WARM_UP_S = max(6.0, SOAK_S / 10)
LIMIT_S = 20 * SOAK_S + 240

pytestmark = [
    pytest.mark.skipif(
        not Path("/proc/self/smaps_rollup").exists(), reason="reads what Linux tells in /proc"
    ),
    pytest.mark.timeout(LIMIT_S + 120),
]

MIB = 2**20
NUM_CLIENTS = 6
# Second threads of pools (`server.workers`) that the warm-up may not have needed; a leak of threads has hundreds.
LATE_THREADS = 3
# Most that the memory of a sound server may grow, in whatever time: heaps that still settle take about 1 MiB.
MOST_BYTES = 4 * MIB
# The smallest leak, over the whole of the load, that is sure to be found; half as much again is planted.
SMALLEST_BYTES = MOST_BYTES / (1 - WINDOW)
PLANTED_BYTES = 1.5 * SMALLEST_BYTES
# About as many calls a second are made, so that the leak takes about as long as the soak.
CALLS_PER_S = 150

CANARY: dict[str, Any] = {"prompt": "canary", "max_tokens": 9, "seed": 3, "n": 2}


class Soak(NamedTuple):
    """What a soak found.

    Attributes:
        growth_bytes: of the memory under the load that followed the warm-up.
        seconds: that this load lasted.
        num_requests: that it made.
        num_calls: of denoisers, in that time.
        counts: of all requests, by kind and status.
        before: at rest, between the warm-up and this load.
        after: at rest, after it.
    """

    growth_bytes: float
    seconds: float
    num_requests: int
    num_calls: float
    counts: Counter[tuple[str, int]]
    before: Reading
    after: Reading

    @property
    def leaks(self) -> bool:
        return self.growth_bytes > MOST_BYTES

    def __str__(self) -> str:
        rest_bytes = self.after.memory_bytes - self.before.memory_bytes
        return (
            f"{self.num_requests} requests and {self.num_calls:.0f} calls in {self.seconds:.0f} s: "
            f"{self.growth_bytes / MIB:+.2f} MiB under load, {rest_bytes / MIB:+.2f} MiB at rest "
            f"({self.before} -> {self.after}); {dict(self.counts)}"
        )


def soak(served: Served, enough: Callable[[float, float], bool]) -> Soak:
    """Warm a server up, then load it until ``enough(seconds, calls)``; threads and files must come back after it.

    Where others use the machine it takes longer: each kind of request must have been answered twice.
    """
    with loading(served.url, NUM_CLIENTS, seed=1) as first:
        time.sleep(WARM_UP_S)
        wait_until(lambda: bool(first.failures) or is_warm(first), LIMIT_S)
    before, calls = at_rest(served), num_calls(served)
    seconds, calls_made = 0.0, 0.0
    with loading(served.url, NUM_CLIENTS, seed=2) as second, Watch(served.popen.pid) as watch:
        started = time.monotonic()
        done = False
        while not (second.failures or done) and seconds < LIMIT_S:
            time.sleep(0.5)
            seconds, calls_made = time.monotonic() - started, num_calls(served) - calls
            done = enough(seconds, calls_made) and has_met_all(second.counts)
    assert not [*first.failures, *second.failures]
    wait_until(lambda: read_process(served.popen.pid).num_files <= before.num_files)
    after = at_rest(served)
    assert after.num_threads <= before.num_threads + LATE_THREADS
    assert after.num_files <= before.num_files
    counts = first.counts + second.counts
    return Soak(watch.growth_bytes, seconds, second.num_requests, calls_made, counts, before, after)


def is_warm(load: Load) -> bool:
    return load.num_requests >= WARM_UP_REQUESTS and has_met_all(load.counts)


def has_met_all(counts: Counter[tuple[str, int]]) -> bool:
    return all(counts[each] for each in EXPECTED)


def metric(served: Served, *names: str) -> float:
    """The sum of some metrics over their models."""
    families = text_string_to_metric_families(served.get("/metrics").text)
    return sum(sample.value for family in families for sample in family.samples if sample.name in names)


def num_calls(served: Served) -> float:
    return metric(served, "prime_denoiser_calls_total")


def at_rest(served: Served) -> Reading:
    """Wait until nobody's rows run or wait, and connections are closed."""
    wait_until(lambda: not metric(served, "prime_num_requests_running", "prime_num_requests_waiting"))
    time.sleep(1)
    return read_process(served.popen.pid)


@pytest.mark.alone
def test_a_mixed_load_leaves_nothing_behind(model_path: Path, images_path: Path) -> None:
    with Served("--model", str(model_path), "--model", str(images_path), *FLAGS) as served:
        outputs = served.outputs(**CANARY)
        found = soak(served, lambda seconds, calls: seconds >= SOAK_S)
        print(found)
        assert not found.leaks, str(found)
        assert served.outputs(**CANARY) == outputs
        assert served.get("/ready").status_code == served.get("/health").status_code == 200


@pytest.mark.alone
def test_the_same_check_finds_a_leak(model_path: Path, images_path: Path) -> None:
    leaked_bytes = math.ceil(PLANTED_BYTES / CALLS_PER_S / SOAK_S)
    kept_bytes = sys.getsizeof(bytes(leaked_bytes)) + 8  # the object, and its place in a list
    faults: list[Any] = [{"fault": "leak", "calls": 10**9, "leaked_bytes": leaked_bytes}]
    models = ["--model", str(model_path), "--model", str(images_path)]
    with Served(*models, *FLAGS, faults=faults) as served:
        found = soak(served, lambda seconds, calls: calls * kept_bytes >= PLANTED_BYTES)
        planted_bytes = found.num_calls * kept_bytes
        print(f"{kept_bytes} bytes a call, {planted_bytes / found.num_requests:.0f} a request; {found}")
        assert found.leaks, str(found)
        # A sound server may grow beside it.
        assert abs(found.growth_bytes - (1 - WINDOW) * planted_bytes) < MOST_BYTES, str(found)


def test_growth_is_not_noise() -> None:
    rng = random.Random(0)
    noisy = [64 * MIB + rng.randrange(20 * MIB) for _ in range(200)]
    assert abs(growth_bytes(noisy)) < MOST_BYTES
    assert growth_bytes([100 * MIB] * 30 + [300 * MIB] * 3 + [100 * MIB] * 30) == 0  # a peak


@pytest.mark.parametrize("total_bytes", [int(SMALLEST_BYTES), int(20 * SMALLEST_BYTES)])
def test_growth_is_a_leak_of_any_pace(total_bytes: int) -> None:
    steady = [number * total_bytes // 199 for number in range(200)]
    assert growth_bytes(steady) == pytest.approx((1 - WINDOW) * total_bytes, rel=0.01)
    in_steps = [each - each % (total_bytes // 5) for each in steady]
    assert growth_bytes(in_steps) == pytest.approx((1 - WINDOW) * total_bytes, rel=0.01)
    assert growth_bytes([0] * 100 + [total_bytes] * 100) == total_bytes  # all at once


HOLDING = """
import threading
print(flush=True)
input()
held = b"x" * 2**26, [open("/dev/null") for _ in range(2)]
for _ in range(3):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print(flush=True)
input()
"""


def test_what_a_process_holds_is_read() -> None:
    command = [sys.executable, "-c", HOLDING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as popen:
        assert popen.stdin is not None and popen.stdout is not None
        popen.stdout.readline()
        before = read_process(popen.pid)
        print(file=popen.stdin, flush=True)
        popen.stdout.readline()
        now = read_process(popen.pid)
        print(file=popen.stdin, flush=True)
    assert now.memory_bytes - before.memory_bytes == pytest.approx(64 * MIB, rel=0.05)
    assert now.num_threads == before.num_threads + 3
    assert now.num_files == before.num_files + 2
