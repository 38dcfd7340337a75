"""`prime-sample` for image models: a folder of pictures, and arrays of all of them.

    000000.png ...      picture i, with its index, seed, label and number of denoiser calls beside the pixels
    samples.npy         (N, H, W, C) uint8; labels.npy (N,) int64 for models with labels
    request.json        what was asked for

Picture i depends only on (settings, seed, i). Every file is made whole or not at all, and pictures that are there are
checked before they are kept, so a run that was killed is continued exactly.

Under torchrun rank r of W makes the pictures r, r + W, r + 2 W, ...; the ranks do not talk to each other. Pictures are
lossless, so they are the shards: whichever rank finds at its end that all are there merges them into samples.npy. The
result is that of one process. If a rank died, the same command continues. Two runs of different numbers of ranks should
not write one folder at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from pydantic_settings import SettingsConfigDict
from torch import Tensor

from prime_core.checkpoint import Checkpoint, load_checkpoint
from prime_core.device import choose_device
from prime_core.labels import parse_label
from prime_core.pictures import PNG_MODES
from prime_core.pixels import PixelCodec
from prime_core.sampling.prepare import NonFiniteError
from training.command_line import load_settings
from training.images.draws import ImageDraws, draw_images
from training.images.picture_files import PictureError, read_picture
from training.images.sample_folder import SAMPLES_NAME, SampleFolder
from training.images.sampler import ImageSamplerSettings
from training.sample_request import SampleFileError, exclusive_file, what_made_it
from training.shared_settings import CheckpointSettings

# They change when and where pictures are computed, not what is asked for.
_FREE_SETTINGS = {"output", "n", "max_rows", "overwrite", "device", "num_threads", "seed"}


class ImageSampleConfig(ImageSamplerSettings, CheckpointSettings):
    """Write samples of an image model to a folder."""

    model_config = SettingsConfigDict(
        env_prefix="PRIME_SAMPLE_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    output: Path = Field(description="folder of pictures; continued if it holds part of this request")
    n: int = Field(default=1, ge=1, le=10**6, description="pictures in all (short: -n)")
    seed: int | None = Field(
        default=None, ge=0, lt=2**64, description="of the request; default: drawn, or that of the folder"
    )
    label: str | None = Field(
        default=None, description="class of all pictures, by number or name; default: the classes in turn"
    )
    known: Path | None = Field(default=None, description="picture of which a part is kept in every sample")
    known_mask: Path | None = Field(
        default=None, description="picture of the same size, white where --known is kept (in-painting)"
    )
    known_digits: Literal["high", "low"] | None = Field(
        default=None, description="keep the first or the last digit of every value of --known (imputation)"
    )
    max_rows: int = Field(default=64, ge=1, description="most pictures in one denoiser call")
    overwrite: bool = Field(default=False, description="replace a folder that holds another request")


class Shard(NamedTuple):
    """Which pictures this process makes: those whose index is ``rank`` modulo ``world_size``."""

    rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> Shard:
        """Read what torchrun sets, RANK and WORLD_SIZE; without them this process makes all.

        Raises:
            ValueError: they are no such numbers.
        """
        rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
            raise ValueError(
                f"RANK={rank!r} and WORLD_SIZE={world_size!r} in the environment must be numbers, rank below world "
                "size; torchrun sets them"
            )
        return cls(int(rank), int(world_size))


class Written(NamedTuple):
    """What a run did: pictures written now, and whether samples.npy holds all of the request."""

    pictures: int
    complete: bool


def write_images(config: ImageSampleConfig, *, shard: Shard | None = None, progress: bool = True) -> Written:
    """Write the pictures of this process that the folder does not hold yet, and merge if all are there.

    Args:
        config: the request and its folder.
        shard: which pictures; None asks the environment.
        progress: show progress bars.

    Raises:
        ValueError: a setting does not fit the model, or the folder holds something else.
        NonFiniteError: the network gave no finite logits; pictures before that stand.
        OSError: a file cannot be written; whole pictures before that stand.
    """
    shard = Shard.from_environment() if shard is None else shard
    if config.overwrite and shard.world_size > 1:
        raise SampleFileError("--overwrite is for one process: empty the folder before you start several")
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = _device(config.device)
    checkpoint = load_checkpoint(config.checkpoint, device=device, dtype=config.dtype)
    shape = PixelCodec(checkpoint.config.image_model).picture_shape
    if shape[2] not in PNG_MODES:
        raise PictureError(f"a PNG has 1 or 3 channels, and the pictures of this model have {shape[2]}")
    known, digests = _known_parts(config, checkpoint, shape)
    draws = ImageDraws(
        checkpoint,
        0,
        {**config.sampler_fields(), **known},
        None if config.label is None else parse_label(config.label),
    )
    draws.prepare(0)  # refuses what does not fit before any file is touched
    request = {
        **config.model_dump(mode="json", exclude=_FREE_SETTINGS | {"known", "known_mask"}),
        **digests,
        **what_made_it(checkpoint),
    }
    folder = SampleFolder(config.output, shape)
    lock = config.output / ".folder.lock"
    with exclusive_file(config.output / f".rank-{shard.rank}-of-{shard.world_size}.lock"):
        with exclusive_file(lock, wait=True):
            seed = folder.continue_request(request, config.seed, overwrite=config.overwrite)
        draws = dataclasses.replace(draws, seed=seed)
        mine = range(shard.rank, config.n, shard.world_size)
        missing = folder.missing(seed, mine, progress=progress)
        for index, sample in draw_images(draws, missing, config.max_rows, progress=progress):
            folder.write(index, sample)
        with exclusive_file(lock, wait=True):
            complete = folder.merge(seed, config.n, progress=progress)
    return Written(len(missing), complete)


def _device(name: str) -> torch.device:
    """Choose the device; the processes that torchrun starts on one machine spread over its GPUs."""
    device = choose_device(name)
    local = os.environ.get("LOCAL_RANK", "")
    if device.type == "cuda" and name in ("auto", "cuda") and local.isdecimal():
        return torch.device("cuda", int(local) % torch.cuda.device_count())
    return device


def _known_parts(
    config: ImageSampleConfig, checkpoint: Checkpoint, shape: tuple[int, int, int]
) -> tuple[dict[str, Tensor], dict[str, str | None]]:
    """Return the fields of the request that say what is known, and digests of the pictures they are from."""
    digests = {
        name: None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in (("known", config.known), ("known_mask", config.known_mask))
    }
    if config.known is None:
        if config.known_mask is not None or config.known_digits is not None:
            raise ValueError("--known-mask and --known-digits say what is kept of --known: give a picture")
        return {}, digests
    if (config.known_mask is None) == (config.known_digits is None):
        raise ValueError("--known needs one of --known-mask and --known-digits: which part of it is kept?")
    pixels = torch.from_numpy(read_picture(config.known, shape)[0].astype(np.int64))
    if config.known_mask is not None:
        mask = read_picture(config.known_mask, (*shape[:2], 1))[0] >= 128
        return {"known": torch.where(torch.from_numpy(mask), pixels, -1)}, digests
    model, codec = checkpoint.config.image_model, checkpoint.codec
    if codec.target_length == 1:
        raise ValueError("--known-digits: the tokens of this model are single digits; use --known-mask")
    digits = codec.encode(PixelCodec(model).encode(pixels))
    keep = 0 if config.known_digits == "high" else codec.target_length - 1
    y = torch.full_like(digits, codec.mask_index)
    y[:, keep] = digits[:, keep]
    return {"y": y.view(model.channels, model.height, model.width, codec.target_length)}, digests


def main(arguments: Sequence[str]) -> int:
    """Command line of `prime-sample` for image models; returns 0, 2 after an error, 130 after Ctrl-C."""
    try:
        config = load_settings(ImageSampleConfig, "prime-sample", arguments)
        written = write_images(config)
    except (ValueError, OSError, NonFiniteError) as error:
        print(f"prime-sample: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prime-sample: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    rest = (
        f"all {config.n} are in {SAMPLES_NAME}" if written.complete else "other processes are still at work"
    )
    print(f"{config.output}: {written.pictures} pictures written; {rest}")
    return 0
