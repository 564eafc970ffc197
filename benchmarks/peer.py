"""Peer: another package's network and its usual training loop, in a process that takes steps when it is asked to.

    python -P peer.py diffusers '{"side": 64, "batch": 8, ...}'

It needs torch and that package, and nothing of this project, so that any environment can run it. A request is a line
of JSON and so is its answer; the first line, unasked, tells what stands here.

    {"count": 32}              -> {"parameters": ..., "flops": ...}: of a network of this width, an image forward
    {"train": 32, "steps": 5}  -> {"images": 40, "loss": ...}: trained on, of noise
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
GROUPS = 8  # of channels, each normalised alone; so widths can be multiples of 8
CLIP = 1.0  # the gradients' largest norm, in both packages' own loops


@dataclass(frozen=True)
class Setting:
    """What all networks share: pixels a side, images a step, width multipliers, blocks a level, attention's sides."""

    side: int
    batch: int
    multipliers: list[int]
    blocks: int
    attention: list[int]
    dropout: float
    threads: int

    @property
    def attends(self) -> list[bool]:
        """Whether each level attends, the largest first."""
        return [self.side >> level in self.attention for level in range(len(self.multipliers))]


@dataclass(frozen=True)
class Package:
    """A package's network of a width, and its loop; `names` are the distributions whose versions matter."""

    names: tuple[str, ...]
    network: Callable[[Setting, int], nn.Module]
    loop: Callable[[Setting, nn.Module], Step]


def diffusers_network(setting: Setting, width: int) -> nn.Module:
    """UNet2DModel, all as it comes but for the sizes; it has one more block a level on its way up, as ours."""
    down = ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in setting.attends]
    up = ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(setting.attends)]
    network: nn.Module = import_module("diffusers").UNet2DModel(
        sample_size=setting.side, in_channels=3, out_channels=3, layers_per_block=setting.blocks,
        block_out_channels=[width * multiplier for multiplier in setting.multipliers], down_block_types=down,
        up_block_types=up, norm_num_groups=GROUPS, dropout=setting.dropout,
    )  # fmt: skip
    return network


def diffusers_loop(_: Setting, network: nn.Module) -> Step:
    """What diffusers' example of unconditional training does in a step: noise is foretold; AdamW; an EMA of its own."""
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
    """denoising-diffusion-pytorch's Unet: two blocks a level, whatever is asked, and linear attention at the others."""
    network: nn.Module = import_module("denoising_diffusion_pytorch").Unet(
        width, dim_mults=tuple(setting.multipliers), full_attn=tuple(setting.attends), flash_attn=True,
        dropout=setting.dropout,
    )  # fmt: skip
    return network


def ddp_loop(setting: Setting, network: nn.Module) -> Step:
    """What its Trainer does in a step, with its own settings: Adam, and ema_pytorch's average every tenth step."""
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
    "diffusers": Package(("diffusers", "accelerate"), diffusers_network, diffusers_loop),
    "ddp": Package(("denoising-diffusion-pytorch", "accelerate"), ddp_network, ddp_loop),
}


@functools.cache
def accelerator() -> Any:
    """accelerate's, on the CPU in float32, or None where it is not installed."""
    with contextlib.suppress(ModuleNotFoundError):
        return import_module("accelerate").Accelerator(cpu=True, mixed_precision="no")
    return None


def prepared(network: nn.Module, optimizer: Any) -> tuple[nn.Module, Any, Callable[..., Any], Callable[..., Any]]:
    """Network, optimizer, backward pass and clipping, accelerate's where it is installed."""
    if accelerator() is None:
        return network, optimizer, Tensor.backward, nn.utils.clip_grad_norm_
    network, optimizer = accelerator().prepare(network, optimizer)
    return network, optimizer, accelerator().backward, accelerator().clip_grad_norm_


class Peer:
    """A package's networks, one a width, each with its own training."""

    def __init__(self, package: Package, setting: Setting) -> None:
        self.package, self.setting = package, setting
        self._step_of = functools.cache(self._start)

    def _start(self, width: int) -> Step:
        torch.manual_seed(0)
        return self.package.loop(self.setting, self.package.network(self.setting, width).train())

    def count(self, width: int) -> dict[str, Any]:
        """Parameters and FLOPs of one image forward, attention included; a multiply-add counts 2."""
        with torch.device("meta"), torch.no_grad():
            network = self.package.network(self.setting, width).eval()
            image, time = torch.zeros(1, 3, self.setting.side, self.setting.side), torch.zeros(1, dtype=torch.long)
            with FlopCounterMode(display=False) as counter:
                network(image, time)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        return {"parameters": parameters, "flops": int(counter.get_total_flops())}

    def train(self, width: int, steps: int) -> dict[str, Any]:
        """Take steps on uint8 noise."""
        step, loss = self._step_of(width), 0.0
        shape = (self.setting.batch, 3, self.setting.side, self.setting.side)
        for _ in range(steps):
            loss = float(step(torch.randint(0, 256, shape, dtype=torch.uint8)).detach())
        return {"images": steps * self.setting.batch, "loss": loss}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What was asked for."""
        return self.count(request["count"]) if "count" in request else self.train(request["train"], request["steps"])


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """Of torch and of those of these that are installed."""
    found = {"torch": str(torch.__version__)}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main() -> None:
    """Answer until nobody asks any more."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a package prints is no answer
    package, setting = PACKAGES[sys.argv[1]], Setting(**json.loads(sys.argv[2]))
    torch.set_num_threads(setting.threads)
    peer = Peer(package, setting)
    print(json.dumps({"versions": versions(package.names)}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(peer.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
