"""Damaged weights files get a clear message, foreign ones are refused unopened."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prime_core import weights
from prime_core.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tests.checkpoints import CONFIG, assert_same, make_state, with_codec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_checkpoint(path, CONFIG, make_state())
    return path


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def set_field(name: str, field: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update({field: value})


HEAD, NORM = "output_layer.linear.weight", "blocks.0.norm1.weight"
HEADER_FAULTS = {
    "dtype": (set_field(HEAD, "dtype", "F31"), "F31"),
    "dtype kind": (set_field(HEAD, "dtype", 5), "dtype"),
    "shape": (set_field(HEAD, "shape", [10, 13]), "do not hold"),
    "shape sign": (set_field(HEAD, "shape", [-10, -12]), "non-negative"),
    "shape kind": (set_field(HEAD, "shape", [True, 120]), "integers"),
    "shape permuted": (
        set_field(HEAD, "shape", [12, 10]),
        r"\(10, 12\) by the configuration, found \(12, 10\)",
    ),
    "overlap": (set_field(HEAD, "data_offsets", [0, 480]), "overlaps|gap"),
    "far away": (set_field(HEAD, "data_offsets", [2**62, 2**62 + 480]), "gap|truncated"),
    "dimensions": (set_field(NORM, "shape", [1] * 16 + [12]), "do not hold"),
    "huge": (set_field(HEAD, "shape", [2**40, 2**40]), "do not hold"),
    "extra field": (set_field(HEAD, "sparse", True), "nothing else"),
    "metadata": (lambda header: header.update(__metadata__={"a": 1}), "strings"),
    "entry": (lambda header: header.update({HEAD: []}), "dtype, shape and data_offsets"),
    "renamed": (lambda header: header.update({"other": header.pop(HEAD)}), f"missing, first '{HEAD}'"),
}


class TestDamagedWeights:
    @pytest.mark.parametrize("fault", HEADER_FAULTS)
    def test_header(self, folder: Path, fault: str) -> None:
        change, message = HEADER_FAULTS[fault]
        rewrite_header(folder / "model.safetensors", change)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_checkpoint(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("keep", [0, 1, 8, 9, 100, -1])
    def test_truncated(self, folder: Path, keep: int) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=r"truncated|empty"):
            load_checkpoint(folder)

    def test_every_truncation_is_seen(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        for keep in range(0, len(raw), 97):
            path.write_bytes(raw[:keep])
            with pytest.raises(CheckpointError):
                load_checkpoint(folder)

    def test_trailing_bytes(self, folder: Path) -> None:
        with (folder / "model.safetensors").open("ab") as file:
            file.write(b"\0")
        with pytest.raises(CheckpointError, match="1 bytes after the last tensor"):
            load_checkpoint(folder)

    def test_duplicate_name(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        entry = json.dumps({HEAD: json.loads(raw[8 : 8 + length])[HEAD]}).encode()
        header = raw[8 : 8 + length].rstrip()[:-1] + b"," + entry[1:]
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
        with pytest.raises(CheckpointError, match="appears twice"):
            load_checkpoint(folder)

    @pytest.mark.parametrize("length", [2**63, 2**25, 17 * 2**20])
    def test_header_length(self, folder: Path, length: int) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
        with pytest.raises(CheckpointError, match="at most"):
            load_checkpoint(folder)

    @pytest.mark.parametrize(
        "header", [b"{" * 100_000, b'{"a": }', b"{\xff}", b'{"a": 1}', b'{"a": NaN}', b"{}"]
    )
    def test_header_text(self, folder: Path, header: bytes) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(CheckpointError):
            load_checkpoint(folder)

    def test_more_tensors_than_any_network_has(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        count = len(make_state())
        monkeypatch.setattr(weights, "MAX_TENSORS", count)
        assert_same(folder, make_state())
        monkeypatch.setattr(weights, "MAX_TENSORS", count - 1)
        with pytest.raises(CheckpointError, match=f"{count} tensors, at most {count - 1}: not a usable file"):
            load_checkpoint(folder)

    def test_every_tensor_begins_at_a_multiple_of_its_element(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        tensors = {
            "a": torch.zeros(3, dtype=torch.bfloat16),
            "b": torch.zeros(3),
            "c": torch.zeros(3, dtype=torch.int64),
            "d": torch.zeros(3, dtype=torch.bool),
        }
        with path.open("wb") as file:
            weights.write_weights(file, tensors, {"length": "of any kind"})
        with weights.open_weights(path) as found:
            for name, tensor in tensors.items():
                assert found.tensors[name].start % tensor.element_size() == 0, name

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_not_finite(self, folder: Path, value: float) -> None:
        state = make_state()
        state[NORM][3] = value
        with pytest.raises(CheckpointError, match=f"{NORM}.*NaN or infinity"):
            save_checkpoint(folder, CONFIG, state)
        assert_same(folder, make_state())
        save_file(state, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"{NORM}.*NaN or infinity"):
            load_checkpoint(folder)

    def test_missing_and_extra(self, folder: Path) -> None:
        state = make_state()
        del state[NORM]
        save_file(state, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"1 tensors missing, first '{NORM}'"):
            load_checkpoint(folder)
        with pytest.raises(CheckpointError, match="missing"):
            save_checkpoint(folder, CONFIG, state)
        state = {**make_state(), "surplus": torch.zeros(1)}
        save_file(state, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="unknown tensors, first 'surplus'"):
            load_checkpoint(folder)

    def test_dtypes(self, folder: Path) -> None:
        for dtype in (torch.float16, torch.float64, torch.int64):
            save_file({k: v.to(dtype) for k, v in make_state().items()}, folder / "model.safetensors")
            with pytest.raises(CheckpointError, match="float32 or bfloat16"):
                load_checkpoint(folder)
        mixed = make_state()
        mixed[NORM] = mixed[NORM].bfloat16()
        save_file(mixed, folder / "model.safetensors")
        # The checks go in the order of the configuration, and NORM is not the first.
        with pytest.raises(CheckpointError, match=rf"{NORM!r} must be torch.float32, as those before it"):
            load_checkpoint(folder)

    def test_permutation_values(self, tmp_path: Path) -> None:
        config = with_codec(10, 2, permuted=True)
        save_checkpoint(tmp_path / "a", config, make_state(config), permutation=torch.arange(10))
        weights = load_file(tmp_path / "a" / "model.safetensors")
        weights["codec.permutation"][0] = 5
        save_file(weights, tmp_path / "a" / "model.safetensors")
        with pytest.raises(CheckpointError, match="permutation"):
            load_checkpoint(tmp_path / "a")


class TestForeign:
    """Pickles and archives are refused by their first bytes, under any name."""

    @pytest.mark.parametrize("protocol", [0, 2, 4, 5])
    def test_pickle(self, folder: Path, tmp_path: Path, protocol: int) -> None:
        canary = tmp_path / "canary"
        path = folder / "model.safetensors"
        path.write_bytes(pickle.dumps(Evil(canary), protocol) + b" " * 100)
        for source in (folder, path):
            with pytest.raises(CheckpointError, match="refused unopened"):
                load_checkpoint(source)
        assert not canary.exists()

    def test_torch_archive(self, folder: Path) -> None:
        torch.save(make_state(), folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"zip archive .* refused unopened.*prime-import"):
            load_checkpoint(folder)

    def test_zip(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
            archive.writestr("data.pkl", b"x")
        with pytest.raises(CheckpointError, match="refused unopened"):
            load_checkpoint(tmp_path / "a.ckpt")

    def test_text_and_special_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 5)
        with pytest.raises(CheckpointError, match="LFS"):
            load_checkpoint(tmp_path / "a.safetensors")
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", tmp_path / "missing"):
            with pytest.raises(CheckpointError, match="no such file"):
                load_checkpoint(path)


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)
