"""A CLIP model of transformers with random weights, whole: image processor, tokenizer, config, weights."""

from __future__ import annotations

import string
from pathlib import Path

import torch
import transformers
from torch import nn

TOKENS = 16  # of a text at most
SIZE = 16  # of an image's side


def tokenizer(tokens: int = TOKENS) -> transformers.CLIPTokenizer:
    """One token a letter."""
    letters = [letter + end for letter in string.ascii_lowercase + string.digits for end in ("", "</w>")]
    vocab = {token: index for index, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return transformers.CLIPTokenizer(vocab, merges=[], model_max_length=tokens)


def clip_model(seed: int = 0) -> transformers.CLIPModel:
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer()), "max_position_embeddings": TOKENS}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"image_size": SIZE, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=part | text, vision_config=part | vision, projection_dim=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.CLIPModel(config).eval()
        for parameter in model.parameters():  # as initialised, all have nearly the same features
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model


def save_clip(folder: Path, seed: int = 0) -> Path:
    """Write the model into a folder as `save_pretrained` does."""
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    clip_model(seed).save_pretrained(folder)
    transformers.CLIPProcessor(processor, tokenizer()).save_pretrained(folder)
    return folder
