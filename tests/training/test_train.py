"""Training: gradients, determinism, the tiny config, and corpora that cannot be trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prime_core.checkpoint import load_checkpoint
from prime_core.likelihood import estimate_likelihood
from tests.training.small_run import load_run, metrics_of, state_of, write_byte_ranks, write_run
from training import trainer as trainer_module
from training.config import load_train_config
from training.data.dataset import BlockOrder
from training.data.manifest import read_manifest
from training.setup import codec_permutation
from training.train import main, train
from training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the runs themselves: more only wait for each other at this size
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def _gradients(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor], float]:
    """The gradient of the first step and its loss, before clipping."""
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> torch.Tensor:
        for name, parameter in trainer.model.named_parameters():
            assert parameter.grad is not None
            gradients[name] = parameter.grad.clone()
        return torch.zeros(())

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
        loss = trainer.train_step()["loss"]
    return gradients, loss


@pytest.mark.parametrize("objective", ["coded", "nelbo"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_have_the_gradient_of_the_whole_batch(
    objective: str, micro_batch_size: int, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--objective", objective, "--model.dropout", "0"]
    results = []
    for size in (8, micro_batch_size):
        run = load_run(config, tmp_path / f"out-{size}", *flags, "--micro-batch-size", str(size))
        trainer = Trainer(run, progress=False)
        generator = torch.Generator().manual_seed(3)
        for parameter in trainer.model.parameters():  # the head starts at zero, where gradients are special
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        results.append(_gradients(trainer, monkeypatch))
    (whole, whole_loss), (parts, parts_loss) = results
    assert parts_loss == pytest.approx(whole_loss, rel=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in whole.values())
    assert scale > 0.01
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-5 * scale)


def test_gradients_are_clipped_to_the_configured_norm(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(load_run(config, tmp_path / "out", "--grad-clip", "0.01"), progress=False)
    norms = []

    def keep() -> None:
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))

    monkeypatch.setattr(trainer.optimizer, "step", keep)
    assert trainer.train_step()["grad_norm"] > 0.01
    assert norms == [pytest.approx(0.01, rel=1e-3)]


def test_a_seed_is_a_run_and_torchs_own_generator_stays_where_it_was(config: Path, tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        train(load_run(config, tmp_path / name, "--steps", "3", "--seed", seed), progress=False)
        torch.rand(int(seed))  # what others draw in between changes nothing
    torch.manual_seed(11)
    train(load_run(config, tmp_path / "d", "--steps", "3"), progress=False)
    assert torch.equal(torch.rand(3), expected)
    a, b, c, d = (state_of(tmp_path / name)[1] for name in "abcd")
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], d[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_weights_rows_masks_and_dropout_are_drawn_apart_from_the_seed(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times, rows, seeds = [], [], []
    draw_times, loss_of, stack = (
        trainer_module.antithetic_times, trainer_module.training_loss, trainer_module.stack_rows
    )  # fmt: skip

    def note_times(num_rows: int, generator: torch.Generator, eps: float) -> torch.Tensor:
        seeds.append(generator.initial_seed())
        times.append(draw_times(num_rows, generator, eps))
        return times[-1]

    def note_dropout(*arguments: Any, **options: Any) -> torch.Tensor:
        seeds.append(torch.initial_seed())
        return loss_of(*arguments, **options)

    def note_rows(source: Any, numbers: list[int]) -> torch.Tensor:
        rows.extend(numbers)
        return stack(source, numbers)

    monkeypatch.setattr(trainer_module, "antithetic_times", note_times)
    monkeypatch.setattr(trainer_module, "training_loss", note_dropout)
    monkeypatch.setattr(trainer_module, "stack_rows", note_rows)
    started = []
    for seed in (1, 2):
        flags = ["--seed", str(seed), "--eps", "0.5", "--ema-warmup", "false", "--micro-batch-size", "8"]
        trainer = Trainer(load_run(config, tmp_path / str(seed), *flags), progress=False)
        started.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
        for noted in (times, rows, seeds):
            noted.clear()
        for _ in range(3):
            trainer.train_step()
        assert len(set(seeds)) == 6  # of masks and of dropout, in every step
        order = BlockOrder(trainer.data.train.num_rows, seed)
        assert rows == [order.index(position) for position in range(24)]
        assert min(float(t.min()) for t in times) >= 0.5
        assert (trainer.ema.decay, trainer.ema.warmup) == (0.9, False)
    assert any(not torch.equal(first, second) for first, second in zip(*started, strict=True))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_settings_reach_the_loss_and_the_products(
    precision: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    loss_of = trainer_module.training_loss

    def spy(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(options | {"precision": "bfloat16" if torch.is_autocast_enabled("cpu") else "float32"})
        return loss_of(*arguments, **options)

    def spy_on_evaluation(*arguments: Any, **options: Any) -> Any:
        seen.append({"precision": "bfloat16" if torch.is_autocast_enabled("cpu") else "float32"})
        return estimate_likelihood(*arguments, **options)

    monkeypatch.setattr(trainer_module, "training_loss", spy)
    monkeypatch.setattr(trainer_module, "estimate_likelihood", spy_on_evaluation)
    expected = []
    for objective, weighted, carry_over in (
        ("coded", False, True),
        ("coded", True, False),
        ("nelbo", True, True),
    ):
        flags = ["--objective", objective, "--weighted", str(weighted), "--carry-over", str(carry_over)]
        flags += ["--precision", precision, "--micro-batch-size", "8", "--chunk-rows", "65"]
        trainer = Trainer(load_run(config, tmp_path / "out", *flags), progress=False)
        trainer.train_step()
        trainer.evaluate()
        expected.append({"objective": objective, "carry_over": carry_over, "weighted": weighted, "chunk_rows": 65,
                         "labels": None, "precision": precision})  # fmt: skip
        expected.append({"precision": precision})
    assert seen == expected


def test_the_checkpoint_has_the_type_that_is_asked_for_and_the_state_has_not(
    config: Path, tmp_path: Path
) -> None:
    train(load_run(config, tmp_path, "--steps", "1", "--checkpoint-dtype", "bfloat16"), progress=False)
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in state_of(tmp_path)[1].values()} == {torch.float32}


def test_dropout_is_on_in_training_and_off_in_evaluation(config: Path, tmp_path: Path) -> None:
    losses, heldout = [], []
    for rate in ("0", "0.5"):
        run = load_run(config, tmp_path / rate, "--model.dropout", rate, "--learning-rate", "0.05")
        trainer = Trainer(run, progress=False)
        for _ in range(3):  # the gates of the blocks start at zero: dropout shows once they have opened
            losses.append(trainer.train_step()["loss"])
        heldout.append([trainer.evaluate(), trainer.evaluate()])
    assert losses[2] != losses[5]
    assert all(first == second for first, second in heldout)


def test_held_out_figures_are_those_of_the_averaged_weights(config: Path, tmp_path: Path) -> None:
    trainer = Trainer(load_run(config, tmp_path / "out"), progress=False)
    for _ in range(3):
        trainer.train_step()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    averaged = trainer.evaluate()
    assert all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())
    trainer.ema.shadow = weights
    assert trainer.evaluate() != averaged
    assert set(averaged) == {"heldout_nelbo", "heldout_coded_loss"}


@pytest.mark.parametrize(("micro_batch_size", "rows"), [(1, 1), (4, 2), (8, 4)])
def test_an_evaluation_holds_no_more_rows_in_memory_than_a_step(
    micro_batch_size: int, rows: int, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []

    def spy(*arguments: Any, num_draws: int, **options: Any) -> Any:
        sizes.append((len(arguments[3]), num_draws))
        return estimate_likelihood(*arguments, num_draws=num_draws, **options)

    monkeypatch.setattr(trainer_module, "estimate_likelihood", spy)
    flags = ["--micro-batch-size", str(micro_batch_size)]
    Trainer(load_run(config, tmp_path / "out", *flags), progress=False).evaluate()
    assert sizes == [(rows, 2)] * (4 // rows)


def test_metrics_are_due_at_their_steps(config: Path, tmp_path: Path) -> None:
    flags = ["--log-every", "4", "--eval-every", "3", "--steps", "10"]
    train(load_run(config, tmp_path / "out", *flags), progress=False)
    lines = metrics_of(tmp_path / "out")
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 10]
    assert [line["step"] for line in lines if "heldout_nelbo" in line] == [3, 6, 9, 10]
    assert all({"loss", "grad_norm", "learning_rate"} <= line.keys() for line in lines)
    first = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[0])
    assert first["tokens_per_s"] > 0


def test_a_save_is_due_after_so_many_steps_and_after_so_much_time(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, saved = [1000.0], []
    take_step = Trainer.train_step

    def slow_step(self: Trainer) -> dict[str, float]:
        now_s[0] += 10
        return take_step(self)

    monkeypatch.setattr(Trainer, "train_step", slow_step)
    monkeypatch.setattr(Trainer, "save", lambda self: saved.append(self.step))
    monkeypatch.setattr("training.train.time.monotonic", lambda: now_s[0])
    for name, (flags, expected) in {
        "time": (["--save-every", "100", "--save-every-s", "25"], [3, 6, 7]),
        "both": (["--save-every", "5", "--save-every-s", "25"], [3, 5, 7]),
        "end": (["--save-every", "100", "--save-every-s", "70"], [7]),
    }.items():
        saved.clear()
        run = load_run(config, tmp_path / name, "--steps", "7", *flags)
        trainer = train(run, progress=False)
        assert (trainer.step, sorted(set(saved))) == (7, expected)


@pytest.mark.parametrize(
    ("log_every", "rates"), [("1", {1: 1 / 4, 2: 1 / 8, 3: 1 / 12}), ("2", {2: 2 / 12, 3: 1 / 12})]
)
def test_rates_are_of_the_steps_since_the_last_line(
    log_every: str, rates: dict[int, float], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, take_step = [0.0], Trainer.train_step

    def slow_step(self: Trainer) -> dict[str, float]:
        now_s[0] += 4.0 * (self.step + 1)
        return take_step(self)

    monkeypatch.setattr(Trainer, "train_step", slow_step)
    monkeypatch.setattr("training.train.time.monotonic", lambda: now_s[0])
    train(load_run(config, tmp_path, "--steps", "3", "--log-every", log_every), progress=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = {step: 8 * 16 * steps_per_s for step, steps_per_s in rates.items()}
    assert {line["step"]: line["tokens_per_s"] for line in lines} == pytest.approx(expected)


def test_the_options_of_the_corpus_and_the_seed_of_the_codec_count(config: Path, tmp_path: Path) -> None:
    flags = ["--data.document-separator", "file", "--codec.permuted"]
    runs = [load_run(config, tmp_path / seed, *flags, "--seed", seed) for seed in ("1", "2")]
    Trainer(runs[0], progress=False)
    assert read_manifest(config.parent / "shards" / "train").num_documents == 1
    first, second = (codec_permutation(run) for run in runs)
    assert first is not None and second is not None and not torch.equal(first, second)


def test_a_permuted_codec_is_saved_with_the_model(config: Path, tmp_path: Path) -> None:
    from prime_core.checkpoint import load_checkpoint

    flags = ["--steps", "1", "--codec.permuted", "--data.heldout"]
    trainer = train(load_run(config, tmp_path / "out", *flags), progress=False)
    saved = load_checkpoint(tmp_path / "out/checkpoint").codec.permutation
    assert saved is not None
    assert torch.equal(saved, trainer.codec.permutation)
    assert not torch.equal(saved, torch.arange(257))


def test_tiny_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve steps of half the batch and half the length: the loss falls by more than one nat per byte."""
    monkeypatch.chdir(ROOT)
    flags = {"output": tmp_path / "out", "data.cache": tmp_path / "shards", "num-threads": 1, "steps": 12}
    flags |= {"decay-steps": 0, "warmup-steps": 4, "batch-size": 8, "micro-batch-size": 8, "model.length": 64}
    flags |= {"log-every": 1, "eval-every": 12, "eval-rows": 8}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    train(load_train_config(["--config=training/configs/tiny.toml", *arguments]), progress=False)
    losses = [line["loss"] for line in metrics_of(tmp_path / "out")]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 1.0


