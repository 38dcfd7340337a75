"""The machine a result belongs to: what it is, how fast it multiplies and copies, what a process may need."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PRODUCT_SHAPE = (512, 768, 3072)
"""(m, k, n) of the measured matrix product: 512 tokens through the first half of the small model's MLP."""

_COPY_BYTES = 256 * 2**20


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, threads in use and the load before the run."""
    return {
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average_1min": round(os.getloadavg()[0], 2),
    }


def describe_versions() -> dict[str, str]:
    """Return the versions of what computes."""
    return {name: _version(name) for name in ("mdm-prime", "torch", "numpy")} | {
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def git_commit() -> str | None:
    """Return the commit of this source tree, with "+changes" if files differ; None outside a repository."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--verify", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def median_seconds(call: Callable[[], object], num_repeats: int) -> float:
    """Return the median time of a call after one that does not count."""
    call()
    seconds = []
    for _ in range(num_repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


@torch.inference_mode()
def product_rate(dtype: torch.dtype, num_repeats: int = 50) -> float:
    """Return the FLOP/s of one matrix product of `PRODUCT_SHAPE`, as a linear layer computes it."""
    m, k, n = PRODUCT_SHAPE
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(m, k, generator=generator).to(dtype)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    seconds = median_seconds(lambda: torch.nn.functional.linear(left, weight), num_repeats)
    return 2 * m * k * n / seconds


def copy_bandwidth(num_repeats: int = 5) -> float:
    """Return the bytes per second, read and written, of a copy that fits no cache."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / median_seconds(lambda: target.copy_(source), num_repeats)


def reset_peak_memory() -> int | None:
    """Start a new peak of this process's resident memory and return the present one in bytes.

    Linux only; None where the kernel does not offer it.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def peak_memory() -> int:
    """Return the largest resident memory in bytes since `reset_peak_memory`."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii", errors="replace").splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(value) * 1024


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
