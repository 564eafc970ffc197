"""The held-out loss: that of the averaged weights on full-size images that are not trained on."""

from dataclasses import replace

from patchloom.models.loss import held_out_loss
from patchloom.models.step import StoredRows, network_labels
from patchloom.pipelines.train.hooks.hook import Due, Hook
from patchloom.pipelines.train.snapshot import Snapshot
from patchloom.platform.records.run import LineFields

KEPT_ROWS_BYTES = 64 << 20  # at most, between measurements: the shards of a remote dataset may be gone


class HeldOutHook(Hook):
    """Adds the held-out loss, as a mean and by noise level."""

    product = "the held-out loss"
    _kept: StoredRows | None = None

    def measure(self, due: Due, snapshot: Snapshot) -> LineFields:
        """The loss on up to `train.held_out_images` images, always the same ones."""
        run = self.run
        held_out = run.reader.held_out
        if not due.held_out or not len(held_out):
            return {}
        rows = self._rows()
        denoiser = snapshot.denoiser
        labels = network_labels(denoiser, rows)
        by_sigma = held_out_loss(denoiser, run.normalisation.normalise(rows.image), labels, condition=rows.condition)
        return {
            "held_out_loss": sum(by_sigma.values()) / len(by_sigma),
            "held_out_loss_by_sigma": {f"{sigma:g}": loss for sigma, loss in by_sigma.items()},
        }

    def _rows(self) -> StoredRows:
        """The images, which are read once if they are small."""
        if self._kept is not None:
            return self._kept
        reader, count = self.run.reader, self.run.recipe.train.held_out_images
        rows = replace(reader.at(reader.held_out.spread(count)), std=None)  # the loss is that of the means
        if rows.image.nbytes <= KEPT_ROWS_BYTES:
            self._kept = rows
        return rows
