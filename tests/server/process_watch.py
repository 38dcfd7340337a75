"""Memory, threads and files of another process, and how much of the memory is growth.

What is read is anonymous memory (what the process itself wrote: heaps, stacks, tensors; swapped out or not), from
/proc/PID/smaps_rollup. The resident set and the proportional one count the pages of files too: they come and go with
the kernel's cache, and the share of a library's pages changes when another process that uses it starts or ends.
"""

from __future__ import annotations

import re
import statistics
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

EVERY_S = 0.25
WINDOW = 0.2  # share of the readings in the first and in the last window


class Reading(NamedTuple):
    """What a process holds at one moment."""

    memory_bytes: int
    num_threads: int
    num_files: int


def read_process(pid: int) -> Reading:
    folder = Path("/proc") / str(pid)
    rollup = dict(re.findall(r"^(\w+): +(\d+) kB$", (folder / "smaps_rollup").read_text(), re.MULTILINE))
    return Reading(
        1024 * (int(rollup["Anonymous"]) + int(rollup["Swap"])),
        len(list((folder / "task").iterdir())),
        len(list((folder / "fd").iterdir())),
    )


def growth_bytes(memory_bytes: Sequence[int]) -> float:
    """Return how much more the median of the last window is than that of the first.

    Memory of requests that run is noise to both medians, and so is a peak of less than half a window. What a heap keeps
    after a peak counts in full: it was not given back. Of a steady leak, what lies between the middles of the windows
    counts, 1 - WINDOW of it.
    """
    num = max(int(WINDOW * len(memory_bytes)), 1)
    return statistics.median(memory_bytes[-num:]) - statistics.median(memory_bytes[:num])


class Watch:
    """Reads a process again and again while its block runs.

    Attributes:
        readings: at equal distances in time.
    """

    def __init__(self, pid: int) -> None:
        self.readings: list[Reading] = []
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def growth_bytes(self) -> float:
        return growth_bytes([reading.memory_bytes for reading in self.readings])

    def _watch(self) -> None:
        while not self._stop.wait(EVERY_S):
            try:
                self.readings.append(read_process(self._pid))
            except (FileNotFoundError, ProcessLookupError):
                return  # the process has ended: told by whoever waits for its answers

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
