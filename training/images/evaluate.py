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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prime_core.checkpoint import Checkpoint, load_checkpoint
from prime_core.config import Config, UNetConfig
from prime_core.device import choose_device
from prime_core.likelihood import estimate_grid_nelbo, estimate_likelihood
from prime_core.models.denoiser import device_of
from prime_core.pixels import PixelCodec
from prime_core.sampling.prepare import NonFiniteError
from training.command_line import load_settings
from training.data.images import ImageSet, open_images
from training.data.rows import evenly_spread
from training.evaluation_noise import NOISE_ROWS, noise_seeds
from training.images.classifier import check_classifier, classifier_for
from training.images.draws import ImageDraws
from training.images.eval_config import ImageEvalConfig
from training.images.inception import MISSING, Inception, check_inception, load_inception
from training.images.report import MISSING_CLASSIFIER, bound_figures, bounds_table, samples_table
from training.images.sample_quality import Samples, draw_samples, measure_samples, open_samples
from training.images.sampler import ImageSamplerSettings
from training.progress import progress_bar
from training.sample_request import weights_digest


class _Data(NamedTuple):
    """The data set of an evaluation; training images are opened only for samples to be compared with."""

    dataset: str
    train: ImageSet | None
    heldout: ImageSet
    cache: Path


class _Judging(NamedTuple):
    """What samples are judged with, and what is said of it; a classifier without a file is still to be trained."""

    train: ImageSet
    drawn: Samples | None
    draws: ImageDraws
    inception: Inception | None
    classifier_file: Path | None
    report: Mapping[str, Any]


