"""A tiny random Stable Diffusion 2 folder in the layout of diffusers, to test the loading code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

TINY_CANVAS_PX = 128
TINY_FEATURE_CHANNELS = 32
TOKENIZER_FILES = {
    "vocab.json": {"!": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3},
    "tokenizer_config.json": {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "!",
    },
    "special_tokens_map.json": {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "!",
    },
}
UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32, 32, 32],
    "layers_per_block": 2,
    "attention_head_dim": [1, 2, 4, 4],
    "cross_attention_dim": 24,
    "use_linear_projection": True,
    "norm_num_groups": 8,
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 8, 16, 16],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": TINY_CANVAS_PX,
    "scaling_factor": 0.18215,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}


def write_tiny_sd(folder: Path, *, seed: int = 0, unet: Mapping[str, Any] = UNET, vae: Mapping[str, Any] = VAE) -> Path:
    """Write unet/, vae/, text_encoder/, tokenizer/, scheduler/ and model_index.json; returns the folder.

    Its canvas has 128 px, and its features 32 channels.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        UNet2DConditionModel(**unet).save_pretrained(folder / "unet")
        AutoencoderKL(**vae).save_pretrained(folder / "vae")
        text = CLIPTextConfig(
            vocab_size=4,
            hidden_size=unet["cross_attention_dim"],
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    _write_tokenizer(folder / "tokenizer")
    parts = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler"}
    index = {"_class_name": "StableDiffusionPipeline", **{part: ["diffusers", name] for part, name in parts.items()}}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _write_tokenizer(folder: Path) -> None:
    folder.mkdir()
    (folder / "merges.txt").write_text("#version: 0.2\n")
    for name, content in TOKENIZER_FILES.items():
        (folder / name).write_text(json.dumps(content))


def write_tiny_detail_config(path: Path, folder: Path) -> Path:
    """Write a configuration of the paper's model that fits the tiny weights in ``folder``; returns its path."""
    path.write_text(
        f"backbone: {{name: stable-diffusion, weights: {json.dumps(str(folder))}, canvas_px: {TINY_CANVAS_PX}}}\n"
        f"head: {{name: detail, canvas_px: {TINY_CANVAS_PX}, feature_channels: {TINY_FEATURE_CHANNELS}, "
        "intra_channels: 8, fusion_channels: 8, decoder_channels: [8, 6, 4, 4]}\n"
    )
    return path
