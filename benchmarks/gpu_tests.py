"""Test files in several processes at a time, for `benchmarks.gpu`: most of their time on a GPU goes into compiling.

    python -m benchmarks.gpu_tests --processes 4 FILE... -- PYTEST_OPTION...

What pytest prints comes process by process. Interrupted (SIGINT), the processes print what has failed so far, and this
one prints that. It needs the standard library alone.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

# For all that were interrupted to say what they have seen: less than `benchmarks.gpu` waits for this process.
_LAST_WORDS_S = 4.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests; 0 if all of them passed, 1 otherwise."""
    # What a shell starts in the background ignores SIGINT, and so would the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = list(sys.argv[1:] if argv is None else argv)
    middle = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tests")
    parser.add_argument("--processes", type=int, default=4, help="most processes at a time")
    parser.add_argument("files", nargs="+", metavar="FILE", help="test files, those that take longest first")
    options = parser.parse_args(arguments[:middle])
    groups = [options.files[first :: options.processes] for first in range(options.processes)]
    running = [_start(group, arguments[middle + 1 :]) for group in groups if group]
    until_s = None
    try:
        for process, _ in running:
            process.wait()
    except KeyboardInterrupt:  # whoever sent it sent it to all of them
        until_s = time.monotonic() + _LAST_WORDS_S
    return max(_finish(process, printed, until_s) for process, printed in running)


def _start(files: Sequence[str], options: Sequence[str]) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed when it has been read
    command = [sys.executable, "-m", "pytest", *options, *files]
    return subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT), printed


def _finish(process: subprocess.Popen[bytes], printed: IO[bytes], until_s: float | None) -> int:
    """Print what a process printed; 0 if it succeeded. One that does not end in time is ended."""
    try:
        process.wait(None if until_s is None else max(0.0, until_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with printed:
        printed.seek(0)
        print(printed.read().decode(errors="replace"), flush=True)
    return int(process.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
