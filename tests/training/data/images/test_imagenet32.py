"""ImageNet-32: both official forms, conversion once, and refusal of bad batches with nothing half-cached."""

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.data.images.image_files import Made, make_imagenet32_batches, make_npz, python2_batch
from training.data.images import DataError, Split, imagenet32, open_images
from training.data.images.imagenet32 import read_imagenet32
from training.data.images.npz import iter_npz_rows, read_npz_labels
from training.data.images.planar import LabelRange

SPLITS: tuple[Split, ...] = ("train", "heldout")


def _assert_reads(folder: Path, cache: Path, made: dict[str, Made]) -> None:
    for split in SPLITS:
        images = open_images("imagenet32", folder, split, cache, verify=False)
        pixels, labels = made[split]
        assert np.array_equal(images.pixels, pixels)
        assert images.labels is not None and images.labels.dtype == np.int64
        assert np.array_equal(images.labels, labels) and images.labels.max() == 999
        assert len(images.label_names) == 1000 and images.label_names[7] == "class 7"


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("numpy_labels", [False, True])
def test_reads_pickled_batches(
    tmp_path: Path, protocol: int, numpy_labels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagenet32, "_CHUNK", 2)
    made = make_imagenet32_batches(tmp_path / "in", 3, protocol=protocol, numpy_labels=numpy_labels)
    _assert_reads(tmp_path / "in", tmp_path / "cache", made)


@pytest.mark.parametrize("compress", [False, True])
def test_reads_npz_batches(tmp_path: Path, compress: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet32, "_CHUNK", 2)
    made = make_npz(tmp_path / "in", 3, compress=compress)
    _assert_reads(tmp_path / "in", tmp_path / "cache", made)


def test_reads_module_names_of_numpy_1_and_of_python_2(tmp_path: Path) -> None:
    made = make_imagenet32_batches(tmp_path, 2)
    path = tmp_path / "val_data"
    old = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in old
    path.write_bytes(old)
    images = read_imagenet32(tmp_path, "heldout", tmp_path / "cache", verify=False)
    assert np.array_equal(images.pixels, made["heldout"][0])
    rows = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    path.write_bytes(python2_batch([1, 1000], rows))
    images = read_imagenet32(tmp_path, "heldout", tmp_path / "cache", verify=False)
    assert images.pixels[1, 0, 1].tolist() == [rows[1, 1], rows[1, 1025], rows[1, 2049]]
    assert images.labels is not None and images.labels.tolist() == [0, 999]


