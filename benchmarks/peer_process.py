"""A process with another package's network and its usual training loop, which takes steps on request.

    python -P peer_process.py diffusers '{"side": 64, "batch": 8, ...}'

It needs torch and the package, and nothing of Patchloom, so any environment can run it. Each request and each answer
is one line of JSON. The process first prints the versions of its packages.

    {"count": 32}              -> {"parameters": ..., "flops": ...}: of a network of this width, forward, per image
    {"train": 32, "steps": 5}  -> {"images": 40, "loss": ...}: trained on noise
"""

import contextlib
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[Tensor], Tensor]  # (B, 3, R, R) uint8 -> the loss
GROUPS = 8  # of channels in a group norm; widths are multiples of it
CLIP = 1.0  # the maximum gradient norm, in the loops of both packages


@dataclass(frozen=True)
class Setting:
    """What all networks share; `attention` lists the sides in pixels of the levels with attention."""

    side: int
    batch: int
    multipliers: list[int]
    blocks: int
    attention: list[int]
    dropout: float
    threads: int

    @property
    def attends(self) -> list[bool]:
        """Whether each level has attention, the largest level first."""
        return [self.side >> level in self.attention for level in range(len(self.multipliers))]


@dataclass(frozen=True)
class Request:
    """Count the network of a width, or train it for some steps."""

    count: int | None = None
    train: int | None = None
    steps: int = 0


@dataclass(frozen=True)
class ForwardCost:
    """The parameters of a network, and its forward FLOPs per image."""

    parameters: int
    flops: int


@dataclass(frozen=True)
class TrainedSteps:
    """The images of the steps that were taken, and the last loss."""

    images: int
    loss: float


@dataclass(frozen=True)
class PeerPackage:
    """How to build a package's network of a width, and its training loop."""

    names: tuple[str, ...]  # the distributions whose versions are reported
    network: Callable[[Setting, int], nn.Module]
    loop: Callable[[Setting, nn.Module], Step]


def diffusers_network(setting: Setting, width: int) -> nn.Module:
    """UNet2DModel with default options except the sizes; like Patchloom's, its decoder has one more block per level."""
    down = ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in setting.attends]
    up = ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(setting.attends)]
    network: nn.Module = import_module("diffusers").UNet2DModel(
        sample_size=setting.side, in_channels=3, out_channels=3, layers_per_block=setting.blocks,
        block_out_channels=[width * multiplier for multiplier in setting.multipliers], down_block_types=down,
        up_block_types=up, norm_num_groups=GROUPS, dropout=setting.dropout,
    )  # fmt: skip
    return network


def diffusers_loop(_: Setting, network: nn.Module) -> Step:
    """A step of diffusers' example of unconditional training: noise prediction, AdamW, diffusers' EMA."""
    diffusers = import_module("diffusers")
    noises = diffusers.DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    average = diffusers.training_utils.EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)
    network, optimizer, backward, clip = prepared(network, optimizer)

    def step(images: Tensor) -> Tensor:
        clean = images.to(torch.float32) / 127.5 - 1
        noise = torch.randn_like(clean)
        times = torch.randint(1000, (len(clean),))
        estimate = network(noises.add_noise(clean, noise, times), times).sample
        loss = functional.mse_loss(estimate, noise)
        backward(loss)
        clip(network.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        return loss

    return step


def ddp_network(setting: Setting, width: int) -> nn.Module:
    """Unet of denoising-diffusion-pytorch: two blocks per level, and linear attention at the other levels."""
    network: nn.Module = import_module("denoising_diffusion_pytorch").Unet(
        width, dim_mults=tuple(setting.multipliers), full_attn=tuple(setting.attends), flash_attn=True,
        dropout=setting.dropout,
    )  # fmt: skip
    return network


def ddp_loop(setting: Setting, network: nn.Module) -> Step:
    """A step of its Trainer with default settings: Adam, and the average of ema_pytorch every tenth step."""
    diffusion = import_module("denoising_diffusion_pytorch").GaussianDiffusion(network, image_size=setting.side)
    optimizer = torch.optim.Adam(diffusion.parameters(), 1e-4, betas=(0.9, 0.99))
    average = import_module("ema_pytorch").EMA(diffusion, beta=0.995, update_every=10)
    diffusion, optimizer, backward, clip = prepared(diffusion, optimizer)

    def step(images: Tensor) -> Tensor:
        loss: Tensor = diffusion(images.to(torch.float32) / 255)
        backward(loss)
        clip(diffusion.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        return loss

    return step


PACKAGES = {
    "diffusers": PeerPackage(("diffusers", "accelerate"), diffusers_network, diffusers_loop),
    "ddp": PeerPackage(("denoising-diffusion-pytorch", "accelerate"), ddp_network, ddp_loop),
}


@functools.cache
def accelerator() -> Any:
    """accelerate's Accelerator on the CPU in float32, or None if accelerate is not installed."""
    with contextlib.suppress(ModuleNotFoundError):
        return import_module("accelerate").Accelerator(cpu=True, mixed_precision="no")
    return None


def prepared(network: nn.Module, optimizer: Any) -> tuple[nn.Module, Any, Callable[..., Any], Callable[..., Any]]:
    """Network, optimizer, backward pass and clipping; accelerate's if it is installed."""
    if accelerator() is None:
        return network, optimizer, Tensor.backward, nn.utils.clip_grad_norm_
    network, optimizer = accelerator().prepare(network, optimizer)
    return network, optimizer, accelerator().backward, accelerator().clip_grad_norm_


class Peer:
    """A package's networks, one per width, each with its own training."""

    def __init__(self, package: PeerPackage, setting: Setting) -> None:
        self.package, self.setting = package, setting
        self._step_of = functools.cache(self._start)

    def _start(self, width: int) -> Step:
        torch.manual_seed(0)
        return self.package.loop(self.setting, self.package.network(self.setting, width).train())

    def count(self, width: int) -> ForwardCost:
        """Parameters and forward FLOPs per image, including attention; a multiply-add counts as 2."""
        with torch.device("meta"), torch.no_grad():
            network = self.package.network(self.setting, width).eval()
            image, time = torch.zeros(1, 3, self.setting.side, self.setting.side), torch.zeros(1, dtype=torch.long)
            with FlopCounterMode(display=False) as counter:
                network(image, time)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        return ForwardCost(parameters, int(counter.get_total_flops()))

    def train(self, width: int, steps: int) -> TrainedSteps:
        """Take steps on uint8 noise."""
        step, loss = self._step_of(width), 0.0
        shape = (self.setting.batch, 3, self.setting.side, self.setting.side)
        for _ in range(steps):
            loss = float(step(torch.randint(0, 256, shape, dtype=torch.uint8)).detach())
        return TrainedSteps(steps * self.setting.batch, loss)

    def answer(self, request: Request) -> ForwardCost | TrainedSteps:
        """Answer one request."""
        if request.count is not None:
            return self.count(request.count)
        assert request.train is not None
        return self.train(request.train, request.steps)


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """The versions of torch and of the installed packages of these names."""
    found = {"torch": str(torch.__version__)}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main() -> None:
    """Answer requests until stdin closes."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a package prints must not mix with the answers
    package, setting = PACKAGES[sys.argv[1]], Setting(**json.loads(sys.argv[2]))
    torch.set_num_threads(setting.threads)
    peer = Peer(package, setting)
    print(json.dumps({"versions": versions(package.names)}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(vars(peer.answer(Request(**json.loads(line))))), file=answers, flush=True)


if __name__ == "__main__":
    main()
