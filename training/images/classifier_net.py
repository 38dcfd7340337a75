"""A small convolutional classifier of pictures, and the file it is kept in.

The file is one `.safetensors` file whose metadata says what was trained on.

Shapes: N images, H height, W width, C channels, D features, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from prime_core.atomic import atomic_write
from prime_core.weights import CheckpointError, open_weights, write_weights

NUM_FEATURES = 64
_WIDTH = 24
_POOLED = 3  # features are pooled to so many rows and columns before the hidden layer
_METADATA_KEY = "prime_classifier"


class ClassifierInfo(BaseModel):
    """What a classifier file was made from; stored in the metadata of its weights.

    Attributes:
        dataset: data set and split that it was trained on, such as "fashion-mnist/train".
        num_images: how many images that split had.
        digest: `ImageSet.digest` of that split.
        picture_shape: (H, W, C).
        label_names: the classes in their order.
        epochs: passes over the data.
        batch_size: images of a step.
        seed: of the first weights and the order of the images.
        accuracy: share of held-out images that it labels right.
        num_heldout: number of held-out images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[1] = 1
    dataset: str
    num_images: int = Field(ge=1)
    digest: str
    picture_shape: tuple[int, int, int]
    label_names: tuple[str, ...]
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=2)
    seed: int
    accuracy: float = Field(ge=0, le=1)
    num_heldout: int = Field(ge=1)


class ClassifierNet(nn.Module):
    """Three convolutions with batch norms, one hidden layer of 64 features, a linear layer.

    Plain NCHW layout: batch norms in it are the fast ones on a CPU.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_block(channels, _WIDTH),
            nn.MaxPool2d(2),
            *_block(_WIDTH, 2 * _WIDTH),
            nn.MaxPool2d(2),
            *_block(2 * _WIDTH, 4 * _WIDTH),
            nn.AdaptiveAvgPool2d(_POOLED),
            nn.Flatten(),
            nn.Linear(4 * _WIDTH * _POOLED**2, NUM_FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Classify images.

        Args:
            pixels: (N, C, H, W) uint8.

        Returns:
            features (N, D) and logits (N, K).
        """
        features = self.trunk(pixels.float() / 127.5 - 1)
        return features, self.head(features)


def _block(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(channels_out), nn.ReLU()


class Classifier:
    """A trained classifier.

    Attributes:
        info: what it was made from.
    """

    def __init__(self, network: ClassifierNet, info: ClassifierInfo) -> None:
        self.info = info
        self._network = network.eval().requires_grad_(False)

    @torch.inference_mode()
    def judge(self, pixels: NDArray[np.uint8], batch_size: int = 500) -> tuple[Tensor, Tensor]:
        """Return what the classifier makes of images.

        Args:
            pixels: (N, H, W, C) uint8 of the shape that it was trained on.
            batch_size: images in memory at a time.

        Returns:
            features (N, D) float32 and labels (N,) int64.

        Raises:
            ValueError: the images have another shape or type.
        """
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self.info.picture_shape or not len(pixels):
            raise ValueError(
                f"the classifier of {self.info.dataset} judges uint8 images of {self.info.picture_shape}, got "
                f"{pixels.dtype} {pixels.shape}; train one on this data set"
            )
        features, labels = [], []
        for first in range(0, len(pixels), batch_size):
            batch = to_planes(pixels[first : first + batch_size])
            hidden, logits = self._network(batch)
            features.append(hidden)
            labels.append(logits.argmax(1))
        return torch.cat(features), torch.cat(labels)

    def save(self, path: Path) -> None:
        """Write the classifier; a crash leaves the old file or the new one.

        Raises:
            OSError: the file cannot be written.
        """
        tensors = {name: tensor.float() for name, tensor in self._network.state_dict().items()}
        metadata = {"format": "pt", _METADATA_KEY: self.info.model_dump_json()}
        atomic_write(path, lambda file: write_weights(file, tensors, metadata))


def to_planes(pixels: NDArray[np.uint8]) -> Tensor:
    """Return pixels (N, H, W, C) uint8, maybe of a read-only memory map, as a tensor (N, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).copy())


def load_classifier(path: Path) -> Classifier:
    """Load a classifier that `Classifier.save` wrote.

    Raises:
        CheckpointError: the file is missing, damaged or something else.
    """
    with open_weights(path) as weights:
        try:
            info = ClassifierInfo.model_validate_json(weights.metadata.get(_METADATA_KEY, ""))
        except ValidationError:
            raise CheckpointError(
                f"{path}: no classifier (metadata {_METADATA_KEY}); make one with python -m training.images.classifier"
            ) from None
        with torch.random.fork_rng(devices=[]):
            network = ClassifierNet(info.picture_shape[2], len(info.label_names))
        state = network.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if {name: entry.shape for name, entry in weights.tensors.items()} != shapes:
            raise CheckpointError(f"{path}: its tensors are not those of this classifier; train it again")
        network.load_state_dict({name: weights.read(name).to(state[name].dtype) for name in state})
    return Classifier(network, info)
