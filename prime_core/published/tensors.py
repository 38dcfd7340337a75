"""Tensors of foreign files, read on demand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from prime_core.published.unpickler import ArchiveTensor
from prime_core.weights import WeightsFile


class Readable(Protocol):
    """A tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        ...

    def read(self) -> Tensor:
        """Return the tensor on the CPU."""
        ...


@dataclass(frozen=True)
class FileTensor:
    """A tensor of an open safetensors file."""

    weights: WeightsFile
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        return self.weights.tensors[self.name].shape

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        return self.weights.tensors[self.name].dtype

    def read(self) -> Tensor:
        """Return the tensor on the CPU."""
        return self.weights.read(self.name)


def is_dense(tensor: object) -> TypeGuard[ArchiveTensor | FileTensor]:
    """Return whether this is a tensor that can be read, not a record or a number in its place."""
    return isinstance(tensor, (ArchiveTensor, FileTensor))
