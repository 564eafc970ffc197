"""Fuzzing: damaged inputs of every parser, made from good ones by a seeded mutator, read in bounded memory and time.

`python fuzzing.py COUNT FOLDER MEBIBYTES PARSER...` prints what each parser raised that is no error of Patchloom.
"""

import gzip
import hashlib
import io
import json
import pickle
import random
import re
import resource
import signal
import sys
import tarfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from downloaded_datasets import idx, python_2_pickle
from PIL import Image

from patchloom.errors import Error
from patchloom.models.cards import DenoiserConfig, ModelCard
from patchloom.models.checkpoints import load_edm_snapshot, load_model, save_model, stored_shapes
from patchloom.models.denoiser import build_denoiser
from patchloom.models.normalisation import pixel_normalisation
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.prepare.images import decode, size_of
from patchloom.pipelines.serve.requests import RefusedRequest, ServerLimits, checked_request
from patchloom.platform.dataset.label_files import read_labels
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.dataset.readers import SourceReader
from patchloom.platform.dataset.sources import open_source
from patchloom.platform.recipe.run_recipe import load_recipe
from patchloom.platform.recipe.search import load_search
from patchloom.platform.records.samples import ManifestEntry, SamplingCard

SECONDS_PER_INPUT = 20
STRANGE_NUMBERS = [b"-1", b"0", b"99999999999", b"1e999", b"1e-9", b"9" * 400, b"null", b'"x"', b"[[]]", b"{}", b"NaN"]
STRANGE_BYTES = [b"\0", b"\xff", b"\xff\xff\xff\xff", b"../", b"\n", b'"', b"[" * 2000, b"{", b"}", b"\x80", b"(", b"."]

Parse = Callable[[bytes], object]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The content with one to four changes: bits, bytes, numbers, and pieces that are removed, repeated or inserted."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        size = len(data)
        at, length = draw.randrange(size + 1), min(draw.choice((1, 2, 4, 8, 50)), size)
        kind = draw.randrange(9)
        if kind == 0 and size:
            data[min(at, size - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1 and size:
            data[min(at, size - 1)] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length] * draw.choice((1, 2, 100))
        elif kind == 5:
            data[at:at] = draw.choice(STRANGE_BYTES)
        elif kind == 6:
            data[at : at + length] = draw.choice((b"\0", b"\xff")) * length
        elif kind == 7:
            data[at : at + 8] = draw.choice((2**31, 2**32 - 1, 2**40, 2**63 - 1)).to_bytes(
                8, draw.choice(("little", "big"))
            )
        elif numbers := list(re.finditer(rb"[0-9.]+", data)):
            number = draw.choice(numbers)
            data[number.start() : number.end()] = draw.choice(STRANGE_NUMBERS)
    return bytes(data)


def pixels(side: int = 6) -> np.ndarray:
    """A small image."""
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def image(kind: str) -> bytes:
    """A small image file."""
    file = io.BytesIO()
    Image.fromarray(pixels()).save(file, kind)
    return file.getvalue()


def files_of(name: str) -> list[bytes]:
    """Good sources of a format."""
    table = pa.table({"image": [image("PNG")] * 3, "label": [0, 1, 2]})
    file = io.BytesIO()
    if name == "zip":
        import zipfile

        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/1.png", image("PNG"))
            archive.writestr("dataset.json", '{"labels": [["a/1.png", 3]]}')
    elif name == "tar":
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for member, content in (("é" * 60 + ".png", image("PNG")), ("b.png", image("PNG")), ("b.cls", b"2")):
                header = tarfile.TarInfo(member)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
            link = tarfile.TarInfo("c.png")
            link.type, link.linkname = tarfile.LNKTYPE, "b.png"
            tar.addfile(link)
    elif name == "nested.tar":
        with tarfile.open(fileobj=file, mode="w") as tar:
            for number in range(2):
                header, content = tarfile.TarInfo(f"n{number}.tar"), files_of("tar")[0][:20000]
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    elif name == "tar.gz":
        return [gzip.compress(files_of("tar")[0])]
    elif name == "parquet":
        pyarrow.parquet.write_table(table, file)
    elif name == "arrow":
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    elif name == "npz":
        np.savez_compressed(file, images=np.stack([pixels()] * 3), labels=np.arange(3))
    return [file.getvalue()]


def reads_source(folder: Path, ending: str) -> Parse:
    """Opens a source and reads its inputs."""

    def parse(content: bytes) -> None:
        path = folder / f"source.{ending}"
        path.write_bytes(content)
        read_inputs(path)

    return parse


def read_inputs(path: Path) -> None:
    """Opens a source and reads its inputs; whatever is wrong with one of them is the reason why it is skipped."""
    source = open_source(str(path))
    reader = SourceReader(source.kind, source.address)
    for one in source.inputs:
        try:
            decode(reader.read(one.place))
        except (MemoryError, RecursionError):
            raise
        except Exception:
            continue


def reads_idx(folder: Path) -> Parse:
    """Reads an idx file as images, and as the labels of good images."""
    images, labels = folder / "a-images-idx3-ubyte", folder / "a-labels-idx1-ubyte"

    def parse(content: bytes) -> None:
        labels.write_bytes(content)
        images.write_bytes(idx(np.zeros((6, 4, 4), np.uint8)))
        refused = _error_of(images)
        images.write_bytes(content)
        labels.unlink()
        refused = _error_of(images) or refused
        if refused is not None:
            raise refused

    return parse


def _error_of(source: Path) -> Error | None:
    """Reads a source; returns the error of Patchloom that it raises."""
    try:
        read_inputs(source)
    except Error as error:
        return error
    return None


def cifar_files() -> list[bytes]:
    """Batches of CIFAR: pickled by Python 2 and 3, and binary."""
    batch = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [3]}
    return [python_2_pickle(batch), *(pickle.dumps(batch, protocol) for protocol in (0, 2, 4, 5)), bytes(2 * 3073)]


