"""A run of a second: a small network, dropout, two micro-batches, bytes as tokens."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from training.config import TrainConfig, load_train_config
from training.state import STATE_NAME
from training.train import METRICS_NAME

_TOML = """
objective = "coded"
steps = 24
batch_size = 8
micro_batch_size = 4
chunk_rows = 64
learning_rate = 3e-3
warmup_steps = 4
ema_decay = 0.9
log_every = 1
eval_every = 8
eval_rows = 4
save_every = 4
precision = "float32"
device = "cpu"
num_threads = 1

[model]
hidden_size = 16
num_blocks = 2
num_heads = 2
cond_dim = 4
length = 16
dropout = 0.1

[codec]
vocab_size = 257
target_length = 2

[data]
train = ["{folder}/train.txt"]
heldout = ["{folder}/heldout.txt"]
tokenizer_folder = "{folder}"
cache = "{folder}/shards"

[data.tokenizer]
kind = "tiktoken_file"
file = "bytes.tiktoken"
special_tokens = {{ "<|endoftext|>" = 256 }}
"""


def write_byte_ranks(path: Path) -> None:
    """A rank file whose tokens are the 256 bytes."""
    lines = [f"{base64.b64encode(bytes([value])).decode()} {value}\n" for value in range(256)]
    path.write_text("".join(lines))


def write_run(folder: Path) -> Path:
    """Write corpus, tokenizer and `run.toml` (without output) into a folder; return the config file."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["when", "the", "waters", "of", "a", "river", "rise", "men", "build", "boats", "and", "wait"]
    documents = [" ".join(words[(i * j + j) % 12] for j in range(30)) + "." for i in range(1, 25)]
    (folder / "train.txt").write_text("\n\n".join(documents))
    (folder / "heldout.txt").write_text(
        "the men of the river wait and build. a boat is when waters rise, men.\n"
    )
    write_byte_ranks(folder / "bytes.tiktoken")
    config = folder / "run.toml"
    config.write_text(_TOML.format(folder=folder))
    return config


def load_run(config: Path, output: Path, *flags: str) -> TrainConfig:
    """The settings of `write_run` with an output folder and further flags."""
    return load_train_config(["--config", str(config), "--output", str(output), *flags])


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics, without how fast they were."""
    lines = (output / METRICS_NAME).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("_per_s")} for line in lines]


def state_of(output: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of the saved state."""
    with safe_open(output / STATE_NAME, "pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_same_run(output: Path, expected: Path) -> None:
    """Two runs ended with the same bits: weights, moments, average, step, metrics and checkpoint."""
    (metadata, tensors), (other_metadata, other_tensors) = state_of(output), state_of(expected)
    assert metadata == other_metadata
    assert tensors.keys() == other_tensors.keys()
    kinds = {name.partition(".")[0] for name in tensors}
    assert kinds == {"model", "ema", "optimizer"}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name
    assert metrics_of(output) == metrics_of(expected)
    names = sorted(path.name for path in (expected / "checkpoint").iterdir())
    assert {"model.safetensors", "config.json"} <= set(names)
    assert names == sorted(path.name for path in (output / "checkpoint").iterdir())
    for name in names:
        assert (output / "checkpoint" / name).read_bytes() == (expected / "checkpoint" / name).read_bytes()
