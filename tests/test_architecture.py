"""Imports run one way, foreign serialisation stays outside, and the checker itself can fail.

kernels <- prime_core <- {training, server} <- deploy; benchmarks may import all of them and nobody
imports benchmarks. Imports are read from the syntax tree, so those inside functions and those made through
importlib with a literal name count as well.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "kernels": {"kernels"},
    "prime_core": {"kernels", "prime_core"},
    "training": {"kernels", "prime_core", "training"},
    "server": {"kernels", "prime_core", "server"},
    "deploy": {"kernels", "prime_core", "training", "server", "deploy"},
    "benchmarks": {"kernels", "prime_core", "training", "server", "deploy", "benchmarks"},
}
WEB = {"fastapi", "starlette", "uvicorn", "pydantic_settings", "prometheus_client", "httpx", "requests"}
KNOWS_NO_WEB = (Path("kernels"), Path("prime_core"), Path("server/engine"))
ABOUT_HTTP = ("server.http", "server.routes", "server.schemas")
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in a module that lives in `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield node.lineno, ".".join([*parents, *([node.module] if node.module else [])])
        elif isinstance(node, ast.Call) and node.args:
            called = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            )
            argument = node.args[0]
            if called in {"import_module", "__import__"} and isinstance(argument, ast.Constant):
                name = str(argument.value)
                yield node.lineno, f"{package}{name}" if name.startswith(".") else name


def unsafe_loads(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and description of everything that unpickles without importing a pickle module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
            if node.value.id == "torch":
                yield node.lineno, "torch.load"
        elif isinstance(node, ast.ImportFrom) and node.module in {"torch", "torch.serialization"}:
            if any(alias.name == "load" for alias in node.names):
                yield node.lineno, "torch.load"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield node.lineno, "allow_pickle"


def violations(path: Path, source: str) -> list[str]:
    """All broken rules of one module.

    Args:
        path: path of the module relative to the repository, such as `server/engine/engine.py`.
        source: text of the module.

    Returns:
        One line per broken rule, with file and line number.
    """
    room = path.parts[0]
    package = ".".join(path.parent.parts)
    reads_foreign_files = room == "prime_core" and any(
        part.startswith("published") for part in path.parts[1:]
    )
    knows_no_web = any(path.is_relative_to(folder) for folder in KNOWS_NO_WEB)
    tree = ast.parse(source)
    found = []
    for line, module in imported_modules(tree, package):
        top = module.split(".")[0]
        if top in MAY_IMPORT and top not in MAY_IMPORT[room]:
            found.append(f"{path}:{line}: {room} imports {module}")
        if knows_no_web and (top in WEB or module.startswith(ABOUT_HTTP)):
            found.append(f"{path}:{line}: {path.parent} knows HTTP ({module})")
        if top in PICKLES and not reads_foreign_files:
            found.append(f"{path}:{line}: {module} outside prime_core/published")
        if top == "tests":
            found.append(f"{path}:{line}: imports the tests")
    if not reads_foreign_files:
        found += [f"{path}:{line}: {what} outside prime_core/published" for line, what in unsafe_loads(tree)]
    if path.name in {"utils.py", "helpers.py", "misc.py", "common.py"}:
        found.append(f"{path}: a file is named after what it holds")
    return found


def modules() -> list[Path]:
    """All modules of all rooms, relative to the repository."""
    return sorted(path.relative_to(ROOT) for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def test_rooms_are_there() -> None:
    assert {path.parts[0] for path in modules()} >= {
        "kernels",
        "prime_core",
        "training",
        "server",
        "benchmarks",
    }


def test_imports_run_one_way() -> None:
    found = [line for path in modules() for line in violations(path, (ROOT / path).read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/nll.py", "import prime_core.codec"),
        ("kernels/nll.py", "from prime_core import codec"),
        ("prime_core/sampling/plan.py", "def late():\n    from server.engine.engine import Engine"),
        ("prime_core/sampling/plan.py", "import importlib\nimportlib.import_module('training.train')"),
        ("prime_core/sampling/plan.py", "__import__('deploy')"),
        ("prime_core/sampling/plan.py", "from fastapi import FastAPI"),
        ("prime_core/sampling/plan.py", "import pydantic_settings"),
        ("kernels/backend.py", "import uvicorn.config"),
        ("server/engine/engine.py", "import training"),
        ("server/engine/engine.py", "import fastapi"),
        ("server/engine/engine.py", "from server.http.errors import ApiError"),
        ("server/routes/generate.py", "from ...training import train"),
        ("training/train.py", "from server import app"),
        ("training/train.py", "import benchmarks.main"),
        ("server/engine/engine.py", "import pickle"),
        ("training/train.py", "from pickle import loads"),
        ("prime_core/checkpoint.py", "import pickle as p"),
        ("server/engine/engine.py", "import torch\ntorch.load('x')"),
        ("training/resume.py", "import torch\nread = torch.load"),
        ("training/resume.py", "from torch import load"),
        ("training/data/text.py", "import numpy as np\nnp.load('x', allow_pickle=True)"),
        ("prime_core/utils.py", ""),
        ("training/train.py", "import tests.conftest"),
    ],
)
def test_checker_sees_a_planted_violation(path: str, source: str) -> None:
    assert len(violations(Path(path), source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "kernels/backend.py",
            "import torch\nimport importlib\nimportlib.import_module('kernels.triton_ops.nll')",
        ),
        ("kernels/backend.py", "from . import nll\nfrom .triton_ops import embed"),
        (
            "prime_core/sampling/plan.py",
            "from kernels.noise import uniforms\nfrom prime_core.codec import Codec",
        ),
        ("prime_core/published/importer.py", "import pickle"),
        (
            "server/app.py",
            "import fastapi\nfrom prime_core import load_checkpoint\nfrom .engine.engine import Engine",
        ),
        ("server/routes/generate.py", "from ..engine.engine import Engine"),
        ("training/data/text.py", "import numpy as np\nnp.load('x', allow_pickle=False)"),
        ("benchmarks/main.py", "import server.app, training.train, kernels"),
        ("training/train.py", "import json\nstate = json.load(open('x'))"),
    ],
)
def test_checker_lets_the_allowed_pass(path: str, source: str) -> None:
    assert violations(Path(path), source) == []
