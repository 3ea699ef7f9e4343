"""Text-to-image with transformers' real CLIP classes, small and random: a pipeline and a folder of weights."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import tiny
import torch

import fastsample as fs


def tokenizer() -> Any:
    """A tokenizer of single letters."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], model_max_length=16
    )


def _text(width: int) -> dict[str, Any]:
    size = len(tokenizer())
    return {
        "vocab_size": size,
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
        "pad_token_id": size - 1,
    }


def text_to_image() -> Any:
    """A Stable Diffusion pipeline that reads its prompts."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(30)
    encoder = CLIPTextModel(CLIPTextConfig(**_text(12))).eval()
    return tiny.sd(text_encoder=encoder, tokenizer=tokenizer())


def make_model() -> fs.Denoiser:
    """For ``model._target_``."""
    return fs.wrap(text_to_image())


def save_clip(folder: Path) -> Path:
    """A random CLIP of 18 features, as ``save_pretrained`` leaves one."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(46)
    config = CLIPConfig(
        text_config=_text(16) | {"projection_dim": 18},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "projection_dim": 18,
        },
        projection_dim=18,
    )
    CLIPModel(config).eval().save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
