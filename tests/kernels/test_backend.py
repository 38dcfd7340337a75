"""Which implementation runs, and what is said where the one asked for cannot."""

from __future__ import annotations

from typing import cast

import pytest
import torch

import kernels.backend
from kernels.backend import Backend, choose_backend

CPU = torch.zeros(1)


def test_a_cpu_takes_the_reference() -> None:
    assert choose_backend("auto", CPU) == "reference"
    assert choose_backend("reference", CPU) == "reference"


def test_triton_on_a_cpu_is_an_error_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("triton", CPU) == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="needs a CUDA device, but the tensors are on cpu"):
        choose_backend("triton", CPU)


def test_a_missing_package_is_an_error_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.backend, "find_spec", lambda name: None)
    assert choose_backend("auto", CPU) == "reference"
    with pytest.raises(ValueError, match="triton is not installed"):
        choose_backend("triton", CPU)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 'auto', 'reference' or 'triton'"):
        choose_backend(cast(Backend, "cuda"), CPU)
