"""FID and Inception Score of samples, with the standard Inception weights from a file that the user gives.

Nothing is downloaded: without the file these figures do not exist, and `feature_distance` is what there is. The
figures are computed by torchmetrics (extra `fid`) from the features of `inception_net`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prime_core.published.state import file_digest, read_state
from training.images.inception_net import InceptionNet
from training.progress import progress_bar

# The published file is pt_inception-2015-12-05-6726825d.pth: its name carries the start of its SHA-256.
STANDARD_DIGEST = "6726825d"
MIN_SAMPLES = 20  # ten splits of the Inception Score with two samples each
NUM_SPLITS = 10
MISSING = (
    "FID and Inception Score need --inception-weights pt_inception-2015-12-05-6726825d.pth, which is not part of "
    "this project and is never downloaded; classifier_feature_distance is reported instead, and is not a FID"
)


class FeatureNetwork(Protocol):
    """What `InceptionNet` is to the metrics: pictures (N, 3, H, W) uint8 -> features (N, D), logits (N, K)."""

    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Look at pictures."""
        ...


class Inception(NamedTuple):
    """The network with its weights, and where they are from."""

    network: FeatureNetwork
    digest: str

    @property
    def is_standard(self) -> bool:
        """Whether the digest begins as that of the published weights does."""
        return self.digest.startswith(STANDARD_DIGEST)


def load_inception(path: Path, device: torch.device | str = "cpu") -> Inception:
    """Load the weights of the network.

    Args:
        path: `pt_inception-2015-12-05-6726825d.pth`.
        device: where the network goes.

    Raises:
        CheckpointError: the file is missing, damaged, or holds other tensors than those of the network.
    """
    with torch.device("meta"):
        network = InceptionNet()
    counters = {name for name, _ in network.named_buffers() if name.endswith("num_batches_tracked")}
    shapes = {
        name: tuple(tensor.shape) for name, tensor in network.state_dict().items() if name not in counters
    }
    state = read_state(path, shapes) | {name: torch.tensor(0) for name in counters}
    network.load_state_dict(state, assign=True)
    return Inception(network.to(device).eval().requires_grad_(False), file_digest(path))


def check_inception(num_samples: int, num_reference: int, channels: int) -> None:
    """Say what makes FID and Inception Score impossible, before anything is computed for them.

    Args:
        num_samples: N.
        num_reference: M.
        channels: C of the pictures.

    Raises:
        ValueError: too few pictures, another number of channels, or torchmetrics is not installed.
    """
    for name, count in (("samples", num_samples), ("real images", num_reference)):
        if count < MIN_SAMPLES or channels not in (1, 3):
            raise ValueError(
                f"FID and Inception Score need at least {MIN_SAMPLES} {name} of 1 or 3 channels, got "
                f"{count} of {channels}"
            )
    _torchmetrics()


def inception_metrics(
    inception: Inception,
    samples: NDArray[np.uint8],
    reference: NDArray[np.uint8],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Return FID between samples and real images, and the Inception Score of the samples.

    Args:
        inception: the network.
        samples: (N, H, W, C) uint8, C = 1 (repeated to three channels) or 3, N >= 20.
        reference: (M, H, W, C) uint8, M >= 20.
        device: where the network is.
        batch_size: pictures in memory at a time.
        seed: of the order in which the score's ten splits take the samples.
        progress: show progress bars.

    Returns:
        Entries `fid` and `inception_score` of a report, each with its counts and label.

    Raises:
        ValueError: too few pictures, another number of channels, or torchmetrics is not installed.
    """
    check_inception(len(samples), len(reference), samples.shape[-1])
    fid, score = _metrics(_width(inception, samples, device))
    for is_real, pictures in ((True, reference), (False, samples)):
        what = "real images" if is_real else "samples"
        with progress_bar(total=len(pictures), unit="image", desc=what, shown=progress) as bar:
            for batch in _batches(pictures, batch_size):
                features, logits = _look(inception, batch, device)
                fid.update(features, real=is_real)
                if not is_real:
                    score.update(logits)
                bar.update(len(batch))
    with torch.random.fork_rng(devices=[]):  # the score shuffles with torch's global generator
        torch.manual_seed(seed)
        mean, deviation = score.compute()
    source = f"weights {inception.digest[:16]}"
    if not inception.is_standard:
        source += f", not the standard {STANDARD_DIGEST}: not comparable with published figures"
    grey = ", grey pictures repeated to three channels" if samples.shape[-1] == 1 else ""
    counts = {"n": len(samples), "weights_sha256": inception.digest}
    return {
        "fid": {
            "value": float(fid.compute()),
            "n_reference": len(reference),
            **counts,
            "label": f"FID ({source}{grey}); published figures take 50,000 samples",
        },
        "inception_score": {
            "value": float(mean),
            "standard_deviation": float(deviation),
            "splits": NUM_SPLITS,
            **counts,
            "label": f"Inception Score ({source}{grey})",
        },
    }


class _Features(nn.Module):
    """Stands for the network inside the metrics: the features were computed already, once for both."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _torchmetrics() -> tuple[Any, Any]:
    """Return the classes of FID and Inception Score."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore
    except ImportError:
        raise ValueError(
            "FID and Inception Score need torchmetrics: pip install 'mdm-prime[fid]', or leave out --inception-weights"
        ) from None
    return FrechetInceptionDistance, InceptionScore


def _metrics(num_features: int) -> tuple[Any, Any]:
    frechet_distance, inception_score = _torchmetrics()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the score keeps all logits: 1008 numbers a sample
        score = inception_score(_Features(num_features), splits=NUM_SPLITS)
    return frechet_distance(_Features(num_features)), score


def _width(inception: Inception, pictures: NDArray[np.uint8], device: torch.device | str) -> int:
    return _look(inception, pictures[:1], device)[0].shape[1]


def _batches(pictures: NDArray[np.uint8], batch_size: int) -> Iterator[NDArray[np.uint8]]:
    for first in range(0, len(pictures), batch_size):
        yield pictures[first : first + batch_size]


@torch.inference_mode()
def _look(
    inception: Inception, pictures: NDArray[np.uint8], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Return features and logits of pictures (N, H, W, C), float64 on the CPU."""
    planes = torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())
    planes = planes.expand(-1, 3, -1, -1) if planes.shape[1] == 1 else planes
    features, logits = inception.network(planes.to(device))
    return features.double().cpu(), logits.double().cpu()
