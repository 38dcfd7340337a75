"""All GPU tests and benchmarks in one go, in under nine minutes, on a machine without network or installation.

    python -m benchmarks.gpu --output RESULTS --commit $(git rev-parse HEAD)

Runs from the checkout with the Python, torch and triton that are there. What the project needs and the machine lacks is
named first; it may lie unpacked in a folder given with --packages (pip install --target FOLDER ...). Every part is a
process of its own with a limit of time, so that none takes the others with it; its output goes to RESULTS/gpu.log.
--smoke runs every part at tiny sizes on a CPU. This module needs the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# These need nothing but the standard library.
from benchmarks.commit import ROOT, git_commit
from benchmarks.gpu_needs import missing_packages, missing_tools
from benchmarks.report import headlines

BUDGET_S = 530.0
SMOKE_BUDGET_S = 85.0
# With less time left a part is not started.
MIN_PART_S = 5.0
LOG_NAME = "gpu.log"


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: also that of its file.
        arguments: after `python -m`.
        limit_s: after which it is ended.
        writes: whether it writes RESULTS/NAME.json by itself.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    writes: bool = True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; 0 if every one succeeded, 1 otherwise."""
    parser = _parser()
    options = parser.parse_args(argv)
    options.output = options.output.resolve()
    missing = missing_packages(options.packages) | ({} if options.smoke else missing_tools())
    try:
        chosen = choose_parts(parts(options, missing), options.only)
    except ValueError as error:
        parser.error(f"--only: {error}")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / LOG_NAME).unlink(missing_ok=True)
    for name, what in missing.items():
        print(f"missing: {name}, needed for {what}", flush=True)
    budget_s = SMOKE_BUDGET_S if options.smoke else BUDGET_S
    started, results = time.monotonic(), []
    for part in chosen:
        left_s = budget_s - (time.monotonic() - started)
        results.append(run_part(part, options, min(part.limit_s, left_s)))
        print(_line(results[-1]), flush=True)
    summary = {
        "benchmark": "gpu",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": options.commit,
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)]),
        "python": platform.python_version(),
        "device": "cpu, smoke test" if options.smoke else _gpu_name(),
        "missing": missing,
        "seconds": round(time.monotonic() - started, 1),
        "parts": results,
    }
    (options.output / "gpu.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    print("\n" + "\n".join(_line(result) for result in results))
    for result in results:
        for line in _headlines(options.output / f"{result['name']}.json", result):
            print(f"{result['name']}: {line}")
    print(f"{summary['seconds']} s on {summary['device']}; files in {options.output}")
    return 0 if all(result["status"] == "ok" for result in results) else 1


def parts(options: argparse.Namespace, missing: dict[str, str]) -> list[Part]:
    """Return what is run, in order: what is most wanted comes first."""
    device = "cpu" if options.smoke else "cuda"
    common = ("--device", device, *(("--commit", options.commit) if options.commit else ()))

    def bench(name: str, command: str, limit_s: float, *arguments: str) -> Part:
        output = ("--output", str(options.output / f"{name}.json"))
        return Part(name, ("benchmarks.main", command, *arguments, *common, *output), limit_s)

    def sampler(name: str, limit_s: float, *arguments: str) -> Part:
        file = str(ROOT / "benchmarks" / "workloads" / f"{'smoke' if options.smoke else name}.toml")
        memory = ("--peak-memory", "skip") if options.smoke else ()
        against = ("--against", "dense_published", "--workloads", file)
        return bench(f"sampler-{name}", "sampler", limit_s, *against, *memory, *arguments)

    if options.smoke:
        tiny = ("--model", "tiny", "--vocab-size", "300", "--target-length", "2", "--length", "16")
        return [
            Part("tests", _tests("tests/kernels/test_backend.py", missing=missing), 60, writes=False),
            bench("kernels", "kernels", 60, "--scale", "smoke", "--repeats", "1", "--num-threads", "1"),
            sampler("text-gpu", 60),
            bench("train", "train", 60, *tiny, "--batch-size", "2", "--repeats", "1", "--peak-memory",
                  "skip"),
            bench("memory", "memory", 60, *tiny, "--batch-size", "2", "--task", "nelbo"),
            bench("server", "server", 60, "--requests", "4", "--max-tokens", "4", "--text-steps", "4",
                  "--image-steps", "2", "--clients", "2"),
        ]  # fmt: skip
    return [
        Part("tests", _tests(*_GPU_TESTS, missing=missing), 150, writes=False),
        sampler("text-gpu", 150),
        bench("kernels", "kernels", 90),
        bench("train", "train", 45, "--length", "1024", "--batch-size", "16", "--repeats", "5"),
        bench("memory", "memory", 40),
        sampler("images-gpu", 50),
        sampler("graphs-gpu", 60, "--cuda-graphs", "8"),
        # Before it answers it compiles its kernels, one after the other.
        bench("server", "server", 100, "--requests", "256", "--clients", "32", "--limit-s", "10"),
        Part("tests-sampling", _tests(*_SAMPLING_TESTS, missing=missing), 60, writes=False),
    ]


def choose_parts(planned: Sequence[Part], names: Sequence[str] | None) -> list[Part]:
    """Return the parts with these names in their order; all for None.

    Raises:
        ValueError: if there is no part of a name.
    """
    known = [part.name for part in planned]
    for name in names or ():
        if name not in known:
            raise ValueError(f"there is no part {name!r}; the parts are {', '.join(known)}")
    return [part for part in planned if names is None or part.name in names]


# What runs on a GPU where there is one, those first that compile the most kernels.
_GPU_TESTS = tuple(
    f"tests/{name}.py"
    for name in (
        "kernels/test_group_norm", "kernels/test_reveal", "prime_core/test_gpu_paths", "kernels/test_modulate",
        "kernels/test_reveal_kernel", "kernels/test_marginal", "kernels/test_embed", "kernels/test_nll",
        "kernels/test_embed_gradient", "kernels/test_reveal_rows", "kernels/test_noise", "prime_core/test_graphs",
        "kernels/test_linear_nll", "kernels/test_rows", "kernels/test_launch", "kernels/test_transfers",
    )
)  # fmt: skip
# What does not, under the versions of packages that are there.
_SAMPLING_TESTS = (
    "tests/prime_core/test_stepper.py",
    "tests/prime_core/test_dit.py",
    "tests/prime_core/test_unet.py",
    "tests/prime_core/test_unet_conditions.py",
    "tests/prime_core/test_unet_sizes.py",
    "tests/prime_core/test_unet_checkpoint.py",
    "tests/prime_core/test_graph_places.py",
    "tests/prime_core/test_graph_recording.py",
    "tests/benchmarks/test_dense_published.py",
)


def run_part(part: Part, options: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """Run one part and say how it went: "ok", "failed", "out of time" or "not started"."""
    result: dict[str, Any] = {
        "name": part.name,
        "command": ["python", "-m", *part.arguments],
        "writes": part.writes,
    }
    if limit_s < MIN_PART_S:
        return result | {"status": "not started", "seconds": 0.0, "last_line": "no time was left"}
    started = time.monotonic()
    with (options.output / LOG_NAME).open("ab") as log:
        log.write(f"=== {part.name}\n".encode())
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", *part.arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=_environment(options),
            start_new_session=True,
        )
        try:
            status = "ok" if process.wait(limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
            # Interrupted tests say what has failed so far.
            _end(process, signal.SIGTERM if part.writes else signal.SIGINT)
    seconds = round(time.monotonic() - started, 1)
    with (options.output / LOG_NAME).open("rb") as written:
        written.seek(begin)
        lines = written.read().decode(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return result | {"status": status, "seconds": seconds, "last_line": last[:300]}


def _tests(*paths: str, missing: dict[str, str]) -> tuple[str, ...]:
    """Return a call of pytest; warnings of other versions of packages are no errors here."""
    options = ["-q", "-W", "default", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if "pytest_timeout" in missing:
        # The project's settings name that plugin, and unknown settings are errors there.
        options += ["-c", os.devnull, "--rootdir", str(ROOT), "-o", "pythonpath=.",
                    "--import-mode=importlib"]  # fmt: skip
    # Nearly all of their time goes into compiling, on one core each.
    processes = str(max(1, min(len(paths), (os.cpu_count() or 1) // 2)))
    files = (str(ROOT / path) for path in paths)
    return ("benchmarks.gpu_tests", "--processes", processes, *files, "--", *options)


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """Return this environment without settings of ours, with the checkout and the packages in the path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRIME_")}
    paths = [str(ROOT), "" if options.packages is None else str(options.packages.resolve())]
    paths.append(environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if options.smoke:
        environment["OMP_NUM_THREADS"] = "1"
    return environment


def _end(process: subprocess.Popen[bytes], gently: signal.Signals) -> None:
    """End a process and what it started, which is its own session: gently, then at once."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, gently)
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _gpu_name() -> str:
    """Return the GPU as a process of its own sees it: this one keeps its memory free."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _line(result: dict[str, Any]) -> str:
    last = re.sub(r"\s+", " ", result["last_line"])
    return f"{result['name']:<20}{result['status']:<13}{result['seconds']:>7.1f} s  {last[:90]}"


def _headlines(path: Path, result: dict[str, Any]) -> list[str]:
    """Return the first figures of what a part wrote in this run."""
    if result["status"] != "ok" or not result["writes"]:
        return []
    return headlines(json.loads(path.read_text("utf-8")))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0]
    )
    results = ROOT / "benchmarks" / "results"
    parser.add_argument("--output", type=Path, default=results, help="folder of the results")
    # Once for all parts: results that earlier ones write are no changes.
    parser.add_argument("--commit", default=git_commit(), help="of this checkout, where git cannot tell")
    parser.add_argument("--packages", type=Path, help="folder of unpacked packages that this Python lacks")
    parser.add_argument("--only", nargs="+", metavar="PART", help="names of parts; default: all")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
