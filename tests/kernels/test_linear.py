"""Packed products: the same numbers as the plain ones, the activation applied before rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.linear import Activation, linear, pack_weight, packed_linear

packed_dtypes = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            dtype,
            marks=pytest.mark.skipif(
                pack_weight(torch.ones(16, 16, dtype=dtype)) is None,
                reason=f"this processor or this build of torch packs no weights of {dtype}",
            ),
        )
        for dtype in (torch.bfloat16, torch.float32)
    ],
)
MAX_ERROR = {torch.bfloat16: 1e-2, torch.float32: 1e-6}


def operands(
    num_rows: int, features_in: int, features_out: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, features_in, generator=generator)
    weight = torch.randn(features_out, features_in, generator=generator) * features_in**-0.5
    bias = torch.randn(features_out, generator=generator)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@packed_dtypes
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 16, 16), (16, 768, 3072), (37, 96, 50), (130, 31, 257)])
def test_a_packed_product_is_as_close_to_the_exact_one_as_the_plain_one(
    shape: tuple[int, int, int], with_bias: bool, activation: Activation, dtype: torch.dtype
) -> None:
    x, weight, bias = operands(*shape, dtype)
    packed = pack_weight(weight)
    assert packed is not None
    given = bias if with_bias else None
    exact = linear(x.double(), weight.double(), None if given is None else given.double(), activation)
    error = (packed_linear(x, packed, given, activation) - exact).norm() / exact.norm()
    plain_error = (linear(x, weight, given, activation) - exact).norm() / exact.norm()
    assert plain_error < MAX_ERROR[dtype]
    # Rounding to bfloat16 is nearly all of its error; in float32 the order of the sums, and the tanh, show.
    assert error < (1.1 * plain_error if dtype == torch.bfloat16 else MAX_ERROR[dtype])


@packed_dtypes
def test_the_weight_is_copied(dtype: torch.dtype) -> None:
    x, weight, bias = operands(16, 32, 48, dtype)
    packed = pack_weight(weight)
    assert packed is not None
    before = packed_linear(x, packed, bias)
    weight.zero_()
    assert torch.equal(packed_linear(x, packed, bias), before)


def test_what_does_not_pay_is_not_packed() -> None:
    assert pack_weight(torch.ones(4, 4, dtype=torch.float64)) is None
    assert pack_weight(torch.ones(4, 4, dtype=torch.bfloat16, device="meta")) is None
    assert pack_weight(torch.ones(0, 4)) is None
    assert pack_weight(torch.ones(0, 4, dtype=torch.bfloat16)) is None


def test_a_build_without_onednn_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert pack_weight(torch.ones(4, 4)) is None


def test_float32_is_packed_on_x86_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    assert pack_weight(torch.ones(4, 4)) is None