def test_converts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_imagenet32_batches(tmp_path / "in", 2)
    first = read_imagenet32(tmp_path / "in", "heldout", tmp_path / "cache", verify=False)
    monkeypatch.setattr(imagenet32, "_convert", lambda *_: pytest.fail("converted again"))
    again = read_imagenet32(tmp_path / "in", "heldout", tmp_path / "cache", verify=False)
    assert np.array_equal(first.pixels, again.pixels) and isinstance(again.pixels, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        again.pixels[0] = 0


def test_batches_without_all_images_are_refused_before_and_after_a_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_imagenet32_batches(tmp_path / "in", 2)
    cache = tmp_path / "cache"
    message = "val_data and .*: 2 images instead of 50000; .*set verify to false"
    with pytest.raises(DataError, match=message):
        read_imagenet32(tmp_path / "in", "heldout", cache)
    assert not list(cache.iterdir())
    assert len(read_imagenet32(tmp_path / "in", "heldout", cache, verify=False)) == 2
    with pytest.raises(DataError, match=message):
        read_imagenet32(tmp_path / "in", "heldout", cache)
    monkeypatch.setattr(imagenet32, "NUM_IMAGES", {"train": 20, "heldout": 2})
    assert len(read_imagenet32(tmp_path / "in", "train", cache)) == 20


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither val_data nor val_data.npz"):
        read_imagenet32(tmp_path, "heldout", tmp_path / "cache")
    make_imagenet32_batches(tmp_path, 1)
    (tmp_path / "train_data_batch_7").unlink()
    with pytest.raises(DataError, match=r"train_data_batch_7: is missing; all 10 files"):
        read_imagenet32(tmp_path, "train", tmp_path / "cache")


class _Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return exec, (f"import pathlib; pathlib.Path({str(self.path)!r}).write_text('ran')",)


def _rows(*shape: int, dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
    return np.zeros(shape, dtype=dtype)


def _objects() -> np.ndarray[Any, Any]:
    array = np.empty((2, 3072), dtype=object)
    array.fill(0)
    return array


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"data": _rows(2, 3072), "labels": [0, 1]}, "record 0: label 0, not 1..1000"),
        ({"data": _rows(2, 3072), "labels": [1, 1001]}, "record 1: label 1001, not 1..1000"),
        ({"data": _rows(2, 3072), "labels": np.array([1000, 1001])}, "record 1: label 1001"),
        ({"data": _rows(2, 3072), "labels": [1, True]}, "record 1: label of another kind"),
        ({"data": _rows(2, 3072), "labels": [1, 2.0]}, "record 1: label of another kind"),
        ({"data": _rows(2, 3072), "labels": [1, 2**1000]}, "record 1: label of another kind"),
        ({"data": _rows(2, 3072), "labels": np.array([1.0, 2.0])}, "labels of type float64"),
        ({"data": _rows(2, 3072), "labels": [1]}, "1 labels for 2 images"),
        ({"data": _rows(2, 3072), "labels": _rows(2, 1) + 1}, "holds no list named labels"),
        ({"data": _rows(2, 3072)}, "holds no list named labels"),
        ({"labels": [1, 2]}, "holds no array named data"),
        ({"data": [1, 2], "labels": [1, 2]}, "holds no array named data"),
        ({"data": _rows(2, 3071), "labels": [1, 2]}, r"data is uint8 \(2, 3071\), not uint8"),
        ({"data": _rows(2, 3, 32, 32), "labels": [1, 2]}, r"data is uint8 \(2, 3, 32, 32\)"),
        ({"data": _rows(0, 3072), "labels": []}, r"data is uint8 \(0, 3072\)"),
        ({"data": _rows(2, 3072, dtype=np.int8), "labels": [1, 2]}, "data is int8"),
        ({"data": _objects(), "labels": [1, 2]}, r"offset \d+: an array of objects"),
        ({"data": _rows(2, 3072)[:, ::-1].T.copy().T, "labels": [1, 2]}, "not stored row by row"),
        ([1, 2], "something other than one dictionary"),
        ({1: 2}, "a dictionary key that is not a text"),
    ],
)
def test_a_bad_batch_is_refused_by_place(tmp_path: Path, batch: Any, message: str) -> None:
    path = tmp_path / "in" / "val_data"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(batch, protocol=3))
    with pytest.raises(DataError, match=message) as caught:
        read_imagenet32(path.parent, "heldout", tmp_path / "cache", verify=False)
    assert str(caught.value).startswith(f"{path}: ")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, protocol: int) -> None:
    """The good part comes first, the code after it; the file is one that pickle itself would obey."""
    path, trace = tmp_path / "in" / "val_data", tmp_path / "trace"
    path.parent.mkdir()
    content = pickle.dumps({"labels": [1, 2], "extra": _Bomb(trace)}, protocol=protocol)
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"offset \d+: names '(__builtin__|builtins)' 'exec'.*nothing.*was run"
    ):
        read_imagenet32(path.parent, "heldout", tmp_path / "cache", verify=False)
    assert not trace.exists() and not list((tmp_path / "cache").iterdir())
    pickle.loads(content)
    assert trace.read_text() == "ran"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "offset 6.*truncated: 1 bytes expected, 0 left"),
        (lambda content: content[:3000], r"truncated: \d+ bytes announced"),
        (lambda _: b"", "truncated: 1 bytes expected"),
        (lambda content: content + b"x", "1 trailing bytes"),
        (lambda content: content[:-1] + b"0.", "instruction b'0' is not known here"),
        (lambda _: b"(dp0\n.", "not a pickle of protocol 2"),
        (lambda _: b"PK\x03\x04", "not a pickle of protocol 2"),
    ],
)
def test_a_damaged_pickle_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    make_imagenet32_batches(tmp_path / "in", 2)
    path = tmp_path / "in" / "val_data"
    batch = {"data": _rows(2, 3072), "labels": [1, 2]}
    path.write_bytes(damage(pickle.dumps(batch, protocol=3)))
    with pytest.raises(DataError, match=message):
        read_imagenet32(path.parent, "heldout", tmp_path / "cache", verify=False)
    assert not list((tmp_path / "cache").iterdir())


