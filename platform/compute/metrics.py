"""Metrics: the numbers that Patchloom adds to Ray's own metrics, which Prometheus reads and Grafana shows.

Each node of a Ray cluster offers them, with the prefix `ray_`, at its metrics port. `deploy/grafana/patchloom.json`
shows them.
"""

import contextlib
import os
import socket
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

from patchloom.platform.compute.messages import connected_ray
from patchloom.platform.files.folder import Folder
from patchloom.platform.records.run import LineFields, ProgressLine

METRIC_LABELS = ("command", "name", "run", "rank", "host")  # of every metric
SWITCH = "RAY_enable_metrics_collection"  # of Ray, for all its metrics


class MetricKind(StrEnum):
    """How a metric changes: a gauge is set, a counter only grows, and a histogram counts values in buckets."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class MetricDefinition:
    """A metric.

    Args:
        name: its name, with the unit. Ray adds `ray_`, and `_total` to that of a counter.
        meaning: what it measures.
        labels: its labels, besides `METRIC_LABELS`.
        kind: how it changes.
        buckets: upper limits of the buckets of a histogram.
    """

    name: str
    meaning: str
    labels: tuple[str, ...] = ()
    kind: MetricKind = MetricKind.GAUGE
    buckets: tuple[float, ...] = ()

    @property
    def exported_names(self) -> list[str]:
        """The names in Prometheus."""
        if self.kind == MetricKind.HISTOGRAM:
            return [f"ray_{self.name}_{part}" for part in ("bucket", "sum", "count")]
        return [f"ray_{self.name}_total" if self.kind == MetricKind.COUNTER else f"ray_{self.name}"]


# of every worker
WORKER_IMAGES_PER_SECOND = MetricDefinition(
    "patchloom_train_worker_images_per_second", "Crops that this worker trains on per second"
)
WAIT_SHARE = MetricDefinition(
    "patchloom_train_wait_share", "Share of the time that this worker waits for `data` or `workers`", ("wait",)
)
PEAK_MEMORY = MetricDefinition("patchloom_train_peak_memory_bytes", "Most memory that this worker used")
# of worker 0, for all workers
TRAINING_WORKERS = MetricDefinition("patchloom_train_workers", "Workers that train")
STRAGGLER_LOSS = MetricDefinition(
    "patchloom_train_straggler_loss_share", "Share of the time lost to the slowest worker of each step"
)
IMAGES_PER_SECOND = MetricDefinition("patchloom_train_images_per_second", "Crops per second of all workers")
IMAGES_SEEN = MetricDefinition("patchloom_train_images_seen", "Crops since the start of the run")
STEP = MetricDefinition("patchloom_train_step", "Steps since the start of the run")
ETA = MetricDefinition("patchloom_train_remaining_seconds", "Estimated time to the end of the run")
LOSS = MetricDefinition("patchloom_train_loss", "Mean loss since the last progress line")
LOSS_BY_PATCH_SIZE = MetricDefinition(
    "patchloom_train_loss_by_patch_size", "Mean loss since the last progress line", ("patch_pixels",)
)
LOSS_ON_HELD_OUT = MetricDefinition("patchloom_train_held_out_loss", "Loss of the averaged weights on held-out images")
UTILISATION = MetricDefinition(
    "patchloom_train_model_flops_utilisation", "Share of the peak FLOP/s of all devices that the network uses"
)
BAD_CROPS = MetricDefinition(
    "patchloom_train_bad_crops", "Crops whose loss was not finite", kind=MetricKind.COUNTER
)  # fmt: skip
CHECKPOINT_TIME = MetricDefinition(
    "patchloom_train_checkpoint_timestamp_seconds", "Unix time of the newest checkpoint of this session"
)
FAILED_CHECKPOINTS = MetricDefinition(
    "patchloom_train_failed_checkpoints", "Checkpoints of this session that could not be written"
)
UNSENT_LINES = MetricDefinition("patchloom_train_unsent_lines", "Progress lines that MLflow has not received yet")
UNSENT_FILES = MetricDefinition("patchloom_train_unsent_files", "Files that the store has not received yet")
# of prepare, sample and evaluate
JOB_IMAGES = MetricDefinition("patchloom_job_images", "Images that are done")
JOB_TOTAL_IMAGES = MetricDefinition("patchloom_job_total_images", "Images of the whole job")
JOB_IMAGES_PER_SECOND = MetricDefinition("patchloom_job_images_per_second", "Images per second of all processes")
JOB_REMAINING_UNITS = MetricDefinition("patchloom_job_remaining_units", "Units, such as shards, that are not done")
JOB_ATTEMPTS = MetricDefinition(
    "patchloom_job_attempts", "Starts of units; a unit starts again when its process or node is lost",
    ("attempt",), MetricKind.COUNTER,
)  # fmt: skip
JOB_UNIT_SECONDS = MetricDefinition(
    "patchloom_job_unit_seconds", "Duration of a unit", (), MetricKind.HISTOGRAM,
    (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
)  # fmt: skip

METRIC_DEFINITIONS = tuple(value for value in list(globals().values()) if isinstance(value, MetricDefinition))


@dataclass(frozen=True)
class MetricRecorder:
    """Records metrics of one command. Does nothing where there is no Ray session, or its metrics are off.

    Args:
        command: the command, such as `train`.
        name: the name of what it makes, such as that of the recipe.
        run: the folder that it writes; its label has no keys of the address.
        rank: number of the worker; empty for the process of the command.
    """

    command: str
    name: str = ""
    run: Folder | None = None
    rank: str = ""

    @property
    def host(self) -> str:
        """The name of this machine, also where the recorder came from another one."""
        return socket.gethostname()

    @property
    def labels(self) -> dict[str, str]:
        """The labels of every metric."""
        return {label: str(getattr(self, label) or "") for label in METRIC_LABELS}

    def record(self, metric: MetricDefinition, value: float | None, **labels: str) -> None:
        """Set a gauge, add to a counter, or add a value to a histogram. None and 0 of a counter are ignored."""
        if value is None or not metrics_are_on():
            return
        own = self.labels | labels
        with contextlib.suppress(Exception):  # a metric must not end a run
            if metric.kind == MetricKind.GAUGE:
                _of_ray(metric).set(value, own)
            elif metric.kind == MetricKind.HISTOGRAM:
                _of_ray(metric).observe(value, own)
            elif value > 0:
                _of_ray(metric).inc(value, own)

    def record_worker(self, fields: LineFields, share: float) -> None:
        """Record what a worker measured itself: fields of the progress line, and its share of the crops."""
        line = _line(fields)
        self.record(WORKER_IMAGES_PER_SECOND, share * line.images_per_second)
        self.record(WAIT_SHARE, line.data_wait_share, wait="data")
        self.record(WAIT_SHARE, line.reduce_wait_share, wait="workers")
        self.record(PEAK_MEMORY, line.peak_memory_bytes)

    def record_line(self, fields: LineFields, workers: int) -> None:
        """Record the fields of a progress line that hold for all workers."""
        line = _line(fields)
        self.record(TRAINING_WORKERS, workers)
        for metric, value in {
            STRAGGLER_LOSS: line.straggler_loss,
            IMAGES_PER_SECOND: line.images_per_second,
            IMAGES_SEEN: line.images_seen,
            STEP: line.step,
            ETA: line.eta_seconds,
            LOSS: line.loss,
            LOSS_ON_HELD_OUT: line.held_out_loss,
            UTILISATION: line.model_flops_utilisation or None,
            BAD_CROPS: line.bad_crops,
        }.items():
            self.record(metric, value)
        for pixels, loss in line.loss_by_patch_size.items():
            self.record(LOSS_BY_PATCH_SIZE, loss, patch_pixels=pixels)

    def record_job(self, images: float, total: int, images_per_second: float, remaining_units: int) -> None:
        """Record how much of a job is done."""
        self.record(JOB_IMAGES, images)
        self.record(JOB_TOTAL_IMAGES, total)
        self.record(JOB_IMAGES_PER_SECOND, images_per_second)
        self.record(JOB_REMAINING_UNITS, remaining_units)


NO_COMMAND = MetricRecorder("")


def metrics_are_on() -> bool:
    """Whether this process has a Ray session whose metrics are collected. A session on this machine has none."""
    return connected_ray() is not None and os.environ.get(SWITCH, "1").lower() not in ("0", "false")


def _line(fields: dict[str, Any]) -> ProgressLine:
    """The fields as a line, which may lack those that only worker 0 knows."""
    return ProgressLine.model_construct(None, **fields)


@cache
def _of_ray(metric: MetricDefinition) -> Any:
    """The metric of Ray, one per process."""
    from ray.util import metrics

    labels = (*METRIC_LABELS, *metric.labels)
    if metric.kind == MetricKind.HISTOGRAM:
        return metrics.Histogram(metric.name, metric.meaning, list(metric.buckets), labels)
    kind = metrics.Counter if metric.kind == MetricKind.COUNTER else metrics.Gauge
    return kind(metric.name, metric.meaning, labels)
