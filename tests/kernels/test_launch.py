"""Kernels are launched on the device of their tensors."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import kernels.triton_ops
from kernels.noise import Purpose, uniform
from kernels.triton_ops.launch import on_its_device

FOLDER = Path(kernels.triton_ops.__file__).parent
GUARDED = {"on_its_device", "device_of"}


def launches(tree: ast.AST) -> bool:
    """Whether there is a call ``name_kernel[grid](...)``."""
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id.endswith("kernel")
        for node in ast.walk(tree)
    )


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_module_that_launches_guards_the_device(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if launches(tree) and path.stem != "embed_runs":  # called by embed_gradient only
        assert names & GUARDED


def test_the_device_is_that_of_the_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Noting(torch.cuda.device_of):
        def __init__(self, tensor: torch.Tensor) -> None:
            seen.append(tensor)
            super().__init__(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", Noting)
    first, second = torch.zeros(2), torch.ones(2)
    assert torch.equal(on_its_device(torch.add)(first, second), second)
    assert on_its_device(lambda seed, positions: seed)((1, 2), second) == (1, 2)
    assert [each is want for each, want in zip(seen, (first, second), strict=True)] == [True, True]
    positions = torch.arange(3)
    uniform(1, positions, positions, Purpose.DRAW, backend="triton")
    assert seen[2] is positions
