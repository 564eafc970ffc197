"""Captions in `prepare`: the embeddings are those of transformers, for any number of workers and any source."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from tiny_clip import CLIP_TOKENS, CLIP_WIDTH, save_tiny_clip
from transformers import CLIPTextModel, CLIPTokenizer

from patchloom.errors import UserError
from patchloom.models.autoencoder import new_autoencoder, save_autoencoder
from patchloom.models.text_encoder import TextEncoder
from patchloom.pipelines.prepare import prepare

CAPTIONS = {f"{'abc'[n % 3]}/{n:02d}.png": f"a cab of {'xyz'[n % 3] * n}" for n in range(20)}
WITHOUT = "b/10.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images, of which one has no caption, a text encoder, and an autoencoder."""
    folder, random = tmp_path_factory.mktemp("captioned"), np.random.default_rng(0)
    for name in CAPTIONS:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "images" / name)
    save_tiny_clip(folder / "base")
    given = {key: text for key, text in CAPTIONS.items() if key != WITHOUT} | {"another.png": "no image"}
    (folder / "captions.jsonl").write_text("".join(json.dumps({"key": k, "text": t}) + "\n" for k, t in given.items()))
    rows = "".join(f'{key.removesuffix(".png")},"{text}"\n' for key, text in given.items())
    (folder / "captions.csv").write_text(f"file_name,caption\n{rows}")
    table = pa.table({"path": [f"./{key}" for key in given], "prompt": list(given.values())})
    pyarrow.parquet.write_table(table, folder / "captions.parquet")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        (folder / "autoencoder").mkdir()
        save_autoencoder(new_autoencoder((8, 8), 4), folder / "autoencoder")
    return folder


def prepared(folder: Path, out: Path, captions: str = "captions.jsonl", **options: Any) -> Any:
    options = {"resolution": 16, "text_encoder": str(folder / "base"), "shard_rows": 6, "workers": 0} | options
    return prepare(str(folder / "images"), str(out), text=str(folder / captions), **options)


