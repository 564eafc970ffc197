"""Result files: what a call of the benchmarks found, as JSON; needs nothing beyond the standard library and torch."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from patchloom.benchmarks.findings import Finding, Scale
from patchloom.benchmarks.interleaved import Spread
from patchloom.benchmarks.machine import Machine

RESULTS_FORMAT = 1


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark: how busy the machine was, its findings, and when and on which code it ran (not in old files)."""

    busy_share_before: float
    seconds: float
    findings: list[Finding]
    at: str | None = None  # ISO 8601, UTC
    code: str | None = None  # of `patchloom.pipelines.launch.node.code_digest`, the first 12 digits

    def fields(self) -> dict[str, Any]:
        """The value of this benchmark in a result file."""
        known = {"at": self.at, "code": self.code} if self.at is not None else {}
        return known | {"busy_share_before": self.busy_share_before, "seconds": self.seconds,
                        "findings": _findings_json(self.findings)}  # fmt: skip


@dataclass(frozen=True)
class SuiteResults:
    """What one call of `patchloom benchmark` found."""

    date: str
    machine: Machine
    scale: Scale
    subjects: dict[str, BenchmarkResult]

    def to_json(self, indent: int | None = None) -> str:
        """The text of a result file."""
        return json.dumps({
            "format_version": RESULTS_FORMAT, "date": self.date, "machine": asdict(self.machine),
            "scale": asdict(self.scale), "subjects": {name: each.fields() for name, each in self.subjects.items()},
        }, indent=indent)  # fmt: skip

    @staticmethod
    def from_json(text: str) -> "SuiteResults":
        """Read the text of a result file."""
        found = json.loads(text)
        subjects = {name: BenchmarkResult(**each | {"findings": _read_findings(each["findings"])})
                    for name, each in found["subjects"].items()}  # fmt: skip
        return SuiteResults(found["date"], Machine(**found["machine"]), Scale(**found["scale"]), subjects)


@dataclass(frozen=True)
class QualityPoint:
    """The quality of a run after some seconds of training."""

    seconds: float
    distance: float  # Fréchet distance of samples
    updates: int
    images_seen: int


@dataclass(frozen=True)
class GpuResults:
    """What one call of `make bench-gpu` found; measurements add to its dictionaries."""

    date: str
    machine: Machine
    scales: dict[str, Scale]
    subjects: dict[str, list[Finding]] = field(default_factory=dict)
    curves: dict[str, list[QualityPoint]] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)  # why, by name of the measurement

    def to_json(self) -> str:
        """The text of a result file."""
        return json.dumps({
            "format_version": RESULTS_FORMAT, "benchmark": "gpu", "date": self.date, "machine": asdict(self.machine),
            "subjects": {name: _findings_json(each) for name, each in self.subjects.items()},
            "curves": {name: [asdict(point) for point in curve] for name, curve in self.curves.items()},
            "not_measured": self.not_measured,
            "scales": {name: asdict(scale) for name, scale in self.scales.items()},
        }, indent=2)  # fmt: skip


@dataclass(frozen=True)
class PlotData:
    """What plots show of a result file of either kind."""

    title: str  # date and machine
    findings: dict[str, list[Finding]]
    curves: dict[str, list[QualityPoint]] = field(default_factory=dict)


def read_plot_data(path: Path) -> PlotData:
    """Read a result file of `patchloom benchmark` or `make bench-gpu`."""
    found = json.loads(path.read_text())
    listed = {name: each["findings"] if isinstance(each, dict) else each for name, each in found["subjects"].items()}
    curves = {name: [QualityPoint(**point) for point in curve] for name, curve in found.get("curves", {}).items()}
    title = f"{found['date']}: {found['machine']['words']}"
    return PlotData(title, {name: _read_findings(each) for name, each in listed.items()}, curves)


def _findings_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    listed = [asdict(found) | {"is_met": found.is_met} for found in findings]
    return [{key: value for key, value in found.items() if key != "rows" or value is not None} for found in listed]


def _read_findings(listed: list[dict[str, Any]]) -> list[Finding]:
    return [
        Finding(**{key: value for key, value in found.items() if key not in ("measured", "is_met")},
                measured=Spread(**found["measured"]))
        for found in listed
    ]  # fmt: skip
