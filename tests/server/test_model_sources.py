"""--model in all its spellings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.command_line import load_settings
from server.model_sources import ModelSource, demo_models, parse_models
from server.settings import SettingsError


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a/b", [("b", "a/b")]),
        ("a/b.safetensors", [("b", "a/b.safetensors")]),
        (Path("a/b=c"), [("b=c", "a/b=c")]),
        ("x=a/b", [("x", "a/b")]),
        ("x=a=b", [("x", "a=b")]),
        ("./x=a/b", [("b", "./x=a/b")]),
        ("a,x=b , c", [("a", "a"), ("x", "b"), ("c", "c")]),
        ('["a", "x=b,c"]', [("a", "a"), ("x", "b,c")]),
        ("runs/tiny/checkpoint", [("tiny", "runs/tiny/checkpoint")]),
        ("runs/a/checkpoint,runs/b/checkpoint/", [("a", "runs/a/checkpoint"), ("b", "runs/b/checkpoint")]),
        (Path("/checkpoint"), [("checkpoint", "/checkpoint")]),
        ("checkpoint=runs/a/checkpoint", [("checkpoint", "runs/a/checkpoint")]),
        (["a,b", Path("c")], [("a,b", "a,b"), ("c", "c")]),
    ],
)
def test_spellings(value: Any, expected: list[tuple[str, str]]) -> None:
    assert parse_models(value) == tuple(ModelSource(name, Path(path)) for name, path in expected)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "each model must be PATH or NAME=PATH"),
        ("a,,b", "each model must be PATH"),
        ("[]", "at least one"),
        ([], "at least one"),
        ("[1]", "each model must be PATH"),
        ('["a"', "begins like a JSON list"),
        ("=a", "neither part may be empty"),
        ("a=", "neither part may be empty"),
        ("x/a,y/a", "two models are named 'a'; give each a name of its own: NAME=PATH"),
        (f"{'n' * 129}=a", "128 printable characters"),
        ("a\nb=c", "printable"),
        (7, "must be PATH"),
        (b"a", "must be PATH"),
    ],
)
def test_bad_values(value: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_models(value)
    assert words in str(caught.value)


def test_flag_variable_and_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('model = ["f", "g"]\n')
    assert [source.name for source in load_settings(["--config", str(file)]).models] == ["f", "g"]
    monkeypatch.setenv("PRIME_MODEL", "a,x=b")
    assert [source.name for source in load_settings([]).models] == ["a", "x"]
    assert [source.name for source in load_settings(["--model", "c", "--model", "d=e"]).models] == ["c", "d"]
    assert load_settings(["--model", "c", "--served-model-name", "d"]).models == (
        ModelSource("d", Path("c")),
    )
    for argv, words in [
        (["--model", "c", "--model", "d/c"], "--model (PRIME_MODEL): two models are named 'c'"),
        (
            ["--model", "c", "--model", "d", "--served-model-name", "e"],
            "more than one model; name each in --model",
        ),
    ]:
        with pytest.raises(SettingsError) as caught:
            load_settings(argv)
        assert words in str(caught.value)


def test_bundled_models_are_there_to_be_loaded() -> None:
    demos = demo_models()
    assert demos[0].name == "text"
    for demo in demos:
        assert (demo.path / "config.json").is_file()
