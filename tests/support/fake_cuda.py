"""GPUs without a GPU: tensors on cuda:0 and cuda:1 that have shapes and no values. It needs torch's build for CUDA."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only


class FakeGpus(FakeTensorMode):
    """Tensors of GPUs are fake, and those of the CPU are real.

    As on a machine with GPUs, an operation on tensors of two devices fails. Reading a number from a GPU fails too.
    """

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, on real tensors if none of them is on a GPU."""
        kwargs = kwargs or {}
        is_made_there = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if not is_made_there and not any(isinstance(value, FakeTensor) for value in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
        return super().dispatch(func, types, args, kwargs)

    def _faked(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        shapes = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(self, shapes, tensor.device)


@contextmanager
def fake_gpus() -> Iterator[None]:
    """Fake GPUs inside the block. The backward pass does nothing, because autograd asks for a real device."""
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, create=True),  # copies stay in it
        mock.patch.object(Tensor, "backward", lambda loss: None),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),  # asks for a driver
        FakeGpus(),
    ):
        yield
