"""Kernels are launched on the device of their tensors."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import kernels.triton_ops
from kernels.marginal import reveal_digits
from kernels.noise import Purpose, uniform
from kernels.reveal import reveal_tokens
from kernels.token_sets import TokenSets
from kernels.triton_ops import marginal, nll, reveal, truncate
from kernels.triton_ops.launch import on_its_device
from prime_core.codec import SubtokenCodec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    positions = torch.arange(3, device=DEVICE)
    uniform(1, positions, positions, Purpose.DRAW, backend="triton")
    assert seen[2] is positions


class Launches:
    """In the place of a kernel: notes its grids and its tensors."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []
        self.tensors: list[torch.Tensor] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *arguments, **constants: self.tensors.extend(
            each for each in arguments if isinstance(each, torch.Tensor)
        )


def test_the_longest_row_that_a_codec_allows_fits_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA takes 2^31 - 1 programs in the first dimension and 65,535 in the others; the interpreter takes any."""
    launches = Launches()
    monkeypatch.setattr(nll, "_set_gradient_kernel", launches)
    vocab_size, num_sets = 2**24, 25  # 24 digits of one bit each
    logits = torch.empty(1, vocab_size)  # nobody touches its memory
    sets = TokenSets(
        torch.empty(vocab_size, dtype=torch.int32), torch.zeros(1).int(), torch.zeros(1, 25).int()
    )
    lse, x_0 = torch.zeros(1, num_sets), torch.zeros(1, dtype=torch.int64)
    nll.set_gradient(logits, sets, x_0, lse, lse, torch.zeros(1), logits)
    ((first, *others),) = launches.grids
    assert vocab_size / 2048 <= first < 2**31 and all(size <= 65535 for size in others)


@pytest.mark.parametrize("draw", ["joint", "marginal"])
def test_the_number_of_rows_does_not_shift_pointers(draw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles a kernel again where a pointer is not a multiple of 16: seconds, in the middle of serving."""
    launches = Launches()
    for module, name in ((reveal, "draw_kernel"), (marginal, "marginal_kernel"), (truncate, "cut_kernel")):
        monkeypatch.setattr(module, name, launches)
    codec, num_rows = SubtokenCodec(16, 2), 3
    y = torch.full((num_rows, 2), codec.mask_index, device=DEVICE)
    u = torch.full((num_rows,) if draw == "joint" else (num_rows, 2), 0.5, dtype=torch.float64, device=DEVICE)
    k = torch.full((num_rows,), 3, device=DEVICE)
    (reveal_tokens if draw == "joint" else reveal_digits)(
        torch.zeros(num_rows, 16, device=DEVICE),
        y,
        torch.ones_like(y, dtype=torch.bool),
        codec.digits.to(DEVICE),
        u,
        None,
        k,
        None,
        mask_index=codec.mask_index,
        backend="triton",
    )
    assert len(launches.grids) == 2 and len(launches.tensors) > 15
    assert all(tensor.data_ptr() % 16 == 0 for tensor in launches.tensors)
