"""A server of our own for the time of a measurement: on the loopback interface, and gone when the block ends."""

from __future__ import annotations

import ipaddress
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

START_LIMIT_S = 120.0
STOP_LIMIT_S = 30.0
_ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def own_server(arguments: Sequence[str]) -> Iterator[str]:
    """Run `prime-serve` on a free port of 127.0.0.1 and yield its URL; it is stopped however the block ends.

    Args:
        arguments: further flags of `prime-serve`.

    Raises:
        RuntimeError: if it does not start; the message has the end of its log.
    """
    command = [sys.executable, "-m", "server.main", "--host", "127.0.0.1", "--port", "0", *arguments]
    # Settings of another server in the environment are not this one's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRIME_")}
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=_ROOT
        )
        try:
            url = _url_of(process)
            if url is None:
                log.seek(0)
                raise RuntimeError(f"the server did not start: {log.read()[-2000:].strip()}")
            yield url
        finally:
            _stop(process)


def check_loopback(url: str) -> str:
    """Return the URL without a slash at its end.

    Raises:
        ValueError: if it is no http URL of this machine's loopback interface.
    """
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if parts.scheme != "http" or not is_loopback or parts.path not in ("", "/") or parts.query:
        raise ValueError("must be http://127.0.0.1:PORT or another address of the loopback interface")
    return f"http://{parts.netloc}"


def _url_of(process: subprocess.Popen[str]) -> str | None:
    """Wait for the line that says where the server is; None if it ends or takes too long."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        lines.put(process.stdout.readline())

    threading.Thread(target=read, daemon=True).start()
    try:
        found = re.search(r"http://\S+", lines.get(timeout=START_LIMIT_S))
    except queue.Empty:
        return None
    return None if found is None else found.group()


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
