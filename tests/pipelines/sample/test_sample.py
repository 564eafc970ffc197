"""Sampling: the bytes of a seed depend on nothing else, a second call samples what is missing, options never mix."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchloom.errors import UserError
from patchloom.pipelines.cli import main
from patchloom.pipelines.evaluate import evaluate
from patchloom.pipelines.sample import sample
from patchloom.pipelines.sample.seeds import parse_seeds

pytestmark = pytest.mark.ray
OPTIONS = {"steps": 3, "batch": 4}


def png_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[0-9]*/*.png"))}


@pytest.fixture(scope="module")
def samples(champion: str, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten seeds of the tiny champion, sampled by one worker."""
    folder = tmp_path_factory.mktemp("samples") / "samples"
    sample(champion, str(folder), "0-9", workers=1, **OPTIONS)
    return folder


def test_manifest_has_the_sha256_of_every_file(samples: Path) -> None:
    entries = [json.loads(line) for line in (samples / "manifest.jsonl").read_text().splitlines()]
    assert [entry["seed"] for entry in entries] == list(range(10))
    assert [entry["label"] for entry in entries] == [0, 1] * 5
    for entry in entries:
        assert entry["file"] == f"000000/{entry['seed']:06d}.png"
        content = (samples / entry["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    assert len({entry["sha256"] for entry in entries}) == 10
    with Image.open(samples / "contact_sheet.png") as sheet:
        assert sheet.size == (2 * (8 * 18 - 2), 2 * (2 * 18 - 2))


def test_bytes_do_not_depend_on_workers_or_order(champion: str, samples: Path, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    sample(champion, str(folder), "7,3", workers=2, **OPTIONS)
    sample(champion, str(folder), "0-9", workers=2, **OPTIONS)
    assert png_bytes(folder) == png_bytes(samples)
    assert (folder / "manifest.jsonl").read_bytes() == (samples / "manifest.jsonl").read_bytes()
    assert (folder / "contact_sheet.png").read_bytes() == (samples / "contact_sheet.png").read_bytes()


def test_damaged_or_missing_image_is_sampled_again(champion: str, samples: Path, pixels: Path) -> None:
    before = png_bytes(samples)
    (samples / "000000" / "000002.png").unlink()
    (samples / "000000" / "000005.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"000002\.png"):
        evaluate(str(samples), str(pixels), features="colours")
    assert sample(champion, str(samples), "0-9", workers=0, **OPTIONS).made == 2
    assert png_bytes(samples) == before


def test_other_options_in_the_same_folder_are_an_error(champion: str, samples: Path) -> None:
    with pytest.raises(UserError, match=r"steps.*3.*4"):
        sample(champion, str(samples), "0-9", steps=4, batch=4)
    with pytest.raises(UserError, match=r"dog.*chelsea, coffee"):
        sample(champion, str(samples), "0-9", label="dog", **OPTIONS)


def test_precision_is_recorded_and_never_mixed(champion: str, samples: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    sample(champion, str(folder), "0-3", precision="bf16", workers=0, **OPTIONS)
    assert json.loads((folder / "sampling.json").read_text())["precision"] == "bf16"
    half, full = png_bytes(folder), png_bytes(samples)
    assert all(half[name] != full[name] for name in half)
    with pytest.raises(UserError, match=r"precision.*bf16.*fp32"):
        sample(champion, str(folder), "0-3", workers=0, **OPTIONS)


def test_folder_of_a_version_without_precision_is_extended_in_fp32(
    champion: str, samples: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "old"
    sample(champion, str(folder), "0-1", workers=0, **OPTIONS)
    card = json.loads((folder / "sampling.json").read_text())
    assert card.pop("precision") == "fp32" and card.pop("device") == "cpu"
    (folder / "sampling.json").write_text(json.dumps(card))
    assert sample(champion, str(folder), "0-3", workers=0, **OPTIONS).made == 2
    assert png_bytes(folder) == {name: png_bytes(samples)[name] for name in png_bytes(folder)}
    with pytest.raises(UserError, match=r"precision.*fp32.*fp16"):
        sample(champion, str(folder), "0-3", precision="fp16", workers=0, **OPTIONS)


def test_json_option_prints_one_object(
    champion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "samples"
    arguments = ["sample", champion, str(folder), "--seeds", "0-2", "--steps", "1", "--workers", "0", "--json"]
    monkeypatch.setattr(sys, "argv", ["patchloom", *arguments])
    for made in (3, 0):
        with pytest.raises(SystemExit) as left:
            main()
        output = capsys.readouterr()
        printed = json.loads(output.out)
        assert left.value.code == 0 and output.out.count("\n") == 1
        assert "sampling: 3 images in" in output.err
        assert printed["seconds"] > 0 and printed["images_per_second"] >= 0
        assert {key: printed[key] for key in ("folder", "format", "images", "made", "manifest", "contact_sheet")} == {
            "folder": str(folder), "format": "png", "images": 3, "made": made,
            "manifest": f"{folder}/manifest.jsonl", "contact_sheet": f"{folder}/contact_sheet.png",
        }  # fmt: skip
        assert printed["model"]["reference"] == "models:/tiny/1" and printed["model"]["version"] == "1"


def test_guided_class(champion: str, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    sample(champion, str(folder), [1, 2], label="coffee", guidance=1.5, workers=0, **OPTIONS)
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [1, 1]
    assert json.loads((folder / "sampling.json").read_text())["network_evaluations"] == 2 * (2 * 3 - 1)


@pytest.mark.parametrize(("method", "evaluations"), [("replace", 3), ("resample", 12), ("reconstruct", 12)])
def test_outpainting_keeps_the_image_in_the_center(
    champion: str, images: Path, tmp_path: Path, method: str, evaluations: int
) -> None:
    centre, folder = images / "coffee" / "00.png", tmp_path / "samples"
    sample(champion, str(folder), [0, 1], sampler="dpmpp-2m-sde", size=(24, 32), canvas="extrapolate",
           outpaint=str(centre), outpaint_method=method, workers=0, **OPTIONS)  # fmt: skip
    wanted = np.asarray(Image.open(centre))
    made = [np.asarray(Image.open(folder / "000000" / f"00000{seed}.png")) for seed in (0, 1)]
    for image in made:
        assert image.shape == (24, 32, 3)
        assert (image[4:20, 8:24] == wanted).all()
    assert abs(made[0].astype(int) - made[1])[:, :8].max() > 10
    options = json.loads((folder / "sampling.json").read_text())
    assert options["size"] == [24, 32] and options["network_evaluations"] == evaluations
    assert options["outpaint"] == {"sha256": hashlib.sha256(centre.read_bytes()).hexdigest(), "method": method}


def test_inpainting_keeps_the_white_part_of_the_mask(champion: str, images: Path, tmp_path: Path) -> None:
    image, folder = images / "coffee" / "00.png", tmp_path / "samples"
    pixels = np.asarray(Image.open(image))
    mask = np.random.default_rng(0).integers(0, 2, pixels.shape[:2], dtype=np.uint8) * 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = {"inpaint": str(image), "mask": str(tmp_path / "mask.png"), "workers": 0, **OPTIONS}
    sample(champion, str(folder), [0, 1], **arguments)
    made = [np.asarray(Image.open(folder / "000000" / f"00000{seed}.png")) for seed in (0, 1)]
    for sampled in made:
        assert (sampled[mask > 0] == pixels[mask > 0]).all()
        assert (sampled[mask == 0] != pixels[mask == 0]).any()
    assert (made[0][mask == 0] != made[1][mask == 0]).any()
    (folder / "000000" / "000001.png").unlink()
    sample(champion, str(folder), [0, 1], **arguments)  # the missing one again
    assert (np.asarray(Image.open(folder / "000000" / "000001.png")) == made[1]).all()
    with pytest.raises(UserError):
        sample(champion, str(folder), [0, 1], **{**arguments, "outpaint_method": "replace"})


def test_a_folder_of_an_earlier_version_was_out_painted_by_replacing(
    champion: str, images: Path, tmp_path: Path
) -> None:
    folder, arguments = tmp_path / "samples", {"size": (24, 24), "outpaint": str(images / "coffee" / "00.png")}
    sample(champion, str(folder), [0], outpaint_method="replace", workers=0, **arguments, **OPTIONS)
    card = json.loads((folder / "sampling.json").read_text())
    card["outpaint"] = {"sha256": card["outpaint"]["sha256"]}
    (folder / "sampling.json").write_text(json.dumps(card))
    assert sample(champion, str(folder), [0, 1], outpaint_method="replace", workers=0, **arguments, **OPTIONS).made == 1
    with pytest.raises(UserError):
        sample(champion, str(folder), [0, 1, 2], outpaint_method="reconstruct", workers=0, **arguments, **OPTIONS)


@pytest.mark.parametrize("mask", [np.zeros((16, 16), np.uint8), np.full((16, 16), 255, np.uint8), np.eye(8) > 0])
def test_a_mask_that_keeps_nothing_or_all_or_has_another_size_is_an_error(
    champion: str, images: Path, tmp_path: Path, mask: np.ndarray
) -> None:
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = {"inpaint": str(images / "coffee" / "00.png"), "mask": str(tmp_path / "mask.png"), **OPTIONS}
    with pytest.raises(UserError, match="mask"):
        sample(champion, str(tmp_path / "samples"), [0], workers=0, **options)
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(("text", "seeds"), [("0-3", [0, 1, 2, 3]), ("5,0,9", [0, 5, 9]), ("0-2,2,7", [0, 1, 2, 7])])
def test_seeds_as_ranges_and_lists(text: str, seeds: list[int]) -> None:
    assert list(parse_seeds(text)) == seeds


@pytest.mark.parametrize("text", ["", "a-b", "3-1", "-4", "1.5"])
def test_invalid_seeds_are_an_error(text: str) -> None:
    with pytest.raises(UserError, match="--seeds"):
        parse_seeds(text)


def test_seeds_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "seeds.txt").write_text("4\n2\n")
    assert list(parse_seeds(str(tmp_path / "seeds.txt"))) == [2, 4]


def test_registered_version_has_its_lineage(champion: str, trained: Path) -> None:
    from patchloom.pipelines.registry.registering import register
    from patchloom.platform.tracking.versions import list_versions

    rows = [row for row in list_versions() if row.name == "tiny"]
    run = json.loads((trained / "run.json").read_text())
    assert [(row.version, row.run_id) for row in rows] == [("1", run["run_id"])]
    assert "champion" in rows[0].aliases
    tags = rows[0].tags
    assert tags["dataset_fingerprint"] == run["dataset_fingerprint"]
    assert tags["weights_sha256"] == hashlib.sha256((trained / "model/model.safetensors").read_bytes()).hexdigest()
    assert tags["recipe_sha256"] == hashlib.sha256((trained / "recipe.yaml").read_bytes()).hexdigest()
    assert "patchloom sample models:/tiny/1" in rows[0].description
    assert register(str(trained), "tiny") == "models:/tiny/1"  # the same weights again: the same version


def test_an_outpainted_image_is_decoded_as_prepare_does(champion: str, tmp_path: Path) -> None:
    """EXIF turns it, 16 bits become 8, and transparency becomes white."""
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, :8, 0] = 117
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn: the left side is the top
    Image.fromarray(wide).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.full((16, 16), 117 * 257, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.zeros((16, 16, 4), np.uint8), "RGBA").save(tmp_path / "clear.png")
    turned = np.rot90(wide, -1)
    for name, shown in (("turned", turned), ("deep", np.full((16, 16, 3), 117)), ("clear", np.full((16, 16, 3), 255))):
        folder = tmp_path / name
        sample(champion, str(folder), "0", size=(24, 24), outpaint=str(tmp_path / f"{name}.png"), steps=2, workers=0)
        made = np.asarray(Image.open(folder / "000000" / "000000.png"))
        top, left = (24 - shown.shape[0]) // 2, (24 - shown.shape[1]) // 2
        assert np.array_equal(made[top : top + shown.shape[0], left : left + shown.shape[1]], shown)
