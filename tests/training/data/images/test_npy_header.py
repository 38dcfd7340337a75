"""The header of an array: what numpy writes is read as numpy reads it, and everything else is refused in a sentence."""

import io
import struct
import warnings
from typing import Any

import numpy as np
import pytest

from training.data.images.npy_header import HeaderError, read_npy_header


def _written(header: bytes, version: int = 1) -> io.BytesIO:
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return io.BytesIO(b"\x93NUMPY" + bytes([version, 0]) + length + header)


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">u4", "<i8", ">u8"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3072)])
def test_reads_what_numpy_writes(dtype: str, version: tuple[int, int], shape: tuple[int, ...]) -> None:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # later versions are not needed for this
        np.lib.format.write_array(stream, np.zeros(shape, dtype), version=version)
    stream.seek(0)
    assert read_npy_header(stream) == (np.dtype(dtype), shape)
    assert len(stream.read()) == int(np.prod(shape)) * np.dtype(dtype).itemsize


def _fields(**changes: Any) -> bytes:
    fields = {"descr": "|u1", "fortran_order": False, "shape": (1, 3072)} | changes
    return repr(fields).encode() + b"\n"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{'descr': '|u1', ", "no dictionary of plain values"),
        (b"[" * 1000, "no dictionary of plain values"),
        (b"(" * 1000, "no dictionary of plain values"),
        (b"-" * 1000 + b"1", "no dictionary of plain values"),
        (b"(" * 5000, "a header of 5000 bytes, at most 1024"),
        (b"{[]: 1}", "no dictionary of plain values"),
        (b"{b'a':{1:{}},'shape':set()}", "without exactly the keys"),
        (b"\n  x\n y", "no dictionary of plain values"),
        (b"{'descr': '|u1', 'fortran_order': False, 'shape': (2L, 3072L)}", "no dictionary of plain values"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (١, 3072)}".encode(), "no dictionary of plain"),
        (
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 3072), \0}",
            "no dictionary of plain values",
        ),
        (b"1\0", "no dictionary of plain values"),
        (b"", "no dictionary of plain values"),
        (_fields(more=1), "without exactly the keys"),
        (b"{'descr': '|u1'}", "without exactly the keys"),
        (_fields(descr="|O"), "an array of objects"),
        (_fields(descr="<f8"), "elements that are no whole numbers"),
        (_fields(descr=[("a", "u1")]), "elements that are no whole numbers"),
        (_fields(descr="u1,u1"), "elements that are no whole numbers"),
        (_fields(shape=[1, 3072]), "a shape that is none"),
        (_fields(shape=(-1, 3072)), "a shape that is none"),
        (_fields(shape=(True, 3072)), "a shape that is none"),
        (_fields(shape=(2**63, 3072)), "a shape that is none"),
        (_fields(shape=(1,) * 9), "a shape that is none"),
        (_fields(fortran_order=True), "not stored row by row"),
        (_fields(fortran_order=0), "not stored row by row"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_refuses_other_headers(header: bytes, message: str, version: int) -> None:
    with pytest.raises(HeaderError, match=message):
        read_npy_header(_written(header, version))


def test_reads_a_row_in_either_order_and_a_header_as_long_as_it_may_be() -> None:
    assert read_npy_header(_written(_fields(fortran_order=True, shape=(3,)))) == (np.dtype("u1"), (3,))
    assert read_npy_header(_written(_fields().rstrip().ljust(1023) + b"\n")).shape == (1, 3072)
    with pytest.raises(HeaderError, match="a header of 1025 bytes, at most 1024"):
        read_npy_header(_written(_fields().rstrip().ljust(1024) + b"\n"))


@pytest.mark.parametrize("length", [0, 3, 7, 9, 40])
def test_refuses_a_truncated_header(length: int) -> None:
    content = _written(_fields()).getvalue()
    with pytest.raises(HeaderError, match=r"not an array|ends inside the header"):
        read_npy_header(io.BytesIO(content[:length]))