@pytest.mark.parametrize(("precision", "is_told"), [("bfloat16", True), ("float32", False)])
def test_a_processor_that_is_slow_at_bfloat16_is_told_of(
    precision: str,
    is_told: bool,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.train.has_bfloat16", lambda device: False)
    output = str(config.parent / precision)
    arguments = ["--config", str(config), "--output", output, "--steps", "1", "--precision", precision]
    assert main(arguments) == 0
    assert ("try --precision float32" in capsys.readouterr().err) == is_told


def _run_main(config: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Run the command, which must fail with one line; return it."""
    output = config.parent / "failed"
    assert main(["--config", str(config), "--output", str(output), *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("prime-train: ")]
    assert printed.err.splitlines()[-1:] == lines
    assert not (output / "state.safetensors").exists()
    return lines[0]


def test_invalid_utf8_is_reported_with_file_and_offset(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = config.parent / "train.txt"
    corpus.write_bytes(b"good words\nbad \xff byte\n" + corpus.read_bytes())
    error = _run_main(config, capsys)
    assert f"{corpus}: invalid UTF-8 at byte offset 15 (line 2)" in error


def test_an_empty_folder_is_reported(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = config.parent / "empty"
    empty.mkdir()
    assert f"{empty}: no .txt or .jsonl files" in _run_main(config, capsys, "--data.train", str(empty))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--codec.vocab-size", "200"], "the tokenizer has 257 tokens, but codec.vocab_size is 200; set codec"),
        (["--codec.target-length", "3"], r"model.hidden_size (16) must be a multiple of codec.target_length (3)"),
        (["--codec.target-length", "10", "--model.hidden-size", "20"], "target_length must be 1..9 for vocab"),
        (["--model.length", "100000"], "data.train has "),
        (["--model.length", "80"], "data.heldout has 70 tokens, less than one row (model.length = 80)"),
        (["--data.tokenizer-folder", "/absent"], "tokenizer file /absent/bytes.tiktoken is missing"),
        (["--device", "cuda:77"], "device is 'cuda:77', but torch sees no GPU"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_reported(
    flags: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in _run_main(config, capsys, *flags)


def test_held_out_files_must_not_be_trained_on(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config.parent
    error = _run_main(config, capsys, "--data.train", str(folder / "train.txt"), str(folder / "heldout.txt"))
    assert "heldout.txt is in data.train and in data.heldout" in error


def test_shards_of_another_corpus_are_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(config), "--output", str(config.parent / "first"), "--steps", "1"]) == 0
    capsys.readouterr()
    corpus = config.parent / "train.txt"
    corpus.write_text(corpus.read_text() + " and more")
    assert "were built with different sources: remove the folder" in _run_main(config, capsys)


def test_a_broken_rank_file_is_reported(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = config.parent / "bytes.tiktoken"
    write_byte_ranks(ranks)
    ranks.write_text(ranks.read_text().replace("AA== 0", "!!!! 0"))
    assert f"{ranks}" in _run_main(config, capsys)


def test_a_checkpoint_says_how_long_its_run_was_to_go_on(config: Path, tmp_path: Path) -> None:
    run = load_run(config, tmp_path, "--steps", "9", "--decay-steps", "3")
    Trainer(run, progress=False).save()
    provenance = load_checkpoint(tmp_path / "checkpoint").config.provenance
    assert (provenance["step"], provenance["steps"], provenance["decay_steps"]) == (0, 9, 3)
    assert provenance["training"]["seed"] == run.seed
