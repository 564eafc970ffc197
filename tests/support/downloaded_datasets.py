"""Well-known datasets in miniature, in the layouts in which they are downloaded, with pixels of their own."""

import gzip
import hashlib
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sources_on_disk import write_files, write_tar, write_zip

DRAWS = np.random.default_rng(7)
CIFAR_CLASSES = ["airplane", "automobile", "bird"]
CIFAR_PIXELS = DRAWS.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)  # four in each of three batches
CIFAR_LABELS = [2, 0, 1, 1, 0, 2, 2, 0, 1, 0, 0, 1]
CIFAR_BATCHES = ["data_batch_1", "data_batch_2", "test_batch"]
DIGITS = DRAWS.integers(0, 256, (7, 28, 28), dtype=np.uint8)
DIGIT_LABELS = [5, 0, 4, 1, 9, 2, 1]
SYNSETS = {"n01440764": 2, "n01443537": 3, "n02105855": 1}  # with their numbers of images


def photo(number: int, kind: str = "png", **options: Any) -> bytes:
    """An encoded image of one colour per number."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), number % 256, np.uint8)).save(file, kind, **options)
    return file.getvalue()


def python_2_pickle(value: Any) -> bytes:
    """A pickle as Python 2 writes it with protocol 2, in which CIFAR was made: texts are bytes without an encoding."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<I", len(value))) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list | tuple):
        start, end = (b"](", b"e") if isinstance(value, list) else (b"(", b"t")
        return start + b"".join(map(_opcodes, value)) + end
    if isinstance(value, dict):
        return b"}(" + b"".join(_opcodes(key) + _opcodes(entry) for key, entry in value.items()) + b"u"
    kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return start + b"(K\x01" + _opcodes(value.shape) + kind + b"\x89" + _opcodes(value.tobytes()) + b"tb"


def cifar_dictionary(batch: int, labels: str = "labels") -> dict[bytes, Any]:
    """The dictionary of one batch."""
    rows = slice(4 * batch, 4 * batch + 4)
    return {
        b"batch_label": b"a batch", labels.encode(): CIFAR_LABELS[rows], b"data": CIFAR_PIXELS[rows].reshape(4, -1),
        b"filenames": [b"x_s_%06d.png" % row for row in range(4)],
    }  # fmt: skip


def cifar_python(here: Path, pickled: Any = python_2_pickle) -> Path:
    """`cifar-10-python.tar.gz`."""
    folder = "cifar-10-batches-py"
    members = [(f"{folder}/{name}", pickled(cifar_dictionary(batch))) for batch, name in enumerate(CIFAR_BATCHES)]
    members += [(f"{folder}/readme.html", b"<html>")]
    members += [(f"{folder}/batches.meta", pickled({b"label_names": [name.encode() for name in CIFAR_CLASSES]}))]
    return write_tar(here / "cifar-10-python.tar.gz", members[::-1], "w:gz")


def cifar_binary(here: Path) -> Path:
    """`cifar-10-binary.tar.gz`."""
    records = [bytes([label]) + pixels.tobytes() for label, pixels in zip(CIFAR_LABELS, CIFAR_PIXELS, strict=True)]
    folder = "cifar-10-batches-bin"
    members = [
        (f"{folder}/{name}.bin", b"".join(records[4 * batch : 4 * batch + 4]))
        for batch, name in enumerate(CIFAR_BATCHES)
    ]
    members += [(f"{folder}/batches.meta.txt", "\n".join(CIFAR_CLASSES).encode() + b"\n\n")]
    return write_tar(here / "cifar-10-binary.tar.gz", members, "w:gz")


def cifar_100(here: Path) -> Path:
    """`cifar-100-python.tar.gz`, whose batches have coarse labels too."""
    members = []
    for batch, name in enumerate(["train", "test"]):
        entries = cifar_dictionary(batch, "fine_labels") | {b"coarse_labels": [0, 0, 0, 0]}
        members.append((f"cifar-100-python/{name}", python_2_pickle(entries)))
    names = {b"coarse_label_names": [b"x"], b"fine_label_names": [name.encode() for name in CIFAR_CLASSES]}
    members.append(("cifar-100-python/meta", python_2_pickle(names)))
    return write_tar(here / "cifar-100-python.tar.gz", members, "w:gz")


