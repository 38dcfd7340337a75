"""Options that a data set does not have are refused, never ignored; image sets check what they hold."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.data.images import DataError, DatasetName, ImageSet, image_set, open_images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "mnist"}, "dataset is 'mnist': give one of cifar10, imagenet32, fashion-mnist, folder"),
        ({"split": "test"}, "split is 'test': give one of train, heldout"),
        ({"size": (8, 8)}, "size is given, and 'cifar10' has its own"),
        ({"dataset": "fashion-mnist", "verify": False}, "verify is false, and 'fashion-mnist' is not"),
        ({"dataset": "folder", "verify": False}, "verify is false, and 'folder' is not"),
    ],
)
def test_a_wrong_option_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {
        "dataset": "cifar10",
        "path": tmp_path,
        "split": "train",
        "cache": tmp_path,
    } | changes
    with pytest.raises(ValueError, match=message):
        open_images(**options)


@pytest.mark.parametrize(
    ("dataset", "remedy"),
    [
        ("cifar10", "put cifar-10-python.tar.gz or cifar-10-binary.tar.gz there"),
        ("imagenet32", "put the extracted batches there"),
        ("fashion-mnist", "the Debian package dataset-fashion-mnist"),
        ("folder", "put PNG or JPEG files there"),
    ],
)
def test_data_that_is_not_there_tells_what_to_put_where(
    tmp_path: Path, dataset: DatasetName, remedy: str
) -> None:
    with pytest.raises(DataError, match=f"nothing: cannot be read: No such file.*{remedy}.*Nothing is down"):
        open_images(dataset, tmp_path / "nothing", "train", tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixels": np.zeros((2, 4, 4, 3))}, "pixels are float64"),
        ({"pixels": np.zeros((2, 4, 4), np.uint8)}, r"\(2, 4, 4\): give uint8 \(N, H, W, C\)"),
        ({"pixels": np.zeros((0, 4, 4, 3), np.uint8)}, "none of them 0"),
        ({"labels": np.array([0])}, r"give int64 \(2,\), one per image"),
        ({"labels": np.array([0, 1], np.int32)}, "labels are int32"),
        ({"labels": np.array([0, 2])}, "labels span 0..2"),
        ({"labels": np.array([-1, 0])}, "labels span -1..0"),
        ({"labels": None}, "label_names without labels"),
    ],
)
def test_an_image_set_checks_its_parts(changes: dict[str, Any], message: str) -> None:
    parts: dict[str, Any] = {
        "pixels": np.zeros((2, 4, 4, 3), np.uint8),
        "labels": np.array([0, 1]),
        "label_names": ("a", "b"),
    }
    ImageSet("set", **parts)
    with pytest.raises(ValueError, match=message):
        ImageSet("set", **(parts | changes))


def test_the_arrays_of_an_image_set_are_read_only() -> None:
    images = ImageSet("set", np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1]), ("a", "b"))
    assert images.labels is not None
    for array in (images.pixels, images.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_every_pixel_label_and_name_counts_in_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_set, "_DIGEST_ROWS", 2)
    pixels, labels = np.zeros((5, 2, 2, 1), np.uint8), np.array([0, 1, 0, 1, 0])
    other_pixels, other_labels = pixels.copy(), labels.copy()
    other_pixels[4, 1, 1, 0] = 1
    other_labels[4] = 1
    sets = [
        ImageSet("a", pixels, labels, ("a", "b")),
        ImageSet("a", other_pixels, labels, ("a", "b")),
        ImageSet("a", pixels, other_labels, ("a", "b")),
        ImageSet("a", pixels, labels, ("a", "c")),
        ImageSet("a", pixels, None, ()),
        ImageSet("a", pixels.reshape(5, 4, 1, 1), labels, ("a", "b")),
    ]
    assert len({images.digest for images in sets}) == len(sets)
    assert ImageSet("b", pixels.copy(), labels.copy(), ("a", "b")).digest == sets[0].digest
