"""Replay: a network on a GPU as CUDA graphs, which launch all kernels of an evaluation with one call.

With small batches, a GPU waits for launches. A graph launches the kernels that an evaluation launches one by one, so
it gives the same bytes.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from patchloom.models.denoiser import Denoiser

KEPT_GRAPHS = 2  # with and without guidance; each one keeps the memory of an evaluation
WARM_UPS = 2  # evaluations before the recording, in which libraries choose and load their kernels

NetworkCall = Callable[[], Tensor]


def cuda_graph(evaluation: NetworkCall) -> NetworkCall:
    """Record an evaluation as a CUDA graph.

    Args:
        evaluation: reads its input from tensors that exist before, and waits for nothing.

    Returns:
        A function that launches the recorded kernels. They read the same tensors, and write the same result.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            evaluation()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
        result = evaluation()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class ReplayedNetwork:
    """A network whose evaluations are recorded once per shape of their input, and then replayed.

    Args:
        denoiser: the network, for sampling: no dropout, no gradients, and weights that stay where they are.
        record: makes the function that repeats an evaluation. An evaluation that it cannot record, because the GPU has
            no memory for it or the network waits for the GPU, is computed as usual from then on.
    """

    def __init__(self, denoiser: Denoiser, record: Callable[[NetworkCall], NetworkCall] = cuda_graph) -> None:
        self.denoiser = denoiser
        self._record: Callable[[NetworkCall], NetworkCall] | None = record
        self._recordings: OrderedDict[tuple[object, ...], _Recording] = OrderedDict()  # by what they depend on

    def __call__(
        self,
        noisy: Tensor,
        sigma: Tensor,
        coordinates: Tensor | None = None,
        labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """`Denoiser.forward` for a single noise level."""
        others = (coordinates, labels, condition)
        shapes = tuple(None if tensor is None else tensor.shape for tensor in (noisy, *others))
        kind = noisy.device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        recording = self._recordings.get((*shapes, half))
        if recording is None and self._record is not None:
            while len(self._recordings) >= KEPT_GRAPHS:
                self._recordings.popitem(last=False)
            try:
                recording = _Recording(self.denoiser, self._record, noisy, others)
            except RuntimeError as error:  # also torch.OutOfMemoryError
                warnings.warn(f"sampling without CUDA graphs: {' '.join(str(error).split())}", stacklevel=2)
                self._record = None
        if recording is None:
            estimate: Tensor = self.denoiser(noisy, sigma, *others)
            return estimate
        self._recordings[(*shapes, half)] = recording
        self._recordings.move_to_end((*shapes, half))
        return recording(noisy, sigma, others)


class _Recording:
    """The recorded evaluation for one shape, and the tensors that it reads."""

    def __init__(
        self,
        denoiser: Denoiser,
        record: Callable[[NetworkCall], NetworkCall],
        noisy: Tensor,
        others: tuple[Tensor | None, ...],
    ) -> None:
        self.sigma = torch.ones((), device=noisy.device)
        self.inputs = [None if tensor is None else tensor.clone() for tensor in (noisy, *others)]
        self.replay = record(lambda: denoiser(self.inputs[0], self.sigma, *self.inputs[1:]))

    def __call__(self, noisy: Tensor, sigma: Tensor, others: tuple[Tensor | None, ...]) -> Tensor:
        self.sigma.fill_(float(sigma))
        for own, given in zip(self.inputs, (noisy, *others), strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        return self.replay().clone()  # the next evaluation writes to the same tensor
