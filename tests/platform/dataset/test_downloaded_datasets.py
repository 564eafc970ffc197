"""Datasets of the field as they are downloaded: counts, classes and pixels are those that went in."""

import gzip
import io
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import fsspec
import numpy as np
import pytest
from downloaded_datasets import (
    CIFAR_BATCHES,
    CIFAR_CLASSES,
    CIFAR_LABELS,
    CIFAR_PIXELS,
    DIGIT_LABELS,
    DIGITS,
    SYNSETS,
    afhq,
    celeba,
    cifar_100,
    cifar_100_binary,
    cifar_binary,
    cifar_dictionary,
    cifar_python,
    ffhq,
    idx,
    imagenet,
    lsun,
    lsun_keys,
    lsun_zip,
    mnist,
    photo,
    python_2_pickle,
    python_3_pickle,
)
from helpers import run_python
from PIL import Image
from sources_on_disk import write_files, write_tar, write_zip

from patchloom.errors import UserError
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.prepare.images import decode
from patchloom.platform.dataset.readers import SourceReader
from patchloom.platform.dataset.sources import Source, open_source
from patchloom.platform.files.pickled import read_pickled


def pixels_of(source: Source) -> list[np.ndarray]:
    reader = SourceReader(source.kind, source.address)
    return [np.asarray(decode(reader.read(one.place))) for one in source.inputs]


def classes_of(source: Source) -> list[str | None]:
    return [source.class_names[one.label] if one.label >= 0 else None for one in source.inputs]


def keys_of(source: Source) -> list[str]:
    return [one.key for one in source.inputs]


CIFAR_KEYS = [f"{name}/{row:05d}" for name in CIFAR_BATCHES for row in range(4)]
COLOURS = CIFAR_PIXELS.transpose(0, 2, 3, 1)
GREY = np.repeat(DIGITS[..., None], 3, 3)
MNIST_ORDER = [5, 6, 0, 1, 2, 3, 4]  # t10k, then train
MNIST_KEYS = ["t10k/0", "t10k/1", *(f"train/{row}" for row in range(5))]
SYNSET_NAMES = [name for name, count in SYNSETS.items() for _ in range(count)]
SYNSET_COLOURS = [10 * number + row for number, count in enumerate(SYNSETS.values()) for row in range(count)]
SYNSET_ROWS = [row for count in SYNSETS.values() for row in range(count)]
SYNSET_KEYS = [f"{name}/{name}_{row}.JPEG" for name, row in zip(SYNSET_NAMES, SYNSET_ROWS, strict=True)]
LSUN_KEYS = [key.decode() for key in lsun_keys(5)]
CIFAR = (CIFAR_KEYS, [CIFAR_CLASSES[label] for label in CIFAR_LABELS], COLOURS)
OF_CIFAR_100 = [4, 5, 6, 7, 0, 1, 2, 3]  # test, then train
CIFAR_100 = (
    [f"{name}/{row:05d}" for name in ("test", "train") for row in range(4)],
    [CIFAR_CLASSES[CIFAR_LABELS[row]] for row in OF_CIFAR_100],
    COLOURS[OF_CIFAR_100],
)
MNIST = (MNIST_KEYS, [str(DIGIT_LABELS[row]) for row in MNIST_ORDER], GREY[MNIST_ORDER])
LSUN = (LSUN_KEYS, [None] * 5, np.arange(5))
# each dataset with its keys, classes, and pixels or colours
DATASETS: dict[str, tuple[Callable[[Path], Path], tuple[Any, Any, Any]]] = {
    "CIFAR-10 for Python": (cifar_python, CIFAR),
    "CIFAR-10 for Python 3": (lambda here: cifar_python(here, python_3_pickle(4)), CIFAR),
    "binary CIFAR-10": (cifar_binary, CIFAR),
    "CIFAR-100 for Python": (cifar_100, CIFAR_100),
    "binary CIFAR-100": (cifar_100_binary, CIFAR_100),
    "MNIST": (mnist, MNIST),
    "unpacked MNIST": (lambda here: mnist(here, ""), MNIST),
    "LSUN": (lsun, LSUN),
    "zipped LSUN": (lsun_zip, LSUN),
    "ImageNet": (imagenet, (SYNSET_KEYS, SYNSET_NAMES, np.array(SYNSET_COLOURS))),
}


