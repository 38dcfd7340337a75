"""What a run learns from: the data settings of text, of images and of the two-dimensional toy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from prime_core.config import Frozen
from prime_core.tokenizer import TokenizerSpec
from training.data.images import DatasetName

_NO_TOKENIZER = TokenizerSpec(kind="none")


class TextData(Frozen):
    """The corpus: files and folders of text, the tokenizer, and where the token shards are kept."""

    kind: Literal["text"] = "text"
    train: tuple[Path, ...] = Field(
        min_length=1, description="files and folders of .txt, .jsonl, also .gz, .zst"
    )
    heldout: tuple[Path, ...] = Field(
        default=(), description="the same; evaluated every eval_every steps, never trained on"
    )
    document_separator: Literal["blank_line", "file"] = Field(
        default="blank_line", description="of .txt: what ends a document"
    )
    text_key: str = Field(default="text", description="of .jsonl: key of the text")
    tokenizer: TokenizerSpec = TokenizerSpec(kind="gpt2", special_tokens={"<|endoftext|>": 50256})
    tokenizer_folder: Path = Field(default=Path(), description="folder of the tokenizer's files")
    cache: Path = Field(default=Path("data/shards"), description="folder of the token shards, made once")


class ImageData(Frozen):
    """An image data set. Its own test split is held out, never trained on."""

    tokenizer: ClassVar[TokenizerSpec] = _NO_TOKENIZER

    kind: Literal["images"] = "images"
    dataset: DatasetName = Field(description="format of the files, and which picture size they have")
    path: Path = Field(
        description="folder of the data set's files; of cifar10 also an official archive, or a folder that holds one"
    )
    cache: Path = Field(
        default=Path("data/images"), description="folder for converted copies of large data sets, made once"
    )
    size: tuple[int, int] | None = Field(
        default=None,
        description="of a folder: height and width to crop and resize pictures to; default: all have one size",
    )
    verify: bool = Field(
        default=True,
        description="of cifar10 and imagenet32: refuse files that are not the whole official ones",
    )
    flip: bool = Field(
        default=False, description="train on each image as it is and mirrored left to right, equally often"
    )


class Toy2dData(Frozen):
    """A grey picture as a distribution over V x V cells: a row is the two tokens (down, across) of a cell."""

    tokenizer: ClassVar[TokenizerSpec] = _NO_TOKENIZER

    kind: Literal["toy2d"] = "toy2d"
    picture: str = Field(
        default="swirl",
        min_length=1,
        description="swirl (built in), or the path of a PNG; brightness is probability",
    )


DataConfig = Annotated[TextData | ImageData | Toy2dData, Field(discriminator="kind")]
