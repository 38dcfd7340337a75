"""Imports published text networks: training checkpoints (`.ckpt`) and bare `backbone.*` safetensors files.

A checkpoint keeps the raw weights in `state_dict` and their exponential moving average (EMA) in
`ema.shadow_params`, a list in parameter order: the order of `state_dict` without the buffers. The average is
what is served.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from prime_core.checkpoint import load_checkpoint, save_checkpoint
from prime_core.checkpoint_format import check_tensors
from prime_core.config import Config
from prime_core.published_archive import open_archive
from prime_core.published_layout import (
    HEAD,
    PREFIX,
    ROTARY,
    Facts,
    check_rotary,
    facts_of_metadata,
    facts_of_record,
    infer_config,
    look_up,
)
from prime_core.published_unpickler import ArchiveTensor
from prime_core.rank_files import read_rank_file
from prime_core.tokenizer import END_OF_TEXT, GPT2_NUM_RANKS, TokenizerSpec, load_tokenizer
from prime_core.weights import CheckpointError, TensorEntry, WeightsFile, open_weights

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_IMAGE_MARKS = ("pixel_embedding.", "unet.", "model.pixel_embedding.", "model.unet.")


@dataclass(frozen=True)
class ImportOptions:
    """How to import.

    Attributes:
        raw: take the raw weights instead of the moving average.
        dtype: of the written weights.
        num_heads: attention heads, where the file does not tell; cross-checked where it does.
        length: context in tokens; None takes what the file says.
        eps: noise schedule alpha_t = 1 - (1 - eps) t; None takes what the file says, 1e-3 if nothing.
        tokenizer: "auto" (GPT-2 if V fits and its files are here), "gpt2", "none", or a rank file's path.
        overwrite: replace a checkpoint that is in the output folder.
    """

    raw: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_heads: int | None = None
    length: int | None = None
    eps: float | None = None
    tokenizer: str = "auto"
    overwrite: bool = False


class Imported(NamedTuple):
    """What an import wrote: configuration, parameters, and what the user should know."""

    config: Config
    num_parameters: int
    notes: tuple[str, ...]


class _Readable(Protocol):
    """A tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def read(self) -> Tensor: ...


@dataclass(frozen=True)
class _FileTensor:
    weights: WeightsFile
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights.tensors[self.name].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.tensors[self.name].dtype

    def read(self) -> Tensor:
        return self.weights.read(self.name)


@dataclass(frozen=True)
class _Source:
    """The network inside a foreign file: tensors (names without `backbone.`), facts and origin."""

    tensors: dict[str, _Readable]
    facts: Facts
    provenance: dict[str, Any]
    notes: tuple[str, ...]


def import_published(
    source: str | Path, output: str | Path, options: ImportOptions | None = None
) -> Imported:
    """Convert a published text network to a checkpoint folder and verify the result by loading it.

    Args:
        source: `.ckpt` (PyTorch zip archive) or `.safetensors` with `backbone.*` tensors.
        output: folder to write; must be empty or missing unless ``options.overwrite``.
        options: see `ImportOptions`; None for the defaults.

    Raises:
        CheckpointError: the file is not such a network or damaged; an option is missing or contradicts it.
        OSError: the output cannot be written.
    """
    source, output = Path(source), Path(output)
    options = ImportOptions() if options is None else options
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not (is_free or options.overwrite):
        raise CheckpointError(f"{output}: exists already; choose another folder or pass --overwrite")
    with _open_source(source, options.raw) as found:
        config, state = _convert(source, found, options)
        notes = list(found.notes)
    spec, rank_file, note = _choose_tokenizer(options.tokenizer, config.codec.vocab_size, output)
    config = config.model_copy(update={"tokenizer": spec})
    save_checkpoint(output, config, state, tokenizer_file=rank_file)
    _verify(output, state)
    return Imported(config, sum(t.numel() for t in state.values()), (*notes, *([note] if note else [])))


def _convert(source: Path, found: _Source, options: ImportOptions) -> tuple[Config, dict[str, Tensor]]:
    """Return the configuration and the weights in the written dtype."""
    facts = found.facts
    facts = replace(
        facts,
        num_heads=facts.num_heads if options.num_heads is None else options.num_heads,
        length=facts.length if options.length is None else options.length,
        eps=facts.eps if options.eps is None else options.eps,
    )
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    config = infer_config(str(source), shapes, facts).model_copy(update={"provenance": found.provenance})
    if ROTARY in found.tensors:
        check_rotary(str(source), found.tensors[ROTARY].read())
    parameters = {name: tensor for name, tensor in found.tensors.items() if name != ROTARY}
    entries = {name: TensorEntry(torch.float32, tensor.shape, 0, 0) for name, tensor in parameters.items()}
    for name in HEAD:  # without the output for the mask
        if shapes[name][0] == shapes[HEAD[0]][0]:
            entries[name] = entries[name]._replace(shape=(config.codec.vocab_size, *shapes[name][1:]))
    check_tensors(source, entries, config)
    state = {}
    for name, tensor in parameters.items():
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{source}: tensor {PREFIX}{name} is {tensor.dtype}, not floating point")
        state[name] = tensor.read()[: entries[name].shape[0]].to(_DTYPES[options.dtype])
    return config, state


