"""CIFAR-10: both forms, folders and archives, and that hostile or damaged ones are refused by place."""

import gzip
import hashlib
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.training.data.images.image_files import (
    Made,
    make_cifar_binary,
    make_cifar_binary_archive,
    make_cifar_python,
    make_cifar_python_archive,
    make_tar,
)
from training.data.images import DataError, Split, cifar10, open_images, tar_members
from training.data.images.cifar10 import RECORD_BYTES, read_cifar10


@pytest.mark.parametrize(
    ("make", "inside"),
    [
        (make_cifar_binary, "."),
        (make_cifar_binary, "cifar-10-batches-bin"),
        (make_cifar_python, "."),
        (make_cifar_python, "cifar-10-batches-py"),
    ],
)
def test_reads_a_folder(tmp_path: Path, make: Callable[..., dict[str, Made]], inside: str) -> None:
    made = make(tmp_path / inside, 3)
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        images = open_images("cifar10", tmp_path, split, tmp_path / "cache", verify=False)
        pixels, labels = made[split]
        assert np.array_equal(images.pixels, pixels)
        assert images.labels is not None and np.array_equal(images.labels, labels)
        assert images.name == f"cifar10/{split}" and len(images.label_names) == 10
    assert not (tmp_path / "cache").exists()


def test_channels_come_in_planes(tmp_path: Path) -> None:
    """One image written by hand: red 1, green 2, blue 3, and one red pixel at row 1, column 2."""
    make_cifar_binary(tmp_path, 1)
    record = bytearray(b"\x07" + b"\x01" * 1024 + b"\x02" * 1024 + b"\x03" * 1024)
    record[1 + 32 + 2] = 200
    (tmp_path / "test_batch.bin").write_bytes(record)
    images = read_cifar10(tmp_path, "heldout", verify=False)
    assert images.pixels[0, 1, 2].tolist() == [200, 2, 3] and images.pixels[0, 2, 1].tolist() == [1, 2, 3]
    assert images.labels is not None and images.label_names[images.labels[0]] == "horse"


