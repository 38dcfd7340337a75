"""What a checkpoint consists of: file names, and the checks that configuration and weights fit together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from prime_core.config import Config, DiTConfig, explain
from prime_core.models.build import build_denoiser
from prime_core.weights import CheckpointError, TensorEntry, parse_json_object

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
CONFIG_KEY = "prime_config"
PERMUTATION_NAME = "codec.permutation"
MAX_CONFIG_BYTES = 2**20
# Rotary tables grow with the context whatever the weights are, so only this bounds their memory.
MAX_LENGTH = 2**20
STORED_DTYPES = (torch.float32, torch.bfloat16)


def parse_config(text: bytes, where: str) -> Config:
    """Read a configuration.

    Args:
        text: UTF-8 JSON.
        where: what to name in messages.

    Raises:
        CheckpointError: not JSON, an unknown key, or a value of another type ("7" is not 7, true is not 1)
            or out of range.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{where}: larger than {MAX_CONFIG_BYTES} bytes: not a configuration")
    content = parse_json_object(text, where)
    # Strict validation takes true and 1.0 for the 1 of a Literal.
    if type(content.get("format_version", 1)) is not int:
        raise CheckpointError(f"{where}: format_version: must be an integer; correct the field")
    try:
        config = Config.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{where}: {explain(error)}; correct the field") from None
    if config.model.length > MAX_LENGTH:
        raise CheckpointError(f"{where}: model.length {config.model.length} is over {MAX_LENGTH}: lower it")
    return config


def _expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        denoiser = build_denoiser(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in denoiser.named_parameters()}
    if config.codec.permuted:
        shapes[PERMUTATION_NAME] = (config.codec.vocab_size,)
    return shapes


def check_tensors(where: Path, found: Mapping[str, TensorEntry], config: Config) -> None:
    """Check names, shapes and dtypes against the configuration, before anything of its size is allocated.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape or dtype than ``config`` asks for.
    """
    if isinstance(config.model, DiTConfig) and config.model.num_blocks > len(found):
        raise CheckpointError(
            f"{where}: config says {config.model.num_blocks} blocks, but there are {len(found)} tensors"
        )
    try:
        expected = _expected_shapes(config)
    except (RuntimeError, OverflowError, TypeError):
        raise CheckpointError(
            f"{where}: the sizes in the configuration are out of range; lower them"
        ) from None
    if missing := sorted(expected.keys() - found.keys()):
        raise CheckpointError(
            f"{where}: {len(missing)} tensors missing, first {missing[0]!r}; does config.json fit?"
        )
    if extra := sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            f"{where}: {len(extra)} unknown tensors, first {extra[0][:200]!r}; does config.json fit?"
        )
    of_all: torch.dtype | None = None  # the number type of the first
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise CheckpointError(
                f"{where}: tensor {name!r} must have shape {shape} by the configuration, "
                f"found {found[name].shape}; correct the configuration or fetch the weights that belong to it"
            )
        dtype = found[name].dtype
        if name == PERMUTATION_NAME:
            fits, want = dtype == torch.int64, "int64"
        elif dtype not in STORED_DTYPES:
            fits, want = False, "float32 or bfloat16"
        else:
            fits, want = of_all in (None, dtype), f"{of_all}, as those before it"
            of_all = dtype
        if not fits:
            raise CheckpointError(f"{where}: tensor {name!r} must be {want}, found {dtype}; convert it")


def check_finite(where: Path, name: str, tensor: Tensor) -> None:
    """Check one tensor for NaN and infinity.

    Raises:
        CheckpointError: it holds one.
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{where}: tensor {name!r} holds NaN or infinity; take an earlier checkpoint")
