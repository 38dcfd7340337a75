"""`prime-bench memory`: what sampling, a training step's loss and the likelihood need beside the weights.

What matters is that no tensor has the size (B, L, V) of all logits. So two figures stand beside that size: the largest
tensor that any operation gives, and the peak of the process's memory above weights (of the loss above gradients too).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contenders import build_checkpoint
from benchmarks.document import document_head, kept_if_ended
from benchmarks.machine import in_own_process, peak_growth
from benchmarks.settings import BenchSettings, Log, computing_threads
from benchmarks.workloads import MODELS, Workload
from prime_core.checkpoint import Checkpoint
from prime_core.config import DiTConfig
from prime_core.likelihood import estimate_grid_nelbo, estimate_likelihood
from prime_core.objectives import training_loss
from prime_core.sampling.sample import sample

Task = Literal["sampling", "coded_loss", "nelbo_loss", "nelbo", "grid_nelbo"]
TASKS: tuple[Task, ...] = get_args(Task)
_FLOAT32_BYTES = 4


class MemoryBenchSettings(BenchSettings):
    """Sizes of the tasks."""

    task: Literal["all"] | Task = Field(default="all", description=f"all, or one of {', '.join(TASKS)}")
    model: Literal["small", "tiny"] = Field(default="small", description="network: small or tiny")
    vocab_size: int = Field(default=50257, ge=2, le=2**20, description="tokens V")
    target_length: int = Field(default=4, ge=1, le=24, description="digits a token S")
    length: int = Field(default=1024, ge=1, le=1024, description="tokens a row L")
    batch_size: int = Field(default=8, ge=1, le=1024, description="rows B")
    steps: int = Field(default=4, ge=1, le=65536, description="steps of the grid, of sampling and grid_nelbo")
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="weights of inference")

    @model_validator(mode="after")
    def _check_width(self) -> Self:
        if (width := self.network.hidden_size) % self.target_length:
            raise ValueError(
                f"target_length must divide the network's width {width}, got {self.target_length}"
            )
        return self

    @property
    def network(self) -> DiTConfig:
        """The network's configuration."""
        network = MODELS[self.model]
        assert isinstance(network, DiTConfig)
        return network

    @property
    def workload(self) -> Workload:
        """The sizes as the samplers' benchmark has them."""
        return Workload(
            self.model,
            self.vocab_size,
            self.target_length,
            self.length,
            self.batch_size,
            self.steps,
            self.seed,
        )

    @property
    def logits_bytes(self) -> int:
        """Bytes of a float32 tensor (B, L, V)."""
        return self.batch_size * self.length * self.vocab_size * _FLOAT32_BYTES


class Need(NamedTuple):
    """What a task needs.

    Attributes:
        largest_tensor_bytes: the largest tensor that any operation of the task gives.
        largest_tensor_shape: its shape.
        peak_bytes: largest memory above what there was before; None where the system does not say.
    """

    largest_tensor_bytes: int
    largest_tensor_shape: tuple[int, ...]
    peak_bytes: int | None


def run_memory(settings: MemoryBenchSettings, log: Log) -> dict[str, Any]:
    """Run each task; on a CPU in a process of its own, whose memory is nobody else's.

    Of a GPU torch's allocator tells what a task takes, and a new process would take seconds to get there.

    Args:
        settings: sizes.
        log: takes progress lines.

    Returns:
        The JSON document described in benchmarks/README.md, without ``command``.
    """
    entries: list[dict[str, Any]] = []
    with computing_threads(settings.num_threads):
        document = document_head("memory", settings)
        with kept_if_ended(document, entries):
            for task in TASKS if settings.task == "all" else (settings.task,):
                log(f"{task}: {settings.batch_size} rows of {settings.length} tokens")
                apart = settings.torch_device.type == "cpu"
                need = in_own_process(measure, task, settings) if apart else measure(task, settings)
                entries.append({"task": task} | need._asdict())
    return document | {"logits_bytes": settings.logits_bytes, "tasks": entries}


def measure(task: Task, settings: MemoryBenchSettings) -> Need:
    """Run a task twice in this process: for its memory, and for its tensors.

    Args:
        task: what to run.
        settings: sizes.
    """
    device = settings.torch_device
    run = _TASKS[task](build_checkpoint(settings.workload, _dtype_of(task, settings), device), settings)
    with LargestTensor() as seen:
        run()
    with peak_growth(device) as growth:
        run()
    return Need(seen.num_bytes, seen.shape, growth.num_bytes)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that an operation gives.

    Attributes:
        num_bytes: of its elements; an expanded tensor counts what it holds in memory.
        shape: of it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and look at what it gives."""
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor):
                held = min(part.numel() * part.element_size(), part.untyped_storage().nbytes())
                if held > self.num_bytes:
                    self.num_bytes, self.shape = held, tuple(part.shape)
        return result


def _dtype_of(task: Task, settings: MemoryBenchSettings) -> Literal["float32", "bfloat16"]:
    """Losses are of float32 weights, as in training; products are cast by autocast there."""
    return "float32" if task.endswith("_loss") else settings.dtype


def _sampling(checkpoint: Checkpoint, settings: MemoryBenchSettings) -> Callable[[], object]:
    return lambda: sample(
        checkpoint,
        n=settings.batch_size,
        steps=settings.steps,
        seed=settings.seed,
        max_tokens=settings.length,
        max_rows=settings.batch_size,
    )


def _loss(objective: Literal["coded", "nelbo"]) -> Callable[..., Callable[[], object]]:
    def task(checkpoint: Checkpoint, settings: MemoryBenchSettings) -> Callable[[], object]:
        network, codec = checkpoint.denoiser.train().requires_grad_(True), checkpoint.codec
        x_0, t = _clean_tokens(settings), torch.linspace(0.05, 0.95, settings.batch_size)
        generator = torch.Generator().manual_seed(settings.seed)
        uniforms = torch.rand(*x_0.shape, codec.target_length, generator=generator)
        device = settings.torch_device
        x_0, t, uniforms = x_0.to(device), t.to(device), uniforms.to(device)

        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                loss = training_loss(
                    network, codec, checkpoint.schedule, x_0, t, uniforms, objective=objective
                )
            loss.backward()

        run()  # the gradients exist from now on, and are not counted
        return run

    return task


def _nelbo(checkpoint: Checkpoint, settings: MemoryBenchSettings) -> Callable[[], object]:
    parts = checkpoint.denoiser, checkpoint.codec, checkpoint.schedule
    x_0 = _clean_tokens(settings).to(settings.torch_device)
    return lambda: estimate_likelihood(*parts, x_0, generator=torch.Generator().manual_seed(settings.seed))


def _grid_nelbo(checkpoint: Checkpoint, settings: MemoryBenchSettings) -> Callable[[], object]:
    parts = checkpoint.denoiser, checkpoint.codec, checkpoint.schedule
    x_0 = _clean_tokens(settings).to(settings.torch_device)
    return lambda: estimate_grid_nelbo(
        *parts, x_0, settings.steps, generator=torch.Generator().manual_seed(settings.seed)
    )


_TASKS: dict[Task, Callable[..., Callable[[], object]]] = {
    "sampling": _sampling,
    "coded_loss": _loss("coded"),
    "nelbo_loss": _loss("nelbo"),
    "nelbo": _nelbo,
    "grid_nelbo": _grid_nelbo,
}


def _clean_tokens(settings: MemoryBenchSettings) -> Tensor:
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randint(settings.vocab_size, (settings.batch_size, settings.length), generator=generator)
