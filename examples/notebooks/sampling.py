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
# # A registered model in Python
#
# Your own sampler, and out-painting, with a model of the registry. `patchloom demo --pixels --out demo-pixels`
# registers this one: run it first, or give another model of pixels.

# %%
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

import patchloom

MODEL = "models:/patchloom-demo-pixels@champion"

# %%
description = patchloom.describe_model(MODEL)
print(description.reference, description.resolution, description.class_names)
denoiser = patchloom.load_model(MODEL)

# %% [markdown]
# ## Your own sampler
#
# A sampler is a function of the denoiser, the noise and the noise levels. This one is the midpoint method for
# dx/dσ = (x − D(x; σ)) / σ (EDM, Eq. 1), in float64 as all samplers of Patchloom are.


# %%
@torch.no_grad()
def midpoint(denoise, start, sigmas):
    """The explicit midpoint method, with the geometric mean of two noise levels between them."""
    x = start.double()
    for sigma, lower in pairwise(sigmas):
        middle = (sigma * lower).sqrt()
        slope = (x - denoise(x, sigma)) / sigma
        if lower > 0:
            between = x + (middle - sigma) * slope
            slope = (between - denoise(between, middle)) / middle
        x = x + (lower - sigma) * slope
    return x


shape = (denoiser.channels, denoiser.resolution, denoiser.resolution)
start = patchloom.SeededNoise(seeds=range(8), shape=shape)() * 80
exact = patchloom.heun(denoiser, start, patchloom.karras_sigmas(steps=64))
for steps in (4, 8, 16):
    sigmas = patchloom.karras_sigmas(steps)
    errors = {
        sampler.__name__: (sampler(denoiser, start, sigmas) - exact).abs().mean().item()
        for sampler in (patchloom.euler, midpoint, patchloom.heun)
    }
    print(steps, "steps:", ", ".join(f"{name} {error:.4f}" for name, error in errors.items()))

# %% [markdown]
# ## Out-painting
#
# A sample becomes the center of a canvas twice as wide, and the model fills the rest. `sample` writes a folder, and a
# second call with the same options samples only what is missing.

# %%
center = patchloom.Sampler(MODEL)({"seed": np.arange(1)})["image"][0]
Image.fromarray(center.squeeze()).save("center.png")
side = denoiser.resolution
patchloom.sample(
    MODEL, "canvases", seeds="0-3", workers=0, outpaint="center.png", size=(side, 2 * side), canvas="extrapolate"
)

# %%
pictures = [np.asarray(Image.open(path)) for path in sorted(Path("canvases").glob("*/*.png"))]
figure, axes = plt.subplots(1, 1 + len(pictures), figsize=(10, 2))
for place, picture in zip(axes, [center.squeeze(), *pictures], strict=True):
    place.imshow(picture, cmap="gray")
    place.axis("off")
