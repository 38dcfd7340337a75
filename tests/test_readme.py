"""What the README says is true: every file that it names is there, its example runs, and so is the list of modules."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from benchmarks.settings import computing_threads

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
ROOMS = ("kernels", "prime_core", "training", "server", "benchmarks", "deploy", "docs", "tests")


def test_every_path_is_there() -> None:
    named = set(re.findall(rf"\b(?:{'|'.join(ROOMS)})/[\w./*-]*\w", README))
    assert {
        "server/engine/engine.py",
        "kernels/noise.py",
        "benchmarks/workloads/text-cpu-long.toml",
    } <= named
    # Written relative to a room, or to a folder named just before.
    files = {path.name for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    missing = {path for path in named if not list(ROOT.glob(path))}
    missing |= {name for name in re.findall(r"\b[a-z]\w*\.py\b", README) if name not in files}
    assert not missing


def test_the_list_of_modules_is_what_they_say_of_themselves() -> None:
    spec = importlib.util.spec_from_file_location("structure", ROOT / ".ci" / "structure.py")
    assert spec is not None and spec.loader is not None
    structure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(structure)
    assert structure.FILE.read_text("utf-8") == structure.document(), "make structure writes it anew"


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"```python\n(.*?)```", README[README.index("## From Python") :], re.DOTALL)
    assert block is not None
    monkeypatch.chdir(ROOT)
    with computing_threads(1):  # two threads that wait for each other take minutes on a busy machine
        exec(block[1], {})
    printed = capsys.readouterr().out
    assert printed.count("And it came to pass,") == 2
    assert f"{float(printed.split()[-3]):.0f}" == "29"  # the nats that the section on scores shows
