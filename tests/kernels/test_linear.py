"""Packed products: the same numbers as the plain ones, the activation applied before rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.linear import Activation, linear, pack_weight, packed_linear

needs_packing = pytest.mark.skipif(
    pack_weight(torch.ones(16, 16, dtype=torch.bfloat16)) is None,
    reason="this processor or this build of torch packs no bfloat16 weights",
)


def operands(num_rows: int, features_in: int, features_out: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, features_in, generator=generator)
    weight = torch.randn(features_out, features_in, generator=generator) * features_in**-0.5
    bias = torch.randn(features_out, generator=generator)
    return x.bfloat16(), weight.bfloat16(), bias.bfloat16()


@needs_packing
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 16, 16), (16, 768, 3072), (37, 96, 50), (130, 31, 257)])
def test_a_packed_product_is_as_close_to_the_exact_one_as_the_plain_one(
    shape: tuple[int, int, int], with_bias: bool, activation: Activation
) -> None:
    x, weight, bias = operands(*shape)
    packed = pack_weight(weight)
    assert packed is not None
    given = bias if with_bias else None
    exact = linear(x.double(), weight.double(), None if given is None else given.double(), activation)
    error = (packed_linear(x, packed, given, activation) - exact).norm() / exact.norm()
    plain_error = (linear(x, weight, given, activation) - exact).norm() / exact.norm()
    assert float(error) < 1.1 * float(plain_error) < 0.01


@needs_packing
def test_the_weight_is_copied() -> None:
    x, weight, bias = operands(16, 32, 48)
    packed = pack_weight(weight)
    assert packed is not None
    before = packed_linear(x, packed, bias)
    weight.zero_()
    assert torch.equal(packed_linear(x, packed, bias), before)


def test_what_does_not_pay_is_not_packed() -> None:
    assert pack_weight(torch.ones(4, 4)) is None
    assert pack_weight(torch.ones(4, 4, dtype=torch.bfloat16, device="meta")) is None
    assert pack_weight(torch.ones(0, 4, dtype=torch.bfloat16)) is None
