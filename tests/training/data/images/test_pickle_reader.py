"""The pickle reader agrees with pickle on data, and refuses programs without running or copying anything."""

import io
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.data.images import DataError, pickle_reader
from training.data.images.pickle_reader import read_pickled_dict
from training.data.images.pickled_numpy import PickledArray

FILE = Path("batch")


def _read(content: bytes) -> dict[str, Any]:
    return read_pickled_dict(io.BytesIO(content), FILE)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_those_of_pickle(protocol: int) -> None:
    integers = [0, 255, 256, 65_535, 65_536, -1, 2**31, -(2**63), 2**200]
    value = {
        "integers": integers,
        "others": [None, True, False, 1.5, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    }
    value["same"] = value["integers"]
    value["texts"] = ["naïve", {"a": [{}]}, []]
    read = _read(pickle.dumps(value, protocol=protocol))
    assert read == value and read["same"] is read["integers"]


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4", "<f4", "<f8", "?", "<u2"])
def test_arrays_are_those_of_pickle(protocol: int, dtype: str) -> None:
    array = np.arange(24).reshape(6, 4).astype(dtype)
    content = pickle.dumps({"array": array, "list": list(range(2000))}, protocol=protocol)
    found = _read(content)["array"]
    assert isinstance(found, PickledArray) and found.dtype == array.dtype and found.shape == (6, 4)
    assert np.array_equal(found.read(io.BytesIO(content), 2, 5), array[2:5])
    with pytest.raises(EOFError, match=r"ends inside rows 5\.\.5"):
        found.read(io.BytesIO(content[: found.offset + 21]), 5, 6)


def test_large_arrays_are_left_in_the_file() -> None:
    class Counting(io.BytesIO):
        given = 0

        def read(self, size: int | None = -1, /) -> bytes:
            content = super().read(size)
            self.given += len(content)
            return content

    file = Counting(pickle.dumps({"data": np.zeros((1000, 3072), np.uint8)}, protocol=4))
    assert read_pickled_dict(file, FILE)["data"].shape == (1000, 3072)
    assert file.given < 1000


# Each is one program, written by hand: protocol 2, then the instructions.
PROGRAMS = {
    "global": (b"cos\nsystem\n", "offset 2: names 'os' 'system'"),
    "stack global": (b"X\x02\0\0\0osX\x06\0\0\0system\x93", "names 'os' 'system'"),
    "dotted": (b"cnumpy\ndtype.__class__\n", "names 'numpy' 'dtype.__class__'"),
    "numpy exec": (b"cnumpy.testing._private.utils\nrunstring\n", "names 'numpy.testing"),
    "inst": (b"(ios\nsystem\n", "instruction b'i' is not known"),
    "obj": (b"(cnumpy\ndtype\no", "instruction b'o' is not known"),
    "newobj": (b"cnumpy\ndtype\n)\x81", r"instruction b'\\x81' is not known"),
    "persistent": (b"Pid\n", "instruction b'P' is not known"),
    "extension": (b"\x82\x01", r"instruction b'\\x82' is not known"),
    "call a list": (b"])R", "calls something that is not known here"),
    "call with a list": (b"cnumpy\ndtype\n]R", "calls something that is not known here"),
    "dtype of objects": (b"cnumpy\ndtype\nX\x02\0\0\0O8K\0K\1\x87R", "an array of objects"),
    "dtype of no width": (b"cnumpy\ndtype\nX\x02\0\0\0f1K\0K\1\x87R", "not numeric"),
    "dtype of more": (b"cnumpy\ndtype\nX\x03\0\0\0u1,K\0K\1\x87R", "not numeric"),
    "dtype of old": (
        b"cnumpy\ndtype\nX\2\0\0\0u1K\0K\1\x87R(K\2X\1\0\0\0|NNNK\0K\0K\0tb",
        "an array of records",
    ),
    "dtype of parts": (
        b"cnumpy\ndtype\nX\2\0\0\0u1K\0K\1\x87R(K\3X\1\0\0\0|X\1\0\0\0aNNK\0K\0K\0tb",
        "an array of records",
    ),
    "array of another class": (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\n\x85R",
        "calls reconstruct in a way that is not known here",
    ),
    "array by columns": (
        b"cnumpy.core.numeric\n_frombuffer\n(C\1xNNX\1\0\0\0FtR",
        "calls frombuffer in a way that is not known here",
    ),
    "numpy load": (b"cnumpy\nload\n", "names 'numpy' 'load'"),
    "state of a list": (b"]}b", "sets the state of something that is not an array"),
    "state of a dict": (b"}}b", "sets the state of something that is not an array"),
    "bare array": (
        b"}X\x01\0\0\0acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x85Rs.",
        "an array without numbers",
    ),
    "empty stack": (b"R", "finds nothing to work on"),
    "append to nothing": (b"K\1a", "finds no list to work on"),
    "no mark": (b"t", "a mark is missing"),
    "odd": (b"}(K\1u", "a key without a value"),
    "twice": (b"}(X\1\0\0\0aNX\1\0\0\0aNu", "occurs twice"),
    "empty memo": (b"h\7", "memo 7 is empty"),
    "negative length": (b"T\xff\xff\xff\xff", "truncated: -1 bytes announced"),
    "huge length": (b"\x8e" + b"\xff" * 8, "truncated: 18446744073709551615 bytes announced"),
    "huge text": (b"X\xff\xff\xff\x7f", "a text of 2147483647 bytes, at most 4096"),
    "leftover": (b"}}.", "something other than one dictionary"),
    "nothing": (b".", "something other than one dictionary"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_refused(name: str) -> None:
    program, message = PROGRAMS[name]
    with pytest.raises(DataError, match=message) as caught:
        _read(b"\x80\x02" + program)
    assert str(caught.value).startswith("batch: offset ")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (b"M\xff\xffM\xff\xff\x86", "takes 4294836225 bytes has 1"),
        (b"K\0\x85", "takes 0 bytes has 1"),
        (b"K\1K\1J\xff\xff\xff\xff\x87", "impossible shape"),
        (b"\x8a\x20" + b"\x7f" * 32 + b"\x85", "impossible shape"),
        (b"\x88\x85", "impossible shape"),
        (b")", "without a shape of 1..4 sizes"),
        (b"(" + b"K\1" * 5 + b"t", "without a shape of 1..4 sizes"),
        (b"]", "without a shape of 1..4 sizes"),
    ],
)
def test_an_impossible_array_is_refused(shape: bytes, message: str) -> None:
    element = b"cnumpy\ndtype\nX\x02\0\0\0u1K\0K\1\x87R(K\3X\1\0\0\0|NNNK\0K\0K\0tb"
    program = b"cnumpy.core.numeric\n_frombuffer\n(C\1x" + element + shape + b"X\1\0\0\0CtR"
    with pytest.raises(DataError, match=message):
        _read(b"\x80\x02}X\1\0\0\0a" + program + b"s.")


def test_nested_and_shared_values_cost_what_they_weigh() -> None:
    """A list of lists of lists with 2**60 elements in all, and 100,000 lists inside one another."""
    shared = b"]q\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))
    deep = b"](" * 100_000 + b"e" * 100_000
    began = time.monotonic()
    assert list(_read(b"\x80\x02}X\1\0\0\0a](" + shared + b"es.")) == ["a"]
    assert list(_read(b"\x80\x02}X\1\0\0\0a" + deep + b"s.")) == ["a"]
    assert time.monotonic() - began < 5
    with pytest.raises(DataError, match="a name that is not a text"):
        _read(b"\x80\x02](" + shared + b"eh\1\x93")


def test_the_number_of_instructions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_reader, "MAX_INSTRUCTIONS", 1000)
    with pytest.raises(DataError, match="offset 1000: more than 1000 instructions"):
        _read(b"\x80\x02" + b"N" * 5000)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_random_damage_is_read_or_refused(protocol: int) -> None:
    good = pickle.dumps({"data": np.ones((3, 16), np.uint8), "labels": [1, 2, 300]}, protocol=protocol)
    generator = np.random.default_rng(protocol)
    refused = 0
    for _ in range(1500):
        content = bytearray(good)
        for place in generator.integers(0, len(good), generator.integers(1, 4)):
            content[place] = generator.integers(0, 256)
        try:
            _read(bytes(content))
        except DataError:
            refused += 1
    assert 0 < refused < 1500


def test_the_size_of_a_frame_is_a_hint() -> None:
    assert _read(b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"}\x94\x8c\x01a\x94Ns.") == {"a": None}
