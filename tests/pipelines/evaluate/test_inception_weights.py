"""The real weights of FID's Inception: documented values of torchmetrics, scipy's distance, TorchScript features."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHARED_DATA, environment
from scipy.linalg import sqrtm

from patchloom.errors import UserError
from patchloom.models.features import InceptionFeatures
from patchloom.models.inception import Inception, load_inception
from patchloom.models.metrics import frechet_distance, kernel_distance
from patchloom.pipelines.evaluate import evaluate
from patchloom.pipelines.evaluate.features import INCEPTION_FILES, load_features

SHARED = SHARED_DATA


@pytest.fixture(scope="module")
def inception() -> InceptionFeatures:
    try:
        features = load_features("inception")
    except UserError as error:
        pytest.skip(f"Inception's weights are not available: {error}")
    assert isinstance(features, InceptionFeatures)
    return features


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory, inception: InceptionFeatures) -> torch.jit.ScriptModule:
    path = tmp_path_factory.mktemp("inception") / "inception.pt"
    INCEPTION_FILES[1].fetch(path)
    return torch.jit.load(path).eval()


@pytest.fixture(scope="module")
def cifar() -> np.ndarray:
    path = SHARED / "cifar10_lossless_19k.npz"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    images: np.ndarray = np.load(path)["images"]
    return images


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def features_of(inception: InceptionFeatures, images: np.ndarray) -> torch.Tensor:
    """(N, H, W, C) uint8 -> (N, 2048)."""
    rows = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return torch.cat([inception(batch)["pool"] for batch in rows.split(16)])


def scipys_distance(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.real(sqrtm(cov_a @ cov_b)).trace()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * root)


def test_features_equal_those_of_the_torchscript_file(
    inception: InceptionFeatures, scripted: torch.jit.ScriptModule
) -> None:
    images = torch.randint(0, 256, (3, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = scripted((images.float() - 128) / 128)
    assert (inception(images)["pool"] - wanted).abs().max() < 1e-4


def test_weights_of_both_files_are_equal(inception: InceptionFeatures, tmp_path: Path) -> None:
    # under the names of the port that the field's other evaluators load, with a classifier
    state = dict(inception.state) | {"fc.weight": torch.eye(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(state, tmp_path / "weights.pth")
    port = load_features(str(tmp_path / "weights.pth"))
    assert port.sha256 == inception.sha256 and port.classifier is not None


def test_inception_score_without_a_classifier_is_an_error(inception: InceptionFeatures, tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    if inception.classifier is not None:
        pytest.skip("these weights have a classifier")
    few = str(tmp_path / "few.npz")
    with pytest.raises(UserError, match="classifier"):
        evaluate(few, few, metrics=("is",), workers=0)


@pytest.mark.slow
def test_documented_values_of_torchmetrics(inception: InceptionFeatures) -> None:
    torch.manual_seed(42)
    Inception(), torch.nn.Linear(2048, 1008)  # its examples build the network first, whose fresh weights draw too
    a = torch.randint(0, 200, (100, 3, 299, 299), dtype=torch.uint8)
    b = torch.randint(100, 255, (100, 3, 299, 299), dtype=torch.uint8)
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())  # its subsets are drawn next
    network = load_inception(inception.state)
    sides = []
    for images in (a, b):
        found = [network(batch) for batch in images.split(10)]
        sides.append({name: torch.cat([rows[name] for rows in found]) for name in ("pool64", "pool")})
    assert frechet_distance(*(side["pool64"] for side in sides)) == pytest.approx(12.6388, abs=5e-5)
    kid = kernel_distance(*(side["pool"] for side in sides), subset_size=50, generator=generator)
    assert (kid.mean, kid.std) == (pytest.approx(0.0312, abs=5e-5), pytest.approx(0.0025, abs=5e-5))


@pytest.mark.slow
def test_frechet_distance_equals_scipy(inception: InceptionFeatures, cifar: np.ndarray, tmp_path: Path) -> None:
    for name, start in (("ours", 0), ("theirs", 5000)):
        np.savez(tmp_path / f"{name}.npz", arr_0=cifar[start : start + 200])
    ours, theirs = str(tmp_path / "ours.npz"), str(tmp_path / "theirs.npz")
    rows = [features_of(inception, cifar[start : start + 200]).double().numpy() for start in (0, 5000)]
    wanted = scipys_distance(*rows)
    found = []
    for workers, batch in ((1, 32), (2, 20)):
        with environment(PATCHLOOM_CACHE=str(tmp_path / f"cache-{workers}")):
            found.append(evaluate(ours, theirs, metrics=("fid",), workers=workers, batch=batch)["metrics"]["fid"])
    print(f"FID {found}, scipy's {wanted}")
    assert found[0] == pytest.approx(wanted, abs=1e-3)
    assert found[1] == pytest.approx(found[0], rel=1e-6)
