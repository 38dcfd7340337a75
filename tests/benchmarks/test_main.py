"""The command: one JSON document on stdout and nothing else, errors that name the setting."""

import json
from pathlib import Path

import pytest

from benchmarks import contenders, sampler
from benchmarks.main import main
from benchmarks.report import headlines, sampler_table
from prime_core.models.graphs import TrunkGraphs
from tests.recorder import RerunRecorder

ARGUMENTS = [
    "sampler",
    "--against",
    "dense_published",
    "--model",
    "tiny",
    "--vocab-size",
    "300",
    "--target-length",
    "2",
    "--length",
    "8",
    "--steps",
    "4",
    "--batch-size",
    "2",
    "--repeats",
    "2",
    "--seed",
    "3",
    "--num-threads",
    "1",
]


def test_json_document(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    assert main([*ARGUMENTS, "--dtype", "float32", "--json", "--output", str(output)]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert json.loads(output.read_text()) == document
    assert list(tmp_path.iterdir()) == [output]
    assert "predicted ratio" in printed.err and "repeat 2 of 2" in printed.err

    assert document["command"].startswith("prime-bench sampler --against dense_published")
    assert document["settings"]["steps"] == 4 and document["machine"]["num_threads"] == 1
    assert {"torch", "python"} <= document["versions"].keys() and "commit" in document
    planned, dense = document["runs"]
    assert (planned["sampler"], dense["sampler"]) == ("planned", "dense_published")
    for run in (planned, dense):
        assert len(run["seconds"]) == 2 and run["tokens_per_s"] == pytest.approx(16 / run["median_s"])
        assert run["row_steps"] <= 8 and run["peak_memory_above_weights_bytes"] is not None
    ratio = dense["median_s"] / planned["median_s"]
    assert document["ratios"]["equal_float32"]["measured"] == pytest.approx(ratio)
    assert document["ratios"]["as_published"] == document["ratios"]["equal_float32"]
    assert "equal_bfloat16" not in document["ratios"]
    assert document["rates"]["product_flops_per_s"].keys() == {"float32", "bfloat16"}
    assert document["trunk"][0]["share_of_product_rate"] > 0

    table = sampler_table(document)
    assert f"{planned['tokens_per_s']:.1f}" in table and f"{ratio:.1f}" in table


def test_graphs_are_a_contender_of_their_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but for the recorder."""
    monkeypatch.setattr(contenders, "cuda_graphs", lambda most, device: TrunkGraphs(most, RerunRecorder()))
    monkeypatch.setattr(sampler, "_needs_cuda", lambda device: None)
    few = ["--dtype", "float32", "--peak-memory", "skip", "--cuda-graphs", "2", "--steps", "30"]
    assert main([*ARGUMENTS, *few, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    planned, graphs, dense = document["runs"]
    assert [run["sampler"] for run in document["runs"]] == ["planned", "planned_graphs", "dense_published"]
    assert graphs["same_samples"] is True and 0 < graphs["graph_replays"] <= graphs["denoiser_calls"]
    assert graphs["denoiser_calls"] == planned["denoiser_calls"]
    ratio = dense["median_s"] / planned["median_s"]
    assert document["ratios"]["equal_float32"]["measured"] == pytest.approx(ratio)
    speed = planned["median_s"] / graphs["median_s"]
    line = (
        f"CUDA graphs, float32: {speed:.2f} times as fast as planned, {graphs['graph_replays']} of "
        f"{graphs['denoiser_calls']} calls; the same samples"
    )
    assert line in sampler_table(document)
    assert any(shown.endswith(line) for shown in headlines(document))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps"),
        (["--batch-size", "two"], "--batch-size"),
        (["--against", "sparse"], "--against"),
        (["--dtype", "float16"], "--dtype"),
        (["--target-length", "5"], "must divide the network's width"),
        (["--target-length", "10"], "target_length must be 1..9"),
        (["--cuda-graphs", "-1"], "--cuda-graphs"),
        (
            ["--device", "cpu", "--cuda-graphs", "4"],
            "--cuda-graphs: needs a CUDA device, and this one is cpu",
        ),
        (["--output", "/no/such/folder/x.json"], "--output"),
        (["--config", "/no/such/file.toml"], "--config"),
    ],
)
def test_bad_settings_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARGUMENTS, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err


@pytest.mark.parametrize("arguments", [["sampler", "--nonsense", "1"], [], ["unknown"]])
def test_unknown_flags_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_baseline_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sampler"]) == 2
    assert "--against" in capsys.readouterr().err


def test_flag_beats_environment_beats_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each source in turn is the one that holds the bad value, and only the one that counts is seen."""
    config = tmp_path / "bench.toml"
    config.write_text('steps = 0\nagainst = "dense_published"\n')
    assert main(["sampler", "--config", str(config)]) == 2
    assert "--steps" in capsys.readouterr().err
    monkeypatch.setenv("PRIME_BENCH_STEPS", "5")
    assert main(["sampler", "--config", str(config), "--batch-size", "0"]) == 2
    printed = capsys.readouterr().err
    assert "--batch-size" in printed and "--steps" not in printed
    monkeypatch.setenv("PRIME_BENCH_STEPS", "0")
    assert main(["sampler", "--config", str(config), "--batch-size", "0", "--steps", "6"]) == 2
    assert "--steps" not in capsys.readouterr().err


def test_file_may_be_named_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "bench.toml"
    config.write_text('steps = 0\nagainst = "dense_published"\n')
    monkeypatch.setenv("PRIME_BENCH_CONFIG", str(config))
    assert main(["sampler"]) == 2
    assert "--steps" in capsys.readouterr().err
    other = tmp_path / "other.toml"
    other.write_text("batch_size = 0\n")
    assert main(["sampler", "--config", str(other), "--against", "dense_published"]) == 2
    assert "--batch-size" in capsys.readouterr().err


def test_unknown_variables_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRIME_BENCH_STPES", "3")
    assert main(["sampler", "--against", "dense_published"]) == 2
    assert "PRIME_BENCH_STPES in the environment is no setting; did you mean PRIME_BENCH_STEPS?" in (
        capsys.readouterr().err
    )


def test_unknown_keys_of_a_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "bench.toml"
    config.write_text('against = "dense_published"\nstpes = 3\n')
    assert main(["sampler", "--config", str(config)]) == 2
    assert "stpes" in capsys.readouterr().err
