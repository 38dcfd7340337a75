"""Checkpoints: a folder with `model.safetensors`, `config.json` and, for text, a tokenizer file. No pickle.

The weights carry the configuration they were saved with (metadata key `prime_config`), so one `.safetensors`
file is a whole model too. In a folder `config.json` rules and may be edited by hand.

Saving into a folder that holds a checkpoint has one commit point, the rename of the weights:

1. stage `.config.json.partial` and `.model.safetensors.partial`, flushed to disk;
2. rename the weights into place;
3. rename the configuration into place.

A crash before 2 leaves the old checkpoint, a crash after 3 the new one. Between them
`.config.json.partial` is still there, and tells the loader to believe the configuration inside the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from prime_core import atomic
from prime_core.checkpoint_format import (
    CONFIG_KEY,
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    MAX_LENGTH,
    PERMUTATION_NAME,
    STORED_DTYPES,
    WEIGHTS_NAME,
    check_finite,
    check_tensors,
    parse_config,
)
from prime_core.codec import SubtokenCodec
from prime_core.config import Config
from prime_core.device import choose_device, has_bfloat16
from prime_core.models.build import build_denoiser
from prime_core.models.dit import DiT
from prime_core.models.unet import UNet
from prime_core.schedule import Schedule
from prime_core.tokenizer import Tokenizer, load_tokenizer
from prime_core.weights import (
    CheckpointError,
    TensorEntry,
    WeightsFile,
    open_weights,
    write_weights,
)

__all__ = ["Checkpoint", "CheckpointError", "load_checkpoint", "read_config", "save_checkpoint"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A model, ready to run.

    Attributes:
        path: the folder or file it came from.
        config: everything but the weights.
        codec: tokens to digits and back.
        schedule: the noise schedule.
        tokenizer: text to tokens and back; None when the model has none.
        denoiser: digits y_t (B, L, S) to logits (B, L, V) float32; in eval mode, without gradients.
        dtype: of the parameters: torch.float32 or torch.bfloat16.
    """

    path: Path
    config: Config
    codec: SubtokenCodec
    schedule: Schedule
    tokenizer: Tokenizer | None
    denoiser: DiT | UNet
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """The number type of the parameters as people write it: "float32" or "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")


def load_checkpoint(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> Checkpoint:
    """Load a checkpoint folder, or one `.safetensors` file that carries its configuration.

    Args:
        path: the folder or file.
        device: where the model goes: see `choose_device`, or a torch.device.
        dtype: of the parameters; "auto" keeps what is stored, except bfloat16 on a CPU without bfloat16
            arithmetic, which becomes float32. Rotary tables are float32 in any case.

    Raises:
        CheckpointError: anything is missing, damaged, foreign or does not fit together; one line that names
            the file, the fault and the remedy.
        ValueError: ``dtype`` is unknown, or ``device`` is not there.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype must be auto, float32 or bfloat16, got {dtype!r}")
    path, device = Path(path), choose_device(device) if isinstance(device, str) else device
    is_folder = path.is_dir()
    weights_path = path / WEIGHTS_NAME if is_folder else path
    with open_weights(weights_path) as weights:
        config = _read_config(path, weights) if is_folder else _embedded_config(weights)
        check_tensors(weights_path, weights.tensors, config)
        tokenizer = _load_tokenizer(config, weights_path.parent)
        stored = next(entry.dtype for entry in weights.tensors.values() if entry.dtype in STORED_DTYPES)
        target = _resolve_dtype(dtype, stored, device)
        denoiser = _load_denoiser(config, weights, device, target)
        try:
            codec = config.codec.build(weights.read(PERMUTATION_NAME) if config.codec.permuted else None)
        except ValueError as error:
            raise CheckpointError(f"{weights_path}: {PERMUTATION_NAME}: {error}") from None
    return Checkpoint(path, config, codec, denoiser.schedule, tokenizer, denoiser, target)


def read_config(path: str | Path) -> Config:
    """Read what `load_checkpoint` would load, without the weights.

    Args:
        path: the folder or file.

    Raises:
        CheckpointError: as `load_checkpoint` does, as far as the configuration goes.
    """
    path = Path(path)
    with open_weights(path / WEIGHTS_NAME if path.is_dir() else path) as weights:
        return _read_config(path, weights) if path.is_dir() else _embedded_config(weights)


