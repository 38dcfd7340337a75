"""The script for GPU machines: every part of its smoke run works, is bounded, and its results are complete."""

import argparse
import io
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_needs, gpu_tests
from benchmarks.command_line import load_settings
from benchmarks.main import BENCHMARKS, main
from benchmarks.op_cases import OPS
from benchmarks.report import headlines

SMOKE_BENCHMARKS = ("kernels", "sampler-text-gpu", "train", "memory", "server")


def options(folder: Path, *arguments: str) -> argparse.Namespace:
    return gpu._parser().parse_args(["--output", str(folder), "--commit", "abc123", *arguments])


def test_smoke_run_has_a_part_for_every_benchmark(tmp_path: Path) -> None:
    names = {part.name for part in gpu.parts(options(tmp_path, "--smoke"), {})}
    assert names == {"tests", *SMOKE_BENCHMARKS}


@pytest.mark.parametrize("name", SMOKE_BENCHMARKS)
def test_smoke_part_writes_its_result_and_a_picture(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run in this process, which has imported everything already."""
    part = next(p for p in gpu.parts(options(tmp_path, "--smoke"), {}) if p.name == name)
    assert main(part.arguments[1:]) == 0
    document = json.loads((tmp_path / f"{name}.json").read_text())
    assert document["commit"] == "abc123" and "--commit abc123" in document["command"]
    assert document["machine"]["device"] == "cpu" and document["machine"]["gpu"] is None
    assert {"torch", "triton", "python"} <= document["versions"].keys()
    printed = capsys.readouterr().out
    assert "commit abc123" in printed
    _CHECKS[document["benchmark"]](document, printed)
    shown = headlines(document)
    assert (
        len(shown)
        == {"kernels": len(OPS), "sampler": 15, "train": 1, "memory": 1, "server": 2}[document["benchmark"]]
    )
    assert any("; the baseline is extrapolated from 2 of 6 steps" in line for line in shown) == (
        document["benchmark"] == "sampler"
    )

    picture = tmp_path / "picture.svg"
    assert main(["plot", str(tmp_path / f"{name}.json"), "--output", str(picture)]) == 0
    root = ET.fromstring(picture.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(root.findall("{http://www.w3.org/2000/svg}rect")) >= 2
    if name.startswith("sampler"):
        assert "extrapolated from 2 of 6 steps" in picture.read_text()


def _check_memory(document: dict[str, Any], printed: str) -> None:
    (entry,) = document["tasks"]
    assert entry["task"] == "nelbo" and "nelbo" in printed
    assert document["logits_bytes"] == 2 * 16 * 300 * 4


def _check_sampler(document: dict[str, Any], printed: str) -> None:
    plain, digits, images = document["workloads"]
    for entry in (plain, digits):
        for run in entry["runs"]:
            is_dense = run["sampler"] == "dense_published"
            assert (run["extrapolated"] is not None) == is_dense
        assert entry["ratios"]["as_published"]["note"] == "the baseline is extrapolated from 2 of 6 steps"
    assert "* extrapolated from 2 of 6 steps" in printed
    assert all(run["extrapolated"] is None for run in images["runs"])
    assert "note" not in images["ratios"]["as_published"]
    assert images["settings"]["steps"] == 4 and images["model"]["kind"] == "unet"
    for entry in document["workloads"]:
        assert all(ratio["predicted"] > 0 for ratio in entry["ratios"].values())
        assert entry["trunk"][0]["share_of_product_rate"] > 0


def _check_kernels(document: dict[str, Any], printed: str) -> None:
    for entry in document["ops"]:
        if entry["op"] == "packed_linear" and entry["seconds"] is None:
            continue  # not on every processor
        assert entry["seconds"] > 0 and entry["backend"] == "reference", entry
        assert entry["bytes_per_s"] == pytest.approx(entry["bytes"] / entry["seconds"])
        assert entry["share_of_copy_bandwidth"] == pytest.approx(
            entry["bytes_per_s"] / document["rates"]["copy_bytes_per_s"]
        )
        assert entry["op"] in printed


def _check_train(document: dict[str, Any], printed: str) -> None:
    trainer, plain = document["runs"]
    assert (trainer["loop"], plain["loop"]) == ("trainer", "plain")
    assert trainer["tokens_per_s"] == pytest.approx(32 / trainer["median_s"])
    assert document["ratio"] == pytest.approx(plain["median_s"] / trainer["median_s"])


def _check_server(document: dict[str, Any], printed: str) -> None:
    closed, arrivals = document["loops"]
    for loop in (closed, arrivals):
        assert loop["num_answered"] == loop["num_sent"] == 4 and loop["num_failed"] == 0
        assert loop["row_steps"] > 0 and 0 < loop["useful_row_fraction"] <= 1
        assert sum(loop["latency"]["all"]["counts"]) == 4
        assert loop["rejected"]["queue_full"] == 0
    assert arrivals["rate_per_s"] == pytest.approx(0.7 * closed["requests_per_s"])
    assert {model["kind"] for model in document["models"]} == {"text", "images"}


_CHECKS = {
    "sampler": _check_sampler,
    "kernels": _check_kernels,
    "train": _check_train,
    "memory": _check_memory,
    "server": _check_server,
}


def test_script_reports_its_parts_and_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu_needs.NEEDED, "no_such_package", "nothing")
    parts = [
        gpu.Part("good", ("this",), 30, writes=False),
        gpu.Part("bad", ("no_such_module",), 30, writes=False),
    ]
    monkeypatch.setattr(gpu, "parts", lambda *_: parts)
    assert gpu.main(["--smoke", "--output", str(tmp_path / "new"), "--commit", "abc123"]) == 1
    summary = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert [(part["name"], part["status"]) for part in summary["parts"]] == [
        ("good", "ok"),
        ("bad", "failed"),
    ]
    assert summary["commit"] == "abc123" and summary["missing"] == {"no_such_package": "nothing"}
    printed = capsys.readouterr().out
    assert "missing: no_such_package, needed for nothing" in printed
    assert "No module named no_such_module" in printed
    log = (tmp_path / "new" / "gpu.log").read_text()
    assert log.index("=== good") < log.index("Zen of Python") < log.index("=== bad")


def test_parts_are_chosen_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = gpu.parts(options(tmp_path), {})
    assert gpu.choose_parts(planned, None) == planned
    assert [part.name for part in gpu.choose_parts(planned, ["train", "kernels"])] == ["kernels", "train"]
    folder = tmp_path / "results"
    with pytest.raises(SystemExit) as end:
        gpu.main(["--only", "kernles", "--output", str(folder)])
    assert end.value.code == 2 and not folder.exists()
    assert (
        "there is no part 'kernles'; the parts are tests, sampler-text-gpu, kernels"
        in capsys.readouterr().err
    )


def test_results_of_a_changed_tree_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part is told the same commit, that of the tree as it is; the folder of results is a flag alone."""
    monkeypatch.setattr(gpu, "git_commit", lambda: "abc123+changes")
    monkeypatch.setenv("OUT", str(tmp_path))
    chosen = gpu._parser().parse_args([])
    assert chosen.commit == "abc123+changes" and chosen.output != tmp_path
    commands = [part.arguments for part in gpu.parts(chosen, {}) if part.writes]
    assert {command[command.index("--commit") + 1] for command in commands} == {"abc123+changes"}


def test_script_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import benchmarks.gpu, sys; print([n for n in ('torch', 'numpy', 'pydantic') if n in sys.modules])"
    )
    command = [sys.executable, "-S", "-c", code]
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run(command, capture_output=True, text=True, cwd=root, check=True).stdout == "[]\n"


