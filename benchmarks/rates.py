"""Time on a device, and the device's ceilings: how fast it multiplies and copies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

PRODUCT_SHAPES = {"cpu": (512, 768, 3072), "cuda": (8192, 8192, 8192)}
"""(m, k, n) of the measured matrix product: on a CPU 512 tokens through the first half of the small model's MLP, on a
GPU a product that is large enough to fill it."""

# What is copied fits no cache: 256 MB on a CPU, 2 GB on a GPU.
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
_PRODUCT_REPEATS = {"cpu": 50, "cuda": 20}


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Elapsed:
    """The result of `timed`; ``seconds`` is there once the block has ended."""

    seconds: float = 0.0


@contextmanager
def timed(device: torch.device) -> Iterator[Elapsed]:
    """Time a block, to the end of what it gave the device to do."""
    elapsed = Elapsed()
    synchronise(device)
    started = time.perf_counter()
    yield elapsed
    synchronise(device)
    elapsed.seconds = time.perf_counter() - started


def median_seconds(
    call: Callable[[], object], num_repeats: int, device: torch.device, limit_s: float = 1.0
) -> float:
    """Return the median time of a call after one that does not count.

    Args:
        call: what to time.
        num_repeats: how often, at most.
        device: where it computes.
        limit_s: no further repeat is started after so many seconds.
    """
    return statistics.median(_repeated(call, num_repeats, device, limit_s))


def _repeated(
    call: Callable[[], object], num_repeats: int, device: torch.device, limit_s: float = 1.0
) -> list[float]:
    call()
    seconds: list[float] = []
    while len(seconds) < num_repeats and sum(seconds) < limit_s:
        with timed(device) as elapsed:
            call()
        seconds.append(elapsed.seconds)
    return seconds


@torch.inference_mode()
def product_rate(
    dtype: torch.dtype, device: torch.device, shape: tuple[int, int, int] | None = None
) -> float:
    """Return the FLOP/s of one matrix product, as a linear layer computes it, at its fastest: a ceiling.

    Args:
        dtype: of both factors.
        device: where.
        shape: (m, k, n); None takes that of `PRODUCT_SHAPES`.
    """
    m, k, n = PRODUCT_SHAPES[device.type] if shape is None else shape
    # Drawn where they are used: a processor takes seconds for as many numbers as fill a GPU.
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(m, k, generator=generator, device=device).to(dtype)
    weight = torch.randn(n, k, generator=generator, device=device).to(dtype)
    seconds = _repeated(
        lambda: torch.nn.functional.linear(left, weight), _PRODUCT_REPEATS[device.type], device
    )
    return 2 * m * k * n / min(seconds)


def copy_bandwidth(device: torch.device, num_repeats: int = 5) -> float:
    """Return the bytes per second, read and written, of a copy that fits no cache."""
    num_bytes = _COPY_BYTES[device.type]
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / min(_repeated(lambda: target.copy_(source), num_repeats, device))


def measure_ceilings(device: torch.device) -> dict[str, object]:
    """Return product rates by precision and the copy bandwidth, as they stand in a document under ``rates``.

    Measured once in a process for each device and number of threads.
    """
    return _ceilings(device, torch.get_num_threads())


@cache
def _ceilings(device: torch.device, num_threads: int) -> dict[str, object]:
    return {
        "product_shape": PRODUCT_SHAPES[device.type],
        "product_flops_per_s": {
            str(dtype).removeprefix("torch."): product_rate(dtype, device)
            for dtype in (torch.float32, torch.bfloat16)
        },
        "copy_bytes_per_s": copy_bandwidth(device),
    }
