"""Which implementation of an op runs: its torch reference, or its Triton kernel.

Triton is optional (`pip install mdm-prime[gpu]`) and is imported only when a kernel is chosen. Its interpreter
(the environment variable TRITON_INTERPRET=1, set before the start) runs the same kernels on a CPU: slow, for tests.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal

from torch import Tensor

Backend = Literal["auto", "reference", "triton"]


def choose_backend(backend: Backend, tensor: Tensor) -> Literal["reference", "triton"]:
    """Return the implementation that runs on a tensor.

    Args:
        backend: "reference" (plain torch, any device), "triton", or "auto": Triton where the tensor is on a CUDA
            device and Triton is installed, else the reference.
        tensor: an input of the op; its device decides.

    Raises:
        ValueError: if the name is unknown, or "triton" was asked for and cannot run here.
    """
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"backend must be 'auto', 'reference' or 'triton', got {backend!r}")
    if backend == "reference" or (backend == "auto" and not tensor.is_cuda):
        return "reference"
    installed = find_spec("triton") is not None  # looks at the file system where triton is not imported yet
    if backend == "auto":
        return "triton" if installed else "reference"
    if not installed:
        raise ValueError(
            "backend 'triton' is not available: the package triton is not installed; use 'auto', or install "
            "mdm-prime[gpu]"
        )
    if not tensor.is_cuda and not interpreting():
        raise ValueError(
            f"backend 'triton' needs a CUDA device, but the tensors are on {tensor.device}; use 'auto', or start with "
            "TRITON_INTERPRET=1 to run the kernels in Triton's interpreter"
        )
    return "triton"


def interpreting() -> bool:
    """Return whether Triton kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
