"""Evaluation: the same numbers for any workers and batches, with all that they depend on, and refusals in a line."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import environment
from PIL import Image
from scipy.linalg import sqrtm

from patchloom.errors import UserError
from patchloom.pipelines.evaluate.evaluation import evaluate
from patchloom.pipelines.evaluate.results import notes_on, seed_ranges
from patchloom.pipelines.registry.quality import TAG, Evaluation, comparable, differences, evaluations_of
from patchloom.pipelines.sample import sample
from patchloom.platform.dataset import open_dataset
from patchloom.platform.records.evaluation import EvaluationIdentity
from patchloom.platform.records.run import RunCard
from patchloom.platform.tracking.client import connect

LEFT_OUT = r"0\.jpg"


class Edges(torch.nn.Module):
    """A small network of fixed weights, so that workers have something to compute."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.nn.Parameter(torch.randn(12, 3, 3, 3, generator=generator) * 0.2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.conv2d(images.float() / 127.5 - 1, self.first).relu()
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("features") / "edges.pt"
    torch.jit.script(Edges()).save(path)
    return str(path)


def scipys_distance(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.real(sqrtm(cov_a @ cov_b)).trace()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * root)


def pictures(folder: Path, images: np.ndarray) -> Path:
    """A folder of PNG files of (N, H, W, C) images."""
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return folder