def save_checkpoint(
    folder: str | Path,
    config: Config,
    denoiser_state: Mapping[str, Tensor],
    *,
    permutation: Tensor | None = None,
    tokenizer_file: Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint folder; a crash or a full disk leaves the last good checkpoint loadable.

    Args:
        folder: where; made if missing. Files of other names in it stay.
        config: everything but the weights.
        denoiser_state: the network's `state_dict()`, every tensor float32 or bfloat16 unless ``dtype`` is given.
        permutation: (V,) int64; given exactly when ``config.codec.permuted``.
        tokenizer_file: rank file to copy; given exactly when ``config.tokenizer`` names a file.
        dtype: torch.float32 or torch.bfloat16, to convert to; None keeps.

    Raises:
        CheckpointError: the arguments do not make a loadable checkpoint, or another tokenizer file of
            that name is in the folder. Nothing is written.
        OSError: the disk is full or not writable; the folder holds what it held before.
    """
    folder = Path(folder)
    tensors = _tensors_to_save(folder, config, denoiser_state, permutation, dtype)
    tokenizer = _tokenizer_to_save(folder, config, tokenizer_file)
    text = config.model_dump_json(indent=2) + "\n"
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    config_partial, weights_partial = atomic.partial_path(config_path), atomic.partial_path(weights_path)
    # What an earlier crash left tells the loader which configuration to believe: only success may remove it.
    keep_config_partial = config_partial.exists()
    is_staged = False
    try:
        if tokenizer is not None:
            atomic.atomic_write(*tokenizer)
        atomic.stage(config_path, text.encode())
        atomic.stage(
            weights_path, lambda file: write_weights(file, tensors, {"format": "pt", CONFIG_KEY: text})
        )
        # The staged configuration must be on disk before the weights can be new.
        atomic.sync_folder(folder)
        is_staged = True
        atomic.publish(weights_path)
        atomic.publish(config_path)
    except BaseException:
        is_committed = is_staged and not weights_partial.exists()
        if not is_committed:
            unwanted = [weights_partial] if keep_config_partial else [weights_partial, config_partial]
            _remove(unwanted + ([] if tokenizer is None else [tokenizer[0]]))
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _tensors_to_save(
    folder: Path,
    config: Config,
    state: Mapping[str, Tensor],
    permutation: Tensor | None,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    if dtype is not None and dtype not in STORED_DTYPES:
        raise CheckpointError(f"{folder}: dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    if config.model.length > MAX_LENGTH:
        raise CheckpointError(f"{folder}: model.length {config.model.length} is over {MAX_LENGTH}: lower it")
    tensors = {
        name: tensor.detach() if dtype is None else tensor.detach().to(dtype)
        for name, tensor in state.items()
    }
    try:
        codec = config.codec.build(permutation)
    except ValueError as error:
        raise CheckpointError(f"{folder}: cannot save: codec: {error}") from None
    if codec.permutation is not None:
        tensors[PERMUTATION_NAME] = codec.permutation
    entries = {name: TensorEntry(tensor.dtype, tuple(tensor.shape), 0, 0) for name, tensor in tensors.items()}
    check_tensors(folder, entries, config)
    for name, tensor in tensors.items():
        check_finite(folder, name, tensor)
    return tensors


def _tokenizer_to_save(folder: Path, config: Config, source: Path | None) -> tuple[Path, bytes] | None:
    """Return the tokenizer file to write and its bytes; None if nothing is to be written."""
    name = config.tokenizer.file
    if (name is None) != (source is None):
        raise CheckpointError(
            f"{folder}: tokenizer_file goes with tokenizer kind 'tiktoken_file', and only with it"
        )
    if name is None or source is None:
        return None
    target, content = folder / name, source.read_bytes()
    if target.exists():
        # Replacing it together with the weights would take two commit points.
        if target.read_bytes() != content:
            raise CheckpointError(f"{target}: another tokenizer is in this folder; save to a new folder")
        return None
    return target, content


def _read_config(folder: Path, weights: WeightsFile) -> Config:
    """Read config.json; if a save was interrupted between its two renames, the weights know better."""
    path = folder / CONFIG_NAME
    partial = atomic.partial_path(path)
    if partial.exists() and CONFIG_KEY in weights.metadata:
        _log.warning(
            "%s is there: a save was interrupted, or is going on. The configuration inside the weights is used and %s "
            "is not read; to make it count again, check it and remove the other file",
            partial,
            path,
        )
        return _embedded_config(weights)
    if path.exists() and not path.is_file():  # a pipe, say, would be waited for without end
        raise CheckpointError(f"{path}: not a file; put the {CONFIG_NAME} of the checkpoint there")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing; a checkpoint folder holds it beside {WEIGHTS_NAME}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_config(text, str(path))


def _embedded_config(weights: WeightsFile) -> Config:
    text = weights.metadata.get(CONFIG_KEY)
    if text is None:
        raise CheckpointError(
            f"{weights.path}: no configuration inside (metadata {CONFIG_KEY}); "
            "load its folder if there is a config.json beside it, or convert it with prime-import"
        )
    return parse_config(text.encode(), f"{weights.path}, metadata {CONFIG_KEY}")


def _load_tokenizer(config: Config, folder: Path) -> Tokenizer | None:
    name = config.tokenizer.file
    if name is not None and (folder / name).is_symlink():
        raise CheckpointError(
            f"{folder / name}: the tokenizer file must not be a symbolic link; copy the file"
        )
    try:
        tokenizer = load_tokenizer(config.tokenizer, folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: tokenizer: {error}") from None
    if tokenizer is not None and tokenizer.vocab_size > config.codec.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, but codec.vocab_size is "
            f"{config.codec.vocab_size}: it belongs to another model"
        )
    return tokenizer


def _resolve_dtype(dtype: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return torch.float32 if dtype == "float32" else torch.bfloat16
    if stored == torch.bfloat16 and not has_bfloat16(device):
        return torch.float32
    return stored


def _load_denoiser(
    config: Config, weights: WeightsFile, device: torch.device, dtype: torch.dtype
) -> DiT | UNet:
    # Initialisation draws from torch's global generator; a load must not move it.
    with torch.random.fork_rng(devices=[]):
        denoiser = build_denoiser(config)
    for name, parameter in denoiser.named_parameters():
        tensor = weights.read(name)
        check_finite(weights.path, name, tensor)
        parameter.data = tensor.to(dtype)
    denoiser = denoiser.to(device).eval().requires_grad_(False)
    denoiser.prepare()
    return denoiser
