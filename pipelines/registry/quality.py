"""Quality: results of evaluations, with all that they depend on, and which of them may be compared."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from patchloom.errors import UserError

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

    def numbers(self) -> str:
        """`FID 12.31, KID 0.002`: every number, in few digits."""
        return ", ".join(f"{TITLES[name][0]} {self.metrics[name]:.4g}" for name in TITLES if name in self.metrics)

    def circumstances(self) -> str:
        """What the numbers hang on, in a line."""
        identity = self.identity
        against = f"{identity['n_reference']:,} images" if identity["n_reference"] else "statistics"
        words = f"{identity['features']}, {identity['n_samples']:,} samples"
        words += f" (seeds {identity['seeds']})" if identity.get("seeds") else ""
        words += f" against {against} ({str(identity['reference'])[:12]})"
        if "sampler" in identity:
            words += (
                f", {identity['sampler']}, {identity['steps']} steps ({identity['network_evaluations']} evaluations)"
            )
            words += f", guidance {identity['guidance']:g}"
        return words


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


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
