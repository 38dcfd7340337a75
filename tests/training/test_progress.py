"""Progress: a few whole lines in a log, one line that is redrawn on a terminal."""

from __future__ import annotations

import io
import sys
import time

import pytest

from training import progress
from training.progress import progress_bar


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_at_both_ends_and_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in progress_bar(range(5000), desc="rows"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("rows: ") for line in lines)
    assert "5000/5000" in lines[-1]

    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.05)
    with progress_bar(total=40, desc="steps") as bar:
        for _ in range(40):
            time.sleep(0.01)
            bar.update()
    assert 4 <= len(capsys.readouterr().err.splitlines()) <= 40


def test_a_terminal_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(total=20, mininterval=0) as bar:
        for _ in range(20):
            bar.update()
            time.sleep(0.001)
    assert terminal.getvalue().count("\r") > 5 and terminal.getvalue().count("\n") == 1


@pytest.mark.parametrize("shown", [False, None])
def test_a_bar_that_is_not_shown_writes_nothing(
    shown: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(progress_bar([1, 2], shown=shown)) == [1, 2]
    assert capsys.readouterr().err == ""
