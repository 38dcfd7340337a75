"""Checkpoints come back bit for bit, survive a crash at any point, and every fault has its message."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prime_core.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from prime_core.config import LinearConfig
from prime_core.rank_files import write_rank_file
from prime_core.tokenizer import TokenizerSpec
from tests.checkpoints import CONFIG, assert_same, file_names, make_state, with_codec

BYTES = [bytes([value]) for value in range(256)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_checkpoint(path, CONFIG, make_state())
    return path


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bit_exact(self, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("prime_core.checkpoint.has_bfloat16", lambda device: True)
        state = {name: tensor.to(dtype) for name, tensor in make_state().items()}
        save_checkpoint(tmp_path / "a", CONFIG, state)
        assert_same(tmp_path / "a", state)
        assert file_names(tmp_path / "a") == ["config.json", "model.safetensors"]
        library = load_file(tmp_path / "a" / "model.safetensors")
        assert all(torch.equal(library[name], tensor) for name, tensor in state.items())

    def test_contents(self, folder: Path) -> None:
        loaded = load_checkpoint(folder)
        assert (loaded.path, loaded.dtype, loaded.tokenizer) == (folder, torch.float32, None)
        assert (loaded.codec.base, loaded.codec.target_length) == (4, 2)
        assert loaded.schedule == LinearConfig().build()
        assert not loaded.denoiser.training
        assert not any(parameter.requires_grad for parameter in loaded.denoiser.parameters())
        assert loaded.denoiser(torch.full((2, 5, 2), 4)).shape == (2, 5, 10)

    def test_a_file_is_a_model_too(self, folder: Path, tmp_path: Path) -> None:
        single = tmp_path / "single.safetensors"
        shutil.move(folder / "model.safetensors", single)
        assert_same(single, make_state())

    def test_library_files_load_from_a_folder(self, folder: Path) -> None:
        save_file(make_state(seed=3), folder / "model.safetensors")
        assert_same(folder, make_state(seed=3))

    def test_dtype(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        half = load_checkpoint(folder, dtype="bfloat16")
        assert half.dtype == torch.bfloat16
        assert {p.dtype for p in half.denoiser.parameters()} == {torch.bfloat16}
        assert {b.dtype for b in half.denoiser.buffers()} == {torch.float32}
        save_checkpoint(folder, CONFIG, make_state(), dtype=torch.bfloat16)
        monkeypatch.setattr("prime_core.checkpoint.has_bfloat16", lambda device: False)
        assert load_checkpoint(folder).dtype == torch.float32
        assert load_checkpoint(folder, dtype="bfloat16").dtype == torch.bfloat16
        monkeypatch.setattr("prime_core.checkpoint.has_bfloat16", lambda device: True)
        assert load_checkpoint(folder).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="float16"):
            load_checkpoint(folder, dtype="float16")  # type: ignore[arg-type]

    def test_permutation(self, tmp_path: Path) -> None:
        config = with_codec(10, 2, permuted=True)
        permutation = torch.arange(9, -1, -1)
        save_checkpoint(tmp_path / "a", config, make_state(config), permutation=permutation)
        codec = load_checkpoint(tmp_path / "a").codec
        assert codec.permutation is not None
        assert torch.equal(codec.permutation, permutation)
        assert codec.encode(torch.tensor([9])).tolist() == [[0, 0]]
        with pytest.raises(CheckpointError, match="permut"):
            save_checkpoint(tmp_path / "b", config, make_state(config))
        with pytest.raises(CheckpointError, match="permut"):
            save_checkpoint(tmp_path / "b", CONFIG, make_state(), permutation=permutation)
        assert not (tmp_path / "b").exists()

    def test_a_context_that_could_not_be_loaded_is_not_saved(self, tmp_path: Path) -> None:
        config = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"length": 10**12})})
        with pytest.raises(CheckpointError, match=r"model\.length 1000000000000 is over .*: lower it"):
            save_checkpoint(tmp_path / "a", config, make_state())
        assert not (tmp_path / "a").exists()

    def test_loading_leaves_the_global_generator_alone(self, folder: Path) -> None:
        before = torch.get_rng_state()
        load_checkpoint(folder)
        assert torch.equal(before, torch.get_rng_state())

    def test_a_hand_edited_configuration_counts(self, folder: Path) -> None:
        edited = json.loads((folder / "config.json").read_text())
        edited["schedule"]["eps"] = 0.25
        (folder / "config.json").write_text(json.dumps(edited))
        assert load_checkpoint(folder).schedule == LinearConfig(eps=0.25).build()

    def test_a_configuration_that_does_not_count_is_named(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        load_checkpoint(folder)
        assert caplog.messages == []
        (folder / ".config.json.partial").write_text("{")
        load_checkpoint(folder)
        (message,) = caplog.messages
        assert str(folder / ".config.json.partial") in message
        assert f"{folder / 'config.json'} is not read" in message

    def test_other_files_stay(self, folder: Path) -> None:
        (folder / "CARD.md").write_text("hello")
        save_checkpoint(folder, CONFIG, make_state(seed=1))
        assert (folder / "CARD.md").read_text() == "hello"


CONFIG_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown key": (lambda c: c["model"].update(hiden_size=4), "hiden_size"),
    "unknown section": (lambda c: c.update(extra={}), "extra"),
    "wrong type": (lambda c: c["model"].update(num_heads="2"), "num_heads"),
    "out of range": (lambda c: c["schedule"].update(eps=1.5), "eps"),
    "missing section": (lambda c: c.pop("codec"), "codec"),
    "true for a number": (lambda c: c["model"].update(num_blocks=True), "num_blocks"),
    "number for true": (lambda c: c["codec"].update(permuted=0), "permuted"),
    "text for a float": (lambda c: c["schedule"].update(eps="0.1"), "eps"),
    "true for the version": (lambda c: c.update(format_version=True), "format_version: must be an integer"),
    "float for the version": (lambda c: c.update(format_version=1.0), "format_version: must be an integer"),
    "version": (lambda c: c.update(format_version=2), "format_version"),
    "vocabulary": (lambda c: c["codec"].update(vocab_size=11), "must have shape"),
    "digits": (lambda c: c["codec"].update(target_length=3), "must have shape"),
    "too many digits": (lambda c: c["codec"].update(target_length=12), "shape|digits"),
    "blocks": (lambda c: c["model"].update(num_blocks=2), "missing"),
    "very many blocks": (lambda c: c["model"].update(num_blocks=10**9), "blocks"),
    "width": (lambda c: c["model"].update(hidden_size=10**6), "must have shape"),
    "absurd width": (lambda c: c["model"].update(hidden_size=10**30, num_heads=1), "out of range"),
    "context": (lambda c: c["model"].update(length=10**12), "length"),
    "permuted": (lambda c: c["codec"].update(permuted=True), "codec.permutation"),
}


class TestConfiguration:
    @pytest.mark.parametrize("fault", CONFIG_FAULTS)
    def test_fault(self, folder: Path, fault: str) -> None:
        change, message = CONFIG_FAULTS[fault]
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message) as caught:
            load_checkpoint(folder)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "text",
        [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"model": {}, "model": {}}', b" " * 2**21],
    )
    def test_text(self, folder: Path, text: bytes) -> None:
        (folder / "config.json").write_bytes(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_checkpoint(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda c: c["model"].update(num_blocks=0),
                "model.num_blocks: Input should be greater than or equal to 1",
            ),
            (lambda c: c["model"].update(num_heads=7), "model: hidden_size ("),
            (lambda c: c["model"].update(unet=1), "model.unet: Extra inputs are not permitted"),
            (lambda c: c["schedule"].update(eps=1), "schedule.eps: Input should be less than 1"),
            (lambda c: c.update(label_names=["a"]), "label_names are for image models with labels"),
        ],
    )
    def test_fields_are_named_as_they_are_written(
        self, folder: Path, change: Callable[[Any], None], message: str
    ) -> None:
        """The kind of a network is part of pydantic's path to its fields, and of no name in the file."""
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(folder)
        assert f"config.json: {message}" in str(caught.value)
        assert str(caught.value).endswith("; correct the field")

    def test_missing(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"config\.json: missing"):
            load_checkpoint(folder)

    def test_single_file_without_configuration(self, tmp_path: Path) -> None:
        save_file(make_state(), tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match="prime-import"):
            load_checkpoint(tmp_path / "a.safetensors")


