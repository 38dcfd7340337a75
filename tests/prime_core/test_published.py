"""Imported networks compute what the published code computed, whatever V and the number of digits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prime_core.checkpoint import CheckpointError, load_checkpoint
from prime_core.published.command import main
from prime_core.published.importer import ImportOptions, import_published
from prime_core.rank_files import write_rank_file
from tests.published import DATA, network_of, random_backbone, training_checkpoint


def recorded(target_length: int) -> dict[str, torch.Tensor]:
    return load_file(DATA / f"dit_l{target_length}_V1000.safetensors")


class TestRecordedOutputs:
    @pytest.mark.parametrize("target_length", [1, 2, 3])
    def test_logits(self, tmp_path: Path, target_length: int) -> None:
        import_published(DATA / f"dit_l{target_length}_V1000.safetensors", tmp_path / "a")
        loaded, expected = load_checkpoint(tmp_path / "a"), recorded(target_length)
        y_t = expected["y"].unflatten(-1, (-1, target_length))
        assert (y_t == loaded.codec.mask_index).any()
        assert torch.equal(loaded.codec.encode(expected["ids"]).flatten(1), expected["y0"])
        logits = loaded.denoiser(y_t)
        assert logits.shape == (3, 16, 1000)
        torch.testing.assert_close(logits, expected["logits"][..., :1000], rtol=0, atol=1e-4)

    @pytest.mark.parametrize("target_length", [1, 2, 3])
    def test_log_probabilities_after_carry_over(self, tmp_path: Path, target_length: int) -> None:
        import_published(DATA / f"dit_l{target_length}_V1000.safetensors", tmp_path / "a")
        loaded, expected = load_checkpoint(tmp_path / "a"), recorded(target_length)
        y_t = expected["y"].unflatten(-1, (-1, target_length))
        # A token is consistent if each of its digits is the visible one or the visible one is the mask.
        seen = y_t[:, :, None, :]
        consistent = ((seen == loaded.codec.mask_index) | (seen == loaded.codec.digits)).all(-1)
        log_p = loaded.denoiser(y_t).masked_fill(~consistent, -torch.inf).log_softmax(-1)
        torch.testing.assert_close(
            log_p[consistent], expected["log_p"][..., :1000][consistent], rtol=0, atol=1e-4
        )

    def test_training_checkpoint(self, tmp_path: Path) -> None:
        imported = import_published(DATA / "published_text_l3.ckpt", tmp_path / "ema")
        expected = recorded(3)
        y_t = expected["y"].unflatten(-1, (-1, 3))
        logits = load_checkpoint(tmp_path / "ema").denoiser(y_t)
        torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)
        assert imported.config.model.model_dump() == {
            "kind": "dit",
            "hidden_size": 48,
            "num_blocks": 2,
            "num_heads": 4,
            "cond_dim": 24,
            "length": 16,
            "dropout": 0.1,
            "time_conditioned": False,
        }
        assert imported.config.codec.model_dump() == {
            "vocab_size": 1000,
            "target_length": 3,
            "permuted": False,
        }
        assert imported.config.schedule.model_dump() == {"kind": "linear", "eps": 1e-3}
        assert imported.config.provenance == {
            "imported_from": "published_text_l3.ckpt",
            "weights": "ema",
            "global_step": 1000,
            "ema_decay": 0.9999,
            "ema_num_updates": 1000,
            "carry_over_in_training": True,
        }
        import_published(DATA / "published_text_l3.ckpt", tmp_path / "raw", ImportOptions(raw=True))
        raw = load_checkpoint(tmp_path / "raw")
        assert raw.config.provenance["weights"] == "raw"
        assert (raw.denoiser(y_t) - expected["logits"]).abs().max() > 0.01


NETWORKS = [(300, 4, 24), (50257, 4, 10), (50257, 1, 6), (256, 8, 4), (257, 2, 14), (7, 3, 18), (2, 1, 2)]


class TestOtherNetworks:
    @pytest.mark.parametrize(("vocab_size", "target_length", "head_dim"), NETWORKS)
    @pytest.mark.parametrize("form", ["ckpt", "safetensors"])
    def test_agrees(
        self, tmp_path: Path, form: str, vocab_size: int, target_length: int, head_dim: int
    ) -> None:
        num_heads = target_length if head_dim * 2 % target_length else 2
        sizes: Any = {"head_dim": head_dim, "num_heads": num_heads, "num_blocks": 2}
        averaged = random_backbone(vocab_size, target_length, **sizes)
        path = tmp_path / f"a.{form}"
        if form == "ckpt":
            raw = random_backbone(vocab_size, target_length, seed=1, **sizes)
            torch.save(training_checkpoint(raw, averaged), path)
        else:
            save_file(averaged, path, {"length": "8"})
        import_published(path, tmp_path / "out", ImportOptions(tokenizer="none"))
        loaded = load_checkpoint(tmp_path / "out")
        assert loaded.config.codec.vocab_size == vocab_size
        assert loaded.config.codec.target_length == target_length
        assert loaded.config.model.num_heads == num_heads
        size = (2, 8, target_length)
        y_t = torch.randint(0, loaded.codec.base + 1, size, generator=torch.Generator().manual_seed(0))
        expected = network_of(averaged, vocab_size, target_length, num_heads)(y_t)
        assert torch.equal(loaded.denoiser(y_t), expected)

    def test_bfloat16(self, tmp_path: Path) -> None:
        tensors = random_backbone(300, 4, head_dim=8)
        save_file(tensors, tmp_path / "a.safetensors", {"length": "8"})
        import_published(tmp_path / "a.safetensors", tmp_path / "out", ImportOptions(dtype="bfloat16"))
        written = load_file(tmp_path / "out" / "model.safetensors")
        for name, tensor in written.items():
            assert torch.equal(tensor, tensors[f"backbone.{name}"].bfloat16())

    def test_stored_in_bfloat16(self, tmp_path: Path) -> None:
        tensors = {name: tensor.bfloat16() for name, tensor in random_backbone(300, 4, head_dim=8).items()}
        torch.save(training_checkpoint(tensors, tensors), tmp_path / "a.ckpt")
        import_published(tmp_path / "a.ckpt", tmp_path / "out")
        written = load_file(tmp_path / "out" / "model.safetensors")
        for name, tensor in written.items():
            assert torch.equal(tensor, tensors[f"backbone.{name}"].float())

    def test_flags_fill_in_what_the_file_does_not_tell(self, tmp_path: Path) -> None:
        tensors = random_backbone(300, 4, head_dim=8)
        del tensors["backbone.rotary_emb.inv_freq"]
        path = tmp_path / "a.safetensors"
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match="--length"):
            import_published(path, tmp_path / "out")
        with pytest.raises(CheckpointError, match="--num-heads"):
            import_published(path, tmp_path / "out", ImportOptions(length=8))
        assert not (tmp_path / "out").exists()
        import_published(path, tmp_path / "out", ImportOptions(length=8, num_heads=4, eps=0.0))
        config = load_checkpoint(tmp_path / "out").config
        assert (config.model.num_heads, config.model.length) == (4, 8)
        assert config.schedule.model_dump() == {"kind": "linear", "eps": 0.0}


class TestRefusals:
    def tensors(self) -> dict[str, torch.Tensor]:
        return random_backbone(300, 4, head_dim=8)

    def check_refused(self, tmp_path: Path, content: Any, message: str, **options: Any) -> None:
        torch.save(content, tmp_path / "a.ckpt")
        with pytest.raises(CheckpointError, match=message) as caught:
            import_published(tmp_path / "a.ckpt", tmp_path / "out", ImportOptions(**options))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_ema(self, tmp_path: Path) -> None:
        tensors = self.tensors()
        self.check_refused(tmp_path, training_checkpoint(tensors, tensors, ema=None), "--raw")
        short = training_checkpoint(tensors, tensors)
        short["ema"]["shadow_params"].pop()
        self.check_refused(tmp_path, short, "averaged tensors for")
        swapped = training_checkpoint(tensors, tensors)
        swapped["ema"]["shadow_params"].reverse()
        self.check_refused(tmp_path, swapped, "does not fit")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"vocab_embed.embedding": torch.zeros(7, 4)}, "found 7"),
            ({"vocab_embed.embedding": torch.zeros(6, 5)}, "no multiple"),
            ({"vocab_embed.embedding": torch.zeros(6)}, "no usable tensor"),
            ({"output_layer.linear.weight": torch.zeros(2000, 16)}, "found 6"),
            ({"output_layer.linear.bias": torch.zeros(299)}, "must have shape"),
            ({"output_layer.linear.bias": torch.zeros(301)}, "must have shape"),
            ({"blocks.0.mlp.0.weight": torch.zeros(64, 17)}, r"blocks\.0\.mlp\.0\.weight.*must have shape"),
            ({"blocks.0.surplus": torch.zeros(3)}, "unknown tensors"),
            ({"blocks.5.norm1.weight": torch.zeros(16)}, "missing"),
            ({"rotary_emb.inv_freq": torch.ones(4)}, "base 10000"),
            ({"rotary_emb.inv_freq": torch.ones(3)}, "does not fit"),
            ({"rotary_emb.inv_freq": 1e6 ** -(torch.arange(4) / 4)}, "base 10000"),
            ({"blocks.0.norm1.weight": torch.full((16,), torch.nan)}, "NaN"),
            ({"blocks.0.norm1.weight": torch.ones(16, dtype=torch.int64)}, "not floating point"),
            ({"blocks.0.norm1.weight": "text"}, "not a plain dense tensor"),
            ({"blocks.0.norm1.weight": torch.ones(16).to_sparse()}, "not a plain dense tensor"),
        ],
    )
    def test_tensors(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        tensors = {**self.tensors(), **{f"backbone.{name}": value for name, value in change.items()}}
        self.check_refused(tmp_path, training_checkpoint(tensors, tensors), message, raw=True)

    def test_configuration(self, tmp_path: Path) -> None:
        tensors = self.tensors()
        content = training_checkpoint(tensors, tensors)
        self.check_refused(tmp_path, content, "3 heads were given", num_heads=3)
        self.check_refused(tmp_path, content, "length", length=0)
        self.check_refused(tmp_path, content, "eps", eps=1.0)
        content["hyper_parameters"]["config"]["noise"]["type"] = "cosine"
        self.check_refused(tmp_path, content, "'cosine'.*--eps")
        content["hyper_parameters"]["config"]["parameterization"] = "sedd"
        self.check_refused(tmp_path, content, "'sedd'")
        content["hyper_parameters"]["config"] = {"prime": {"vocab_size": 12}, "model": {"length": 8}}
        self.check_refused(tmp_path, content, "V = 12")

    def test_other_files(self, tmp_path: Path) -> None:
        self.check_refused(tmp_path, {"model": {}, "args": None}, r"no published image network.*model\.unet")
        self.check_refused(tmp_path, {"weights": {}}, "no state_dict and no model")
        self.check_refused(tmp_path, {"state_dict": {"lm_head.weight": torch.zeros(2)}}, r"backbone\.")
        self.check_refused(tmp_path, [torch.zeros(2)], "list")
        with pytest.raises(CheckpointError, match="--raw"):
            import_published(DATA / "dit_l1_V1000.safetensors", tmp_path / "out", ImportOptions(raw=True))
        with pytest.raises(CheckpointError, match="cannot be read"):
            import_published(tmp_path / "missing.ckpt", tmp_path / "out")

    def test_what_a_record_tells(self, tmp_path: Path) -> None:
        tensors = self.tensors()
        content = training_checkpoint(tensors, tensors)
        record = content["hyper_parameters"]["config"]
        record |= {
            "parameterization": "${loss.kind}",
            "time_conditioning": True,
            "prime": {"vocab_size": 301},
        }
        record["model"]["dropout"] = 10**400
        record["noise"]["eps"] = 0.25
        torch.save(content, tmp_path / "a.ckpt")
        config = import_published(tmp_path / "a.ckpt", tmp_path / "out").config
        assert (config.model.time_conditioned, config.model.dropout) == (
            True,
            0.1,
        )  # told, and the published one
        assert (config.codec.vocab_size, config.schedule.eps) == (300, 0.25)  # the mask is counted there
        told = ImportOptions(eps=0.5, overwrite=True)
        assert import_published(tmp_path / "a.ckpt", tmp_path / "out", told).config.schedule.eps == 0.5
        record["prime"]["vocab_size"] = 302
        torch.save(content, tmp_path / "a.ckpt")
        with pytest.raises(CheckpointError, match="says V = 302, but the tensors have V = 300"):
            import_published(tmp_path / "a.ckpt", tmp_path / "other")

    def test_metadata_that_are_no_sizes(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        for value in ("9" * 5000, "-8", "8.0", "٨"):
            save_file(self.tensors(), path, {"length": value})
            with pytest.raises(
                CheckpointError, match=r"a\.safetensors: the context length is not in the file"
            ):
                import_published(path, tmp_path / "out")


class TestTokenizer:
    def source(self, tmp_path: Path, vocab_size: int) -> Path:
        path = tmp_path / "a.safetensors"
        save_file(random_backbone(vocab_size, 2, head_dim=2), path, {"length": "8"})
        return path

    def test_rank_file(self, tmp_path: Path) -> None:
        ranks = tmp_path / "bytes.tiktoken"
        write_rank_file(ranks, [bytes([value]) for value in range(256)])
        options = ImportOptions(tokenizer=str(ranks))
        import_published(self.source(tmp_path, 257), tmp_path / "out", options)
        tokenizer = load_checkpoint(tmp_path / "out").tokenizer
        assert tokenizer is not None
        assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
        whole = import_published(self.source(tmp_path, 256), tmp_path / "whole", options)
        assert whole.config.tokenizer.special_tokens == {}  # the ranks take all tokens
        with pytest.raises(CheckpointError, match="256 ranks, but the network has 200 tokens"):
            import_published(self.source(tmp_path, 200), tmp_path / "small", options)

    def test_gpt2_without_its_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "nothing"))
        source = self.source(tmp_path, 50257)
        imported = import_published(source, tmp_path / "out")
        assert load_checkpoint(tmp_path / "out").tokenizer is None
        assert any("GPT-2" in note for note in imported.notes)
        with pytest.raises(CheckpointError, match="--tokenizer gpt2"):
            import_published(source, tmp_path / "other", ImportOptions(tokenizer="gpt2"))

    def test_gpt2_with_its_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("prime_core.published.importer.load_tokenizer", lambda spec, folder: None)
        monkeypatch.setattr("prime_core.checkpoint.load_tokenizer", lambda spec, folder: None)
        for vocab_size in (50257, 50258):
            imported = import_published(self.source(tmp_path, vocab_size), tmp_path / str(vocab_size))
            assert imported.config.tokenizer.kind == "gpt2"
            assert imported.config.tokenizer.special_tokens == {"<|endoftext|>": 50256}
            assert imported.config.codec.vocab_size == vocab_size


class TestCommand:
    def test_writes_and_tells(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = [
            str(DATA / "published_text_l3.ckpt"),
            "--output",
            str(tmp_path / "out"),
            "--dtype",
            "bfloat16",
        ]
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        for part in (
            "V = 1000",
            "3 digits of base 10",
            "128,760",
            "0.9999",
            "1000",
            '"eps":0.001',
            "4 heads",
        ):
            assert part in shown
        assert json.loads((tmp_path / "out" / "config.json").read_text())["codec"]["vocab_size"] == 1000
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "--overwrite" in error
        assert main([*arguments, "--overwrite", "--raw"]) == 0
        assert load_checkpoint(tmp_path / "out").config.provenance["weights"] == "raw"

    def test_an_empty_folder_is_free(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        assert main([str(DATA / "dit_l2_V1000.safetensors"), "--output", str(tmp_path / "out")]) == 0

    def test_errors_are_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "a.ckpt").write_text("text\n")
        assert main([str(tmp_path / "a.ckpt"), "--output", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        with pytest.raises(SystemExit) as caught:
            main([str(tmp_path / "a.ckpt")])
        assert caught.value.code == 2

    def test_an_import_that_reads_back_differently_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save = "prime_core.published.importer.save_checkpoint"
        from prime_core.checkpoint import save_checkpoint

        def save_other(folder: Path, config: Any, state: dict[str, torch.Tensor], **others: Any) -> None:
            save_checkpoint(folder, config, {**state, "blocks.0.norm1.weight": torch.ones(48)}, **others)

        monkeypatch.setattr(save, save_other)
        assert main([str(DATA / "dit_l2_V1000.safetensors"), "--output", str(tmp_path / "out")]) == 2
