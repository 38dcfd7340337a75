"""Image networks on disk: written and read bit for bit, or refused with the name of the fault."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prime_core.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from prime_core.config import Config, PolynomialConfig
from tests.prime_core.small_unet import CODEC, digits, make_config, make_network


class TestCheckpoints:
    CONFIG = Config(
        model=make_config(labels="class", num_labels=2),
        codec=CODEC,
        schedule=PolynomialConfig(),
        label_names=("cat", "dog"),
    )

    def state(self) -> dict[str, Tensor]:
        return make_network(labels="class", num_labels=2).state_dict()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bit_exact(self, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("prime_core.checkpoint.has_bfloat16", lambda device: True)
        state = {name: tensor.to(dtype) for name, tensor in self.state().items()}
        save_checkpoint(tmp_path / "a", self.CONFIG, state)
        loaded = load_checkpoint(tmp_path / "a")
        assert (loaded.config, loaded.dtype, loaded.tokenizer) == (self.CONFIG, dtype, None)
        parameters = dict(loaded.denoiser.named_parameters())
        assert parameters.keys() == state.keys()
        for name, parameter in parameters.items():
            assert parameter.dtype == dtype
            assert torch.equal(parameter, state[name]), name
        network = make_network(labels="class", num_labels=2).to(dtype)
        labels = torch.tensor([1, 0, 1])
        assert torch.equal(loaded.denoiser(digits(), labels=labels), network(digits(), labels=labels))
        assert not loaded.denoiser.training

    def test_a_file_is_a_model_too(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path / "a", self.CONFIG, self.state())
        (tmp_path / "a" / "model.safetensors").rename(tmp_path / "b.safetensors")
        assert load_checkpoint(tmp_path / "b.safetensors").config == self.CONFIG

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            ("out.2.bias", None, r"1 tensors missing, first 'out\.2\.bias'"),
            ("out.2.bias", torch.zeros(47), r"'out\.2\.bias' must have shape \(48,\)"),
            ("out.3.bias", torch.zeros(4), r"unknown tensors, first 'out\.3\.bias'"),
            ("middle_block.1.qkv.weight", torch.zeros(192, 64), "must have shape"),
            ("out.0.bias", torch.full((96,), torch.nan), "NaN"),
            ("out.0.bias", torch.zeros(96, dtype=torch.float16), "must be float32 or bfloat16"),
        ],
    )
    def test_faults(self, tmp_path: Path, name: str, tensor: Tensor | None, message: str) -> None:
        save_checkpoint(tmp_path / "a", self.CONFIG, self.state())
        path = tmp_path / "a" / "model.safetensors"
        tensors = {**load_file(path), name: tensor}
        save_file({n: t for n, t in tensors.items() if t is not None}, path)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_checkpoint(tmp_path / "a")
        assert "model.safetensors" in str(caught.value)
        given = {n: t for n, t in {**self.state(), name: tensor}.items() if t is not None}
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(tmp_path / "b", self.CONFIG, given)
        assert not (tmp_path / "b").exists()