def test_part_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it started."""
    monkeypatch.setattr(gpu, "MIN_PART_S", 1.0)
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    started = time.monotonic()
    result = gpu.run_part(
        gpu.Part("sleeper", ("sleeper",), 60), options(tmp_path, "--packages", str(tmp_path)), 2.0
    )
    assert result["status"] == "out of time"
    assert time.monotonic() - started < 30
    child = Path(f"/proc/{int(result['last_line'])}/stat")
    while child.exists() and child.read_text().split()[2] != "Z":  # a signal takes its time on a busy machine
        assert time.monotonic() - started < 60
        time.sleep(0.05)
    assert gpu.run_part(gpu.Part("late", ("this",), 60), options(tmp_path), 0.9)["status"] == "not started"


def test_parts_for_a_gpu_have_settings_that_can_be_used(tmp_path: Path) -> None:
    parts = gpu.parts(options(tmp_path), {})
    assert gpu.BUDGET_S < 540
    assert {part.arguments[1] for part in parts if part.writes} == set(BENCHMARKS)
    for part in parts:
        if not part.writes:
            assert part.arguments[0] == "benchmarks.gpu_tests"
            assert all(Path(path).is_file() for path in part.arguments if path.endswith(".py"))
            continue
        _, command, *flags = part.arguments
        given = {
            name.removeprefix("--").replace("-", "_"): value
            for name, value in zip(flags[::2], flags[1::2], strict=True)
        }
        assert given.pop("output").endswith(f"{part.name}.json") and given["device"] == "cuda"
        assert given["commit"] == "abc123"
        load_settings(BENCHMARKS[command].settings, given, None, [])


def test_pytest_does_without_a_plugin_that_is_not_there() -> None:
    arguments = gpu._tests("tests/kernels", missing={"pytest_timeout": ""})
    assert "-c" in arguments and "-c" not in gpu._tests("tests/kernels", missing={})


@pytest.mark.parametrize(("cores", "processes"), [(1, "1"), (8, "4"), (16, "8"), (64, "16")])
def test_tests_use_the_cores_that_are_there(
    cores: int, processes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: cores)
    arguments = gpu._tests(*gpu._GPU_TESTS, missing={})
    assert len(gpu._GPU_TESTS) == 16 and arguments[arguments.index("--processes") + 1] == processes


def test_every_test_of_a_kernel_runs_on_a_gpu() -> None:
    """But those that a GPU changes nothing about."""
    there = {f"tests/kernels/{path.name}" for path in (gpu.ROOT / "tests" / "kernels").glob("test_*.py")}
    elsewhere = {
        f"tests/kernels/test_{name}.py"
        for name in ("backend", "compile_report", "linear", "short_rows", "token_digits")
    }
    others = {f"tests/prime_core/test_{name}.py" for name in ("gpu_paths", "graphs")}
    assert set(gpu._GPU_TESTS) == there - elsewhere | others


def test_what_needs_a_gpu_is_among_the_first_tests() -> None:
    """The last part may find no time left."""
    skipped = "skipif(not torch.cuda.is_available()"
    needing = {
        path for path in gpu.ROOT.glob("tests/*/test_*.py") if f"@pytest.mark.{skipped}" in path.read_text()
    }
    assert needing and needing <= {gpu.ROOT / path for path in gpu._GPU_TESTS}


def test_tests_that_take_too_long_say_what_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1"
    )  # which takes seconds where others use the machine
    # Before one that fails, and after it.
    first, failing, last = (tmp_path / f"test_{name}.py" for name in ("first", "failing", "last"))
    failing.write_text("def test_one(): assert 'seen' == 'unseen'\n")
    for sleeping in (first, last):
        sleeping.write_text("import time\ndef test_fine(): pass\ndef test_endless(): time.sleep(60)\n")
    options_ = ("-q", "-c", "/dev/null", "-p", "no:cacheprovider", "--rootdir", str(tmp_path))
    files = map(str, (first, failing, last))
    arguments = ("benchmarks.gpu_tests", "--processes", "3", *files, "--", *options_)
    part = gpu.Part("slow", arguments, 60, writes=False)
    result = gpu.run_part(part, options(tmp_path), 12.0)
    assert result["status"] == "out of time"
    log = (tmp_path / gpu.LOG_NAME).read_text()
    assert "AssertionError: assert 'seen' == 'unseen'" in log and "1 failed" in log
    assert log.count("KeyboardInterrupt") >= 2 and log.count("1 passed") == 2


def test_processes_that_hear_nothing_share_the_time_for_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the last of them would be ended, with all that it has seen, by whoever waits for this process."""

    class Deaf:
        returncode = -9
        killed = False

        def wait(self, limit_s: float | None = None) -> int:
            if self.killed:
                return self.returncode
            if limit_s is None:
                raise KeyboardInterrupt
            time.sleep(limit_s)
            raise subprocess.TimeoutExpired("deaf", limit_s)

        def kill(self) -> None:
            self.killed = True

    started: list[Deaf] = []

    def start(files: Any, options: Any) -> tuple[Deaf, io.BytesIO]:
        started.append(Deaf())
        return started[-1], io.BytesIO(b"seen so far")

    monkeypatch.setattr(gpu_tests, "_start", start)
    monkeypatch.setattr(gpu_tests, "_LAST_WORDS_S", 1.0)
    begin = time.monotonic()
    assert gpu_tests.main(["--processes", "4", "a", "b", "c", "d"]) == 1
    assert time.monotonic() - begin < 2.0
    assert len(started) == 4 and all(each.killed for each in started)


