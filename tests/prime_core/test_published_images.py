"""Imported image networks compute what their description says, whatever their sizes and layouts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prime_core.checkpoint import CheckpointError, load_checkpoint
from prime_core.config import CodecConfig, PolynomialConfig, UNetConfig
from prime_core.models.unet import UNet
from prime_core.published.image_facts import ImageFacts
from prime_core.published.image_layout import infer_image_config
from prime_core.published.importer import ImportOptions, import_published
from prime_core.schedule import PolynomialSchedule
from tests.prime_core.imported_images import SMALL, imported, model_of
from tests.published import DATA, image_checkpoint
from tests.reference_unet import Net

FIXTURE = DATA / "unet_l2.safetensors"

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