def reads_cifar(folder: Path) -> Parse:
    """Reads a batch as a pickled and as a binary one."""
    paths = [folder / "pickled" / "data_batch_1", folder / "binary" / "data_batch_1.bin"]
    for path in paths:
        path.parent.mkdir()

    def parse(content: bytes) -> None:
        for path in paths:
            path.write_bytes(content)
        refused = [error for path in paths if (error := _error_of(path.parent)) is not None]
        if len(refused) == len(paths):
            raise refused[0]

    return parse


def reads_lmdb(folder: Path) -> Parse:
    """Reads an LMDB with a damaged value."""
    import lmdb

    def parse(content: bytes) -> None:
        with lmdb.open(str(folder / "lmdb"), map_size=1 << 26) as database, database.begin(write=True) as transaction:
            transaction.put(b"a", content)
        read_inputs(folder / "lmdb")

    return parse


def parse_image(content: bytes) -> None:
    """Decodes an image; whatever is wrong is the reason why it is skipped."""
    try:
        size_of(content)
        decode(content)
    except (MemoryError, RecursionError):
        raise
    except Exception:
        return


def reads_file(folder: Path, name: str, read: Callable[[str], object]) -> Parse:
    """Writes a file and reads it."""

    def parse(content: bytes) -> object:
        (folder / name).write_bytes(content)
        return read(str(folder / name))

    return parse


def model_folder(folder: Path) -> Path:
    """A small model, without the list of its files, which would refuse every change."""
    options = {"width": 8, "width_multipliers": [1, 2], "blocks": 1, "attention": [8], "dropout": 0.0}
    config = DenoiserConfig(network="song", network_options=options, resolution=16, channels=3, classes=2,
                            coordinates="linear", sigma_data=0.5)  # fmt: skip
    here = folder / "model"
    here.mkdir()
    save_model(here, build_denoiser(config), ModelCard(denoiser=config, normalisation=pixel_normalisation()))
    (here / "files.json").unlink(missing_ok=True)
    return here


def parse_weights(here: Path) -> Parse:
    """Loads a model with changed weights, whose checksum is right."""
    card = json.loads((here / "model.json").read_text())

    def parse(content: bytes) -> None:
        (here / "model.safetensors").write_bytes(content)
        (here / "model.json").write_text(json.dumps(card | {"weights_sha256": hashlib.sha256(content).hexdigest()}))
        stored_shapes(here / "model.safetensors")
        load_model(here)

    return parse


def parse_request(content: bytes) -> None:
    """Checks the body of a request."""
    config = DenoiserConfig(network="song", network_options={}, resolution=16, channels=3, classes=2,
                            coordinates="linear", sigma_data=0.5)  # fmt: skip
    card = ModelCard(denoiser=config, normalisation=pixel_normalisation(), class_names=("a", "b"), label_dropout=0.1)
    try:
        checked_request(content, card, ServerLimits(), 8)
    except RefusedRequest as refused:
        assert 400 <= refused.status < 500 and "\n" not in refused.message and len(refused.message) < 2000


def prepared(folder: Path) -> Path:
    """A small prepared dataset."""
    (folder / "photos").mkdir()
    for number in range(3):
        (folder / "photos" / f"{number}.png").write_bytes(image("PNG"))
    prepare(str(folder / "photos"), str(folder / "data"), resolution=4, workers=0)
    return folder / "data"


def parses_dataset(folder: Path, name: str) -> tuple[list[bytes], Parse]:
    """Opens a dataset with a changed file and reads its rows."""
    data = prepared(folder)
    card = json.loads((data / "dataset.json").read_text())

    def parse(content: bytes) -> None:
        (data / name).write_bytes(content)
        if name != "dataset.json":  # with the right checksum
            card["shards"][0] |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            (data / "dataset.json").write_text(json.dumps(card))
        dataset = open_dataset(str(data))
        dataset.rows(range(min(len(dataset), 3)))

    return [(data / name).read_bytes()], parse


def parse_manifest(content: bytes) -> None:
    """Reads the lines of a manifest, and a card of samples."""
    for line in content.splitlines():
        ManifestEntry.parse(line, "manifest.jsonl")
    SamplingCard.parse(content, "sampling.json")


