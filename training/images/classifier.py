"""Trains the classifier that judges whether samples show their label and gives features to compare.

    python -m training.images.classifier --dataset fashion-mnist --path FOLDER --output FILE

A minute or two on one CPU core for Fashion-MNIST; 91.5 % of its held-out images are then labelled right.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict
from torch import Tensor, nn

from prime_core.weights import CheckpointError
from training.command_line import load_settings
from training.data.images import DataError, DatasetName, ImageSet, Split, open_images
from training.images.classifier_net import (
    Classifier,
    ClassifierInfo,
    ClassifierNet,
    load_classifier,
    to_planes,
)
from training.progress import progress_bar

BATCH_SIZE = 128


def train_classifier(
    train: ImageSet,
    heldout: ImageSet,
    *,
    epochs: int = 3,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: bool = True,
) -> Classifier:
    """Train a classifier; on one number of CPU threads the same arguments give the same weights.

    Args:
        train: images with labels.
        heldout: images of the same kind, for the accuracy.
        epochs: passes over the data.
        batch_size: images of a step, at least 2; the last images of a pass that fill no step are left out.
        seed: of the first weights and the order of the images.
        progress: show a progress bar.

    Raises:
        DataError: there are no labels, or the two sets do not go together, or there are fewer images than
            one step needs.
    """
    labels = _check_sets(train, heldout, batch_size)
    generator = torch.Generator().manual_seed(seed)
    # Initialisation draws from torch's global generator, which others may rely on.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ClassifierNet(train.picture_shape[2], len(train.label_names))
    num_steps = epochs * (len(train) // batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=1e-3)
    # One rise and fall of the learning rate: the best of few passes.
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=num_steps)
    network.train()
    with progress_bar(total=num_steps, unit="step", desc="classifier", shown=progress) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(train), generator=generator)
            for numbers in order.split(batch_size):
                if len(numbers) < batch_size:
                    break
                with torch.autocast("cpu", torch.bfloat16):
                    _, logits = network(to_planes(train.pixels[numbers.numpy()]))
                loss = nn.functional.cross_entropy(logits.float(), labels[numbers])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
                bar.update()
    return _with_accuracy(network, train, heldout, epochs=epochs, batch_size=batch_size, seed=seed)


def _check_sets(train: ImageSet, heldout: ImageSet, batch_size: int) -> Tensor:
    """Return the training labels (N,) int64."""
    if train.labels is None or heldout.labels is None:
        raise DataError(f"{train.name}: the images have no labels, and a classifier needs them")
    if (train.picture_shape, train.label_names) != (heldout.picture_shape, heldout.label_names):
        raise DataError(f"{train.name} and {heldout.name} differ in picture shape or labels")
    if len(train) < batch_size:
        raise DataError(f"{train.name} has {len(train)} images, and one step takes batch_size = {batch_size}")
    return torch.from_numpy(train.labels.copy())


def _with_accuracy(
    network: ClassifierNet, train: ImageSet, heldout: ImageSet, *, epochs: int, batch_size: int, seed: int
) -> Classifier:
    info = ClassifierInfo(
        dataset=train.name,
        num_images=len(train),
        digest=train.digest,
        picture_shape=train.picture_shape,
        label_names=train.label_names,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        accuracy=0.0,
        num_heldout=len(heldout),
    )
    classifier = Classifier(network, info)
    _, predicted = classifier.judge(heldout.pixels)
    assert heldout.labels is not None
    accuracy = float((predicted.numpy() == heldout.labels).mean())
    return Classifier(network, info.model_copy(update={"accuracy": accuracy}))


def check_classifier(path: Path, train: ImageSet, heldout: ImageSet) -> None:
    """Check what `classifier_for` may fail by, without the minutes that training takes.

    Args:
        path: as for `classifier_for`, and so are the images; its folder is made if it is missing.
        train: see there.
        heldout: see there.

    Raises:
        CheckpointError: the file holds something else, or a classifier of other images.
        DataError: a classifier cannot be trained on these images.
        OSError: the folder cannot be made.
    """
    if path.exists():
        _load_that_of(path, train)
    else:
        _check_sets(train, heldout, BATCH_SIZE)
        path.parent.mkdir(parents=True, exist_ok=True)


def classifier_for(path: Path, train: ImageSet, heldout: ImageSet, *, progress: bool = True) -> Classifier:
    """Return the classifier in a file; train it and write the file if there is none.

    Args:
        path: the file; its folder is made if it is missing.
        train: the images it is, or must have been, trained on.
        heldout: for the accuracy.
        progress: show a progress bar, and say that a classifier is trained.

    Raises:
        CheckpointError: the file holds something else, or a classifier of other images.
        DataError: the images have no labels.
        OSError: the file cannot be written.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if progress:
            print(
                f"{path} is not there: training a classifier of {train.name} to judge samples by, once (minutes on a "
                "CPU)",
                file=sys.stderr,
            )
        classifier = train_classifier(train, heldout, progress=progress)
        classifier.save(path)
        return classifier
    return _load_that_of(path, train)


def _load_that_of(path: Path, train: ImageSet) -> Classifier:
    classifier = load_classifier(path)
    info = classifier.info
    if (info.dataset, info.digest) != (train.name, train.digest):
        raise CheckpointError(
            f"{path}: a classifier of {info.dataset} ({info.num_images} images of {info.picture_shape}, "
            f"{info.digest[:16]}), not of {train.name} ({len(train)} of {train.picture_shape}, "
            f"{train.digest[:16]}); name another file"
        )
    return classifier


class ClassifierConfig(BaseSettings):
    """Train the classifier that judges samples of image models."""

    model_config = SettingsConfigDict(
        env_prefix="PRIME_CLASSIFIER_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    dataset: DatasetName = Field(description="data set")
    path: Path = Field(description="where its files are")
    cache: Path = Field(default=Path("data/images"), description="folder of converted copies")
    size: tuple[int, int] | None = Field(
        default=None, description="of a folder: height and width that pictures are cropped and resized to"
    )
    verify: bool = Field(
        default=True,
        description="of cifar10 and imagenet32: refuse files that are not the whole official ones",
    )
    output: Path = Field(description="file to write, .safetensors")
    epochs: int = Field(default=3, ge=1, description="passes over the training images")
    batch_size: int = Field(default=BATCH_SIZE, ge=2, description="images of a step")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the first weights and the order of images")
    num_threads: int = Field(default=0, ge=0, description="CPU threads of torch; 0 keeps torch's choice")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: trains and reports the accuracy; returns 0, or 2 after an error."""
    try:
        config = load_settings(ClassifierConfig, "classifier", sys.argv[1:] if argv is None else argv)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        train, heldout = (
            open_images(
                config.dataset, config.path, split, config.cache, size=config.size, verify=config.verify
            )
            for split in get_args(Split)
        )
        classifier = train_classifier(
            train, heldout, epochs=config.epochs, batch_size=config.batch_size, seed=config.seed
        )
        classifier.save(config.output)
    except (ValueError, OSError) as error:
        print(f"classifier: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    info = classifier.info
    print(f"{config.output}: {info.accuracy:.2%} of {info.num_heldout} held-out images of {info.dataset}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
