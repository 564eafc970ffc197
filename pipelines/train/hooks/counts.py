"""Counts of a run: steps, images by several measures, FLOPs and the learning rate."""

from patchloom.models.step import learning_rate
from patchloom.pipelines.train.hooks.hook import Hook
from patchloom.platform.records.run import LineFields


class CountHook(Hook):
    """Adds the counts, all since the start of the run."""

    def line_fields(self) -> LineFields:
        """Counts up to this step."""
        state, sizes = self.run.state, self.run.settings.schedule.sizes
        full = sizes[0].pixels
        return {
            "step": state.step,
            "updates": state.step,
            "images_seen": state.images_seen,
            "full_size_images": state.crops_by_size[0],
            "pixel_equivalent_images": sum(
                n * (size.pixels / full) ** 2 for n, size in zip(state.crops_by_size, sizes, strict=True)
            ),
            "flops": self.run.flops_of(state.crops_by_size),
            "learning_rate": learning_rate(self.run.settings, state.images_seen),
        }
