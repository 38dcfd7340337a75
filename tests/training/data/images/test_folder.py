"""A folder of pictures: layouts, held-out pictures, cropping, and refusal of what is hostile or broken."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.data.images.image_files import make_folder
from training.data.images import DataError, open_images, picture_decoder
from training.data.images.folder import read_folder


def _nothing_is_cached(folder: Path) -> bool:
    return not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("classes", [(), ("ant", "bee", "cow")])
def test_reads_what_was_written(tmp_path: Path, classes: tuple[str, ...], channels: int) -> None:
    pixels, labels = make_folder(tmp_path / "in", 7, classes=classes, channels=channels)
    images = open_images("folder", tmp_path / "in", "train", tmp_path / "cache")
    assert np.array_equal(images.pixels, pixels) and images.picture_shape == (8, 8, channels)
    assert images.label_names == classes and images.name == "folder/train"
    assert (images.labels is None) == (not classes)
    assert images.labels is None or np.array_equal(images.labels, labels)


def test_every_50th_picture_is_held_out(tmp_path: Path) -> None:
    pixels, labels = make_folder(tmp_path / "in", 101, classes=("a", "b"), side=2)
    train = read_folder(tmp_path / "in", "train", tmp_path / "cache")
    heldout = read_folder(tmp_path / "in", "heldout", tmp_path / "cache")
    assert np.array_equal(heldout.pixels, pixels[[49, 99]])
    assert np.array_equal(train.pixels, np.delete(pixels, [49, 99], axis=0))
    assert heldout.labels is not None and heldout.labels.tolist() == labels[[49, 99]].tolist()
    assert train.label_names == heldout.label_names == ("a", "b")


def test_a_small_folder_has_no_held_out_pictures(tmp_path: Path) -> None:
    make_folder(tmp_path, 49, side=2)
    with pytest.raises(DataError, match=r"has 49 pictures, and every 50th is held out; add pictures"):
        read_folder(tmp_path, "heldout", tmp_path / "cache")


def test_a_fault_of_ours_is_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> None:
        raise TypeError("ours")

    make_folder(tmp_path / "in", 1)
    monkeypatch.setattr(picture_decoder, "_crop", wrong)
    with pytest.raises(TypeError, match="ours"):
        read_folder(tmp_path / "in", "train", tmp_path / "cache", size=(4, 4))


@pytest.mark.parametrize("place", [".", "train"])
@pytest.mark.parametrize("classes", [(), ("ant", "bee")])
def test_a_heldout_folder_is_held_out(tmp_path: Path, classes: tuple[str, ...], place: str) -> None:
    pixels, _ = make_folder(tmp_path / "in" / place, 4, classes=classes, seed=1)
    held, _ = make_folder(tmp_path / "in" / "heldout", 3, classes=classes, seed=2)
    assert np.array_equal(read_folder(tmp_path / "in", "train", tmp_path / "c").pixels, pixels)
    heldout = read_folder(tmp_path / "in", "heldout", tmp_path / "c")
    assert np.array_equal(heldout.pixels, held) and heldout.label_names == classes


def test_classes_are_numbered_by_those_to_train_on(tmp_path: Path) -> None:
    make_folder(tmp_path, 2, classes=("ant", "bee"))
    make_folder(tmp_path / "heldout", 2, classes=("bee",))
    images = read_folder(tmp_path, "heldout", tmp_path / "cache")
    assert images.labels is not None and images.labels.tolist() == [1, 1]
    make_folder(tmp_path / "heldout", 2, classes=("cow",))
    with pytest.raises(DataError, match=r"is in class 'cow', unlike the pictures to train on"):
        read_folder(tmp_path, "heldout", tmp_path / "cache")


def test_an_added_or_changed_picture_is_seen(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 3)
    assert len(read_folder(tmp_path / "in", "train", tmp_path / "cache")) == 3
    pixels, _ = make_folder(tmp_path / "in", 4, seed=7)
    assert np.array_equal(read_folder(tmp_path / "in", "train", tmp_path / "cache").pixels, pixels)


def test_a_copy_is_of_its_names_its_classes_its_size_and_its_channels(tmp_path: Path) -> None:
    """What changes the copy of a split without changing a byte, a time or the order of its own files."""
    folder, cache = tmp_path / "in", tmp_path / "cache"
    make_folder(folder, 2, classes=("bee", "cow"), channels=1)
    make_folder(folder / "heldout", 3, classes=("bee", "cow"), channels=1)

    def labels() -> list[int]:
        images = read_folder(folder, "heldout", cache)
        assert images.labels is not None
        return images.labels.tolist()

    assert labels() == [0, 0, 1]
    (folder / "heldout" / "bee" / "00002.png").rename(folder / "heldout" / "cow" / "00000.png")
    assert labels() == [0, 1, 1]
    make_folder(folder, 1, classes=("ant",), channels=1)
    assert labels() == [1, 2, 2]
    assert read_folder(folder, "heldout", cache).picture_shape == (8, 8, 1)
    Image.new("RGB", (8, 8)).save(folder / "ant" / "00000.png")  # the first picture, and held out it is not
    assert read_folder(folder, "heldout", cache).picture_shape == (8, 8, 3)
    Image.new("RGB", (9, 9)).save(folder / "heldout" / "cow" / "00009.png")
    assert len(read_folder(folder, "heldout", cache, size=(8, 8))) == 4
    with pytest.raises(DataError, match="give `size` to crop and resize"):
        read_folder(folder, "heldout", cache)


def test_pictures_are_cropped_around_the_centre_and_resized(tmp_path: Path) -> None:
    """Left and right thirds are white and fall away; the black middle is what remains."""
    wide = np.full((6, 18, 3), 255, dtype=np.uint8)
    wide[:, 6:12] = 0
    (tmp_path / "in").mkdir()
    Image.fromarray(wide).save(tmp_path / "in" / "wide.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "in" / "tall.png")
    images = open_images("folder", tmp_path / "in", "train", tmp_path / "cache", size=(4, 4))
    assert images.pixels.shape == (2, 4, 4, 3) and not images.pixels.any()
    images = open_images("folder", tmp_path / "in", "train", tmp_path / "cache", size=(2, 6))
    assert images.pixels.shape == (2, 2, 6, 3) and images.pixels.any()


def test_jpeg_is_read_and_other_files_are_passed_over(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (200, 0, 0)).save(tmp_path / "a.JPG", format="JPEG")
    Image.new("L", (4, 4), 9).save(tmp_path / "b.png")
    (tmp_path / "notes.txt").write_text("notes", encoding="utf-8")
    (tmp_path / ".hidden.png").write_bytes(b"not a picture")
    images = read_folder(tmp_path, "train", tmp_path / ".cache")
    assert len(images) == 2 and images.picture_shape == (4, 4, 3)
    assert images.pixels[0, 0, 0, 0] > 150 and images.pixels[1, 0, 0].tolist() == [9, 9, 9]


def _layouts() -> dict[str, tuple[Callable[[Path], object], str]]:
    def mixed(folder: Path) -> None:
        make_folder(folder, 1)
        make_folder(folder / "class", 1)

    def nested(folder: Path) -> None:
        make_folder(folder / "class" / "deeper", 1)

    def fifo(folder: Path) -> None:
        folder.mkdir()
        os.mkfifo(folder / "a.png")

    def unprintable(folder: Path) -> None:
        make_folder(folder / "a\nb", 1)

    def numeral(folder: Path) -> None:
        make_folder(folder, 2, classes=("6", "7"))

    def heldout_without_classes(folder: Path) -> None:
        make_folder(folder, 1, classes=("ant",))
        make_folder(folder / "heldout", 1)

    return {
        "missing": (lambda folder: None, "no such folder"),
        "empty": (Path.mkdir, "holds no pictures; known endings are .png"),
        "mixed": (mixed, r"holds pictures \(00000.png\) beside sub-folders \(class\)"),
        "nested": (nested, "deeper: a folder inside a class"),
        "fifo": (fifo, "a.png: not a file"),
        "unprintable": (unprintable, "a class name with unprintable characters"),
        "numeral": (numeral, "6: label name '6' is a number.*'class 6', say; rename the folder"),
        "heldout": (heldout_without_classes, "is in no class, unlike the pictures to train on"),
    }


@pytest.mark.parametrize("layout", _layouts())
def test_another_layout_is_refused(tmp_path: Path, layout: str) -> None:
    make, message = _layouts()[layout]
    make(tmp_path / "in")
    with pytest.raises(DataError, match=message):
        read_folder(tmp_path / "in", "train", tmp_path / "cache")
    assert _nothing_is_cached(tmp_path / "cache")


@pytest.mark.parametrize("name", ["link.png", "class", "heldout", "train"])
@pytest.mark.parametrize("target", ["outside", "../outside"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, name: str, target: str) -> None:
    make_folder(tmp_path / "in", 2)
    make_folder(tmp_path / "outside", 2)
    goal = tmp_path / target if target == "outside" else Path(target)
    (tmp_path / "in" / name).symlink_to(goal / "00000.png" if name == "link.png" else goal)
    with pytest.raises(DataError, match=f"{name}: a link that leads out of the folder: refused"):
        read_folder(tmp_path / "in", "train", tmp_path / "cache")
    assert _nothing_is_cached(tmp_path / "cache")


@pytest.mark.parametrize("name", ["heldout", "train"])
def test_a_split_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path / "outside", 2)
    for split in {"heldout", "train"} - {name}:
        make_folder(tmp_path / "in" / split, 2)
    (tmp_path / "in" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match=f"{name}: a link that leads out of the folder: refused"):
        read_folder(tmp_path / "in", "train", tmp_path / "cache")


def test_links_inside_the_folder_are_followed_and_loops_refused(tmp_path: Path) -> None:
    pixels, _ = make_folder(tmp_path / "in", 2)
    (tmp_path / "in" / "z.png").symlink_to("00000.png")
    assert np.array_equal(read_folder(tmp_path / "in", "train", tmp_path / "c").pixels[2], pixels[0])
    (tmp_path / "in" / "y.png").symlink_to("y.png")
    with pytest.raises(DataError, match=r"y.png: a link to itself"):
        read_folder(tmp_path / "in", "train", tmp_path / "c")


def _png(width: int, height: int, extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_png(6000, 6000), "6000x6000 pixels, at most 33554432"),
        (_png(12_000, 10_000), "not a PNG or JPEG file that can be read .*decompression bomb"),
        (_png(60_000, 60_000), "not a PNG or JPEG file that can be read .*decompression bomb"),
        (_png(8, 16), "16x8 pixels instead of 8x8"),
        (_png(8, 8)[:40], "not a PNG or JPEG file that can be read"),
        (_png(8, 8)[:-1], "cut inside a chunk"),
        (_png(8, 8)[:-12], "the last chunk, IEND, is missing"),
        (_png(8, 8)[:-20], "cut inside a chunk"),
        (_png(0, 0), "not a PNG or JPEG file that can be read"),
        (b"", "not a PNG or JPEG file that can be read"),
        (b"GIF89a" + bytes(30), "not a PNG or JPEG file that can be read"),
        (b"\xff\xd8\xff\xe0" + bytes(30), "not a PNG or JPEG file that can be read"),
        (bytes(2048), "larger than 1024 bytes: refused"),
    ],
)
def test_a_hostile_or_broken_picture_is_named(
    tmp_path: Path, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_decoder, "MAX_FILE_BYTES", 1024)
    make_folder(tmp_path / "in", 2)
    path = tmp_path / "in" / "broken.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_folder(tmp_path / "in", "train", tmp_path / "cache")
    assert str(caught.value).startswith(f"{path}: ")
    assert _nothing_is_cached(tmp_path / "cache")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGBA", (8, 8), (1, 2, 3, 4)), "has transparent pixels"),
        (Image.new("I;16", (8, 8)), "pixels of kind I;16; save it with 8 bits"),
    ],
)
def test_pictures_of_another_kind_are_refused(tmp_path: Path, image: Image.Image, message: str) -> None:
    make_folder(tmp_path / "in", 2)
    image.save(tmp_path / "in" / "other.png")
    with pytest.raises(DataError, match=message):
        read_folder(tmp_path / "in", "train", tmp_path / "cache")


def test_a_transparent_colour_of_a_palette_is_transparency(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (9, 8, 7)).convert("P", palette=Image.Palette.ADAPTIVE)
    make_folder(tmp_path / "in", 2)
    image.save(tmp_path / "in" / "other.png", transparency=image.getpixel((0, 0)))
    with pytest.raises(DataError, match=r"other\.png: has transparent pixels"):
        read_folder(tmp_path / "in", "train", tmp_path / "cache")


def test_pictures_of_one_bit_are_grey_and_other_formats_are_none(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("1", (4, 4), 1).save(tmp_path / "in" / "a.png")
    pixels = read_folder(tmp_path / "in", "train", tmp_path / "cache").pixels
    assert pixels.shape == (1, 4, 4, 1) and (pixels == 255).all()
    for kind in ("BMP", "TIFF", "WEBP", "GIF"):
        Image.new("L", (4, 4)).save(tmp_path / "in" / "b.png", format=kind)
        with pytest.raises(DataError, match=r"b\.png: not a PNG or JPEG file"):
            read_folder(tmp_path / "in", "train", tmp_path / "cache")


def test_a_picture_is_smoothed_as_it_shrinks_and_a_sliver_is_cropped_to_one_pixel(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(tmp_path / "in" / "a.png")
    Image.new("L", (1, 64), 100).save(tmp_path / "in" / "b.png")  # a 1 x 1 of it has the ratio 4 : 16
    images = read_folder(tmp_path / "in", "train", tmp_path / "cache", size=(4, 16))
    assert abs(images.pixels[0].astype(int) - 100).max() < 30
    assert (images.pixels[1] == 100).all()


def test_opaque_alpha_and_palettes_become_plain_colours(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (1, 2, 3, 255)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4), (9, 8, 7)).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "b.png")
    pixels = read_folder(tmp_path, "train", tmp_path / ".cache").pixels
    assert pixels[:, 3, 3].tolist() == [[1, 2, 3], [9, 8, 7]]


def test_a_coloured_picture_among_grey_ones_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 2, channels=1)
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "z.png")
    with pytest.raises(DataError, match=r"z.png: a picture in colour \(RGB\), and the first one is grey"):
        read_folder(tmp_path / "in", "train", tmp_path / "cache")


@pytest.mark.parametrize("size", [(0, 8), (8, 4097), (-1, -1)])
def test_a_size_out_of_range_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"size is .* each 1..4096"):
        read_folder(tmp_path, "train", tmp_path / "cache", size=size)
