"""Damaged and foreign image checkpoints: every fault has its message, nothing runs, and nothing is written."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prime_core.checkpoint import CheckpointError
from prime_core.published.importer import import_published
from tests.prime_core.imported_images import SMALL, imported
from tests.published import image_checkpoint
from tests.reference_unet import Net

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
        content["model"][f"shadow_params.{last + 1}"] = content["model"].pop("shadow_params.0")
        self.refused(tmp_path, content, rf"shadow_params\.0 is missing: {last + 1} averaged tensors")
        content = image_checkpoint(tensors, tensors)
        content["model"][f"shadow_params.{last + 1}"] = torch.zeros(2)
        self.refused(tmp_path, content, f"{last + 2} averaged tensors")
        content = image_checkpoint(tensors, dict(reversed(tensors.items())))
        self.refused(tmp_path, content, r"shadow_params\.0 does not fit pixel_embedding")
        content = image_checkpoint(tensors, tensors)
        content["model"]["shadow_params.2"] = 3.0
        self.refused(tmp_path, content, r"shadow_params\.2 does not fit")

    def test_names_that_are_no_texts(self, tmp_path: Path) -> None:
        name: tuple[Any, ...] = ()
        for _ in range(995):  # of so many levels that writing it out would end in an error of its own
            name = (name,)
        tensors = SMALL.tensors()
        content = image_checkpoint(tensors, tensors)
        content["model"][name] = torch.zeros(2)
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(20_000)  # for the writing of the file
        try:
            torch.save(content, tmp_path / "a.pth")
        finally:
            sys.setrecursionlimit(limit)
        with pytest.raises(CheckpointError, match=r"a\.pth: a tensor has a name that is not a text"):
            import_published(tmp_path / "a.pth", tmp_path / "out")

    @pytest.mark.parametrize("recorded", [{"y": "text"}, {"y": 5, "logits": 5}, {"y": None, "logits": [1]}])
    def test_recorded_outputs_that_are_no_tensors_are_ignored(
        self, tmp_path: Path, recorded: dict[str, Any]
    ) -> None:
        content = image_checkpoint(SMALL.tensors(), SMALL.tensors())
        content["model"] |= recorded
        found = imported(tmp_path, content)
        assert any(f"ignored {len(recorded)} other tensors: y" in note for note in found.notes)

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
