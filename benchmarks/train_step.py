"""`prime-bench train`: a step of the trainer against a plain loop, on the same network and the same data."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

import training
from benchmarks.costs import head_flops, trunk_flops
from benchmarks.document import document_head
from benchmarks.machine import in_own_process, peak_growth
from benchmarks.plain_training import PlainLoop
from benchmarks.rates import measure_ceilings, timed
from benchmarks.settings import Log, MemorySettings, computing_threads
from benchmarks.workloads import MODELS
from prime_core.codec import SubtokenCodec
from prime_core.config import Config, DiTConfig
from prime_core.models.build import build_denoiser
from prime_core.models.dit import DiT
from training.config import TrainConfig
from training.data.rows import stack_rows
from training.trainer import Trainer

LoopName = Literal["trainer", "plain"]
LOOPS: tuple[LoopName, ...] = ("trainer", "plain")
_CONFIGS = Path(training.__file__).resolve().parent / "configs"


class TrainSettings(MemorySettings):
    """A comparison of training steps."""

    model: Literal["small", "tiny"] = Field(default="small", description="network: small (published) or tiny")
    vocab_size: int = Field(default=50257, ge=257, le=2**20, description="tokens V; the data are bytes")
    target_length: int = Field(default=4, ge=1, le=24, description="digits a token S")
    length: int = Field(default=128, ge=1, le=1024, description="tokens a row L")
    batch_size: int = Field(default=8, ge=1, le=4096, description="rows of a step B")
    chunk_rows: int = Field(default=4096, ge=1, description="trainer: tokens whose logits exist at a time")
    precision: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="of matrix products (autocast); weights are float32"
    )
    repeats: int = Field(default=3, ge=1, le=1000, description="timed steps of each loop, interleaved")

    @model_validator(mode="after")
    def _check_codec(self) -> Self:
        SubtokenCodec(self.vocab_size, self.target_length)  # says what is wrong
        if self.network.hidden_size % self.target_length:
            raise ValueError(
                f"target_length must divide the network's width {self.network.hidden_size}, got {self.target_length}"
            )
        return self

    @property
    def network(self) -> DiTConfig:
        """The configuration of the network."""
        network = MODELS[self.model]
        assert isinstance(network, DiTConfig), "the choices are transformers"
        return network.model_copy(update={"length": self.length})

    def run_config(self, folder: Path) -> TrainConfig:
        """Return the settings of a run in a folder: the bytes of the bundled text, a step of one micro-batch."""
        special = {"<|endoftext|>": 256}
        tokenizer = {"kind": "tiktoken_file", "file": "bytes.tiktoken", "special_tokens": special}
        return TrainConfig.model_validate(
            {
                "output": folder / "run",
                "model": self.network.model_dump(),
                "codec": {"vocab_size": self.vocab_size, "target_length": self.target_length},
                "data": {
                    "kind": "text",
                    "train": [_CONFIGS / "tiny-train.txt"],
                    "tokenizer": tokenizer,
                    "tokenizer_folder": _CONFIGS,
                    "cache": folder / "shards",
                },
                "batch_size": self.batch_size,
                "micro_batch_size": self.batch_size,
                "chunk_rows": self.chunk_rows,
                "precision": self.precision,
                "seed": self.seed,
                "device": self.device,
            }
        )


def run_training(settings: TrainSettings, log: Log) -> dict[str, Any]:
    """Measure both loops, alternating.

    Args:
        settings: what to train.
        log: takes progress lines.

    Returns:
        The JSON document described in benchmarks/README.md, without `command`.
    """
    device = settings.torch_device
    seconds: dict[LoopName, list[float]] = {name: [] for name in LOOPS}
    peaks: dict[LoopName, int | None] = dict.fromkeys(LOOPS)
    with computing_threads(settings.num_threads), tempfile.TemporaryDirectory() as folder:
        document = document_head("train", settings)
        rates = measure_ceilings(device)
        steps = build_loops(settings, Path(folder))
        for name, step in steps.items():
            log(f"first step of {name}")
            step()
        for repeat in range(settings.repeats):
            for name, step in steps.items():
                with peak_growth(device) as growth, timed(device) as elapsed:
                    step()
                seconds[name].append(elapsed.seconds)
                if device.type == "cuda" and settings.peak_memory == "measure":
                    peaks[name] = growth.num_bytes
                log(f"repeat {repeat + 1} of {settings.repeats}: {name} {elapsed.seconds:.2f} s")
        steps.clear()
        if device.type == "cpu" and settings.peak_memory == "measure":
            for name in LOOPS:
                log(f"peak memory of {name}")
                peaks[name] = in_own_process(_memory_of_one_step, name, settings)
    runs = [_entry(name, seconds[name], peaks[name], settings, rates) for name in LOOPS]
    ratio = runs[1]["median_s"] / runs[0]["median_s"]
    return document | {"rates": rates, "runs": runs, "ratio": ratio}


def build_loops(settings: TrainSettings, folder: Path) -> dict[LoopName, Callable[[], float]]:
    """Return a function per loop that takes one step and returns its loss; each has a network of its own."""
    trainer = Trainer(settings.run_config(folder), progress=False)
    config = trainer.config
    described = Config(model=config.model, codec=config.codec, schedule=config.schedule)
    with torch.random.fork_rng(devices=[]):
        model = build_denoiser(described).to(trainer.device)
    assert isinstance(model, DiT), "the network of text"
    model.load_state_dict(trainer.model.state_dict())
    plain = PlainLoop(config, model, trainer.schedule, trainer.codec)
    generator = torch.Generator().manual_seed(settings.seed)

    def plain_step() -> float:
        rows = torch.randint(trainer.data.train.num_rows, (settings.batch_size,), generator=generator)
        return plain.train_step(stack_rows(trainer.data.train, rows.tolist()), generator)

    return {"trainer": lambda: trainer.train_step()["loss"], "plain": plain_step}


def _entry(
    name: LoopName, seconds: list[float], peak: int | None, settings: TrainSettings, rates: dict[str, Any]
) -> dict[str, Any]:
    num_tokens, median_s = settings.batch_size * settings.length, statistics.median(seconds)
    # Forward, and twice as much backward, with the head at every position: what the plain loop multiplies.
    trunk = trunk_flops(settings.network, num_tokens, settings.length)
    flops = 3 * (trunk + head_flops(settings.network, num_tokens, settings.vocab_size))
    return {
        "loop": name,
        "seconds": seconds,
        "median_s": median_s,
        "tokens_per_s": num_tokens / median_s,
        "dense_flops": flops,
        "share_of_product_rate": flops / median_s / rates["product_flops_per_s"][settings.precision],
        "peak_memory_above_state_bytes": peak,
    }


def _memory_of_one_step(name: LoopName, settings: TrainSettings) -> int | None:
    """Return what a step adds to weights, moments and average on a CPU; None off Linux."""
    with tempfile.TemporaryDirectory() as folder:
        step = build_loops(settings, Path(folder))[name]
        step()  # makes the optimiser's moments
        with peak_growth(torch.device("cpu")) as growth:
            step()
    return growth.num_bytes
