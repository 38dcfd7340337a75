"""`prime-serve` as a process, with faults in it if a test asks for them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from server.fault_seam import VARIABLE

ROOT = Path(__file__).resolve().parents[2]
READY = re.compile(r"prime-serve: (http://127\.0\.0\.1:\d+) is ready; model .*\n")


class Served:
    """A server on a free port; as a context, it is ended at the end whatever happened.

    Attributes:
        url: where it listens.
        start_s: seconds from the start of the process until it was ready.
    """

    def __init__(
        self,
        *flags: str,
        faults: list[Mapping[str, object]] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PRIME_")}
        variables = {**inherited, "OMP_NUM_THREADS": "1", **(environment or {})}
        if faults is not None:
            (folder / "faults.json").write_text(json.dumps(faults))
            variables[VARIABLE] = str(folder / "faults.json")
        self._log_path = folder / "log"
        started_s = time.monotonic()
        with self._log_path.open("wb") as log:  # a file: a pipe that nobody reads would hold the server up
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "server.main", "--port", "0", "--num-threads", "1", *flags],
                cwd=ROOT,
                env=variables,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        self.start_s = time.monotonic() - started_s
        found = READY.fullmatch(line)
        assert found, (line, self.log)
        self.url = found[1]

    @property
    def log(self) -> str:
        return self._log_path.read_text("utf-8", "replace")

    def post(self, **body: object) -> httpx.Response:
        return httpx.post(f"{self.url}/generate", json=body, timeout=60)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=60)

    def outputs(self, **body: object) -> Any:
        return self.post(**body).json()["outputs"]

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def wait(self) -> int:
        return self.popen.wait(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.popen.kill()
        self.popen.communicate()
        self._folder.cleanup()
