"""Evaluate: compare images with a reference, in metrics that carry everything they depend on."""

import contextlib
from dataclasses import dataclass

from torch import Tensor

from patchloom.errors import UserError, did_you_mean
from patchloom.models.features import INCEPTION, Features
from patchloom.models.metrics import COLOUR_LAYOUT
from patchloom.pipelines.evaluate.features import (
    BATCH,
    COLOUR_FEATURES,
    check_statistics_file,
    extract,
    load_features,
    missing_features,
    read_statistics,
    write_statistics,
)
from patchloom.pipelines.evaluate.image_sets import ImageSet, SampleImages, check_pair, open_images
from patchloom.pipelines.evaluate.metrics import METRICS, ComparedSets
from patchloom.pipelines.evaluate.results import (
    check_result_file,
    default_address,
    identity_of,
    print_result,
    write_result,
)
from patchloom.pipelines.registry.quality import Evaluation
from patchloom.platform.compute.resources import DEFAULT_RESOURCES, Resources
from patchloom.platform.compute.session import ray_session
from patchloom.platform.progress import say
from patchloom.platform.records.evaluation import EvaluationResult, MetricValue
from patchloom.platform.tracking.client import require_reachable


def evaluate(
    samples: str,
    reference: str,
    *,
    metrics: tuple[str, ...] | None = None,
    features: str = "inception",
    out: str | None = None,
    save_reference: str | None = None,
    workers: int | None = None,
    batch: int = BATCH,
    resources: Resources = DEFAULT_RESOURCES,
) -> EvaluationResult:
    """Measure images against a reference.

    The result is written to a JSON file and added to the registered version that the samples came from.

    Args:
        samples: a folder of `patchloom sample`, a folder of PNG files, an `.npz`, or a prepared dataset. The latents
            of a dataset are decoded, which measures its autoencoder (reconstruction FID, psnr, ssim).
        reference: any of these, or an `.npz` of statistics with the names of EDM or ADM.
        metrics: names among `fid`, `sfid`, `kid`, `is`, `precision`, `recall` (on the features of Inception),
            `fd` (the Fréchet distance on other features), `psnr` and `ssim`. Default: all that the features and the
            reference allow, except psnr and ssim, and except precision and recall of more than 100,000 images.
        features: `inception`, `colours` (no network), `dinov2`, a file of Inception weights or TorchScript, or the
            folder of a transformers Dinov2Model.
        out: the JSON file to write; may be remote. Default: `metrics.json` in the folder of the samples.
        save_reference: also write the statistics of the reference to this `.npz`.
        workers: processes that compute features. Default: all CPUs or GPUs; 0 is this process, without Ray.
        batch: images per forward pass.
        resources: the nodes that the workers may use. By default all.

    Returns:
        The metrics by name, what they depend on (`identity`), and notes for the reader.

    Raises:
        UserError: the images cannot be compared, or a metric does not fit the features or the reference.

    Example:
        result = patchloom.evaluate("samples", "dataset", features="colours", workers=0)
        print(result.metrics["frechet_distance"])
    """
    measured = open_images(samples, skipped=())
    statistics = read_statistics(reference) if reference.endswith(".npz") else {}
    check_result_file(out or default_address(measured))
    if save_reference:
        check_statistics_file(save_reference)
    if isinstance(measured, SampleImages) and measured.sampling.lineage.run_id:
        require_reachable()  # the run of the model gets the metrics
    compared = _reference_images(reference, bool(statistics))
    if compared is not None and compared.skipped:
        count, first = len(compared.skipped), compared.skipped[0]
        say(f"  skipped in {reference}: {count:,} files that cannot be read, such as {first}")
    check_pair(measured, compared)
    network = load_features(features if metrics is None or _outputs(metrics) else COLOUR_FEATURES)
    available = _Available(network, compared is not None, frozenset(statistics))
    chosen = metrics or available.metrics([len(images) for images in (measured, compared) if images is not None])
    available.check(chosen)
    sets = _extract(measured, compared, statistics, network, features, chosen, workers, batch, resources)
    if save_reference:
        _save_reference(sets, save_reference, _outputs(chosen))
    identity = identity_of(sets, network, reference, _outputs(chosen))
    evaluation = Evaluation(metrics=_metrics(sets, chosen), identity=identity)
    result = write_result(evaluation, sets, out or default_address(measured), reference)
    print_result(result)
    return result


