"""GPU session: the device, the time and the results of one call of `make bench-gpu`."""

import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from patchloom.benchmarks.findings import Finding, findings_table
from patchloom.benchmarks.interleaved import Spread
from patchloom.benchmarks.result_file import GpuResults
from patchloom.models.flops import peak_flops
from patchloom.models.step import HALF_PRECISIONS, set_rounding
from patchloom.platform.files.storage import write_atomic


def say(text: str) -> None:
    """Print one line to stderr; `rich` may not be installed."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class GpuSession:
    """One call of the GPU benchmark.

    Args:
        device: the device.
        deadline: when no further measurement starts, by `time.monotonic()`.
        is_tiny: whether this only checks that everything runs, whatever the time.
        results: what was found; measurements add to it.
        path: the result file.
        has_failed: whether a measurement failed.
    """

    device: torch.device
    deadline: float
    is_tiny: bool
    results: GpuResults
    path: Path
    has_failed: bool = False
    _peaks: dict[str, tuple[float, str]] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether there is time for a measurement; if not, prints a message and records it."""
        if self.is_tiny or self.seconds_left > seconds:
            return True
        why = f"it takes about {seconds:.0f} s, and {max(0.0, self.seconds_left):.0f} s are left"
        say(f"  {what} skipped: {why}")
        self.results.not_measured[what] = f"skipped: {why}"
        return False

    def measure(self, what: str, seconds: float, work: Callable[[], None]) -> None:
        """Measure something if there is time."""
        if self.has_time(what, seconds):
            self.attempt(what, work)

    def attempt(self, what: str, work: Callable[[], None]) -> None:
        """Measure something and write the result file. A failure does not end the other measurements."""
        say(f"\n{what}")
        try:
            work()
        except Exception as error:  # such as a GPU without enough memory
            traceback.print_exc()
            say(f"  {what} failed; the other measurements continue")
            self.results.not_measured[what] = " ".join(f"failed: {type(error).__name__}: {error}".split())
            self.has_failed = True
        free_memory()
        self.write()

    def keep(self, name: str, findings: list[Finding]) -> None:
        """Record findings and print them."""
        self.results.subjects[name] = findings
        say(f"\n{name}\n{findings_table(findings)}")

    def write(self) -> None:
        """Write the result file."""
        write_atomic(self.path, self.results.to_json() + "\n")

    def peak(self, precision: str) -> tuple[float, str]:
        """The peak FLOP/s of the device in a precision, and its source; measured once."""
        if precision not in self._peaks:
            set_rounding(precision)
            self._peaks[precision] = peak_flops(self.device, HALF_PRECISIONS.get(precision, torch.float32))
        return self._peaks[precision]

    def rate(self, what: str, images_per_second: Spread, flops_per_image: float, precision: str) -> list[Finding]:
        """Two findings: images per second, and the FLOPs that the network needs for them as a share of the peak."""
        peak, source = self.peak(precision)
        share = images_per_second.scaled(100 * flops_per_image / peak)
        return [
            Finding(what, images_per_second, "images/s", peak / flops_per_image, f"peak FLOPs, {source}"),
            Finding(f"FLOPs of {what}", share, "% of the peak"),
        ]


def free_memory() -> None:
    """Return the memory of tensors that nothing uses any more, so that no measurement sees that of an earlier one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class PeakMemory:
    """The peak memory of tensors inside a `with` block, without those that were there before; 0 on a CPU."""

    gib = 0.0

    def __init__(self, device: torch.device) -> None:
        self.is_gpu, self.before = device.type == "cuda", 0

    def __enter__(self) -> "PeakMemory":
        free_memory()
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_gpu:
            self.gib = (torch.cuda.max_memory_allocated() - self.before) / 2**30