class TestTokenizer:
    SPEC = TokenizerSpec(kind="tiktoken_file", file="ranks.tiktoken", special_tokens={"<|endoftext|>": 256})
    FITTING = with_codec(257, 2, tokenizer=SPEC)

    @pytest.fixture
    def ranks(self, tmp_path: Path) -> Path:
        path = tmp_path / "somewhere.tiktoken"
        write_rank_file(path, BYTES)
        return path

    def test_travels_with_the_model(self, tmp_path: Path, ranks: Path) -> None:
        for seed in (0, 1):
            state = make_state(self.FITTING, seed)
            save_checkpoint(tmp_path / "a", self.FITTING, state, tokenizer_file=ranks)
        assert file_names(tmp_path / "a") == ["config.json", "model.safetensors", "ranks.tiktoken"]
        tokenizer = load_checkpoint(tmp_path / "a").tokenizer
        assert tokenizer is not None
        assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo"
        assert load_checkpoint(tmp_path / "a" / "model.safetensors").tokenizer is not None

    def test_does_not_fit_the_codec(self, tmp_path: Path, ranks: Path) -> None:
        config = with_codec(256, 2, tokenizer=self.SPEC)
        save_checkpoint(tmp_path / "a", config, make_state(config), tokenizer_file=ranks)
        with pytest.raises(CheckpointError, match=r"257 ids.*vocab_size is 256"):
            load_checkpoint(tmp_path / "a")

    def test_missing_broken_or_linked(self, tmp_path: Path, ranks: Path) -> None:
        save_checkpoint(tmp_path / "a", self.FITTING, make_state(self.FITTING), tokenizer_file=ranks)
        inside = tmp_path / "a" / "ranks.tiktoken"
        inside.write_bytes(ranks.read_bytes()[:-9])
        with pytest.raises(CheckpointError, match="truncated"):
            load_checkpoint(tmp_path / "a")
        inside.unlink()
        with pytest.raises(CheckpointError, match=r"ranks\.tiktoken is missing"):
            load_checkpoint(tmp_path / "a")
        inside.symlink_to(ranks)
        with pytest.raises(CheckpointError, match="symbolic link"):
            load_checkpoint(tmp_path / "a")

    @pytest.mark.parametrize("name", ["../ranks.tiktoken", "/etc/passwd", "a/b", "..", ""])
    def test_leaves_the_folder(self, folder: Path, name: str) -> None:
        content = json.loads((folder / "config.json").read_text())
        content["tokenizer"] = {"kind": "tiktoken_file", "file": name}
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="tokenizer"):
            load_checkpoint(folder)

    def test_saving_wants_the_right_file(self, tmp_path: Path, ranks: Path) -> None:
        with pytest.raises(CheckpointError, match="tokenizer_file"):
            save_checkpoint(tmp_path / "a", self.FITTING, make_state(self.FITTING))
        with pytest.raises(CheckpointError, match="tokenizer_file"):
            save_checkpoint(tmp_path / "a", CONFIG, make_state(), tokenizer_file=ranks)
        save_checkpoint(tmp_path / "a", self.FITTING, make_state(self.FITTING), tokenizer_file=ranks)
        write_rank_file(ranks, [*BYTES, b"ab"])
        with pytest.raises(CheckpointError, match="another tokenizer"):
            save_checkpoint(tmp_path / "a", self.FITTING, make_state(self.FITTING), tokenizer_file=ranks)
        assert_same(tmp_path / "a", make_state(self.FITTING), self.FITTING)


def test_a_pipe_in_place_of_the_configuration_is_not_waited_for(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: not a file"):
        load_checkpoint(folder)