def open_whole(address: str, name: str) -> Source:
    """Open a dataset with all its splits, if it has any."""
    return open_source(address, split="all" if "CIFAR" in name or "MNIST" in name else None)


def upload(place: Path, address: str) -> str:
    """Upload a file, or all files of a folder, with other clients than ours."""
    bucket, prefix = address.split("://")[1].split("/", 1)
    for path in [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]:
        name = f"{prefix}/{path.name if place.is_file() else path.relative_to(place).as_posix()}"
        if address.startswith("s3://"):
            boto3.client("s3").put_object(Bucket=bucket, Key=name, Body=path.read_bytes())
        else:
            fsspec.filesystem("memory").pipe_file(f"/{bucket}/{name}", path.read_bytes())
    return f"{address}/{place.name}" if place.is_file() else address


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_is_read_as_it_is_downloaded_on_every_file_system(name: str, tmp_path: Path, s3: str) -> None:
    write, (keys, classes, pixels) = DATASETS[name]
    place = write(tmp_path)
    folder = name.replace(" ", "_")
    for address in (str(place), upload(place, f"memory://sets/{folder}"), upload(place, f"{s3}/sets/{folder}")):
        source = open_whole(address, name)
        assert keys_of(source) == keys and classes_of(source) == classes, address
        assert len(source.repeated) == 0 and source.unmatched_labels == 0
        for found, wanted in zip(pixels_of(source), pixels, strict=True):
            assert (found == wanted).all(), address


@pytest.mark.parametrize("name", DATASETS)
def test_inputs_are_read_in_any_order_by_their_place(name: str, tmp_path: Path) -> None:
    write, (_, _, pixels) = DATASETS[name]
    source = open_whole(str(write(tmp_path)), name)
    reader, places = SourceReader(source.kind, source.address), [one.place for one in source.inputs]
    reader.expect(places)
    for row in [*reversed(range(len(places))), *range(len(places)), len(places) - 1, 0]:
        assert (np.asarray(decode(reader.read(places[row]))) == pixels[row]).all()


def test_a_prepared_dataset_has_the_rows_classes_and_bytes_of_the_download(tmp_path: Path) -> None:
    options: dict[str, Any] = {"resolution": 32, "crop": "none", "split": "all", "workers": 0, "shard_rows": 3}
    found = [
        prepare(str(write(tmp_path)), str(tmp_path / f"{number}"), **options)
        for number, write in enumerate((cifar_python, cifar_binary))
    ]
    for dataset in found:
        rows = dataset.rows(range(len(dataset)))
        assert np.array_equal(rows["image"], CIFAR_PIXELS) and rows["label"].tolist() == CIFAR_LABELS
        counts = Counter(CIFAR_CLASSES[label] for label in CIFAR_LABELS)
        assert {one.name: one.rows for one in dataset.card.classes} == counts
        assert dataset.card.mean == pytest.approx(CIFAR_PIXELS.mean((0, 2, 3)), rel=1e-12)
    assert [shard.sha256 for shard in found[0].card.shards] == [shard.sha256 for shard in found[1].card.shards]


@pytest.mark.parametrize("dump", [python_2_pickle, *map(python_3_pickle, range(6))])
def test_pickled_data_is_that_of_pickle_itself(dump: Callable[[Any], bytes]) -> None:
    entries = cifar_dictionary(1)
    content = dump(entries)
    found, wanted = read_pickled(content), pickle.loads(content, encoding="bytes")
    assert found.keys() == wanted.keys()
    data = found.pop(b"data").values
    assert (
        data.dtype == np.uint8 and np.array_equal(data, wanted.pop(b"data")) and np.array_equal(data, entries[b"data"])
    )
    assert found == wanted


