"""Quality: results of evaluations as a model's version keeps them, and which of them may be compared."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchloom.platform.errors import UserError
from patchloom.platform.registry import logged_model, tag_version
from patchloom.platform.tracking import log_artifacts, log_metrics

TAG = "evaluation."  # of a version, followed by the identity's digest: one result an identity, the newest
# how metrics are called where people read them, and whether more is better
TITLES = {
    "fid": ("FID", False),
    "sfid": ("sFID", False),
    "frechet_distance": ("Fréchet distance", False),
    "kid": ("KID", False),
    "inception_score": ("Inception Score", True),
    "precision": ("precision", True),
    "recall": ("recall", True),
    "psnr_db": ("PSNR (dB)", True),
    "ssim": ("SSIM", True),
    "authenticity": ("authenticity", True),
}


@dataclass(frozen=True)
class Evaluation:
    """One result: the numbers, and all that they depend on but the model."""

    metrics: dict[str, Any]
    identity: dict[str, Any]

    @property
    def digest(self) -> str:
        """Eight letters that two results share if they may be compared."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:8]

    def words(self) -> str:
        """`FID 12.31 (n=50,000)`: the first number, with what it hangs on most."""
        name = next((name for name in TITLES if name in self.metrics), None)
        if name is None:
            return ""
        features = "" if name in ("fid", "sfid") else f"{self.identity['features']}, "
        return f"{TITLES[name][0]} {self.metrics[name]:.4g} ({features}n={self.identity['n_samples']:,})"


def differences(one: Evaluation, other: Evaluation) -> list[str]:
    """What two results depend on and differ in, as `n_samples is 64 and 50000`; nothing where they may be compared."""
    keys = dict.fromkeys([*one.identity, *other.identity])
    return [
        f"{key} is {_short(one.identity.get(key))} and {_short(other.identity.get(key))}"
        for key in keys
        if one.identity.get(key) != other.identity.get(key)
    ]


def comparable(mine: list[Evaluation], theirs: list[Evaluation], metric: str | None = None) -> list[
    tuple[Evaluation, Evaluation]
]:  # fmt: skip
    """Pairs of results with one identity (that hold the metric)."""
    others = {result.digest: result for result in theirs}
    pairs = [(result, others[result.digest]) for result in mine if result.digest in others]
    return [pair for pair in pairs if metric is None or all(metric in result.metrics for result in pair)]


def is_better(metric: str, new: float, old: float) -> bool:
    """Whether a number beats another; raises UserError for a metric that is unknown."""
    if metric not in TITLES:
        raise UserError(f"{metric} is not a metric: choose among {', '.join(TITLES)}")
    return new > old if TITLES[metric][1] else new < old


def evaluations_of(tags: dict[str, str]) -> list[Evaluation]:
    """The results that a version keeps, those of most samples first."""
    found = [Evaluation(**json.loads(value)) for key, value in tags.items() if key.startswith(TAG)]
    return sorted(found, key=lambda result: (-result.identity["n_samples"], result.digest))


def record(result: Evaluation, lineage: dict[str, Any], files: list[Path]) -> None:
    """Give a result to the registered version that the samples came from, and to the run that made it.

    Metrics are called `fid/n-50000/1a2b3c4d`: numbers that may not be compared never share a curve.
    """
    if not lineage["run_id"]:
        return
    model_id = None
    if lineage["name"]:
        model_id = logged_model(lineage["name"], lineage["version"])
        value = json.dumps({"metrics": result.metrics, "identity": result.identity})
        tag_version(lineage["name"], lineage["version"], {f"{TAG}{result.digest}": value, "quality": result.words()})
    numbers = {
        f"{name}/n-{result.identity['n_samples']}/{result.digest}": value
        for name, value in result.metrics.items()
        if isinstance(value, float)
    }
    log_metrics(lineage["run_id"], numbers, model_id=model_id)
    log_artifacts(lineage["run_id"], *files, under=f"evaluations/{result.digest}")


def _short(value: Any) -> str:
    text = "unknown" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
