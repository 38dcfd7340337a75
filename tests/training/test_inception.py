"""FID and Inception Score: the network's arithmetic and loading, and the figures against numpy."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from prime_core.published import state as published_state
from prime_core.weights import CheckpointError
from training.images import inception_net
from training.images.inception import STANDARD_DIGEST, Inception, inception_metrics, load_inception
from training.images.inception_net import InceptionNet, resize


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _pictures(n: int, seed: int, channels: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, channels), dtype=np.uint8)


def _stub(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Five features and four logits; means of patches."""
    assert pictures.dtype == torch.uint8
    assert pictures.shape[1] == 3
    x = pictures.float()
    parts = [x[:, 0, :4], x[:, 1, 4:], x[:, 2], x[:, :, :, :3], x[:, :, 2:5]]
    features = torch.stack([part.flatten(1).mean(1) for part in parts], 1)
    return features, features[:, :4] / 8


STUB = Inception(_stub, STANDARD_DIGEST + "0" * 56)


def test_the_figures_are_those_of_numpy() -> None:
    samples, real = _pictures(40, 1), _pictures(60, 2)
    report = inception_metrics(STUB, samples, real, batch_size=7, progress=False)
    a, b = (_stub(torch.from_numpy(p.transpose(0, 3, 1, 2)))[0].double().numpy() for p in (samples, real))
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert report["fid"]["value"] == pytest.approx(expected, rel=1e-6)
    assert (report["fid"]["n"], report["fid"]["n_reference"]) == (40, 60)
    assert "not comparable" not in report["fid"]["label"]

    # The score of every split is exp of the mean divergence from the split's mean; the order is a draw.
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    order = torch.randperm(40).numpy()
    torch.random.set_rng_state(generator)
    logits = a[order, :4] / 8
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in np.split(p, 10)]
    score = report["inception_score"]
    assert score["value"] == pytest.approx(np.mean(scores), rel=1e-6)
    assert score["standard_deviation"] == pytest.approx(np.std(scores, ddof=1), rel=1e-6)