@pytest.mark.parametrize("make", [make_cifar_binary_archive, make_cifar_python_archive])
def test_reads_an_archive(
    tmp_path: Path, make: Callable[..., dict[str, Made]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "archive.tar.gz"
    made = make(path, 2)
    with pytest.raises(DataError, match=r"MD5 [0-9a-f]{32} is not that of an official.*verify to false"):
        read_cifar10(path, "train")
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        images = open_images("cifar10", path, split, tmp_path / "cache", verify=False)
        assert np.array_equal(images.pixels, made[split][0])
    form = "binary" if make is make_cifar_binary_archive else "python"
    monkeypatch.setitem(cifar10.ARCHIVE_MD5, hashlib.md5(path.read_bytes()).hexdigest(), form)
    assert np.array_equal(read_cifar10(path, "train").pixels, made["train"][0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "offset 9218: ends inside record 2"),
        (lambda content: content + b"x", "offset 9220: ends inside record 3"),
        (lambda _: b"", "offset 0: ends inside record 0"),
        (
            lambda content: content[:RECORD_BYTES] + b"\x0a" + content[RECORD_BYTES + 1 :],
            "record 1: label 10",
        ),
        (lambda content: content + bytes(10_000 * RECORD_BYTES), "offset 30730000: trailing bytes"),
    ],
)
def test_damaged_records_are_named(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    make_cifar_binary(tmp_path, 3)
    path = tmp_path / "data_batch_4.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        read_cifar10(tmp_path, "train", verify=False)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("make", [make_cifar_binary, make_cifar_python])
def test_a_file_cut_between_two_records_is_refused(
    tmp_path: Path, make: Callable[..., dict[str, Made]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar10, "NUM_RECORDS", 3)
    made = make(tmp_path, 3)
    assert np.array_equal(read_cifar10(tmp_path, "train").pixels, made["train"][0])
    make(tmp_path / "short", 2)
    name = "data_batch_4.bin" if make is make_cifar_binary else "data_batch_4"
    shutil.copy(tmp_path / "short" / name, tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}: ends after record 1 of 3.*set verify to false"):
        read_cifar10(tmp_path, "train")
    assert len(read_cifar10(tmp_path, "train", verify=False)) == 14


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"none of data_batch_1.bin, data_batch_1, cifar-10-binary.tar.gz.*; put one"
    ):
        read_cifar10(tmp_path, "train")
    make_cifar_binary(tmp_path, 1)
    (tmp_path / "data_batch_5.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_5.bin: cannot be read"):
        read_cifar10(tmp_path, "train", verify=False)
    with pytest.raises(DataError, match=r"nothing.tar.gz: cannot be read: No such file"):
        read_cifar10(tmp_path / "nothing.tar.gz", "train")


@pytest.mark.parametrize("name", cifar10.ARCHIVES)
def test_an_archive_is_found_in_a_folder_and_checked(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = make_cifar_binary_archive if "binary" in name else make_cifar_python_archive
    made = make(tmp_path / "in" / name, 2)
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(tmp_path / "in" / name, folder / name)
    with pytest.raises(DataError, match=rf"{name}: its MD5 [0-9a-f]{{32}} is not that of an official"):
        read_cifar10(folder, "train")
    digest = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setitem(cifar10.ARCHIVE_MD5, digest, "binary" if "binary" in name else "python")
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        assert np.array_equal(read_cifar10(folder, split).pixels, made[split][0])


def test_an_archive_without_a_batch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "archive.tar.gz"
    make_tar(path, {"cifar-10-batches-bin/data_batch_1.bin": bytes(RECORD_BYTES)})
    with pytest.raises(DataError, match=r"holds no cifar-10-batches-bin/data_batch_2.bin"):
        read_cifar10(path, "train", verify=False)


def _link(kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
    member.type, member.linkname = kind, "/etc/hostname"
    return member


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    make_tar(tmp_path / "a.tar.gz", {}, _link(kind))
    with pytest.raises(DataError, match=r"member 0 .*is a link or a device: refused"):
        read_cifar10(tmp_path / "a.tar.gz", "heldout", verify=False)


@pytest.mark.parametrize("name", ["../test_batch.bin", "/test_batch.bin", "cifar-10-batches-bin/../../x"])
def test_names_that_leave_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    make_tar(tmp_path / "in" / "a.tar.gz", {name: bytes(RECORD_BYTES)})
    with pytest.raises(DataError, match="leaves the archive: refused"):
        read_cifar10(tmp_path / "in" / "a.tar.gz", "heldout", verify=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "a.tar.gz"]


def test_a_member_over_the_known_size_is_refused(tmp_path: Path) -> None:
    content = bytes(10_000 * RECORD_BYTES + 1)
    make_tar(tmp_path / "a.tar.gz", {"cifar-10-batches-bin/test_batch.bin": content})
    with pytest.raises(DataError, match=r"test_batch.bin: .*over 30730000 bytes"):
        read_cifar10(tmp_path / "a.tar.gz", "heldout", verify=False)


def test_a_member_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    again = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
    make_tar(tmp_path / "a.tar.gz", {again.name: bytes(RECORD_BYTES)}, again)
    with pytest.raises(DataError, match=r"test_batch.bin: twice"):
        read_cifar10(tmp_path / "a.tar.gz", "heldout", verify=False)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_bomb_is_unpacked_only_to_the_limit(
    tmp_path: Path, kind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a large file there are headers whose size tarfile believes and reads at once."""
    monkeypatch.setattr(tar_members, "MAX_ARCHIVE_BYTES", 2**20)
    member = tarfile.TarInfo("bomb")
    member.type, member.size = kind, 2**33
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT) + bytes(2**22))
    with pytest.raises(DataError, match="unpacks to more than 1048576 bytes"):
        read_cifar10(tmp_path / "a.tar.gz", "heldout", verify=False)


def test_an_endless_member_is_refused_at_once(tmp_path: Path) -> None:
    """tarfile alone would read at the end of the file until 2**62 bytes have been seen."""
    member = tarfile.TarInfo("endless")
    member.size = 2**62
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT) + bytes(2**12))
    with pytest.raises(DataError, match="a member is announced larger than the archive"):
        read_cifar10(tmp_path / "a.tar.gz", "heldout", verify=False)


def test_too_many_members_are_refused(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar.gz", {f"file-{number}": b"" for number in range(100)})
    with pytest.raises(DataError, match="member 64: an impossible size, or over 64 members"):
        read_cifar10(tmp_path / "a.tar.gz", "heldout", verify=False)


@pytest.mark.parametrize("cut", [0, 10, 200, -4])
def test_a_truncated_archive_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.tar.gz"
    make_cifar_binary_archive(path, 1)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a.tar.gz: (damaged or truncated|holds no)"):
        read_cifar10(path, "heldout", verify=False)


def test_damaged_tar_headers_never_escape_as_other_errors(tmp_path: Path) -> None:
    """Random bytes in the first header: a result or a DataError, nothing else."""
    path = tmp_path / "a.tar.gz"
    make_cifar_python_archive(path, 1)
    good = gzip.decompress(path.read_bytes())
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        content = bytearray(good)
        for place in generator.integers(0, 512, 3):
            content[place] = generator.integers(0, 256)
        # A correct checksum lets the damage reach the fields.
        content[148:156] = b" " * 8
        content[148:156] = b"%06o\0 " % sum(content[:512])
        path.write_bytes(gzip.compress(content, compresslevel=0))
        try:
            assert len(read_cifar10(path, "heldout", verify=False)) == 1
        except DataError:
            refused += 1
    assert 0 < refused < 100
