"""prime-eval: every token counts once, the figures agree with one another, and errors are one line."""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prime_core.checkpoint import save_checkpoint
from prime_core.config import CodecConfig, Config, DiTConfig, LinearConfig
from prime_core.models.dit import DiT
from prime_core.tokenizer import TokenizerSpec
from tests.stubs import byte_tokenizer
from tests.training.small_run import write_byte_ranks
from training.baselines import unigram_nats, xz_bits_per_byte
from training.evaluate import BOUND, NOT_A_BOUND, EvalConfig, _figures, evaluate, main
from training.heldout import cut_rows, mean_over_rows
from training.train import main as train_main

DOCUMENTS = ["the river rises", "men build boats of wood and wait", "é: two bytes"]
NUM_BYTES = sum(len(document.encode()) for document in DOCUMENTS)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_checkpoint(
    folder: Path, target_length: int = 2, length: int = 16, *, uniform: bool = False
) -> Path:
    """A small network over bytes with random weights; its head is zero if ``uniform``."""
    ranks = folder / "bytes.tiktoken"
    write_byte_ranks(ranks)
    tokenizer = TokenizerSpec(
        kind="tiktoken_file", file="bytes.tiktoken", special_tokens={"<|endoftext|>": 256}
    )
    config = Config(
        model=DiTConfig(hidden_size=16, num_blocks=1, num_heads=2, cond_dim=4, length=length),
        codec=CodecConfig(vocab_size=257, target_length=target_length),
        schedule=LinearConfig(),
        tokenizer=tokenizer,
    )
    model = DiT(config.model, config.codec, config.schedule.build())
    generator = torch.Generator().manual_seed(target_length)
    for name, parameter in model.named_parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
        if uniform and name.startswith("output_layer.linear"):
            parameter.data.zero_()
    path = folder / f"checkpoint-{target_length}-{uniform}"
    save_checkpoint(path, config, model.state_dict(), tokenizer_file=ranks)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "heldout.txt"
    path.write_text("\n\n".join(DOCUMENTS))
    return path


def _evaluate(checkpoint: Path, text: Path, **settings: Any) -> dict[str, Any]:
    config = EvalConfig(checkpoint=checkpoint, data=(text,), device="cpu", **settings)
    return evaluate(config, progress=False)


