"""Quality: evaluations of a model with everything they depend on, and which of them can be compared."""

import re

from pydantic import JsonValue

from patchloom.errors import UserError, did_you_mean
from patchloom.platform.records.evaluation import EvaluationIdentity, MetricValue
from patchloom.platform.records.record import Record

# Prefix of a version's tag, followed by the digest: the newest evaluation of each identity, as JSON. MLflow's pages
# hide tags whose names begin with `mlflow.`.
TAG = "mlflow.patchloom.evaluation."
OLD_TAG = "evaluation."  # of versions up to 0.1, which is still read
GROUP = "quality"  # of the metrics in MLflow; it comes after the losses in the alphabet
INCEPTION_FEATURES = "inception"
# the title of each metric, and whether more is better
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


class Evaluation(Record):
    """One result: the metrics, and everything but the model that they depend on."""

    metrics: dict[str, MetricValue]
    identity: EvaluationIdentity

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits of the identity; two results can be compared if their digests are equal."""
        return self.identity.digest

    def to_dict(self) -> dict[str, JsonValue]:
        """Metrics and identity as plain JSON values, as a tag of a version stores them."""
        return {"metrics": {**self.metrics}, "identity": self.identity.to_dict()}

    def value(self, metric: str) -> float:
        """The value of one metric of `TITLES`."""
        value = self.metrics[metric]
        assert isinstance(value, float)
        return value

    def headline(self) -> str:
        """`FID 12.31 (n=50,000)`: the first metric, with the number of samples."""
        name = next((name for name in TITLES if name in self.metrics), None)
        if name is None:
            return ""
        features = "" if name in ("fid", "sfid") else f"{self.identity.features}, "
        return f"{TITLES[name][0]} {self.metrics[name]:.4g} ({features}n={self.identity.n_samples:,})"

    def numbers(self) -> str:
        """`FID 12.31, KID 0.002`: every metric, rounded."""
        return ", ".join(f"{TITLES[name][0]} {self.metrics[name]:.4g}" for name in TITLES if name in self.metrics)

    def label(self) -> str:
        """`n-50000 heun-18 guidance-1.3`: how this was measured, in characters that MLflow allows in names."""
        identity = self.identity
        parts = [f"n-{identity.n_samples}"]
        if not identity.features.startswith(INCEPTION_FEATURES):
            parts.insert(0, identity.features)
        if "sampler" in identity:
            parts.append(f"{identity['sampler']}-{identity['steps']}")
            parts += [] if identity["guidance"] == 1 else [f"guidance-{identity['guidance']:g}"]
        return re.sub(r"[^\w\-. ]", "-", " ".join(parts))

    def circumstances(self) -> str:
        """What the metrics depend on, in one line."""
        identity = self.identity
        against = f"{identity.n_reference:,} images" if identity.n_reference else "statistics"
        seeds = f" (seeds {identity.seeds})" if identity.seeds else ""
        parts = [
            f"{identity.features}, {identity.n_samples:,} samples{seeds} against {against} "
            f"({str(identity.reference)[:12]})"
        ]
        if "sampler" in identity:
            parts += [
                str(identity["sampler"]),
                f"{identity['steps']} steps ({identity['network_evaluations']} evaluations)",
                f"guidance {identity['guidance']:g}",
            ]
        return ", ".join(parts)


def differences(one: Evaluation, other: Evaluation) -> list[str]:
    """Where the identities of two results differ, as `n_samples is 64 and 50000`; empty if they can be compared."""
    first, second = one.identity.to_dict(), other.identity.to_dict()
    return [
        f"{key} is {_short(first.get(key))} and {_short(second.get(key))}"
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    ]


def comparable(
    first: list[Evaluation], second: list[Evaluation], metric: str | None = None
) -> list[tuple[Evaluation, Evaluation]]:
    """Pairs of results with the same identity. With `metric`, only pairs that both have it."""
    by_digest = {result.digest: result for result in second}
    pairs = [(result, by_digest[result.digest]) for result in first if result.digest in by_digest]
    return [pair for pair in pairs if metric is None or all(metric in result.metrics for result in pair)]


def is_better(metric: str, new: float, old: float) -> bool:
    """Whether `new` is better than `old` in a metric; raises UserError for an unknown metric."""
    if metric not in TITLES:
        raise UserError(f"{metric} is not a metric{did_you_mean(metric, TITLES)}: choose one of {', '.join(TITLES)}")
    return new > old if TITLES[metric][1] else new < old


def evaluations_of(tags: dict[str, str]) -> list[Evaluation]:
    """The results in the tags of a version, most samples first."""
    by_digest = {
        key.removeprefix(prefix): Evaluation.parse(value, f"the tag {key}")
        for prefix in (OLD_TAG, TAG)  # the newer of two with one digest replaces the older
        for key, value in tags.items()
        if key.startswith(prefix)
    }
    return sorted(by_digest.values(), key=lambda result: (-result.identity.n_samples, result.digest))


def _short(value: JsonValue) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