def _metrics(sets: ComparedSets, chosen: tuple[str, ...]) -> dict[str, MetricValue]:
    measured: dict[str, MetricValue] = {}
    try:
        for measure in dict.fromkeys(METRICS[name].measure for name in chosen):
            measured |= measure(sets)
    except ValueError as error:  # too few rows
        raise UserError(f"{sets.samples.images.address}: {error}: sample more seeds") from None
    return measured


def _reference_images(reference: str, has_statistics: bool) -> ImageSet | None:
    """The images of the reference; None for a file that holds only statistics."""
    if not has_statistics:
        return open_images(reference)
    try:
        return open_images(reference)  # the files of ADM may hold both
    except UserError:
        return None


def _outputs(metrics: tuple[str, ...]) -> tuple[str, ...]:
    """The outputs of the feature network that these metrics need."""
    outputs = [METRICS[name].output for name in metrics if name in METRICS]
    return tuple(dict.fromkeys(output for output in outputs if output is not None))


@dataclass(frozen=True)
class _Available:
    """What metrics can use: a feature network, and the images or the statistics of the reference."""

    network: Features
    has_images: bool
    statistics: frozenset[str]

    def metrics(self, images: list[int]) -> tuple[str, ...]:
        """Every metric that these and the number of images in each set allow, except psnr and ssim."""
        is_inception = self.network.name == INCEPTION
        allowed = tuple(
            name
            for name, metric in METRICS.items()
            if metric.output in self.network.outputs
            and min(images) >= metric.least_images
            and metric.of_inception in (None, is_inception)
            and (self.has_images or (not metric.needs_images and metric.output in self.statistics))
            and (name != "is" or self.network.classifier is not None)
        )
        slow = [name for name in allowed if max(images) > (METRICS[name].most_images or max(images))]
        if slow:
            say(
                f"  {' and '.join(slow)} of {max(images):,} images take long, and are measured with "
                f"--metrics {','.join(allowed)}"
            )
        return tuple(name for name in allowed if name not in slow)

    def check(self, chosen: tuple[str, ...]) -> None:
        """Raise UserError for a metric that is unknown or that cannot be measured with these."""
        unknown = [name for name in chosen if name not in METRICS]
        if unknown:
            close = did_you_mean(unknown[0], METRICS)
            raise UserError(f"--metrics: unknown metric {','.join(unknown)}{close}; choose from {', '.join(METRICS)}")
        for name in chosen:
            metric = METRICS[name]
            if metric.of_inception and self.network.name != INCEPTION:
                raise UserError(
                    f"--metrics: {name} needs the features {INCEPTION}, and --features gives {self.network.name}: "
                    "use fd instead"
                )
            if not self.has_images and (metric.needs_images or metric.output not in self.statistics):
                raise UserError(
                    f"--metrics: {name} needs the images of the reference, and the file has only statistics: "
                    "give a dataset or a folder of images"
                )


def _extract(
    measured: ImageSet, compared: ImageSet | None, statistics: dict[str, tuple[Tensor, Tensor]], network: Features,
    features: str, chosen: tuple[str, ...], workers: int | None, batch: int, resources: Resources,
) -> ComparedSets:  # fmt: skip
    """Compute the features of both sets that the metrics need."""
    outputs = _outputs(chosen)
    workers = 0 if network.name == COLOUR_LAYOUT else workers  # faster than the start of Ray
    with_images = [METRICS[name].output for name in chosen if METRICS[name].needs_images]
    reference_outputs = tuple(output for output in outputs if output in with_images or output not in statistics)
    with contextlib.ExitStack() as stack:
        needed = [(measured, outputs), *([(compared, reference_outputs)] if compared is not None else [])]
        if workers != 0 and any(missing_features(images, network, wanted) for images, wanted in needed):
            stack.enter_context(ray_session())  # both sets share one session
        options = network, features, workers, batch, resources
        reference = extract(compared, reference_outputs, *options) if compared is not None else None
        return ComparedSets(extract(measured, outputs, *options), reference, dict(statistics))


def _save_reference(sets: ComparedSets, address: str, outputs: tuple[str, ...]) -> None:
    if sets.reference is None or sets.statistics:
        raise UserError(f"--save-reference {address}: the reference already is a file of statistics; copy that file")
    write_statistics(address, {output: sets.reference.moments(output) for output in outputs})
    say(f"  statistics of the reference: {address}")
