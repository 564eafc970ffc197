"""The loss scale of fp16: each overflow of the gradients halves it. A run whose scale keeps falling ends."""

from patchloom.pipelines.train.hooks.hook import Hook
from patchloom.platform.records.run import LineFields

# Thirty overflows below torch's first scale of 2^16. Such small scales only lose gradients.
LEAST_LOSS_SCALE = 2.0**-14


class LossScaleHook(Hook):
    """Adds the loss scale of fp16, and ends a run whose gradients overflow at every scale."""

    def line_fields(self) -> LineFields:
        """The loss scale; nothing in other precisions."""
        scaler = self.run.state.scaler
        if not scaler.is_enabled():
            return {}
        scale = float(scaler.get_scale())
        self.has_diverged = scale < LEAST_LOSS_SCALE
        return {"loss_scale": scale}
