"""A benchmark that is ended keeps what it has measured."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import sampler
from benchmarks.document import kept_if_ended
from benchmarks.main import main
from benchmarks.ops import OpsSettings, run_ops
from benchmarks.sampler import run_comparison
from benchmarks.sampler_settings import SamplerSettings

WORKLOAD = """[[workloads]]
model = "tiny"
vocab_size = 300
length = 4
steps = 2
batch_size = [1, 2]
dtype = "float32"
repeats = 1
"""


def ending_at(words: str) -> Callable[[str], None]:
    """A log that ends the process at a line with some words."""

    def log(line: str) -> None:
        if words in line:
            signal.raise_signal(signal.SIGTERM)

    return log


def test_ops_that_were_measured_are_kept() -> None:
    before = signal.getsignal(signal.SIGTERM)
    settings = OpsSettings(device="cpu", scale="smoke", only="embed", repeats=1, num_threads=1)
    document = run_ops(settings, ending_at("embed_planes"))
    assert [entry["op"] for entry in document["ops"]] == [
        "embed_subtokens",
        "embed_subtokens and gradient",
    ]
    assert document["ended_early"] is True
    assert "ended_early" not in run_ops(settings, ending_at("nothing"))
    assert signal.getsignal(signal.SIGTERM) is before


def test_workloads_that_were_measured_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "two.toml"
    file.write_text(WORKLOAD)
    settings = SamplerSettings(
        against="dense_published", device="cpu", num_threads=1, peak_memory="skip", workloads=file
    )
    document = run_comparison(settings, ending_at("workload 2 of 2"))
    assert [entry["settings"]["batch_size"] for entry in document["workloads"]] == [1]
    assert document["ended_early"] is True


def test_without_results_the_process_ends() -> None:
    with pytest.raises(SystemExit) as ended, kept_if_ended({}, []):
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143


def test_workloads_before_a_fault_are_kept_and_the_command_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "two.toml", tmp_path / "result.json"
    file.write_text(WORKLOAD)
    compare, calls = sampler._compare, [0]

    def compared(*arguments: Any) -> dict[str, Any]:
        calls[0] += 1
        if calls[0] == 2:
            raise torch.OutOfMemoryError("memory is short")
        return compare(*arguments)

    monkeypatch.setattr(sampler, "_compare", compared)
    command = ["sampler", "--against", "dense_published", "--device", "cpu", "--num-threads", "1"]
    command += ["--peak-memory", "skip", "--workloads", str(file), "--output", str(output)]
    assert main(command) == 1
    assert capsys.readouterr().err.endswith("prime-bench: memory is short\n")
    document = json.loads(output.read_text())
    assert document["failed"] == "memory is short"
    assert [entry["settings"]["batch_size"] for entry in document["workloads"]] == [1]


def test_a_fault_without_results_is_raised() -> None:
    with pytest.raises(RuntimeError, match="planted"), kept_if_ended({}, []):
        raise RuntimeError("planted")
