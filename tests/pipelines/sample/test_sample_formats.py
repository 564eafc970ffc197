"""Formats of samples: all contain the same images, for other tools too, local and remote, extended and repaired."""

import csv
import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from patchloom.errors import UserError
from patchloom.pipelines.sample.folder import read_entries, read_samples
from patchloom.pipelines.sample.formats import FORMATS, read_contents
from patchloom.pipelines.sample.sampling import sample
from patchloom.platform.dataset.readers import SourceReader
from patchloom.platform.dataset.sources import open_source
from patchloom.platform.files.folder import Folder
from patchloom.platform.records.samples import ManifestEntry

pytestmark = pytest.mark.ray
OPTIONS: dict[str, Any] = {"steps": 2, "batch": 4, "workers": 0}
ARCHIVES = [name for name in FORMATS if name != "png"]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file that is not hidden, with its bytes."""
    return {name: (folder / name).read_bytes() for name in Folder(str(folder)).files() if not name.startswith(".")}


def lines_of(folder: Path) -> list[ManifestEntry]:
    return list(read_entries(Folder(str(folder))))


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.fixture(scope="module")
def pngs(champion: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeds 0 to 9 as PNG files."""
    folder = tmp_path_factory.mktemp("samples") / "png"
    sample(champion, str(folder), "0-9", **OPTIONS)
    return folder


