"""The samplers that are compared, on the same random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.dense_images import DenseImages
from benchmarks.dense_published import DensePublished
from benchmarks.extrapolation import Extrapolation, extrapolate
from benchmarks.machine import in_own_process, peak_growth
from benchmarks.workloads import Workload
from prime_core.checkpoint import Checkpoint
from prime_core.config import UNetConfig
from prime_core.models.build import build_denoiser
from prime_core.models.denoiser import device_of
from prime_core.models.dit import ScaleNorm
from prime_core.models.graphs import cuda_graphs
from prime_core.models.unet import UNet
from prime_core.sampling.sample import sample

SamplerName = Literal["planned", "planned_graphs", "dense_published"]
DTypeName = Literal["float32", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Outcome:
    """What one run did.

    Attributes:
        x_0: (B, L) int64, the samples; None if the run was not taken to its end.
        num_calls: denoiser calls.
        num_row_steps: rows of all denoiser calls.
        extrapolation: how the time of a run that was not taken to its end follows from a part of it.
        num_replays: calls whose trunk was a CUDA graph; None for samplers without graphs.
    """

    x_0: Tensor | None
    num_calls: int
    num_row_steps: int
    extrapolation: Extrapolation | None = None
    num_replays: int | None = None

    @property
    def tokens(self) -> Tensor:
        """The samples of a run that was taken to its end."""
        assert self.x_0 is not None, "an extrapolated run has no samples"
        return self.x_0


def build_checkpoint(workload: Workload, dtype: DTypeName, device: torch.device | str = "cpu") -> Checkpoint:
    """Return a model with seeded random weights; bfloat16 weights are those of float32, cast once.

    No weight is zero: the logits are not flat and every branch of the network counts. They are drawn on the device: a
    processor takes seconds for as many.
    """
    device = torch.device(device)
    config, generator = workload.config, torch.Generator(device).manual_seed(workload.seed)
    # The network draws its own initial weights.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        denoiser = build_denoiser(config)
    norms = {
        id(module.weight) for module in denoiser.modules() if isinstance(module, ScaleNorm | nn.GroupNorm)
    }
    for parameter in denoiser.parameters():
        width = parameter[0].numel() if parameter.ndim > 1 else 2500
        is_norm = id(parameter) in norms
        weights = torch.empty_like(parameter).normal_(0, width**-0.5, generator=generator)
        parameter.data = (weights + 1 if is_norm else weights).to(DTYPES[dtype])
    denoiser = denoiser.to(device).eval().requires_grad_(False)
    denoiser.prepare()
    return Checkpoint(
        Path("random-weights"),
        config,
        config.codec.build(),
        denoiser.schedule,
        None,
        denoiser,
        DTYPES[dtype],
    )


def build_sampler(
    name: SamplerName,
    checkpoint: Checkpoint,
    workload: Workload,
    dense_steps: int = 0,
    max_graphs: int = 0,
) -> Callable[[], Outcome]:
    """Return a function that samples the whole workload once; the same noise at every call.

    Args:
        name: which sampler.
        checkpoint: the model.
        workload: what to sample.
        dense_steps: steps of the dense sampler to time, from which the whole follows; 0 runs it to its end.
        max_graphs: most CUDA graphs of the planned sampler with graphs, which keeps them from call to call.

    Raises:
        ValueError: the planned sampler with graphs runs on no CUDA device, or has no graphs.
    """
    if name == "planned":
        return _planned(checkpoint, workload)
    if name == "planned_graphs":
        return _with_graphs(checkpoint, workload, max_graphs)
    return _dense(checkpoint, workload, dense_steps)


def build_dense(checkpoint: Checkpoint, workload: Workload) -> DensePublished:
    """Return the dense sampler of a workload, of text or of images."""
    codec, schedule, network = checkpoint.codec, checkpoint.schedule, checkpoint.denoiser
    num_rows, length = workload.num_rows, workload.length
    if not isinstance(network, UNet):
        return DensePublished(network, codec, schedule, num_rows=num_rows, length=length)
    has_labels = network.config.labels != "none"
    labels = torch.arange(num_rows) % network.config.num_labels if has_labels else None
    return DenseImages(network, codec, schedule, num_rows=num_rows, length=length, labels=labels)


def _planned(checkpoint: Checkpoint, workload: Workload) -> Callable[[], Outcome]:
    """The sampler of this project, through the door that the server's rows take: `prime_core.sample`."""
    is_images = isinstance(checkpoint.config.model, UNetConfig)
    # Images: the law of the published sampler, every digit drawn alone.
    fields = {"sampler": "published"} if is_images else {"max_tokens": workload.length}

    def run() -> Outcome:
        progress: list[int] = []
        samples = sample(
            checkpoint,
            n=workload.num_rows,
            steps=workload.num_steps,
            seed=workload.seed,
            max_rows=workload.num_rows,
            progress=lambda done, total: progress.append(done),
            **fields,
        )
        if is_images:
            tokens = torch.stack([output.pixels.permute(2, 0, 1).flatten() for output in samples]).long()
        else:
            tokens = torch.tensor([output.token_ids for output in samples])
        return Outcome(tokens, len(progress), sum(output.nfe for output in samples))

    return run


def _with_graphs(checkpoint: Checkpoint, workload: Workload, max_graphs: int) -> Callable[[], Outcome]:
    """The planned sampler with CUDA graphs, which the network has in its own runs only: all share the network."""
    network = checkpoint.denoiser
    graphs = cuda_graphs(max_graphs, device_of(network))
    planned = _planned(checkpoint, workload)

    def run() -> Outcome:
        before = graphs.num_replays
        network.graphs = graphs
        try:
            outcome = planned()
        finally:
            network.graphs = None
        return replace(outcome, num_replays=graphs.num_replays - before)

    return run


def _dense(checkpoint: Checkpoint, workload: Workload, dense_steps: int) -> Callable[[], Outcome]:
    device = device_of(checkpoint.denoiser)
    # On a CPU fresh buffers cost page faults, so they are kept; on a GPU they would count as another sampler's memory.
    kept = build_dense(checkpoint, workload) if device.type == "cpu" else None

    def run() -> Outcome:
        sampler = build_dense(checkpoint, workload) if kept is None else kept
        generator = torch.Generator(device).manual_seed(workload.seed)
        if dense_steps:
            extrapolation = extrapolate(sampler, workload.num_steps, dense_steps, generator)
            calls = extrapolation.num_calls
            return Outcome(None, calls, calls * workload.num_rows, extrapolation)
        y, num_calls = sampler.sample(workload.num_steps, generator)
        return Outcome(checkpoint.codec.decode(y), num_calls, num_calls * workload.num_rows)

    return run


def measure_peak_memory(name: SamplerName, workload: Workload, dtype: DTypeName) -> int | None:
    """Return the peak memory in bytes that a sampler adds to the weights on a CPU, in a process of its own.

    Resident memory of the process: what torch allocates and what the product library keeps beside it. The
    dense sampler's buffers have their full size in its first step, so it runs two.

    Returns:
        None where the operating system does not say (only Linux does).
    """
    return in_own_process(_memory_of_one_run, name, workload, dtype)


def _memory_of_one_run(name: SamplerName, workload: Workload, dtype: DTypeName) -> int | None:
    checkpoint = build_checkpoint(workload, dtype)
    with peak_growth(torch.device("cpu")) as growth:
        if name == "dense_published":
            generator = torch.Generator().manual_seed(workload.seed)
            build_dense(checkpoint, workload).sample(min(2, workload.num_steps), generator)
        else:
            build_sampler(name, checkpoint, workload)()
    return growth.num_bytes
