"""Run a training to its end in many processes, each but the last killed with SIGKILL.

    python -m tests.training.interrupted_run CONFIG OUTPUT KILL ...

A KILL is "step:N:MS", from outside, MS milliseconds after the process has taken its N-th step, or "commit:N",
just before the process's N-th call that makes a file durable (fsync or rename). Processes are forked from this
one, which has imported torch but never used it, so that a kill costs milliseconds. Prints one JSON object.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prime_core.checkpoint import load_checkpoint
from training.train import METRICS_NAME, main
from training.trainer import Trainer


def run_once(arguments: list[str], kill: str | None, progress: Path) -> int:
    """Train in a forked process until it ends or is killed; return its wait status."""
    progress.write_bytes(b"")
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _note_steps(progress)
        if kill is not None and kill.startswith("commit:"):
            _die_at_commit(int(kill.removeprefix("commit:")))
        os._exit(main(arguments))
    if kill is not None and kill.startswith("step:"):
        step, milliseconds = map(int, kill.removeprefix("step:").split(":"))
        while progress.stat().st_size < step:
            time.sleep(0.001)
        time.sleep(milliseconds / 1000)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _note_steps(progress: Path) -> None:
    """Append one byte to a file for every step taken."""
    take_step = Trainer.train_step

    def train_step(self: Trainer) -> dict[str, float]:
        record = take_step(self)
        with progress.open("ab") as file:
            file.write(b".")
        return record

    Trainer.train_step = train_step  # type: ignore[method-assign]


def _die_at_commit(number: int) -> None:
    count = 0

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapped

    os.fsync, os.replace = dying(os.fsync), dying(os.replace)


def interrupt(config: str, output: Path, kills: list[str]) -> dict[str, Any]:
    """Run, kill, resume, ...; after each kill a checkpoint, once there, must load."""
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # AdamW imports it: seconds, once here and not in every process
    arguments = ["--config", config, "--output", str(output)]
    progress = output.with_name(output.name + ".steps")
    num_killed, lines_lost, checkpoints = 0, 0, 0
    for kill in kills:
        status = run_once(arguments, kill, progress)
        num_killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if (output / "checkpoint/model.safetensors").exists():
            load_checkpoint(output / "checkpoint")
            checkpoints += 1
        lines_lost += (output / METRICS_NAME).exists() and _steps(output) > _saved_step(output)
    status = run_once(arguments, None, progress)
    return {"killed": num_killed, "lines_lost": lines_lost, "checkpoints": checkpoints, "status": status}


def _steps(output: Path) -> int:
    lines = (output / METRICS_NAME).read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def _saved_step(output: Path) -> int:
    path = output / "state.safetensors"
    if not path.exists():
        return 0
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return int(json.loads(content[8 : 8 + size])["__metadata__"]["step"])


if __name__ == "__main__":
    print(json.dumps(interrupt(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])))
