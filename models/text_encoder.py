"""Text encoders: texts to the embeddings that a Stable Diffusion is conditioned on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from patchloom.errors import CheckpointError, UserError
from patchloom.models.manifest import sha256_of_file

TOKENIZER, NETWORK = "tokenizer", "text_encoder"  # sub-folders, as in the layout of diffusers
NETWORK_FILES = (f"{NETWORK}/config.json", f"{NETWORK}/model.safetensors")
TOKENIZER_FILES = tuple(
    f"{TOKENIZER}/{name}"
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
)
TEXT_BATCH = 16  # fixed, and the last batch is padded, so that an embedding does not depend on the number of texts


class TextEncoder:
    """The CLIP text encoder of a Stable Diffusion 1 or 2, from safetensors only.

    Args:
        folder: a folder with `tokenizer/` and `text_encoder/`, in the layout of diffusers.
        device: device of the network.

    Raises:
        UserError: transformers is not installed.
        CheckpointError: something is missing or damaged.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
            from transformers.utils import logging
        except ImportError:
            raise UserError("text encoders need the package transformers: pip install 'patchloom[text]'") from None

        logging.disable_progress_bar()  # Patchloom shows its own
        text_encoder_files(folder)
        try:
            self._tokenizer = CLIPTokenizer.from_pretrained(folder / TOKENIZER, local_files_only=True)
            network, loaded = CLIPTextModel.from_pretrained(
                folder / NETWORK,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                dtype=torch.float32,
            )
        except Exception as error:  # of transformers, tokenizers, JSON and safetensors
            problem = " ".join(str(error).split())[:200]
            raise CheckpointError(f"the text encoder {folder} cannot be loaded ({problem}): fetch it again") from None
        if missing := sorted(loaded["missing_keys"]):  # transformers would fill them with random numbers
            raise CheckpointError(f"the text encoder {folder} has no weights {missing[0]}: give a CLIP text encoder")
        self._network, self._device = network.eval().requires_grad_(False).to(device), device
        self.tokens = min(int(self._tokenizer.model_max_length), int(network.config.max_position_embeddings))
        self.width = int(network.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """The last hidden states of texts, which are cut at `tokens`.

        Args:
            texts: n texts; an empty one is the text for no text.

        Returns:
            (n, tokens, width) float16.

        Raises:
            CheckpointError: a value is not finite in float16.
        """
        found = np.empty((len(texts), self.tokens, self.width), np.float16)
        for first in range(0, len(texts), TEXT_BATCH):
            batch = list(texts[first : first + TEXT_BATCH])
            found[first : first + len(batch)] = self._encoded(batch + [""] * (TEXT_BATCH - len(batch)))[: len(batch)]
        if not np.isfinite(found).all():
            raise CheckpointError("the text encoder gives values that are not finite in float16: give another one")
        return found

    @torch.no_grad()
    def _encoded(self, texts: list[str]) -> np.ndarray:
        tokens = self._tokenizer(
            texts, padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
        ).input_ids
        states: torch.Tensor = self._network(tokens.to(self._device)).last_hidden_state
        values: np.ndarray = states.half().cpu().numpy()
        return values


def text_encoder_files(folder: Path) -> list[str]:
    """The names of the files that a text encoder is loaded from; only these are copied.

    Raises:
        CheckpointError: the configuration, the weights or the tokenizer are missing.
    """
    found = [name for name in (*NETWORK_FILES, *TOKENIZER_FILES) if (folder / name).is_file()]
    has_tokenizer = TOKENIZER_FILES[2] in found or set(TOKENIZER_FILES[:2]) <= set(found)
    missing = [name for name in NETWORK_FILES if name not in found] + [f"{TOKENIZER}/vocab.json"] * (not has_tokenizer)
    if missing:
        raise CheckpointError(
            f"the text encoder {folder} has no {missing[0]}: give a Stable Diffusion in the layout of diffusers, with "
            f"{TOKENIZER}/ and {NETWORK}/ and weights as safetensors"
        )
    return found


def text_encoder_sha256(folder: Path) -> str:
    """The sha256 of the files of a text encoder, with their names."""
    digests = {name: sha256_of_file(folder / name) for name in text_encoder_files(folder)}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
