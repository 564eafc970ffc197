"""Previews: a grid of samples of the averaged weights, and their Fréchet distance to the training images."""

import numpy as np
import torch

from patchloom.models.autoencoder import Autoencoder, load_autoencoder
from patchloom.models.checkpoints import SamplingModel
from patchloom.models.generate import Sampling, default_labels, generate
from patchloom.models.metrics import colour_layout, frechet_distance
from patchloom.pipelines.pages.pictures import contact_sheet, save_png
from patchloom.pipelines.train.hooks.hook import Due, Hook, side_product
from patchloom.pipelines.train.run import TrainingRun
from patchloom.pipelines.train.snapshot import Snapshot
from patchloom.platform.records.run import LineFields

REFERENCE_IMAGES = 1024
SAMPLE_BATCH = 64


class PreviewHook(Hook):
    """Adds the path of a preview, and its Fréchet distance if the recipe asks for it."""

    product = "the preview"

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self._autoencoder: Autoencoder | None = None  # of latents, loaded for the first preview
        self._reference: torch.Tensor | None = None  # features of training images
        self._condition_images: np.ndarray | None = None  # of held-out rows
        self._texts: np.ndarray | None = None  # of the same rows

    def measure(self, due: Due, snapshot: Snapshot) -> LineFields:
        """Sample and save `previews/step-00001000.png`."""
        preview = self.run.recipe.preview
        if not due.preview or not preview.every_images:
            return {}
        model, name = self._sampling_model(snapshot), f"previews/step-{snapshot.step:08d}.png"
        images = self._sample(model, preview.count).numpy()
        save_png(contact_sheet(self._with_conditions(images)), self.run.folder / name)
        fields: LineFields = {"preview": name}
        if preview.frechet_samples:
            with side_product("the Fréchet distance of the preview"):  # the picture is made already
                fields["preview_frechet_distance"] = self._frechet_distance(model, preview.frechet_samples)
        return fields

    def _sample(self, model: SamplingModel, count: int) -> torch.Tensor:
        """(count, C, H, W) uint8 images of the averaged weights, from the seeds 0, 1, ..."""
        sampling, images = Sampling(steps=self.run.recipe.preview.steps), []
        for start in range(0, count, SAMPLE_BATCH):
            seeds = list(range(start, min(start + SAMPLE_BATCH, count)))
            labels = default_labels(seeds, self.run.card.sampled_classes)
            shown = torch.from_numpy(self._conditions(seeds)) if self.run.card.condition else None
            text = self._texts_of(seeds) if model.denoiser.text_shape else None
            images.append(generate(model, seeds, labels, sampling, condition=shown, text=text).cpu())
        return torch.cat(images)

    def _conditions(self, seeds: list[int]) -> np.ndarray:
        """The condition of each seed: those of some held-out rows take turns."""
        if self._condition_images is None:
            self._condition_images = self.run.reader.condition_images(self.run.recipe.preview.count)
        images: np.ndarray = self._condition_images[np.array(seeds) % len(self._condition_images)]
        return images

    def _texts_of(self, seeds: list[int]) -> torch.Tensor:
        """The text embedding of each seed, of the row whose condition it has."""
        if self._texts is None:
            self._texts = self.run.reader.texts(self.run.recipe.preview.count)
        return torch.from_numpy(self._texts[np.array(seeds) % len(self._texts)])

    def _with_conditions(self, images: np.ndarray) -> np.ndarray:
        """Samples with the condition of each to its left, where both are pictures: (N or 2 N, C, H, W)."""
        condition, channels = self.run.card.condition, images.shape[1]
        if condition is None or condition.dtype != "uint8" or condition.channels not in (1, channels):
            return images
        shown = self._conditions(list(range(len(images)))).repeat(channels // condition.channels, axis=1)
        return np.stack([shown, images], axis=1).reshape(-1, *images.shape[1:])

    def _sampling_model(self, snapshot: Snapshot) -> SamplingModel:
        """The averaged weights as a model."""
        run = self.run
        if run.normalisation.kind == "latents" and self._autoencoder is None:
            self._autoencoder = load_autoencoder(run.reader.dataset.path / "autoencoder", run.device)
        return SamplingModel(snapshot.denoiser, run.normalisation, self._autoencoder, run.card)

    def _frechet_distance(self, model: SamplingModel, count: int) -> float:
        """The distance of `count` samples to training images, on mean colours of tiles.

        It shows the progress of a run. Compare models with `patchloom evaluate` instead.
        """
        if self._reference is None:
            self._reference = self._training_features(model, max(count, REFERENCE_IMAGES))
        return frechet_distance(colour_layout(self._sample(model, count)), self._reference)

    def _training_features(self, model: SamplingModel, count: int) -> torch.Tensor:
        """Features of up to `count` images for training, spread over the rows.

        They are chosen from all of them, also with `data.images`: runs that differ in it have one reference.
        """
        reader = self.run.reader
        chosen = reader.dataset.split("train", self.run.recipe.data.held_out_fraction).spread(count)
        features = []
        for start in range(0, len(chosen), SAMPLE_BATCH):
            stored = reader.at(chosen[start : start + SAMPLE_BATCH]).image
            images = stored if model.autoencoder is None else model.autoencoder.decode(stored)
            features.append(colour_layout(images.cpu()))
        return torch.cat(features)
