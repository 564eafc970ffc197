"""The held-out loss: that of the averaged weights on full-size images that are not trained on."""

from patchloom.models.loss import held_out_loss
from patchloom.models.step import one_hot
from patchloom.pipelines.train.hooks.hook import Due, Hook
from patchloom.pipelines.train.snapshot import Snapshot
from patchloom.platform.records.run import LineFields

HELD_OUT_IMAGES = 64


class HeldOutHook(Hook):
    """Adds the held-out loss, as a mean and by noise level."""

    product = "the held-out loss"

    def measure(self, due: Due, snapshot: Snapshot) -> LineFields:
        """The loss on up to `HELD_OUT_IMAGES` images, always the same ones."""
        run = self.run
        held_out = run.reader.held_out
        if not due.held_out or not len(held_out):
            return {}
        rows = run.reader.at(held_out.spread(HELD_OUT_IMAGES))
        denoiser = snapshot.denoiser
        labels = one_hot(rows.label, denoiser.classes) if denoiser.classes else None
        by_sigma = held_out_loss(denoiser, run.normalisation.normalise(rows.image), labels)
        return {
            "held_out_loss": sum(by_sigma.values()) / len(by_sigma),
            "held_out_loss_by_sigma": {f"{sigma:g}": loss for sigma, loss in by_sigma.items()},
        }
