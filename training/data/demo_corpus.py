"""The demo corpus: the King James Bible from Debian's `bible` program, one chapter per document.

    python -m training.data.demo_corpus --output data/demo-text

writes train.txt and heldout.txt. Every 20th chapter is held out whole, so no verse of a held-out chapter
is ever trained on and the split needs no random numbers.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from prime_core.atomic import atomic_write
from training.data.corpus import CorpusError

PASSAGE = "gen1:1-rev22:21"
NUM_VERSES = 31102
HELDOUT_EVERY = 20

_VERSE = re.compile(r"^(\d?[A-Za-z]+\d+):\d+ (.+)$")


def read_bible(program: str = "bible") -> list[str]:
    """Return the verses as the `bible` program prints them, such as "Ge1:1 In the beginning ...".

    Args:
        program: name or path of the program.

    Raises:
        CorpusError: the program is missing, fails, or does not print the whole text.
    """
    path = shutil.which(program)
    if path is None:
        raise CorpusError(
            f"program {program!r} not found: install the Debian package bible-kjv (apt-get install bible-kjv)"
        )
    # With no argument for standard input the program would start its interactive prompt.
    result = subprocess.run(
        [path, "-f", PASSAGE], stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8"
    )
    verses = result.stdout.splitlines()
    if result.returncode != 0 or len(verses) != NUM_VERSES:
        raise CorpusError(
            f"{path} -f {PASSAGE} gave {len(verses)} verses and exit code {result.returncode}, expected "
            f"{NUM_VERSES} and 0: reinstall the Debian packages bible-kjv and bible-kjv-text"
        )
    return verses


def chapters(verses: Iterable[str]) -> list[str]:
    """Group verses into documents: one chapter each, verse texts without references, one verse a line.

    Raises:
        CorpusError: a line does not start with a reference such as "1Sa3:16 ".
    """
    documents: list[list[str]] = []
    current = None
    for line in verses:
        match = _VERSE.match(line)
        if match is None:
            raise CorpusError(f"not a verse with its reference: {line[:60]!r}")
        chapter, text = match.groups()
        if chapter != current:
            documents.append([])
            current = chapter
        documents[-1].append(text.strip())
    return ["\n".join(document) for document in documents]


def split(documents: list[str], every: int = HELDOUT_EVERY) -> tuple[list[str], list[str]]:
    """Return (train, heldout): documents `every`, 2·`every`, ... (counted from 1) are held out."""
    train = [text for number, text in enumerate(documents, 1) if number % every != 0]
    heldout = [text for number, text in enumerate(documents, 1) if number % every == 0]
    return train, heldout


def write_demo_corpus(output: Path, program: str = "bible") -> dict[str, int]:
    """Write train.txt and heldout.txt (documents separated by one blank line) into `output`.

    Returns:
        Number of documents per file name.

    Raises:
        CorpusError: see `read_bible` and `chapters`.
        OSError: the disk is full or not writable; files that were there are whole.
    """
    train, heldout = split(chapters(read_bible(program)))
    output.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, documents in (("train.txt", train), ("heldout.txt", heldout)):
        atomic_write(output / name, ("\n\n".join(documents) + "\n").encode("utf-8"))
        counts[name] = len(documents)
    return counts


def main(argv: list[str] | None = None) -> int:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m training.data.demo_corpus",
        description="write the public-domain demo corpus (train.txt, heldout.txt)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    arguments = parser.parse_args(argv)
    try:
        counts = write_demo_corpus(arguments.output)
    except (CorpusError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    for name, count in counts.items():
        path = arguments.output / name
        print(f"{path}: {count} documents, {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
