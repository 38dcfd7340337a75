"""Pictures: well-formed, to scale, escaped, and with a message where a file is no result."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks.main import main
from benchmarks.plot import _seconds
from benchmarks.svg import LABEL, VALUE, WIDTH, Bar, Chart, draw

NAMESPACE = "{http://www.w3.org/2000/svg}"


def widths(chart: Chart) -> list[float]:
    root = ET.fromstring(draw([chart]))
    return [float(rect.get("width", "")) for rect in root.iter(f"{NAMESPACE}rect")]


def test_bars_are_to_scale() -> None:
    bars = (Bar("a", 4, "4"), Bar("b", 1, "1", 1), Bar("c", 0, "0", 2))
    longest = WIDTH - LABEL - VALUE
    assert widths(Chart("t", "n", (), bars)) == [longest, longest / 4, 0]
    assert widths(Chart("t", "n", (), (Bar("a", 0, "0"),))) == [0]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.01234, "0.0123 s"), (8.734, "8.73 s"), (99.96, "100 s"), (999.78, "1000 s"), (54321.0, "54321 s")],
)
def test_long_times_are_shown_without_powers_of_ten(seconds: float, shown: str) -> None:
    assert _seconds(seconds) == shown


def test_text_is_escaped_and_dark_pages_have_colours() -> None:
    text = draw([Chart("<&>", "a < b", ("x & y",), (Bar("<name>", 1, "1 < 2"),))])
    root = ET.fromstring(text)
    texts = [element.text for element in root.iter(f"{NAMESPACE}text")]
    assert texts == ["<&>", "a < b", "x & y", "<name>", "1 < 2"]
    assert "prefers-color-scheme: dark" in text
    assert "href" not in text and "<script" not in text


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"benchmark": "other"}', '{"benchmark": "server"}'])
def test_what_is_no_result_is_named(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "x.json", tmp_path / "x.svg"
    path.write_text(content)
    assert main(["plot", str(path), "--output", str(picture)]) == 2
    assert f"{path} is no result" in capsys.readouterr().err
    assert not picture.exists()


def test_missing_files_and_folders_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(tmp_path / "none.json"), "--output", str(tmp_path / "x.svg")]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "none.json"), "--output", str(tmp_path / "no" / "x.svg")]) == 2
    assert "there is no folder" in capsys.readouterr().err
