"""Where kernels are launched: on the device of their tensors, whichever is the current one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def on_its_device(launch: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Make the device of a launcher's first tensor the current one meanwhile: Triton launches there."""

    @functools.wraps(launch)
    def launched(*arguments: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
        first = next(each for each in arguments if isinstance(each, Tensor))
        with torch.cuda.device_of(first):
            return launch(*arguments, **options)

    return launched
