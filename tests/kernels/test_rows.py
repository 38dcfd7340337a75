"""Compaction of rows and copies that stop at a count."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.rows import compact_rows, gather_rows, scatter_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS: list[Backend] = ["reference", "triton"] if find_spec("triton") else ["reference"]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the launchers that ran."""
    names: list[str] = []
    if "triton" in BACKENDS:
        from kernels.triton_ops import rows

        def watch(name: str) -> None:
            launch = getattr(rows, name)
            monkeypatch.setattr(rows, name, lambda *a, **b: (names.append(name), launch(*a, **b))[1])

        watch("launch_compact_rows")
        watch("launch_copy_rows")
    return names


def random_mask(num_rows: int, share: float) -> Tensor:
    return torch.rand(num_rows, generator=torch.Generator().manual_seed(num_rows)).to(DEVICE) < share


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_rows", [1, 7, 1024, 2500])
def test_changed_rows_come_first_in_order(
    backend: Backend, num_rows: int, share: float, launches: list[str]
) -> None:
    changed = random_mask(num_rows, share)
    indices, count = compact_rows(changed, backend=backend)
    flags = changed.tolist()
    expected = [i for i, flag in enumerate(flags) if flag] + [i for i, flag in enumerate(flags) if not flag]
    assert indices.tolist() == expected
    assert count.tolist() == [sum(flags)]
    assert (indices.dtype, count.dtype) == (torch.int64, torch.int64)
    assert launches == (["launch_compact_rows"] if backend == "triton" else [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_with_strides_and_without_rows(backend: Backend) -> None:
    changed = random_mask(20, 0.5)
    assert torch.equal(
        compact_rows(changed[::2], backend=backend).indices, compact_rows(changed[::2].clone()).indices
    )
    indices, count = compact_rows(changed[:0], backend=backend)
    assert (indices.tolist(), count.tolist()) == ([], [0])


# A word of eight bytes fits rows of (4,) float32 and (3, 5) int64, and none of the others.
ROWS: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((4,), torch.float32),
    ((3, 5), torch.int64),
    ((3,), torch.bfloat16),
    ((), torch.float32),
    ((5,), torch.bool),
    ((1100, 2), torch.float32),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "dtype"), ROWS)
@pytest.mark.parametrize(("num_changed", "num_places"), [(0, 3), (2, 3), (3, 3), (5, 3), (6, 6)])
def test_copies_stop_at_the_count(
    backend: Backend,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    num_changed: int,
    num_places: int,
    launches: list[str],
) -> None:
    source = torch.arange(6 * max(1, torch.Size(shape).numel())).view(6, *shape).to(DEVICE, dtype)
    order = [4, 1, 5, 0, 3, 2]
    indices = torch.tensor(order, device=DEVICE)
    count = torch.tensor([num_changed], device=DEVICE)
    out = torch.full((num_places, *shape), 1, device=DEVICE, dtype=dtype)
    kept, copied = out.clone(), min(num_changed, num_places)
    assert gather_rows(source, indices, count, out, backend=backend) is out
    assert torch.equal(out[:copied], source[order[:copied]])
    assert torch.equal(out[copied:], kept[copied:])
    target = torch.zeros_like(source)
    assert scatter_rows(out, indices, count, target, backend=backend) is target
    assert torch.equal(target[order[:copied]], source[order[:copied]])
    assert not target[order[copied:]].any()
    assert launches == (["launch_copy_rows"] * 2 if backend == "triton" else [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_start_inside_a_tensor(backend: Backend) -> None:
    """Their address is no multiple of a word's size."""
    source = torch.arange(14.0, device=DEVICE)[1:13].view(3, 4)
    out = torch.zeros(2, 4, device=DEVICE)
    gather_rows(
        source, torch.tensor([2, 0], device=DEVICE), torch.tensor([2], device=DEVICE), out, backend=backend
    )
    assert torch.equal(out, source[[2, 0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": torch.zeros(5, 3)}, "one shape and dtype"),
        ({"source": torch.zeros(5, 2).double()}, "one shape and dtype"),
        ({"source": torch.zeros(2, 5).T}, "contiguous"),
        ({"out": torch.zeros(6, 4)[:, ::2]}, "contiguous"),
        ({"indices": torch.zeros(2, dtype=torch.int64)}, r"indices must be at least \(3,\)"),
        ({"indices": torch.zeros(5, dtype=torch.int32)}, "indices must be"),
        ({"count": torch.tensor(2)}, r"count must be \(1,\)"),
        ({"count": torch.tensor([2.0])}, "count must be"),
    ],
)
def test_rows_that_do_not_fit(change: dict[str, Tensor], message: str) -> None:
    given: dict[str, Any] = {
        "source": torch.zeros(5, 2),
        "indices": torch.arange(5),
        "count": torch.tensor([2]),
        "out": torch.zeros(3, 2),
    }
    given |= change
    with pytest.raises(ValueError, match=message):
        gather_rows(**given)
    with pytest.raises(ValueError, match=message):
        scatter_rows(given["out"], given["indices"], given["count"], given["source"])


@pytest.mark.parametrize("changed", [torch.zeros(3), torch.zeros(2, 3, dtype=torch.bool)])
def test_masks_that_do_not_fit(changed: Tensor) -> None:
    with pytest.raises(ValueError, match=r"changed must be \(rows,\) bool"):
        compact_rows(changed)
