"""Flags, environment and TOML file: one set of names, one order of precedence, no silent typo."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.settings import ENV_PREFIX as BENCH_PREFIX
from server.command_line import OTHER_PROGRAMS, load_settings
from server.main import main
from server.model_sources import DEMO_FOLDER, ModelSource
from server.settings import Settings, SettingsError
from training.config import TrainConfig
from training.evaluate import EvalConfig
from training.images.classifier import ClassifierConfig
from training.images.eval_config import ImageEvalConfig
from training.images.sample import ImageSampleConfig
from training.sample import SampleConfig


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("PRIME_")]:
        monkeypatch.delenv(name)


def test_defaults_are_loopback_and_the_demo() -> None:
    settings = load_settings([])
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    bundled = [ModelSource(name, DEMO_FOLDER / name) for name in ("text", "images")]
    assert settings.models == tuple(demo for demo in bundled if demo.path.exists())


def test_flag_beats_environment_beats_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('max_n = 1\nmax_steps = 1\nport = 1\nmodel = "a"\nserved_model_name = "b"\n')
    monkeypatch.setenv("PRIME_MAX_STEPS", "2")
    monkeypatch.setenv("PRIME_PORT", "2")
    settings = load_settings(["--config", str(file), "--port", "3"])
    assert (settings.max_n, settings.max_steps, settings.port) == (1, 2, 3)
    assert settings.models == (ModelSource("b", Path("a")),)
    monkeypatch.setenv("PRIME_CONFIG", str(file))
    assert load_settings([]).max_n == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--port", "65536"], ["--port", "PRIME_PORT", "65535"]),
        (["--port", "x"], ["--port", "integer"]),
        (["--max-n", "0"], ["--max-n", "1"]),
        (["--max-batch-rows", "9", "--max-queue-rows", "8"], ["--max-queue-rows", "max_batch_rows (9)"]),
        (["--max-n", "600"], ["--max-n", "max_queue_rows (512)"]),
        (["--dtype", "int8"], ["--dtype", "bfloat16"]),
        (["--device", "tpu"], ["--device"]),
        (["--receive-timeout-s", "nan"], ["--receive-timeout-s"]),
        (["--config", "/does/not/exist.toml"], ["--config", "cannot read"]),
    ],
)
def test_bad_values_name_the_setting(argv: list[str], words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(argv)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "value error" not in str(caught.value).lower()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_batch_row = 3\n", "unknown key 'max_batch_row'; did you mean 'max_batch_rows'?"),
        ("zzz = 3\n", "known keys: model,"),
        ("max_n = \n", "is not TOML"),
        ("max_n = true\n", "no setting is a boolean"),
        ("[max_n]\nvalue = 1\n", "--max-n"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(["--config", str(file)])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("PRIME_MAX_BATCHROWS", "did you mean PRIME_MAX_BATCH_ROWS?"),
        ("prime_max_batchrows", "prime_max_batchrows in the environment is no setting; did you mean"),
        ("PRIME_ZZZZZZ", "--help lists the settings"),
    ],
)
def test_unknown_variables_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, words: str
) -> None:
    monkeypatch.setenv(variable, "7")
    with pytest.raises(SettingsError) as caught:
        load_settings([])
    assert variable in str(caught.value)
    assert words in str(caught.value)
    assert main([]) == 2
    assert capsys.readouterr().err.startswith(f"prime-serve: {variable}")


def test_the_variables_of_a_kubernetes_service_are_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIME_SERVICE_HOST", "10.0.171.239")
    monkeypatch.setenv("PRIME_PORT", "tcp://10.0.171.239:80")
    with pytest.raises(SettingsError, match="enableServiceLinks: false"):
        load_settings([])


def test_every_program_has_variables_of_its_own() -> None:
    """The server must not take them for typing errors."""
    settings = [EvalConfig, ImageEvalConfig, SampleConfig, ImageSampleConfig, TrainConfig, ClassifierConfig]
    prefixes = {str(each.model_config["env_prefix"]) for each in settings} | {BENCH_PREFIX}
    assert prefixes == set(OTHER_PROGRAMS)


def test_variables_of_other_programs_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    for prefix in OTHER_PROGRAMS:
        monkeypatch.setenv(f"{prefix}STEPS", "7")
    monkeypatch.setenv("prime_max_n", "7")
    assert load_settings([]).max_n == 7


def test_unknown_flags_and_abbreviations_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--max-row", "3"], ["--nope"], ["--max_n", "3"]):
        with pytest.raises(SystemExit) as caught:
            load_settings(argv)
        assert caught.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_an_empty_variable_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIME_PORT", "")
    monkeypatch.setenv("PRIME_SERVED_MODEL_NAME", "")
    settings = load_settings([])
    assert (settings.port, settings.served_model_name) == (8000, None)


def test_one_name_is_none_for_two_models() -> None:
    with pytest.raises(SettingsError, match=r"--served-model-name .*name each in --model NAME=PATH"):
        load_settings(["--model", "a", "--model", "b", "--served-model-name", "c"])
    assert load_settings(["--model", "a", "--served-model-name", "c"]).models == (
        ModelSource("c", Path("a")),
    )


def test_to_wait_for_nobody_is_a_setting() -> None:
    settings = load_settings(["--drain-timeout-s", "0", "--stall-exit-s", "0"])
    assert (settings.drain_timeout_s, settings.stall_exit_s) == (0, 0)


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        assert field.description


def test_bad_models_end_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04K\x01.")  # a pickle
    small = ["--max-batch-tokens", "8", "--model", str(model_path), "--port", "0"]
    for argv, word in [
        (["--model", str(tmp_path / "none")], "none"),
        (["--model", str(tmp_path)], "safetensors"),
        (["--model", str(tmp_path / "model.safetensors")], "safetensors"),
        (small, "max_batch_tokens (8)"),
    ]:
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("prime-serve: ")
        assert error.count("\n") == 1
        assert word in error
