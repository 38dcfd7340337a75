"""Runs the pickle program of a foreign PyTorch checkpoint in a world where nothing can happen.

The unpickler knows five kinds of names: the two functions that describe a tensor, the ordered dictionary,
torch.Size and the storage types. Every other class or function becomes an inert record of its name and
arguments. Tensors come out as descriptions (`ArchiveTensor`) that read their numbers on demand, so optimiser
state that nobody asks for is never read.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from prime_core.weights import CheckpointError

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class InertRecord:
    """What stands for an object of a class that is not known here: its name and what was given to it.

    Attributes:
        kind: "module.name" as the pickle spells it.
        args: arguments it was called or made with.
        state: what its state would have been restored from; None if nothing.
        items: pairs that were assigned into it, values that were appended to it.
    """

    __slots__ = ("args", "items", "state")
    kind: ClassVar[str] = ""
    args: tuple[Any, ...]
    items: list[Any]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> InertRecord:
        """Keep the arguments; nothing is computed from them."""
        record = super().__new__(cls)
        record.args = (*args, kwargs) if kwargs else args
        record.state = None
        record.items = []
        return record

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept what `__new__` kept."""

    def __call__(self, *args: Any) -> InertRecord:
        """Stand for the result of calling an unknown object."""
        return InertRecord(self, *args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Keep one appended value."""
        self.items.append(value)

    def extend(self, values: Any) -> None:
        """Keep appended values."""
        self.items.append(values)

    add = append


class PlainMapping(dict[Any, Any]):
    """Stands for collections.OrderedDict; attributes that were hung onto it (`_metadata`) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Ignore attributes."""


class _Storage:
    """A storage that the pickle refers to: zip entry and element type."""

    __slots__ = ("dtype", "entry", "numel")

    def __init__(self, entry: zipfile.ZipInfo, dtype: torch.dtype, numel: int) -> None:
        self.entry, self.dtype, self.numel = entry, dtype, numel

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("state for a storage")


class ArchiveTensor:
    """A tensor of the archive whose numbers are read on demand.

    Attributes:
        shape: sizes.
        dtype: element type.
    """

    __slots__ = ("_archive", "_offset", "_storage", "_stride", "dtype", "shape")

    def __init__(
        self,
        archive: zipfile.ZipFile,
        storage: _Storage,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        self._archive, self._storage, self._offset, self._stride = archive, storage, offset, stride
        self.shape, self.dtype = shape, storage.dtype

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("state for a tensor")

    def read(self) -> Tensor:
        """Return the tensor on the CPU, contiguous.

        Raises:
            CheckpointError: the entry is damaged.
        """
        name = self._storage.entry.filename
        try:
            content = self._archive.read(self._storage.entry)
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise CheckpointError(f"{self._archive.filename}: {name}: {error}; fetch it again") from None
        if len(content) != self._storage.entry.file_size:
            raise CheckpointError(f"{self._archive.filename}: {name} is truncated; fetch the file again")
        flat = (
            torch.frombuffer(bytearray(content), dtype=self.dtype)
            if content
            else torch.empty(0, dtype=self.dtype)
        )
        return flat.as_strided(self.shape, self._stride, self._offset).clone(
            memory_format=torch.contiguous_format
        )


class _Function:
    """A function that the pickle may call. Frozen: it has no attributes that a pickle could set."""

    __slots__ = ("_call",)

    def __init__(self, call: Any) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("state for a function")


class Unpickler(pickle.Unpickler):
    """Runs a checked pickle program in a world of descriptions."""

    def __init__(self, program: bytes, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(program), encoding="latin1")
        self._archive, self._root = archive, root
        self._records: dict[tuple[str, str], type[InertRecord]] = {}
        self._entries = {entry.filename: entry for entry in archive.infolist()}
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): PlainMapping,
            ("torch", "Size"): _Function(_size),
            ("torch._utils", "_rebuild_tensor_v2"): _Function(self._rebuild_tensor),
            ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
        }

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for module.name; nothing is ever imported."""
        key = (module, name)
        if key in self._known:
            return self._known[key]
        if key not in self._records:
            members = {"__slots__": (), "kind": f"{module}.{name}"}
            self._records[key] = type("InertRecord", (InertRecord,), members)
        return self._records[key]

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that ("storage", type, key, location, numel) names, its size checked."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[2], str)):
            raise pickle.UnpicklingError("a persistent id that is not a storage")
        _, kind, key, _, numel = pid
        name = getattr(kind, "kind", "") if isinstance(kind, type) else ""
        dtype = _STORAGE_DTYPES.get(name.removeprefix("torch."))
        entry = self._entries.get(f"{self._root}/data/{key}")
        if dtype is None or not name.startswith("torch."):
            raise pickle.UnpicklingError(f"storage {key[:80]!r} has a type that is not supported")
        if entry is None:
            raise pickle.UnpicklingError(f"storage {key[:80]!r} is missing")
        if type(numel) is not int or numel < 0 or numel * dtype.itemsize != entry.file_size:
            raise pickle.UnpicklingError(f"storage {key[:80]!r} does not have the declared size")
        return _Storage(entry, dtype, numel)

    def _rebuild_tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> ArchiveTensor:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        if not (
            _are_sizes(shape) and _are_sizes(stride) and _are_sizes((offset,)) and len(shape) == len(stride)
        ):
            raise pickle.UnpicklingError("a tensor with an impossible shape")
        numel, last = 1, offset
        for size, step in zip(shape, stride, strict=True):
            numel *= size
            last += (size - 1) * step
        # An expanded view can claim any number of elements; weights never are one.
        if (
            numel > storage.numel
            or (numel and last >= storage.numel)
            or offset > storage.numel
            or len(shape) > 16
        ):
            raise pickle.UnpicklingError("a tensor reaches outside its storage")
        return ArchiveTensor(self._archive, storage, offset, tuple(shape), tuple(stride))


def _are_sizes(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and 0 <= value < 2**48 for value in values)


def _size(values: Any = ()) -> tuple[int, ...]:
    if not isinstance(values, (list, tuple)) or len(values) > 16 or not _are_sizes(tuple(values)):
        raise pickle.UnpicklingError("an impossible torch.Size")
    return tuple(values)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data
