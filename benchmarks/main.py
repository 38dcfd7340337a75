"""`prime-bench`: the command line of the benchmarks."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command_line import PROGRAM, UsageError, add_settings, load_settings
from benchmarks.document import to_json, write_json
from benchmarks.memory import MemoryBenchSettings, run_memory
from benchmarks.ops import OpsSettings, run_ops
from benchmarks.plot import plot_files
from benchmarks.report import memory_table, ops_table, sampler_table, server_table, train_table
from benchmarks.sampler import run_comparison
from benchmarks.sampler_settings import SamplerSettings
from benchmarks.server_load import ServerSettings, run_server_load
from benchmarks.settings import BenchSettings, Log
from benchmarks.train_step import TrainSettings, run_training


@dataclass(frozen=True)
class Benchmark:
    """One command.

    Attributes:
        summary: its line in the help text.
        settings: what it is told.
        run: measures and returns the document, without ``command``.
        table: the document for a person to read.
    """

    summary: str
    settings: type[BenchSettings]
    run: Callable[[Any, Log], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]


BENCHMARKS = {
    "sampler": Benchmark(
        "this project's sampler against the published one, on the same random weights",
        SamplerSettings,
        run_comparison,
        sampler_table,
    ),
    "kernels": Benchmark(
        "every numerical op, on each backend, against what the machine can copy and multiply",
        OpsSettings,
        run_ops,
        ops_table,
    ),
    "train": Benchmark(
        "a step of the trainer against a plain loop with full logits, on the same network",
        TrainSettings,
        run_training,
        train_table,
    ),
    "memory": Benchmark(
        "the memory of sampling, losses and likelihoods beside the size of all logits",
        MemoryBenchSettings,
        run_memory,
        memory_table,
    ),
    "server": Benchmark(
        "load of text and image requests on a server on this machine",
        ServerSettings,
        run_server_load,
        server_table,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark: its result on stdout, progress on stderr.

    Args:
        argv: the command line without the program's name; None takes ``sys.argv``.

    Returns:
        0; 2 if the settings cannot be used; 1 if it fails or the result cannot be written.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = vars(_parser().parse_args(arguments))
    command = flags.pop("benchmark")
    try:
        if command == "plot":
            plot_files(flags["results"], flags["output"])
            return 0
        return _run(BENCHMARKS[command], flags, shlex.join([PROGRAM, *arguments]))
    except UsageError as error:
        return _fail(str(error), 2)
    except (OSError, RuntimeError) as error:
        return _fail(str(error), 1)


def _run(benchmark: Benchmark, flags: dict[str, Any], command: str) -> int:
    as_json, output, config = flags.pop("json"), flags.pop("output"), flags.pop("config")
    known = [each.settings for each in BENCHMARKS.values()]
    settings = load_settings(benchmark.settings, flags, config, known)
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"--output: there is no folder {output.parent}")
    try:
        _ = settings.torch_device
    except ValueError as error:
        raise UsageError(f"--device: {error}") from None
    document = benchmark.run(settings, _log) | {"command": command}
    sys.stdout.write(to_json(document) if as_json else benchmark.table(document))
    sys.stdout.flush()
    if output is not None:
        try:
            write_json(document, output)
        except OSError as error:
            return _fail(f"--output: cannot write {output}: {error.strerror}", 1)
    return _fail(document["failed"], 1) if "failed" in document else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, allow_abbrev=False)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(
            name,
            help=benchmark.summary,
            description=f"Measure {benchmark.summary}. Each setting is also an environment variable (--seed: "
            "PRIME_BENCH_SEED) and a key of the TOML file; --json and --output are flags alone.",
            allow_abbrev=False,
        )
        add_settings(command, benchmark.settings)
    plot = commands.add_parser("plot", help="draw results as one SVG picture", allow_abbrev=False)
    plot.add_argument("results", type=Path, nargs="+", metavar="RESULT.json", help="what --output wrote")
    plot.add_argument("--output", type=Path, required=True, metavar="FILE.svg", help="the picture")
    return parser


def _fail(message: str, status: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