def parser(name: str, folder: Path) -> tuple[list[bytes], Parse]:
    """Good inputs of a parser, and the parser."""
    recipes = Path(__file__).parents[2] / "tune_configs"
    if name == "image":
        return [image(kind) for kind in ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")], parse_image
    if name in ("zip", "tar", "tar.gz", "nested.tar", "parquet", "arrow", "npz"):
        return files_of(name), reads_source(folder, name)
    if name == "idx":
        return [idx(np.zeros((2, 4, 4), np.uint8)), idx(np.arange(6, dtype=np.uint8))], reads_idx(folder)
    if name == "cifar":
        return cifar_files(), reads_cifar(folder)
    if name == "lmdb":
        return [image(kind) for kind in ("WEBP", "JPEG")], reads_lmdb(folder)
    if name == "labels.json":
        return [b'{"labels": [["a.png", 1], ["b.png", 2]], "classes": ["x", "y", "z"]}'], reads_file(
            folder, name, read_labels
        )
    if name == "labels.csv":
        return [b"key,label\na.png,1\nb.png,cat\n"], reads_file(folder, name, read_labels)
    if name == "labels.jsonl":
        return [b'{"key": "a.png", "label": 1}\n{"key": "b.png", "label": 2}\n'], reads_file(folder, name, read_labels)
    if name == "recipe.yaml":
        good = [
            (recipes / f"{one}.yaml").read_bytes() for one in ("celeba64", "afhq64_cat_edm")
        ]  # without and with bases
        return good, reads_file(folder, name, load_recipe)
    if name == "search.yaml":
        return [(recipes / "demo_pixels_search.yaml").read_bytes()], reads_file(folder, name, load_search)
    if name == "model.json":
        here = model_folder(folder)
        return [(here / name).read_bytes()], reads_file(here, name, lambda path: load_model(Path(path).parent))
    if name == "safetensors":
        here = model_folder(folder)
        content = (here / "model.safetensors").read_bytes()
        return [content[: int.from_bytes(content[:8], "little") + 8 + 100]], parse_weights(here)
    if name == "pickle":
        from test_oversized_models import rebuilt, snapshot_with

        file = io.BytesIO()
        torch.save(torch.zeros(4).storage(), file, _use_new_zipfile_serialization=False)
        start = snapshot_with(rebuilt(4, 1, file.getvalue()), folder / "start.pkl").read_bytes()
        return [start], reads_file(folder, "a.pkl", load_edm_snapshot)
    if name in ("dataset.json", "shards/part-00000.arrow"):
        return parses_dataset(folder, name)
    if name == "manifest":
        return [
            b'{"seed": 3, "label": -1, "file": "000000/000003.png", "sha256": "' + b"0" * 64 + b'"}\n'
        ], parse_manifest
    assert name == "request"
    body = {"seeds": [0, 1], "labels": ["a", None], "steps": 4, "guidance": 1.5, "size": [32, 16], "sampler": "heun"}
    return [json.dumps(body).encode()], parse_request


PARSERS = (
    "image", "zip", "tar", "tar.gz", "nested.tar", "idx", "cifar", "lmdb", "parquet", "arrow", "npz",
    "labels.json", "labels.csv", "labels.jsonl",
    "recipe.yaml", "search.yaml", "model.json", "safetensors", "pickle", "dataset.json", "shards/part-00000.arrow",
    "manifest", "request",
)  # fmt: skip


class TooSlow(BaseException):
    """An input took too long."""


def _too_slow(signum: int, frame: FrameType | None) -> None:
    raise TooSlow


def failures(name: str, count: int, folder: Path, mebibytes: int) -> Iterator[str]:
    """What a parser raised that is no error of Patchloom, with the number of the input."""
    warnings.simplefilter("ignore")
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most, most))  # the limit of a parser before this one
    inputs, parse = parser(name, folder)
    for content in inputs:
        parse(content) if name not in ("safetensors", "pickle", "manifest", "idx") else None
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (mebibytes << 20), most))
    signal.signal(signal.SIGALRM, _too_slow)
    for number in range(count):
        draw = random.Random(f"{name} {number}")
        content = mutated(draw.choice(inputs), draw)
        signal.alarm(SECONDS_PER_INPUT)
        try:
            parse(content)
        except Error as error:
            if "\n" in str(error).strip() or len(str(error)) > 4000:
                yield f"{name} {number}: the message has several lines or is long: {str(error)[:300]!r}"
        except (Exception, TooSlow):
            (folder / f"failed-{number}").write_bytes(content)
            yield f"{name} {number}: {traceback.format_exc(limit=-6)}"
        finally:
            signal.alarm(0)


def main() -> Any:
    """Fuzz parsers one after the other in this process."""
    count, folder, mebibytes, all_found = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), 0
    for name in sys.argv[4:]:
        place, started, found = folder / name.replace("/", "-"), time.monotonic(), 0
        place.mkdir()
        for failure in failures(name, count, place, mebibytes):
            print(failure)
            found += 1
        print(f"{name}: {count} inputs, {found} failures, {time.monotonic() - started:.0f} s", file=sys.stderr)
        all_found += found
    return all_found > 0


if __name__ == "__main__":
    sys.exit(main())