@pytest.mark.parametrize("kind", ["<u2", ">i4", "<f8", "|b1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_in_a_pickle_keep_their_type_and_order(kind: str, order: Any) -> None:
    values = np.array([[0, 1, 1], [1, 0, 1]], dtype=kind, order=order)
    for protocol in (2, 4, 5):
        found = read_pickled(pickle.dumps([values], protocol))[0].values
        assert found.dtype == values.dtype and np.array_equal(found, values)


RAN: list[str] = []


class Malicious:
    """Its pickle would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return RAN.append, ("ran",)


class MaliciousEval:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("print('ran')",)


def test_no_code_in_a_batch_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for thing in (Malicious(), MaliciousEval(), print, [np.random.default_rng], np.array([Malicious()])):
        batch = pickle.dumps(cifar_dictionary(0) | {b"extra": thing}, 4)
        path = write_tar(tmp_path / "cifar.tar.gz", [("c/data_batch_1", batch)], "w:gz")
        with pytest.raises(UserError, match=r"cifar\.tar\.gz: c/data_batch_1"):
            open_source(str(path))
        (tmp_path / "cifar.tar.gz").unlink()
    assert not RAN and not capsys.readouterr().out


@pytest.mark.parametrize(
    "entries",
    [[], {b"data": b"x"}, {b"data": COLOURS[:4]}, {b"data": np.zeros((4, 3072), np.float32)},
     cifar_dictionary(0) | {b"labels": [0]}, cifar_dictionary(0) | {b"labels": 3},
     cifar_dictionary(0) | {b"labels": [1.5] * 4}, cifar_dictionary(0) | {b"labels": [2**70] * 4}],
)  # fmt: skip
def test_a_batch_of_something_else_is_refused(entries: Any, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "cifar.tar", [("c/data_batch_1", pickle.dumps(entries, 4))])
    with pytest.raises(UserError):
        open_source(str(path))


def test_unpacked_cifar_is_the_archive(tmp_path: Path) -> None:
    import tarfile

    for number, write in enumerate((cifar_python, cifar_binary, cifar_100, cifar_100_binary)):
        archive = write(tmp_path)
        wanted = open_source(str(archive))
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path / str(number), filter="data")
        for place in (tmp_path / str(number), next((tmp_path / str(number)).iterdir())):
            source = open_source(str(place))
            assert (keys_of(source), classes_of(source)) == (keys_of(wanted), classes_of(wanted))
            assert np.array_equal(pixels_of(source), pixels_of(wanted))


def test_one_idx_file_is_read_alone(tmp_path: Path) -> None:
    mnist(tmp_path)
    source = open_source(str(tmp_path / "train-images-idx3-ubyte.gz"))
    assert keys_of(source) == list("01234") and classes_of(source) == [str(label) for label in DIGIT_LABELS[:5]]
    assert np.array_equal(pixels_of(source), GREY[:5]) and len(source.class_names) == 10
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    assert classes_of(open_source(str(tmp_path / "train-images-idx3-ubyte.gz"))) == [None] * 5


def test_packed_and_unpacked_idx_files_are_read_once(tmp_path: Path) -> None:
    mnist(mnist(tmp_path), "")
    assert keys_of(open_source(str(tmp_path), split="all")) == MNIST_KEYS


GOOD_IDX = idx(DIGITS[:2])


@pytest.mark.parametrize(
    "content",
    [b"", GOOD_IDX[:10], GOOD_IDX[:-1], GOOD_IDX + b"0", b"\0\0\x09" + GOOD_IDX[3:],
     idx(np.zeros((0, 28, 28), np.uint8)), idx(np.zeros((2, 28), np.uint8)),
     GOOD_IDX[:4] + b"\xff" * 12 + GOOD_IDX[16:]],
)  # fmt: skip
def test_damaged_idx_files_are_refused(content: bytes, tmp_path: Path) -> None:
    for name, written in (("a-images-idx3-ubyte", content), ("b-images-idx3-ubyte.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(written)
        with pytest.raises(UserError, match=name):
            open_source(str(tmp_path / name))


def test_idx_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(GOOD_IDX)
    for labels in (idx(np.zeros(3, np.uint8)), b"", GOOD_IDX):
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
        with pytest.raises(UserError, match="train-labels"):
            open_source(str(tmp_path))


def test_several_lmdbs_have_their_categories_as_classes(tmp_path: Path) -> None:
    lsun(tmp_path, "bedroom_train_lmdb", 3)
    lsun(tmp_path, "bedroom_val_lmdb", 1)
    lsun(tmp_path, "church_outdoor_train_lmdb", 2)
    source = open_source(str(tmp_path))
    assert Counter(classes_of(source)) == {"bedroom": 4, "church_outdoor": 2}
    assert len(pixels_of(source)) == 6 and len(set(keys_of(source))) == 6


def test_values_of_an_lmdb_that_are_no_images_are_skipped(tmp_path: Path) -> None:
    import lmdb

    place = lsun(tmp_path)
    with lmdb.open(str(place)) as database, database.begin(write=True) as transaction:
        transaction.put(b"\xff\x00", b"")
        transaction.put(b"length", b"5")
    dataset = prepare(str(place), str(tmp_path / "prepared"), resolution=4, workers=0)
    assert (dataset.card.rows, dataset.card.skipped.count, dataset.card.inputs) == (5, 2, 7)


def test_an_incomplete_lmdb_is_refused(tmp_path: Path) -> None:
    content = (lsun(tmp_path, count=300) / "data.mdb").read_bytes()
    for size in (0, 5000, len(content) // 2, len(content) - 4096):
        write_files(tmp_path / "short", {f"{size}/data.mdb": content[:size]})
    done = run_python(f"""
from pathlib import Path
from patchloom.errors import UserError
from patchloom.platform.dataset.sources import open_source
for path in Path({str(tmp_path / "short")!r}).iterdir():
    try:
        open_source(str(path))
    except UserError as error:
        print("refused", str(path) in str(error))
""")
    assert done.returncode == 0, done.stderr  # reading beyond the end of the file ends a process by a signal
    assert done.stdout.split() == ["refused", "True"] * 4


def test_without_the_package_of_lmdb_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    place = lsun(tmp_path)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match=r"patchloom\[lmdb\]"):
        open_source(str(place))


def test_damaged_inner_tars_are_named(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "inner.tar", [("a.JPEG", photo(1)), ("b.JPEG", photo(2))]).read_bytes()
    for content in (b"", inner[:1500], inner[:1024] + bytes([255]) + inner[1025:]):
        path = write_tar(tmp_path / "outer.tar", [("n01.tar", inner), ("n02.tar", content)])
        with pytest.raises(UserError, match=r"outer\.tar: n02\.tar"):
            open_source(str(path))


def test_hard_links_in_inner_tars_are_their_target(tmp_path: Path) -> None:
    import tarfile

    path = write_tar(tmp_path / "inner.tar", [("a.JPEG", photo(1))])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("b.JPEG")
        link.type, link.linkname = tarfile.LNKTYPE, "a.JPEG"
        archive.addfile(link)
    outer = write_tar(tmp_path / "outer.tar", [("x.png", photo(9)), ("n01.tar", path.read_bytes())])
    source = open_source(str(outer))
    assert keys_of(source) == ["x.png", "n01/a.JPEG", "n01/b.JPEG"]
    assert [found[0, 0, 0] for found in pixels_of(source)] == [9, 1, 1]


# which splits are read


def afhq_tar(here: Path) -> Path:
    """AFHQ in a tar, below a folder around everything."""
    folder = afhq(here)
    files = [(f"afhq/{path.relative_to(folder)}", path.read_bytes()) for path in sorted(folder.rglob("*.png"))]
    return write_tar(here / "afhq.tar", files)


def coco(here: Path) -> Path:
    """COCO's splits, whose names have a year."""
    names = {"train2017": 4, "val2014": 1, "val2017": 2, "test2017": 3}
    return write_files(
        here / "coco", {f"{name}/{row}.png": photo(row) for name, rows in names.items() for row in range(rows)}
    )


def emnist(here: Path) -> Path:
    """EMNIST, whose files have a variant in their names."""
    for name in ("train", "test"):
        rows = DIGITS[:5] if name == "train" else DIGITS[5:]
        (here / f"emnist-letters-{name}-images-idx3-ubyte").write_bytes(idx(rows))
    return here


# each dataset with the number of images in each split, and the split that is read if none is chosen
SPLIT_COUNTS: dict[str, tuple[Callable[[Path], Path], dict[str, int], str]] = {
    "CIFAR-10 for Python": (cifar_python, {"train": 8, "test": 4}, "train"),
    "binary CIFAR-10": (cifar_binary, {"train": 8, "test": 4}, "train"),
    "CIFAR-100 for Python": (cifar_100, {"train": 4, "test": 4}, "train"),
    "binary CIFAR-100": (cifar_100_binary, {"train": 4, "test": 4}, "train"),
    "MNIST": (mnist, {"train": 5, "test": 2}, "train"),
    "EMNIST": (emnist, {"train": 5, "test": 2}, "train"),
    "AFHQ": (afhq, {"train": 6, "test": 3}, "all"),
    "AFHQ in a tar": (afhq_tar, {"train": 6, "test": 3}, "all"),
    "COCO": (coco, {"train": 4, "val": 3, "test": 3}, "all"),
}


@pytest.mark.parametrize("name", SPLIT_COUNTS)
def test_each_input_is_in_one_split(name: str, tmp_path: Path) -> None:
    write, counts, default = SPLIT_COUNTS[name]
    place = str(write(tmp_path))
    found = {split: open_source(place, split=split) for split in (*counts, "all")}
    assert {split: len(source.inputs) for split, source in found.items()} == counts | {"all": sum(counts.values())}
    whole = found["all"]
    chosen = {one.key: one for split in counts for one in found[split].inputs}
    assert [chosen[one.key] for one in whole.inputs] == list(whole.inputs)
    assert all(source.class_names == whole.class_names for source in found.values())
    for split in counts:
        keys = keys_of(found[split])
        assert keys == [key for key in keys_of(whole) if key in set(keys)]
    assert list(open_source(place).inputs) == list(found[default].inputs)


def test_splits_of_cifar_are_its_batches(tmp_path: Path) -> None:
    place = str(cifar_python(tmp_path))
    assert keys_of(open_source(place, split="test")) == CIFAR_KEYS[8:]
    assert np.array_equal(pixels_of(open_source(place)), COLOURS[:8])


def test_the_note_counts_what_is_left_out(tmp_path: Path) -> None:
    notes = " ".join(open_source(str(cifar_python(tmp_path))).notes)
    assert all(word in notes for word in ("train", "4", "test", "--split all"))
    assert "--split all" not in " ".join(open_source(str(afhq(tmp_path))).notes)


def test_a_source_with_only_one_split_is_read(tmp_path: Path) -> None:
    batch = python_2_pickle(cifar_dictionary(2))
    folder = write_files(tmp_path / "cifar", {"test_batch": batch})
    assert len(open_source(str(folder)).inputs) == len(open_source(str(folder), split="test").inputs) == 4
    mnist(tmp_path)
    for name, rows in (("train", 5), ("t10k", 2)):
        assert len(open_source(str(tmp_path / f"{name}-images-idx3-ubyte.gz")).inputs) == rows


def test_images_outside_of_splits_are_read_with_all_of_them(tmp_path: Path) -> None:
    names = ("train/1.png", "train/2.png", "testing/1.png", "1.png")
    place = str(write_files(tmp_path / "a", {name: photo(1) for name in names}))
    assert len(open_source(place).inputs) == 4
    assert keys_of(open_source(place, split="test")) == ["testing/1.png"]
    digits = ("train", "t10k", "extra")
    write_files(tmp_path / "b", {f"{name}-images-idx3-ubyte": idx(DIGITS[:2]) for name in digits})
    assert Counter(key.split("/")[0] for key in keys_of(open_source(str(tmp_path / "b")))) == {"train": 2}
    assert len(open_source(str(tmp_path / "b"), split="all").inputs) == 6


def test_duplicate_keys_are_found_in_their_split(tmp_path: Path) -> None:
    names = ["train/a.png", "test/b.png", "train/c.png", "test/d.png", "test/b.png"]
    place = str(write_tar(tmp_path / "a.tar", [(name, photo(1)) for name in names]))
    found = {split: open_source(place, split=split).repeated.tolist() for split in ("train", "test", "all")}
    assert found == {"train": [], "test": [2], "all": [4]}


def test_labels_of_other_splits_have_inputs(tmp_path: Path) -> None:
    place = afhq(tmp_path)
    keys = [path.relative_to(place).as_posix() for path in sorted(place.rglob("*.png"))]
    (place / "labels.csv").write_text("key,label\n" + "".join(f"{key},{row % 2}\n" for row, key in enumerate(keys)))
    source = open_source(str(place), split="test")
    assert classes_of(source) == ["0", "1", "0"] and source.unmatched_labels == 0


@pytest.mark.parametrize("split", ["training", "t10k", "", "val", "train"])
def test_splits_that_a_source_does_not_have_are_refused(split: str, tmp_path: Path) -> None:
    places = [write_files(tmp_path / "flat", {"a.png": photo(1)}), lsun(tmp_path)]
    places += [write_files(tmp_path / "classes", {f"{name}/1.png": photo(1) for name in ("train", "bus")})]
    if split != "train":
        places += [cifar_python(tmp_path), afhq(tmp_path)]
    for place in places:
        with pytest.raises(UserError, match=f"--split {split}"):
            open_source(str(place), split=split)


def test_prepare_counts_the_rows_of_a_split(tmp_path: Path) -> None:
    source = str(afhq(tmp_path))
    found = {
        split: prepare(source, str(tmp_path / f"{split}"), resolution=4, workers=0, split=split)
        for split in (None, "all", "train", "test")
    }
    assert {split: len(dataset) for split, dataset in found.items()} == {None: 9, "all": 9, "train": 6, "test": 3}
    assert {one.name: one.rows for one in found["test"].card.classes} == {"cat": 1, "dog": 1, "wild": 1}
    assert found["all"].card == found[None].card
    for split in ("train", None):
        with pytest.raises(UserError, match="another dataset"):
            prepare(source, str(tmp_path / "test"), resolution=4, workers=0, split=split)
    with pytest.raises(UserError, match="prepared dataset"):
        prepare(str(tmp_path / "test"), str(tmp_path / "again"), split="test", autoencoder="none")


# which folder is the class


def test_one_folder_around_everything_is_no_class(tmp_path: Path) -> None:
    source = open_source(str(celeba(tmp_path)))
    assert classes_of(source) == [None] * 4 and source.class_names == []
    assert open_source(str(tmp_path / "img_align_celeba.zip"), classes="first").class_names == ["img_align_celeba"]
    deep = write_files(tmp_path / "deep", {f"a/b/{name}/x/1.png": photo(1) for name in ("cat", "dog")})
    assert open_source(str(deep)).class_names == ["cat", "dog"]
    assert open_source(str(deep), classes="last").class_names == ["x"]


def test_numbered_folders_of_storage_are_no_classes_and_are_reported(tmp_path: Path) -> None:
    source = open_source(str(ffhq(tmp_path)))
    assert classes_of(source) == [None] * 6 and "00000" in " ".join(source.notes)
    assert open_source(str(tmp_path / "ffhq"), classes="last").class_names == ["00000", "01000", "02000"]
    digits = write_files(tmp_path / "digits", {f"{digit}/{row}.png": b"" for digit in range(10) for row in range(2)})
    assert open_source(str(digits)).class_names == list("0123456789")
    mixed = write_files(tmp_path / "mixed", {"00000/1.png": b"", "cat/2.png": b""})
    assert open_source(str(mixed)).class_names == ["00000", "cat"]


def test_splits_are_read_together_with_the_folders_below_as_classes(tmp_path: Path) -> None:
    source = open_source(str(afhq(tmp_path)))
    assert Counter(classes_of(source)) == {"cat": 3, "dog": 3, "wild": 3}
    assert all(word in " ".join(source.notes) for word in ("train", "test", "cat", "--classes first"))
    assert Counter(classes_of(open_source(str(tmp_path / "afhq"), classes="first"))) == {"train": 6, "test": 3}
    assert set(classes_of(open_source(str(tmp_path / "afhq"), classes="none"))) == {None}
    archive = write_zip(tmp_path / "a.zip", [(f"afhq/{split}/cat/1.png", photo(1)) for split in ("train", "Val")])
    assert open_source(str(archive)).class_names == []


def test_prepare_counts_the_classes_that_were_chosen(tmp_path: Path) -> None:
    source = str(afhq(tmp_path))
    wanted = {None: {"cat": 3, "dog": 3, "wild": 3}, "first": {"test": 3, "train": 6}, "none": {}}
    for classes, counts in wanted.items():
        dataset = prepare(source, str(tmp_path / f"{classes}"), resolution=4, workers=0, classes=classes)
        assert {one.name: one.rows for one in dataset.card.classes} == counts and len(dataset) == 9
    with pytest.raises(UserError, match="prepared dataset"):
        prepare(str(tmp_path / "first"), str(tmp_path / "again"), classes="last", autoencoder="none")


def test_splits_next_to_other_folders_are_classes(tmp_path: Path) -> None:
    names = write_files(tmp_path / "a", {f"{name}/1.png": b"" for name in ("train", "bus")})
    assert open_source(str(names)).class_names == ["bus", "train"]


def test_classes_of_the_command_go_before_labels_in_the_source(tmp_path: Path) -> None:
    files = {f"{name}/{row}.png": photo(row) for name in ("a", "b") for row in range(2)}
    labels = b"key,label\n" + b"".join(b"%s,7\n" % name.encode() for name in files)
    place = write_files(tmp_path / "photos", files | {"labels.csv": labels})
    assert set(classes_of(open_source(str(place)))) == {"7"}
    assert open_source(str(place), classes="first").class_names == ["a", "b"]
    assert open_source(str(place), classes="none").class_names == []


@pytest.mark.parametrize("classes", ["second", "first", "last"])
def test_classes_that_a_source_cannot_have_are_refused(classes: str, tmp_path: Path) -> None:
    flat = write_files(tmp_path / "flat", {"a.png": photo(1)})
    (tmp_path / "digits").mkdir()
    digits = mnist(tmp_path / "digits")
    for place in (flat, digits):
        with pytest.raises(UserError, match=f"--classes {classes}"):
            open_source(str(place), classes=classes)
    with pytest.raises(UserError, match="--labels"):
        open_source(str(flat), labels="labels.csv", classes="first")
    assert open_source(str(digits), classes="none").class_names == []


def test_a_real_jpeg_in_an_inner_tar_is_decoded(tmp_path: Path) -> None:
    content = photo(77, "jpeg", quality=95)
    inner = write_tar(tmp_path / "inner.tar", [("n01_1.JPEG", content)]).read_bytes()
    source = open_source(str(write_tar(tmp_path / "outer.tar", [("n01.tar", inner)])))
    wanted = np.asarray(Image.open(io.BytesIO(content)))
    assert np.array_equal(pixels_of(source)[0], wanted)
