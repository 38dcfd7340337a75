"""Write docs/structure.md: every module with the first line of its docstring, folder by folder.

`make structure` runs it; a test compares the file with what it would write.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "structure.md"
ROOMS = ("kernels", "prime_core", "training", "server", "benchmarks")
HEAD = """# Every module, in one line each

Written by `make structure` from the modules themselves. The way of a request through them is in the
[README](../README.md#the-life-of-a-request); imports run one way, kernels ← prime_core ← {training, server}.
"""


def document() -> str:
    """Return what the file is to hold."""
    folders = sorted({path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")})
    return "\n".join([HEAD, *(_section(folder) for folder in folders)])


def _section(folder: Path) -> str:
    """Return a folder's heading, what it is, and the list of its modules."""
    modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    lines = [f"- `{path.stem}`: {_summary(path)}" for path in modules]
    name = folder.relative_to(ROOT).as_posix()
    return "\n".join([f"## {name}/", "", _summary(folder / "__init__.py"), "", *lines, ""])


def _summary(path: Path) -> str:
    """Return the first paragraph's first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return text.partition("\n")[0]


if __name__ == "__main__":
    FILE.write_text(document(), "utf-8")
