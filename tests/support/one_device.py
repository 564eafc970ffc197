"""Checks that code keeps its work on one device, and never waits for it."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
READS = {  # a GPU would wait for its queue, and answer
    torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default, torch.ops.aten._unique2.default,
    torch.ops.aten._linalg_check_errors.default, torch.ops.aten.repeat_interleave.Tensor,
}  # fmt: skip
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}  # by a mask: a count is read
FROM_NUMBERS = {torch.tensor, torch.as_tensor}


class StrayOperation(AssertionError):
    """An operation that a GPU could not do, or would wait for."""


class OneDevice:
    """Inside the `with` block, an operation on tensors of two devices fails, and so does a read from the device.

    A copy between devices must not block. Numbers may not become tensors of the device by `torch.tensor`, which copies
    them and waits.

    Args:
        device: the device, such as meta or a fake GPU. Operations on the CPU alone are allowed.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._modes = _Operations(torch.device(device)), _Constructors()

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Operations(TorchDispatchMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        devices = {tensor.device for tensor in tensors}
        is_masked = operation in INDEXING and any(each is not None and each.dtype == torch.bool for each in args[1])
        if (operation in READS or is_masked) and self.device in devices:
            raise StrayOperation(f"{operation} waits for {self.device}")
        if operation in COPIES:
            devices.add(kwargs.get("device") or tensors[0].device)
            is_blocking = not (kwargs.get("non_blocking") or True in args[2:])
            if len(devices) > 1 and is_blocking:
                raise StrayOperation(f"{operation} between {_names(devices)} blocks")
        elif len(devices) > 1:
            raise StrayOperation(f"{operation} uses tensors on {_names(devices)}")
        return operation(*args, **kwargs)


class _Constructors(TorchFunctionMode):
    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or "cpu")
        if function in FROM_NUMBERS and not isinstance(args[0], Tensor) and device.type != "cpu":
            raise StrayOperation(f"{function.__name__} copies numbers to {device}, and waits")
        return function(*args, **kwargs)


def _names(devices: set[torch.device]) -> str:
    return " and ".join(sorted(map(str, devices)))
