"""Images at the Python door: labels, known pixels and digits, presets, and what does not fit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prime_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from prime_core.config import CodecConfig, Config, PolynomialConfig, UNetConfig
from prime_core.models.build import build_denoiser
from prime_core.sampling.canvas import CanvasError
from prime_core.sampling.prepare import prepare_rows
from prime_core.sampling.sample import sample


def make_checkpoint(folder: Path, vocab_size: int = 16, target_length: int = 2, **model: Any) -> Checkpoint:
    sizes: dict[str, Any] = {
        "channels": 3,
        "height": 4,
        "width": 4,
        "labels": "class",
        "num_labels": 3,
    } | model
    if sizes["labels"] == "none":
        sizes["num_labels"] = 1
    config = Config(
        model=UNetConfig(
            model_channels=96,
            channel_mult=(1,),
            num_res_blocks=1,
            attention_rates=(),
            head_channels=32,
            dropout=0.0,
            **sizes,
        ),
        codec=CodecConfig(vocab_size=vocab_size, target_length=target_length),
        schedule=PolynomialConfig(),
        label_names=("cat", "dog", "owl") if sizes["labels"] == "class" else (),
    )
    torch.manual_seed(0)
    denoiser = build_denoiser(config)
    for parameter in denoiser.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    save_checkpoint(folder, config, denoiser.state_dict())
    return load_checkpoint(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("images"))


def pixels(checkpoint: Checkpoint, **request: Any) -> Tensor:
    return torch.stack([image.pixels for image in sample(checkpoint, steps=8, **request)])


def test_a_label_is_given_by_number_or_name_and_changes_the_image(model: Checkpoint) -> None:
    by_number, by_name = pixels(model, n=2, seed=1, label=1), pixels(model, n=2, seed=1, label="dog")
    assert torch.equal(by_number, by_name)
    assert by_number.shape == (2, 4, 4, 3) and by_number.dtype == torch.uint8
    assert not torch.equal(by_number, pixels(model, n=2, seed=1, label="owl"))


def test_without_a_label_each_image_draws_one_uniformly_from_its_seed(model: Checkpoint) -> None:
    rows = prepare_rows(model, n=600, seed=5, steps=1).rows
    counts = Counter(row.label for row in rows)
    assert set(counts) == {0, 1, 2} and min(counts.values()) > 150
    images = sample(model, n=4, seed=5, steps=4)
    assert [image.label for image in images] == [row.label for row in rows[:4]]
    again = sample(model, n=1, seed=images[2].seed, steps=4)[0]
    assert again.label == images[2].label and torch.equal(again.pixels, images[2].pixels)


def test_a_mixture_draws_its_label_and_takes_none(tmp_path: Path) -> None:
    mixture = make_checkpoint(tmp_path, labels="uniform")
    assert len({row.label for row in prepare_rows(mixture, n=40, seed=0, steps=1).rows}) == 3
    with pytest.raises(CanvasError, match="no labels to choose from"):
        prepare_rows(mixture, label=1)


def test_known_pixels_stay_and_the_rest_is_sampled(model: Checkpoint) -> None:
    known = torch.full((4, 4, 3), -1)
    known[:2] = torch.arange(24).view(2, 4, 3) % 16
    images = pixels(model, n=3, seed=2, label=0, known=known)
    assert bool((images[:, :2] == known[:2]).all())
    assert images[:, 2:].unique().numel() > 4


@pytest.mark.parametrize("corrector", [None, "corrected", "published"])
def test_known_high_digits_stay_under_every_sampler(model: Checkpoint, corrector: str | None) -> None:
    preset = {None: None, "corrected": "cifar10-l2-512-corrected", "published": "cifar10-l2-512"}[corrector]
    y = torch.full((3, 4, 4, 2), model.codec.mask_index)
    y[..., 0] = torch.arange(48).view(3, 4, 4) % 4
    request = {"n": 2, "seed": 3, "y": y, "steps": 8} | ({} if preset is None else {"preset": preset})
    for image in sample(model, **request):
        digits = model.codec.encode(image.pixels.long().movedim(-1, 0))
        assert torch.equal(digits[..., 0], y[..., 0])
        assert digits[..., 1].unique().numel() > 1


def test_fields_that_are_given_beside_a_preset_come_first(model: Checkpoint) -> None:
    request = prepare_rows(model, preset="cifar10-l2-512", steps=16, temperature=0.5).request
    assert request.steps == 16 and request.temperature == 0.5
    assert request.corrector is not None and request.sampler == "published"  # type: ignore[union-attr]
    assert prepare_rows(model, preset="cifar10-l2-512", corrector=None).request.corrector is None
    with pytest.raises(CanvasError, match="preset must be one of cifar10-l2-512"):
        prepare_rows(model, preset="best")


def test_super_tokens_give_rgb_pictures(tmp_path: Path) -> None:
    packed = make_checkpoint(
        tmp_path, vocab_size=4096, target_length=1, channels=2, packing="rgb24", labels="none"
    )
    known = torch.full((4, 4, 3), -1)
    known[1] = torch.tensor([200, 7, 255])
    images = pixels(packed, n=2, seed=0, known=known)
    assert images.shape == (2, 4, 4, 3) and bool((images[:, 1] == known[1]).all())
    known[0, 0, 1] = 9
    with pytest.raises(CanvasError, match="fix all of them or none"):
        prepare_rows(packed, known=known)


def test_known_pixels_and_digits_may_be_arrays(model: Checkpoint) -> None:
    known = torch.full((4, 4, 3), -1)
    known[1] = 7
    digits = prepare_rows(model, known=known, seed=0).canvas.y.view(3, 4, 4, -1)
    for given in ({"known": known.numpy().astype("int8")}, {"y": digits.numpy().astype("uint16")}):
        assert torch.equal(prepare_rows(model, **given, seed=0).canvas.y, digits.view(48, -1))


@pytest.mark.parametrize(
    ("request_", "param", "message"),
    [
        ({"label": 3}, "label", r"label must be in 0\.\.2"),
        (
            {"corrector": 3},
            "corrector",
            "corrector must be a prime_core.sampling.correctors.Corrector, or None",
        ),
        ({"warp": "1"}, "warp", "warp must be a prime_core.sampling.curves.TimeWarp, or None"),
        ({"label": True}, "label", r"label must be in 0\.\.2"),
        ({"label": "cow"}, "label", "cat, dog, owl"),
        ({"prompt": "a"}, "prompt", "no argument of an image model"),
        ({"lable": 1}, "lable", "did you mean label"),
        ({"sampler": "best"}, "sampler", "'ancestral' or 'published'"),
        ({"known": torch.zeros(4, 4, dtype=torch.long)}, "known", r"\(4, 4, 3\), got \(4, 4\)"),
        ({"known": torch.full((4, 4, 3), 16)}, "known", r"0\.\.15, or -1"),
        ({"known": torch.full((4, 4, 3), -2)}, "known", r"0\.\.15, or -1"),
        ({"known": torch.tensor([-1, 3, 16]).expand(4, 4, 3)}, "known", r"0\.\.15, or -1"),
        ({"known": torch.tensor([-2, 3, 15]).expand(4, 4, 3)}, "known", r"0\.\.15, or -1"),
        ({"known": torch.zeros(4, 4, 3)}, "known", "integers"),
        ({"known": torch.ones(4, 4, 3, dtype=torch.bool)}, "known", "integers"),
        ({"known": [[[0]]]}, "known", r"\(4, 4, 3\), got list"),
        ({"y": [[[0]]]}, "y", r"\(3, 4, 4, 2\), got list"),
        ({"y": torch.zeros(3, 4, 4, 3, dtype=torch.long)}, "y", r"\(3, 4, 4, 2\)"),
        ({"y": torch.full((3, 4, 4, 2), 5)}, "y", r"digits must be in 0\.\.3"),
    ],
)
def test_what_does_not_fit_is_named(
    model: Checkpoint, request_: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(CanvasError, match=message) as caught:
        prepare_rows(model, **request_)
    assert caught.value.param == param


def test_known_and_y_exclude_each_other(model: Checkpoint) -> None:
    known, y = torch.full((4, 4, 3), -1), torch.full((3, 4, 4, 2), 4)
    with pytest.raises(CanvasError, match="exclude each other"):
        prepare_rows(model, known=known, y=y)


def test_the_published_sampler_needs_codes_that_are_all_tokens(tmp_path: Path) -> None:
    odd = make_checkpoint(tmp_path, vocab_size=15)
    with pytest.raises(CanvasError, match="stand for no token") as caught:
        prepare_rows(odd, sampler="published")
    assert caught.value.param == "sampler"
    assert int(pixels(odd, n=4, seed=0).max()) < 15


def test_a_row_is_the_same_alone_and_in_a_crowd(model: Checkpoint) -> None:
    crowd = sample(model, n=6, seed=4, steps=8, label=2)
    for image in crowd[3:]:
        alone = sample(model, n=1, seed=image.seed, steps=8, label=2)[0]
        assert torch.equal(alone.pixels, image.pixels) and alone.nfe == image.nfe
