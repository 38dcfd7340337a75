"""A GPU that is not there: tensors that say they are on ``cuda:0`` and hold their numbers in memory of the CPU.

On a machine without a GPU this runs the code of a GPU: what asks for the device of a tensor gets "cuda", kernels run in
Triton's interpreter, and an operation that mixes devices fails as it does there. What makes the host wait for the
device is counted, so that a test can say where nothing may wait.

To torch itself the tensors are on its "meta" device, which every build has; it is never asked to compute there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
_STREAM = "of cuda:0"
_CPU, _META = torch.device("cpu"), torch.device("meta")

_COPIES = ("aten::_to_copy", "aten::copy_")
# Indices may be on the CPU: torch copies them, and waits.
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
# The host needs to know a number, or the size of a result.
_WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2",
    "aten::unique_consecutive", "aten::unique_dim", "aten::bincount", "aten::is_nonzero",
}  # fmt: skip


class PretendTensor(Tensor):
    """A tensor on the pretended GPU; ``numbers`` is the one that it stands for."""

    numbers: Tensor
    device = GPU  # type: ignore[assignment]
    is_cuda = True
    is_cpu = is_meta = False

    @staticmethod
    def __new__(cls, numbers: Tensor) -> PretendTensor:
        with torch.inference_mode(False):  # torch cannot make views of a subclass's tensors of inference mode
            result: PretendTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                numbers.shape,
                strides=numbers.stride(),
                storage_offset=numbers.storage_offset(),
                dtype=numbers.dtype,
                device=_META,
            )
        result.numbers = numbers
        return result

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of `pretend_gpu`")


class _Dispatch(TorchDispatchMode):
    """Computes on the numbers, and looks at what is mixed and waited for."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, dict(kwargs or {})
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode such operations come whole
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        pretended = {id(each.numbers): each for each in tensors if isinstance(each, PretendTensor)}
        wanted = kwargs.get("device")
        on_gpu = bool(pretended) if wanted is None else wanted == _META
        if name == "aten::_pin_memory":
            return args[0].clone()
        if name in _COPIES:
            on_gpu = self._copied(name, args, kwargs, on_gpu)
        elif pretended:
            self._look(name, func, args, kwargs, tensors)
        if wanted is not None:
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        result = func(*tree_map(_numbers, args), **tree_map(_numbers, kwargs))

        def wrapped(part: Any) -> Any:
            if not on_gpu or not isinstance(part, Tensor):
                return part
            return _known(pretended, part)

        return tree_map(wrapped, result)

    def _look(self, name: str, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
        if name in _WAITING or (name == "aten::repeat_interleave" and kwargs.get("output_size") is None):
            self.waits.append(name)
        strangers = [each for each in tensors if not isinstance(each, PretendTensor) and each.ndim]
        if name in _INDEXING and isinstance(args[0], PretendTensor):
            indices = [each for each in args[1] if each is not None]
            if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
                self.waits.append(f"{name} by a mask")
            elif any(not isinstance(each, PretendTensor) for each in indices):
                self.waits.append(f"{name} by an index on the CPU")
            strangers = [each for each in strangers if not any(each is index for index in indices)]
        if strangers:
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}")

    def _copied(self, name: str, args: Any, kwargs: dict[str, Any], on_gpu: bool) -> bool:
        """Note a copy between devices, unless it is only queued; return whether the result is on the GPU."""
        place = 0 if name == "aten::_to_copy" else 1
        source = isinstance(args[place], PretendTensor)
        target = on_gpu if name == "aten::_to_copy" else isinstance(args[0], PretendTensor)
        queued = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if source != target and not queued:
            self.waits.append("copy to the CPU" if source else "copy to the GPU")
        return target


class _Functions(TorchFunctionMode):
    """What torch does before its dispatcher is asked."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_as_meta, (tuple(args), dict(kwargs or {})))
        if func is torch.tensor and kwargs.get("device") == _META:
            del kwargs["device"]
            return torch.tensor(*args, **kwargs).to(_META)
        if func is Tensor.data.__set__ and isinstance(args[0], PretendTensor):
            func(*args)
            args[0].numbers = args[1].numbers
            return None
        if func is Tensor.tolist and isinstance(args[0], PretendTensor):
            return args[0].to(_CPU).tolist()
        if func is F.scaled_dot_product_attention and isinstance(args[0], PretendTensor):
            return _attention(*args)
        return func(*args, **kwargs)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as torch writes it down, with what its fused kernels demand."""
    assert q.dtype == k.dtype == v.dtype and q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    assert all(each.stride(-1) == 1 for each in (q, k, v)), "the fused kernels do not take it"
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1) @ v


def _known(pretended: dict[int, PretendTensor], part: Tensor) -> Tensor:
    """What was changed in place is itself."""
    known = pretended.get(id(part))
    return PretendTensor(part) if known is None else known


def _as_meta(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return _META
    return _META if isinstance(value, str) and value.startswith("cuda") else value


def _numbers(value: Any) -> Any:
    return value.numbers if isinstance(value, PretendTensor) else value


@contextmanager
def pretend_gpu() -> Iterator[list[str]]:
    """Let ``cuda:0`` be there; gives what makes the host wait, as it happens."""
    from triton.runtime.interpreter import GridExecutor

    waits: list[str] = []
    launch: Callable[..., Any] = GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        pointers = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        assert all(isinstance(each, PretendTensor) for each in pointers), "a kernel got a tensor of the CPU"
        return launch(self, *tree_map(_numbers, args), **tree_map(_numbers, kwargs))

    class Event:
        def record(self, stream: str = "of the current device, which may be another") -> None:
            assert stream == _STREAM, f"the event is in the stream {stream}"

        def synchronize(self) -> None:
            waits.append("event")

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "device_of", nullcontext))
        stack.enter_context(mock.patch.object(torch.cuda, "Event", Event))
        stack.enter_context(mock.patch.object(torch.cuda, "current_stream", {GPU: _STREAM}.__getitem__))
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", launched))
        stack.enter_context(_Dispatch(waits))
        stack.enter_context(_Functions())
        yield waits