def test_a_seed_is_a_score_and_the_global_generator_stays() -> None:
    samples, real = _pictures(25, 1), _pictures(20, 2)
    state = torch.random.get_rng_state()
    first, again, other = (
        inception_metrics(STUB, samples, real, seed=seed, progress=False)["inception_score"]["value"]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.random.get_rng_state().equal(state)


def test_grey_pictures_and_other_weights_are_named() -> None:
    other = Inception(_stub, "ab" * 32)
    report = inception_metrics(other, _pictures(20, 1, 1), _pictures(20, 2, 1), progress=False)
    for name in ("fid", "inception_score"):
        assert "grey pictures repeated" in report[name]["label"]
        assert "not comparable with published figures" in report[name]["label"]


@pytest.mark.parametrize(("n", "channels"), [(19, 3), (20, 2)])
def test_what_cannot_be_measured_is_refused(n: int, channels: int) -> None:
    with pytest.raises(ValueError, match=f"at least 20 samples of 1 or 3 channels, got {n} of {channels}"):
        inception_metrics(STUB, _pictures(n, 1, channels), _pictures(20, 2), progress=False)


def test_the_size_is_that_of_the_known_network() -> None:
    with torch.device("meta"):
        network = InceptionNet()
    # Keras counts 23,817,352 trainable numbers with 1000 classes and no scale in its 17,216 normed channels.
    trainable = sum(parameter.numel() for parameter in network.parameters())
    assert trainable == 23_817_352 + 17_216 + 8 * (2048 + 1)
    means = [tensor for name, tensor in network.named_buffers() if name.endswith("running_mean")]
    assert sum(tensor.numel() for tensor in means) == 17_216
    assert len(means) == 94


def test_it_differs_from_the_usual_network_where_published_figures_rest_on_it() -> None:
    with torch.device("meta"):
        network = InceptionNet()
    assert {norm.eps for norm in network.modules() if isinstance(norm, torch.nn.BatchNorm2d)} == {1e-3}
    peak = torch.zeros(1, 1, 4, 4)
    peak[..., 0, 0] = 36.0
    # Means of what is inside: 4, 6 and 9 values at a corner, at an edge and in the middle. Then the largest.
    assert network.Mixed_7b._pool(peak)[0, 0, :2, :3].tolist() == [[9.0, 6.0, 0.0], [6.0, 4.0, 0.0]]
    assert network.Mixed_7c._pool(peak)[0, 0, :2, :3].tolist() == [[36.0, 36.0, 0.0], [36.0, 36.0, 0.0]]
    block = inception_net._BlockA(2, 4)
    pooled: list[Tensor] = []
    block.branch_pool.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    block.eval()(torch.ones(1, 2, 3, 3))
    assert torch.equal(pooled[0], torch.ones(1, 2, 3, 3))


def test_pictures_are_resized_and_scaled_as_tensorflow_1_did() -> None:
    class Seen(Exception):
        pass

    def look(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise Seen

    seen: list[Tensor] = []
    with torch.device("meta"):
        network = InceptionNet()
    network.Conv2d_1a_3x3.register_forward_pre_hook(look)
    pictures = torch.from_numpy(_pictures(1, 0).transpose(0, 3, 1, 2).copy())
    with pytest.raises(Seen):
        network(pictures)
    assert torch.allclose(seen[0] * 128 + 128, resize(pictures.float()), atol=1e-3)
    assert float(seen[0][0, 0, 0, 0]) == (float(pictures[0, 0, 0, 0]) - 128) / 128


@pytest.mark.parametrize("size", [(8, 8), (32, 20), (299, 299), (310, 400)])
def test_resize_is_that_of_tensorflow_1(size: tuple[int, int]) -> None:
    picture = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    resized = resize(picture)
    assert resized.shape == (1, 3, 299, 299)
    for i, j in ((0, 0), (1, 298), (150, 7), (298, 298)):
        y, x = i * size[0] / 299, j * size[1] / 299
        top, left = int(y), int(x)
        bottom, right = min(top + 1, size[0] - 1), min(left + 1, size[1] - 1)
        dy, dx = y - top, x - left
        corners = picture[0, :, top, left] * (1 - dx) + picture[0, :, top, right] * dx
        lower = picture[0, :, bottom, left] * (1 - dx) + picture[0, :, bottom, right] * dx
        assert torch.allclose(resized[0, :, i, j], corners * (1 - dy) + lower * dy, atol=1e-5)


def test_weights_come_from_the_file_and_only_if_they_fit(tmp_path: Path) -> None:
    network = InceptionNet().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.uniform_(-0.05, 0.06, generator=generator)
    path = tmp_path / "weights.pth"
    state = network.state_dict()
    # The format from before torch 1.6, as the published file has it.
    torch.save(state, path, _use_new_zipfile_serialization=False)
    inception = load_inception(path)
    assert not inception.is_standard
    pictures = torch.from_numpy(_pictures(1, 0).transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        features, logits = inception.network(pictures)
        assert (features.shape, logits.shape) == ((1, 2048), (1, 1008))
        assert features.equal(network(pictures)[0])
        biased = network.fc(features)
    assert torch.allclose(logits + network.fc.bias, biased, rtol=1e-4, atol=1e-4)

    without_counters = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(without_counters, path)
    assert load_inception(path).digest != inception.digest


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"fc.weight": torch.zeros(2, 2)}, r"must be .* the file belongs to another network"),
        ([torch.zeros(1)], "holds a list"),
        ({1: "x"}, "belongs to another network"),
    ],
)
def test_other_contents_are_refused(state: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=message):
        load_inception(path)


def test_numbers_of_other_types_are_converted_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.tensor([0.5, 2], dtype=torch.float16)}, path)
    read = published_state.read_state(path, {"a": (2,)})["a"]
    assert (read.dtype, read.tolist()) == (torch.float32, [0.5, 2])
    for tensor in (torch.tensor([1, 2]), torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf])):
        torch.save({"a": tensor}, path)
        with pytest.raises(CheckpointError, match="'a' holds no finite floating-point numbers"):
            published_state.read_state(path, {"a": (2,)})
    monkeypatch.setattr(published_state, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"larger than .* bytes, so not the weights that are meant"):
        published_state.read_state(path, {"a": (2,)})


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_code_in_the_file_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for name, write in (
        ("zip", torch.save),
        ("pickle", lambda value, path: path.write_bytes(pickle.dumps(value))),
    ):
        path = tmp_path / name
        write({"fc.weight": _Hostile(marker)}, path)
        with pytest.raises(CheckpointError, match="refused"):
            load_inception(path)
    for content in (b"", b"not weights", b"\x80\x02"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="refused"):
            load_inception(path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_inception(tmp_path / "absent")
    assert not marker.exists()
