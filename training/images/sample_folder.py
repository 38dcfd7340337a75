"""The folder of pictures that `prime-sample` fills: one PNG each, and arrays of all of them at the end.

Shapes: N pictures, H height, W width, C channels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kernels.noise import row_seed
from prime_core.atomic import atomic_write, partial_path, publish, stage
from prime_core.pictures import to_png
from prime_core.sampling.prepare import ImageSample
from training.images.picture_files import PictureError, read_picture
from training.progress import progress_bar
from training.sample_request import SampleFileError, new_request, same_request

REQUEST_NAME = "request.json"
SAMPLES_NAME = "samples.npy"
LABELS_NAME = "labels.npy"


class SampleFolder:
    """Pictures of one request.

    Attributes:
        path: the folder.
        shape: (H, W, C) of the pictures.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        """Make the folder if there is none.

        Raises:
            SampleFileError: the folder around it is missing, or it is a file.
        """
        if not path.parent.is_dir():
            raise SampleFileError(f"--output: the folder {path.parent} does not exist; make it first")
        if path.exists() and not path.is_dir():
            raise SampleFileError(f"--output: {path} is a file, and pictures need a folder; choose another")
        path.mkdir(exist_ok=True)
        self.path, self.shape = path, shape

    def continue_request(self, request: dict[str, Any], seed: int | None, *, overwrite: bool) -> int:
        """Keep a request, or compare with the one that is kept.

        Args:
            request: everything that determines the pictures, but the seed.
            seed: what is asked for; None takes the kept one, or draws one.
            overwrite: remove pictures of another request first.

        Returns:
            The seed.

        Raises:
            SampleFileError: the folder holds another request, or files that are not ours.
        """
        kept = self.path / REQUEST_NAME
        found = {item for item in self.path.iterdir() if not item.name.startswith(".")}
        if overwrite:
            ours = {kept, self.path / SAMPLES_NAME, self.path / LABELS_NAME, *self._pictures()}
            if found - ours:
                raise SampleFileError(
                    f"{self.path} holds other files too, such as {min(found - ours).name}; choose another folder"
                )
            # The request goes last: until then the folder is known to be ours.
            for item in sorted(found, key=lambda item: item == kept):
                item.unlink()
            found = set()
        if not found:
            return new_request(kept, request, seed)
        return same_request(kept, self.path, request, seed)

    def write(self, index: int, sample: ImageSample) -> None:
        """Write one picture with its index, seed, label and number of denoiser calls beside the pixels.

        Raises:
            OSError: it cannot be written.
        """
        facts = {"index": index, "seed": sample.seed, "nfe": sample.nfe, "label": sample.label}
        texts = {name: str(value) for name, value in facts.items() if value is not None}
        atomic_write(self._picture(index), to_png(sample.pixels.numpy(), texts))

    def missing(self, seed: int, indices: Sequence[int], *, progress: bool = True) -> list[int]:
        """Return the indices whose picture is not there, or not whole.

        Args:
            seed: of the request.
            indices: pictures that are wanted.
            progress: show a progress bar.

        Raises:
            SampleFileError: a sound picture of that name is another one.
        """
        missing = []
        there = set(self._pictures())
        for index in progress_bar(indices, desc="checking", unit="image", shown=progress and bool(there)):
            if self._picture(index) not in there:
                missing.append(index)
                continue
            try:
                self._read(index, seed)
            except PictureError:  # cut short when the machine, not only the program, went down
                missing.append(index)
        return missing

    def merge(self, seed: int, n: int, *, progress: bool = True) -> bool:
        """Write the arrays if all pictures are there; arrays of more pictures are left as they are.

        Args:
            seed: of the request.
            n: pictures in all.
            progress: show a progress bar.

        Returns:
            Whether the arrays hold the first ``n`` pictures.

        Raises:
            PictureError: a picture is damaged.
            SampleFileError: a picture is another one.
            OSError: an array cannot be written.
        """
        samples, labels_path = self.path / SAMPLES_NAME, self.path / LABELS_NAME
        if _num_merged(samples) >= n:
            return True
        if not set(self._pictures()) >= {self._picture(index) for index in range(n)}:
            return False
        labels: list[int] = []

        def write(file: BinaryIO) -> None:
            header = {"descr": "|u1", "fortran_order": False, "shape": (n, *self.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for index in progress_bar(range(n), desc="merging", unit="image", shown=progress):
                pixels, facts = self._read(index, seed)
                labels.extend([int(facts["label"])] if "label" in facts else [])
                file.write(pixels.tobytes())

        try:
            stage(samples, write)
            if labels:
                content = io.BytesIO()
                np.save(content, np.array(labels, dtype=np.int64), allow_pickle=False)
                atomic_write(labels_path, content.getvalue())
            publish(samples)  # the last step: where samples.npy is, all is
        finally:
            partial_path(samples).unlink(missing_ok=True)
        return True

    def _picture(self, index: int) -> Path:
        return self.path / f"{index:06d}.png"

    def _pictures(self) -> list[Path]:
        return [path for path in self.path.glob("*.png") if path.stem.isdecimal()]

    def _read(self, index: int, seed: int) -> tuple[Any, dict[str, str]]:
        path = self._picture(index)
        pixels, facts = read_picture(path, self.shape)
        if (facts.get("index"), facts.get("seed")) != (str(index), str(row_seed(seed, index))):
            raise SampleFileError(
                f"{path}: not sample {index} of this request; the folder was changed. Choose another folder, or "
                "replace it with --overwrite"
            )
        return pixels, facts


def _num_merged(path: Path) -> int:
    """Return how many pictures samples.npy holds; 0 without it."""
    try:
        return len(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError):
        return 0
