# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Patch Diffusion on one photograph
#
# The method of the paper (Wang et al. 2023) in 100 lines: crops with their coordinates, the preconditioning of EDM, a
# few hundred steps, and sampling at full size. It takes about a minute of one CPU core.

# %%
import matplotlib.pyplot as plt
import skimage.data
import torch
from skimage.transform import resize

import patchloom
from patchloom.models.denoiser import Denoiser
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.loss import edm_weight
from patchloom.models.noise import training_sigmas
from patchloom.models.patches import crop, offsets, patch_schedule
from patchloom.models.unet import SongUNet

R, STEPS, BATCH = 32, 300, 16  # side of a full image, optimisation steps, images per step
random = torch.Generator().manual_seed(0)
torch.manual_seed(0)

# %% [markdown]
# ## Data
#
# 512 windows of a photograph that ships with scikit-image, as (3, R, R) in [-1, 1].

# %%
photograph = torch.tensor(resize(skimage.data.chelsea(), (100, 150), anti_aliasing=True)).float()
photograph = photograph.permute(2, 0, 1) * 2 - 1
corners = torch.rand(512, 2, generator=random) * torch.tensor([100 - R, 150 - R])
images = torch.stack([photograph[:, y : y + R, x : x + R] for y, x in corners.long().tolist()])
print(images.shape, f"standard deviation {images.std():.2f}")

# %% [markdown]
# ## Patches
#
# A step trains on full images with probability p, and otherwise on crops of side R/2 or R/4 (Eq. 5). Smaller crops come
# in larger batches.

# %%
schedule = patch_schedule(R, p=0.5)
for size in schedule.sizes:
    print(f"{size.pixels} x {size.pixels}: {size.probability:.0%} of the steps, {size.batch_multiplier * BATCH} crops")


def draw_patches(step):
    """Crops of one size, and where they are in the full image: x and y of each pixel in [-1, 1]."""
    size = schedule.size_at(step, STEPS, torch.rand((), generator=random).item())
    rows = torch.randint(len(images), (BATCH * size.batch_multiplier,), generator=random)
    places = offsets(torch.rand(len(rows), 2, generator=random), R, size.pixels)
    return crop(images[rows], places, size.pixels)


# %% [markdown]
# ## Denoiser
#
# D(x; σ) = c_skip x + c_out F(c_in x, coordinates; c_noise) (EDM, Eq. 7). The coordinates are two further input
# channels, so the network knows which part of the image a crop is.

# %%
network = SongUNet(R, channels_in=3 + 2, channels_out=3, width=16, width_multipliers=[1, 2, 2], blocks=1, attention=[8])
denoiser = Denoiser(network, channels=3, resolution=R, sigma_data=0.5)
average = HalfLifeEMA(denoiser, halflife_images=1000)
print(f"{sum(weight.numel() for weight in network.parameters()):,} weights")

# %% [markdown]
# ## Training
#
# The loss of a crop is λ(σ) ‖D(y + n; σ) − y‖², with n ~ N(0, σ²) and ln σ ~ N(−1.2, 1.2²) (Eq. 4; EDM, Eq. 8).

# %%
optimizer = torch.optim.Adam(denoiser.parameters(), lr=2e-3)
losses, seen = [], 0
for step in range(STEPS):
    clean, coordinates = draw_patches(step)
    sigma = training_sigmas(torch.randn(len(clean), generator=random))
    noise = torch.randn(clean.shape, generator=random) * sigma[:, None, None, None]
    error = (denoiser(clean + noise, sigma, coordinates) - clean).square().mean((1, 2, 3))
    loss = (edm_weight(sigma) * error).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    seen += len(clean)
    average.update(denoiser, seen, len(clean))
    losses.append(loss.item())
print(f"loss: {sum(losses[:20]) / 20:.3f} in the first 20 steps, {sum(losses[-20:]) / 20:.3f} in the last 20")

# %% [markdown]
# ## Sampling
#
# Heun's method on the full grid of coordinates, with the averaged weights. Nothing is stitched together: the network
# denoises the whole image at once. After 300 steps the samples have the colours of the photograph and little of its
# structure: raise `STEPS` for more.

# %%
denoise = average.module.eval()
sigmas = patchloom.karras_sigmas(steps=18)
start = patchloom.SeededNoise(seeds=range(16), shape=(3, R, R))() * sigmas[0]
samples = patchloom.heun(denoise, start, sigmas)

# %%
figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 3))
for axes, title, shown in ((top, "windows", images[:16]), (bottom, "samples", samples)):
    axes.imshow(torch.cat(list(shown), dim=2).permute(1, 2, 0).clamp(-1, 1) / 2 + 0.5)
    axes.set_title(title)
    axes.axis("off")
