"""Texts of a preparation: embeddings from a file or a dataset, or captions with the encoder that embeds them."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from patchloom.errors import UserError
from patchloom.models.text_encoder import TextEncoder, text_encoder_sha256
from patchloom.pipelines.prepare.encoders import fetch_text_encoder
from patchloom.pipelines.prepare.images import photograph_key
from patchloom.pipelines.prepare.inputs import InputLines, KeptLines
from patchloom.pipelines.prepare.planning import Preparation
from patchloom.platform.dataset.captions import Captions, is_caption_table
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.dataset.texts import TextEmbeddings
from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import say
from patchloom.platform.records.prepare import PreparedInput, TextPlan, parse_inputs

KEYS_AT_ONCE = 4096  # of a dataset


def with_texts(preparation: Preparation, address: str | None, encoder: str | None = None) -> Preparation:
    """The preparation with its texts.

    Args:
        preparation: the preparation.
        address: an .npz file of embeddings, or a table of captions; None for the embeddings of the dataset that is
            encoded, if it has any.
        encoder: the text encoder, for captions.

    Raises:
        UserError: a file or the encoder cannot be used, or they do not fit together.
    """
    if address is not None and is_caption_table(address):
        if encoder is None:
            raise UserError(
                f"--text {address} has captions: add --text-encoder, such as that of the base model, or give an "
                ".npz file of embeddings"
            )
        return _with_captions(preparation, Captions(address), encoder)
    if encoder is not None:
        raise UserError(
            f"--text-encoder {encoder} encodes captions: give them with --text FILE (.csv, .tsv, .jsonl or .parquet)"
        )
    return _with_embeddings(preparation, address)


def _with_embeddings(preparation: Preparation, address: str | None) -> Preparation:
    plan = preparation.plan
    if address is not None:
        texts = TextEmbeddings(address)
        content, known = array_bytes(texts.no_text), {"sha256": texts.sha256()}
        source = Folder.at(address).address
    elif plan.source_kind == "dataset" and (card := open_dataset(plan.source).card.text) is not None:
        content, source = array_bytes(open_dataset(plan.source).no_text()), None
        known = card.model_dump(include={"encoder", "encoder_sha256"})
    else:
        return preparation
    tokens, width = np.load(io.BytesIO(content)).shape
    no_text_sha256 = hashlib.sha256(content).hexdigest()
    text = TextPlan(tokens=tokens, width=width, no_text_sha256=no_text_sha256, **known)
    return replace(preparation, plan=plan.model_copy(update={"text": text, "text_source": source}), no_text=content)


def _with_captions(preparation: Preparation, captions: Captions, reference: str) -> Preparation:
    folder, resolved = fetch_text_encoder(reference)
    encoder, digest = TextEncoder(folder), hashlib.sha256()
    inputs = KeptLines(_captioned(preparation, captions, digest.update))
    text = TextPlan(
        tokens=encoder.tokens,
        width=encoder.width,
        no_text_sha256="",
        sha256=digest.hexdigest(),
        encoder=resolved,
        encoder_sha256=text_encoder_sha256(folder),
    )
    no_text = array_bytes(encoder.encode([""])[0])
    plan = preparation.plan.model_copy(update={"text": text, "text_source": None})
    return replace(preparation, plan=plan, inputs=inputs, no_text=no_text, text_encoder=folder)


def _captioned(
    preparation: Preparation, captions: Captions, hash_caption: Callable[[bytes], None]
) -> Iterator[PreparedInput]:
    """The inputs with their captions, which are hashed on the way."""
    missing = 0
    matched = captions.matched(_keys(preparation))
    for entry, caption in zip(_parsed(preparation.inputs), matched, strict=True):
        hash_caption(json.dumps(caption).encode())
        missing += caption is None
        yield replace(entry, caption=caption)
    if missing:
        say(f"  inputs without a text in {captions.name}, which are skipped: {missing:,}")


def _parsed(lines: InputLines) -> Iterator[PreparedInput]:
    for line in lines:
        yield from parse_inputs(line, "the list of inputs")


def _keys(preparation: Preparation) -> Iterator[str]:
    """The key of each input; of a window of a photograph, that of the photograph."""
    if preparation.plan.source_kind != "dataset":
        for entry in _parsed(preparation.inputs):
            yield photograph_key(entry.key) if entry.window else entry.key
        return
    dataset = open_dataset(preparation.plan.source)
    for first in range(0, len(dataset), KEYS_AT_ONCE):
        keys = dataset.rows(range(first, min(first + KEYS_AT_ONCE, len(dataset))), ["key"])["key"]
        yield from map(photograph_key, keys) if dataset.card.split_by == "region" else keys


def array_bytes(values: np.ndarray) -> bytes:
    """An array as the content of an .npy file."""
    written = io.BytesIO()
    np.save(written, values)
    return written.getvalue()
