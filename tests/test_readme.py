"""What the README says of the house is true: every file that it names is there, and its example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.settings import computing_threads

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
ROOMS = ("kernels", "prime_core", "training", "server", "benchmarks", "deploy", "docs", "tests")
HOUSE = README[README.index("## The house") : README.index("Imports run one way")]


def lines_of_rooms() -> dict[str, str]:
    """What the section "The house" says of every room."""
    parts = re.split(r"^(\w+)/ ", HOUSE, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_path_is_there() -> None:
    named = set(re.findall(rf"\b(?:{'|'.join(ROOMS)})/[\w./*-]*\w", README))
    assert {
        "server/engine/model_queue.py",
        "kernels/noise.py",
        "benchmarks/workloads/text-cpu-long.toml",
    } <= named
    # Written relative to a room, or to a folder named just before.
    files = {path.name for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    missing = {path for path in named if not list(ROOT.glob(path))}
    missing |= {name for name in re.findall(r"\b[a-z]\w*\.py\b", README) if name not in files}
    assert not missing


@pytest.mark.parametrize("room", ["kernels", "prime_core", "training", "server"])
def test_every_module_of_the_house_is_there(room: str) -> None:
    """Names with an underscore are those of modules; words without one may be just words."""
    named = set(re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", lines_of_rooms()[room]))
    there = {path.stem for path in (ROOT / room).rglob("*")}
    assert {name for name in named if not re.fullmatch(r"sm_\d+", name)} <= there
    assert len(named) >= 2


@pytest.mark.parametrize("folder", ["engine", "http"])
def test_every_module_between_the_socket_and_the_denoiser_is_in_the_house(folder: str) -> None:
    files = {path.stem for path in (ROOT / "server" / folder).glob("*.py")} - {"__init__"}
    assert files <= set(re.findall(r"\w+", lines_of_rooms()["server"]))


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"```python\n(.*?)```", README[README.index("## From Python") :], re.DOTALL)
    assert block is not None
    monkeypatch.chdir(ROOT)
    with computing_threads(1):  # two threads that wait for each other take minutes on a busy machine
        exec(block[1], {})
    printed = capsys.readouterr().out
    assert printed.count("And it came to pass,") == 2
    assert f"{float(printed.split()[-3]):.0f}" == "29"  # the nats that the section on scores shows
