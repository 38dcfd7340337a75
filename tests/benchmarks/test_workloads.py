"""Files of workloads: sweeps, what is refused, and that the bundled ones are valid."""

from pathlib import Path

import pytest

from benchmarks.command_line import UsageError
from benchmarks.sampler_settings import SamplerSettings, read_workloads
from benchmarks.workloads import MODELS

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "workloads"
BASE = SamplerSettings(against="dense_published", model="tiny", vocab_size=300, target_length=2, seed=5)


def read(text: str, folder: Path) -> list[SamplerSettings]:
    (folder / "w.toml").write_text(text)
    return read_workloads(BASE, folder / "w.toml")


def test_lists_are_swept_and_the_rest_is_kept(tmp_path: Path) -> None:
    found = read(
        "[[workloads]]\nlength = [4, 8]\nbatch_size = [1, 2]\nsteps = 3\n[[workloads]]\nlength = 6\n",
        tmp_path,
    )
    shapes = [(w.workload.length, w.workload.num_rows, w.workload.num_steps) for w in found]
    assert shapes == [(4, 1, 3), (4, 2, 3), (8, 1, 3), (8, 2, 3), (6, 4, 32)]
    assert all(w.workload.vocab_size == 300 and w.workload.seed == 5 for w in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a list"),
        ("x = 1\n[[workloads]]\n", "must hold a list"),
        ("[[workloads]]\nlengths = 4\n", "lengths of workload 1 is unknown"),
        ("[[workloads]]\nlength = 4\n[[workloads]]\nbatch_size = 0\n", "workload 2: --batch-size"),
        ("[[workloads]]\nlength = [4, 4000]\n", "workload 1: length must be at most the network's 1024"),
        ("[[", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read(text, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        read_workloads(BASE, tmp_path / "none.toml")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_bundled_files_are_valid(path: Path) -> None:
    found = read_workloads(SamplerSettings(against="dense_published"), path)
    assert found and all(w.workload.config for w in found)


def test_the_workloads_that_must_be_measured_are_bundled() -> None:
    base = SamplerSettings(against="dense_published")
    cpu = {
        (w.workload.length, w.steps, w.batch_size, w.target_length)
        for w in read_workloads(base, FOLDER / "text-cpu.toml")
        if w.workload.vocab_size == 50257 and w.model == "small"
    }
    assert cpu >= {(128, 32, 4, 1), (128, 32, 4, 2), (128, 32, 4, 4), (128, 1024, 8, 1), (32, 128, 8, 4)}
    gpu = {
        (w.workload.length, w.steps, w.batch_size, w.target_length)
        for w in read_workloads(base, FOLDER / "text-gpu.toml")
    }
    assert gpu >= {(1024, 512, 8, 4), (1024, 512, 64, 4)}


def test_networks_of_images_are_those_of_the_demo_and_of_cifar10() -> None:
    from prime_core.checkpoint import read_config

    demo = Path(__file__).resolve().parents[2] / "server" / "demo" / "images"
    assert MODELS["images-demo"] == read_config(demo).model
    assert MODELS["images"].length == MODELS["images-cifar10"].length == 3 * 32 * 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "images-tiny", "length": 8}, "length of this network's pictures is 16"),
        ({"model": "images-tiny", "target_length": 3}, "every code a pixel value"),
        ({"model": "images-tiny", "vocab_size": 300, "target_length": 1}, "at most 256"),
    ],
)
def test_pictures_must_fit(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerSettings.model_validate({"against": "dense_published", **fields})