def test_rows_hold_every_token_and_byte_once() -> None:
    tokenizer = byte_tokenizer()
    rows = cut_rows(DOCUMENTS, tokenizer, length=16)
    stream = [token for document in DOCUMENTS for token in [*document.encode(), 256]]
    assert np.concatenate([rows.row(int(index)) for index in rows.rows]).tolist() == stream
    assert rows.row_tokens.tolist()[:-1] == [16] * (len(stream) // 16)
    assert 0 < rows.row_tokens[-1] < 16
    assert (rows.row_tokens.sum(), rows.row_bytes.sum()) == (len(stream), NUM_BYTES)
    batches = list(rows.batches(2))
    assert [batch.shape for batch in batches] == [(2, 16), (1, 16), (1, len(stream) % 16)]
    assert np.concatenate([batch.ravel() for batch in batches]).tolist() == stream


def test_chosen_rows_are_spread_and_counted_alone() -> None:
    rows = cut_rows(DOCUMENTS * 10, byte_tokenizer(), length=16, max_rows=3)
    assert len(rows.rows) == 3
    assert rows.rows[0] == 0
    assert rows.row(int(rows.rows[-1])).size == rows.row_tokens[-1] < 16  # the shorter row is among them


def test_the_standard_error_is_that_of_a_ratio() -> None:
    totals, units = np.array([3.0, 5.0, 10.0]), np.array([1, 2, 3])
    mean = mean_over_rows(totals, units)
    assert mean.value == 3.0
    assert mean.standard_error == pytest.approx(math.sqrt(3 / 2 * (0 + 1 + 1)) / 6)
    assert mean_over_rows(totals[:1], units[:1]).standard_error is None


def test_equal_rows_have_the_textbook_standard_error() -> None:
    totals = np.random.default_rng(0).normal(size=50)
    expected = totals.std(ddof=1) / math.sqrt(50) / 4
    assert mean_over_rows(totals, np.full(50, 4)).standard_error == pytest.approx(expected)


def test_one_digit_and_uniform_logits_cost_log_v(tmp_path: Path, text: Path) -> None:
    report = _evaluate(write_checkpoint(tmp_path, 1, uniform=True), text, grid_steps=4)
    num_tokens = NUM_BYTES + len(DOCUMENTS)
    assert (report["num_tokens"], report["num_bytes"]) == (num_tokens, NUM_BYTES)
    estimates = report["estimates"]
    for name in ("nelbo", "coded_loss", "grid_nelbo"):
        # Each mask's estimate is exact here: n masked tokens at log V, weighted M / n. Not so for the grid.
        tolerance = 0.3 if name == "grid_nelbo" else 1e-5
        assert estimates[name]["nats_per_token"] == pytest.approx(math.log(257), rel=tolerance)
        bits = estimates[name]["nats_per_token"] * num_tokens / NUM_BYTES / math.log(2)
        assert estimates[name]["bits_per_byte"] == pytest.approx(bits)
    assert estimates["nelbo"]["ppl"] == pytest.approx(257, rel=1e-4)
    assert estimates["grid_nelbo"]["steps"] == 4


def test_the_error_per_byte_is_that_per_token_in_bits(tmp_path: Path) -> None:
    """Of a text whose tokens are bytes but for the ends of documents, which one long document has one of."""
    path = tmp_path / "long.txt"
    path.write_text("the river rises and men build boats of wood " * 20)
    report = _evaluate(write_checkpoint(tmp_path), path, num_draws=1)
    figures = report["estimates"]["nelbo"]
    assert (report["num_tokens"], report["num_bytes"]) == (881, 880)
    expected = figures["nats_per_token_standard_error"] / math.log(2)
    assert figures["bits_per_byte_standard_error"] == pytest.approx(expected, rel=0.05)


def test_documents_are_found_as_the_settings_say(tmp_path: Path, text: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    assert _evaluate(checkpoint, text, document_separator="file", rows=1)["num_documents"] == 1
    lines = tmp_path / "heldout.jsonl"
    lines.write_text('{"body": "the river"}\n')
    assert _evaluate(checkpoint, lines, text_key="body")["num_bytes"] == 9


def test_the_model_is_evaluated_in_the_type_that_is_asked_for(tmp_path: Path, text: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    reports = [_evaluate(checkpoint, text, rows=2, dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert [report["dtype"] for report in reports] == ["float32", "bfloat16"]
    full, half = (report["estimates"]["nelbo"]["nats_per_token"] for report in reports)
    assert full != half == pytest.approx(full, rel=0.05)


def test_what_no_number_holds_is_said_or_bounded() -> None:
    text = cut_rows(DOCUMENTS, byte_tokenizer(), length=16)
    figures = _figures(text, np.full(len(text.rows), 1e6), BOUND)
    assert figures["nats_per_token"] > 1e4 and math.isfinite(figures["ppl"])
    for value in (np.inf, np.nan):
        with pytest.raises(ValueError, match="no finite likelihood"):
            _figures(text, np.full(len(text.rows), value), BOUND)


def test_only_bounds_are_called_so(tmp_path: Path, text: Path) -> None:
    estimates = _evaluate(write_checkpoint(tmp_path), text, grid_steps=8)["estimates"]
    assert {name for name, figures in estimates.items() if figures["label"] == BOUND} == {
        "nelbo",
        "grid_nelbo",
    }
    assert estimates["coded_loss"]["label"] == NOT_A_BOUND
    assert {name for name, figures in estimates.items() if "ppl" in figures} == {"nelbo", "grid_nelbo"}


def test_without_steps_there_is_no_grid(tmp_path: Path, text: Path) -> None:
    assert _evaluate(write_checkpoint(tmp_path), text)["estimates"].keys() == {"nelbo", "coded_loss"}


def test_a_seed_is_a_figure_and_more_draws_agree(tmp_path: Path, text: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)

    def nelbo(**settings: Any) -> float:
        return float(_evaluate(checkpoint, text, **settings)["estimates"]["nelbo"]["nats_per_token"])

    assert nelbo(seed=3) == nelbo(seed=3) != nelbo(seed=4)
    many = nelbo(num_draws=200)
    assert nelbo(num_draws=200, seed=1, batch_rows=1) == pytest.approx(many, rel=0.03)


def test_neither_memory_nor_another_figure_changes_a_figure(tmp_path: Path, text: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)

    def figures(**settings: Any) -> dict[str, float]:
        estimates = _evaluate(checkpoint, text, seed=3, num_draws=2, **settings)["estimates"]
        return {name: each["nats_per_token"] for name, each in estimates.items()}

    plain = figures()
    assert figures(batch_rows=1) == pytest.approx(plain, rel=1e-6)
    assert figures(batch_rows=3, chunk_rows=5) == pytest.approx(plain, rel=1e-6)
    both = figures(grid_steps=4)
    assert {name: both[name] for name in plain} == plain
    assert figures(grid_steps=4, batch_rows=2) == pytest.approx(both, rel=1e-6)


def test_baselines(text: Path, tmp_path: Path) -> None:
    training = tmp_path / "training.txt"
    training.write_text("\n\n".join([*DOCUMENTS, "more words"]))
    report = _evaluate(write_checkpoint(tmp_path), text, baselines=(training,))
    baselines = report["baselines"]
    alone = 8 * len(
        lzma.compress("".join(d + "\0" for d in DOCUMENTS).encode(), preset=9 | lzma.PRESET_EXTREME)
    )
    assert baselines["xz"]["bits_per_byte"] == pytest.approx(alone / NUM_BYTES)
    # The training text holds the text: what it adds is little.
    assert baselines["xz_given_training"]["bits_per_byte"] < baselines["xz"]["bits_per_byte"] / 4
    rows = cut_rows(DOCUMENTS, byte_tokenizer(), 16)
    nats = unigram_nats(rows, ["ab", "b"], byte_tokenizer())
    counts = {ord("a"): 1, ord("b"): 2, 256: 2}
    stream = [token for document in DOCUMENTS for token in [*document.encode(), 256]]
    expected = sum(-math.log((counts.get(token, 0) + 1) / (5 + 257)) for token in stream)
    assert nats.sum() == pytest.approx(expected)
    assert baselines["unigram"]["nats_per_token"] < math.log(257)
    assert xz_bits_per_byte(DOCUMENTS) == baselines["xz"]["bits_per_byte"]


def test_the_command_prints_json_or_a_table(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path)
    arguments = ["--checkpoint", str(checkpoint), "--data", str(text), "--device", "cpu"]
    assert main([*arguments, "--json", "--num-draws", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_documents"] == 3
    assert report["estimates"]["nelbo"]["bits_per_byte_standard_error"] > 0
    assert main([*arguments, "--baselines", str(text)]) == 0
    table = capsys.readouterr().out
    for words in ("likelihood bound", "not a bound for target_length > 1", "unigram", "xz -9e", "±"):
        assert words in table


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "/absent"], "/absent"),
        (["--data", "/absent.txt"], "/absent.txt: no such file or folder"),
        (["--length", "17"], "--length is 17, but the model's context holds 16 tokens"),
        (["--num-draws", "0"], "--num-draws: input should be greater than or equal to 1"),
        (["--baselines", "/absent.txt"], "/absent.txt: no such file or folder"),
    ],
)
def test_errors_are_one_line(
    flags: list[str], message: str, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(write_checkpoint(tmp_path)), "--data", str(text), *flags]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1].startswith("prime-eval: ")
    assert message in printed.err.splitlines()[-1]


def test_a_toy_checkpoint_is_told_where_its_evaluation_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(__file__).resolve().parents[2] / "training" / "configs" / "toy2d.toml"
    sizes = [
        "--steps",
        "1",
        "--batch-size",
        "8",
        "--micro-batch-size",
        "8",
        "--eval-rows",
        "8",
        "--preview",
        "0",
    ]
    device = ["--device", "cpu", "--num-threads", "1", "--decay-steps", "0"]
    run = tmp_path / "run"
    assert train_main(["--config", str(config), "--output", str(run), *sizes, *device]) == 0
    capsys.readouterr()
    for flags in ([], ["--data", "x.txt"]):
        assert main(["--checkpoint", str(run / "checkpoint"), *flags]) == 2
        error = capsys.readouterr().err
        assert "no evaluation beyond that of its training: heldout_nelbo" in error and error.count("\n") == 1
    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"heldout_nelbo", "heldout_entropy"} <= metrics.keys()
