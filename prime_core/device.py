"""Which device a program computes on."""

from __future__ import annotations

import torch

DEVICE_PATTERN = r"^(auto|cpu|cuda(:\d{1,3})?)$"


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; "auto" takes a GPU if torch sees one.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: the name is unknown, or it asks for a GPU that torch does not see.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if num_gpus else "cpu")
    kind, colon, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (colon and not index.isdecimal())):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda" and int(index or 0) >= num_gpus:
        seen = f"only cuda:0 to cuda:{num_gpus - 1}" if num_gpus else "no GPU"
        raise ValueError(f"device is {name!r}, but torch sees {seen} here; use device 'cpu' or 'auto'")
    return torch.device(name)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16; a CPU that does not is many times slower at it than in float32."""
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
