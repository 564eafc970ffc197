"""Hooks of training: each file adds its part to the progress line, or writes files of the run folder.

To add a metric, write a subclass of `hook.Hook`, add it to `HOOKS`, and add its fields to `ProgressLine`.
"""

from patchloom.pipelines.train.hooks.averages import AverageHook
from patchloom.pipelines.train.hooks.checkpoints import CheckpointHook
from patchloom.pipelines.train.hooks.counts import CountHook
from patchloom.pipelines.train.hooks.held_out import HeldOutHook
from patchloom.pipelines.train.hooks.hook import Hook
from patchloom.pipelines.train.hooks.loss_scale import LossScaleHook
from patchloom.pipelines.train.hooks.losses import LossHook
from patchloom.pipelines.train.hooks.metrics import MetricsHook
from patchloom.pipelines.train.hooks.previews import PreviewHook
from patchloom.pipelines.train.hooks.speed import SpeedHook
from patchloom.pipelines.train.hooks.system import SystemHook

# in this order on all workers, because some of them reduce tensors over the workers
HOOKS: tuple[type[Hook], ...] = (
    CountHook,
    LossHook,
    LossScaleHook,
    SpeedHook,
    SystemHook,
    PreviewHook,
    HeldOutHook,
    AverageHook,
    CheckpointHook,
    MetricsHook,
)
