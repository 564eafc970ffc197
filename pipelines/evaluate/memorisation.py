"""Memorisation: the share of samples that are nearer to a training image than any other training image is."""

from dataclasses import dataclass

import torch

from patchloom.models.features import POOL
from patchloom.models.neighbours import neighbourhood
from patchloom.pipelines.evaluate.features import extract, load_features
from patchloom.pipelines.evaluate.image_sets import open_images
from patchloom.pipelines.evaluate.metrics import MOST_NEIGHBOURS
from patchloom.platform.compute.devices import own_device
from patchloom.platform.dataset.index import Split
from patchloom.platform.progress import say

CHANCE_IMAGES = 4096  # held-out images, at most: the error of their share is below .01


@dataclass(frozen=True)
class MemorisedShares:
    """Shares of images whose nearest training image has no other training image as near (1 - authenticity).

    Args:
        samples: of the samples.
        held_out: of held-out images, which no model has seen: the share by chance. None without two of them.
    """

    samples: float
    held_out: float | None


def memorised_shares(
    samples: str, dataset: str, train: Split, held_out: Split, features: str
) -> MemorisedShares | None:
    """Compare samples and held-out images with the images that a model was trained on (Alaa et al. 2022).

    The share by chance is not .5: it depends on the number of training images, and on how near they are to each other.

    Args:
        samples: a folder of samples.
        dataset: the dataset of the training.
        train: the rows that the model was trained on.
        held_out: rows that it was not trained on.
        features: as in `evaluate`.

    Returns:
        The shares; None for less than two training images, or for more than `MOST_NEIGHBOURS`.
    """
    if not 2 <= len(train) <= MOST_NEIGHBOURS:
        say(f"  memorisation is measured with 2 to {MOST_NEIGHBOURS:,} training images; there are {len(train):,}")
        return None
    network = load_features(features)
    of_samples, of_images = (
        extract(open_images(address), (POOL,), network, features, workers=0).rows() for address in (samples, dataset)
    )
    unseen = of_images[held_out.spread(CHANCE_IMAGES)] if len(held_out) > 1 else of_images[:0]
    compared = torch.cat([of_samples[:], unseen])
    authentic = neighbourhood(of_images[train.indices()], compared, k=1, device=own_device()).authentic.cpu()
    copied = (~authentic).double()
    count = len(of_samples)
    return MemorisedShares(float(copied[:count].mean()), float(copied[count:].mean()) if len(unseen) else None)
