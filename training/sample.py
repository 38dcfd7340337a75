"""`prime-sample`: samples as JSON lines, one object each, in order; a run that was cut short is continued.

Image models are sampled by `sample_images`.

Row i of a request depends only on (settings, seed, i), so a file that was cut short and continued equals one
that was not, and asking for more samples adds to the file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from kernels.noise import row_seed
from prime_core.checkpoint import Checkpoint, load_checkpoint
from prime_core.device import choose_device
from prime_core.sampling.prepare import NonFiniteError, PreparedRows, Sample, prepare_rows
from prime_core.sampling.request import DEFAULT_STEPS
from prime_core.sampling.row import Row
from training.command_line import load_settings
from training.images import sample as sample_images
from training.model_kind import makes_images
from training.progress import progress_bar
from training.row_loop import finished_rows
from training.sample_request import (
    SampleFileError,
    exclusive_file,
    new_request,
    same_request,
    what_made_it,
)
from training.shared_settings import CheckpointSettings, GridSteps

# They change when and where rows are computed, not what is asked for.
_FREE_SETTINGS = {"output", "n", "max_rows", "overwrite", "device", "num_threads", "seed"}


class SampleConfig(CheckpointSettings):
    """Write samples of a checkpoint to a file of JSON lines.

    Of an image model: to a folder of pictures; with its --checkpoint, --help lists the settings of images.
    """

    model_config = SettingsConfigDict(
        env_prefix="PRIME_SAMPLE_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    output: Path = Field(
        description="file of JSON lines; continued if it holds part of this request. The request is kept "
        "beside it, in OUTPUT.request.json"
    )
    n: int = Field(default=1, ge=1, description="samples in all (short: -n)")
    steps: GridSteps = Field(
        default=DEFAULT_STEPS,
        description="steps of the sampling grid, 1 or more, or exact: one digit at a time",
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**64, description="of the request; default: drawn, or that of the file"
    )
    prompt: str | None = Field(default=None, description="text before the gap")
    suffix: str | None = Field(default=None, description="text after the gap")
    max_tokens: int | None = Field(
        default=None, ge=1, description="tokens of the gap; default: what the context has room for"
    )
    temperature: float = Field(default=1.0, ge=0, le=100, description="0 takes the most probable token")
    top_p: float = Field(default=1.0, gt=0, le=1, description="keep the likeliest tokens of this probability")
    top_k: int = Field(default=0, ge=0, description="keep so many of the likeliest tokens; 0 keeps all")
    stop: tuple[str, ...] = Field(default=(), description="strings that end the text of a prompt")
    max_rows: int = Field(default=64, ge=1, description="most rows in one denoiser call")
    overwrite: bool = Field(default=False, description="replace a file that holds another request")


def write_samples(config: SampleConfig, *, progress: bool = True) -> int:
    """Write the samples that the file does not hold yet.

    Args:
        config: the request and its file.
        progress: show a progress bar.

    Returns:
        Number of samples written now.

    Raises:
        ValueError: a setting does not fit the model, or the file holds something else.
        NonFiniteError: the network gave no finite logits; samples before that stand in the file.
        OSError: the file cannot be written; whole lines before that stand in it.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    checkpoint = load_checkpoint(config.checkpoint, device=choose_device(config.device), dtype=config.dtype)
    if config.output.is_dir():
        raise ValueError(
            f"--output: {config.output} is a folder; name a file, as in {config.output / 'samples.jsonl'}"
        )
    _prepare(config, checkpoint, 0)  # refuses what does not fit before any file is touched
    with exclusive_file(config.output) as file:
        seed, done = _continue_request(config, checkpoint, file)
        rows = _finished_rows(config, checkpoint, seed, done, progress)
        for index, sample in rows:
            record = {"index": index, **dataclasses.asdict(sample)}
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            file.flush()
        os.fsync(file.fileno())
    return max(0, config.n - done)


def _prepare(config: SampleConfig, checkpoint: Checkpoint, seed: int) -> PreparedRows:
    return prepare_rows(
        checkpoint,
        n=1,
        steps=config.steps,
        seed=seed,
        prompt=config.prompt,
        suffix=config.suffix,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop=config.stop,
    )


def _finished_rows(
    config: SampleConfig, checkpoint: Checkpoint, seed: int, first: int, progress: bool
) -> Iterator[tuple[int, Sample]]:
    """Sample rows first..n-1 and yield them in order."""
    finished: dict[int, Sample] = {}
    next_line = first
    num_free = int(_prepare(config, checkpoint, seed).canvas.free.sum())
    with progress_bar(
        total=config.n * num_free,
        initial=min(first, config.n) * num_free,
        unit="digit",
        shown=progress,
    ) as bar:

        def count(rows: Sequence[Row]) -> None:
            bar.update(sum(int(row.event.due.sum()) for row in rows))

        def prepare(index: int) -> PreparedRows:
            return _prepare(config, checkpoint, row_seed(seed, index))

        rows = finished_rows(checkpoint, prepare, range(first, config.n), config.max_rows, count)
        for index, sample in rows:
            assert isinstance(sample, Sample), "a text model makes text"
            finished[index] = sample
            while next_line in finished:
                yield next_line, finished.pop(next_line)
                next_line += 1


def _continue_request(config: SampleConfig, checkpoint: Checkpoint, file: BinaryIO) -> tuple[int, int]:
    """Compare with the request the file holds, if any; drop a line that was cut short.

    Returns:
        (seed of the request, samples that the file holds already).
    """
    request_path = config.output.with_name(config.output.name + ".request.json")
    request: dict[str, Any] = {
        **config.model_dump(mode="json", exclude=_FREE_SETTINGS),
        **what_made_it(checkpoint),
    }
    size = file.seek(0, os.SEEK_END)
    if config.overwrite or (size == 0 and not request_path.exists()):
        file.truncate(0)
        return new_request(request_path, request, config.seed), 0
    seed = same_request(request_path, config.output, request, config.seed)
    return seed, _count_lines(config.output, file)


def _count_lines(output: Path, file: BinaryIO) -> int:
    """Return the number of whole lines; cut off what follows the last of them."""
    file.seek(0)
    end = count = 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        try:
            index = json.loads(line)["index"]
        except (ValueError, KeyError, TypeError):
            index = None
        if index != count:
            raise SampleFileError(
                f"{output}, line {count + 1}: not sample {count}; the file was changed. Choose another file, "
                "or replace it with --overwrite"
            )
        end, count = end + len(line), count + 1
    file.truncate(end)
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: ``prime-sample --checkpoint DIR --output FILE.jsonl -n N``; 0, or 2 after an error."""
    given = sys.argv[1:] if argv is None else argv
    arguments = ["--n" if argument == "-n" else argument for argument in given]
    if makes_images(arguments, "PRIME_SAMPLE_"):
        return sample_images.main(arguments)
    where = ""
    try:
        config = load_settings(SampleConfig, "prime-sample", arguments)
        where = f"{config.output}: "
        written = write_samples(config)
    except OSError as error:
        print(f"prime-sample: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except (ValueError, NonFiniteError) as error:
        print(f"prime-sample: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prime-sample: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{config.output}: {written} samples written, {config.n - written} were there")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