def wanted(folder: Path, texts: list[str]) -> np.ndarray:
    """Embeddings one by one, as the pipelines of diffusers make them."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "base", subfolder="tokenizer")
    network = CLIPTextModel.from_pretrained(folder / "base", subfolder="text_encoder").eval()
    length = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    with torch.no_grad():
        found = [network(tokenizer(text, **length, return_tensors="pt").input_ids)[0][0] for text in texts]
    return torch.stack(found).half().numpy()


def all_rows(dataset: Any) -> Any:
    return dataset.rows(range(len(dataset)))


@pytest.mark.parametrize("table", ["captions.jsonl", "captions.csv", "captions.parquet"])
def test_embeddings_are_those_of_transformers(folder: Path, tmp_path: Path, table: str) -> None:
    dataset = prepared(folder, tmp_path / "data", table)
    rows = all_rows(dataset)
    assert sorted(rows["key"]) == sorted(set(CAPTIONS) - {WITHOUT})
    assert dataset.card.skipped.reasons == {"has no text": 1}
    assert rows["text"].shape == (19, CLIP_TOKENS, CLIP_WIDTH) and rows["text"].dtype == np.float16
    np.testing.assert_allclose(rows["text"], wanted(folder, [CAPTIONS[key] for key in rows["key"]]), atol=2e-3)
    np.testing.assert_allclose(dataset.no_text(), wanted(folder, [""])[0], atol=2e-3)
    assert dataset.card.text.encoder == "base" and len(dataset.card.text.encoder_sha256) == 64
    assert not (tmp_path / "data" / ".work").exists()


def test_latents_of_workers_have_the_same_embeddings(ray_cluster: None, folder: Path, tmp_path: Path) -> None:
    options = {"autoencoder": str(folder / "autoencoder"), "condition": "edges", "mirror": True}
    latents = prepared(folder, tmp_path / "latents", workers=2, **options)
    alone = prepared(folder, tmp_path / "alone", **options)
    shards = [[shard.sha256 for shard in dataset.card.shards] for dataset in (latents, alone)]
    assert shards[0] == shards[1] and latents.card.preparation == alone.card.preparation
    rows = all_rows(latents)
    assert len(rows["key"]) == 38 and (rows["text"][::2] == rows["text"][1::2]).all()
    prepared(folder, tmp_path / "latents", **options)  # it is complete


def test_a_dataset_of_pixels_gets_captions_or_keeps_its_embeddings(folder: Path, tmp_path: Path) -> None:
    pixels = prepare(str(folder / "images"), str(tmp_path / "pixels"), resolution=16, workers=0)
    captioned = prepared(folder, tmp_path / "captioned")
    encoder = {"autoencoder": str(folder / "autoencoder"), "workers": 0}
    late = prepare(str(pixels.path), str(tmp_path / "late"), text=str(folder / "captions.csv"),
                   text_encoder=str(folder / "base"), **encoder)  # fmt: skip
    kept = prepare(str(captioned.path), str(tmp_path / "kept"), **encoder)
    for dataset in (late, kept):
        rows = all_rows(dataset)
        assert (rows["text"] == all_rows(captioned)["text"]).all() and (rows["key"] == all_rows(captioned)["key"]).all()
        assert dataset.card.text == captioned.card.text


def test_windows_have_the_caption_of_their_photograph(folder: Path, tmp_path: Path) -> None:
    windows = prepared(folder, tmp_path / "windows", resolution=8, crop="windows", short_side=16, stride=8)
    rows = all_rows(windows)
    assert len(rows["key"]) == 4 * 19
    of_photograph = wanted(folder, [CAPTIONS[key.rpartition("@")[0]] for key in rows["key"]])
    np.testing.assert_allclose(rows["text"], of_photograph, atol=2e-3)


def test_windows_have_the_embedding_of_their_photograph(folder: Path, tmp_path: Path) -> None:
    values = {key: np.full((2, 3), number + 1, np.float32) for number, key in enumerate(CAPTIONS)}
    np.savez(tmp_path / "texts.npz", no_text=np.ones((2, 3)), **values)
    windows = prepare(
        str(folder / "images"), str(tmp_path / "windows"), text=str(tmp_path / "texts.npz"), resolution=8,
        crop="windows", short_side=16, stride=8, workers=0, autoencoder=str(folder / "autoencoder"),
    )  # fmt: skip
    rows = all_rows(windows)
    assert len(rows["key"]) == 4 * 20
    assert all(
        (text == values[key.rpartition("@")[0]]).all() for key, text in zip(rows["key"], rows["text"], strict=True)
    )


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off"])
def test_damaged_file_of_embeddings_is_refused(content: bytes, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"texts\.npz"):
        prepare(
            str(folder / "images"), str(tmp_path / "out"), text=str(tmp_path / "texts.npz"), resolution=16, workers=0
        )


def test_an_unfinished_preparation_continues_only_with_the_same_texts(folder: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from patchloom.pipelines.prepare import prepare, shard_maker as s\n"
        "call = s.ShardMaker.__call__\n"
        "def dying(self, shard, report): return call(self, shard, report) if shard.number < 2 else os._exit(9)\n"
        "s.ShardMaker.__call__ = dying\n"
        "prepare(sys.argv[1] + '/images', sys.argv[2], text=sys.argv[1] + '/captions.jsonl', resolution=16,\n"
        "        text_encoder=sys.argv[1] + '/base', shard_rows=6, workers=0)"
    )
    out = tmp_path / "data"
    assert subprocess.run([sys.executable, "-c", code, str(folder), str(out)], capture_output=True).returncode == 9
    (folder / "other.csv").write_text("key,text\na/00,other\n")
    save_tiny_clip(tmp_path / "base", seed=1)
    for change in ({"captions": "other.csv"}, {"text_encoder": str(tmp_path / "base")}):
        with pytest.raises(UserError):
            prepared(folder, out, **change)
    finished, whole = prepared(folder, out), prepared(folder, tmp_path / "whole")
    assert finished.card == whole.card


def test_texts_without_an_encoder_and_damaged_encoders_are_refused(folder: Path, tmp_path: Path) -> None:
    for change in ({"text_encoder": None}, {"captions": "missing.csv"}, {"text_encoder": str(folder / "images")}):
        with pytest.raises(UserError):
            prepared(folder, tmp_path / "data", **change)
    (folder / "wrong.csv").write_text("name,length\na,3\n")
    with pytest.raises(UserError, match=r"wrong\.csv"):
        prepared(folder, tmp_path / "data", "wrong.csv")
    with pytest.raises(UserError, match="--text"):
        prepare(str(folder / "images"), str(tmp_path / "data"), resolution=16, text_encoder=str(folder / "base"))
    from safetensors.torch import load_file, save_file

    cut = save_tiny_clip(tmp_path / "cut") / "text_encoder" / "model.safetensors"
    tensors = load_file(cut)
    del tensors[next(name for name in tensors if "final_layer_norm" in name)]
    save_file(tensors, cut, {"format": "pt"})
    with pytest.raises(UserError, match="final_layer_norm"):
        prepared(folder, tmp_path / "data", text_encoder=str(tmp_path / "cut"))
    assert not (tmp_path / "data" / "dataset.json").exists()


def test_the_number_of_texts_does_not_change_an_embedding(folder: Path) -> None:
    encoder, texts = TextEncoder(folder / "base"), [CAPTIONS[key] for key in sorted(CAPTIONS)]
    together = encoder.encode(texts)
    assert all((encoder.encode([text])[0] == one).all() for text, one in zip(texts, together, strict=True))
    assert len(encoder.encode([])) == 0


def test_the_package_transformers_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"patchloom\[text\]"):
        TextEncoder(folder / "base")
