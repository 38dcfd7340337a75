"""Which pictures a folder holds, in which class each is, and which of them are held out.

Either the pictures lie in the folder itself and have no labels, or each sub-folder is a class of that name.
Held-out pictures lie in a sub-folder `heldout` that is laid out the same way; the others then lie in `train`
if there is one, else in the folder itself. Without `heldout`, every 50th picture in the order of the names
is held out.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prime_core.labels import check_label_name
from training.data.images.image_set import DataError

ENDINGS = (".png", ".jpg", ".jpeg")
HELDOUT_EVERY = 50


@dataclass(frozen=True)
class Picture:
    """One picture file: its name below the folder, the file, and its class or None."""

    name: str
    path: Path
    class_name: str | None


@dataclass(frozen=True)
class Listing:
    """The pictures of one split.

    Attributes:
        pictures: in the order of their names, at least one.
        class_names: all classes of the data set in order; empty without labels.
        first: first picture of the whole folder; it decides the size and the channels of both splits.
    """

    pictures: Sequence[Picture]
    class_names: tuple[str, ...]
    first: Picture


def list_pictures(folder: Path, split: Literal["train", "heldout"]) -> Listing:
    """List one split of a folder of pictures.

    Hidden files and files with other endings than .png, .jpg and .jpeg are passed over.

    Raises:
        DataError: no pictures, pictures both in the folder and in classes, folders inside classes, a link
            that leads out of the folder, or a held-out picture of a class that is not trained on.
    """
    root = _resolve(folder, folder)
    if not root.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder with the pictures")
    heldout, separate = folder / "heldout", folder / "train"
    for path in (heldout, separate):
        _refuse_escape(path, root)
    if not heldout.is_dir():
        return _split_by_number(folder, root, split)
    train = _list(folder, separate if separate.is_dir() else folder, root, skip="heldout")
    held_out = _list(folder, heldout, root, skip="")
    class_names = _class_names(train)
    for picture in held_out:
        if picture.class_name not in (class_names or (None,)):
            place = "no class" if picture.class_name is None else f"class {picture.class_name!r}"
            raise DataError(f"{picture.path}: is in {place}, unlike the pictures to train on; move it")
    return Listing(train if split == "train" else held_out, class_names, train[0])


def _split_by_number(folder: Path, root: Path, split: str) -> Listing:
    pictures = _list(folder, folder, root, skip="")
    held_out = pictures[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]
    if split == "heldout" and not held_out:
        raise DataError(
            f"{folder}: has {len(pictures)} pictures, and every {HELDOUT_EVERY}th is held out; add pictures, "
            "or put some into a sub-folder `heldout`"
        )
    del pictures[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]
    return Listing(
        pictures if split == "train" else held_out, _class_names([*pictures, *held_out]), pictures[0]
    )


def _list(folder: Path, start: Path, root: Path, skip: str) -> list[Picture]:
    """List the pictures below ``start``, in classes or not; ``skip`` names a sub-folder to pass over."""
    pictures, classes = _scan(start, root)
    classes = [path for path in classes if path.name != skip]
    if pictures and classes:
        raise DataError(
            f"{start}: holds pictures ({pictures[0].name}) beside sub-folders ({classes[0].name}); put all "
            "pictures into sub-folders, one per class, or none"
        )
    found = [Picture(path.relative_to(folder).as_posix(), path, None) for path in pictures]
    for class_folder in classes:
        if not class_folder.name.isprintable():
            raise DataError(f"{class_folder!r}: a class name with unprintable characters; rename the folder")
        try:
            check_label_name(class_folder.name)
        except ValueError as error:
            raise DataError(f"{class_folder}: {error}; rename the folder") from None
        inside, deeper = _scan(class_folder, root)
        if deeper:
            raise DataError(f"{deeper[0]}: a folder inside a class; classes have no sub-folders: move it")
        found += [Picture(p.relative_to(folder).as_posix(), p, class_folder.name) for p in inside]
    if not found:
        raise DataError(f"{start}: holds no pictures; known endings are {', '.join(ENDINGS)}")
    return found


def _scan(folder: Path, root: Path) -> tuple[list[Path], list[Path]]:
    """Return the picture files and the sub-folders of one folder, each in the order of the names."""
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}") from None
    pictures, folders = [], []
    for path in entries:
        is_picture = path.suffix.lower() in ENDINGS
        _refuse_escape(path, root)
        if path.is_dir():
            folders.append(path)
        elif is_picture and not path.is_file():
            raise DataError(f"{path}: not a file; remove it")
        elif is_picture:
            pictures.append(path)
    return pictures, folders


def _refuse_escape(path: Path, root: Path) -> None:
    if path.is_symlink() and not _resolve(path, root).is_relative_to(root):
        raise DataError(f"{path}: a link that leads out of the folder: refused; copy the files")


def _resolve(path: Path, folder: Path) -> Path:
    try:
        return path.resolve(strict=True)
    except FileNotFoundError:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # of a loop: RuntimeError, from Python 3.13 on OSError
        reason = "a link to itself" if getattr(error, "errno", errno.ELOOP) == errno.ELOOP else str(error)
        raise DataError(f"{path}: {reason}; remove it from {folder}") from None


def _class_names(pictures: Sequence[Picture]) -> tuple[str, ...]:
    return tuple(sorted({picture.class_name for picture in pictures if picture.class_name is not None}))
