"""What memory a block adds at its peak, a process of its own, and the commit of a tree."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import commit, machine, rates
from benchmarks.machine import in_own_process, peak_growth
from benchmarks.settings import computing_threads


def growth_of_a_tensor() -> int | None:
    with peak_growth(torch.device("cpu")) as growth:
        assert growth.num_bytes is None
        torch.full((2**26,), 1, dtype=torch.uint8)
    return growth.num_bytes


def test_peak_of_a_block_is_what_it_adds_though_it_is_gone_at_its_end() -> None:
    """In a process of its own: from one that has lived long, the system may take idle pages at the same time."""
    growth = in_own_process(growth_of_a_tensor)
    assert growth is not None
    assert 0.9 * 2**26 < growth < 1.5 * 2**26


def test_own_process_has_as_many_threads() -> None:
    threads = torch.get_num_threads() + 1
    with computing_threads(threads):
        assert in_own_process(torch.get_num_threads) == threads


def test_commit_says_whether_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "ROOT", tmp_path)
    assert commit.git_commit() is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "--message", "first")
    assert commit.git_commit() == git("rev-parse", "HEAD")
    (tmp_path / "other").write_text("untracked")
    assert commit.git_commit() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert commit.git_commit() == git("rev-parse", "HEAD") + "+changes"


def test_a_peak_is_never_below_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system counts resident pages in batches, so the peak that it tells may be short of what it told before."""
    monkeypatch.setattr(machine, "_start_process_peak", lambda: 2**20)
    monkeypatch.setattr(machine, "_status_bytes", lambda field: 2**20 - 81920)
    with peak_growth(torch.device("cpu")) as growth:
        pass
    assert growth.num_bytes == 0


def test_memory_is_told_in_bytes() -> None:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    assert machine._status_bytes("VmRSS") == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), rel=0.1)
    before = machine._start_process_peak()
    assert before is not None and before > 2**24  # what is in use when a block begins


def test_rates_are_of_the_fastest_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(rates, "_repeated", lambda *_: [0.5, 0.25, 2.0])
    monkeypatch.setitem(rates._COPY_BYTES, "cpu", 1000)
    # A multiplication and an addition for each of m k n; every byte read and written.
    assert rates.product_rate(torch.float32, cpu, (2, 3, 5)) == 2 * 2 * 3 * 5 / 0.25
    assert rates.copy_bandwidth(cpu) == 2 * 1000 / 0.25


def test_repeats_end_by_number_or_by_time_and_the_first_call_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, now_s = [0], [0.0]

    def call() -> None:
        calls[0] += 1
        now_s[0] += 100.0 if calls[0] == 1 else 0.25

    monkeypatch.setattr(rates.time, "perf_counter", lambda: now_s[0])
    cpu = torch.device("cpu")
    assert (rates.median_seconds(call, 3, cpu), calls) == (0.25, [4])
    calls[0] = 0
    assert (rates.median_seconds(call, 50, cpu, limit_s=0.5), calls) == (0.25, [3])
