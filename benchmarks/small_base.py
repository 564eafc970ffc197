"""Small base: a Stable Diffusion of 16 x 16 latents, small enough to train in minutes, for ControlNets to control.

`python -m patchloom.benchmarks.small_base texts PIXELS texts.npz` writes a text embedding per image, equal for all
images of a class, for `patchloom prepare PIXELS LATENTS --autoencoder REF --text texts.npz`. Then `... small_base train
LATENTS small_base` trains the base and writes the folder that `model.base` of `controlnet_small` names.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.errors import UserError
from patchloom.models.cards import AutoencoderCard
from patchloom.models.known_bases import SCHEDULE, SMALL_TOKENS, SMALL_UNET
from patchloom.platform.dataset.prepared import Dataset, open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.outputs import check_output_folder
from patchloom.platform.progress import progress, say

STEPS, BATCH, PEAK_RATE, TEXT_DROPOUT = 1600, 32, 2e-3, 0.1
HELD_OUT, HELD_OUT_FRACTION = 256, 0.1  # latents, and the share of the recipe `controlnet_small`
LATENT, WIDTH = (SMALL_UNET["in_channels"], *[SMALL_UNET["sample_size"]] * 2), SMALL_UNET["cross_attention_dim"]


def write_texts(dataset: Dataset, path: Path, seed: int = 0) -> None:
    """Write an `.npz` file with a text embedding for each row, which is random per class, and one of the empty text."""
    embeddings = np.random.default_rng(seed).normal(size=(len(dataset.class_names) + 2, SMALL_TOKENS, WIDTH))
    rows = dataset.rows(range(len(dataset)), ["key", "label"])
    texts = {key: embeddings[label + 1] for key, label in zip(rows["key"], rows["label"], strict=True)}  # -1: no label
    np.savez(path, no_text=embeddings[-1], **texts)


def train_small_base(dataset: Dataset, folder: Path, steps: int = STEPS, seed: int = 0) -> float:
    """Train a base that predicts noise, and write `unet/` and `scheduler/` as diffusers does.

    Args:
        dataset: latents (4, 16, 16) with texts of `write_texts`. All of them are in memory.
        folder: the folder to write.
        steps: steps of `BATCH` latents. The learning rate rises, then falls to 0.
        seed: seed of the weights and of all draws.

    Returns:
        The mean squared error of the noise of held-out latents; 1 for a network that predicts zeros.

    Raises:
        UserError: the latents or texts have other shapes, or the folder is not empty.
    """
    from diffusers import DDPMScheduler, UNet2DConditionModel

    check_output_folder(Folder(str(folder)), "base model", "unet/config.json")
    latents = _Latents(dataset)
    torch.manual_seed(seed)
    network, scheduler = UNet2DConditionModel(**SMALL_UNET), DDPMScheduler(**SCHEDULE)
    optimizer = torch.optim.AdamW(network.parameters(), PEAK_RATE)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    with progress("training the base", steps * BATCH, "images") as meter:
        for step in range(steps):
            loss = noise_error(network, scheduler, *latents.drawn("train", BATCH))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            rates.step()
            meter.update((step + 1) * BATCH)
    network.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    with torch.no_grad():
        return float(noise_error(network.eval(), scheduler, *latents.drawn("held_out", HELD_OUT)))


def noise_error(network: torch.nn.Module, scheduler: Any, clean: Tensor, text: Tensor) -> Tensor:
    """The mean squared error of the predicted noise at uniform time steps: (B, C, h, w) and (B, tokens, width)."""
    noise, times = torch.randn_like(clean), torch.randint(len(scheduler.alphas_cumprod), (len(clean),))
    predicted = network(scheduler.add_noise(clean, noise, times), times, text).sample
    return F.mse_loss(predicted, noise)


class _Latents:
    """The latents and texts of a dataset, in memory, scaled as a ControlNet gets them."""

    def __init__(self, dataset: Dataset) -> None:
        card = dataset.card
        text = (card.text.tokens, card.text.width) if card.text else None
        shape = (card.channels, card.resolution, card.resolution)
        if card.autoencoder is None or shape != LATENT or text != (SMALL_TOKENS, WIDTH):
            raise UserError(
                f"{dataset.address} has {card.kind} {shape} with texts {text}, and the small base is for latents "
                f"{LATENT} with texts {(SMALL_TOKENS, WIDTH)}: prepare it with --autoencoder and with --text of "
                "`small_base texts`"
            )
        self.scale = AutoencoderCard.from_json(card.autoencoder.to_dict()).normalisation()
        self.no_text = torch.from_numpy(dataset.no_text()).float()
        self.rows = {
            split: {
                name: torch.from_numpy(values).float()
                for name, values in dataset.rows(dataset.indices(split, HELD_OUT_FRACTION)).items()
                if name in ("mean", "std", "text")
            }
            for split in ("train", "held_out")
        }

    def drawn(self, split: str, count: int) -> tuple[Tensor, Tensor]:
        """Random latents (count, 4, 16, 16), drawn from their posteriors, and texts, of which some are dropped."""
        rows = self.rows[split]
        chosen = torch.randint(len(rows["mean"]), (count,))
        latents = rows["mean"][chosen]
        if "std" in rows:
            latents = latents + rows["std"][chosen] * torch.randn_like(latents)
        is_dropped = (torch.rand(count) < TEXT_DROPOUT)[:, None, None]
        return self.scale.normalise(latents), torch.where(is_dropped, self.no_text, rows["text"][chosen])


def main() -> int:
    """The command line. Returns the exit code, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser("python -m patchloom.benchmarks.small_base", description=__doc__)
    parser.add_argument("what", choices=("texts", "train"))
    parser.add_argument("dataset", help="a prepared dataset: of pixels or latents for texts, of latents for train")
    parser.add_argument("out", type=Path, help="the .npz file of texts, or the folder of the base")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    try:
        dataset = open_dataset(options.dataset)
        if options.what == "texts":
            write_texts(dataset, options.out)
            return 0
        began = time.monotonic()
        error = train_small_base(dataset, options.out, options.steps)
    except UserError as problem:
        print(f"patchloom: {problem}", file=sys.stderr)
        return 2
    say(f"{options.out}: squared error of held-out noise {error:.3f}, after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
