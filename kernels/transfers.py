"""Copies between the host and a GPU that nobody waits for when they are queued.

A copy of pageable memory may wait for all that was queued before it, so both ways go through pinned memory, which
torch keeps and reuses once the device is done with it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def queued(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; a copy from the CPU to a GPU is queued there and not waited for.

    Where it is copied, the given one may be changed as soon as this returns, unless it is pinned already.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class HostCopy:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        """Queue a copy of the tensor as it is when all is done that was queued before.

        Args:
            tensor: on any device. One on the CPU is not copied.
        """
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            # Of its device, which need not be the current one: the copy is in that stream.
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor

    def wait(self) -> Tensor:
        """Return it on the host; on CUDA wait for what was queued before the copy, and for nothing behind it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
