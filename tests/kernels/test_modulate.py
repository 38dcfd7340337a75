"""Norm, modulation, residual and rotation: against the written-out formula, kernel against reference, gradients."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.modulate import gated_residual, norm_modulate, residual_norm_modulate, rotate_qk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS: list[Backend] = ["reference", "triton"] if find_spec("triton") else ["reference"]
DTYPES = [torch.float32, torch.bfloat16]
# bfloat16 keeps 8 bits. Torch and GPUs round to them; Triton's interpreter cuts.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2.0**-8 if DEVICE == "cuda" else 2.0**-7}


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def vectors(num_tokens: int, size: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    names = ("shift", "scale", "gate")
    return {name: 0.3 * normal(num_tokens, size, seed=n, dtype=dtype) for n, name in enumerate(names)}


def written_out(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """The formula in float64."""
    x, weight, shift, scale = x.double(), weight.double(), shift.double(), scale.double()
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return normed * (1 + scale) + shift


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((actual.double() - expected).abs().le(tolerance * (1 + expected.abs())).all())


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the launchers that ran."""
    names: list[str] = []
    if "triton" not in BACKENDS:
        return names
    from kernels.triton_ops import modulate, rotary

    def watch(module: Any, name: str) -> None:
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (names.append(name), launch(*args))[1])

    for name in ("launch_norm_modulate", "launch_gated_residual", "launch_residual_norm_modulate"):
        watch(modulate, name)
    watch(rotary, "launch_rotate_qk")
    return names


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1), (3, 24), (5, 130), (2, 768)])
def test_the_pair_is_the_formula(
    backend: Backend, shared: bool, dtype: torch.dtype, num_tokens: int, size: int, launches: list[str]
) -> None:
    x = 3 + normal(num_tokens, size, seed=5)
    branch = normal(num_tokens, size, seed=6, dtype=dtype)
    weight = 1 + 0.5 * normal(size, seed=7, dtype=dtype)
    v = vectors(1 if shared else num_tokens, size)
    kept = x.clone()
    x_new, h = residual_norm_modulate(
        x, branch, v["gate"], weight, v["shift"], v["scale"], out_dtype=dtype, backend=backend
    )
    assert torch.equal(x, kept)
    assert (x_new.dtype, h.dtype) == (torch.float32, dtype)
    assert close(x_new, x.double() + v["gate"].double() * branch.double(), 1e-6)
    assert close(h, written_out(x_new, weight, v["shift"], v["scale"]), TOLERANCE[dtype])
    alone = gated_residual(x, branch, v["gate"], backend=backend)
    torch.testing.assert_close(alone, x_new, rtol=0, atol=1e-6)
    again = norm_modulate(x_new, weight, v["shift"], v["scale"], out_dtype=dtype, backend=backend)
    torch.testing.assert_close(again, h, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    names = ["launch_residual_norm_modulate", "launch_gated_residual", "launch_norm_modulate"]
    assert launches == (names if backend == "triton" else [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_vectors_low_precision_and_eps(backend: Backend) -> None:
    """A stream in bfloat16, one vector shared and one not, vectors in bfloat16, an eps that matters."""
    x = 1e-3 * normal(4, 40, seed=1)
    v = vectors(4, 40, torch.bfloat16)
    for stream, shift, eps in ((x, v["shift"][:1], 1e-5), (x.bfloat16(), v["shift"], 1e-2)):
        h = norm_modulate(
            stream,
            torch.ones(40, device=DEVICE),
            shift,
            v["scale"],
            out_dtype=torch.float32,
            eps=eps,
            backend=backend,
        )
        assert close(h, written_out(stream, torch.ones(40, device=DEVICE), shift, v["scale"], eps), 5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: Backend) -> None:
    """Slices of wider tensors, as `chunk` gives, and transposed ones."""
    wide = normal(6, 90, seed=2)
    shift, scale, gate = (0.3 * wide).chunk(3, -1)
    every_other = normal(12, 30, seed=3)[::2]
    transposed = normal(30, 6, seed=4).T
    weight = normal(60, seed=5)[::2]
    result = residual_norm_modulate(
        every_other, transposed, gate, weight, shift, scale, out_dtype=torch.float32, backend=backend
    )
    dense = (t.contiguous() for t in (every_other, transposed, gate, weight, shift, scale))
    expected = residual_norm_modulate(*dense, out_dtype=torch.float32, backend="reference")
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_writes_into_the_stream(backend: Backend) -> None:
    x, branch, v = normal(4, 40, seed=1), normal(4, 40, seed=2), vectors(1, 40)
    weight = torch.ones(40, device=DEVICE)
    kept = x.clone()
    expected = residual_norm_modulate(
        x, branch, v["gate"], weight, v["shift"], v["scale"], out_dtype=torch.float32, backend=backend
    )
    result = residual_norm_modulate(
        x,
        branch,
        v["gate"],
        weight,
        v["shift"],
        v["scale"],
        out_dtype=torch.float32,
        inplace=True,
        backend=backend,
    )
    assert result.x.data_ptr() == x.data_ptr()
    assert torch.equal(x, expected.x)
    assert torch.equal(result.h, expected.h)
    assert gated_residual(kept, branch, v["gate"], inplace=True, backend=backend) is kept
    assert torch.equal(kept, expected.x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: Backend) -> None:
    empty, v = torch.empty(0, 24, device=DEVICE), vectors(1, 24)
    weight = torch.ones(24, device=DEVICE)
    result = residual_norm_modulate(
        empty, empty, v["gate"], weight, v["shift"], v["scale"], out_dtype=torch.bfloat16, backend=backend
    )
    assert result.x.shape == result.h.shape == (0, 24)
    angles = torch.empty(0, 2, device=DEVICE)
    assert rotate_qk(empty, angles, angles, 2, backend=backend).q.shape == (0, 2, 4)


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    """Turn pairs (i, i + E/2) one by one: x (T, H, E), angle (T, E/2), float64."""
    result, half = x.double().clone(), angle.shape[1]
    for i in range(half):
        cos, sin = angle[:, None, i].double().cos(), angle[:, None, i].double().sin()
        a, b = x[:, :, i].double(), x[:, :, i + half].double()
        result[:, :, i], result[:, :, i + half] = a * cos - b * sin, b * cos + a * sin
    return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_heads", "half"), [(1, 1, 1), (5, 2, 3), (3, 3, 8), (2, 12, 32)])
def test_rotation_is_the_formula(
    backend: Backend,
    dtype: torch.dtype,
    inplace: bool,
    num_tokens: int,
    num_heads: int,
    half: int,
    launches: list[str],
) -> None:
    qkv = normal(2 * num_tokens, 6 * num_heads * half, seed=1, dtype=dtype)[::2]
    kept, angle = qkv.clone(), 3 * normal(num_tokens, half, seed=2)
    result = rotate_qk(qkv, angle.cos(), angle.sin(), num_heads, inplace=inplace, backend=backend)
    parts = kept.unflatten(-1, (3, num_heads, -1)).unbind(1)
    for actual, expected in zip(
        result, (*(rotated(part, angle) for part in parts[:2]), parts[2].double()), strict=True
    ):
        assert actual.dtype == dtype
        assert close(actual, expected, TOLERANCE[dtype])
    assert (result.q.data_ptr() == qkv.data_ptr()) == inplace
    assert torch.equal(qkv, kept) != inplace
    assert launches == (["launch_rotate_qk"] if backend == "triton" else [])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [True, False])
def test_gradients(backend: Backend, shared: bool, launches: list[str]) -> None:
    """Where a gradient is wanted torch computes it, whichever backend was named; against the float64 formula."""
    num = 1 if shared else 3
    leaves = [normal(3, 8, seed=1), normal(3, 8, seed=2), normal(num, 8, seed=3), 1 + normal(8, seed=4)]
    leaves += [normal(num, 8, seed=5), normal(num, 8, seed=6)]
    for leaf in leaves:
        leaf.requires_grad_()
    weights = normal(2, 3, 8, seed=7)
    x_new, h = residual_norm_modulate(*leaves, out_dtype=torch.float32, backend=backend)
    actual = torch.autograd.grad((x_new * weights[0] + h * weights[1]).sum(), leaves)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    x, branch, gate, weight, shift, scale = doubles
    stream = x + gate * branch
    total = stream * weights[0] + written_out(stream, weight, shift, scale) * weights[1]
    for a, b in zip(actual, torch.autograd.grad(total.sum(), doubles), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    qkv, angle = normal(3, 12, seed=8).requires_grad_(), normal(3, 2, seed=9)
    q, k, v = rotate_qk(qkv, angle.cos(), angle.sin(), 1, backend=backend)
    (grad,) = torch.autograd.grad((q * q.detach() + k * k.detach() + v * v.detach()).sum(), qkv)
    torch.testing.assert_close(grad, qkv.detach())  # turning back what was turned
    assert launches == []
    for call in (
        lambda: gated_residual(leaves[0], leaves[1], leaves[2], inplace=True, backend=backend),
        lambda: residual_norm_modulate(*leaves, out_dtype=torch.float32, inplace=True, backend=backend),
        lambda: rotate_qk(qkv, angle.cos(), angle.sin(), 1, inplace=True, backend=backend),
    ):
        with pytest.raises(ValueError, match="inplace must be False where a gradient is wanted"):
            call()
    with torch.no_grad():
        gated_residual(leaves[0], leaves[1], leaves[2], inplace=True, backend=backend)
    assert launches == (["launch_gated_residual"] if backend == "triton" else [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_does_not_feel_its_neighbours(backend: Backend) -> None:
    x, branch = normal(37, 72, seed=1), normal(37, 72, seed=2, dtype=torch.bfloat16)
    v, weight = vectors(37, 72), normal(72, seed=4)
    for rows in ([5], [5, 1], [0, 9, 5, 30]):
        for shared in (False, True):
            shift, scale, gate = (v[n][:1] if shared else v[n] for n in ("shift", "scale", "gate"))
            parts = [part if len(part) == 1 else part[rows] for part in (gate, shift, scale)]
            some = residual_norm_modulate(
                x[rows], branch[rows], parts[0], weight, *parts[1:], out_dtype=torch.bfloat16, backend=backend
            )
            together = residual_norm_modulate(
                x, branch, gate, weight, shift, scale, out_dtype=torch.bfloat16, backend=backend
            )
            assert torch.equal(some.x, together.x[rows])
            assert torch.equal(some.h, together.h[rows])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 3, 8)}, "x must be"),
        ({"weight": (7,)}, r"weight must be \(8,\)"),
        ({"branch": (1, 8)}, "branch must have"),
        ({"gate": (8,)}, "gate must have"),
        ({"shift": (2, 8)}, "shift must have"),
        ({"scale": (3, 1)}, "scale must have"),
    ],
)
def test_shapes_that_do_not_fit(change: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {"x": (3, 8), "branch": (3, 8), "gate": (1, 8), "weight": (8,), "shift": (3, 8), "scale": (1, 8)}
    tensors = {name: torch.zeros(shape) for name, shape in (shapes | change).items()}
    with pytest.raises(ValueError, match=message):
        residual_norm_modulate(**tensors, out_dtype=torch.float32)


def test_the_stream_is_float32() -> None:
    x = torch.zeros(2, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"x must be float32, got torch\.bfloat16"):
        gated_residual(x, x, x)
    with pytest.raises(ValueError, match="x must be float32"):
        residual_norm_modulate(x, x, x, x[0], x, x, out_dtype=torch.float32)


@pytest.mark.parametrize(("width", "half", "message"), [(13, 2, "qkv"), (18, 2, "qkv"), (24, 3, "cos")])
def test_heads_that_do_not_fit(width: int, half: int, message: str) -> None:
    angles = torch.zeros(2, half)
    with pytest.raises(ValueError, match=message):
        rotate_qk(torch.zeros(2, width), angles, angles, 2)