@pytest.fixture(scope="module")
def archives(champion: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same seeds in every other format, four to an archive."""
    folder = tmp_path_factory.mktemp("samples")
    for name in ARCHIVES:
        result = sample(champion, str(folder / name), "0-9", format=name, shard_size=4, **OPTIONS)
        assert (result.images, result.made, result.format) == (10, 10, name)
    return {name: folder / name for name in ARCHIVES}


def images_of(folder: Path) -> np.ndarray:
    """(10, H, W, 3) from the PNG files."""
    return np.stack([np.asarray(Image.open(folder / "000000" / f"{seed:06d}.png")) for seed in range(10)])


@pytest.mark.parametrize("name", ARCHIVES)
def test_every_format_contains_the_images_of_the_png_files(name: str, pngs: Path, archives: dict[str, Path]) -> None:
    folder, ending = archives[name], FORMATS[name].ending
    lines = lines_of(folder)
    assert [line["seed"] for line in lines] == list(range(10))
    assert [line["label"] for line in lines] == [0, 1] * 5
    assert [line["file"] for line in lines] == [f"00000{shard}{ending}" for shard in [0] * 4 + [1] * 4 + [2] * 2]
    wanted = images_of(pngs)
    assert (read_samples(folder, lines).transpose(0, 2, 3, 1) == wanted).all()
    assert (read_samples(folder, lines[5:7]).transpose(0, 2, 3, 1) == wanted[5:7]).all()
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in wanted]
    if name != "npz":
        digests = [line["sha256"] for line in lines_of(pngs)]
    assert [line["sha256"] for line in lines] == digests
    assert (folder / "contact_sheet.png").read_bytes() == (pngs / "contact_sheet.png").read_bytes()


def test_zip_has_the_layout_of_edm(pngs: Path, archives: dict[str, Path]) -> None:
    with zipfile.ZipFile(archives["zip"] / "000001.zip") as archive:
        assert archive.namelist() == [f"00000{seed}.png" for seed in (4, 5, 6, 7)] + ["dataset.json"]
        assert json.loads(archive.read("dataset.json")) == {
            "labels": [["000004.png", 0], ["000005.png", 1], ["000006.png", 0], ["000007.png", 1]]
        }
        assert archive.read("000006.png") == (pngs / "000000" / "000006.png").read_bytes()


def test_tar_is_a_webdataset_shard(pngs: Path, archives: dict[str, Path]) -> None:
    with tarfile.open(archives["webdataset"] / "000002.tar") as archive:
        assert archive.getnames() == ["000008.png", "000008.cls", "000009.png", "000009.cls"]
        read = {name: archive.extractfile(name) for name in archive.getnames()}
        assert {name: file.read() for name, file in read.items() if file} == {
            "000008.png": (pngs / "000000" / "000008.png").read_bytes(), "000008.cls": b"0",
            "000009.png": (pngs / "000000" / "000009.png").read_bytes(), "000009.cls": b"1",
        }  # fmt: skip


def test_parquet_has_the_columns_of_hugging_face(pngs: Path, archives: dict[str, Path]) -> None:
    table = pyarrow.parquet.read_table(archives["parquet"] / "000000.parquet").to_pydict()
    assert (table["seed"], table["label"]) == ([0, 1, 2, 3], [0, 1, 0, 1])
    contents = [(pngs / "000000" / f"{seed:06d}.png").read_bytes() for seed in range(4)]
    assert table["image"] == [{"bytes": content, "path": f"{seed:06d}.png"} for seed, content in enumerate(contents)]


def test_npz_shards_are_joined(pngs: Path, archives: dict[str, Path]) -> None:
    wanted = images_of(pngs)
    for name, seeds in (("samples", range(10)), ("000001", range(4, 8))):
        with np.load(archives["npz"] / f"{name}.npz", allow_pickle=False) as arrays:
            assert arrays["arr_0"].dtype == np.uint8 and (arrays["arr_0"] == wanted[seeds]).all()
            assert arrays["seeds"].tolist() == list(seeds)
            assert arrays["labels"].tolist() == [seed % 2 for seed in seeds]


@pytest.mark.parametrize("name", ["zip", "webdataset", "parquet", "npz"])
def test_archives_can_be_prepared(name: str, pngs: Path, archives: dict[str, Path]) -> None:
    source = open_source(str(archives[name] / f"000001{FORMATS[name].ending}"))
    assert [one.label for one in source.inputs] == [0, 1, 0, 1]
    reader = SourceReader(source.kind, source.address)
    found = [reader.read(one.place) for one in source.inputs]
    images = np.stack([decoded(one) if isinstance(one, bytes) else one for one in found])
    assert (images == images_of(pngs)[4:8]).all()


@pytest.mark.parametrize("name", FORMATS)
def test_more_seeds_extend_a_folder_to_what_one_call_gives(
    name: str, champion: str, pngs: Path, archives: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "samples"
    made = [
        sample(champion, str(folder), seeds, format=name, shard_size=4, **OPTIONS).made
        for seeds in ("5", "0-2", "0-9", "3-4")
    ]
    assert made == [1, 3, 6, 0]
    assert files_of(folder) == files_of(pngs if name == "png" else archives[name])


@pytest.mark.parametrize("name", ARCHIVES)
def test_damaged_archive_is_sampled_again(name: str, champion: str, archives: dict[str, Path], tmp_path: Path) -> None:
    folder, ending = tmp_path / "samples", FORMATS[name].ending
    sample(champion, str(folder), "0-9", format=name, shard_size=4, **OPTIONS)
    content = bytearray((folder / f"000000{ending}").read_bytes())
    at = content.find(b"IDAT") + 10 if name != "npz" else 300
    content[at] ^= 1
    (folder / f"000000{ending}").write_bytes(content)
    (folder / f"000002{ending}").write_bytes(content[:90])
    with pytest.raises(UserError, match=rf"seed 8 .*000002{ending}"):
        read_samples(folder, lines_of(folder)[6:])
    with pytest.raises(UserError, match=rf"000000{ending}.*patchloom sample"):
        read_samples(folder, lines_of(folder)[:4])
    result = sample(champion, str(folder), "0-9", format=name, shard_size=4, **OPTIONS)
    assert 3 <= result.made <= 6  # intact images of the first archive are kept
    assert files_of(folder) == files_of(archives[name])


@pytest.mark.parametrize("name", ["png", "zip"])
def test_images_that_were_verified_are_not_read_again(
    name: str, champion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = tmp_path / "samples", list[int]()

    def counted(place: Folder, entries: list[ManifestEntry]) -> Any:
        read.extend(entry.seed for entry in entries)
        return read_contents(place, entries)

    def seeds_read(made: int = 0) -> list[int]:
        assert sample(champion, str(folder), "0-9", format=name, shard_size=4, **OPTIONS).made == made
        found = sorted(read)
        read.clear()
        return found

    seeds_read(made=10)
    monkeypatch.setattr("patchloom.pipelines.sample.folder.read_contents", counted)
    everything = list(range(10))
    assert seeds_read() == everything and seeds_read() == []
    changed = folder / ("000000/000005.png" if name == "png" else "000001.zip")
    together = everything if name == "png" else [4, 5, 6, 7]  # what is verified together
    changed.touch()
    assert seeds_read() == together and seeds_read() == []
    changed.unlink()
    seeds_read(made=1 if name == "png" else 4)  # also reads the images of the contact sheet
    assert seeds_read() == together and seeds_read() == []
    (folder / ".verified").write_bytes(b"damaged")
    assert seeds_read() == everything and seeds_read() == []


@pytest.mark.parametrize("name", ["png", "webdataset", "npz"])
def test_remote_folder_equals_local_folder(
    name: str, champion: str, s3: str, pngs: Path, archives: dict[str, Path], tmp_path: Path
) -> None:
    there = f"{s3}/samples/{name}"
    for seeds in ("0-5", "0-9"):
        result = sample(champion, there, seeds, format=name, shard_size=4, **OPTIONS)
    assert (result.folder, result.made, result.contact_sheet) == (there, 4, f"{there}/contact_sheet.png")
    folder = Folder.at(there)
    found = {file: folder.read(file) for file in folder.files() if not file.startswith(".")}
    assert found == files_of(pngs if name == "png" else archives[name])
    folder.remove("000000/000003.png" if name == "png" else lines_of(archives[name])[3]["file"])
    assert sample(champion, there, "0-9", format=name, shard_size=4, **OPTIONS).made == (1 if name == "png" else 4)
    assert sample(champion, there, "0-9", format=name, shard_size=4, **OPTIONS).made == 0
    with pytest.raises(UserError, match=r"steps.*2.*3"):
        sample(champion, there, "0-9", format=name, shard_size=4, **OPTIONS | {"steps": 3})


def test_error_names_the_options_that_differ(champion: str, archives: dict[str, Path], trained: Path) -> None:
    folder = str(archives["zip"])
    with pytest.raises(UserError, match=r"shard_size.*4.*5"):
        sample(champion, folder, "0-9", format="zip", shard_size=5, **OPTIONS)
    with pytest.raises(UserError, match=r"format.*zip.*png.*shard_size.*4"):
        sample(champion, folder, "0-9", **OPTIONS)
    with pytest.raises(UserError, match=r"labels.*balanced.*fixed.*label.*1"):
        sample(champion, folder, "0-9", format="zip", shard_size=4, label="coffee", **OPTIONS)
    by_path = sample(str(trained / "model"), folder, "0-9", format="zip", shard_size=4, **OPTIONS)
    assert by_path.made == 0  # the same weights under another name


@pytest.fixture
def label_files(tmp_path: Path) -> dict[str, Path]:
    """Files with the classes of seeds 0 to 3 (coffee, chelsea, none, coffee) in four formats."""
    classes = ["coffee", "chelsea", "", "coffee"]
    with (tmp_path / "labels.csv").open("w") as file:
        csv.writer(file).writerows([["seed", "label"], *enumerate(classes)])
    rows = [{"seed": seed, "label": {"coffee": 1, "chelsea": 0, "": -1}[name]} for seed, name in enumerate(classes)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pyarrow.table({"label": [1, 0, None, 1], "seed": [0, 1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "labels.parquet")
    (tmp_path / "labels.txt").write_text("\n".join(classes) + "\n")
    return {path.suffix: path for path in tmp_path.glob("labels.*")}


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet", ".txt"])
def test_classes_from_a_file(ending: str, champion: str, label_files: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    sample(champion, str(folder), "0-3", labels=str(label_files[ending]), **OPTIONS)
    assert [line["label"] for line in lines_of(folder)] == [1, 0, -1, 1]
    manifest = str(folder / "manifest.jsonl")  # a manifest is a file of labels too
    sample(champion, str(tmp_path / "again"), "0-3", labels=manifest, **OPTIONS)
    assert files_of(tmp_path / "again") == files_of(folder)


def test_invalid_files_of_classes_are_an_error(champion: str, label_files: dict[str, Path], tmp_path: Path) -> None:
    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=words):
            sample(champion, str(tmp_path / "samples"), **{"seeds": "0-3", **OPTIONS, **changes})

    labels = str(label_files[".txt"])
    refused(r"16 .*\(4, 5, 6, 7, 8, \.\.\.\)", seeds="0-19", labels=labels)
    refused(r"--label coffee.*--labels", labels=labels, label="coffee")
    refused("none.csv", labels=str(tmp_path / "none.csv"))
    label_files[".txt"].write_text("coffee\ntea\n\ncoffee\n")
    refused(r"tea.*chelsea, coffee", labels=labels)
    (tmp_path / "odd.csv").write_text("when,label\n1,2\n")
    refused(r"odd\.csv", labels=str(tmp_path / "odd.csv"))
    label_files[".txt"].write_text("coffee\n1\n-1\ncoffee\n")
    sample(champion, str(tmp_path / "samples"), "0-1", labels=labels, **OPTIONS)
    label_files[".txt"].write_text("chelsea\n1\n-1\ncoffee\n")
    refused(r"seed 0 .*class 1.*0", labels=labels)
