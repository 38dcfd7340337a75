"""The machine a result belongs to: processor and GPU, versions, and the memory that a measurement takes."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the device that computes, processor, cores, threads in use and the load before the run."""
    return {
        "device": str(device),
        "gpu": _describe_gpu(device) if device.type == "cuda" else None,
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average_1min": round(os.getloadavg()[0], 2),
    }


def describe_versions() -> dict[str, str]:
    """Return the versions of what computes."""
    return {name: _version(name) for name in ("mdm-prime", "torch", "triton", "numpy")} | {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cuda": torch.version.cuda or "none",
    }


class PeakGrowth:
    """The result of `peak_growth`; ``num_bytes`` is there once the block has ended, None where nobody tells."""

    num_bytes: int | None = None


@contextmanager
def peak_growth(device: torch.device) -> Iterator[PeakGrowth]:
    """Measure how far the memory of a block rises above what is in use when it begins.

    Args:
        device: of a GPU it is what torch allocates there; of a CPU the resident memory of this process, of which only
            Linux tells the peak.
    """
    growth = PeakGrowth()
    gc.collect()
    before = _start_gpu_peak(device) if device.type == "cuda" else _start_process_peak()
    yield growth
    if before is not None:
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")
        growth.num_bytes = max(peak - before, 0)  # the system counts resident pages in batches


def in_own_process(call: Callable[..., Result], *arguments: Any) -> Result:
    """Return what a function returns in a new process that has as many threads as this one and none of its memory.

    Args:
        call: the function; the process must be able to import it.
        arguments: for it; they are pickled.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_with_threads, torch.get_num_threads(), call, *arguments).result()


def _with_threads(num_threads: int, call: Callable[..., Result], *arguments: Any) -> Result:
    torch.set_num_threads(num_threads)
    return call(*arguments)


def _start_gpu_peak(device: torch.device) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _start_process_peak() -> int | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii", errors="replace").splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(value) * 1024


def _describe_gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "num_multiprocessors": properties.multi_processor_count,
        "l2_cache_bytes": properties.L2_cache_size,
    }


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
