"""`prime-eval` for image models: bits per dimension of held-out images, and the quality of samples.

A dimension is one value of one pixel, so bits per dimension of models that write pixels in different ways can be
compared. `nelbo` bounds the negative log-likelihood; `coded_loss`, the published training loss, is no bound for more
than one digit a token and is labelled so. What the bound is a bound of depends on the model's labels:

- "none": -log p(x);
- "class": -log p(x | its label), so it is not comparable with a model that has to find the class itself;
- "uniform": -log p(x) of the mixture p(x) = mean over labels of p(x | label). By Jensen's inequality -log of the mean
  is at most the mean of -log, so the bound with a label drawn uniformly for every mask is valid in expectation.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from pydantic_settings import SettingsConfigDict
from torch import Tensor
from tqdm import tqdm

from prime_core.checkpoint import Checkpoint, load_checkpoint
from prime_core.config import Config, UNetConfig
from prime_core.device import choose_device
from prime_core.likelihood import estimate_grid_nelbo, estimate_likelihood
from prime_core.pixels import PixelCodec
from prime_core.sample import NonFiniteError
from training.classifier import classifier_for
from training.command_line import load_settings
from training.data.images import DatasetName, ImageSet, Split, open_images
from training.heldout import mean_over_rows
from training.image_draws import ImageDraws
from training.image_report import BOUNDS, MISSING_CLASSIFIER, NOT_A_BOUND, image_table
from training.image_sampler import ImageSamplerSettings
from training.inception import MISSING, load_inception
from training.sample_quality import draw_samples, measure_samples, open_samples


class ImageEvalConfig(ImageSamplerSettings):
    """Measure an image model: bits per dimension of held-out images, and how good its samples are."""

    model_config = SettingsConfigDict(
        env_prefix="PRIME_EVAL_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    checkpoint: Path = Field(description="checkpoint: a folder or one .safetensors file")
    dataset: DatasetName | None = Field(
        default=None, description="cifar10, imagenet32, fashion-mnist or folder; default: as in training"
    )
    path: Path | None = Field(default=None, description="its files; default: those of the training")
    size: tuple[int, int] | None = Field(
        default=None,
        description="of a folder: height and width that pictures are cropped and resized to; default: as in training",
    )
    verify: bool | None = Field(
        default=None,
        description="of a cifar10 archive: refuse one whose MD5 is not official; default: as in training",
    )
    cache: Path | None = Field(
        default=None, description="folder of converted copies and of the classifier; default: as in training"
    )
    rows: int = Field(default=1000, ge=0, description="held-out images, evenly spread; 0 leaves bounds out")
    num_draws: int = Field(default=4, ge=1, description="masks drawn per image")
    batch_rows: int = Field(default=16, ge=1, description="images in memory at a time (times num_draws)")
    chunk_rows: int = Field(default=16384, ge=1, description="tokens whose logits are in memory at a time")
    grid_steps: int | None = Field(
        default=None,
        ge=1,
        description="also report grid_nelbo, the bound of the ancestral sampler with so many steps",
    )
    samples: int = Field(default=0, ge=0, description="samples to draw and judge, balanced over the classes")
    samples_folder: Path | None = Field(
        default=None, description="judge what prime-sample wrote there instead of drawing samples"
    )
    num_reference: int = Field(
        default=10_000, ge=2, description="training images that samples are compared with; published FID: all"
    )
    classifier: Path | None = Field(
        default=None,
        description="classifier that judges samples, trained and written if it is missing; default: in --cache",
    )
    inception_weights: Path | None = Field(
        default=None,
        description="pt_inception-2015-12-05-6726825d.pth: also report FID and Inception Score; never downloaded",
    )
    max_rows: int = Field(default=64, ge=1, description="most samples in one denoiser call")
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="of masks, samples and the choice of real images"
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$", description="auto, cpu, cuda or cuda:N"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the weights; auto keeps what is stored"
    )
    num_threads: int = Field(default=0, ge=0, description="CPU threads of torch; 0 keeps torch's choice")
    as_json: bool = Field(default=False, description="print JSON instead of a table (short: --json)")


class _Data(NamedTuple):
    """The data set of an evaluation."""

    dataset: str
    train: ImageSet
    heldout: ImageSet
    cache: Path


def evaluate_images(config: ImageEvalConfig, *, progress: bool = True) -> dict[str, Any]:
    """Run an evaluation.

    Args:
        config: what to measure.
        progress: show progress bars.

    Returns:
        The report: what was measured, `estimates` of bounds, and figures of samples.

    Raises:
        ValueError: the checkpoint, data or weights cannot be read, or a setting does not fit them.
        NonFiniteError: the network gave no finite logits for a sample.
        OSError: a file cannot be read or written.
    """
    if config.samples and config.samples_folder is not None:
        raise ValueError("--samples draws samples and --samples-folder takes drawn ones: give one of them")
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = choose_device(config.device)
    checkpoint = load_checkpoint(config.checkpoint, device=device, dtype=config.dtype)
    data = _open_data(config, checkpoint.config)
    model = checkpoint.config.model
    assert isinstance(model, UNetConfig), "the command looked at the checkpoint first"
    report: dict[str, Any] = {
        "checkpoint": str(config.checkpoint),
        "step": checkpoint.config.provenance.get("step"),
        "target_length": checkpoint.config.codec.target_length,
        "labels": model.labels,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "data": data.heldout.name,
        "num_dimensions": math.prod(data.heldout.picture_shape),
        "num_draws": config.num_draws,
        "seed": config.seed,
    }
    if config.rows:
        report |= _bounds(config, checkpoint, data.heldout, progress)
    if config.samples or config.samples_folder is not None:
        report |= _samples(config, checkpoint, data, device, progress)
    return report


def _open_data(config: ImageEvalConfig, model: Config) -> _Data:
    """Open the data set that is named, or else the one that the checkpoint was trained on."""
    training = model.provenance.get("training")
    trained = training.get("data") if isinstance(training, Mapping) else None
    if not isinstance(trained, Mapping) or trained.get("kind") != "images":
        trained = {}
    dataset = trained.get("dataset") if config.dataset is None else config.dataset
    if dataset != trained.get("dataset"):
        trained = {"cache": trained.get("cache", "data/images")}  # the rest is that of other files
    path = trained.get("path") if config.path is None else config.path
    if dataset is None or path is None:
        raise ValueError("the checkpoint does not say what it was trained on: give --dataset and --path")
    cache = Path(str(trained.get("cache", "data/images"))) if config.cache is None else config.cache
    size = trained.get("size") if config.size is None else config.size
    verify = bool(trained.get("verify", True)) if config.verify is None else config.verify
    train, heldout = (
        open_images(
            dataset, Path(path), split, cache, size=None if size is None else tuple(size), verify=verify
        )
        for split in get_args(Split)
    )
    assert isinstance(model.model, UNetConfig)
    shape = PixelCodec(model.model).picture_shape
    if heldout.picture_shape != shape:
        raise ValueError(
            f"pictures of {heldout.name} are {heldout.picture_shape}, and the model's are {shape}: name another "
            "--dataset"
        )
    return _Data(dataset, train, heldout, cache)


def _bounds(
    config: ImageEvalConfig, checkpoint: Checkpoint, heldout: ImageSet, progress: bool
) -> dict[str, Any]:
    """Estimate bounds and the coded loss, batch by batch."""
    model = checkpoint.config.model
    assert isinstance(model, UNetConfig)
    codec = PixelCodec(model)
    generator = torch.Generator().manual_seed(config.seed)
    rows = np.linspace(0, len(heldout) - 1, min(config.rows, len(heldout))).astype(np.int64)
    nats: dict[str, list[npt.NDArray[np.float64]]] = {"nelbo": [], "coded_loss": []}
    parts = checkpoint.denoiser, checkpoint.codec, checkpoint.schedule
    device = next(checkpoint.denoiser.parameters()).device
    options: dict[str, Any] = {"generator": generator, "chunk_rows": config.chunk_rows}
    with tqdm(total=len(rows), unit="image", desc="bounds", disable=not progress) as bar:
        for first in range(0, len(rows), config.batch_rows):
            batch = rows[first : first + config.batch_rows]
            # Every mask is a row of its own here, so that it can have a label of its own.
            x_0 = codec.encode(torch.from_numpy(heldout.pixels[batch])).repeat_interleave(config.num_draws, 0)
            labels = _labels(model, heldout, batch.repeat(config.num_draws), generator)
            x_0, options["labels"] = x_0.to(device), None if labels is None else labels.to(device)
            both = estimate_likelihood(*parts, x_0, **options)
            found = {"nelbo": both.nelbo, "coded_loss": both.coded_loss}
            if config.grid_steps is not None:
                found["grid_nelbo"] = estimate_grid_nelbo(*parts, x_0, config.grid_steps, **options)
            for name, value in found.items():
                per_image = value.view(len(batch), config.num_draws).mean(1)
                nats.setdefault(name, []).append(per_image.cpu().numpy())
            bar.update(len(batch))
    num_dimensions = math.prod(heldout.picture_shape)
    estimates = {
        name: _figures(
            np.concatenate(found_parts),
            num_dimensions,
            NOT_A_BOUND if name == "coded_loss" else BOUNDS[model.labels],
        )
        for name, found_parts in nats.items()
    }
    if config.grid_steps is not None:
        estimates["grid_nelbo"]["steps"] = config.grid_steps
    return {"num_rows": len(rows), "estimates": estimates}


def _labels(
    model: UNetConfig, images: ImageSet, rows: npt.NDArray[np.int64], generator: torch.Generator
) -> Tensor | None:
    """Return labels (B,) int64 of rows, drawn where they mean nothing."""
    if model.labels == "none":
        return None
    if model.labels == "uniform":
        return torch.randint(model.num_labels, (len(rows),), generator=generator)
    if images.labels is None or len(images.label_names) != model.num_labels:
        raise ValueError(
            f"the model has {model.num_labels} classes and {images.name} has {len(images.label_names)}: name another "
            "--dataset, or leave bounds out with --rows 0"
        )
    return torch.from_numpy(images.labels[rows])


def _figures(nats: npt.NDArray[np.float64], num_dimensions: int, label: str) -> dict[str, Any]:
    if not np.isfinite(nats).all():
        raise ValueError("the model gives these images no finite likelihood; are its weights sound?")
    mean = mean_over_rows(nats, np.full(len(nats), num_dimensions))
    error = mean.standard_error
    return {
        "label": label,
        "bits_per_dimension": mean.value / math.log(2),
        "bits_per_dimension_standard_error": None if error is None else error / math.log(2),
        "nats_per_image": float(nats.mean()),
    }


def _samples(
    config: ImageEvalConfig, checkpoint: Checkpoint, data: _Data, device: torch.device, progress: bool
) -> dict[str, Any]:
    """Draw or open samples and judge them."""
    # Whatever can fail comes before the long part.
    weights = config.inception_weights
    inception = None if weights is None else load_inception(weights, device)
    report: dict[str, Any] = {"notes": [MISSING] if inception is None else []}
    classifier = None
    if data.train.labels is None:
        report["notes"].append(MISSING_CLASSIFIER)
    else:
        default = data.cache / f"classifier-{data.dataset}.safetensors"
        file = default if config.classifier is None else config.classifier
        classifier = classifier_for(file, data.train, data.heldout, progress=progress)
        report["classifier"] = {"file": str(file), "accuracy": classifier.info.accuracy}
    if config.samples_folder is not None:
        samples = open_samples(config.samples_folder, data.train.picture_shape)
        report["samples"] = dict(samples.facts)
    else:
        draws = ImageDraws(checkpoint, config.seed, config.sampler_fields())
        samples = draw_samples(draws, config.samples, config.max_rows, progress=progress)
        sampler = config.model_dump(mode="json", include=set(ImageSamplerSettings.model_fields))
        report["samples"] = {**samples.facts, **sampler}
    model = checkpoint.config.model
    assert isinstance(model, UNetConfig)
    figures = measure_samples(
        samples,
        data.train,
        data.heldout,
        classifier=classifier,
        inception=inception,
        labels_are_classes=model.labels == "class" and model.num_labels == len(data.train.label_names),
        num_reference=config.num_reference,
        seed=config.seed,
        device=device,
        progress=progress,
    )
    return {**report, **figures}


def main(arguments: Sequence[str]) -> int:
    """Command line of `prime-eval` for image models; returns 0, or 2 after an error."""
    try:
        config = load_settings(ImageEvalConfig, "prime-eval", arguments, synonyms={"json": "as_json"})
        report = evaluate_images(config)
    except (ValueError, OSError, NonFiniteError) as error:
        print(f"prime-eval: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps(report, indent=2) if config.as_json else image_table(report))
    return 0
