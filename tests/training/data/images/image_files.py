"""Makers of small files in the exact formats of the image data sets.

Every maker is deterministic in `seed` and returns the pixels (N, H, W, C) uint8 and labels (N,) int64 that a
correct reader finds, so that tests compare with what was written and not with what was read.
"""

import gzip
import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Made = tuple[NDArray[np.uint8], NDArray[np.int64]]


def random_images(n: int, shape: tuple[int, int, int], classes: int, seed: int) -> Made:
    """Images of uniform noise; the labels run through the classes, so that every class occurs early."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (n, *shape), dtype=np.uint8)
    return pixels, np.arange(n, dtype=np.int64) % classes


def make_idx(
    folder: Path, n: int = 12, *, split: str = "train", seed: int = 0, compress: bool = True
) -> Made:
    """Write the two Fashion-MNIST files of one split ("train" or "heldout"); returns (n, 28, 28, 1)."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = random_images(n, (28, 28, 1), 10, seed)
    prefix = {"train": "train", "heldout": "t10k"}[split]
    files = {
        f"{prefix}-images-idx3-ubyte": struct.pack(">4I", 0x0803, n, 28, 28) + pixels.tobytes(),
        f"{prefix}-labels-idx1-ubyte": struct.pack(">2I", 0x0801, n) + labels.astype(np.uint8).tobytes(),
    }
    for name, content in files.items():
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            (folder / name).write_bytes(content)
    return pixels, labels


