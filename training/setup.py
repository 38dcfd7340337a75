"""What a run is set up from: rows to learn from and to hold out, their tokenizer or labels, the codec's permutation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from prime_core.config import UNetConfig
from prime_core.pictures import Pixels, to_grid
from prime_core.pixels import PixelCodec
from prime_core.tokenizer import Tokenizer, load_tokenizer
from training.config import TrainConfig
from training.data.corpus import CorpusOptions, list_sources
from training.data.dataset import TokenDataset
from training.data.images import ImageSet, Split, open_images
from training.data.rows import ImageRows, LabelSource, RowSource, TextRows
from training.data.shards import build_shards
from training.data.toy2d import Toy2dRows, open_picture
from training.data_config import ImageData, TextData, Toy2dData
from training.images.preview import columns_for, paint_beside


@dataclass(frozen=True)
class RunData:
    """The data of a run, whatever its kind.

    Attributes:
        train: rows that are learned.
        heldout: rows that are evaluated and never learned; None without them.
        labels: where the network's labels come from.
        label_names: names of the data's labels, for a network that takes them.
        tokenizer_file: the rank file that goes into the checkpoint; None if there is none.
        num_dimensions: pixel values (height x width x channels) of a row, for bits per dimension; None for
            rows that are no images.
        entropy: nats per row of the distribution that the rows are drawn from, where it is known.
        paint: samples x_0 (N, L) to a picture (H, W, C) uint8 for preview.png; None for rows that are no pictures.
    """

    train: RowSource
    heldout: RowSource | None
    labels: LabelSource = field(default_factory=LabelSource)
    label_names: tuple[str, ...] = ()
    tokenizer_file: Path | None = None
    num_dimensions: int | None = None
    entropy: float | None = None
    paint: Callable[[Tensor], Pixels] | None = None


def open_data(config: TrainConfig, *, progress: bool = True) -> RunData:
    """Open the data of a run.

    Args:
        config: the run.
        progress: show a progress bar while data is converted.

    Raises:
        ValueError: the data cannot be read, or does not fit the network or the codec.
        FileNotFoundError: a tokenizer file is missing.
    """
    return _OPENERS[config.data.kind](config, progress)


def _open_text(config: TrainConfig, progress: bool) -> RunData:
    data, length = config.data, config.model.length
    assert isinstance(data, TextData), "the table of openers goes by kind"
    train, heldout = open_datasets(config, data, text_tokenizer(config, data), progress=progress)
    return RunData(
        train=TextRows(train, length),
        heldout=None if heldout is None else TextRows(heldout, length),
        tokenizer_file=None if data.tokenizer.file is None else data.tokenizer_folder / data.tokenizer.file,
    )


def _open_images(config: TrainConfig, progress: bool) -> RunData:
    data, model = config.data, config.model
    assert isinstance(data, ImageData) and isinstance(model, UNetConfig), "checked by the settings"
    codec = PixelCodec(model)
    train, heldout = (
        open_images(data.dataset, data.path, split, data.cache, size=data.size, verify=data.verify)
        for split in get_args(Split)
    )
    _check_pixel_values(config, train)
    _check_labels(model, train)
    height, width, channels = codec.picture_shape
    columns = columns_for(config.preview, model.num_labels if model.labels == "class" else 1)
    return RunData(
        train=ImageRows(train, codec, flip=data.flip),
        heldout=ImageRows(heldout, codec),
        labels=LabelSource(model.labels, model.num_labels),
        label_names=train.label_names if model.labels == "class" else (),
        num_dimensions=height * width * channels,
        paint=lambda x_0: to_grid(codec.decode(x_0).numpy(), columns),
    )


def _open_toy2d(config: TrainConfig, progress: bool) -> RunData:
    data = config.data
    assert isinstance(data, Toy2dData), "the table of openers goes by kind"
    rows = Toy2dRows(open_picture(data.picture, config.codec.vocab_size))
    # The rows are the distribution itself, of which nothing can be held out.
    return RunData(
        train=rows, heldout=rows, entropy=rows.entropy, paint=partial(paint_beside, target=rows.probabilities)
    )


def _check_pixel_values(config: TrainConfig, images: ImageSet) -> None:
    """Refuse a codec without room for all values of a pixel, before it fails on some image in the middle."""
    needed = 4096 if isinstance(config.model, UNetConfig) and config.model.packing == "rgb24" else 256
    if config.codec.vocab_size != needed:
        raise ValueError(
            f"codec.vocab_size is {config.codec.vocab_size}, but the tokens of {images.name} are "
            f"0..{needed - 1}; set codec.vocab_size to {needed}"
        )


def _check_labels(model: UNetConfig, images: ImageSet) -> None:
    if model.labels != "class":
        return
    if images.labels is None:
        raise ValueError(
            f"model.labels is 'class', but {images.name} has no labels; set it to none or uniform"
        )
    if model.num_labels != len(images.label_names):
        raise ValueError(
            f"model.num_labels is {model.num_labels}, but {images.name} has {len(images.label_names)} labels; "
            "make them equal"
        )


def text_tokenizer(config: TrainConfig, data: TextData) -> Tokenizer:
    """Load the tokenizer of a run.

    Raises:
        ValueError: there is none, a file is broken, or it has more tokens than the codec.
        FileNotFoundError: a file is missing.
    """
    tokenizer = load_tokenizer(data.tokenizer, data.tokenizer_folder)
    if tokenizer is None:
        raise ValueError("data.tokenizer.kind is 'none': text needs a tokenizer")
    if tokenizer.vocab_size > config.codec.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but codec.vocab_size is "
            f"{config.codec.vocab_size}; set codec.vocab_size to {tokenizer.vocab_size}"
        )
    return tokenizer


def open_datasets(
    config: TrainConfig, data: TextData, tokenizer: Tokenizer, *, progress: bool = True
) -> tuple[TokenDataset, TokenDataset | None]:
    """Build the token shards if need be and open them: training text, and held-out text if there is any.

    Raises:
        ValueError: the corpus cannot be read, holds less than one row, or held-out files are trained on.
    """
    if data.heldout:
        trained = {source.resolve() for source in list_sources(data.train)}
        for source in list_sources(data.heldout):
            if source.resolve() in trained:
                raise ValueError(f"{source} is in data.train and in data.heldout; hold other files out")
    options = CorpusOptions(document_separator=data.document_separator, text_key=data.text_key)
    datasets = []
    for name, paths in (("train", data.train), ("heldout", data.heldout)):
        if not paths:
            continue
        build_shards(paths, tokenizer, data.cache / name, options=options, progress=progress)
        dataset = TokenDataset(data.cache / name)
        if dataset.num_blocks(config.model.length) == 0:
            raise ValueError(
                f"data.{name} has {dataset.num_tokens} tokens, less than one row (model.length = "
                f"{config.model.length}); use more text or a shorter length"
            )
        datasets.append(dataset)
    return datasets[0], datasets[1] if len(datasets) > 1 else None


def codec_permutation(config: TrainConfig) -> Tensor | None:
    """Return the codec's shuffling of token ids (V,) int64, a function of the seed; None without one."""
    if not config.codec.permuted:
        return None
    return torch.randperm(config.codec.vocab_size, generator=torch.Generator().manual_seed(config.seed))


_OPENERS: dict[str, Callable[[TrainConfig, bool], RunData]] = {
    "text": _open_text,
    "images": _open_images,
    "toy2d": _open_toy2d,
}
