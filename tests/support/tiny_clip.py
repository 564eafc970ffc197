"""A CLIP text encoder that is small enough for tests, in the layout of diffusers, with random weights."""

import json
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel

CLIP_TOKENS, CLIP_WIDTH = 7, 8
START, END = "<|startoftext|>", "<|endoftext|>"


def save_tiny_clip(folder: Path, seed: int = 0) -> Path:
    """Write `tokenizer/` and `text_encoder/`. The tokenizer knows letters, and `ab` as one token."""
    vocabulary = [c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")] + ["ab", START, END]
    numbers = {token: number for number, token in enumerate(vocabulary)}
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(numbers))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b\n")
    settings = {"model_max_length": CLIP_TOKENS, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = CLIPTextConfig(
            vocab_size=len(numbers), hidden_size=CLIP_WIDTH, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=CLIP_TOKENS, bos_token_id=numbers[START],
            eos_token_id=numbers[END], pad_token_id=numbers[END],
        )  # fmt: skip
        CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder
