"""GroupNorm with scale, shift and SiLU: kernel and reference against the formula, in both memory formats."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.group_norm import group_norm_silu, is_channels_last

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS: list[Backend] = ["reference", "triton"] if find_spec("triton") else ["reference"]
FORMATS = [torch.contiguous_format, torch.channels_last]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def tolerance(dtype: torch.dtype, backend: Backend) -> float:
    """The reference rounds to bfloat16 after every operation, the kernel once; Triton's interpreter cuts."""
    if dtype == torch.float32:
        return 1e-5
    return 2.0**-6 if backend == "reference" else 2.0**-8 if DEVICE == "cuda" else 2.0**-7


def written_out(
    x: Tensor, num_groups: int, parts: dict[str, Tensor], *, activation: bool, eps: float
) -> Tensor:
    """The formula in float64."""
    groups = x.double().unflatten(1, (num_groups, -1))
    centred = groups - groups.mean((2, 3, 4), keepdim=True)
    h = (centred / (centred.square().mean((2, 3, 4), keepdim=True) + eps).sqrt()).flatten(1, 2)
    v = {name: part.double()[..., None, None] for name, part in parts.items()}
    h = h * v["weight"] + v["bias"]
    if "scale" in v:
        h = h * (1 + v["scale"]) + v["shift"]
    return h * torch.sigmoid(h) if activation else h


def inputs(num_images: int, channels: int, dtype: torch.dtype, *, modulated: bool) -> dict[str, Tensor]:
    parts = {
        "weight": 1 + 0.5 * normal(channels, seed=1, dtype=dtype),
        "bias": normal(channels, seed=2, dtype=dtype),
    }
    if modulated:
        for seed, name in enumerate(("scale", "shift")):
            parts[name] = 0.5 * normal(num_images, channels, seed=3 + seed, dtype=dtype)
    return parts


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of the launcher."""
    calls: list[Any] = []
    if "triton" in BACKENDS:
        from kernels.triton_ops import group_norm

        launch = group_norm.launch_group_norm_silu
        monkeypatch.setattr(
            group_norm, "launch_group_norm_silu", lambda *args: (calls.append(args), launch(*args))[1]
        )
    return calls


# Images, channels, groups, height, width: one value a group, no power of two, several blocks of pixels, several
# programs an image of which the last is not full.
SHAPES = [
    (2, 4, 4, 1, 1),
    (3, 6, 2, 3, 5),
    (2, 18, 2, 30, 31),
    (2, 45, 5, 8, 7),
    (1, 40, 10, 4, 4),
    (2, 21, 1, 20, 13),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_formula(
    backend: Backend,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    launches: list[Any],
) -> None:
    num_images, channels, num_groups, height, width = shape
    x = (3 + 2 * normal(num_images, channels, height, width, seed=9)).to(dtype)
    x = x.contiguous(memory_format=memory_format)
    for modulated, activation in ((False, True), (True, True), (True, False), (False, False)):
        parts = inputs(num_images, channels, dtype, modulated=modulated)
        # A large eps shows that it is used.
        h = group_norm_silu(
            x, num_groups=num_groups, activation=activation, eps=0.01, backend=backend, **parts
        )
        assert h.dtype == dtype
        assert h.is_contiguous(memory_format=memory_format)
        expected = written_out(x, num_groups, parts, activation=activation, eps=0.01)
        error = (h.double() - expected).abs() / (1 + expected.abs())
        assert float(error.max()) < tolerance(dtype, backend)
    assert len(launches) == (4 if backend == "triton" else 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_large_mean_costs_no_precision(backend: Backend, memory_format: torch.memory_format) -> None:
    """Channels far from each other in one group, and all far from zero: E[x^2] - E[x]^2 would lose every digit."""
    x = (1000 + normal(2, 6, 40, 40, seed=1)).contiguous(memory_format=memory_format)
    parts = inputs(2, 6, torch.float32, modulated=False)
    h = group_norm_silu(x, num_groups=2, backend=backend, **parts)
    expected = written_out(x, 2, parts, activation=True, eps=1e-5)
    torch.testing.assert_close(h.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_strides_and_mixed_dtypes(backend: Backend) -> None:
    wide = normal(2, 24, 5, 6, seed=1)
    parts = inputs(2, 12, torch.float32, modulated=True)
    parts["scale"], parts["shift"] = normal(2, 24, seed=7).chunk(2, 1)
    for x in (wide[:, 6:18], wide[:, ::2], wide[:, :12].transpose(2, 3)):
        h = group_norm_silu(x, num_groups=3, backend=backend, **parts)
        expected = written_out(x, 3, parts, activation=True, eps=1e-5)
        torch.testing.assert_close(h.double(), expected, rtol=1e-5, atol=1e-5)
    x = wide[:, :12].bfloat16()
    mixed = group_norm_silu(x, num_groups=3, backend=backend, **parts)
    assert mixed.dtype == torch.bfloat16
    expected = written_out(x, 3, parts, activation=True, eps=1e-5)
    torch.testing.assert_close(mixed.double(), expected, rtol=2.0**-6, atol=2.0**-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_formula(backend: Backend, launches: list[Any]) -> None:
    parts = inputs(2, 6, torch.float32, modulated=True)
    leaves = [normal(2, 6, 3, 4, seed=9), *parts.values()]
    doubles = [leaf.double().requires_grad_() for leaf in leaves]
    for leaf in leaves:
        leaf.requires_grad_()
    upstream = normal(2, 6, 3, 4, seed=5)
    h = group_norm_silu(leaves[0], num_groups=2, backend=backend, **dict(zip(parts, leaves[1:], strict=True)))
    actual = torch.autograd.grad((h * upstream).sum(), leaves)
    double_parts = dict(zip(parts, doubles[1:], strict=True))
    formula = written_out(doubles[0], 2, double_parts, activation=True, eps=1e-5)
    expected = torch.autograd.grad((formula * upstream).sum(), doubles)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    assert launches == []


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_reference_keeps_the_memory_format(memory_format: torch.memory_format) -> None:
    """Off a CPU torch's own norm answers in planes; the device "meta" tells it as a GPU would."""
    x = torch.empty(2, 6, 3, 4, device="meta").contiguous(memory_format=memory_format)
    parts = inputs(2, 6, torch.float32, modulated=True)
    h = group_norm_silu(x, num_groups=2, **{name: part.to("meta") for name, part in parts.items()})
    assert h.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend: Backend) -> None:
    parts = inputs(0, 6, torch.float32, modulated=True)
    assert group_norm_silu(
        torch.zeros(0, 6, 2, 2, device=DEVICE), num_groups=2, backend=backend, **parts
    ).shape == (
        0,
        6,
        2,
        2,
    )


def test_memory_formats_are_told_apart() -> None:
    x = torch.zeros(2, 3, 4, 5)
    assert [is_channels_last(x), is_channels_last(x.to(memory_format=torch.channels_last))] == [False, True]
    assert not is_channels_last(torch.zeros(2, 3, 1, 1))  # both at once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 6, 3)}, "x must be"),
        ({"num_groups": 4}, "num_groups must divide the 6 channels, got 4"),
        ({"num_groups": 0}, "num_groups must divide"),
        ({"weight": torch.zeros(5)}, r"weight must be \(6,\)"),
        ({"bias": torch.zeros(1, 6)}, "bias must be"),
        ({"scale": None}, "must be given together"),
        ({"shift": torch.zeros(1, 6)}, r"shift must be \(2, 6\)"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    parts = inputs(2, 6, torch.float32, modulated=True)
    arguments = {"x": torch.zeros(2, 6, 3, 3), "num_groups": 2, **parts} | change
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**arguments)