def noise(n: int, side: int = 12, seed: int = 0, least: int = 0, most: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(least, most, (n, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def samples(champion: str, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(sample(champion, str(tmp_path_factory.mktemp("samples") / "ten"), "0-9", steps=2).folder)


def test_mean_tile_colours_need_no_network(samples: Path, pixels: Path, tmp_path: Path) -> None:
    result = evaluate(str(samples), str(pixels), features="colours", out=str(tmp_path / "metrics.json"))
    ours = np.stack([np.asarray(Image.open(path)) for path in sorted(samples.glob("[0-9]*/*.png"))])
    theirs = open_dataset(pixels).rows(range(48))["image"].transpose(0, 2, 3, 1)
    a, b = (x.reshape(-1, 4, 4, 4, 4, 3).mean((2, 4)) / 255 for x in (ours, theirs))
    a, b = (x.transpose(0, 3, 1, 2).reshape(len(x), 48) for x in (a, b))
    assert result["metrics"]["frechet_distance"] == pytest.approx(scipys_distance(a, b), abs=1e-4)
    assert result == json.loads((tmp_path / "metrics.json").read_text())


def test_a_result_carries_what_it_depends_on(samples: Path, pixels: Path, tmp_path: Path) -> None:
    result = evaluate(str(samples), str(pixels), features="colours", out=str(tmp_path / "metrics.json"))
    identity = result["identity"]
    assert (identity["n_samples"], identity["n_reference"], identity["seeds"]) == (10, 48, "0-9")
    assert (identity["sampler"], identity["steps"], identity["network_evaluations"]) == ("heun", 2, 3)
    assert identity["reference"] == open_dataset(pixels).fingerprint
    assert (identity["features"], identity["resize"], identity["quantisation"]) == ("colour-layout-48", "none", "uint8")
    assert identity["reference_transform"]["resolution"] == 16 and identity["guidance"] == 1
    assert "precision" not in identity  # as in results of versions without this option
    assert any("biased upwards" in note for note in result["notes"])
    assert "frechet_distance_interval_95" not in result["metrics"]  # of 10 samples and 48 features
    assert any("96 samples" in note for note in result["notes"]) and "not FID" in result["notes"][0]
    for name in ("nearest", "density"):
        assert (tmp_path / f"metrics.{name}.png").is_file()


def test_a_result_goes_to_the_models_version(samples: Path, pixels: Path, tmp_path: Path) -> None:
    import mlflow

    result = evaluate(str(samples), str(pixels), features="colours", out=str(tmp_path / "metrics.json"))
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    version = client.get_model_version("tiny", "1")
    kept = {found.digest: found for found in evaluations_of(version.tags)}[result["digest"]]
    assert kept.metrics == result["metrics"] and kept.identity == result["identity"]
    assert version.tags["quality"].startswith("Fréchet distance")
    metric, run = "quality/frechet_distance colour-layout-48 n-10 heun-2", client.get_run(version.run_id)
    assert run.data.metrics[metric] == pytest.approx(result["metrics"]["frechet_distance"])
    reference = open_dataset(pixels).fingerprint[:32]
    logged = client.get_logged_model(version.source.removeprefix("models:/")).metrics or []
    assert (metric, reference) in {(found.key, found.dataset_digest) for found in logged}
    assert {"loss", "held_out_loss"} <= {found.key for found in logged if found.dataset_name == "pixels"}
    shown = [key for key in version.tags if not key.startswith("mlflow.")]  # MLflow's pages hide the others
    assert not [key for key in shown if version.tags[key].startswith("{")]
    files = {file.path for file in client.list_artifacts(version.run_id, f"evaluations/{result['digest']}")}
    assert f"evaluations/{result['digest']}/metrics.json" in files


def test_results_that_cannot_be_compared_are_different_metrics(
    samples: Path, pixels: Path, tmp_path: Path, trained: Path
) -> None:
    def curves() -> dict[str, float]:
        found = connect().get_run(str(RunCard.read(trained).run_id)).data.metrics
        return {key: value for key, value in found.items() if key.startswith("quality/frechet_distance colour")}

    references = [pictures(tmp_path / name, noise(12, 16, seed=seed)) for seed, name in enumerate(("a", "b"))]
    before = curves()
    values = [
        evaluate(str(samples), str(folder), features="colours", out=str(tmp_path / "metrics.json"))["metrics"]
        for folder in (*references, references[0])
    ]
    inputs = connect().get_run(str(RunCard.read(trained).run_id)).inputs.dataset_inputs
    contexts = [tag.value for found in inputs for tag in found.tags if found.dataset.name in ("a", "b")]
    assert contexts == ["evaluation"] * 2
    new = {key: value for key, value in curves().items() if key not in before}
    assert sorted(new.values()) == pytest.approx(sorted(found["frechet_distance"] for found in values[:2]))


def test_evaluations_of_earlier_versions_are_read() -> None:
    one = Evaluation(
        metrics={"fid": 3.0}, identity=EvaluationIdentity(features="inception", n_samples=5, reference="a")
    )
    other = one.model_copy(update={"metrics": {"fid": 2.0}})
    old, new = f"evaluation.{one.digest}", f"{TAG}{one.digest}"
    assert evaluations_of({old: json.dumps(one.to_dict())}) == [one]
    both = {new: json.dumps(other.to_dict()), old: json.dumps(one.to_dict()), "kind": "pixels"}
    assert evaluations_of(both) == [other]


def test_workers_and_batches_change_nothing(
    network: str, pixels: Path, tmp_path: Path, ray_cluster: None
) -> None:  # fmt: skip
    images = noise(300, 16)
    found = []
    for name, workers, batch in (("one", 1, 32), ("two", 2, 7), ("here", 0, 300)):
        folder = pictures(tmp_path / name, images)
        with environment(PATCHLOOM_CACHE=str(tmp_path / f"cache-{name}")):  # nothing is kept from the call before
            result = evaluate(str(folder), str(pixels), features=network, workers=workers, batch=batch)
        found.append(result["metrics"])
    assert found[0]["frechet_distance"] > 0
    for other in found[1:]:
        assert other["frechet_distance"] == pytest.approx(found[0]["frechet_distance"], rel=1e-6)
        assert (other["precision"], other["recall"]) == (found[0]["precision"], found[0]["recall"])
        assert other["kid"] == pytest.approx(found[0]["kid"], rel=1e-4)


def test_what_was_looked_at_is_not_looked_at_again(network: str, tmp_path: Path) -> None:
    ours, theirs = (pictures(tmp_path / name, noise(40, seed=seed)) for seed, name in enumerate(("a", "b")))
    first = evaluate(str(ours), str(theirs), features=network, workers=0)
    assert evaluate(str(ours), str(theirs), features=network, workers=0)["metrics"] == first["metrics"]
    Image.fromarray(noise(1, seed=9)[0]).save(ours / "005.png")  # other content is another image
    changed = evaluate(str(ours), str(theirs), features=network, workers=0)["metrics"]
    assert changed["frechet_distance"] != first["metrics"]["frechet_distance"]


def test_statistics_are_edms_and_adms(network: str, tmp_path: Path) -> None:
    ours, theirs = (pictures(tmp_path / name, noise(60, seed=seed)) for seed, name in enumerate(("a", "b")))
    kept = str(tmp_path / "reference.npz")
    whole = evaluate(str(ours), str(theirs), features=network, workers=0, save_reference=kept)
    rows = np.concatenate([Edges()(torch.from_numpy(x.transpose(2, 0, 1)[None])).detach() for x in noise(60, seed=1)])
    statistics = np.load(kept)
    assert np.allclose(statistics["mu"], rows.mean(0), rtol=1e-5)
    assert np.allclose(statistics["sigma"], np.cov(rows.T), rtol=1e-4, atol=1e-9)
    again = evaluate(str(ours), kept, features=network, workers=0)
    distance = whole["metrics"]["frechet_distance"]
    assert again["metrics"]["frechet_distance"] == pytest.approx(distance, rel=1e-9)
    assert "kid" not in again["metrics"] and again["identity"]["n_reference"] is None
    # ADM's reference batches hold the images beside the statistics
    np.savez(tmp_path / "adm.npz", arr_0=noise(60, seed=1), mu=statistics["mu"], sigma=statistics["sigma"])
    both = evaluate(str(ours), str(tmp_path / "adm.npz"), features=network, workers=0)
    assert both["metrics"]["frechet_distance"] == pytest.approx(distance, rel=1e-9)
    assert both["metrics"]["kid"] == pytest.approx(whole["metrics"]["kid"])


def test_an_autoencoder_is_measured_by_its_latents(pixels: Path, tmp_path: Path, ray_cluster: None) -> None:
    from skimage.metrics import peak_signal_noise_ratio

    from patchloom.models.autoencoder import load_autoencoder, new_autoencoder, save_autoencoder
    from patchloom.pipelines.prepare import prepare

    torch.manual_seed(0)
    save_autoencoder(new_autoencoder((8, 8), 4), tmp_path / "autoencoder")
    prepare(str(pixels), str(tmp_path / "latents"), autoencoder=str(tmp_path / "autoencoder"))
    result = evaluate(str(tmp_path / "latents"), str(pixels), features="colours", metrics=("fd", "psnr", "ssim"))
    images = open_dataset(pixels).rows(range(48))["image"]
    latents = torch.from_numpy(open_dataset(tmp_path / "latents").rows(range(48))["mean"]).float()
    decoded = load_autoencoder(tmp_path / "autoencoder").decode(latents).numpy()
    wanted = np.mean([peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(images, decoded, strict=True)])
    assert result["metrics"]["psnr_db"] == pytest.approx(wanted, abs=1e-2)
    assert result["metrics"]["ssim_window"] == 7 and any("windows of 7 x 7 pixels" in note for note in result["notes"])
    assert result["identity"]["images"] == "reconstructions" and result["metrics"]["frechet_distance"] > 0
    alone = evaluate(str(tmp_path / "latents"), str(pixels), metrics=("psnr",), out=str(tmp_path / "psnr.json"))
    assert alone["metrics"]["psnr_db"] == result["metrics"]["psnr_db"] and alone["identity"]["width"] == 0


def test_sfid_is_measured_without_fid(tmp_path: Path) -> None:
    from patchloom.models.inception import Inception

    torch.manual_seed(0)
    torch.save(Inception().state_dict(), tmp_path / "inception.pth")
    ours, theirs = (pictures(tmp_path / name, noise(4, seed=seed)) for seed, name in enumerate(("a", "b")))
    features = str(tmp_path / "inception.pth")
    alone = evaluate(str(ours), str(theirs), metrics=("sfid",), features=features, workers=0)
    both = evaluate(
        str(ours), str(theirs), metrics=("fid", "sfid"), features=features, workers=0, out=str(tmp_path / "both.json")
    )
    assert alone["metrics"]["sfid"] == both["metrics"]["sfid"] and "fid" not in alone["metrics"]
    assert (alone["identity"]["width"], both["identity"]["width"]) == (2023, 2048)


def evaluation(**changes: Any) -> Evaluation:
    identity = {"features": "inception-2015-12-05", "n_samples": 64, "seeds": "0-63", "steps": 18, "reference": "a"}
    return Evaluation(metrics={"fid": 12.0}, identity=EvaluationIdentity.model_validate({**identity, **changes}))


def test_results_that_differ_say_in_what() -> None:
    one, same, other = (
        evaluation(),
        Evaluation(metrics={"fid": 11.0}, identity=evaluation().identity),
        evaluation(n_samples=50_000),
    )
    assert differences(one, same) == [] and comparable([one], [same, other]) == [(one, same)]
    assert differences(one, other) == ["n_samples is 64 and 50000"]
    assert comparable([one], [other]) == [] and comparable([one], [same], "kid") == []
    assert one.headline() == "FID 12 (n=64)"


def test_two_images_have_a_distance_and_no_neighbours(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "two", noise(2))
    metrics = evaluate(str(folder), str(folder), features="colours")["metrics"]
    assert (
        metrics["frechet_distance"] == pytest.approx(0, abs=1e-9) and "kid" not in metrics and "recall" not in metrics
    )


def test_seeds_are_told_in_few_words() -> None:
    assert seed_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def _of_size(folder: Path, side: int) -> str:
    return str(pictures(folder, noise(4, side)))


def _with_a_corrupt_file(folder: Path) -> str:
    pictures(folder, noise(4))
    (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:60])
    return str(folder)


def _with_another_size(folder: Path) -> str:
    pictures(folder, noise(4))
    Image.fromarray(noise(1, 20)[0]).save(folder / "003.png")
    return str(folder)


def _of_jpegs(folder: Path) -> str:
    folder.mkdir()
    Image.fromarray(noise(1)[0]).save(folder / "0.jpg")
    return str(folder)


def _statistics_of_others(folder: Path) -> str:
    np.savez(folder.with_suffix(".npz"), mu=np.zeros(5), sigma=np.eye(5))
    return str(folder.with_suffix(".npz"))


def _not_an_npz(folder: Path) -> str:
    folder.with_suffix(".npz").write_text("nothing")
    return str(folder.with_suffix(".npz"))


@pytest.mark.parametrize(
    ("samples_of", "reference_of", "words"),
    [
        (_with_a_corrupt_file, lambda f: _of_size(f, 12), r"002\.png cannot be read"),
        (_with_another_size, lambda f: _of_size(f, 12), r"003\.png.*20x20.*000\.png.*12x12"),
        (_of_jpegs, lambda f: _of_size(f, 12), LEFT_OUT),
        (lambda f: _of_size(f, 12), _of_jpegs, LEFT_OUT),
        (lambda f: _of_size(f, 12), lambda f: _of_size(f, 14), r"12x12.*14x14"),
        (lambda f: str(pictures(f, noise(1))), lambda f: _of_size(f, 12), "1 image"),
        (lambda f: str(f), lambda f: _of_size(f, 12), "ours"),
        (lambda f: _of_size(f, 12), _statistics_of_others, r"\b5\b.*\b48\b"),
        (lambda f: _of_size(f, 12), _not_an_npz, r"theirs\.npz"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(
    samples_of: Any, reference_of: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words) as refused:
        evaluate(samples_of(tmp_path / "ours"), reference_of(tmp_path / "theirs"), features="colours")
    assert "\n" not in str(refused.value)


def test_a_changed_sample_is_refused(samples: Path, pixels: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(samples, tmp_path / "copy", ignore=shutil.ignore_patterns(".features", ".lock")))
    (copy / "000000/000003.png").write_bytes(b"not a png")
    with pytest.raises(UserError, match=r"000003\.png"):
        evaluate(str(copy), str(pixels), features="colours")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metrics": ("fidd",)}, "fidd.*fid, sfid, kid"),
        ({"metrics": ("fid",)}, "fid.*inception-2015-12-05"),
        ({"features": "nowhere.pt"}, r"nowhere\.pt.*inception, colours, dinov2"),
        ({"metrics": ("psnr",)}, "psnr.*latents.*pixels"),
    ],
)
def test_metrics_that_do_not_fit_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "a", noise(5))
    with pytest.raises(UserError, match=words):
        evaluate(str(folder), str(folder), **{"features": "colours", **options})


def test_a_distance_of_enough_samples_has_an_interval_for_its_mean(network: str, tmp_path: Path) -> None:
    ours, theirs = (pictures(tmp_path / name, noise(60, seed=seed)) for seed, name in enumerate(("a", "b")))
    result = evaluate(str(ours), str(theirs), features=network, workers=0)  # 24 features
    low, high = result["metrics"]["frechet_distance_interval_95"]
    assert low < result["metrics"]["frechet_distance"] < high
    assert any(all(part in note for part in (f"{low:.4g}", f"{high:.4g}", "60 samples")) for note in result["notes"])


@pytest.mark.parametrize(
    ("n", "infinity", "words"),
    [
        (8_191, None, "8,192 samples or more"),
        (8_192, None, "too small to be estimated"),
        (8_192, 3.25, "about 3.25 (a rough estimate"),
    ],
)
def test_a_note_says_what_is_known_about_unlimited_samples(n: int, infinity: float | None, words: str) -> None:
    metrics: dict[str, Any] = {"fid": 4.0, "fid_interval_95": [3.5, 4.5]}
    if infinity is not None:
        metrics["fid_infinity"] = infinity
    identity = EvaluationIdentity(features="inception-2015-12-05", n_samples=n, reference="a", width=2048)
    assert words in notes_on(Evaluation(metrics=metrics, identity=identity))[0]
