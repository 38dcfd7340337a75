"""Ctrl-C while a command is still importing ends it with one line, and not in the middle of an import."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import importlib, os, signal, sys, types
from training import start

signal.signal(signal.SIGINT, signal.default_int_handler)
imported = []

def import_module(name):
    {interrupt}
    imported.append(name)
    return types.SimpleNamespace(main=lambda: 7)

importlib.import_module = import_module
status = start.{command}()
assert imported == ["training.{command}"]
sys.exit(status)
"""


def run(command: str, interrupt: str) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(command=command, interrupt=interrupt)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "name"), [("train", "prime-train"), ("evaluate", "prime-eval"), ("sample", "prime-sample")]
)
def test_ctrl_c_waits_for_the_imports_and_then_ends_the_command(command: str, name: str) -> None:
    done = run(command, "os.kill(os.getpid(), signal.SIGINT)")
    assert (done.returncode, done.stderr) == (130, f"{name}: stopped before it began\n")


def test_a_command_that_is_left_alone_runs() -> None:
    done = run("train", "pass")
    assert (done.returncode, done.stderr) == (7, "")
