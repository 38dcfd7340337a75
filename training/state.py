"""The state of a run on disk: one safetensors file, replaced atomically, from which it resumes exactly.

Random numbers need no state: masks, times and dropout of step k are a function of (seed, k), and the order of
the data is a function of (seed, position).
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prime_core import atomic
from prime_core.weights import write_weights
from training.optim import ExponentialMovingAverage

STATE_NAME = "state.safetensors"


class StateError(ValueError):
    """A run cannot be resumed, started or saved; the message names the file and the remedy."""


@contextmanager
def exclusive_run(output: Path) -> Iterator[None]:
    """Hold the output folder for one trainer; the lock goes with the process, however it ends.

    Args:
        output: folder of the run; made if missing. The lock is the file `.lock` in it.

    Raises:
        StateError: another trainer holds it.
        OSError: the folder cannot be made.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(
                f"{output}: another trainer is writing here; stop it or choose another output"
            ) from None
        yield


def save_state(
    output: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: ExponentialMovingAverage,
    run: str,
) -> None:
    """Write weights, optimiser moments, average and step; a crash leaves the old state or the new one.

    Args:
        output: folder of the run.
        step: optimiser steps done.
        model: the network.
        optimizer: AdamW over its parameters, in their order.
        ema: the averaged weights.
        run: what identifies the run (see `load_state`).

    Raises:
        OSError: the disk is full, say; the old state stands.
    """
    moments = optimizer.state_dict()["state"]
    tensors: dict[str, Tensor] = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        tensors[f"model.{name}"] = parameter.detach()
        tensors[f"ema.{name}"] = ema.shadow[name]
        for key, value in moments.get(index, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    metadata = {"step": str(step), "num_updates": str(ema.num_updates), "run": run}

    def write(file: BinaryIO) -> None:
        write_weights(file, tensors, metadata)

    atomic.atomic_write(output / STATE_NAME, write)


def load_state(
    output: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: ExponentialMovingAverage, run: str
) -> int | None:
    """Restore what `save_state` wrote and return its step; None when nothing was saved.

    Args:
        output: folder of the run.
        model: receives the weights.
        optimizer: receives the moments.
        ema: receives the average.
        run: JSON of the settings; must equal what was saved, or the resumed run would not continue that run.

    Raises:
        StateError: the state is damaged or belongs to a run with other settings; nothing was restored.
    """
    path = output / STATE_NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        metadata = {} if found is None else found
        step, num_updates = int(metadata["step"]), int(metadata["num_updates"])
        saved_run = json.loads(metadata["run"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise StateError(f"{path} is damaged ({error}); move it away to start the run again") from None
    if metadata["run"] != run:
        raise StateError(
            f"{path} is of a run with other settings ({_differences(saved_run, json.loads(run))}); "
            "use these settings, or another output for another run"
        )
    parameters = dict(model.named_parameters())
    _check_tensors(path, tensors, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
            ema.shadow[name].copy_(tensors[f"ema.{name}"])
    keys = {name.split(".")[1] for name in tensors if name.startswith("optimizer.")}
    moments = {
        index: {key: tensors[f"optimizer.{key}.{name}"] for key in keys}
        for index, name in enumerate(parameters)
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments if keys else {}})
    ema.num_updates = num_updates
    return step


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Refuse a state that lacks a tensor or has one of another shape: copying would broadcast it."""
    kinds = {name.partition(".")[0] + "." for name in tensors}
    has_moments = "optimizer." in kinds
    keys = ["model", "ema"] + (["optimizer.exp_avg", "optimizer.exp_avg_sq"] if has_moments else [])
    for name, parameter in parameters.items():
        for key in keys:
            found = tensors.get(f"{key}.{name}")
            if found is None or found.shape != parameter.shape:
                shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
                raise StateError(
                    f"{path} does not fit the network: {key}.{name} is {shape}, expected "
                    f"{tuple(parameter.shape)}; move it away to start the run again"
                )
        if has_moments and f"optimizer.step.{name}" not in tensors:
            raise StateError(f"{path} lacks optimizer.step.{name}; move it away to start the run again")


def _differences(saved: Any, current: Any, prefix: str = "") -> str:
    """Name the settings that differ, with both values."""
    if not (isinstance(saved, dict) and isinstance(current, dict)):
        return f"{prefix}: {json.dumps(saved)} there, {json.dumps(current)} here"
    differing = [
        _differences(saved.get(key), current.get(key), f"{prefix}.{key}" if prefix else key)
        for key in sorted({*saved, *current})
        if saved.get(key) != current.get(key)
    ]
    return ", ".join(differing) if differing else "format"
