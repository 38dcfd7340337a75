"""Imported image networks compute what their description says, whatever their sizes; every fault has its message."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prime_core.checkpoint import CheckpointError, load_checkpoint
from prime_core.config import CodecConfig, CosineConfig, LinearConfig, PolynomialConfig, UNetConfig
from prime_core.models.unet import UNet
from prime_core.published.command import main
from prime_core.published.image_facts import ImageFacts
from prime_core.published.image_layout import infer_image_config
from prime_core.published.importer import Imported, ImportOptions, import_published
from prime_core.schedule import PolynomialSchedule
from tests.published import DATA, image_checkpoint
from tests.reference_unet import Net

FIXTURE = DATA / "unet_l2.safetensors"
SMALL = Net(1, 2, 4, 16, (32,), rates=(1,))
DEEP = Net(3, 1, 4, 4, (96, 32), rates=(2,))

NETS = {
    "RGB, plain, one level": Net(3, 1, 256, 256, (96,), rates=(1,)),
    "RGB, plain, an output for the mask": Net(3, 1, 256, 257, (96, 64), head=64),
    "RGB, 2 digits, 2 blocks": Net(3, 2, 16, 256, (96, 64), blocks=2, rates=(2,), head=64),
    "RGB, 3 digits": Net(3, 3, 7, 256, (288, 32), rates=(2,)),
    "RGB, 4 digits, 3 levels": Net(3, 4, 4, 256, (96, 32, 64), rates=(2, 4)),
    "RGB, 8 digits, 4 levels": Net(3, 8, 2, 256, (96, 64, 32, 32), rates=(4, 8)),
    "grey, plain": Net(1, 1, 256, 256, (32,)),
    "grey, plain, an output for the mask": Net(1, 1, 10, 11, (32, 64), head=64),
    "grey, 2 digits, odd V": Net(1, 2, 10, 97, (64,), blocks=2, rates=(1,), head=64),
    "grey, 4 digits, 3 blocks": Net(1, 4, 4, 256, (32, 64), blocks=3, rates=(1, 2)),
    "grey, 8 digits": Net(1, 8, 2, 256, (32, 32), rates=(2,)),
    "super-tokens": Net(2, 1, 4096, 4096, (32,)),
}


def imported(tmp_path: Path, content: Any, **options: Any) -> Imported:
    torch.save(content, tmp_path / "a.pth")
    return import_published(tmp_path / "a.pth", tmp_path / "out", ImportOptions(**options))


def model_of(found: Imported) -> UNetConfig:
    assert isinstance(found.config.model, UNetConfig)
    return found.config.model


class TestRecordedOutputs:
    def test_logits_and_marginals(self, tmp_path: Path) -> None:
        found = import_published(FIXTURE, tmp_path / "a")
        loaded, expected = load_checkpoint(tmp_path / "a"), load_file(FIXTURE)
        digits = loaded.codec.encode(expected["x"]).movedim(-1, 2).flatten(1, 2)
        assert torch.equal(digits, expected["y0"])
        y_t = expected["y"].unflatten(1, (3, 2)).movedim(2, -1)
        assert (y_t == loaded.codec.mask_index).any()
        logits = loaded.denoiser(y_t)
        torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)
        p = logits.softmax(-1).unflatten(-1, (16, 16))
        marginal = torch.stack([p.sum(-1), p.sum(-2)], 2).flatten(1, 2)
        torch.testing.assert_close(marginal, expected["marginal"][..., :16], rtol=0, atol=1e-5)
        model = model_of(found)
        assert (model.height, model.width, model.channels, model.head_channels) == (8, 8, 3, 32)
        assert (model.model_channels, model.channel_mult, model.num_res_blocks) == (32, (3, 3), 1)
        assert any("reproduced with head_channels 32" in note for note in found.notes)
        assert not any("--head-channels" in note for note in found.notes)

    @pytest.mark.parametrize("head", [16, 32, 128])
    def test_tell_the_width_of_heads(self, tmp_path: Path, head: int) -> None:
        net = Net(1, 2, 4, 16, (128,), rates=(1,), head=head)
        tensors, y_t = net.tensors(), net.digits(side=4)
        recorded = {
            "y": y_t.movedim(-1, 2).flatten(1, 2).contiguous(),
            "logits": net.logits(tensors, y_t).float().contiguous(),
        }
        save_file({**tensors, **recorded}, tmp_path / "a.safetensors")
        found = import_published(tmp_path / "a.safetensors", tmp_path / "out")
        assert model_of(found).head_channels == head
        assert (model_of(found).height, model_of(found).width) == (4, 4)
        told = import_published(tmp_path / "a.safetensors", tmp_path / "b", ImportOptions(head_channels=64))
        assert model_of(told).head_channels == 64
        assert any("NOT reproduced" in note for note in told.notes)


class TestAgreement:
    @pytest.mark.parametrize("name", NETS)
    def test_with_the_reference(self, tmp_path: Path, name: str) -> None:
        net = NETS[name]
        averaged, raw = net.tensors(), net.tensors(seed=1)
        found = imported(tmp_path, image_checkpoint(raw, averaged, num_head_channels=net.head), size=(8, 8))
        loaded, model = load_checkpoint(tmp_path / "out"), model_of(found)
        assert (loaded.codec.base, loaded.codec.target_length) == (net.base, net.target_length)
        assert loaded.codec.vocab_size in (net.outputs, net.outputs - 1)
        assert (model.channels, model.num_res_blocks, model.attention_rates) == (
            net.channels,
            net.blocks,
            net.rates,
        )
        assert tuple(model.model_channels * mult for mult in model.channel_mult) == net.widths
        assert model.packing == ("rgb24" if name == "super-tokens" else "none")
        y_t = net.digits()
        expected = net.logits(averaged, y_t)[..., : loaded.codec.vocab_size]
        torch.testing.assert_close(loaded.denoiser(y_t).double(), expected, rtol=0, atol=1e-3)
        assert expected.std() > 0.1

    def test_an_output_for_the_mask_is_dropped(self, tmp_path: Path) -> None:
        net = NETS["grey, plain, an output for the mask"]
        found = imported(tmp_path, image_checkpoint(net.tensors(), net.tensors()))
        assert found.config.codec.vocab_size == 10
        assert load_checkpoint(tmp_path / "out").denoiser(net.digits()).shape == (2, 1, 8, 8, 10)

    def test_labels(self, tmp_path: Path) -> None:
        net = Net(1, 2, 4, 16, (32,), rates=(1,), labels=5)
        tensors = net.tensors()
        found = imported(tmp_path, image_checkpoint(tensors, tensors))
        assert (model_of(found).labels, model_of(found).num_labels) == ("class", 5)
        y_t, labels = net.digits(), torch.tensor([4, 1])
        logits = load_checkpoint(tmp_path / "out").denoiser(y_t, labels=labels)
        torch.testing.assert_close(logits.double(), net.logits(tensors, y_t, labels), rtol=0, atol=1e-3)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_stored_types(self, tmp_path: Path, dtype: torch.dtype) -> None:
        tensors = SMALL.tensors(dtype=dtype)
        imported(tmp_path, image_checkpoint(tensors, tensors))
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert len(written) == len(tensors)
        for name, tensor in tensors.items():
            inner = name.removeprefix("model.").removeprefix("unet.")
            assert torch.equal(written[inner], tensor.float())

    def test_written_in_bfloat16(self, tmp_path: Path) -> None:
        tensors = SMALL.tensors()
        imported(tmp_path, image_checkpoint(tensors, tensors), dtype="bfloat16")
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(written["out.2.weight"], tensors["model.unet.out.2.weight"].bfloat16())

    @pytest.mark.parametrize("digits", [1, 2, 3, 4, 8])
    def test_the_full_size_is_recognised(self, digits: int) -> None:
        codec = CodecConfig(vocab_size=256, target_length=digits)
        with torch.device("meta"):
            network = UNet(UNetConfig(), codec, PolynomialSchedule(3.0))
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        layout = infer_image_config("a.pth", shapes, ImageFacts(dataset="cifar10"))
        assert (layout.config.model, layout.config.codec) == (UNetConfig(), codec)


class TestLayouts:
    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_prefixes(self, tmp_path: Path, prefix: str) -> None:
        averaged = SMALL.tensors()
        imported(tmp_path, image_checkpoint(SMALL.tensors(seed=1), averaged, prefix=prefix))
        self.check(tmp_path, averaged)

    def test_module_inside(self, tmp_path: Path) -> None:
        averaged = SMALL.tensors()
        raw = {name.replace("model.", "model.module.", 1): t for name, t in SMALL.tensors(seed=1).items()}
        imported(tmp_path, image_checkpoint(raw, averaged))
        self.check(tmp_path, averaged)

    @pytest.mark.parametrize("prefix", ["model.", "module.model.", ""])
    def test_safetensors(self, tmp_path: Path, prefix: str) -> None:
        tensors = SMALL.tensors()
        named = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file(named, tmp_path / "a.safetensors", {"l": "2", "base": "4", "height": "16", "width": "8"})
        found = import_published(tmp_path / "a.safetensors", tmp_path / "out")
        assert (model_of(found).height, model_of(found).width) == (16, 8)
        self.check(tmp_path, tensors)

    def test_raw_and_provenance(self, tmp_path: Path) -> None:
        raw, averaged = SMALL.tensors(seed=1), SMALL.tensors()
        content = image_checkpoint(raw, averaged, carry_over=True, schedule_n=2.0, dropout=0.25)
        found = imported(tmp_path, content, raw=True)
        self.check(tmp_path, raw)
        origin = {"imported_from": "a.pth", "weights": "raw", "epoch": 4, "ema_num_updates": 9}
        assert found.config.provenance == {**origin, "carry_over_in_training": True}
        assert found.config.schedule == PolynomialConfig(power=2.0)
        assert model_of(found).dropout == 0.25

    def test_without_an_average(self, tmp_path: Path) -> None:
        content = {"model": SMALL.tensors(), "args": None}
        with pytest.raises(CheckpointError, match=r"a\.pth: no moving average.*--raw"):
            imported(tmp_path, content)
        imported(tmp_path, content, raw=True)
        self.check(tmp_path, content["model"])

    @staticmethod
    def check(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
        written = load_file(tmp_path / "out" / "model.safetensors")
        for name, tensor in tensors.items():
            assert torch.equal(written[name.removeprefix("model.").removeprefix("unet.")], tensor)


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

    @pytest.mark.parametrize(
        "arguments", [{"base": 4}, {"vocab_size": 17}, {"target_length": "x"}, {"base": None}]
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


WEIGHT = "model.unet.out.2.weight"
TABLE = "model.pixel_embedding.embedding_table.weight"
FIRST = "model.unet.input_blocks.1.0.in_layers.0.weight"


class TestRefusals:
    def refused(self, tmp_path: Path, content: Any, message: str, **options: Any) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            imported(tmp_path, content, **options)
        assert "\n" not in str(caught.value)
        assert "a.pth" in str(caught.value)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({TABLE: torch.zeros(6, 16)}, "do not fit"),
            ({TABLE: torch.zeros(5, 7)}, "no whole number of planes"),
            ({TABLE: torch.zeros(5)}, r"no usable tensor pixel_embedding\.embedding_table"),
            ({WEIGHT: torch.zeros(17, 32, 3, 3)}, "do not fit"),
            ({WEIGHT: torch.zeros(0, 32, 3, 3)}, r"no usable tensor out\.2\.weight"),
            ({WEIGHT: torch.zeros(16, 33, 3, 3)}, r"out\.2\.weight.*must have shape"),
            ({"model.unet.out.2.bias": torch.zeros(15)}, r"out\.2\.bias.*must have shape"),
            ({FIRST: torch.zeros(48)}, "48"),
            ({"model.unet.surplus": torch.zeros(3)}, "unknown tensors.*surplus"),
            ({"model.other.weight": torch.zeros(3)}, "unknown tensors.*other"),
            ({"model.unet.input_blocks.0.0.weight": torch.zeros(3)}, r"input_blocks \[0, 1\]"),
            ({"model.unet.input_blocks.2.0.x": torch.zeros(3)}, "missing"),
            ({"model.unet.input_blocks.9.0.x": torch.zeros(3)}, r"input_blocks \[1, 9\]"),
            ({"model.unet.input_blocks.x.0.y": torch.zeros(3)}, "unknown tensors"),
            (
                {"model.unet.time_embed.0.weight": torch.zeros(4, 4)},
                r"time_embed\.0\.weight conditions.*on time",
            ),
            (
                {"model.unet.middle_block.0.emb_layers.1.weight": torch.zeros(4, 4)},
                r"emb_layers\.1\.weight conditions",
            ),
            ({FIRST: torch.full((32,), torch.nan)}, "NaN"),
            ({FIRST: torch.ones(32, dtype=torch.int64)}, "not floating point"),
            ({FIRST: "text"}, f"{FIRST} is not a plain dense tensor"),
            ({FIRST: torch.ones(32).to_sparse()}, "not a plain dense tensor"),
            ({f"module.{FIRST}": torch.ones(32)}, "there twice"),
        ],
    )
    def test_tensors(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        tensors = {**SMALL.tensors(), **change}
        self.refused(tmp_path, image_checkpoint(tensors, tensors), message, raw=True)

    @pytest.mark.parametrize("part", ["embedding_table.weight", "out.0.bias", "emb_layers", "qkv.bias"])
    def test_missing(self, tmp_path: Path, part: str) -> None:
        tensors = {name: tensor for name, tensor in SMALL.tensors().items() if part not in name}
        self.refused(tmp_path, image_checkpoint(tensors, tensors), "missing|no usable tensor|no published")

    def test_attention_in_some_blocks(self, tmp_path: Path) -> None:
        net = Net(1, 2, 4, 16, (32,), blocks=2, rates=(1,))
        tensors = {n: t for n, t in net.tensors().items() if "input_blocks.2.1." not in n}
        message = r"input_blocks\.2\.1\.qkv\.weight is missing"
        self.refused(tmp_path, image_checkpoint(tensors, tensors), message)

    def test_average(self, tmp_path: Path) -> None:
        tensors = SMALL.tensors()
        last = len(tensors) - 1
        content = image_checkpoint(tensors, tensors)
        del content["model"]["shadow_params.3"]
        self.refused(tmp_path, content, rf"shadow_params\.3 is missing: {last} averaged tensors")
        content = image_checkpoint(tensors, tensors)
        content["model"][f"shadow_params.{last + 1}"] = torch.zeros(2)
        self.refused(tmp_path, content, f"{last + 2} averaged tensors")
        content = image_checkpoint(tensors, dict(reversed(tensors.items())))
        self.refused(tmp_path, content, r"shadow_params\.0 does not fit pixel_embedding")
        content = image_checkpoint(tensors, tensors)
        content["model"]["shadow_params.2"] = 3.0
        self.refused(tmp_path, content, r"shadow_params\.2 does not fit")

    def test_odd_counters_are_left_out(self, tmp_path: Path) -> None:
        for value in ("text", torch.zeros(3), torch.tensor(0.5)):
            content = image_checkpoint(SMALL.tensors(), SMALL.tensors())
            content["model"]["num_updates"] = value
            found = imported(tmp_path, content, overwrite=True)
            assert "ema_num_updates" not in found.config.provenance

    def test_arguments_run_nothing(self, tmp_path: Path) -> None:
        class Call:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "canary"),)

        content = {**image_checkpoint(SMALL.tensors(), SMALL.tensors()), "args": Call()}
        assert imported(tmp_path, content).config.codec.vocab_size == 16
        assert not (tmp_path / "canary").exists()
        torch.load(tmp_path / "a.pth", weights_only=False)
        assert (tmp_path / "canary").exists()

    @pytest.mark.parametrize("arguments", [None, 3, [1], {"target_length": 2}])
    def test_arguments_of_other_kinds(self, tmp_path: Path, arguments: Any) -> None:
        content = {**image_checkpoint(SMALL.tensors(), SMALL.tensors()), "args": arguments}
        assert imported(tmp_path, content).config.codec.target_length == 2

    def test_damaged_file(self, tmp_path: Path) -> None:
        torch.save(image_checkpoint(SMALL.tensors(), SMALL.tensors()), tmp_path / "a.pth")
        whole = (tmp_path / "a.pth").read_bytes()
        for keep in (0, 1, 100, len(whole) // 2, len(whole) - 1):
            (tmp_path / "a.pth").write_bytes(whole[:keep])
            with pytest.raises(CheckpointError, match=r"a\.pth"):
                import_published(tmp_path / "a.pth", tmp_path / "out")
        assert not (tmp_path / "out").exists()


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
