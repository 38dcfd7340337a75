"""prime-eval of images: bits per dimension of known models, labels of every kind, and samples with their floor."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prime_core.checkpoint import load_checkpoint
from prime_core.likelihood import estimate_likelihood
from prime_core.pixels import PixelCodec
from tests.training.picture_models import write_image_model
from tests.training.picture_sets import write_fashion_files
from training.data.images import open_images
from training.evaluate import main
from training.images import evaluate as module
from training.images import sample_quality
from training.images.classifier import classifier_for
from training.images.draws import ImageDraws, draw_images
from training.images.evaluate import ImageEvalConfig, evaluate_images
from training.images.inception import STANDARD_DIGEST, Inception
from training.images.report import BOUNDS, NOT_A_BOUND, bounds_table, samples_table
from training.images.sample import ImageSampleConfig, Shard, write_images


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_fashion_files(folder, 256, 60)
    return folder


def _model(tmp_path: Path, data: Path, labels: Any = "class", **settings: Any) -> Path:
    trained = {"kind": "images", "dataset": "fashion-mnist", "path": str(data), "cache": str(data / "cache")}
    provenance = {"step": 7, "training": {"data": trained}}
    return write_image_model(
        tmp_path, labels, num_labels=10, size=28, provenance=provenance, **{"scale": 0.2, **settings}
    )


def _evaluate(checkpoint: Path, **settings: Any) -> dict[str, Any]:
    bounds = {"num_draws": 2, "batch_rows": 4} if settings.get("rows", 6) else {}
    settings = {"rows": 6, "device": "cpu", **bounds, **settings}
    return evaluate_images(ImageEvalConfig(checkpoint=checkpoint, **settings), progress=False)


def test_a_model_that_knows_nothing_pays_eight_bits_a_dimension(tmp_path: Path, data: Path) -> None:
    report = _evaluate(_model(tmp_path, data, "none", scale=0.0), grid_steps=5)
    assert (report["num_rows"], report["num_dimensions"], report["step"]) == (6, 784, 7)
    for name in ("nelbo", "coded_loss"):
        figures = report["estimates"][name]
        # Each mask's estimate is exact for nelbo: n masked digits at log 16, weighted M / n.
        if name == "nelbo":
            assert figures["bits_per_dimension"] == pytest.approx(8, rel=1e-5)
            assert figures["nats_per_image"] == pytest.approx(784 * 8 * math.log(2), rel=1e-5)
            assert figures["bits_per_dimension_standard_error"] < 1e-4
        else:
            assert figures["bits_per_dimension"] < 8  # tokens with two masked digits pay once: no bound
    assert report["estimates"]["grid_nelbo"]["bits_per_dimension"] == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize("labels", ["none", "class", "uniform"])
def test_only_bounds_are_called_so_and_what_they_bound_is_said(
    labels: str, tmp_path: Path, data: Path
) -> None:
    report = _evaluate(_model(tmp_path, data, labels), rows=2, grid_steps=3)
    label = {name: figures["label"] for name, figures in report["estimates"].items()}
    assert label == {"nelbo": BOUNDS[labels], "grid_nelbo": BOUNDS[labels], "coded_loss": NOT_A_BOUND}
    assert report["estimates"]["grid_nelbo"]["steps"] == 3
    assert len(set(BOUNDS.values())) == 3


def test_the_bound_is_the_library_s_with_the_labels_of_the_data(tmp_path: Path, data: Path) -> None:
    path = _model(tmp_path, data)
    report = _evaluate(path, rows=4, num_draws=1, seed=5)
    checkpoint = load_checkpoint(path)
    heldout = open_images("fashion-mnist", data, "heldout", data)
    assert heldout.labels is not None
    rows = [0, 19, 39, 59]
    x_0 = PixelCodec(checkpoint.config.model).encode(torch.from_numpy(heldout.pixels[rows]))

    def bits(labels: torch.Tensor) -> float:
        generator = torch.Generator().manual_seed(5)
        parts = checkpoint.denoiser, checkpoint.codec, checkpoint.schedule
        both = estimate_likelihood(*parts, x_0, generator=generator, labels=labels)
        return float(both.nelbo.mean()) / 784 / math.log(2)

    labels = torch.from_numpy(heldout.labels[rows])
    assert report["estimates"]["nelbo"]["bits_per_dimension"] == pytest.approx(bits(labels), rel=1e-6)
    assert bits(labels) != bits((labels + 1) % 10)


def test_uniform_labels_are_drawn_anew_for_every_mask(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []

    def spy(*arguments: Any, labels: torch.Tensor, **options: Any) -> Any:
        generator = options["generator"]
        fresh = torch.Generator().manual_seed(generator.initial_seed())
        assert torch.equal(
            generator.get_state(), fresh.get_state()
        )  # no label was drawn from the masks' noise
        drawn.append(labels)
        return estimate_likelihood(*arguments, labels=labels, **options)

    monkeypatch.setattr(module, "estimate_likelihood", spy)
    _evaluate(_model(tmp_path, data, "uniform"), rows=4, num_draws=12)
    labels = torch.cat(drawn)
    assert labels.shape == (48,)
    assert set(labels.tolist()) == set(range(10))
    assert all(len(set(per_image.tolist())) > 3 for per_image in labels.view(4, 12))


def test_samples_are_judged_with_their_floor(tmp_path: Path, data: Path) -> None:
    settings: dict[str, Any] = {"rows": 0, "samples": 20, "steps": 2, "seed": 3, "num_reference": 100}
    report = _evaluate(path := _model(tmp_path, data), **settings)
    assert "estimates" not in report
    distance, agreement = report["classifier_feature_distance"], report["label_agreement"]
    assert (distance["n"], distance["n_floor"], distance["n_reference"]) == (20, 20, 100)
    # Random weights make noise, far from bars; the floor is what bars are from bars.
    assert distance["value"] > 3 * distance["floor"] > 0
    assert (agreement["n"], 0 <= agreement["value"] <= 1) == (20, True)
    assert agreement["classifier_accuracy"] == report["classifier"]["accuracy"]
    train = open_images("fashion-mnist", data, "train", data)
    name = f"classifier-fashion-mnist-{train.digest[:16]}.safetensors"
    assert Path(report["classifier"]["file"]) == data / "cache" / name
    assert report["samples"]["steps"] == 2
    assert 0 < report["samples"]["mean_nfe"] <= 2
    # FID is no other name of the distance: without weights there is none, and that is said.
    assert not {"fid", "inception_score"} & set(report)
    assert "never downloaded" in report["notes"][0] and "not a FID" in report["notes"][0]

    output = tmp_path / "samples"
    sampling = ImageSampleConfig(checkpoint=path, output=output, n=20, steps=2, seed=3, device="cpu")
    write_images(sampling, shard=Shard(0, 1), progress=False)
    found = _evaluate(path, rows=0, seed=3, num_reference=100, samples_folder=output)
    for name in ("classifier_feature_distance", "label_agreement"):
        assert found[name] == report[name]
    # What the samples were made for is told, not that they are somewhere.
    facts = found["samples"]
    assert (facts["n"], facts["steps"], facts["sampler"], facts["seed"]) == (20, 2, "ancestral", 3)
    assert (facts["dtype"], facts["folder"]) == ("float32", str(output))


def test_samples_of_another_checkpoint_are_refused(tmp_path: Path, data: Path) -> None:
    (tmp_path / "other").mkdir()
    model, other = _model(tmp_path, data), _model(tmp_path / "other", data, scale=0.3)
    output = tmp_path / "samples"
    sampling = ImageSampleConfig(checkpoint=other, output=output, n=2, steps=1, seed=3, device="cpu")
    write_images(sampling, shard=Shard(0, 1), progress=False)
    with pytest.raises(ValueError, match="samples of another checkpoint"):
        _evaluate(model, rows=0, samples_folder=output)
    (output / "request.json").write_text("{")
    with pytest.raises(ValueError, match=r"request.json, which tells what it holds, is missing or damaged"):
        _evaluate(other, rows=0, samples_folder=output)


def test_real_images_are_drawn_once_each_and_facts_are_means(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = open_images("fashion-mnist", data, "train", data)
    some = sample_quality._some(train.pixels, 200, np.random.default_rng(0))
    places = [int(np.flatnonzero((train.pixels == one).all((1, 2, 3)))[0]) for one in some]
    assert len(set(places)) == 200 and places == sorted(places) != list(range(200))
    assert sample_quality._some(train.pixels, 256, np.random.default_rng(0)) is train.pixels
    path = _model(tmp_path, data)
    draws = ImageDraws(load_checkpoint(path), 3, {"steps": 2})
    samples = sample_quality.draw_samples(draws, 3, 2, progress=False)
    calls = [sample.nfe for _, sample in draw_images(draws, range(3), 3, progress=False)]
    assert samples.facts == {"n": 3, "mean_nfe": sum(calls) / 3}


def test_arrays_that_do_not_go_together_are_refused(tmp_path: Path, data: Path) -> None:
    path, output = _model(tmp_path, data), tmp_path / "samples"
    sampling = ImageSampleConfig(checkpoint=path, output=output, n=2, steps=1, seed=3, device="cpu")
    write_images(sampling, shard=Shard(0, 1), progress=False)
    for name, array, message in (
        ("labels.npy", np.zeros(3, np.int64), "labels.npy does not go with samples.npy"),
        ("samples.npy", np.zeros((2, 28, 27, 1), np.uint8), r"samples.npy is uint8 \(2, 28, 27, 1\)"),
        ("samples.npy", np.zeros((2, 28, 28, 1)), "samples.npy is float64"),
    ):
        np.save(output / name, array)
        with pytest.raises(ValueError, match=message):
            _evaluate(path, rows=0, samples_folder=output)


def test_no_estimate_changes_another(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module, "NOISE_ROWS", 2
    )  # two blocks: the second comes after the first one's other figures
    path = _model(tmp_path, data, "uniform")
    plain, both = (_evaluate(path, rows=3, grid_steps=steps)["estimates"] for steps in (None, 3))
    assert {name: both[name] for name in plain} == plain
    unlabelled = _model(tmp_path, data, "none", scale=0.0)
    for model in (path, unlabelled):
        memory = [_evaluate(model, rows=3, batch_rows=rows)["estimates"] for rows in (1, 3)]
        values = [each["nelbo"]["bits_per_dimension"] for each in memory]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize(("batch_rows", "num_draws"), [(1, 3), (2, 2)])
def test_as_many_images_are_in_memory_as_are_allowed_times_their_masks(
    batch_rows: int, num_draws: int, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def spy(*arguments: Any, batch_rows: int, **options: Any) -> Any:
        sizes.append(batch_rows)
        return estimate_likelihood(*arguments, batch_rows=batch_rows, **options)

    monkeypatch.setattr(module, "estimate_likelihood", spy)
    _evaluate(_model(tmp_path, data, "none"), rows=2, batch_rows=batch_rows, num_draws=num_draws)
    assert sizes == [batch_rows * num_draws]


def test_the_data_of_the_training_is_the_default_in_every_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        opened.append((*arguments, options["cache"], options["size"], options["verify"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "open_images", spy)
    trained = {
        "kind": "images",
        "dataset": "folder",
        "path": "a",
        "cache": "c",
        "size": [8, 8],
        "verify": False,
    }
    path = write_image_model(tmp_path, provenance={"training": {"data": trained}})
    for settings in ({}, {"cache": Path("d"), "size": (4, 4), "verify": True},
                     {"dataset": "cifar10", "path": Path("b")}):  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            _evaluate(path, **settings)
    assert opened == [
        ("folder", Path("a"), Path("c"), (8, 8), False),
        ("folder", Path("a"), Path("d"), (4, 4), True),
        ("cifar10", Path("b"), Path("c"), None, True),  # of other files, but for where copies are
    ]


def test_bounds_alone_open_no_training_images(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def spy(*arguments: Any, split: Any, **options: Any) -> Any:
        opened.append(split)
        return open_images(*arguments, split=split, **options)

    monkeypatch.setattr(module, "open_images", spy)
    path = _model(tmp_path, data)
    _evaluate(path, rows=1)
    assert opened == ["heldout"]
    _evaluate(path, rows=0, samples=2, steps=1)
    assert opened == ["heldout", "heldout", "train"]


def test_labels_that_mean_nothing_are_not_compared(tmp_path: Path, data: Path) -> None:
    report = _evaluate(_model(tmp_path, data, "uniform"), rows=0, samples=4, steps=1)
    assert "classifier_feature_distance" in report
    assert "label_agreement" not in report


def test_with_weights_there_is_a_fid(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def network(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = pictures.float().flatten(1)[:, ::500]
        return features, features[:, :3]

    monkeypatch.setattr(module, "load_inception", lambda *_: Inception(network, STANDARD_DIGEST))
    weights = tmp_path / "weights.pth"
    report = _evaluate(
        _model(tmp_path, data), rows=0, samples=20, steps=1, num_reference=50, inception_weights=weights
    )
    assert (report["fid"]["n"], report["fid"]["n_reference"]) == (20, 50)
    assert report["inception_score"]["value"] >= 1
    assert report["notes"] == []
    assert "classifier_feature_distance" in report


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 2, "samples_folder": "out"}, "give one of them"),
        ({"samples_folder": "out"}, r"out: request.json, which tells what it holds, is missing"),
        ({"inception_weights": "absent.pth", "samples": 20}, r"absent.pth: no such file"),
        ({"dataset": "cifar10", "samples": 2}, "give --dataset and --path"),
        ({"samples": 1, "steps": 1, "rows": 0}, "--samples must be 0 or at least 2"),
        (
            {"samples": 19, "inception_weights": "absent.pth"},
            "at least 20 samples of 1 or 3 channels, got 19",
        ),
        ({"samples": 20, "num_reference": 9, "inception_weights": "absent.pth"}, "at least 20 real images"),
        ({"samples": 2, "sampler": "published", "steps": "exact", "warp": "1 2 0"}, "warp must be left out"),
        ({"rows": 2, "samples": 19, "inception_weights": "absent.pth"}, "at least 20 samples"),
        ({"rows": 0}, "nothing is left to measure"),
        ({"rows": 2, "steps": 9}, "--steps has no effect without --samples, which draws them here"),
        ({"rows": 2, "preset": "cifar10-l2-512"}, "--preset has no effect without --samples"),
        ({"samples_folder": "out", "temperature": "0.5"}, "--temperature has no effect without --samples"),
        (
            {"rows": 2, "inception_weights": "x"},
            "--inception-weights has no effect without --samples or --sam",
        ),
        ({"rows": 2, "classifier": "x"}, "--classifier has no effect without"),
        ({"rows": 2, "num_reference": 5}, "--num-reference has no effect without"),
        ({"samples": 2, "grid_steps": 3}, "--grid-steps has no effect without --rows above 0"),
        ({"samples": 2, "num_draws": 3}, "--num-draws has no effect without --rows above 0"),
        ({"samples": 2, "classifier": "model/model.safetensors"}, "no classifier"),
        (
            {"samples": 2, "steps": 2, "corrector": "published 4 1", "sampler": "ancestral", "top_p": 0.0},
            "top_p",
        ),
    ],
)
def test_what_does_not_fit_is_said(
    settings: dict[str, Any], message: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for long_part in ("draw_samples", "estimate_likelihood"):
        monkeypatch.setattr(module, long_part, lambda *_, **__: pytest.fail("found after a long part"))
    path = _model(tmp_path, data)
    files = {name: tmp_path / value for name, value in settings.items() if name.split("_")[-1] in
             ("folder", "weights", "classifier")}  # fmt: skip
    with pytest.raises((ValueError, OSError), match=message):
        _evaluate(path, **{"rows": 0, **settings, **files})


def test_a_missing_torchmetrics_is_found_before_samples_are_drawn(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "draw_samples", lambda *_, **__: pytest.fail("found after the long part"))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError, match=r"pip install 'mdm-prime\[fid\]'"):
        _evaluate(_model(tmp_path, data), rows=0, samples=20, inception_weights=tmp_path / "weights.pth")


def test_another_data_set_than_that_of_the_model_is_refused(tmp_path: Path, data: Path) -> None:
    path = write_image_model(tmp_path, size=8)
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        _evaluate(path)
    with pytest.raises(ValueError, match=r"are \(28, 28, 1\), and the model's are \(8, 8, 1\)"):
        _evaluate(path, dataset="fashion-mnist", path=data)
    (tmp_path / "two").mkdir()
    two = write_image_model(tmp_path / "two", size=28, num_labels=2)
    with pytest.raises(ValueError, match="the model has 2 classes and fashion-mnist/heldout has 10"):
        _evaluate(two, dataset="fashion-mnist", path=data)


def test_the_command(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(_model(tmp_path, data)), "--rows", "2", "--device", "cpu"]
    assert main([*arguments, "--samples", "4", "--steps", "2"]) == 0
    table = capsys.readouterr().out
    assert "bits/dimension" in table
    lines = {line.split()[0]: line for line in table.splitlines() if line}
    assert BOUNDS["class"] in lines["nelbo"]
    assert NOT_A_BOUND in lines["coded_loss"]
    assert "floor" in lines["classifier_feature_distance"] and "n 4" in lines["classifier_feature_distance"]
    assert "never downloaded" in " ".join(table.split())
    assert "fid" not in lines
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["estimates"]["nelbo"]["bits_per_dimension"] > 0
    assert main([*arguments, "--data", "x.txt"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("prime-eval: ")
    assert "--data" in error


def test_the_table_comes_in_two_parts_and_bounds_do_not_wait_for_a_classifier(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(_model(tmp_path, data)), "--rows", "2", "--samples", "4", "--steps", "2"]
    arguments += ["--device", "cpu", "--classifier", str(tmp_path / "new" / "classifier.safetensors")]
    shown = ""

    def train(*arguments: Any, **options: Any) -> Any:
        nonlocal shown
        shown = capsys.readouterr().out
        return classifier_for(*arguments, **options)

    monkeypatch.setattr(module, "classifier_for", train)
    assert main(arguments) == 0
    table = shown + capsys.readouterr().out
    assert "nelbo" in shown and "samples" not in shown
    assert main([*arguments, "--json"]) == 0
    assert shown == "", "JSON comes whole"
    report = json.loads(capsys.readouterr().out)
    assert table == f"{bounds_table(report)}\n{samples_table(report)}\n"


def test_a_text_command_line_is_none_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(tmp_path / "absent"), "--data", "x.txt"]) == 2
    assert "no such file" in capsys.readouterr().err
