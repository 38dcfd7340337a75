"""prime-sample: the same lines as the library gives, whole lines only, and files that are continued."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from prime_core.checkpoint import load_checkpoint
from prime_core.sampling.sample import sample
from prime_core.sampling.stepper import AnyRow, QueuedCall, Stepper
from tests.training.test_evaluate import write_checkpoint
from training import row_loop
from training.evaluate import main as evaluate_main
from training.sample import SampleConfig, main, write_samples


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path)


def _write(checkpoint: Path, output: Path, **settings: Any) -> int:
    settings = {"n": 5, "steps": 8, "seed": 3, "prompt": "a b", "device": "cpu", **settings}
    return write_samples(SampleConfig(checkpoint=checkpoint, output=output, **settings), progress=False)


def _lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_bytes().decode().split("\n")[:-1]]


def test_lines_are_what_the_library_gives(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert _write(checkpoint, output, suffix="z", top_k=50) == 5
    expected = sample(load_checkpoint(checkpoint), n=5, steps=8, seed=3, prompt="a b", suffix="z", top_k=50)
    lines = _lines(output)
    assert [line["index"] for line in lines] == list(range(5))
    for line, one in zip(lines, expected, strict=True):
        assert (line["text"], line["token_ids"], line["seed"]) == (one.text, one.token_ids, one.seed)
        assert (line["nfe"], line["steps"], line["steps_skipped"]) == (one.nfe, 8, 8 - one.nfe)
        assert line["text"].startswith("a b")
        assert line["text"].endswith("z")
    assert len({line["text"] for line in lines}) > 1


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.3},
        {"max_tokens": 4},
        {"temperature": 0.25},
        {"prompt": None},
        {"steps": "exact"},
    ],
)
def test_every_setting_reaches_the_rows(settings: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    settings = {"steps": 8, "seed": 3, "prompt": "a b", **settings}
    _write(checkpoint, tmp_path / "out.jsonl", **settings)
    expected = sample(load_checkpoint(checkpoint), n=5, **settings)
    assert [line["token_ids"] for line in _lines(tmp_path / "out.jsonl")] == [
        one.token_ids for one in expected
    ]
    assert [line["text"] for line in _lines(tmp_path / "out.jsonl")] == [one.text for one in expected]


def test_a_stop_string_ends_the_text(checkpoint: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"n": 1, "steps": 8, "seed": 3, "prompt": "a b"}
    (plain,) = sample(load_checkpoint(checkpoint), **settings)
    settings["stop"] = (next(char for char in plain.text[4:] if char.isascii()),)
    (stopped,) = sample(load_checkpoint(checkpoint), **settings)
    _write(checkpoint, tmp_path / "out.jsonl", **settings)
    assert _lines(tmp_path / "out.jsonl")[0]["text"] == stopped.text != plain.text


def test_a_line_is_there_as_soon_as_it_is_done_and_all_are_on_disk_at_the_end(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, synced, seen = tmp_path / "out.jsonl", [], []
    finish = row_loop.finish_row

    def look(*arguments: Any) -> Any:
        seen.append(output.read_bytes().count(b"\n"))
        return finish(*arguments)

    monkeypatch.setattr(row_loop, "finish_row", look)
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number)[1:3]))
    _write(checkpoint, output, max_rows=1)
    assert seen == [0, 1, 2, 3, 4]
    assert synced[-1] == output.stat()[1:3]


def test_a_file_that_was_emptied_keeps_its_request(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    _write(checkpoint, output)
    whole = output.read_bytes()
    output.write_bytes(b"")
    with pytest.raises(ValueError, match=r"another request \(other seed\)"):
        _write(checkpoint, output, seed=0)
    assert _write(checkpoint, output, seed=None) == 5
    assert output.read_bytes() == whole


def test_the_number_of_rows_at_a_time_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    for max_rows in (1, 2, 64):
        _write(checkpoint, tmp_path / f"{max_rows}.jsonl", max_rows=max_rows)
    first = (tmp_path / "1.jsonl").read_bytes()
    assert (tmp_path / "2.jsonl").read_bytes() == (tmp_path / "64.jsonl").read_bytes() == first


@pytest.mark.parametrize(("max_rows", "most"), [(1, 1), (2, 2), (64, 5)])
def test_calls_hold_as_many_rows_as_are_allowed_and_no_more(
    max_rows: int, most: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    queue = Stepper.queue

    def noted(self: Stepper, rows: Sequence[AnyRow]) -> QueuedCall:
        sizes.append(len(rows))
        return queue(self, rows)

    monkeypatch.setattr(Stepper, "queue", noted)
    _write(checkpoint, tmp_path / "out.jsonl", max_rows=max_rows)
    assert max(sizes) == most


@pytest.mark.parametrize("cut", [0, 1, 40, -1, -30])
def test_a_file_that_was_cut_short_is_continued(cut: int, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    _write(checkpoint, output)
    whole = output.read_bytes()
    output.write_bytes(whole[:cut])
    missing = 5 - whole[:cut].count(b"\n")
    assert _write(checkpoint, output, seed=None) == missing > 0
    assert output.read_bytes() == whole


def test_more_samples_are_added(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert _write(checkpoint, output, n=2) == 2
    assert _write(checkpoint, output, n=5) == 3
    assert _write(checkpoint, output, n=4) == 0
    _write(checkpoint, tmp_path / "at-once.jsonl", n=5)
    assert output.read_bytes() == (tmp_path / "at-once.jsonl").read_bytes()


def test_an_interruption_leaves_whole_lines_and_is_continued(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import row_loop as module

    output = tmp_path / "out.jsonl"
    finish, calls = module.finish_row, [0]

    def interrupted(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return finish(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "finish_row", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _write(checkpoint, output, max_rows=1)
    assert [line["index"] for line in _lines(output)] == [0, 1, 2]
    assert _write(checkpoint, output) == 2
    _write(checkpoint, tmp_path / "at-once.jsonl")
    assert output.read_bytes() == (tmp_path / "at-once.jsonl").read_bytes()


def test_a_drawn_seed_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    _write(checkpoint, output, seed=None, n=2)
    _write(checkpoint, output, seed=None, n=3)
    request = json.loads((tmp_path / "out.jsonl.request.json").read_text())
    assert request["dtype"] == "float32"  # what "auto" became
    seed = request["seed"]
    assert _lines(output)[0]["seed"] == seed
    _write(checkpoint, tmp_path / "again.jsonl", seed=seed, n=3)
    assert _lines(tmp_path / "again.jsonl") == _lines(output)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"steps": 9}, "steps"),
        ({"seed": 4}, "seed"),
        ({"prompt": None, "temperature": 0.5}, "prompt, temperature"),
        ({"stop": ("x",)}, "stop"),
    ],
)
def test_another_request_is_refused_by_name(
    settings: dict[str, Any], names: str, checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    _write(checkpoint, output)
    before = output.read_bytes()
    with pytest.raises(ValueError, match=rf"another request \(other {names}\); choose .* --overwrite"):
        _write(checkpoint, output, **settings)
    assert output.read_bytes() == before
    assert _write(checkpoint, output, overwrite=True, **settings) == 5
    request = json.loads((tmp_path / "out.jsonl.request.json").read_text())
    assert {name: request[name] for name in settings} == json.loads(json.dumps(settings))


def test_another_checkpoint_of_the_same_name_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    _write(checkpoint, output)
    other = write_checkpoint(tmp_path, 1)
    for path in other.iterdir():
        path.replace(checkpoint / path.name)
    with pytest.raises(ValueError, match=r"\(other checkpoint\)"):
        _write(checkpoint, output)


def test_a_file_of_other_origin_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "notes.jsonl"
    output.write_text("my notes\n")
    with pytest.raises(ValueError, match=r"notes.jsonl exists, but notes.jsonl.request.json, .* is missing"):
        _write(checkpoint, output)
    assert output.read_text() == "my notes\n"


def test_a_file_that_was_edited_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    _write(checkpoint, output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[0] + lines[2])
    with pytest.raises(ValueError, match="line 2: not sample 1; the file was changed"):
        _write(checkpoint, output)


def test_two_programs_do_not_write_one_file(checkpoint: Path, tmp_path: Path) -> None:
    from training.sample_request import exclusive_file

    output = tmp_path / "out.jsonl"
    with exclusive_file(output), pytest.raises(ValueError, match="another program is writing here"):
        _write(checkpoint, output)


def test_exact_steps_and_nothing_to_fill(checkpoint: Path, tmp_path: Path) -> None:
    _write(checkpoint, tmp_path / "exact.jsonl", steps="exact", max_tokens=3, n=1)
    line = _lines(tmp_path / "exact.jsonl")[0]
    assert (line["steps"], line["nfe"], line["steps_skipped"]) == ("exact", 6, 0)


@pytest.mark.parametrize("command", [main, evaluate_main])
def test_a_command_without_arguments_says_what_it_needs(
    command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command([]) == 2
    assert "--checkpoint is missing: give it as a flag" in capsys.readouterr().err


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.jsonl"
    arguments = ["--checkpoint", str(checkpoint), "--output", str(output), "-n", "2", "--steps", "4"]
    assert main([*arguments, "--max-tokens", "4", "--stop", "q", "x"]) == 0
    assert capsys.readouterr().out == f"{output}: 2 samples written, 0 were there\n"
    assert len(_lines(output)) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps: must be an integer of at least 1, or exact"),
        (["--steps", "2.5"], "--steps: must be"),
        (["--temperature", "101"], "--temperature: input should be less than or equal to 100"),
        (["--top-p", "0"], "--top-p: input should be greater than 0"),
        (["--seed", str(2**64)], "--seed: input should be less than"),
        (["-n", "0"], "--n: input should be greater than or equal to 1"),
        (["--prompt", "x" * 17], "context"),
        (["--prompt", "x", "--suffix", "y", "--stop", "z"], "stop"),
        (["--output", "/absent/out.jsonl"], "the folder /absent does not exist"),
        (["--output", "/"], "--output: / is a folder; name a file, as in /samples.jsonl"),
        (["--checkpoint", "/absent"], "/absent"),
    ],
)
def test_errors_are_one_line_and_leave_no_file(
    flags: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    assert main(["--checkpoint", str(checkpoint), "--output", str(output), *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err.splitlines()[-1]
    assert printed.err.splitlines()[-1].startswith("prime-sample: ")
    assert not output.exists()