def planar_rows(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures (N, 32, 32, 3) as rows (N, 3072): all red, all green, all blue."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(len(pixels), -1)


def python2_batch(labels: list[int], rows: NDArray[np.uint8], title: str = "batch") -> bytes:
    """A batch pickled with protocol 2 as Python 2 does it: byte strings for all texts and for the array."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    def integer(value: int) -> bytes:
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    n, width = rows.shape
    return b"".join(
        [
            b"\x80\x02}q\x01(",
            text("batch_label") + b"q\x02" + text(title) + b"q\x03",
            text("labels") + b"q\x04]q\x05(" + b"".join(map(integer, labels)) + b"e",
            text("data") + b"q\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08",
            b"K\x00\x85" + text("b") + b"\x87Rq\x09(K\x01" + integer(n) + integer(width) + b"\x86",
            b"cnumpy\ndtype\nq\x0a" + text("u1") + b"K\x00K\x01\x87Rq\x0b(K\x03" + text("|"),
            b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89",
            b"T" + struct.pack("<i", rows.size) + rows.tobytes() + b"tb",
            text("filenames") + b"q\x0c]q\x0d(" + b"".join(text(f"{i}.png") for i in range(n)) + b"e",
            b"u.",
        ]
    )


def make_cifar_binary(folder: Path, n: int = 4, *, seed: int = 0) -> dict[str, Made]:
    """Write the extracted binary form of CIFAR-10 with ``n`` records in each of its six files.

    Returns:
        Split → pixels and labels: (5 n, 32, 32, 3) for "train", (n, 32, 32, 3) for "heldout".
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for split, names in _cifar_files(".bin").items():
        pixels, labels = made[split] = random_images(n * len(names), (32, 32, 3), 10, seed + len(names))
        records = np.concatenate([labels[:, None].astype(np.uint8), planar_rows(pixels)], axis=1)
        for index, name in enumerate(names):
            (folder / name).write_bytes(records[index * n : (index + 1) * n].tobytes())
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\n", encoding="utf-8")
    return made


def make_cifar_python(folder: Path, n: int = 4, *, seed: int = 0) -> dict[str, Made]:
    """Write the extracted Python form of CIFAR-10; like `make_cifar_binary`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for split, names in _cifar_files("").items():
        pixels, labels = made[split] = random_images(n * len(names), (32, 32, 3), 10, seed + len(names))
        for index, name in enumerate(names):
            part = slice(index * n, (index + 1) * n)
            (folder / name).write_bytes(python2_batch(labels[part].tolist(), planar_rows(pixels[part])))
    return made


def make_cifar_binary_archive(path: Path, n: int = 4, *, seed: int = 0) -> dict[str, Made]:
    """Write an archive in the binary form; its MD5 is not the official one. See `make_cifar_binary`."""
    folder = path.parent / "cifar-10-batches-bin"
    made = make_cifar_binary(folder, n, seed=seed)
    make_tar(path, {f"{folder.name}/{file.name}": file.read_bytes() for file in sorted(folder.iterdir())})
    return made


def make_cifar_python_archive(path: Path, n: int = 4, *, seed: int = 0) -> dict[str, Made]:
    """Write an archive in the Python form; its MD5 is not the official one. See `make_cifar_binary`."""
    folder = path.parent / "cifar-10-batches-py"
    made = make_cifar_python(folder, n, seed=seed)
    make_tar(path, {f"{folder.name}/{file.name}": file.read_bytes() for file in sorted(folder.iterdir())})
    return made


def make_tar(path: Path, members: dict[str, bytes], *odd: tarfile.TarInfo) -> None:
    """Write a .tar.gz archive of files, and of members that have no content, such as links, after them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in odd:
            archive.addfile(member)


def make_imagenet32_batches(
    folder: Path, n: int = 2, *, seed: int = 0, protocol: int = 3, numpy_labels: bool = False
) -> dict[str, Made]:
    """Write the ten pickled training batches of ImageNet-32 and `val_data`, ``n`` records each.

    Returns:
        Split → pixels and labels, counted from 0 as a reader gives them (the files count from 1).
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for split, names in _imagenet_files().items():
        pixels, labels = made[split] = _imagenet_images(n * len(names), seed + len(names))
        for index, name in enumerate(names):
            part = slice(index * n, (index + 1) * n)
            batch: dict[str, Any] = {"data": planar_rows(pixels[part]), "mean": np.zeros(3072)}
            batch["labels"] = labels[part] + 1 if numpy_labels else (labels[part] + 1).tolist()
            (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    return made


def make_npz(folder: Path, n: int = 2, *, seed: int = 0, compress: bool = True) -> dict[str, Made]:
    """Write the .npz form of ImageNet-32, in the folders of the official archives; see the pickled form."""
    made = {}
    save = np.savez_compressed if compress else np.savez
    for split, names in _imagenet_files().items():
        place = folder / f"Imagenet32_{'train' if split == 'train' else 'val'}_npz"
        place.mkdir(parents=True, exist_ok=True)
        pixels, labels = made[split] = _imagenet_images(n * len(names), seed + len(names))
        for index, name in enumerate(names):
            part = slice(index * n, (index + 1) * n)
            save(place / f"{name}.npz", data=planar_rows(pixels[part]), labels=labels[part] + 1)
    return made


def make_folder(
    folder: Path,
    n: int = 4,
    *,
    classes: tuple[str, ...] = (),
    side: int = 8,
    channels: int = 3,
    seed: int = 0,
) -> Made:
    """Write ``n`` PNG files, in sub-folders in turn where there are classes; ordered as a reader orders them."""
    pixels, labels = random_images(n, (side, side, channels), max(len(classes), 1), seed)
    order = np.argsort(labels, kind="stable")
    for number in order.tolist():
        place = folder / classes[labels[number]] if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number].squeeze()).save(place / f"{number:05d}.png")
    return pixels[order], labels[order]


def _cifar_files(ending: str) -> dict[str, list[str]]:
    return {
        "train": [f"data_batch_{number}{ending}" for number in range(1, 6)],
        "heldout": [f"test_batch{ending}"],
    }


def _imagenet_files() -> dict[str, list[str]]:
    return {"train": [f"train_data_batch_{number}" for number in range(1, 11)], "heldout": ["val_data"]}


def _imagenet_images(n: int, seed: int) -> Made:
    pixels, _ = random_images(n, (32, 32, 3), 1000, seed)
    # Both ends of 1..1000 occur, so that a reader which is off by one is seen.
    return pixels, np.linspace(0, 999, n).astype(np.int64)
