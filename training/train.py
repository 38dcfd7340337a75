"""`prime-train`: from text or images to a checkpoint the server loads; stops, resumes and reports.

prime-train --config training/configs/X.toml [--key value ...]
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Self, TextIO

import torch

from prime_core.atomic import atomic_write
from prime_core.device import has_bfloat16
from training.config import TrainConfig, load_train_config
from training.images.preview import PREVIEW_NAME
from training.progress import progress_bar
from training.state import StateError, exclusive_run
from training.trainer import CHECKPOINT_NAME, Trainer

METRICS_NAME = "metrics.jsonl"
_SHOWN = ("loss", "heldout_nelbo", "heldout_bpd")  # in the progress bar
_STOPPED = 130  # what shells show for a program that Ctrl-C ended


def train(config: TrainConfig, *, progress: bool = True) -> Trainer:
    """Run a training to its end; SIGINT and SIGTERM save and stop early.

    Args:
        config: the run.
        progress: show progress bars.

    Returns:
        The trainer, at the last step reached, which is saved.

    Raises:
        ValueError: bad settings or data, or a save failed; the last saved state stands.
        FloatingPointError: the loss is not finite; the last saved state stands.
        OSError: a file cannot be read or written.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    with exclusive_run(config.output):
        trainer = Trainer(config, progress=progress)
        if progress and config.precision == "bfloat16" and not has_bfloat16(trainer.device):
            print("prime-train: this processor is slow at bfloat16; try --precision float32", file=sys.stderr)
        with _stop_on_signal() as stopped, _Report(trainer, progress) as report:
            saved_at = time.monotonic()
            while trainer.step < config.steps and not stopped:
                started = time.monotonic()
                record = trainer.train_step()
                report.advance(time.monotonic() - started)
                is_last = trainer.step == config.steps
                is_evaluated = is_last or trainer.step % config.eval_every == 0
                evaluated = trainer.evaluate() if is_evaluated else {}
                if is_last or evaluated or trainer.step % config.log_every == 0:
                    report.write(trainer.step, record | evaluated)
                if is_evaluated:
                    _write_preview(trainer)
                is_late = time.monotonic() - saved_at > config.save_every_s
                if is_last or is_late or trainer.step % config.save_every == 0:
                    _save(trainer, report)
                    saved_at = time.monotonic()
            if trainer.exported_step < trainer.step:
                _save(trainer, report)
    return trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0 finished, 2 an error, 130 stopped by a signal."""
    try:
        config = load_train_config(argv)
        trainer = train(config)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"prime-train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prime-train: stopped before the first step", file=sys.stderr)
        return _STOPPED
    checkpoint = config.output / CHECKPOINT_NAME
    if trainer.step < config.steps:
        print(f"stopped and saved at step {trainer.step}; the same command goes on from here: {checkpoint}")
        return _STOPPED
    print(f"finished at step {trainer.step}: {checkpoint}")
    return 0


class _Report:
    """The progress bar and metrics.jsonl, one JSON object a line."""

    def __init__(self, trainer: Trainer, progress: bool) -> None:
        config, step = trainer.config, trainer.step
        self._per_step = {"tokens_per_s": config.batch_size * config.model.length}
        if trainer.data.num_dimensions is not None:
            self._per_step["images_per_s"] = config.batch_size
        self._steps, self._seconds = 0, 0.0  # since the last line
        self._path = config.output / METRICS_NAME
        with _full_disk_named(self._path):
            _forget_steps_after(self._path, step)
            self._file: TextIO = self._path.open("a", encoding="utf-8")
        self._bar = progress_bar(total=config.steps, initial=step, unit="step", shown=progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._bar.close()

    def advance(self, seconds: float) -> None:
        """Count one step that took so long."""
        self._steps, self._seconds = self._steps + 1, self._seconds + seconds
        self._bar.update()

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Append a line and show its main figures."""
        rates = {name: self._steps * amount / self._seconds for name, amount in self._per_step.items()}
        self._steps, self._seconds = 0, 0.0
        with _full_disk_named(self._path):
            self._file.write(json.dumps({"step": step, **rates, **record}) + "\n")
            self._file.flush()
        shown = {key: f"{record[key]:.3f}" for key in _SHOWN if key in record}
        speed = {name.replace("_per_", "/"): f"{rate:.0f}" for name, rate in rates.items()}
        self._bar.set_postfix({**shown, **speed}, refresh=False)

    def sync(self) -> None:
        """Flush the lines to disk, so that they are no older than the state that is saved next."""
        self._file.flush()
        os.fsync(self._file.fileno())


def _write_preview(trainer: Trainer) -> None:
    picture = trainer.preview()
    if picture is not None:
        path = trainer.config.output / PREVIEW_NAME
        with _full_disk_named(path):
            atomic_write(path, picture)


def _save(trainer: Trainer, report: _Report) -> None:
    """Save and say what to do if the disk is full."""
    try:
        report.sync()
        trainer.save()
    except OSError as error:
        last = f"step {trainer.saved_step}" if trainer.saved_step >= 0 else "the start"
        raise StateError(
            f"cannot save step {trainer.step} to {trainer.config.output}: {error.strerror or error}; what "
            f"was saved before stands. Free space and run the same command: it goes on from {last}"
        ) from error


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    """Say in an error which file could not be written: write and fsync do not."""
    try:
        yield
    except OSError as error:
        raise StateError(
            f"cannot write {path}: {error.strerror or error}; what was saved before stands. Free space and run "
            "the same command"
        ) from error


def _forget_steps_after(path: Path, step: int) -> None:
    """Drop metrics of steps that were lost with a killed run; they will be taken, and written, again."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if kept != lines:
        atomic_write(path, b"".join(kept))


def _step_of(line: bytes) -> float:
    """Return the step of a line of metrics; infinity if it was cut short."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


@contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying; the second signal of a kind dies as usual."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    raise SystemExit(main())
