"""A plain PyTorch version of the training step and the sampler, which uses none of Patchloom's code.

It runs one module after the other in float32, with torch's dropout and default Adam, an average in a Python loop over
parameters, and crops cut one by one. Parameters have the names of Patchloom's networks, so both can load the same
weights. A test compares outputs and gradients.
"""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class PlainBlock(nn.Module):
    """DDPM++'s residual block (EDM, F.2.1)."""

    def __init__(
        self, channels_in: int, channels_out: int, embedding: int, dropout: float, attends: bool = False,
        resample: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm0 = nn.GroupNorm(min(32, channels_in // 4), channels_in, eps=1e-6)
        self.act = nn.SiLU()
        halve_or_double = {"down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2), None: nn.Identity()}
        self.resample = halve_or_double[resample]
        self.conv0 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.affine = nn.Linear(embedding, channels_out)
        self.norm1 = nn.GroupNorm(min(32, channels_out // 4), channels_out, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        is_projected = channels_in != channels_out or resample is not None
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if is_projected else None
        self.attends = attends
        if attends:
            self.norm2 = nn.GroupNorm(min(32, channels_out // 4), channels_out, eps=1e-6)
            self.qkv = nn.Conv2d(channels_out, 3 * channels_out, 1)
            self.proj = nn.Conv2d(channels_out, channels_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        residual = self.resample(x) if self.skip is None else self.skip(self.resample(x))
        x = self.conv0(self.resample(self.act(self.norm0(x))))
        x = x + self.affine(embedding)[:, :, None, None]
        x = self.conv1(self.dropout(self.act(self.norm1(x))))
        x = (x + residual) * 0.5**0.5
        if self.attends:
            x = (self.attend(self.norm2(x)) + x) * 0.5**0.5
        return x

    def attend(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        query, key, value = self.qkv(x).reshape(batch, channels, 3, height * width).unbind(2)
        weights = (query.transpose(1, 2) @ key / channels**0.5).softmax(dim=-1)
        out: Tensor = self.proj((value @ weights.transpose(1, 2)).reshape(x.shape))
        return out


class PlainUNet(nn.Module):
    """DDPM++ (EDM, Table 7) without classes: (B, C, H, W) and (B,) -> (B, C', H, W)."""

    def __init__(
        self, resolution: int, channels_in: int, channels_out: int, width: int, width_multipliers: Sequence[int],
        blocks: int, attention: Sequence[int], dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, wide = width, 4 * width
        self.act = nn.SiLU()
        self.map_layer0, self.map_layer1 = nn.Linear(width, wide), nn.Linear(wide, wide)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        kept = [width]
        self.enc[f"{resolution}x{resolution}_conv"] = nn.Conv2d(channels_in, width, 3, padding=1)
        channels = width
        for level, multiplier in enumerate(width_multipliers):
            size = resolution >> level
            if level:
                self.enc[f"{size}x{size}_down"] = PlainBlock(channels, channels, wide, dropout, resample="down")
                kept.append(channels)
            for index in range(blocks):
                attends = size in attention
                self.enc[f"{size}x{size}_block{index}"] = PlainBlock(
                    channels, width * multiplier, wide, dropout, attends
                )
                channels = width * multiplier
                kept.append(channels)
        for level, multiplier in reversed(list(enumerate(width_multipliers))):
            size = resolution >> level
            if level == len(width_multipliers) - 1:
                self.dec[f"{size}x{size}_in0"] = PlainBlock(channels, channels, wide, dropout, attends=True)
                self.dec[f"{size}x{size}_in1"] = PlainBlock(channels, channels, wide, dropout)
            else:
                self.dec[f"{size}x{size}_up"] = PlainBlock(channels, channels, wide, dropout, resample="up")
            for index in range(blocks + 1):
                attends = size in attention and index == blocks
                self.dec[f"{size}x{size}_block{index}"] = PlainBlock(
                    channels + kept.pop(), width * multiplier, wide, dropout, attends
                )
                channels = width * multiplier
        self.dec[f"{resolution}x{resolution}_aux_norm"] = nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)
        self.dec[f"{resolution}x{resolution}_aux_conv"] = nn.Conv2d(channels, channels_out, 3, padding=1)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        half = self.width // 2
        frequencies = (1 / 10000) ** (torch.arange(half, device=x.device) / (half - 1))
        angles = noise[:, None] * frequencies
        embedding = self.act(self.map_layer0(torch.cat([angles.sin(), angles.cos()], dim=1)))
        embedding = self.act(self.map_layer1(embedding))
        kept = []
        for layer in self.enc.values():
            x = layer(x, embedding) if isinstance(layer, PlainBlock) else layer(x)
            kept.append(x)
        for name, layer in self.dec.items():
            if isinstance(layer, PlainBlock):
                x = layer(torch.cat([x, kept.pop()], dim=1) if "_block" in name else x, embedding)
            else:
                x = layer(self.act(x)) if name.endswith("aux_conv") else layer(x)
        return x


class PlainDenoiser(nn.Module):
    """EDM's preconditioning (Table 1), with the coordinates as two more input channels."""

    def __init__(self, network: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.model, self.sigma_data = network, sigma_data

    def forward(self, noisy: Tensor, sigma: Tensor, coordinates: Tensor) -> Tensor:
        spread = sigma.reshape(-1, 1, 1, 1)
        c_skip = self.sigma_data**2 / (spread**2 + self.sigma_data**2)
        c_out = spread * self.sigma_data / (spread**2 + self.sigma_data**2).sqrt()
        c_in = 1 / (spread**2 + self.sigma_data**2).sqrt()
        estimate = self.model(torch.cat([c_in * noisy, coordinates], dim=1), sigma.log() / 4)
        clean: Tensor = c_skip * noisy + c_out * estimate
        return clean


def full_grid(side: int) -> Tensor:
    """(2, R, R) coordinates, x first."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    return torch.stack([x, y])


class PlainTraining:
    """The state of a training loop, and one step."""

    def __init__(self, denoiser: PlainDenoiser, resolution: int, halflife_images: float = 1e5) -> None:
        self.device = next(denoiser.parameters()).device
        self.denoiser, self.halflife_images = denoiser, halflife_images
        self.average = copy.deepcopy(denoiser).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-4, foreach=False, fused=False)
        self.grid = full_grid(resolution).to(self.device)
        self.resolution = resolution

    def step(self, images: Tensor, size: int) -> float:
        """Train on one crop of `size` pixels per image of (B, C, R, R) uint8. Returns the loss."""
        x = images.to(torch.float32) / 127.5 - 1
        crops, coordinates = [], []
        for image in x:
            left, top = torch.randint(self.resolution - size + 1, (2,)).tolist()
            crops.append(image[:, top : top + size, left : left + size])
            coordinates.append(self.grid[:, top : top + size, left : left + size])
        clean = torch.stack(crops)
        sigma = (torch.randn(len(x), device=self.device) * 1.2 - 1.2).exp()
        noise = torch.randn_like(clean) * sigma[:, None, None, None]
        weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        self.optimizer.zero_grad()
        error = (self.denoiser(clean + noise, sigma, torch.stack(coordinates)) - clean) ** 2
        loss = (weight[:, None, None, None] * error).mean()
        loss.backward()
        for parameter in self.denoiser.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        self.optimizer.step()
        beta = 0.5 ** (len(x) / self.halflife_images)
        with torch.no_grad():
            for average, parameter in zip(self.average.parameters(), self.denoiser.parameters(), strict=True):
                average.copy_(parameter.lerp(average, beta))
        return float(loss.detach())


@torch.no_grad()
def plain_heun(denoiser: PlainDenoiser, noise: Tensor, steps: int) -> Tensor:
    """EDM's Algorithm 1 in float64: (B, C, R, R) unit noise -> (B, C, R, R) uint8 images."""
    ramp = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    sigmas = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
    grid = full_grid(noise.shape[-1]).to(noise.device).expand(len(noise), -1, -1, -1)

    def clean(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.to(torch.float32).expand(len(x)).to(x.device)
        estimate: Tensor = denoiser(x.to(torch.float32), level, grid)
        return estimate.to(torch.float64)

    x = noise.to(torch.float64) * sigmas[0]
    for sigma, sigma_next in pairwise(sigmas):
        slope = (x - clean(x, sigma)) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope = (slope + (x_next - clean(x_next, sigma_next)) / sigma_next) / 2
            x_next = x + (sigma_next - sigma) * slope
        x = x_next
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)
