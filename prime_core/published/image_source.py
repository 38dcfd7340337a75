"""The tensors of a published image checkpoint (`.pth`): raw weights and moving average in one state dictionary.

`model` is the state of an EMA wrapper: `model.*` raw weights in parameter order, `shadow_params.N` their exponential
moving average by position, `num_updates`. Data-parallel training adds a `module.` to any of these names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from prime_core.published.tensors import Readable, is_dense
from prime_core.weights import CheckpointError

_PREFIX = re.compile(r"(?:module\.|model\.)*")
_PARTS = ("pixel_embedding.", "unet.")
_SHADOW = re.compile(r"(?:module\.)*shadow_params\.(0|[1-9][0-9]{0,5})")
_UPDATES = re.compile(r"(?:module\.)*num_updates")


def is_image(names: Iterable[str]) -> bool:
    """Return whether one of the names is of a published image network."""
    return any(_PREFIX.sub("", name, count=1).startswith(_PARTS) for name in names)


def split_image(
    path: Path, tensors: Mapping[str, Readable]
) -> tuple[dict[str, Readable], dict[str, Readable]]:
    """Split a state dictionary into the network and the rest.

    Returns:
        The network's tensors in order, names without `module.`, `model.` and `unet.`; and the others.

    Raises:
        CheckpointError: no image network is inside, a tensor is none, or two names mean the same tensor.
    """
    network: dict[str, Readable] = {}
    others: dict[str, Readable] = {}
    for name, tensor in tensors.items():
        bare = _PREFIX.sub("", name, count=1)
        if "model." not in name[: len(name) - len(bare)] and not bare.startswith(_PARTS):
            others[name] = tensor
            continue
        inner = bare.removeprefix("unet.")
        if not is_dense(tensor):
            raise CheckpointError(f"{path}: {name[:200]} is not a plain dense tensor")
        if inner in network:
            raise CheckpointError(f"{path}: tensor {name[:200]!r} is there twice, under different prefixes")
        network[inner] = tensor
    if not is_image(tensors):
        raise CheckpointError(
            f"{path}: no published image network is inside: no tensor is named model.unet.* or "
            "model.pixel_embedding.*"
        )
    return network, others


def averaged_image(
    path: Path, network: Mapping[str, Readable], others: dict[str, Readable]
) -> tuple[dict[str, Readable], int | None]:
    """Put the moving average in place of the parameters, by position.

    Args:
        path: what to name in messages.
        network: raw tensors in parameter order.
        others: where the average is; its tensors are taken out.

    Returns:
        The averaged network, and the number of updates if the file tells it.

    Raises:
        CheckpointError: the average is missing, incomplete or does not fit.
    """
    shadow, num_updates = take_average(others)
    if not shadow:
        raise CheckpointError(
            f"{path}: no moving average inside (model['shadow_params.N']); pass --raw for raw weights"
        )
    missing = next((index for index in range(len(network)) if index not in shadow), None)
    if missing is not None:
        raise CheckpointError(
            f"{path}: shadow_params.{missing} is missing: {len(shadow)} averaged tensors for {len(network)} "
            "parameters; pass --raw for raw weights"
        )
    if len(shadow) != len(network):
        raise CheckpointError(
            f"{path}: {len(shadow)} averaged tensors (shadow_params.N) for {len(network)} parameters; pass --raw "
            "for raw weights"
        )
    result = {}
    for index, (name, raw) in enumerate(network.items()):
        if not is_dense(shadow[index]) or shadow[index].shape != raw.shape:
            raise CheckpointError(f"{path}: shadow_params.{index} does not fit {name}, whose average it is")
        result[name] = shadow[index]
    return result, num_updates


def take_average(others: dict[str, Readable]) -> tuple[dict[int, Readable], int | None]:
    """Take the wrapper's own tensors out: the average by position, and the number of updates."""
    shadow: dict[int, Readable] = {}
    num_updates = None
    for name in list(others):
        if match := _SHADOW.fullmatch(name):
            shadow[int(match[1])] = others.pop(name)
        elif _UPDATES.fullmatch(name):
            tensor = others.pop(name)
            if is_dense(tensor) and tensor.shape in ((), (1,)) and not tensor.dtype.is_floating_point:
                num_updates = int(tensor.read())
    return shadow, num_updates
