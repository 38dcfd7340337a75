"""What `benchmarks.gpu` needs on a machine, and what of it is missing. It needs the standard library alone."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

# Import name to what cannot run without it.
NEEDED = {
    "torch": "everything",
    "numpy": "everything",
    "pydantic": "all benchmarks and tests/prime_core",
    "pydantic_settings": "all benchmarks",
    "safetensors": "checkpoints",
    "tiktoken": "tokenizers",
    "regex": "tokenizers",
    "PIL": "images",
    "zstandard": "training",
    "tqdm": "training",
    "prometheus_client": "the server",
    "fastapi": "the server",
    "uvicorn": "the server",
    "triton": "the kernels",
    "pytest": "all tests",
    "pytest_timeout": "limits of single tests",
    "hypothesis": "all tests",
    "scipy": "tests of draws",
}


def missing_packages(packages: Path | None) -> dict[str, str]:
    """Return the needed packages that neither this Python nor a folder of packages has."""
    folders = [] if packages is None else [str(packages)]
    sys.path[:0] = folders
    try:
        return {name: what for name, what in NEEDED.items() if importlib.util.find_spec(name) is None}
    finally:
        del sys.path[: len(folders)]


def missing_tools() -> dict[str, str]:
    """Return what Triton needs to build its launchers and this machine has not."""
    needed = "the kernels"
    compilers = [os.environ.get("CC"), "gcc", "clang"]
    missing = {} if any(name and shutil.which(name) for name in compilers) else {"a C compiler": needed}
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        missing["Python.h"] = needed
    return missing