def evaluate_images(
    config: ImageEvalConfig,
    *,
    progress: bool = True,
    on_bounds: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run an evaluation.

    Args:
        config: what to measure.
        progress: show progress bars.
        on_bounds: called once with the report when all but the figures of samples is in it.

    Returns:
        The report: what was measured, `estimates` of bounds, and figures of samples.

    Raises:
        ValueError: the checkpoint, data or weights cannot be read, or a setting does not fit them.
        NonFiniteError: the network gave no finite logits for a sample.
        OSError: a file cannot be read or written.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = choose_device(config.device)
    checkpoint = load_checkpoint(config.checkpoint, device=device, dtype=config.dtype)
    data = _open_data(config, checkpoint.config)
    model = checkpoint.config.image_model
    report: dict[str, Any] = {
        "checkpoint": str(config.checkpoint),
        "step": checkpoint.config.provenance.get("step"),
        "target_length": checkpoint.config.codec.target_length,
        "labels": model.labels,
        "dtype": checkpoint.dtype_name,
        "data": data.heldout.name,
        "num_dimensions": math.prod(data.heldout.picture_shape),
        "seed": config.seed,
    }
    # Whatever can fail comes before the long parts, and bounds before a classifier is trained, which they do not need.
    if config.rows:
        _check_classes(model, data.heldout)
    judging = None
    if config.judges_samples:
        judging = _prepare_judging(config, checkpoint, data, device)
    if config.rows:
        report |= _bounds(config, checkpoint, data.heldout, progress)
    if on_bounds is not None:
        on_bounds(report)
    if judging is not None:
        report |= _judge(config, judging, data, device, progress)
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
    opened = partial(
        open_images,
        dataset,
        Path(path),
        cache=cache,
        size=None if size is None else tuple(size),
        verify=verify,
    )
    heldout = opened(split="heldout")
    shape = PixelCodec(model.image_model).picture_shape
    if heldout.picture_shape != shape:
        raise ValueError(
            f"pictures of {heldout.name} are {heldout.picture_shape}, and the model's are {shape}: name another "
            "--dataset"
        )
    return _Data(dataset, opened(split="train") if config.judges_samples else None, heldout, cache)


def _bounds(
    config: ImageEvalConfig, checkpoint: Checkpoint, heldout: ImageSet, progress: bool
) -> dict[str, Any]:
    """Estimate bounds and the coded loss, block by block; each has noise of its own, so none changes another."""
    model = checkpoint.config.image_model
    codec = PixelCodec(model)
    noise, grid_noise, label_noise = (
        torch.Generator().manual_seed(seed) for seed in noise_seeds(config.seed, 3)
    )
    rows = evenly_spread(config.rows, len(heldout))
    nats: dict[str, list[npt.NDArray[np.float64]]] = {"nelbo": [], "coded_loss": []}
    parts = checkpoint.denoiser, checkpoint.codec, checkpoint.schedule
    device = device_of(checkpoint.denoiser)
    options: dict[str, Any] = {
        "batch_rows": config.batch_rows * config.num_draws,
        "chunk_rows": config.chunk_rows,
    }
    with progress_bar(total=len(rows), unit="image", desc="bounds", shown=progress) as bar:
        for first in range(0, len(rows), NOISE_ROWS):
            batch = rows[first : first + NOISE_ROWS]
            # Every mask is a row of its own here, so that it can have a label of its own.
            x_0 = codec.encode(torch.from_numpy(heldout.pixels[batch])).repeat_interleave(config.num_draws, 0)
            labels = _labels(model, heldout, batch.repeat(config.num_draws), label_noise)
            x_0, options["labels"] = x_0.to(device), None if labels is None else labels.to(device)
            both = estimate_likelihood(*parts, x_0, generator=noise, **options)
            found = {"nelbo": both.nelbo, "coded_loss": both.coded_loss}
            if config.grid_steps is not None:
                found["grid_nelbo"] = estimate_grid_nelbo(
                    *parts, x_0, config.grid_steps, generator=grid_noise, **options
                )
            for name, value in found.items():
                per_image = value.view(len(batch), config.num_draws).mean(1)
                nats.setdefault(name, []).append(per_image.cpu().numpy())
            bar.update(len(batch))
    num_dimensions = math.prod(heldout.picture_shape)
    estimates = {
        name: bound_figures(name, np.concatenate(found_parts), num_dimensions, model.labels)
        for name, found_parts in nats.items()
    }
    if config.grid_steps is not None:
        estimates["grid_nelbo"]["steps"] = config.grid_steps
    return {"num_rows": len(rows), "num_draws": config.num_draws, "estimates": estimates}


def _labels(
    model: UNetConfig, images: ImageSet, rows: npt.NDArray[np.int64], generator: torch.Generator
) -> Tensor | None:
    """Return labels (B,) int64 of rows, drawn where they mean nothing."""
    if model.labels == "none":
        return None
    if model.labels == "uniform":
        return torch.randint(model.num_labels, (len(rows),), generator=generator)
    assert images.labels is not None, "checked before"
    return torch.from_numpy(images.labels[rows])


def _check_classes(model: UNetConfig, images: ImageSet) -> None:
    if model.labels == "class" and len(images.label_names) != model.num_labels:
        raise ValueError(
            f"the model has {model.num_labels} classes and {images.name} has {len(images.label_names)}: name another "
            "--dataset, or leave bounds out with --rows 0"
        )


def _prepare_judging(
    config: ImageEvalConfig, checkpoint: Checkpoint, data: _Data, device: torch.device
) -> _Judging:
    """Open what samples are judged with, and check what is to be made."""
    train = data.train
    assert train is not None, "opened where samples are judged"
    drawn, draws = None, ImageDraws(checkpoint, config.seed, config.sampler_fields())
    if config.samples_folder is None:
        draws.prepare(0)  # refuses what does not fit the model
    else:
        drawn = open_samples(config.samples_folder, train.picture_shape, weights_digest(checkpoint.path))
    num_samples = config.samples if drawn is None else len(drawn.pixels)
    if num_samples < 2:
        raise ValueError(f"{config.samples_folder} holds {num_samples} sample: at least 2 are compared")
    report: dict[str, Any] = {"notes": []}
    inception = file = None
    if config.inception_weights is None:
        report["notes"].append(MISSING)
    else:
        check_inception(num_samples, min(config.num_reference, len(train)), train.picture_shape[2])
        inception = load_inception(config.inception_weights, device)
    if train.labels is None:
        if config.classifier is not None:
            raise ValueError(f"--classifier: {train.name} has no labels to judge by: leave it out")
        report["notes"].append(MISSING_CLASSIFIER)
    else:
        default = data.cache / f"classifier-{data.dataset}-{train.digest[:16]}.safetensors"
        file = default if config.classifier is None else config.classifier
        check_classifier(file, train, data.heldout)
    return _Judging(train, drawn, draws, inception, file, report)


def _judge(
    config: ImageEvalConfig, judging: _Judging, data: _Data, device: torch.device, progress: bool
) -> dict[str, Any]:
    """Draw samples, or take the drawn ones, and judge them."""
    model = judging.draws.checkpoint.config.image_model
    report, classifier = dict(judging.report), None
    if judging.classifier_file is not None:
        classifier = classifier_for(judging.classifier_file, judging.train, data.heldout, progress=progress)
        report["classifier"] = {"file": str(judging.classifier_file), "accuracy": classifier.info.accuracy}
    samples, facts = judging.drawn, {}
    if samples is None:
        samples = draw_samples(judging.draws, config.samples, config.max_rows, progress=progress)
        facts = config.model_dump(mode="json", include=set(ImageSamplerSettings.model_fields))
    figures = measure_samples(
        samples,
        judging.train,
        data.heldout,
        classifier=classifier,
        inception=judging.inception,
        labels_are_classes=model.labels == "class" and model.num_labels == len(judging.train.label_names),
        num_reference=config.num_reference,
        seed=config.seed,
        device=device,
        progress=progress,
    )
    return {**report, "samples": {**samples.facts, **facts}, **figures}


def main(arguments: Sequence[str]) -> int:
    """Command line of `prime-eval` for image models; returns 0, or 2 after an error."""
    try:
        config = load_settings(ImageEvalConfig, "prime-eval", arguments, synonyms={"json": "as_json"})
        report = evaluate_images(config, on_bounds=None if config.as_json else _show_bounds)
    except (ValueError, OSError, NonFiniteError) as error:
        print(f"prime-eval: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if config.as_json:
        print(json.dumps(report, indent=2))
    elif "samples" in report:
        print(samples_table(report))
    return 0


def _show_bounds(report: Mapping[str, Any]) -> None:
    print(bounds_table(report), flush=True)
