"""A tiny checkpoint: configuration, seeded weights, and a bit-exact comparison."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prime_core.checkpoint import Checkpoint, load_checkpoint
from prime_core.config import CodecConfig, Config, DiTConfig
from prime_core.models.dit import DiT

CONFIG = Config(
    model=DiTConfig(hidden_size=12, num_blocks=1, num_heads=2, cond_dim=4, length=8),
    codec=CodecConfig(vocab_size=10, target_length=2),
    provenance={"note": "test"},
)


def make_state(config: Config = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        state = DiT(config.model, config.codec, config.schedule.build()).state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def with_codec(vocab_size: int, target_length: int, **others: Any) -> Config:
    codec = CodecConfig(vocab_size=vocab_size, target_length=target_length, permuted="permuted" in others)
    others.pop("permuted", None)
    return CONFIG.model_copy(update={"codec": codec, **others})


def assert_same(path: Path, state: dict[str, Tensor], config: Config = CONFIG) -> None:
    loaded = load_checkpoint(path)
    assert loaded.config == config
    assert_equal(loaded, state)


def assert_equal(loaded: Checkpoint, state: dict[str, Tensor]) -> None:
    parameters = dict(loaded.denoiser.named_parameters())
    assert parameters.keys() == state.keys()
    for name, parameter in parameters.items():
        assert parameter.dtype == state[name].dtype
        assert torch.equal(parameter, state[name]), name


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
