"""What the tensors of an image network do not tell: its arguments, options and flags say it, or it is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from prime_core.checkpoint import CheckpointError, load_checkpoint
from prime_core.config import CosineConfig, LinearConfig, PolynomialConfig
from prime_core.published.command import main
from prime_core.published.importer import ImportOptions, import_published
from tests.prime_core.imported_images import SMALL, imported, model_of
from tests.published import DATA, image_checkpoint
from tests.reference_unet import Net

DEEP = Net(3, 1, 4, 4, (96, 32), rates=(2,))


class TestWhatTensorsDoNotTell:
    def content(self, net: Net = SMALL, **arguments: Any) -> dict[str, Any]:
        return image_checkpoint(net.tensors(), net.tensors(), **arguments)

    @pytest.mark.parametrize(
        ("arguments", "options", "size"),
        [
            ({}, {}, (32, 32)),
            ({"dataset": "cifar10"}, {}, (32, 32)),
            ({"dataset": "ImageNet-32", "seq_length": 1024}, {}, (32, 32)),
            ({"seq_length": 64}, {}, (8, 8)),
            ({"image_size": 16}, {}, (16, 16)),
            ({"dataset": "cifar10"}, {"size": (8, 16)}, (8, 16)),
        ],
    )
    def test_size(
        self, tmp_path: Path, arguments: dict[str, Any], options: dict[str, Any], size: tuple[int, int]
    ) -> None:
        found = imported(tmp_path, self.content(**arguments), **options)
        assert (model_of(found).height, model_of(found).width) == size
        assert any("--size" in note for note in found.notes) == (not arguments)

    @pytest.mark.parametrize(
        ("width", "arguments", "option", "head"),
        [
            (32, {}, None, 32),
            (64, {}, None, 64),
            (64, {"num_head_channels": 32}, None, 32),
            (64, {"num_head_channels": -1}, None, 64),
            (64, {"num_head_channels": 64}, 16, 16),
        ],
    )
    def test_width_of_heads(
        self, tmp_path: Path, width: int, arguments: dict[str, Any], option: int | None, head: int
    ) -> None:
        net = Net(1, 2, 4, 16, (width,), rates=(1,))
        found = imported(tmp_path, self.content(net, **arguments), head_channels=option)
        assert model_of(found).head_channels == head

    def test_only_attended_levels_bind_the_heads(self, tmp_path: Path) -> None:
        found = imported(tmp_path, self.content(Net(3, 1, 4, 4, (96, 64), rates=(2,), head=64)))
        assert model_of(found).head_channels == 64

    def test_schedule(self, tmp_path: Path) -> None:
        found = imported(tmp_path, self.content())
        assert found.config.schedule == PolynomialConfig(power=3.0)
        assert any("--schedule" in note for note in found.notes)
        chosen = imported(tmp_path, self.content(schedule_n=2.0), schedule=CosineConfig(), overwrite=True)
        assert chosen.config.schedule == CosineConfig()

    def test_model_channels(self, tmp_path: Path) -> None:
        found = imported(tmp_path, self.content(Net(1, 1, 4, 4, (64, 32)), model_channels=32))
        assert (model_of(found).model_channels, model_of(found).channel_mult) == (32, (2, 1))

    def test_the_arguments_choose_among_readings(self, tmp_path: Path) -> None:
        # 3 planes of binary digits, 6 outputs: 3 channels of V = 2, or 1 channel of V = 6 with 3 digits.
        tensors = Net(3, 1, 2, 2, (96,)).tensors()
        found = imported(tmp_path, image_checkpoint(tensors, tensors))
        assert (model_of(found).channels, found.config.codec.vocab_size) == (3, 2)
        assert any("1 other readings" in note for note in found.notes)
        content = image_checkpoint(tensors, tensors, target_length=3)
        found = imported(tmp_path, content, overwrite=True)
        assert (model_of(found).channels, found.config.codec.vocab_size) == (1, 6)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"target_length": 3}, "says target_length = 3, but the tensors have target_length = 2"),
            ({"base": 5}, "says base = 5, but"),
            ({"vocab_size": 18}, "says vocab_size = 18, but"),
            ({"seq_length": 1000}, r"seq_length = 1000.*--size"),
            ({"seq_length": 64, "dataset": "cifar10"}, r"of cifar10.*--size"),
            ({"model_channels": 48}, "says model_channels = 48"),
            ({"num_head_channels": 48}, r"multiple of head_channels \(48\)"),
            ({"schedule_n": 0.0}, r"schedule_n 0\.0.*--schedule"),
            ({"dropout": 1.5}, "dropout"),
            ({"image_size": 2**40}, "height"),
        ],
    )
    def test_contradictions(self, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            imported(tmp_path, self.content(**arguments))
        assert "a.pth" in str(caught.value)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("base", [10, 11])
    def test_the_mask_may_be_counted_where_a_digit_is_a_token(self, tmp_path: Path, base: int) -> None:
        found = imported(tmp_path, self.content(Net(1, 1, 10, 10, (32,)), base=base))
        assert found.config.codec.base == 10

    @pytest.mark.parametrize(
        "arguments",
        [
            {"base": 4},
            {"vocab_size": 17},
            {"target_length": "x"},
            {"base": None},
            {"schedule_n": 10**400},
            {"dropout": float("inf")},
        ],
    )
    def test_no_contradictions(self, tmp_path: Path, arguments: dict[str, Any]) -> None:
        assert imported(tmp_path, self.content(**arguments)).config.codec.vocab_size == 16

    def test_options_of_text_networks(self, tmp_path: Path) -> None:
        for options in ({"length": 8}, {"num_heads": 2}, {"eps": 0.1}, {"tokenizer": "gpt2"}):
            flag = "--" + next(iter(options)).replace("_", "-")
            with pytest.raises(CheckpointError, match=f"an image network, which has no {flag}"):
                imported(tmp_path, self.content(), **options)

    def test_options_of_image_networks(self, tmp_path: Path) -> None:
        for options in ({"size": (8, 8)}, {"head_channels": 32}, {"schedule": LinearConfig()}):
            flag = "--" + next(iter(options)).replace("_", "-")
            with pytest.raises(CheckpointError, match=f"a text network, which has no {flag}"):
                import_published(
                    DATA / "dit_l2_V1000.safetensors",
                    tmp_path / "out",
                    ImportOptions(**options),  # type: ignore[arg-type]
                )


class TestCommand:
    def test_writes_and_tells(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        torch.save(image_checkpoint(DEEP.tensors(), DEEP.tensors(), dataset="cifar10"), tmp_path / "a.pth")
        flags = ["--size", "8x16", "--head-channels", "16", "--schedule", "linear:0.25"]
        assert main([str(tmp_path / "a.pth"), "--output", str(tmp_path / "out"), *flags]) == 0
        shown = capsys.readouterr().out
        for part in ("8x16 pictures of 3 planes", "[96, 32] wide", "rates [2]", "heads of 16", "no labels"):
            assert part in shown
        config = load_checkpoint(tmp_path / "out").config
        assert config.schedule == LinearConfig(eps=0.25)
        assert (config.model.kind, config.tokenizer.kind) == ("unet", "none")

    @pytest.mark.parametrize(
        "flags",
        [
            ["--size", "8"],
            ["--size", "0x8"],
            ["--size", "8x99999"],
            ["--head-channels", "0"],
            ["--schedule", "linear"],
            ["--schedule", "linear:1"],
            ["--schedule", "polynomial:nan"],
            ["--schedule", "cosine:1"],
        ],
    )
    def test_bad_flags(self, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["a.pth", "--output", str(tmp_path / "out"), *flags])
        assert caught.value.code == 2
        assert flags[0] in capsys.readouterr().err
