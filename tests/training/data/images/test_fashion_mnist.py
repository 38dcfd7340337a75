"""Fashion-MNIST: what is read, and that a damaged or hostile file is refused by name and offset."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.training.data.images.image_files import make_idx
from training.data.images import DataError, open_images
from training.data.images.fashion_mnist import LABEL_NAMES, read_fashion_mnist

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_reads_what_was_written(tmp_path: Path, split: str, compress: bool) -> None:
    pixels, labels = make_idx(tmp_path / "idx", 12, split=split, compress=compress)
    images = open_images("fashion-mnist", tmp_path / "idx", split, tmp_path / "cache")  # type: ignore[arg-type]
    assert np.array_equal(images.pixels, pixels)
    assert images.labels is not None and np.array_equal(images.labels, labels)
    assert (
        images.name == f"fashion-mnist/{split}" and images.picture_shape == (28, 28, 1) and len(images) == 12
    )
    assert images.label_names[0] == "T-shirt/top" and images.label_names[9] == "Ankle boot"
    assert not (tmp_path / "cache").exists()


def test_arrays_are_read_only_and_indexing_copies(tmp_path: Path) -> None:
    make_idx(tmp_path, 3)
    images = read_fashion_mnist(tmp_path, "train")
    with pytest.raises(ValueError, match="read-only"):
        images.pixels[0] = 0
    images.pixels[np.array([0, 2])][0] = 0
    assert images.pixels[0].any()


def test_the_plain_file_goes_before_the_compressed_one(tmp_path: Path) -> None:
    make_idx(tmp_path, 3, seed=1)
    pixels, _ = make_idx(tmp_path, 3, seed=2, compress=False)
    assert np.array_equal(read_fashion_mnist(tmp_path, "train").pixels, pixels)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_distributed_files() -> None:
    images = read_fashion_mnist(DEBIAN, "heldout")
    assert images.pixels.shape == (10_000, 28, 28, 1)
    assert images.labels is not None and np.bincount(images.labels).tolist() == [1000] * 10
    assert LABEL_NAMES[images.labels[0]] == "Ankle boot"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (IMAGES, lambda content: content[:-1], "offset 2367: ends too early, 3 records expected"),
        (IMAGES, lambda content: content + b"x", "offset 2368: trailing bytes, 3 records expected"),
        (IMAGES, lambda content: content[:9], "offset 9: ends inside the header"),
        (IMAGES, lambda _: b"", "offset 0: ends inside the header"),
        (IMAGES, lambda content: b"\0\0\x0d\x03" + content[4:], "offset 0: magic number 0x00000d03"),
        (
            IMAGES,
            lambda content: content[:8] + struct.pack(">2I", 32, 32) + content[16:],
            r"offset 8.*\(32, 32\)",
        ),
        (IMAGES, lambda content: content[:4] + b"\xff" * 4 + content[8:], "offset 4: 4294967295 records"),
        (
            IMAGES,
            lambda content: content[:4] + struct.pack(">I", 60_001) + content[8:],
            r"offset 4: 60001 records, the limit is 1\.\.60000",
        ),
        (IMAGES, lambda content: content[:4] + b"\0" * 4 + content[8:], "offset 4: 0 records"),
        (LABELS, lambda content: content[:9] + b"\x0a" + content[10:], "record 1: label 10, not 0..9"),
        (LABELS, lambda _: struct.pack(">2I", 0x0801, 2) + b"\0\1", "2 labels for the 3 images"),
    ],
)
@pytest.mark.parametrize("compress", [True, False])
def test_damage_is_named(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes], message: str, compress: bool
) -> None:
    make_idx(tmp_path, 3, compress=False)
    content = damage((tmp_path / name).read_bytes())
    if compress:
        (tmp_path / name).unlink()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_fashion_mnist(tmp_path, "train")
    assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("cut", [5, 12, 40, -1, -5])
def test_a_truncated_gzip_file_is_refused(tmp_path: Path, cut: int) -> None:
    make_idx(tmp_path, 3)
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match="damaged or truncated gzip file"):
        read_fashion_mnist(tmp_path, "train")


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    make_idx(tmp_path, 3)
    path = tmp_path / f"{IMAGES}.gz"
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="CRC"):
        read_fashion_mnist(tmp_path, "train")


def test_a_gzip_bomb_is_unpacked_only_to_the_expected_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_idx(tmp_path, 3)
    bomb = struct.pack(">4I", 0x0803, 3, 28, 28) + bytes(64 * 2**20)
    (tmp_path / f"{IMAGES}.gz").write_bytes(gzip.compress(bomb))
    given = 0
    read = gzip.GzipFile.read

    def counting(self: gzip.GzipFile, size: int | None = -1) -> bytes:
        nonlocal given
        content = read(self, size)
        given += len(content)
        return content

    monkeypatch.setattr(gzip.GzipFile, "read", counting)
    with pytest.raises(DataError, match="trailing bytes"):
        read_fashion_mnist(tmp_path, "train")
    assert given == 16 + 3 * 784 + 1


def test_a_missing_file_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither train-images-idx3-ubyte nor.*dataset-fashion-mnist"):
        read_fashion_mnist(tmp_path / "nothing", "train")
