"""`prime-bench sampler`: this project's sampler against the published one, in one run on the same weights."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import torch

from benchmarks.command_line import UsageError
from benchmarks.contenders import (
    DTYPES,
    DTypeName,
    Outcome,
    SamplerName,
    build_checkpoint,
    build_sampler,
    measure_peak_memory,
)
from benchmarks.costs import Cost, dense_cost, planned_cost, reveal_probabilities, trunk_flops
from benchmarks.dense_published import PUBLISHED_EPS
from benchmarks.document import document_head, kept_if_ended
from benchmarks.extrapolation import expected_calls
from benchmarks.machine import peak_growth
from benchmarks.rates import measure_ceilings, median_seconds, product_rate, timed
from benchmarks.sampler_settings import SamplerSettings, read_workloads
from benchmarks.settings import Log, computing_threads
from benchmarks.workloads import Workload
from kernels.backend import choose_backend
from prime_core.checkpoint import Checkpoint
from prime_core.config import DiTConfig
from prime_core.models.denoiser import device_of

WARM_UP_STEPS = 4

Pair = tuple[SamplerName, DTypeName]


def run_comparison(settings: SamplerSettings, log: Log) -> dict[str, Any]:
    """Measure all samplers, alternating, and everything needed to read the figures.

    Args:
        settings: what to compare.
        log: takes progress lines.

    Returns:
        The JSON document described in benchmarks/README.md, without `command`.

    Raises:
        UsageError: if the file of workloads cannot be used, or CUDA graphs are asked for where there are none.
    """
    if settings.cuda_graphs:
        _needs_cuda(settings.torch_device)
    many = None if settings.workloads is None else read_workloads(settings, settings.workloads)
    with computing_threads(settings.num_threads):
        document = document_head("sampler", settings)
        rates = measure_ceilings(settings.torch_device)
        document["rates"] = rates
        if many is None:
            return document | _compare(settings, rates, log)
        entries: list[dict[str, Any]] = []
        with kept_if_ended(document, entries):
            for number, single in enumerate(many, 1):
                log(f"workload {number} of {len(many)}: {single.workload.shape}")
                entries.append({"settings": single.model_dump(mode="json")} | _compare(single, rates, log))
        return document | {"workloads": entries}


def _needs_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise UsageError(f"--cuda-graphs: needs a CUDA device, and this one is {device}; leave it out")


def _compare(settings: SamplerSettings, rates: dict[str, Any], log: Log) -> dict[str, Any]:
    """Measure one workload."""
    products = rates["product_flops_per_s"]
    workload, device = settings.workload, settings.torch_device
    predicted = _predict(workload, products, rates["copy_bytes_per_s"], device)
    for name, ratio in _ratios(predicted, settings.dtypes, device).items():
        log(f"predicted ratio {name}: {_shown(ratio)}")
    checkpoints = {dtype: build_checkpoint(workload, dtype, device) for dtype in settings.dtypes}
    num_parameters = sum(p.numel() for p in checkpoints[settings.dtypes[0]].denoiser.parameters())
    runs = _measure(settings, checkpoints, log)
    trunks = [_trunk(settings, checkpoints[dtype], dtype, products[dtype]) for dtype in settings.dtypes]
    checkpoints.clear()
    for run in runs:
        if device.type == "cpu" and settings.peak_memory == "measure":
            log(f"peak memory of {run['sampler']} {run['dtype']}")
            run["peak_memory_above_weights_bytes"] = measure_peak_memory(
                run["sampler"], workload, run["dtype"]
            )
        run["predicted_s"] = predicted[run["sampler"], run["dtype"]]
    measured = {(run["sampler"], run["dtype"]): run["median_s"] for run in runs}
    ratios = _ratios(measured, settings.dtypes, device), _ratios(predicted, settings.dtypes, device)
    labels = [run["extrapolated"]["label"] for run in runs if run["extrapolated"]]
    return {
        "workload": workload.shape,
        "model": workload.network.model_dump(mode="json") | {"num_parameters": num_parameters},
        "runs": runs,
        "ratios": {
            name: {
                "measured": ratios[0][name],
                "predicted": ratios[1][name],
                **({"note": f"the baseline is {labels[0]}"} if labels else {}),
            }
            for name in ratios[0]
        },
        "trunk": trunks,
    }


def _predict(
    workload: Workload, products: dict[str, float], bandwidth: float, device: torch.device
) -> dict[Pair, float]:
    """Predict the seconds of every sampler and precision from FLOPs and bytes."""
    network, schedule = workload.network, workload.config.schedule.build()
    reveal = reveal_probabilities(schedule, workload.num_steps)
    shape = (workload.num_rows, workload.length)
    codec = (workload.target_length, workload.vocab_size)
    calls = None  # the image sampler calls in every step
    if isinstance(network, DiTConfig):
        num_digits = workload.num_tokens * workload.target_length
        calls = expected_calls(schedule, workload.num_steps, num_digits, PUBLISHED_EPS)
    fused = choose_backend("auto", torch.empty(0, device=device)) == "triton"
    planned = planned_cost(network, *shape, reveal, *codec, fused=fused)
    costs: dict[SamplerName, Cost] = {
        "planned": planned,
        "planned_graphs": planned,  # launches are in no prediction
        "dense_published": dense_cost(network, *shape, workload.num_steps, *codec, calls),
    }
    dtypes: tuple[DTypeName, ...] = ("float32", "bfloat16")
    return {
        (name, dtype): cost.predicted_s(products[dtype], bandwidth)
        for name, cost in costs.items()
        for dtype in dtypes
    }


def _measure(
    settings: SamplerSettings, checkpoints: dict[DTypeName, Checkpoint], log: Log
) -> list[dict[str, Any]]:
    """Time all samplers in turn, ``repeats`` times, so that a slow minute slows all of them."""
    workload, device = settings.workload, settings.torch_device
    pairs: list[Pair] = [(sampler, dtype) for dtype in settings.dtypes for sampler in settings.samplers]
    samplers = {
        pair: build_sampler(
            pair[0], checkpoints[pair[1]], workload, settings.dense_steps, settings.cuda_graphs
        )
        for pair in pairs
    }
    seconds: dict[Pair, list[float]] = {pair: [] for pair in pairs}
    peaks: dict[Pair, int | None] = dict.fromkeys(pairs)
    outcomes: dict[Pair, Outcome] = {}
    for dtype, checkpoint in checkpoints.items():
        log(f"warming up {dtype}")
        _full_call(checkpoint, workload)
        if device.type == "cuda":
            # Triton compiles its kernels at their first call: a few steps meet them all.
            few = replace(workload, num_steps=min(workload.num_steps, WARM_UP_STEPS))
            build_sampler("planned", checkpoint, few)()
            if "planned_graphs" in settings.samplers:
                samplers["planned_graphs", dtype]()  # graphs are recorded when a call has come a few times
    for repeat in range(settings.repeats):
        for pair in pairs:
            with peak_growth(device) as growth, timed(device) as elapsed:
                outcomes[pair] = samplers[pair]()
            extrapolation = outcomes[pair].extrapolation
            seconds[pair].append(elapsed.seconds if extrapolation is None else extrapolation.seconds)
            # What graphs compute in was allocated when they were recorded, and torch counts it no more.
            if device.type == "cuda" and settings.peak_memory == "measure" and pair[0] != "planned_graphs":
                peaks[pair] = growth.num_bytes
            log(
                f"repeat {repeat + 1} of {settings.repeats}: {pair[0]} {pair[1]} {seconds[pair][-1]:.2f} s"
                + ("" if extrapolation is None else f", {extrapolation.label}")
            )
    entries = [_run_entry(pair, seconds[pair], outcomes[pair], workload, peaks[pair]) for pair in pairs]
    for pair, entry in zip(pairs, entries, strict=True):
        if pair[0] == "planned_graphs":
            entry["graph_replays"] = outcomes[pair].num_replays
            entry["same_samples"] = torch.equal(outcomes[pair].tokens, outcomes["planned", pair[1]].tokens)
    return entries


def _run_entry(
    pair: Pair, seconds: list[float], outcome: Outcome, workload: Workload, peak_bytes: int | None
) -> dict[str, Any]:
    extrapolation = outcome.extrapolation
    return {
        "sampler": pair[0],
        "dtype": pair[1],
        "seconds": seconds,
        "median_s": statistics.median(seconds),
        "tokens_per_s": workload.num_tokens / statistics.median(seconds),
        "denoiser_calls": outcome.num_calls,
        "row_steps": outcome.num_row_steps,
        "extrapolated": None if extrapolation is None else extrapolation.as_dict(),
        "peak_memory_above_weights_bytes": peak_bytes,
    }


def _full_call(checkpoint: Checkpoint, workload: Workload) -> Any:
    """Run the trunk on all rows, every position masked and asked for."""
    device = device_of(checkpoint.denoiser)
    y_t = torch.full(
        (workload.num_tokens, workload.target_length), checkpoint.codec.mask_index, device=device
    )
    lengths = [workload.length] * workload.num_rows
    network = workload.network
    labels = None
    if not isinstance(network, DiTConfig) and network.labels != "none":
        labels = torch.arange(workload.num_rows, device=device) % network.num_labels
    with torch.inference_mode():
        return checkpoint.denoiser.features(y_t, lengths, labels=labels)


def _trunk(
    settings: SamplerSettings, checkpoint: Checkpoint, dtype: DTypeName, product_flops_per_s: float
) -> dict[str, Any]:
    """Measure the trunk alone on a full call against the product rate, which is measured again before and after it.

    What else a machine does may slow it for a while, and the rate must be that of the same while.
    """
    workload, device = settings.workload, settings.torch_device
    before = product_rate(DTYPES[dtype], device)
    seconds = median_seconds(lambda: _full_call(checkpoint, workload), 5, device)
    product_flops_per_s = max(before, product_rate(DTYPES[dtype], device), product_flops_per_s)
    flops = trunk_flops(workload.network, workload.num_tokens, workload.length)
    return {
        "dtype": dtype,
        "flops": flops,
        "seconds": seconds,
        "flops_per_s": flops / seconds,
        "product_flops_per_s": product_flops_per_s,
        "share_of_product_rate": flops / seconds / product_flops_per_s,
    }


def _ratios(
    seconds: dict[Pair, float], dtypes: tuple[DTypeName, ...], device: torch.device
) -> dict[str, float | None]:
    """Return how many times faster the planned sampler is; None where a precision was not run.

    "as_published": in its best precision against the baseline in the precision that is published: float32 on a CPU,
    bfloat16 (its autocast, with weights cast once) on a GPU.
    """
    equal = {
        f"equal_{dtype}": seconds["dense_published", dtype] / seconds["planned", dtype] for dtype in dtypes
    }
    best = min(seconds["planned", dtype] for dtype in dtypes)
    published: DTypeName = "float32" if device.type == "cpu" else "bfloat16"
    as_published = seconds["dense_published", published] / best if published in dtypes else None
    return {"as_published": as_published, **equal}


def _shown(ratio: float | None) -> str:
    return "not run" if ratio is None else f"{ratio:.1f}"