def _npz(path: Path, **members: bytes | np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in members.items():
            content = member
            if not isinstance(content, bytes):
                stream = io.BytesIO()
                np.save(stream, content, allow_pickle=True)
                content = stream.getvalue()
            archive.writestr(f"{name}.npy", content)


def _saved(array: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _header(*shape: int) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"data": _rows(2, 3072), "labels": np.array([1, 1001])}, "record 1: label 1001"),
        (
            {"data": _rows(2, 3072), "labels": np.array([1.0, 2.0])},
            "labels: .*elements that are no whole numbers",
        ),
        ({"data": _rows(2, 3072), "labels": np.array([1])}, r"labels are int64 \(1,\)"),
        ({"data": _rows(2, 3071), "labels": np.array([1, 2])}, r"data is uint8 \(2, 3071\)"),
        ({"data": _objects(), "labels": np.array([1, 2])}, "data: damaged or refused .an array of objects"),
        ({"data": _rows(2, 3072), "labels": np.array([1, None])}, "labels: .*an array of objects"),
        ({"data": _rows(2, 3072)}, "does not hold one array named labels"),
        ({"labels": np.array([1, 2])}, "does not hold one array named data"),
        ({"data": b"not numpy", "labels": np.array([1])}, "data: damaged or refused"),
        ({"data": _header(1, 3072), "labels": np.array([1])}, "3072 bytes expected, 0 left"),
        (
            {"data": _header(1, 3072) + bytes(9999), "labels": np.array([1])},
            "trailing bytes after record 0",
        ),
        ({"data": _header(99999999, 3072), "labels": np.array([1])}, r"not uint8 \(1..200000, 3072\)"),
        (
            {"data": b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "labels": np.array([1])},
            "a header of 4294967295 bytes",
        ),
        ({"data": b"\x93NUMPY\x04\x00\x00\x00", "labels": np.array([1])}, "version .4, 0."),
        (
            {"data": _rows(1, 3072), "labels": _saved(np.array([1])) + b"x"},
            "labels: trailing bytes after record 0",
        ),
        ({"data": _rows(2, 3072)[:, ::-1].T.copy().T, "labels": np.array([1, 2])}, "not stored row by row"),
    ],
)
def test_a_bad_npz_is_refused_by_place(tmp_path: Path, members: dict[str, Any], message: str) -> None:
    path = tmp_path / "in" / "val_data.npz"
    _npz(path, **members)
    with pytest.raises(DataError, match=message) as caught:
        read_imagenet32(path.parent, "heldout", tmp_path / "cache", verify=False)
    assert str(caught.value).startswith(f"{path}: ")
    assert not list((tmp_path / "cache").iterdir())


def test_a_batch_that_is_cut_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_imagenet32_batches(tmp_path / "in", 3)
    path, cache = tmp_path / "in" / "val_data", tmp_path / "cache"
    read, calls = imagenet32.read_pickled_batch, [0]

    def cut(*arguments: Any) -> Any:
        batch = read(*arguments)
        calls[0] += 1
        if calls[0] == 2:  # the labels have been read, and now the pictures are
            os.truncate(path, 3000)
        return batch

    monkeypatch.setattr(imagenet32, "read_pickled_batch", cut)
    with pytest.raises(DataError, match=r"val_data: changed while it was read \(the file ends inside rows"):
        read_imagenet32(path.parent, "heldout", cache, verify=False)
    assert not list(cache.iterdir())


def test_an_array_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "val_data.npz"
    _npz(path, data=_rows(1, 3072), labels=np.array([1]))
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore", UserWarning)
        archive.writestr("labels.npy", _saved(np.array([2])))
    with pytest.raises(DataError, match="does not hold one array named labels"):
        read_imagenet32(tmp_path, "heldout", tmp_path / "cache", verify=False)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.99])
def test_a_damaged_npz_is_refused(tmp_path: Path, place: float) -> None:
    make_npz(tmp_path / "in", 2, compress=False)
    path = tmp_path / "in" / "Imagenet32_val_npz" / "val_data.npz"
    content = path.read_bytes()
    at = int(place * len(content))
    for damaged in (content[:at], content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"val_data.npz: "):
            read_imagenet32(tmp_path / "in", "heldout", tmp_path / "cache", verify=False)
        assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_a_damaged_compressed_member_is_refused(tmp_path: Path, method: int) -> None:
    """Bytes of the compressed stream are overwritten one place after another: the truth or a DataError."""
    path = tmp_path / "val_data.npz"
    rows = np.random.default_rng(0).integers(0, 256, (1, 3072), np.uint8)
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("data.npy", _saved(rows))
        archive.writestr("labels.npy", _saved(np.array([1])))
    content = path.read_bytes()
    start = content.index(b"data.npy") + len(b"data.npy")
    places = [*range(start, start + 12), start + 1000, start + 3000]
    refused = 0
    for place in places:
        path.write_bytes(content[:place] + b"\xff\xff\xff\xff" + content[place + 4 :])
        try:
            labels = read_npz_labels(path, LabelRange(1, 1000), 10)
            found = list(iter_npz_rows(path, len(labels), 10))
        except DataError:
            refused += 1
        else:
            assert np.array_equal(found, [rows])  # two bytes of LZMA's head name its version and mean nothing
    assert refused >= len(places) - 2
