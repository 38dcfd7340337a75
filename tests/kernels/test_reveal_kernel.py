"""The kernel that draws tokens draws what the reference draws, and runs when it is asked for."""

from __future__ import annotations

import pytest
import torch

from kernels.reveal import reveal_tokens
from prime_core.codec import SubtokenCodec
from tests.kernels.drawing import BACKENDS, DEVICE, mixed_rows, run


@pytest.mark.parametrize(
    ("vocab_size", "target_length", "num_rows"), [(600, 3, 10), (257, 8, 5), (16, 4, 5), (4999, 2, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_draws_what_the_reference_draws(
    vocab_size: int, target_length: int, num_rows: int, dtype: torch.dtype
) -> None:
    pytest.importorskip("triton")
    permutation = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(1))
    codec = SubtokenCodec(vocab_size, target_length, permutation)
    rows = mixed_rows(codec, num_rows)
    if dtype != torch.float32 and vocab_size != 600:
        rows = {name: part[:3] for name, part in rows.items()}
    padded = torch.zeros(2 * len(rows["y"]), vocab_size + 3, dtype=dtype)
    padded[::2, :-3] = rows["logits"].to(dtype)
    rows["logits"] = padded[::2, :-3]  # neither rows nor memory are contiguous
    rows["y"] = rows["y"].T.contiguous().T
    expected, drawn = (run(codec, rows, backend) for backend in BACKENDS)
    assert all(torch.equal(a, b) for a, b in zip(expected, drawn, strict=True))
    assert torch.equal(expected.changed, rows["due"].any(-1))
    rounded = run(codec, rows | {"logits": rows["logits"].float()}, "reference")
    assert torch.equal(rounded.y, expected.y)


def test_the_kernel_ranks_long_rows_by_several_chunks() -> None:
    pytest.importorskip("triton")
    codec = SubtokenCodec(3000, 1)
    rows = {name: part[1:4] for name, part in mixed_rows(codec, 4).items()}
    rows["y"], rows["due"] = torch.full((3, 1), codec.mask_index), torch.ones(3, 1, dtype=torch.bool)
    rows["logits"] = rows["logits"].round()  # many equals
    rows["temperature"] = torch.ones(3)
    rows["top_k"], rows["top_p"] = torch.tensor([1700, 0, 300]), torch.tensor([1.0, 0.6003, 0.9])
    expected, drawn = (run(codec, rows, backend) for backend in BACKENDS)
    assert torch.equal(expected.y, drawn.y)


def test_a_row_of_the_kernel_is_independent_of_its_neighbours() -> None:
    pytest.importorskip("triton")
    codec = SubtokenCodec(4999, 3)
    rows = mixed_rows(codec, 5)
    together = run(codec, rows, "triton")
    for row in (1, 3):
        alone = run(codec, {name: part[row : row + 1] for name, part in rows.items()}, "triton")
        assert torch.equal(alone.y[0], together.y[row])


def test_a_kernel_outside_the_interpreter_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    codec = SubtokenCodec(60, 3)
    cpu = mixed_rows(codec, 2)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        reveal_tokens(**cpu, digits=codec.digits, mask_index=codec.mask_index, backend="triton")


def test_which_implementation_runs_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = pytest.importorskip("kernels.triton_ops.reveal")
    codec, calls = SubtokenCodec(60, 3), []
    real = launched.launch_reveal
    monkeypatch.setattr(launched, "launch_reveal", lambda *args: calls.append(1) or real(*args))
    for backend, number in (("reference", 0), ("triton", 1), ("auto", 2 if DEVICE == "cuda" else 1)):
        run(codec, mixed_rows(codec, 1), backend)  # type: ignore[arg-type]
        assert len(calls) == number
