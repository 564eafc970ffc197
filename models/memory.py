"""Memory: the peak of live bytes of a piece of work, counted on tensors that have shapes but no memory."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from patchloom.models.cards import DenoiserConfig
from patchloom.models.checkpoints import SamplingModel
from patchloom.models.codec import to_pixels
from patchloom.models.controlnet import ControlNetwork
from patchloom.models.denoiser import Denoiser, skeleton
from patchloom.models.generate import Sampling, image_size
from patchloom.models.guidance import guided
from patchloom.models.inpainting import Reconstruction
from patchloom.models.normalisation import identity_normalisation
from patchloom.models.random_draws import CropBatch
from patchloom.models.step import HALF_PRECISIONS, StoredRows, crop_losses, seeded_dropout
from patchloom.models.step_plan import CropGroup, StepSettings
from patchloom.models.windows import WindowedNetwork

_Arguments = tuple[Any, ...]
_Keywords = Mapping[str, Any] | None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside the block and still alive, and their peak.

    It counts every storage once, whatever its views, on any device. It does not see what a kernel needs while it
    runs, nor what an allocator keeps or rounds up.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: _Arguments = (), kwargs: _Keywords = None) -> Any:
        """Run an operation and count the tensors that it returns."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def forget(_: object) -> None:
            self._alive.pop(key)
            self.now -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.now += size


# what autocast does to the floats that these functions get, by the type of device
HALVED = {
    F.conv2d, F.conv_transpose2d, F.linear, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.addmm,
    Tensor.matmul, Tensor.__matmul__,
}  # fmt: skip
WIDENED: Mapping[str, set[Any]] = {
    "cuda": {F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax},
    "cpu": set(),
}


class MetaOperations(TorchFunctionMode):
    """Makes the meta device allocate what another device allocates.

    Attention keeps no scores, like the fused kernels of CPUs and GPUs. In half precision the arguments of functions
    are converted as autocast does, which does not know the meta device.

    Args:
        device: type of the device whose memory is estimated, "cpu" or "cuda".
        half: the half precision; None for float32.
    """

    def __init__(self, device: str, half: torch.dtype | None) -> None:
        super().__init__()
        self.dtypes = {}
        if half is not None:
            self.dtypes = dict.fromkeys(HALVED, half) | dict.fromkeys(WIDENED[device], torch.float32)

    def __torch_function__(self, func: Any, types: Any, args: _Arguments = (), kwargs: _Keywords = None) -> Any:
        """Call a function, or what the other device calls instead."""
        if dtype := self.dtypes.get(func):
            args, kwargs = tree_map_only(Tensor, lambda value: _converted(value, dtype), (args, kwargs))
        if func is F.scaled_dot_product_attention and not kwargs and len(args) == 3:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return func(*args, **(kwargs or {}))


def _converted(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


@torch.no_grad()
def sampling_bytes(
    model: SamplingModel, sampling: Sampling, batch: int, device: str, with_gradients: bool = False
) -> int:
    """The peak of live bytes while a batch is sampled, with the weights.

    Args:
        model: a model on the meta device.
        sampling: the options.
        batch: images per batch.
        device: type of the device that will sample, "cpu" or "cuda".
        with_gradients: whether each estimate needs gradients through the network (`Reconstruction`).
    """
    meta = torch.device("meta")
    denoiser, in_one_batch = model.denoiser, device != "cpu"
    height, width = (side // model.card.downscale for side in image_size(model.card, sampling))
    with MetaOperations(device, HALF_PRECISIONS.get(sampling.precision)), LiveBytes() as live:
        x, slope, predicted = torch.empty(3, batch, denoiser.channels, height, width, dtype=torch.float64, device=meta)
        classes = torch.empty(batch, denoiser.classes, device=meta) if denoiser.classes else None
        shown = (
            torch.empty(batch, count, height, width, device=meta) if (count := denoiser.condition_channels) else None
        )
        network = WindowedNetwork(denoiser, denoiser.resolution) if sampling.canvas == "windows" else denoiser
        denoise = guided(network, classes, sampling.guidance, in_one_batch=in_one_batch, condition=shown)
        if with_gradients:
            denoise = Reconstruction(denoise, x, torch.ones_like(x, dtype=torch.bool))
        slope = slope - denoise(predicted, torch.tensor(1.0, dtype=torch.float64))
        to_pixels(x, model.normalisation, model.autoencoder)
    return weight_bytes(model) + int(live.peak)


def training_bytes(config: DenoiserConfig, settings: StepSettings, group: CropGroup, device: str, has_std: bool) -> int:
    """The peak of live bytes of a step, without weights, gradients, averages and the state of the optimiser.

    Args:
        config: the network.
        settings: the settings of the run.
        group: the largest group of crops that are trained on at the same time.
        device: type of the device that will train, "cpu" or "cuda".
        has_std: whether rows are latents with standard deviations.

    Raises:
        NotImplementedError: the network of another package does not support the meta device.
    """
    meta, resolution, channels = torch.device("meta"), settings.schedule.sizes[0].pixels, config.channels
    denoiser, normalisation = skeleton(config).train(), identity_normalisation(channels)
    for parameter in denoiser.parameters():
        parameter.grad = torch.empty_like(parameter)
    with MetaOperations(device, HALF_PRECISIONS.get(settings.precision)), LiveBytes() as live:
        image = torch.empty(len(group.crops), channels, resolution, resolution, device=meta)
        count = config.condition_channels
        shown = image.new_empty(len(image), count, resolution, resolution) if count else None
        std = image.clone() if has_std else None
        text = image.new_empty(len(image), *shape, dtype=torch.float16) if (shape := denoiser.text_shape) else None
        rows = StoredRows(image, image.new_empty(len(image), dtype=torch.int64), std, shown, text)
        batch = CropBatch(
            0, group.blocks, settings.block_size, channels, resolution, group.size.pixels, has_std, meta,
            settings.augmentation,
        )  # fmt: skip
        draws = settings.random.crops(batch)
        with seeded_dropout(denoiser, settings.random.masks(0, group.blocks, settings.block_size, meta), 0, meta):
            plain = replace(settings, precision="fp32")  # the mode converts instead of autocast
            losses, _ = crop_losses(denoiser, rows, draws, group.size.pixels, plain, normalisation)
        losses.sum().backward()
    return int(live.peak)


def weight_bytes(model: SamplingModel) -> int:
    """The bytes of the weights of a model and its autoencoder."""
    coder = vars(model.autoencoder).values() if model.autoencoder else ()
    networks = [model.denoiser, *(part for part in coder if isinstance(part, nn.Module))]
    return frozen_bytes(model.denoiser) + sum(map(_bytes_of, networks))


def frozen_bytes(denoiser: Denoiser) -> int:
    """The bytes of the base of a ControlNet; 0 for other networks."""
    return _bytes_of(denoiser.model.frozen) if isinstance(denoiser.model, ControlNetwork) else 0


def _bytes_of(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in chain(network.parameters(), network.buffers()))


def largest_batch(limit_bytes: float, bytes_of: Callable[[int], int], least: int, most: int) -> int:
    """The largest power of two times `least`, up to `most`, whose memory is within a limit; `least` if none is.

    Args:
        limit_bytes: the limit.
        bytes_of: the bytes of a batch of this size.
        least: the smallest batch.
        most: the largest batch.
    """
    batch = least
    while 2 * batch <= most and bytes_of(2 * batch) <= limit_bytes:
        batch *= 2
    return batch
