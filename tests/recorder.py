"""A recorder for a machine without a GPU, that behaves as CUDA graphs do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from prime_core.models.graphs import Recording


class RerunRecorder:
    """Records a function by keeping it: a replay runs it again and writes to where its results are.

    As with CUDA graphs, recording alone computes nothing, and recordings of one pool destroy each other's results.

    Attributes:
        pools: what each recording was told to share.
        error: raised instead of recording.
    """

    def __init__(self, error: Exception | None = None) -> None:
        self.pools: list[Any] = []
        self.error = error

    def __call__(self, run: Callable[[], Any], pool: Any) -> Recording:
        if self.error is not None:
            raise self.error
        self.pools.append(pool)
        results = [] if pool is None else pool
        warm_up, outputs = run(), run()
        # What lies at the same place in both runs was there before: weights, or what `prepare` made.
        own = [
            after.data_ptr() != before.data_ptr()
            for before, after in zip(_tensors(warm_up), _tensors(outputs), strict=True)
        ]

        def mine(of: Any) -> list[Tensor]:
            return [tensor for tensor, is_own in zip(_tensors(of), own, strict=True) if is_own]

        def replay() -> None:
            fresh = [tensor.clone() for tensor in mine(run())]
            for tensor in results:
                tensor.fill_(torch.nan)
            for tensor, value in zip(mine(outputs), fresh, strict=True):
                tensor.copy_(value)

        results += mine(outputs)
        for tensor in mine(outputs):
            tensor.fill_(torch.nan)
        return Recording(outputs, replay, results)


def _tensors(of: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(of) if isinstance(leaf, Tensor)]
