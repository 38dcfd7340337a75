"""The classifier learns, repeats itself, and comes back from its file unchanged or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from prime_core.weights import CheckpointError
from tests.training.picture_sets import NAMES, bars, write_fashion_files
from training.data.images import DataError, ImageSet
from training.images.classifier import check_classifier, classifier_for, main, train_classifier
from training.images.classifier_net import NUM_FEATURES, Classifier, load_classifier


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _trained(seed: int = 0, epochs: int = 2) -> Classifier:
    return train_classifier(
        bars(256, 0), bars(64, 1, "bars/heldout"), epochs=epochs, batch_size=16, seed=seed, progress=False
    )


def test_it_learns_and_says_how_well() -> None:
    classifier = _trained()
    heldout = bars(64, 1)
    features, labels = classifier.judge(heldout.pixels, batch_size=10)
    assert features.shape == (64, NUM_FEATURES)
    assert features.isfinite().all()
    share = float((labels.numpy() == heldout.labels).mean())
    assert share == classifier.info.accuracy > 0.95
    assert classifier.info.label_names == NAMES
    assert (classifier.info.num_images, classifier.info.num_heldout) == (256, 64)


def test_batches_do_not_change_the_judgement() -> None:
    classifier, pixels = _trained(), bars(10, 3).pixels
    features, labels = classifier.judge(pixels)
    alone = [classifier.judge(pixels[index : index + 1]) for index in range(10)]
    assert torch.allclose(features, torch.cat([one[0] for one in alone]), atol=1e-5)
    assert labels.tolist() == [int(one[1]) for one in alone]


def test_a_seed_is_a_classifier_and_moves_no_global_generator() -> None:
    state = torch.random.get_rng_state()
    pixels = bars(8, 3).pixels
    first, again, other = (_trained(seed, epochs=1).judge(pixels)[0] for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
    assert torch.random.get_rng_state().equal(state)


def test_a_file_gives_the_classifier_back(tmp_path: Path) -> None:
    path, pixels = tmp_path / "new" / "classifier.safetensors", bars(8, 3).pixels
    sets = bars(256, 0), bars(64, 1)
    made = classifier_for(path, *sets, progress=False)
    stamp = path.stat().st_mtime_ns
    found = classifier_for(path, *sets, progress=False)
    assert path.stat().st_mtime_ns == stamp
    assert found.info == made.info
    assert found.judge(pixels)[0].equal(made.judge(pixels)[0])
    with pytest.raises(CheckpointError, match=r"a classifier of bars/train .* not of others/train"):
        classifier_for(path, bars(256, 0, "others/train"), sets[1], progress=False)
    with pytest.raises(CheckpointError, match=r"a classifier of bars/train .* not of bars/train"):
        classifier_for(path, bars(256, 5), sets[1], progress=False)  # of the same name, shape and number


def test_what_would_fail_is_found_without_training(tmp_path: Path) -> None:
    path = tmp_path / "new" / "classifier.safetensors"
    sets = bars(256, 0), bars(64, 1)
    check_classifier(path, *sets)
    assert list(path.parent.iterdir()) == []
    with pytest.raises(DataError, match="no labels"):
        check_classifier(path, ImageSet("bars/train", sets[0].pixels, None, ()), sets[1])
    with pytest.raises(DataError, match="127 images, and one step takes batch_size = 128"):
        check_classifier(path, bars(127, 0), sets[1])
    _trained(epochs=1).save(path)
    check_classifier(path, *sets)
    with pytest.raises(CheckpointError, match=r"a classifier of bars/train .* not of others/train"):
        check_classifier(path, bars(256, 0, "others/train"), sets[1])


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    _trained(epochs=1).save(path)
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "truncated"),
        (whole.replace(b"prime_classifier", b"prime_klassifier"), "no classifier"),
        (whole.replace(b"head.bias", b"head.base"), "not those of this classifier"),
        (b"\x80\x02}.", "refused unopened"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            load_classifier(path)


def test_images_that_do_not_fit_are_refused() -> None:
    classifier = _trained(epochs=1)
    with pytest.raises(ValueError, match=r"images of \(8, 8, 1\), got uint8 \(2, 6, 6, 1\)"):
        classifier.judge(np.zeros((2, 6, 6, 1), dtype=np.uint8))
    train = bars(64, 0)
    unlabelled = ImageSet("bars/train", train.pixels, None, ())
    for sets, message in (
        ((unlabelled, train), "no labels"),
        ((train, bars(64, 0, size=6)), "differ in picture shape"),
        ((bars(9, 0), train), "9 images, and one step takes batch_size = 16"),
    ):
        with pytest.raises(DataError, match=message):
            train_classifier(*sets, batch_size=16, progress=False)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fashion_files(tmp_path / "data", 64, 20)
    output = tmp_path / "classifier.safetensors"
    arguments = ["--dataset", "fashion-mnist", "--output", str(output), "--epochs", "1", "--batch-size", "32"]
    assert main([*arguments, "--path", str(tmp_path / "data")]) == 0
    accuracy = load_classifier(output).info.accuracy
    assert capsys.readouterr().out == (
        f"{output}: {accuracy:.2%} of 20 held-out images of fashion-mnist/train\n"
    )
    assert main([*arguments, "--path", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("classifier: ")


def test_training_it_is_announced_and_a_log_holds_few_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "classifier.safetensors"
    parts = bars(256, 0), bars(64, 1, "bars/heldout")
    classifier_for(path, *parts)
    shown = capsys.readouterr().err.splitlines()
    assert f"{path} is not there: training a classifier of bars/train to judge samples by, once" in shown[0]
    assert 2 <= len(shown) <= 4 and "\r" not in "".join(shown)
    classifier_for(path, *parts)
    assert capsys.readouterr().err == ""