def test_tests_in_processes_give_one_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "test_good.py", tmp_path / "test_bad.py"
    good.write_text("def test_fine(): pass\n")
    bad.write_text("def test_wrong(): assert False\n")
    options_ = ["--", "-q", "-c", "/dev/null", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    assert gpu_tests.main([str(good), *options_]) == 0
    assert gpu_tests.main([str(bad), str(good), *options_]) == 1
    assert capsys.readouterr().out.count("1 passed") == 2


def test_packages_of_a_folder_are_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "carried_package.py").write_text("")
    monkeypatch.setattr(gpu_needs, "NEEDED", {"carried_package": "a test", "sys": "all"})
    before = list(sys.path)
    assert gpu_needs.missing_packages(None) == {"carried_package": "a test"}
    assert gpu_needs.missing_packages(tmp_path) == {}
    assert sys.path == before


def test_what_triton_builds_with_is_named_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_needs.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert gpu_needs.missing_tools() == {"a C compiler": "the kernels", "Python.h": "the kernels"}
    compiler = tmp_path / "clang"
    compiler.write_text("")
    compiler.chmod(0o755)
    (tmp_path / "Python.h").write_text("")
    assert gpu_needs.missing_tools() == {}
    (tmp_path / "clang").rename(tmp_path / "cc-of-mine")
    monkeypatch.setenv("CC", "cc-of-mine")
    assert gpu_needs.missing_tools() == {}
