"""The one place where faults can be put in on purpose, for tests of the process as a whole.

Off unless the variable PRIME_TEST_FAULTS names a JSON file when the process starts; nothing of it can be reached over
HTTP, and a flag or a TOML key for it does not exist. The file holds a list of faults:

    [{"fault": "raise", "call": 3}, {"fault": "slow", "call": 1, "calls": 1000, "seconds": 0.01}]

Calls of a model are counted from 1; its warm-up is not counted.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from server.engine.model_queue import LoadedModel

logger = logging.getLogger("prime.server")

VARIABLE = "PRIME_TEST_FAULTS"


class Fault(BaseModel):
    """What goes wrong, and in which calls."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    fault: Literal["raise", "hang", "slow", "nan", "oom", "die", "leak"]
    call: int = Field(default=1, ge=1, description="the first call that it strikes")
    calls: int = Field(default=1, ge=1, description="how many calls it strikes")
    model: str | None = Field(default=None, description="of one model only")
    seconds: float = Field(default=3600.0, ge=0, description="of hang and slow")
    rows: int = Field(default=0, ge=0, description="oom strikes only calls of more rows")
    leaked_bytes: int = Field(default=4096, ge=1, description="what leak keeps of each call that it strikes")


def add_faults(models: Sequence[LoadedModel], environment: Mapping[str, str]) -> list[LoadedModel]:
    """Return the models, with faults in them if the environment asks for some.

    Args:
        models: as they were loaded.
        environment: of the process.

    Raises:
        ValueError: if the file that is named holds no list of faults.
    """
    path = environment.get(VARIABLE)
    if path is None:
        return list(models)
    faults = _read(Path(path))
    logger.warning(
        "%s is set: THIS SERVER FAILS ON PURPOSE, for tests only (%d faults)", VARIABLE, len(faults)
    )
    return [_faulty(model, faults) for model in models]


def _read(path: Path) -> list[Fault]:
    try:
        return TypeAdapter(list[Fault]).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ValueError(f"{VARIABLE}: {path} holds no list of faults: {error}") from None


def _faulty(model: LoadedModel, faults: Sequence[Fault]) -> LoadedModel:
    of_model = [fault for fault in faults if fault.model in (None, model.name)]
    denoiser: Any = FaultyDenoiser(model.checkpoint.denoiser, of_model)
    return LoadedModel(model.name, dataclasses.replace(model.checkpoint, denoiser=denoiser))


class FaultyDenoiser(nn.Module):
    """A network whose calls go wrong as they were told to."""

    def __init__(self, inner: nn.Module, faults: Sequence[Fault]) -> None:
        """Wrap a network.

        Args:
            inner: the network.
            faults: of its calls.
        """
        super().__init__()
        self.inner: Any = inner
        self._faults = faults
        self._num_calls = -1  # the warm-up is call 0
        self._num_rows = 0  # of the call that comes, without those that fill it up
        self._spoil = False
        self._leaked: list[bytes] = []

    def features(self, y_t: Tensor, lengths: Sequence[int], *arguments: Any, **named: Any) -> Any:
        """Run the trunk, see `Denoiser.features`, with the faults of this call."""
        self._num_calls += 1
        for fault in self._faults:
            if fault.call <= self._num_calls < fault.call + fault.calls:
                self._strike(fault)
        return self.inner.features(y_t, lengths, *arguments, **named)

    def _strike(self, fault: Fault) -> None:
        if fault.fault in ("hang", "slow"):
            time.sleep(fault.seconds)
        elif fault.fault == "oom":
            if self._num_rows > fault.rows:
                raise torch.OutOfMemoryError("out of memory, on purpose")
        elif fault.fault == "nan":
            self._spoil = True
        elif fault.fault == "leak":
            self._leaked.append(b"\xff" * fault.leaked_bytes)  # a page of zeros might take no memory
        elif fault.fault == "die":
            raise SystemExit("the engine's thread dies, on purpose")
        else:
            raise RuntimeError("a fault, on purpose")

    def head(self, features: Any) -> Tensor:
        """Run the head, see `Denoiser.head`; the first position of a spoilt call belongs to its first row."""
        logits: Tensor = self.inner.head(features)
        if self._spoil:
            self._spoil = False
            logits = logits.clone()
            logits[0] = torch.nan
        return logits

    def fill(self, lengths: Sequence[int]) -> list[int]:
        """See `Denoiser.fill`."""
        self._num_rows = len(lengths)
        filling: list[int] = self.inner.fill(lengths)
        return filling
