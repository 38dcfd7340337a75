"""CIFAR-10: both forms, folders and archives, and that hostile or damaged ones are refused by place."""

import gzip
import hashlib
import shutil
import tarfile
import time
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


def test_a_pickled_file_of_over_32_mib_is_refused(tmp_path: Path) -> None:
    make_cifar_python(tmp_path, 1)
    with (tmp_path / "test_batch").open("r+b") as file:
        file.truncate(32 * 2**20 + 1)
    with pytest.raises(DataError, match="offset 33554432: trailing bytes, at most 33554432 expected"):
        read_cifar10(tmp_path, "heldout", verify=False)


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


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.FIFOTYPE,
        tarfile.CHRTYPE,
        tarfile.GNUTYPE_SPARSE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    ],
)
def test_links_devices_and_extensions_are_refused(tmp_path: Path, kind: bytes) -> None:
    make_tar(tmp_path / "a.tar.gz", {}, _link(kind))
    with pytest.raises(
        DataError, match=r"member 0 .*is a link, a device or an extension that is not read: refused"
    ):
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


def test_a_bomb_is_unpacked_only_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_members, "MAX_ARCHIVE_BYTES", 2**20)
    member = tarfile.TarInfo("bomb")
    member.size = 2**32
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT) + bytes(2**22))
    with pytest.raises(DataError, match="unpacks to more than 1048576 bytes"):
        read_cifar10(tmp_path / "a.tar.gz", "heldout", verify=False)


def test_an_endless_member_is_refused_at_once(tmp_path: Path) -> None:
    """Sizes over 8 GiB are not octal digits, and no known archive has them."""
    member = tarfile.TarInfo("endless")
    for size, message in ((2**32, "announced larger than the archive"), (2**62, "an impossible size")):
        member.size = size
        with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
            file.write(member.tobuf(tarfile.GNU_FORMAT) + bytes(2**12))
        with pytest.raises(DataError, match=message):
            read_cifar10(tmp_path / "a.tar.gz", "heldout", verify=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"9" * 60_000 + b" path=x\n", None),  # takes seconds to read with the expression of tarfile
        (b"30 GNU.sparse.major=a\n30 GNU.sparse.name=b\n", None),
        (b"9" * 66_000, "an extended header over 65536 bytes: refused"),
    ],
)
def test_extended_headers_are_passed_over(tmp_path: Path, content: bytes, message: str | None) -> None:
    path = tmp_path / "a.tar.gz"
    extended = tarfile.TarInfo("pax")
    extended.type, extended.size = tarfile.XHDTYPE, len(content)
    member = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
    member.size = RECORD_BYTES
    head = extended.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)
    with gzip.open(path, "wb") as file:
        file.write(head + member.tobuf(tarfile.USTAR_FORMAT) + bytes(RECORD_BYTES))
        file.write(bytes(-RECORD_BYTES % 512 + 1024))
    started = time.monotonic()
    if message is None:
        assert len(read_cifar10(path, "heldout", verify=False)) == 1
    else:
        with pytest.raises(DataError, match=message):
            read_cifar10(path, "heldout", verify=False)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_common_form_of_archive_is_read(tmp_path: Path, form: int) -> None:
    """Files packed as they lie on a disk, with folders, owners and times that pax writes as fractions."""
    made = make_cifar_binary(tmp_path / "cifar-10-batches-bin", 1)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=form) as archive:
        archive.add(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")
    assert np.array_equal(read_cifar10(tmp_path / "a.tar.gz", "train", verify=False).pixels, made["train"][0])


def test_a_name_in_two_parts_is_joined(tmp_path: Path) -> None:
    member = tarfile.TarInfo("cifar-10-batches-bin/" + "x" * 60 + "/" + "y" * 60)
    member.size = 3
    (tmp_path / "a.tar.gz").write_bytes(
        gzip.compress(member.tobuf(tarfile.USTAR_FORMAT) + b"abc" + bytes(509 + 1024))
    )
    assert tar_members.read_members(tmp_path / "a.tar.gz", {member.name: 3}) == {member.name: b"abc"}


def test_only_ustar_has_a_second_part_of_a_name(tmp_path: Path) -> None:
    """Old GNU archives have times in its place, and a folder's size means nothing."""
    member, folder = tarfile.TarInfo("a"), tarfile.TarInfo("b")
    member.size, folder.type, folder.size = 3, tarfile.DIRTYPE, 512
    head = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    head[345:357] = b"14000000000\0"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    content = folder.tobuf(tarfile.USTAR_FORMAT) + bytes(head) + b"abc" + bytes(509 + 1024)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(content))
    assert tar_members.read_members(tmp_path / "a.tar.gz", {"a": 3}) == {"a": b"abc"}


def test_a_wrong_sum_of_a_header_or_of_the_archive_is_noticed(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a")
    member.size = 3
    content = bytearray(member.tobuf(tarfile.USTAR_FORMAT) + b"abc" + bytes(509 + 1024))
    path = tmp_path / "a.tar.gz"
    packed = bytearray(gzip.compress(content))
    packed[-8] ^= 1
    path.write_bytes(packed)
    with pytest.raises(DataError, match=r"damaged or truncated archive \(CRC"):
        tar_members.read_members(path, {"a": 3})
    content[0] = ord("b")
    path.write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match="member 0: a damaged header"):
        tar_members.read_members(path, {"a": 3})


def test_too_many_members_are_refused(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar.gz", {f"file-{number}": b"" for number in range(100)})
    with pytest.raises(DataError, match="member 64: over 64 members"):
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
