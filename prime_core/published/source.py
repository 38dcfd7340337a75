"""Opens a foreign file and finds the network in it: published training checkpoints and bare safetensors files.

Text checkpoints (`.ckpt`) keep raw weights in `state_dict` and their exponential moving average (EMA) in
`ema.shadow_params`, a list in parameter order: the order of `state_dict` without the buffers. Image checkpoints
(`.pth`) keep both in `model`, as `published_image_source` tells. The average is what is served.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prime_core.published.archive import open_archive
from prime_core.published.image_facts import ImageFacts, facts_of_arguments
from prime_core.published.image_source import averaged_image, is_image, split_image, take_average
from prime_core.published.layout import (
    PREFIX,
    ROTARY,
    Facts,
    facts_of_metadata,
    facts_of_record,
    look_up,
)
from prime_core.published.tensors import FileTensor, Readable, is_dense
from prime_core.weights import CheckpointError, WeightsFile, open_weights


@dataclass(frozen=True)
class Source:
    """The network inside a foreign file.

    Attributes:
        tensors: names without prefix (`backbone.`, `model.unet.`), in the file's order.
        facts: what the file says beside them; their type tells text from images.
        provenance: what to keep about the origin.
        notes: what the user should know.
        others: tensors that are not of the network.
    """

    tensors: Mapping[str, Readable]
    facts: Facts | ImageFacts
    provenance: dict[str, Any]
    notes: tuple[str, ...]
    others: Mapping[str, Readable] = field(default_factory=dict)


@contextmanager
def open_source(path: Path, raw: bool) -> Iterator[Source]:
    """Open either format, told apart by the first bytes; tensors can be read until the context ends.

    Args:
        path: the file.
        raw: take the raw weights instead of the moving average.

    Raises:
        CheckpointError: the file is not such a network, damaged, or has no moving average.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK" or path.suffix != ".safetensors"
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if is_zip:
        with open_archive(path) as content:
            if "state_dict" not in content and isinstance(content.get("model"), dict):
                yield _image_archive(path, content, raw)
            else:
                yield _text_archive(path, content, raw)
    else:
        with open_weights(path) as weights:
            if raw:
                raise CheckpointError(f"{path}: has one set of weights only; leave --raw out")
            yield _weights_source(path, weights)


def _weights_source(path: Path, weights: WeightsFile) -> Source:
    tensors: dict[str, Readable] = {name: FileTensor(weights, name) for name in weights.tensors}
    facts: Facts | ImageFacts
    if is_image(tensors):
        network, others = split_image(path, tensors)
        facts = facts_of_arguments(str(path), weights.metadata)
    else:
        network, others = _text_tensors(path, tensors)
        facts = facts_of_metadata(weights.metadata)
    return Source(network, facts, {"imported_from": path.name}, _ignored(others), others)


def _text_archive(path: Path, content: Mapping[Any, Any], raw: bool) -> Source:
    state = content.get("state_dict")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: no state_dict and no model inside; not a published checkpoint")
    network, others = _text_tensors(path, _named(path, state))
    provenance = _provenance(
        path,
        raw,
        global_step=content.get("global_step"),
        ema_decay=look_up(content, "ema", "decay"),
        ema_num_updates=look_up(content, "ema", "num_updates"),
        carry_over_in_training=look_up(content, "hyper_parameters", "config", "prime", "carry_over"),
    )
    if not raw:
        network = _averaged(path, network, look_up(content, "ema", "shadow_params"))
    facts = facts_of_record(look_up(content, "hyper_parameters", "config"))
    return Source(network, facts, provenance, _ignored(others), others)


def _image_archive(path: Path, content: Mapping[Any, Any], raw: bool) -> Source:
    network, others = split_image(path, _named(path, content["model"]))
    if raw:
        _, count = take_average(others)
    else:
        network, count = averaged_image(path, network, others)
    provenance = _provenance(
        path,
        raw,
        epoch=content.get("epoch"),
        ema_num_updates=count,
        carry_over_in_training=look_up(content, "args", "carry_over"),
    )
    facts = facts_of_arguments(str(path), content.get("args"))
    return Source(network, facts, provenance, _ignored(others), others)


def _named(path: Path, state: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a state dictionary whose names are texts: others, such as nested tuples, cannot even be printed safely."""
    if not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path}: a tensor has a name that is not a text; not a published checkpoint")
    return dict(state)


def _provenance(path: Path, raw: bool, **facts: Any) -> dict[str, Any]:
    origin = {"imported_from": path.name, "weights": "raw" if raw else "ema"}
    return origin | {key: value for key, value in facts.items() if type(value) in (bool, int, float)}


def _ignored(others: Mapping[str, Readable]) -> tuple[str, ...]:
    names = [name[:200] for name in others]
    return (f"ignored {len(names)} other tensors: {', '.join(names[:8])}",) if names else ()


def _text_tensors(
    path: Path, tensors: Mapping[str, Readable]
) -> tuple[dict[str, Readable], dict[str, Readable]]:
    """Return the tensors of the network, in order and without prefix, and the others."""
    network = {name[len(PREFIX) :]: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    if not network:
        raise CheckpointError(
            f"{path}: no published network is inside: no tensor is named {PREFIX}* (text), "
            "model.unet.* or model.pixel_embedding.* (images)"
        )
    for name, tensor in network.items():
        if not is_dense(tensor):
            raise CheckpointError(f"{path}: {PREFIX}{name} is not a plain dense tensor")
    return network, {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}


def _averaged(path: Path, network: Mapping[str, Readable], shadow: Any) -> dict[str, Readable]:
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
        if not is_dense(tensor) or tensor.shape != network[name].shape:
            raise CheckpointError(
                f"{path}: the averaged tensor in the place of {PREFIX}{name} does not fit it"
            )
        result[name] = tensor
    return result
