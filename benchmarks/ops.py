"""`prime-bench kernels`: every op on each backend, its time beside what the device can copy and multiply."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from benchmarks.document import document_head, kept_if_ended
from benchmarks.op_cases import OPS, Op, describe_size, num_input_sets
from benchmarks.op_inputs import Inputs, Size, tensors_of
from benchmarks.rates import measure_ceilings, synchronise
from benchmarks.settings import BenchSettings, Log, computing_threads
from kernels.backend import Backend, choose_backend

# What a processor's last cache holds at most, for one whose size torch does not tell.
_CPU_CACHE_BYTES = 2**25
_MIN_TIMED_S = 0.02
# CUDA's queue takes 1,024 launches before it makes the host wait, and a call is some of them.
_MAX_CALLS = 100
_MAX_HEAD_START_S = 0.05
_SLEEP_CYCLES_PER_S = 2e9  # of a GPU's clock


class OpsSettings(BenchSettings):
    """Which ops are measured, and how."""

    backend: Literal["auto", "reference", "triton"] = Field(
        default="auto",
        description="reference, triton (on a CPU only in its interpreter), or auto: all that run here at full speed",
    )
    scale: Literal["full", "smoke"] = Field(
        default="full", description="full: sizes of real use on this kind of device; smoke: tiny ones"
    )
    only: str | None = Field(default=None, description="ops whose names start with this text; default: all")
    repeats: int = Field(default=5, ge=1, le=100, description="timed series of each op; their median counts")

    @field_validator("only")
    @classmethod
    def _check_only(cls, value: str | None) -> str | None:
        if value is not None and not any(name.startswith(value) for name in OPS):
            raise ValueError(f"no op starts with {value!r}: {', '.join(OPS)}")
        return value


def run_ops(settings: OpsSettings, log: Log) -> dict[str, Any]:
    """Measure all ops.

    Args:
        settings: which ops on which backends.
        log: takes progress lines.

    Returns:
        The JSON document described in benchmarks/README.md, without `command`.
    """
    device = settings.torch_device
    with computing_threads(settings.num_threads):
        document = document_head("kernels", settings)
        rates = measure_ceilings(device)
        results: list[dict[str, Any]] = []
        with kept_if_ended(document, results):
            for name, op in OPS.items():
                if settings.only is not None and not name.startswith(settings.only):
                    continue
                for size in op.sizes["smoke" if settings.scale == "smoke" else device.type]:
                    for backend in _backends(op, settings.backend, device):
                        log(f"{name} {describe_size(size)} {backend}")
                        entry = {"op": name, "size": describe_size(size), "backend": backend}
                        results.append(entry | _measure(op, size, backend, settings, rates))
        return document | {"rates": rates, "ops": results}


def _backends(op: Op, wanted: Backend, device: torch.device) -> list[Backend]:
    """Return the backends of an op that run here."""
    has_kernel = "backend" in inspect.signature(op.function).parameters
    if wanted != "auto":
        return [wanted] if has_kernel or wanted == "reference" else []
    fast = choose_backend("auto", torch.empty(0, device=device))
    return ["reference", "triton"] if has_kernel and fast == "triton" else ["reference"]


def _measure(
    op: Op, size: Size, backend: Backend, settings: OpsSettings, rates: dict[str, Any]
) -> dict[str, Any]:
    """Return time, bytes, FLOPs and shares of one op at one size on one backend; or why there is none."""
    device = settings.torch_device
    num_bytes, num_flops = op.num_bytes(size), op.num_flops(size)
    try:
        sets = _input_sets(op, size, settings.seed, device)
        seconds = _seconds(op, sets, backend, device, settings.repeats)
    except (ValueError, RuntimeError) as error:  # also what Triton and CUDA raise: the other ops go on
        return {"error": f"{type(error).__name__}: {error}".rstrip(": "), "seconds": None}
    bandwidth, product = rates["copy_bytes_per_s"], rates["product_flops_per_s"][op.product]
    return {
        "seconds": seconds,
        "bytes": num_bytes,
        "flops": num_flops,
        "bytes_per_s": num_bytes / seconds,
        "flops_per_s": num_flops / seconds,
        "share_of_copy_bandwidth": num_bytes / seconds / bandwidth,
        "share_of_product_rate": num_flops / seconds / product,
        "num_input_sets": len(sets),
    }


def _input_sets(op: Op, size: Size, seed: int, device: torch.device) -> list[Inputs]:
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else None
    generator = torch.Generator(device).manual_seed(seed)
    first = op.inputs(size, generator, device)
    held = sum(tensor.nbytes for tensor in tensors_of(first))
    count = num_input_sets(held, _CPU_CACHE_BYTES if cache is None else cache)
    return [first] + [op.inputs(size, generator, device) for _ in range(count - 1)]


def _seconds(op: Op, sets: list[Inputs], backend: Backend, device: torch.device, num_repeats: int) -> float:
    """Return the median over series of the time of one call; the calls of a series take the input sets in turn."""
    call = _caller(op, backend)
    call(sets[0])  # compiles
    synchronise(device)
    started = time.perf_counter()
    call(sets[1])
    synchronise(device)
    once_s = max(time.perf_counter() - started, 1e-6)
    num_calls = max(1, min(_MAX_CALLS, round(_MIN_TIMED_S / once_s)))
    series = []
    for repeat in range(num_repeats):
        chosen = [sets[(repeat * num_calls + index) % len(sets)] for index in range(num_calls)]
        head_start_s = min(once_s * num_calls, _MAX_HEAD_START_S)
        series.append(_series_seconds(call, chosen, device, head_start_s) / num_calls)
    return statistics.median(series)


def _series_seconds(
    call: Callable[[Inputs], None], chosen: list[Inputs], device: torch.device, head_start_s: float
) -> float:
    """Return the time of some calls one after the other, on a GPU by the GPU's own clock.

    Args:
        call: what is timed.
        chosen: its inputs, one after the other.
        device: where it computes.
        head_start_s: about as long as the host takes to queue the calls.
    """
    if device.type == "cpu":
        started = time.perf_counter()
        for inputs in chosen:
            call(inputs)
        return time.perf_counter() - started
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)  # the device need not be the current one
    with torch.cuda.device(device):
        # To queue a call takes the host longer than many a kernel runs: the device waits until they are queued, or it
        # would idle between them, and the time would be the host's.
        torch.cuda._sleep(round(_SLEEP_CYCLES_PER_S * head_start_s))
    start.record(stream)
    for inputs in chosen:
        call(inputs)
    stop.record(stream)
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def _caller(op: Op, backend: Backend) -> Callable[[Inputs], None]:
    has_kernel = "backend" in inspect.signature(op.function).parameters
    options: dict[str, Any] = {"backend": backend} if has_kernel else {}

    def forward(inputs: Inputs) -> None:
        with torch.inference_mode():
            op.function(**inputs, **options)

    upstream: list[Tensor] = []  # the gradient of the result, made once: in training it is there

    def forward_and_backward(inputs: Inputs) -> None:
        wanted = {name: _detached(inputs[name]) for name in op.gradient_of}
        result = op.function(**(inputs | wanted), **options)
        if not upstream:
            upstream.append(torch.ones_like(result))
        torch.autograd.grad(result, list(tensors_of(wanted)), upstream[0])

    return forward_and_backward if op.gradient_of else forward


def _detached(argument: Any) -> Any:
    """Return a tensor, or a named tuple of tensors, of which a gradient is wanted."""
    if isinstance(argument, Tensor):
        return argument.detach().requires_grad_()
    return type(argument)(*(part.detach().requires_grad_() for part in argument))