@contextmanager
def _open_source(path: Path, raw: bool) -> Iterator[_Source]:
    """Open either format, told apart by the first bytes."""
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK" or path.suffix != ".safetensors"
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if is_zip:
        with open_archive(path) as content:
            yield _archive_source(path, content, raw)
    else:
        with open_weights(path) as weights:
            if raw:
                raise CheckpointError(f"{path}: has one set of weights only; leave --raw out")
            yield _weights_source(path, weights)


def _weights_source(path: Path, weights: WeightsFile) -> _Source:
    tensors: dict[str, _Readable] = {name: _FileTensor(weights, name) for name in weights.tensors}
    network, others = _split(path, tensors)
    notes = (f"ignored {len(others)} other tensors: {', '.join(others[:8])}",) if others else ()
    return _Source(network, facts_of_metadata(weights.metadata), {"imported_from": path.name}, notes)


def _archive_source(path: Path, content: Mapping[Any, Any], raw: bool) -> _Source:
    if "state_dict" not in content and {"model", "args"} <= content.keys():
        raise CheckpointError(f"{path}: this is a published image checkpoint, which is not supported yet")
    state = content.get("state_dict")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: no state_dict inside; not a published text checkpoint")
    network, others = _split(path, {str(name): tensor for name, tensor in state.items()})
    notes = [f"ignored {len(others)} other tensors: {', '.join(others[:8])}"] if others else []
    provenance: dict[str, Any] = {"imported_from": path.name, "weights": "raw" if raw else "ema"}
    for key, value in (
        ("global_step", content.get("global_step")),
        ("ema_decay", look_up(content, "ema", "decay")),
        ("ema_num_updates", look_up(content, "ema", "num_updates")),
        ("carry_over_in_training", look_up(content, "hyper_parameters", "config", "prime", "carry_over")),
    ):
        if type(value) in (bool, int, float):
            provenance[key] = value
    if not raw:
        network = _averaged(path, network, look_up(content, "ema", "shadow_params"))
    facts = facts_of_record(look_up(content, "hyper_parameters", "config"))
    return _Source(network, facts, provenance, tuple(notes))


def _split(path: Path, tensors: Mapping[str, _Readable]) -> tuple[dict[str, _Readable], list[str]]:
    """Return the tensors of the network, in order and without prefix, and the names of the others."""
    network = {name[len(PREFIX) :]: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    if not network:
        is_image = any(name.startswith(_IMAGE_MARKS) for name in tensors)
        what = (
            "a published image network, which is not supported yet"
            if is_image
            else "no published text network"
        )
        raise CheckpointError(f"{path}: this is {what} (no tensor is named {PREFIX}*)")
    for name, tensor in network.items():
        if not isinstance(tensor, (ArchiveTensor, _FileTensor)):
            raise CheckpointError(f"{path}: {PREFIX}{name} is not a plain dense tensor")
    return network, [name for name in tensors if not name.startswith(PREFIX)]


def _averaged(path: Path, network: Mapping[str, _Readable], shadow: Any) -> dict[str, _Readable]:
    """Put the moving average in place of the parameters, by position; buffers stay."""
    if not isinstance(shadow, list):
        raise CheckpointError(
            f"{path}: no moving average inside (ema.shadow_params); pass --raw for raw weights"
        )
    names = [name for name in network if name != ROTARY]
    if len(shadow) != len(names):
        raise CheckpointError(
            f"{path}: {len(shadow)} averaged tensors for {len(names)} parameters; pass --raw for raw weights"
        )
    result = dict(network)
    for name, tensor in zip(names, shadow, strict=True):
        if not isinstance(tensor, ArchiveTensor) or tensor.shape != network[name].shape:
            raise CheckpointError(
                f"{path}: the averaged tensor in the place of {PREFIX}{name} does not fit it"
            )
        result[name] = tensor
    return result


def _choose_tokenizer(
    choice: str, vocab_size: int, output: Path
) -> tuple[TokenizerSpec, Path | None, str | None]:
    """Return the tokenizer, the rank file to copy, and a note."""
    none = TokenizerSpec(kind="none")
    is_gpt2_size = vocab_size in (GPT2_NUM_RANKS + 1, GPT2_NUM_RANKS + 2)
    if choice == "none" or (choice == "auto" and not is_gpt2_size):
        return none, None, "no tokenizer: the model speaks token ids; --tokenizer adds one"
    try:
        if choice in ("auto", "gpt2"):
            spec = TokenizerSpec(kind="gpt2", special_tokens={END_OF_TEXT: GPT2_NUM_RANKS})
            load_tokenizer(spec, output)
            return spec, None, None
        ranks = len(read_rank_file(Path(choice)))
        if ranks > vocab_size:
            raise CheckpointError(f"{choice}: {ranks} ranks, but the network has {vocab_size} tokens")
        special = {END_OF_TEXT: ranks} if vocab_size > ranks else {}
        file = Path(choice)
        return TokenizerSpec(kind="tiktoken_file", file=file.name, special_tokens=special), file, None
    except (OSError, ValueError) as error:
        if choice != "auto":
            raise CheckpointError(f"--tokenizer {choice}: {error}") from None
        # The network is whole without it, and an import must not depend on files from elsewhere.
        return (
            none,
            None,
            f"V = {vocab_size} looks like GPT-2, but written without tokenizer: {error}; then import again",
        )


def _verify(output: Path, state: Mapping[str, Tensor]) -> None:
    """Load what was written and compare every number."""
    for name, parameter in load_checkpoint(output, dtype="float32").denoiser.named_parameters():
        if not torch.equal(parameter, state[name].float()):
            raise CheckpointError(f"{output}: {name} differs from what was written; check the disk")
