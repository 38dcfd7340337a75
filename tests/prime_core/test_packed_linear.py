"""The linear layer of networks: when it takes its packed weight, and when it may not."""

from __future__ import annotations

import pytest
import torch

from prime_core.models import packed_linear as module
from prime_core.models.packed_linear import PackedLinear, pack_linears


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> PackedLinear:
    """A layer whose packed product gives sevens, so that a test sees which one ran."""
    monkeypatch.setattr(module, "pack_weight", lambda weight: weight.detach())
    monkeypatch.setattr(module, "packed_linear", lambda x, packed, bias, activation: torch.full((1,), 7.0))
    return PackedLinear(4, 3, dtype=torch.bfloat16).eval()


X = torch.ones(2, 4, dtype=torch.bfloat16)


def test_inference_takes_the_packed_weight_after_packing_only(layer: PackedLinear) -> None:
    with torch.no_grad():
        assert layer(X).shape == (2, 3)
        pack_linears(layer)
        assert layer(X).tolist() == [7.0]


def test_gradients_other_types_and_training_do_not(layer: PackedLinear) -> None:
    layer.pack()
    assert layer(X).requires_grad
    with torch.no_grad():
        assert layer.float()(X.float()).shape == (2, 3)
        layer.bfloat16().train()
        assert layer(X).shape == (2, 3)


def test_the_state_is_that_of_a_linear_layer(layer: PackedLinear) -> None:
    layer.pack()
    assert sorted(layer.state_dict()) == ["bias", "weight"]