def cifar_100_binary(here: Path) -> Path:
    """`cifar-100-binary.tar.gz`, whose records have a coarse label first."""
    members = [("cifar-100-binary/fine_label_names.txt", "\n".join(CIFAR_CLASSES).encode())]
    for batch, name in enumerate(["train", "test"]):
        rows = range(4 * batch, 4 * batch + 4)
        content = b"".join(bytes([9, CIFAR_LABELS[row]]) + CIFAR_PIXELS[row].tobytes() for row in rows)
        members.append((f"cifar-100-binary/{name}.bin", content))
    return write_tar(here / "cifar-100-binary.tar.gz", members, "w:gz")


def idx(values: np.ndarray) -> bytes:
    """An idx file of unsigned bytes."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def mnist(here: Path, ending: str = ".gz") -> Path:
    """MNIST's four files: five digits to train with, and two to test with."""
    pack = gzip.compress if ending else bytes
    labels = np.array(DIGIT_LABELS, np.uint8)
    for name, rows in (("train", slice(0, 5)), ("t10k", slice(5, 7))):
        (here / f"{name}-images-idx3-ubyte{ending}").write_bytes(pack(idx(DIGITS[rows])))
        (here / f"{name}-labels-idx1-ubyte{ending}").write_bytes(pack(idx(labels[rows])))
    return here


def lsun_keys(count: int) -> list[bytes]:
    """The keys of an LMDB of LSUN, in its order."""
    return sorted(hashlib.sha1(b"%d" % number).hexdigest().encode() for number in range(count))


def lsun(here: Path, name: str = "bedroom_train_lmdb", count: int = 5) -> Path:
    """A folder of an LMDB, with WebP images as its values."""
    import lmdb

    (here / name).mkdir(parents=True)
    with lmdb.open(str(here / name), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        for number, key in enumerate(lsun_keys(count)):
            transaction.put(key, photo(number, "webp", lossless=True))
    return here / name


def lsun_zip(here: Path) -> Path:
    """The zip in which LSUN's LMDB is downloaded."""
    folder = lsun(here / "unzipped")
    with zipfile.ZipFile(here / "bedroom_train_lmdb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("data.mdb", "lock.mdb"):
            archive.write(folder / name, f"{folder.name}/{name}")
    return here / "bedroom_train_lmdb.zip"


def imagenet(here: Path) -> Path:
    """`ILSVRC2012_img_train.tar`: a tar of one tar per synset."""
    members = []
    for number, (synset, count) in enumerate(SYNSETS.items()):
        images = [(f"{synset}_{row}.JPEG", photo(10 * number + row)) for row in range(count)]
        members.append((f"{synset}.tar", write_tar(here / "inner.tar", images).read_bytes()))
    (here / "inner.tar").unlink()
    return write_tar(here / "ILSVRC2012_img_train.tar", members)


def celeba(here: Path) -> Path:
    """`img_align_celeba.zip`: one folder of faces."""
    members = [("img_align_celeba/", b""), *((f"img_align_celeba/{row:06d}.jpg", photo(row)) for row in range(1, 5))]
    return write_zip(here / "img_align_celeba.zip", members)


def ffhq(here: Path) -> Path:
    """FFHQ: folders of a thousand images each."""
    names = [f"images1024x1024/{row // 2 * 1000:05d}/{row:05d}.png" for row in range(6)]
    return write_files(here / "ffhq", {name: photo(row) for row, name in enumerate(names)} | {"LICENSE.txt": b"x"})


def afhq(here: Path) -> Path:
    """AFHQv2: splits of class folders."""
    names = [f"{split}/{kind}/{row}.png" for split in ("train", "test") for kind in ("cat", "dog", "wild")
             for row in range(1 + (split == "train"))]  # fmt: skip
    return write_files(here / "afhq", {name: photo(row) for row, name in enumerate(names)})


def python_3_pickle(protocol: int) -> Any:
    """Pickles as Python 3 does."""
    return lambda value: pickle.dumps(value, protocol)
