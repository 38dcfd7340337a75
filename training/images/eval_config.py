"""The settings of `prime-eval` for image models, and which of them have an effect together."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from training.data.images import DatasetName
from training.evaluation_noise import NOISE_ROWS
from training.images.sampler import ImageSamplerSettings
from training.shared_settings import CheckpointSettings

# Settings that have an effect only with others; a preset, which fills in others, is named before them.
_OF_BOUNDS = ("num_draws", "batch_rows", "chunk_rows", "grid_steps")
_OF_DRAWING = ("preset", *ImageSamplerSettings.model_fields, "max_rows")
_OF_JUDGING = ("classifier", "inception_weights", "num_reference")


class ImageEvalConfig(ImageSamplerSettings, CheckpointSettings):
    """Measure an image model: bits per dimension of held-out images, and how good its samples are."""

    model_config = SettingsConfigDict(
        env_prefix="PRIME_EVAL_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    dataset: DatasetName | None = Field(
        default=None, description="cifar10, imagenet32, fashion-mnist or folder; default: as in training"
    )
    path: Path | None = Field(
        default=None,
        description="its files: a folder, or of cifar10 also an official archive; default: those of the training",
    )
    size: tuple[int, int] | None = Field(
        default=None,
        description="of a folder: height and width that pictures are cropped and resized to; default: as in training",
    )
    verify: bool | None = Field(
        default=None,
        description="of cifar10 and imagenet32: refuse files that are not the whole official ones; default: as in "
        "training",
    )
    cache: Path | None = Field(
        default=None, description="folder of converted copies and of the classifier; default: as in training"
    )
    rows: int = Field(default=1000, ge=0, description="held-out images, evenly spread; 0 leaves bounds out")
    num_draws: int = Field(default=4, ge=1, description="masks drawn per image")
    batch_rows: int = Field(
        default=16, ge=1, le=NOISE_ROWS, description="images in memory at a time (times num_draws)"
    )
    chunk_rows: int = Field(default=16384, ge=1, description="tokens whose logits are in memory at a time")
    grid_steps: int | None = Field(
        default=None,
        ge=1,
        description="also report grid_nelbo, the bound of the ancestral sampler with so many steps",
    )
    samples: int = Field(
        default=0, ge=0, description="samples to draw and judge, balanced over the classes; not 1"
    )
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
    as_json: bool = Field(default=False, description="print JSON instead of a table (short: --json)")

    @property
    def judges_samples(self) -> bool:
        """Whether samples are judged, drawn here or before."""
        return self.samples > 0 or self.samples_folder is not None

    @model_validator(mode="after")
    def _check_what_is_measured(self) -> Self:
        if self.samples and self.samples_folder is not None:
            raise ValueError(
                "--samples draws samples and --samples-folder takes drawn ones: give one of them"
            )
        if self.samples == 1:
            raise ValueError("--samples must be 0 or at least 2: one sample has no spread to compare")
        if not self.rows and not self.judges_samples:
            raise ValueError("nothing is left to measure: give --rows, --samples or --samples-folder")
        return self

    @model_validator(mode="after")
    def _check_effects(self) -> Self:
        for names, has_effect, need in (
            (_OF_BOUNDS, self.rows > 0, "--rows above 0"),
            (_OF_DRAWING, self.samples > 0, "--samples, which draws them here"),
            (_OF_JUDGING, self.judges_samples, "--samples or --samples-folder"),
        ):
            idle = [name for name in names if name in self.model_fields_set]
            if idle and not has_effect:
                raise ValueError(f"--{idle[0].replace('_', '-')} has no effect without {need}: leave it out")
        return self
