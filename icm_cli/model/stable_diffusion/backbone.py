"""The stable-diffusion backbone of the paper (section 3.2): frozen, with features and attention of one noised pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from icm_cli.config import check_setting
from icm_cli.files import combined_digest
from icm_cli.geometry import CanvasRule
from icm_cli.model.contracts import Backbone, Features
from icm_cli.model.similarity import AttentionMatrix, valid_tokens
from icm_cli.model.stable_diffusion.unet import FEATURE_STRIDES, MeanAttention, encode_image, run_unet
from icm_cli.model.stable_diffusion.weights import (
    DEFAULT_WEIGHTS,
    StableDiffusionParts,
    find_diffusers_files,
    load_parts,
)

CORRESPONDENCE_STRIDE = 16
"""Stride of the correspondence features, in px of the canvas."""
CANVAS_MULTIPLE_PX = 64
"""Stride of the U-Net's smallest grid."""
SCHEDULE_STEPS = 1000
"""Number of timesteps of the noise schedule."""


@dataclass(frozen=True)
class StableDiffusionConfig:
    """Settings of the stable-diffusion backbone. The defaults are those of the published checkpoint."""

    weights: str = DEFAULT_WEIGHTS
    """Hub id or local folder in the layout of diffusers. ``--weights`` overrides it."""
    canvas_px: int = 768
    """Side of the square canvas, in px, a multiple of 64."""
    timestep: int = 200
    """Timestep of the noise in the latents, 0..999. The paper says 0, the published code uses 200."""
    ensemble: int = 4
    """Number E of noise samples whose features and attention maps are averaged."""

    def __post_init__(self) -> None:
        side = self.canvas_px
        is_multiple = side >= CANVAS_MULTIPLE_PX and not side % CANVAS_MULTIPLE_PX
        check_setting("backbone", self, "canvas_px", is_multiple, f"a multiple of {CANVAS_MULTIPLE_PX}")
        check_setting("backbone", self, "timestep", 0 <= self.timestep < SCHEDULE_STEPS, f"0..{SCHEDULE_STEPS - 1}")
        check_setting("backbone", self, "ensemble", self.ensemble >= 1, "1 or more")


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
        return find_diffusers_files(config.weights if weights is None else weights, offline=offline)

    @classmethod
    def load(cls, config: Any, weights: str | None, *, offline: bool, seed: int) -> Self:
        folder = cls.weight_files(config, weights, offline=offline)[0].parents[1]
        return cls(config, load_parts(folder, timestep=config.timestep), seed)

    @property
    def canvas(self) -> CanvasRule:
        return CanvasRule(self.config.canvas_px, CANVAS_MULTIPLE_PX, square=True)

    @torch.no_grad()
    def reference_features(self, image: Tensor, valid: Tensor, noise_keys: Sequence[str]) -> Features:
        singles = [
            self.mean_features(self.noisy_latents(self.encode_moments(image[i : i + 1]), name))[CORRESPONDENCE_STRIDE]
            for i, name in enumerate(noise_keys)
        ]
        return Features(torch.cat(singles), valid_tokens(valid, CORRESPONDENCE_STRIDE), {}, {})

    @torch.no_grad()
    def target_features(self, image: Tensor, valid: Tensor, noise_keys: Sequence[str]) -> Features:
        token_masks = {stride: valid_tokens(valid, stride) for stride in FEATURE_STRIDES}
        singles = []
        for i, name in enumerate(noise_keys):
            maps = {stride: MeanAttention(mask[i]) for stride, mask in token_masks.items()}
            noisy = self.noisy_latents(self.encode_moments(image[i : i + 1]), name)
            singles.append((self.mean_features(noisy, maps), maps))
        scales = {stride: torch.cat([features[stride] for features, _ in singles]) for stride in FEATURE_STRIDES}
        return Features(
            correspondence_features=scales[CORRESPONDENCE_STRIDE],
            valid=token_masks[CORRESPONDENCE_STRIDE],
            scale_features={stride: feature.to(self.prompt_embedding.dtype) for stride, feature in scales.items()},
            intra_similarity={
                stride: AttentionMatrix(torch.stack([maps[stride].mean() for _, maps in singles]), maps[stride].grid)
                for stride in FEATURE_STRIDES
            },
        )

    def encode_moments(self, image: Tensor) -> Tensor:
        """Return mean and log variance of the VAE's posterior, float32 [1,8,H/8,W/8], of an image [1,3,H,W] in 0..1."""
        return encode_image(self.encoder, self.quant_conv, (2.0 * image - 1.0).to(self.prompt_embedding.dtype))

    def noisy_latents(self, moments: Tensor, key: str) -> Tensor:
        """Draw E samples from the posterior of :meth:`encode_moments`, and add the noise of the configured timestep:
        float32 [E,4,h,w]. ``key`` is the noise key of the image."""
        distribution = DiagonalGaussianDistribution(moments)
        posterior_noise, noise = self._draw_noise(distribution.mean.shape[1:], key).to(moments.device).unbind(1)
        latents = (distribution.mean + distribution.std * posterior_noise) * self._latent_scale
        return self.add_noise(latents, noise)

    def add_noise(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Add noise to latents [E,4,h,w] by the forward diffusion of the configured timestep."""
        noisy: Tensor = self._scheduler.add_noise(latents, noise, torch.tensor([self.config.timestep]))
        return noisy

    def mean_features(self, noisy: Tensor, maps: Mapping[int, MeanAttention] | None = None) -> dict[int, Tensor]:
        """Compute the features of one image, averaged over its noisy latents [E,4,h,w]: stride -> float32 [1,C,h,w].
        ``maps`` accumulate the self-attention of each stride; references do not need it."""
        by_grid = None if maps is None else {attention.grid: attention for attention in maps.values()}
        features = run_unet(self.unet, noisy.to(self.prompt_embedding.dtype), self.prompt_embedding, by_grid)
        return {stride: feature.float().mean(dim=0, keepdim=True) for stride, feature in features.items()}

    def _draw_noise(self, shape: torch.Size, key: str) -> Tensor:
        """Draw posterior and diffusion noise, float32 [E,2,4,h,w], from the key and the seed."""
        draws = []
        for draw in range(self.config.ensemble):
            digest = combined_digest(str(self._seed), key, str(draw))
            generator = torch.Generator().manual_seed(int(digest[:15], 16))
            draws.append(torch.randn(2, *shape, generator=generator))
        return torch.stack(draws)
