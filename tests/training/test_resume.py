"""A run that was killed, stopped or ran out of disk goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from prime_core.checkpoint import load_checkpoint
from prime_core.config import Config
from tests.training.small_run import assert_same_run, load_run, metrics_of, state_of, write_run
from training import trainer as trainer_module
from training.state import STATE_NAME, StateError, exclusive_run
from training.train import main, train
from training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
COMMITS_PER_SAVE = 14  # more than the calls that make one save durable


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the runs themselves: more only wait for each other at this size
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def unbroken(config: Path) -> Path:
    """The output folder of the run that nothing disturbs."""
    output = config.parent / "unbroken"
    assert train(load_run(config, output), progress=False).step == 24
    return output


def interrupt_run(config: Path, output: Path, kills: list[str]) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.interrupted_run", str(config), str(output), *kills],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    assert result["status"] == 0, done.stderr
    assert result["killed"] == len(kills), result
    return result


def test_kill_9_at_random_points(config: Path, unbroken: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    kills = [f"step:{random.integers(1, 8)}:{random.integers(0, 30)}" for _ in range(5)]
    result = interrupt_run(config, tmp_path / "run", ["step:1:0", *kills[:2]])
    assert result["lines_lost"] > 0  # a kill that loses no step would prove nothing
    assert_same_run(tmp_path / "run", unbroken)


def test_kill_9_at_every_commit_of_a_save(config: Path, tmp_path: Path) -> None:
    changes = {'"coded"': '"nelbo"', '"float32"': '"bfloat16"', "steps = 24": "steps = 32"}
    text = config.read_text().replace("save_every = 4", "save_every = 2")
    for old, new in changes.items():
        text = text.replace(old, new, 1)
    nelbo = config.with_name("nelbo.toml")
    nelbo.write_text(text)
    train(load_run(nelbo, tmp_path / "expected"), progress=False)
    result = interrupt_run(nelbo, tmp_path / "run", [f"commit:{n}" for n in range(1, COMMITS_PER_SAVE + 1)])
    assert result["checkpoints"] > 0
    assert_same_run(tmp_path / "run", tmp_path / "expected")


def test_ctrl_c_of_the_command_saves_and_the_same_command_goes_on(
    config: Path, unbroken: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-m", "training.train", "--config", str(config), "--output", str(output)]
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        before = len(metrics_of(output)) if output.exists() else 0
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
        )
        _wait_for_lines(output, before + 2, process)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
        assert process.returncode == status, errors
    assert "the same command goes on" in printed
    step = int(state_of(output)[0]["step"])
    assert 2 < step < 24
    assert metrics_of(output)[-1]["step"] == step
    assert train(load_run(config, output), progress=False).step == 24
    assert_same_run(output, unbroken)


def _wait_for_lines(output: Path, count: int, process: subprocess.Popen[str]) -> None:
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 60
    # A resumed run first drops lines, so its first new one is waited for by time as well.
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_handlers_come_back(
    number: signal.Signals, config: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step = Trainer.train_step

    def signalled(self: Trainer) -> dict[str, float]:
        if self.step == 5:
            signal.raise_signal(number)
            assert signal.getsignal(number) is signal.SIG_DFL  # a second one ends the process
        return take_step(self)

    before = signal.getsignal(number)
    run = load_run(config, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        assert train(run, progress=False).step == 6
    assert signal.getsignal(number) is before
    assert load_checkpoint(tmp_path / "run/checkpoint").config.provenance["step"] == 6
    train(run, progress=False)
    assert_same_run(tmp_path / "run", unbroken)


def test_a_longer_run_continues_a_shorter_one(config: Path, unbroken: Path, tmp_path: Path) -> None:
    train(load_run(config, tmp_path / "run", "--steps", "8"), progress=False)
    train(load_run(config, tmp_path / "run"), progress=False)
    assert_same_run(tmp_path / "run", unbroken)


def test_steps_below_what_is_done_are_refused(config: Path, unbroken: Path) -> None:
    with pytest.raises(ValueError, match="at step 24, past steps = 8; raise steps"):
        train(load_run(config, unbroken, "--steps", "8"), progress=False)


def test_a_finished_run_stays_as_it_is(config: Path, unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    assert train(load_run(config, tmp_path / "run"), progress=False).step == 24
    assert_same_run(tmp_path / "run", unbroken)


def test_a_second_trainer_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    with exclusive_run(output):
        assert main(["--config", str(config), "--output", str(output)]) == 2
    assert "another trainer is writing here" in capsys.readouterr().err
    with exclusive_run(output):  # and the lock goes with its holder
        pass


def test_other_settings_are_refused_by_name(config: Path, unbroken: Path) -> None:
    with pytest.raises(
        StateError, match=r"other settings \(learning_rate: 0.003 there, 0.1 here, model.drop"
    ):
        train(load_run(config, unbroken, "--learning-rate", "0.1", "--model.dropout", "0.2"), progress=False)


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "bfloat16"],
        ["--warmup-steps", "5"],
        ["--seed", "2"],
        ["--eps", "0.5"],
        ["--objective", "nelbo"],
        ["--carry-over", "false"],
        ["--weighted", "false"],
        ["--batch-size", "4"],
        ["--micro-batch-size", "2"],
        ["--chunk-rows", "32"],
        ["--beta1", "0.5"],
        ["--beta2", "0.5"],
        ["--weight-decay", "0.1"],
        ["--grad-clip", "0.5"],
        ["--ema-decay", "0.5"],
        ["--ema-warmup", "false"],
        ["--codec.permuted", "true"],
        ["--model.dropout", "0.2"],
    ],
)
def test_what_changes_a_weight_may_not_change(flags: list[str], config: Path, unbroken: Path) -> None:
    name = flags[0].removeprefix("--").replace("-", "_")
    with pytest.raises(StateError, match=rf"a run with other settings \({name}: "):
        Trainer(load_run(config, unbroken, *flags), progress=False)


def test_what_changes_no_weight_may_change(
    config: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    free = {"steps": 25, "decay-steps": 1, "device": "auto", "num-threads": 2, "checkpoint-dtype": "bfloat16"}
    free |= {"log-every": 2, "eval-every": 2, "eval-rows": 2, "save-every": 2, "save-every-s": 2.0}
    free |= {"preview": 2, "preview-steps": 2}
    flags = [f"--{name}={value}" for name, value in free.items()]
    assert Trainer(load_run(config, unbroken, *flags), progress=False).step == 24


def test_a_loss_that_is_not_finite_stops_before_the_update(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    loss_of, calls = trainer_module.training_loss, [0]

    def nan_at_step_6(*arguments: object, **options: object) -> torch.Tensor:
        calls[0] += 1
        loss: torch.Tensor = loss_of(*arguments, **options)  # type: ignore[arg-type]
        return loss * float("nan") if calls[0] == 2 * 6 + 1 else loss

    monkeypatch.setattr(trainer_module, "training_loss", nan_at_step_6)
    trainer = Trainer(load_run(config, tmp_path / "by-hand"), progress=False)
    for _ in range(6):
        trainer.train_step()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(FloatingPointError, match="step 6: loss nan"):
        trainer.train_step()
    assert all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())
    assert trainer.ema.num_updates == trainer.step == 6

    calls[0] = 0
    assert main(["--config", str(config), "--output", str(output)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("prime-train: step 6: loss nan")
    metadata, tensors = state_of(output)
    assert metadata["step"] == "4"
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert load_checkpoint(output / "checkpoint").config.provenance["step"] == 4


def test_a_gradient_that_is_not_finite_stops_before_the_update(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(load_run(config, tmp_path), progress=False)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.inf))
    with pytest.raises(FloatingPointError, match=r"step 0: loss [0-9.]+, gradient norm inf; training stops"):
        trainer.train_step()
    assert all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())
    assert trainer.ema.num_updates == trainer.step == 0


def test_weights_that_are_not_finite_are_not_saved(config: Path, tmp_path: Path) -> None:
    trainer = Trainer(load_run(config, tmp_path), progress=False)
    trainer.save()
    before = (tmp_path / STATE_NAME).read_bytes()
    trainer.train_step()
    next(trainer.model.parameters()).data[0] = torch.inf
    with pytest.raises(FloatingPointError, match="not finite; nothing was saved"):
        trainer.save()
    assert (tmp_path / STATE_NAME).read_bytes() == before


def test_a_full_disk_leaves_the_last_state_and_the_run_goes_on_from_it(
    config: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    run = load_run(config, output)
    train(load_run(config, output, "--steps", "8"), progress=False)
    saved = {p: p.read_bytes() for p in output.rglob("*") if p.is_file() and p.name != "metrics.jsonl"}
    for name in ("metrics.jsonl", ".state.safetensors.partial"):
        with monkeypatch.context() as patch:
            _fill_disk_at_fsync_of(patch, name)
            with pytest.raises(StateError, match=r"cannot save step 12 .* No space left .* on from step 8"):
                train(run, progress=False)
        assert {path: path.read_bytes() for path in saved} == saved
        assert not list(output.rglob("*.partial"))
    with monkeypatch.context() as patch:
        _fill_disk_at_fsync_of(patch, ".model.safetensors.partial")
        with pytest.raises(StateError, match="goes on from step 12"):  # the state was saved before
            train(run, progress=False)
    assert load_checkpoint(output / "checkpoint").config.provenance["step"] == 8
    train(run, progress=False)
    assert_same_run(output, unbroken)


def test_a_full_disk_for_metrics_is_reported_with_the_file(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "metrics.jsonl").write_text('{"step": 3}\n')  # of a run that saved nothing
    _fill_disk_at_fsync_of(monkeypatch, ".metrics.jsonl.partial")
    assert main(["--config", str(config), "--output", str(output)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"prime-train: cannot write {output}/metrics.jsonl: No space left on device;")
    assert (output / "metrics.jsonl").read_text() == '{"step": 3}\n'


def test_metrics_are_on_disk_before_the_state_that_goes_on_from_them(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        happened.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    train(load_run(config, tmp_path / "run", "--steps", "1"), progress=False)
    names = ("metrics.jsonl", ".state.safetensors.partial")
    assert [name for name in happened if name in names] == list(names)


def test_lines_of_lost_steps_and_a_line_that_was_cut_are_dropped(
    config: Path, unbroken: Path, tmp_path: Path
) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    for rest in (b'{"step": 25, "loss": 1.0}\n', b'{"step": 24}', b'{"loss": 1.0}\n', b"[]\n", b"\xff\n"):
        path.write_bytes(whole + rest)
        train(load_run(config, tmp_path / "run"), progress=False)
        assert path.read_bytes() == whole


def test_a_kill_between_the_last_state_and_its_checkpoint(
    config: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(config, tmp_path / "run")
    with monkeypatch.context() as patch:
        save_checkpoint = trainer_module.save_checkpoint

        def die_at_the_end(folder: Path, checkpoint_config: Config, *rest: object, **options: object) -> None:
            if checkpoint_config.provenance["step"] == 24:
                raise KeyboardInterrupt
            save_checkpoint(folder, checkpoint_config, *rest, **options)  # type: ignore[arg-type]

        patch.setattr(trainer_module, "save_checkpoint", die_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            train(run, progress=False)
    assert state_of(tmp_path / "run")[0]["step"] == "24"
    assert load_checkpoint(tmp_path / "run/checkpoint").config.provenance["step"] == 20
    train(run, progress=False)
    assert_same_run(tmp_path / "run", unbroken)


def _fill_disk_at_fsync_of(patch: pytest.MonkeyPatch, name: str) -> None:
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    patch.setattr(os, "fsync", full)
