"""prime-sample of images: the library's pictures, whole files only, and shards that make one result."""

from __future__ import annotations

import dataclasses
import json
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prime_core.checkpoint import load_checkpoint
from prime_core.pictures import to_png
from prime_core.sampling.sample import sample
from tests.training.picture_models import write_image_model
from training.images import sample as sample_images
from training.images.picture_files import PictureError, read_picture
from training.images.sample import ImageSampleConfig, Shard, write_images
from training.model_kind import makes_images
from training.sample import main

FOUR = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_image_model(tmp_path, num_labels=4, label_names=FOUR)


def _write(checkpoint: Path, output: Path, shard: Shard | None = None, **settings: Any) -> tuple[int, bool]:
    settings = {"n": 6, "steps": 4, "seed": 3, "device": "cpu", **settings}
    config = ImageSampleConfig(checkpoint=checkpoint, output=output, **settings)
    return tuple(write_images(config, shard=shard, progress=False))


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_pictures_are_what_the_library_gives(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert _write(checkpoint, output, label="c") == (6, True)
    expected = sample(load_checkpoint(checkpoint), n=6, steps=4, seed=3, label=2)
    samples, labels = np.load(output / "samples.npy"), np.load(output / "labels.npy")
    assert (samples.dtype, samples.shape, labels.dtype) == (np.uint8, (6, 8, 8, 1), np.int64)
    assert labels.tolist() == [2] * 6
    for index, one in enumerate(expected):
        pixels, facts = read_picture(output / f"{index:06d}.png", (8, 8, 1))
        assert np.array_equal(pixels, one.pixels.numpy())
        assert np.array_equal(pixels, samples[index])
        assert facts == {"index": str(index), "seed": str(one.seed), "nfe": str(one.nfe), "label": "2"}
    assert len(np.unique(samples, axis=0)) > 1


def test_the_request_keeps_the_type_that_was_computed_in(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    _write(checkpoint, output, n=1)
    assert json.loads((output / "request.json").read_text())["dtype"] == "float32"
    assert _write(checkpoint, output, n=2, dtype="float32") == (1, True)
    half = dataclasses.replace(load_checkpoint(checkpoint), dtype=torch.bfloat16)
    monkeypatch.setattr(sample_images, "load_checkpoint", lambda *_, **__: half)
    with pytest.raises(ValueError, match=r"another request \(other dtype\)"):
        _write(checkpoint, output, n=2)


def test_classes_come_in_turn_and_models_without_labels_have_none(checkpoint: Path, tmp_path: Path) -> None:
    _write(checkpoint, tmp_path / "out")
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [0, 1, 2, 3, 0, 1]
    (tmp_path / "plain").mkdir()
    plain = write_image_model(tmp_path / "plain", "none")
    _write(plain, tmp_path / "unlabelled")
    assert {*_files(tmp_path / "unlabelled")} == {
        "request.json", "samples.npy", *(f"{index:06d}.png" for index in range(6))
    }  # fmt: skip
    (tmp_path / "mixture").mkdir()
    mixture = write_image_model(tmp_path / "mixture", "uniform", num_labels=3)
    _write(mixture, tmp_path / "mixed", n=20, steps=1)
    assert set(np.load(tmp_path / "mixed" / "labels.npy").tolist()) == {0, 1, 2}


def test_super_tokens_make_colour_pictures(tmp_path: Path) -> None:
    model = write_image_model(tmp_path, "none", channels=2, size=4, target_length=1, packing="rgb24")
    _write(model, tmp_path / "out", n=2, steps=2)
    expected = sample(load_checkpoint(model), n=2, steps=2, seed=3)
    samples = np.load(tmp_path / "out" / "samples.npy")
    assert samples.shape == (2, 4, 4, 3)
    assert np.array_equal(samples, np.stack([one.pixels.numpy() for one in expected]))
    with pytest.raises(ValueError, match="single digits; use --known-mask"):
        _write(model, tmp_path / "other", known=tmp_path / "out" / "000000.png", known_digits="high")


def test_the_label_is_part_of_the_request_and_so_is_the_mask(checkpoint: Path, tmp_path: Path) -> None:
    _write(checkpoint, tmp_path / "out", n=1, label="c")
    with pytest.raises(ValueError, match=r"another request \(other label\)"):
        _write(checkpoint, tmp_path / "out", n=1)
    for name, value in (("known", 9), ("mask", 255)):
        (tmp_path / f"{name}.png").write_bytes(to_png(np.full((8, 8, 1), value, np.uint8)))
    known = {"known": tmp_path / "known.png", "known_mask": tmp_path / "mask.png", "n": 1}
    _write(checkpoint, tmp_path / "masked", **known)
    (tmp_path / "mask.png").write_bytes(to_png(np.zeros((8, 8, 1), np.uint8)))
    with pytest.raises(ValueError, match=r"another request \(other known_mask\)"):
        _write(checkpoint, tmp_path / "masked", **known)


def test_the_request_is_the_last_that_goes_when_a_folder_is_overwritten(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    _write(checkpoint, output, n=2)
    unlink, gone = Path.unlink, []

    def die_after_two(path: Path, missing_ok: bool = False) -> None:
        if path.suffix in (".png", ".npy", ".json"):
            if len(gone) == 2:
                raise KeyboardInterrupt
            gone.append(path.name)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die_after_two)
        with pytest.raises(KeyboardInterrupt):
            _write(checkpoint, output, overwrite=True, n=2, steps=5)
    assert (output / "request.json").exists()
    assert _write(checkpoint, output, overwrite=True, n=2, steps=5) == (2, True)


def test_three_ranks_make_what_one_process_makes(checkpoint: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _write(checkpoint, whole, n=7)
    assert _write(checkpoint, parts, Shard(1, 3), n=7) == (2, False)
    assert not (parts / "samples.npy").exists()
    assert _write(checkpoint, parts, Shard(0, 3), n=7, seed=None) == (3, False)
    assert _write(checkpoint, parts, Shard(2, 3), n=7, seed=None) == (2, True)
    assert _files(parts) == _files(whole)


def test_torchrun_s_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Shard.from_environment() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Shard.from_environment() == (2, 4)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ValueError, match="rank below world size"):
        Shard.from_environment()


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "flipped"])
def test_what_is_not_whole_is_made_again(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    _write(checkpoint, output)
    files = _files(output)
    picture = output / "000002.png"
    content = files[picture.name]
    picture.unlink()
    (output / "samples.npy").unlink()
    half = len(content) // 2
    damaged = {
        "empty": b"",
        "cut": content[:-13],
        "flipped": content[:half] + b"\0\0\0\0" + content[half + 4 :],
    }
    if damage in damaged:
        picture.write_bytes(damaged[damage])
    (output / ".000003.png.partial").write_bytes(content[:20])
    assert _write(checkpoint, output, seed=None) == (1, True)
    assert _files(output) == files


def test_kill_9_and_again(checkpoint: Path, tmp_path: Path) -> None:
    """A real process is killed between pictures; the same command makes the rest."""
    whole, output = tmp_path / "whole", tmp_path / "out"
    flags = [
        "-n",
        "12",
        "--steps",
        "16",
        "--seed",
        "3",
        "--max-rows",
        "1",
        "--num-threads",
        "1",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-m", "training.sample", "--checkpoint", str(checkpoint), *flags, "--output"]
    process = subprocess.Popen([*command, str(output)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(output.glob("*.png"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert 2 <= len(list(output.glob("*.png"))) < 12
    assert not (output / "samples.npy").exists()
    written, complete = _write(checkpoint, output, n=12, steps=16, max_rows=5)
    assert 0 < written <= 10
    assert complete
    _write(checkpoint, whole, n=12, steps=16)
    assert _files(output) == _files(whole)


def test_more_pictures_are_added_and_fewer_change_nothing(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    _write(checkpoint, output, n=2)
    assert _write(checkpoint, output) == (4, True)
    assert _write(checkpoint, output, n=3) == (0, True)
    _write(checkpoint, tmp_path / "at-once")
    assert _files(output) == _files(tmp_path / "at-once")


def test_another_request_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    _write(checkpoint, output)
    before = _files(output)
    for settings, names in (
        ({"steps": 5}, "steps"),
        ({"seed": 4, "temperature": "0.5"}, "temperature, seed"),
        ({"warp": "1 2 0"}, "warp"),
    ):
        with pytest.raises(ValueError, match=rf"another request \(other {names}\)"):
            _write(checkpoint, output, **settings)
    assert _files(output) == before
    assert _write(checkpoint, output, overwrite=True, n=1, steps=5) == (1, True)
    assert {*_files(output)} == {"000000.png", "labels.npy", "request.json", "samples.npy"}
    with pytest.raises(ValueError, match="for one process"):
        _write(checkpoint, output, Shard(0, 2), overwrite=True)


def test_folders_of_other_origin_are_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "photos"
    output.mkdir()
    (output / "000000.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"request.json, which tells what it holds, is missing"):
        _write(checkpoint, output)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"other files too, such as notes.txt"):
        _write(checkpoint, output, overwrite=True)
    assert _files(output) == {"000000.png": b"mine", "notes.txt": b"mine"}
    with pytest.raises(ValueError, match="is a file, and pictures need a folder"):
        _write(checkpoint, output / "notes.txt")
    _write(checkpoint, tmp_path / "out")
    other = to_png(np.zeros((8, 8, 1), np.uint8), {"index": "1", "seed": "5"})
    (tmp_path / "out" / "000001.png").write_bytes(other)
    with pytest.raises(ValueError, match=r"000001.png: not sample 1 of this request"):
        _write(checkpoint, tmp_path / "out")


def test_high_digits_and_masked_pixels_of_a_picture_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 1), dtype=np.uint8)
    (tmp_path / "known.png").write_bytes(to_png(pixels, {}))
    known = {"known": tmp_path / "known.png", "n": 3}
    for digits, kept in (("high", lambda x: x // 16), ("low", lambda x: x % 16)):
        _write(checkpoint, tmp_path / digits, known_digits=digits, **known)
        samples = np.load(tmp_path / digits / "samples.npy")
        assert (kept(samples) == kept(pixels)).all()
        assert not (samples == pixels).all()
    mask = np.zeros((8, 8, 1), np.uint8)
    mask[:, :2], mask[:, 2], mask[:, 3] = 255, 128, 127  # white from 128 on
    (tmp_path / "mask.png").write_bytes(to_png(mask, {}))
    _write(checkpoint, tmp_path / "masked", known_mask=tmp_path / "mask.png", **known)
    samples = np.load(tmp_path / "masked" / "samples.npy")
    assert (samples[:, :, :3] == pixels[:, :3]).all()
    assert not (samples[:, :, 3:] == pixels[:, 3:]).all()
    (tmp_path / "known.png").write_bytes(to_png(255 - pixels, {}))
    with pytest.raises(ValueError, match=r"another request \(other known\)"):
        _write(checkpoint, tmp_path / "masked", known_mask=tmp_path / "mask.png", **known)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"known_digits": "high"}, "give a picture"),
        ({"known": "known.png"}, "needs one of --known-mask and --known-digits"),
        ({"known": "wide.png", "known_digits": "high"}, r"4 x 9 pixels \(height x width\), must be 8 x 8"),
        ({"known": "text.png", "known_digits": "high"}, "not a sound PNG or JPEG"),
        ({"known": "absent.png", "known_digits": "high"}, "absent.png"),
        ({"label": "9"}, "label"),
        ({"label": "zebra"}, "label"),
        ({"label": "1" * 5000}, "label must be a number in 0..3"),
    ],
)
def test_what_does_not_fit_leaves_no_folder(
    settings: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "known.png").write_bytes(to_png(np.zeros((8, 8, 1), np.uint8), {}))
    (tmp_path / "wide.png").write_bytes(to_png(np.zeros((4, 9, 1), np.uint8), {}))
    (tmp_path / "text.png").write_text("no picture")
    settings = {name: tmp_path / value if name == "known" else value for name, value in settings.items()}
    with pytest.raises((ValueError, OSError), match=message):
        _write(checkpoint, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_samplers_and_presets_reach_the_rows(checkpoint: Path, tmp_path: Path) -> None:
    from prime_core.sampling.correctors import Corrector
    from prime_core.sampling.curves import TemperatureCurve, TimeWarp

    settings = {"corrector": "corrected 4 1 0.5", "warp": "1 1.7 0", "temperature": "-0.2 2 1"}
    _write(checkpoint, tmp_path / "out", sampler="published", n=2, label="1", **settings)
    expected = sample(
        load_checkpoint(checkpoint),
        n=2,
        steps=4,
        seed=3,
        label=1,
        sampler="published",
        corrector=Corrector("corrected", 4, 1, 0.5),
        warp=TimeWarp(1, 1.7, 0),
        temperature=TemperatureCurve(-0.2, 2, 1),
    )
    samples = np.load(tmp_path / "out" / "samples.npy")
    assert np.array_equal(samples, np.stack([one.pixels.numpy() for one in expected]))
    preset = ImageSampleConfig(checkpoint=checkpoint, output=tmp_path, preset="cifar10-l2-512", steps=9)
    assert (preset.steps, preset.sampler, preset.corrector) == (9, "published", "published 16.0 2.0")
    assert preset.sampler_fields()["temperature"] == TemperatureCurve(-0.2, 2, 1)
    plain = ImageSampleConfig(
        checkpoint=checkpoint, output=tmp_path, preset="cifar10-l2-512", warp="none", corrector="none"
    )
    assert (plain.steps, plain.warp, plain.corrector) == (512, None, None)
    assert (plain.sampler_fields()["warp"], plain.sampler_fields()["corrector"]) == (None, None)
    assert json.loads((tmp_path / "out" / "request.json").read_text())["warp"] == "1.0 1.7 0.0"


def test_the_command_chooses_by_the_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = [f"--checkpoint={checkpoint}", "--output", str(output), "-n", "7", "--steps", "9"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{output}: 7 pictures written; all 7 are in samples.npy\n"
    for flags, message in (
        (["--prompt", "x"], "prompt"),
        (["--preset", "cifar11"], "preset must be one of"),
        (["--temperature", "101"], "--temperature: must be in 0..100"),
        (["--temperature", "1 2"], "--temperature: must be one number or three: a n c, got '1 2'"),
        (["--corrector", "published 1 2 3"], "final_power has no effect"),
        (["--corrector", "odd 1"], '--corrector: must be "corrected a p [q]"'),
        (["--warp", "1"], "--warp: must be three numbers"),
        (["--steps", "0"], "--steps: must be an integer of at least 1"),
    ):
        assert main([*arguments, *flags]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("prime-sample: ")
        assert message in error


def test_the_checkpoint_is_looked_for_where_the_settings_are(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, none = tmp_path / "eval.toml", str(tmp_path / "none")
    file.write_text(f'checkpoint = "{checkpoint}"\n')
    assert not makes_images([], "PRIME_EVAL_")
    assert makes_images(["--config", str(file)], "PRIME_EVAL_")
    assert not makes_images(["--config", str(file), "--checkpoint", none], "PRIME_EVAL_")
    assert makes_images([f"--checkpoint={none}", "--checkpoint", str(checkpoint)], "PRIME_EVAL_")
    assert not makes_images(["--checkpoint", str(checkpoint), "--checkpoint", none], "PRIME_EVAL_")
    monkeypatch.setenv("PRIME_EVAL_CHECKPOINT", str(checkpoint))
    assert makes_images([], "PRIME_EVAL_") and not makes_images([], "PRIME_SAMPLE_")
    assert not makes_images(["--checkpoint", none], "PRIME_EVAL_")
    monkeypatch.setenv("PRIME_EVAL_CHECKPOINT", none)
    assert not makes_images(["--config", str(file)], "PRIME_EVAL_")


@pytest.mark.parametrize(("side", "message"), [(12_000, "12000 x 12000 pixels"), (50_000, "not a sound PNG")])
def test_a_picture_that_claims_to_be_huge_is_not_decoded(side: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    fields = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    header = struct.pack(">I", 13) + fields + struct.pack(">I", zlib.crc32(fields))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + to_png(np.zeros((8, 8, 1), np.uint8), {})[33:])
    with pytest.raises(PictureError, match=message):
        read_picture(path, (8, 8, 1))
