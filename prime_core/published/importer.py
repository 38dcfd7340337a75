"""Imports published networks: training checkpoints of text (`.ckpt`) and images (`.pth`), and safetensors files.

The file is opened and its network found by `published_source`; what the network is, `published_layout` (text) and
`published_image_layout` infer from the shapes of its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from prime_core.checkpoint import load_checkpoint, save_checkpoint
from prime_core.checkpoint_format import check_finite, check_tensors
from prime_core.config import Config, ScheduleConfig
from prime_core.published.image_check import find_head_channels, read_recorded, recorded_size
from prime_core.published.image_facts import ImageFacts
from prime_core.published.image_layout import HEAD as IMAGE_HEAD
from prime_core.published.image_layout import infer_image_config
from prime_core.published.layout import HEAD, ROTARY, Facts, check_rotary, infer_config
from prime_core.published.source import Source, open_source
from prime_core.published.tensors import Readable
from prime_core.rank_files import read_rank_file
from prime_core.tokenizer import END_OF_TEXT, GPT2_NUM_RANKS, TokenizerSpec, load_tokenizer
from prime_core.weights import CheckpointError, TensorEntry

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ImportOptions:
    """How to import.

    Attributes:
        raw: take the raw weights instead of the moving average.
        dtype: of the written weights.
        num_heads: text: attention heads, where the file does not tell; cross-checked where it does.
        length: text: context in tokens; None takes what the file says.
        eps: text: noise schedule alpha_t = 1 - (1 - eps) t; None takes what the file says, 1e-3 if nothing.
        tokenizer: text: "auto" (GPT-2 if V fits and its files are here), "gpt2", "none", or a rank file's path.
        size: images: (height, width) of the pictures; None takes what the file says, 32 x 32 if nothing.
        head_channels: images: width of an attention head; None takes what the file says; if nothing, what its
            recorded outputs tell; if there are none, 64 where that divides the widths with attention, else 32.
        schedule: images: the noise schedule; None takes what the file says, alpha_t = (1 - t)^3 if nothing.
        overwrite: replace a checkpoint that is in the output folder.
    """

    raw: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_heads: int | None = None
    length: int | None = None
    eps: float | None = None
    tokenizer: str = "auto"
    size: tuple[int, int] | None = None
    head_channels: int | None = None
    schedule: ScheduleConfig | None = None
    overwrite: bool = False

    def of_text(self) -> dict[str, object]:
        """Return the options that only text networks have, by flag; None where not given."""
        return {
            "--num-heads": self.num_heads,
            "--length": self.length,
            "--eps": self.eps,
            "--tokenizer": self.tokenizer if self.tokenizer not in ("auto", "none") else None,
        }

    def of_images(self) -> dict[str, object]:
        """Return the options that only image networks have, by flag; None where not given."""
        return {
            "--size": self.size,
            "--head-channels": self.head_channels,
            "--schedule": self.schedule,
        }


class Imported(NamedTuple):
    """What an import wrote: configuration, parameters, and what the user should know."""

    config: Config
    num_parameters: int
    notes: tuple[str, ...]


class _Converted(NamedTuple):
    """A network in our layout, in the written dtype."""

    config: Config
    state: dict[str, Tensor]
    notes: tuple[str, ...]


def import_published(
    source: str | Path, output: str | Path, options: ImportOptions | None = None
) -> Imported:
    """Convert a published network to a checkpoint folder and verify the result by loading it.

    Args:
        source: `.ckpt` or `.pth` (PyTorch zip archives), or `.safetensors` with `backbone.*` (text) or `model.*`
            (images) tensors.
        output: folder to write; must be empty or missing unless ``options.overwrite``.
        options: see `ImportOptions`; None for the defaults.

    Raises:
        CheckpointError: the file is not such a network or damaged; an option is missing, contradicts it, or is
            for networks of the other kind.
        OSError: the output cannot be written.
    """
    source, output = Path(source), Path(output)
    options = ImportOptions() if options is None else options
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not (is_free or options.overwrite):
        raise CheckpointError(f"{output}: exists already; choose another folder or pass --overwrite")
    with open_source(source, options.raw) as found:
        if isinstance(found.facts, ImageFacts):
            _refuse(source, "an image", options.of_text())
            config, state, notes = _convert_image(source, found, found.facts, options)
        else:
            _refuse(source, "a text", options.of_images())
            config, state, notes = _convert_text(source, found, found.facts, options)
        notes = (*found.notes, *notes)
    rank_file = None
    if config.model.kind == "dit":
        spec, rank_file, note = _choose_tokenizer(options.tokenizer, config.codec.vocab_size, output)
        config = config.model_copy(update={"tokenizer": spec})
        notes = notes if note is None else (*notes, note)
    save_checkpoint(output, config, state, tokenizer_file=rank_file)
    _verify(output, state)
    return Imported(config, sum(t.numel() for t in state.values()), notes)


def _refuse(source: Path, kind: str, others: Mapping[str, object]) -> None:
    if given := [flag for flag, value in others.items() if value is not None]:
        raise CheckpointError(f"{source}: this is {kind} network, which has no {given[0]}; leave it out")


def _convert_text(source: Path, found: Source, facts: Facts, options: ImportOptions) -> _Converted:
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
    state = _read(source, config, parameters, HEAD, 1, shapes[HEAD[0]][0], options)
    return _Converted(config, state, ())


def _convert_image(source: Path, found: Source, facts: ImageFacts, options: ImportOptions) -> _Converted:
    size = recorded_size(found.others) if facts.size is None else facts.size
    facts = replace(
        facts,
        size=size if options.size is None else options.size,
        head_channels=facts.head_channels if options.head_channels is None else options.head_channels,
        schedule=facts.schedule if options.schedule is None else options.schedule,
    )
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    layout = infer_image_config(str(source), shapes, facts)
    config = layout.config.model_copy(update={"provenance": found.provenance})
    model, notes = config.image_model, list(layout.notes)
    state = _read(source, config, found.tensors, IMAGE_HEAD, model.channels, layout.num_outputs, options)
    is_known = facts.head_channels is not None
    if (recorded := read_recorded(found.others, config)) is not None:
        config, note = find_head_channels(config, state, recorded, is_known=is_known)
        notes.append(note)
    elif not is_known:
        notes.append(
            f"the file does not tell the width of attention heads: {model.head_channels}; "
            "--head-channels sets another"
        )
    return _Converted(config, state, tuple(notes))


def _read(
    source: Path,
    config: Config,
    tensors: Mapping[str, Readable],
    head: tuple[str, ...],
    num_planes: int,
    num_outputs: int,
    options: ImportOptions,
) -> dict[str, Tensor]:
    """Check the tensors against the configuration, then read them in the written dtype.

    The head has ``num_planes`` times ``num_outputs`` rows; of each plane the first vocab_size are kept, so an output
    for the mask goes.
    """
    vocab_size = config.codec.vocab_size
    entries = {name: TensorEntry(torch.float32, tensor.shape, 0, 0) for name, tensor in tensors.items()}
    for name in head:
        if entries[name].shape[:1] == (num_planes * num_outputs,):
            entries[name] = entries[name]._replace(shape=(num_planes * vocab_size, *entries[name].shape[1:]))
    check_tensors(source, entries, config)
    state = {}
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{source}: tensor {name} is {tensor.dtype}, not floating point")
        value = tensor.read()
        check_finite(source, name, value)
        if name in head:
            value = value.unflatten(0, (num_planes, -1))[:, :vocab_size].flatten(0, 1)
        state[name] = value.to(_DTYPES[options.dtype])
    return state


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
