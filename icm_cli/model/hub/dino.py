"""DINOv2, DINOv2 with registers, or DINOv3, a vision transformer of any size, in Hugging Face's form.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision" (2023); Darcet et al., "Vision Transformers
Need Registers" (ICLR 2024); Siméoni et al., "DINOv3" (2025). The transformer is frozen and ``transformers``' own.

Tokens of DINOv3 carry where in the picture they are, which misleads when pictures are compared: a token at the left of
one is like whatever lies at the left of the other. INSID3 (Cuttano et al., CVPR 2026, arXiv 2603.28480, section 3.2)
finds that part in a picture that shows nothing and takes it away, for matching between pictures alone; within one
picture tokens are grouped with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.errors import ConfigError
from icm_cli.geometry import CanvasRule
from icm_cli.model.contracts import Backbone, Features
from icm_cli.model.hub.folders import (
    CONFIG,
    Statistics,
    find_folder,
    folder_digest,
    load_pretrained,
    read_json,
    read_pixel_statistics,
)
from icm_cli.model.similarity import SelfSimilarity, valid_tokens

CLASSES = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}
"""``model_type`` in config.json -> class of transformers."""
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Statistics by which the published processors normalise pixels, where a folder has none of its own."""
LARGEST_ENLARGEMENT = 2.0
"""Largest factor by which a small picture is enlarged on its way to the canvas."""


@dataclass(frozen=True)
class DinoConfig:
    """Settings of the dino backbone."""

    weights: str = "facebook/dinov2-large"
    """Hub id or local folder, in Hugging Face's form; the command's --weights goes before it."""
    patch_px: int = 14
    """Side of a token's cell on the canvas, that of the weights: 14 for DINOv2, 16 for DINOv3."""
    long_side_px: int = 896
    """Long side of the canvas, a multiple of ``patch_px``."""
    layers: tuple[int, ...] = (24,)
    """Blocks, counted from 1, whose outputs together are compared between reference and target."""
    positional_rank: int = 0
    """Dimensions of the positional subspace that is taken off before pictures are compared; 0 takes nothing off. The
    paper has 500 of the 1024 of DINOv3 ViT-L."""
    temperature: float = 0.15
    """Temperature of the intra-similarity, in cosine units; more than 0."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Dtype of the transformer where --dtype names none; auto suits the device. DINOv3 is not made for float16."""

    def __post_init__(self) -> None:
        if self.patch_px < 1:
            raise ConfigError(f"backbone patch_px is {self.patch_px}; expected 1 or more")
        if self.long_side_px < self.patch_px or self.long_side_px % self.patch_px:
            raise ConfigError(f"backbone long_side_px is {self.long_side_px}; expected a multiple of {self.patch_px}")
        if not self.layers or min(self.layers) < 1 or len(set(self.layers)) < len(self.layers):
            raise ConfigError(f"backbone layers is {list(self.layers)}; expected different numbers from 1 on")
        most = (self.long_side_px // self.patch_px) ** 2 - 1
        if not 0 <= self.positional_rank <= most:
            raise ConfigError(
                f"backbone positional_rank is {self.positional_rank}; expected 0 to {most}, fewer than the canvas has "
                "tokens"
            )
        if self.temperature <= 0:
            raise ConfigError(f"backbone temperature is {self.temperature}; expected more than 0")


class Dino(Backbone):
    """Tokens of chosen blocks of a frozen vision transformer.

    Attention is that of PyTorch's fused kernels, and intra-similarity an operator, so that no matrix of N x N is in
    memory unless a head asks for one.
    """

    Config = DinoConfig
    has_attention_matrix = False
    is_self_contained = False
    is_trainable = False
    has_transformer = True

    def __init__(self, config: DinoConfig, transformer: nn.Module, statistics: Statistics = IMAGENET) -> None:
        """``transformer``: an object of one of ``CLASSES``; ``statistics``: of the pixels it was trained on."""
        super().__init__()
        self.config = config
        self.transformer = transformer
        self.mean, self.deviation = (torch.tensor(each)[:, None, None] for each in statistics)
        self._bases: list[Tensor] | None = None

    @classmethod
    def preferred_transformer_dtype(cls, config: Any) -> str:
        dtype: str = config.dtype
        return dtype

    @classmethod
    def weights_digest(cls, config: Any, weights: str | None, *, offline: bool) -> str:
        return folder_digest(find_folder(weights or config.weights, offline=offline, option="--weights"))

    @classmethod
    def load(cls, config: Any, weights: str | None, *, offline: bool, seed: int) -> Self:  # noqa: ARG003
        folder = find_folder(weights or config.weights, offline=offline, option="--weights")
        return cls(config, _load_transformer(config, folder), read_pixel_statistics(folder, IMAGENET)).eval()

    def set_dtype(self, dtype: torch.dtype, transformer_dtype: torch.dtype) -> None:  # noqa: ARG002
        self.transformer.to(transformer_dtype)

    @property
    def canvas(self) -> CanvasRule:
        return CanvasRule(
            self.config.long_side_px, self.config.patch_px, square=False, max_enlargement=LARGEST_ENLARGEMENT
        )

    def reference_features(self, image: Tensor, valid: Tensor, noise: Sequence[str]) -> Features:  # noqa: ARG002
        matched = self._matched(self.tokens(image))
        return Features(matched, valid_tokens(valid, self.config.patch_px), {}, {})

    def target_features(self, image: Tensor, valid: Tensor, noise: Sequence[str]) -> Features:  # noqa: ARG002
        stride = self.config.patch_px
        found, alive = self.tokens(image), valid_tokens(valid, stride)
        grouping = torch.cat(found, dim=1)
        intra = {stride: SelfSimilarity(grouping, alive, self.config.temperature)}
        return Features(self._matched(found), alive, {}, intra, grouping)

    @torch.no_grad()
    def tokens(self, image: Tensor) -> list[Tensor]:
        """Tokens of each configured block behind the model's last LayerNorm, of unit length, [B,C,h,w] float32.

        image [B,3,H,W] sRGB 0..1, H and W multiples of ``patch_px``.
        """
        model: Any = self.transformer
        norm = model.layernorm if hasattr(model, "layernorm") else model.norm
        pixels = (image - self.mean.to(image.device)) / self.deviation.to(image.device)
        states = model(pixel_values=pixels.to(norm.weight.dtype), output_hidden_states=True).hidden_states
        grid = image.shape[-2] // self.config.patch_px, image.shape[-1] // self.config.patch_px
        first = states[0].shape[1] - grid[0] * grid[1]  # behind the class token and the registers
        return [
            F.normalize(norm(states[layer])[:, first:].float(), dim=-1).transpose(1, 2).reshape(len(image), -1, *grid)
            for layer in self.config.layers
        ]

    def _matched(self, found: list[Tensor]) -> Tensor:
        """Tokens as they are compared between pictures: without their positional part, of unit length again."""
        if not self.config.positional_rank:
            return torch.cat(found, dim=1)
        if self._bases is None:
            self._bases = self._positional_bases(found[0].device)
        return torch.cat([project_out_subspace(*pair) for pair in zip(found, self._bases, strict=True)], dim=1)

    def _positional_bases(self, device: torch.device) -> list[Tensor]:
        """An orthonormal basis [C,rank] of the positional subspace of each block, from a black picture."""
        side = self.config.long_side_px
        blank = torch.zeros(1, 3, side, side, device=device)
        return [subspace(tokens, self.config.positional_rank) for tokens in self.tokens(blank)]


def subspace(tokens: Tensor, rank: int) -> Tensor:
    """Leading directions of the tokens of a picture that shows nothing: what varies in them is where they are.

    tokens [1,C,h,w] of unit length -> [C,rank] float32 with orthonormal columns: the left singular vectors of the
    tokens less their mean (INSID3, section 3.2). On the CPU, as not every device has the decomposition.
    """
    columns = tokens[0].flatten(1).cpu()
    vectors = torch.linalg.svd(columns - columns.mean(dim=1, keepdim=True), full_matrices=False).U
    return vectors[:, :rank].contiguous().to(tokens.device)


def project_out_subspace(tokens: Tensor, basis: Tensor) -> Tensor:
    """Project tokens [B,C,h,w] onto what is orthogonal to ``basis`` [C,rank], and bring them to unit length again."""
    columns = tokens.flatten(2)
    rest = columns - basis @ (basis.T @ columns)
    return F.normalize(rest, dim=1).view_as(tokens)


def _load_transformer(config: DinoConfig, folder: Path) -> nn.Module:
    """The transformer of a folder, checked against the configuration. Raises ConfigError."""
    import transformers

    path = folder / CONFIG
    kind = read_json(path).get("model_type")
    if kind not in CLASSES:
        raise ConfigError(
            f"{path} is of a model of type {kind!r}; expected {', '.join(CLASSES)}, a ViT of DINOv2 or DINOv3"
        )
    model = load_pretrained(getattr(transformers, CLASSES[kind]), folder)
    depth, width, patch = model.config.num_hidden_layers, model.config.hidden_size, model.config.patch_size
    if patch != config.patch_px:
        raise ConfigError(
            f"backbone patch_px is {config.patch_px} and the weights in {folder} have {patch}; set it to that"
        )
    if max(config.layers) > depth:
        raise ConfigError(
            f"backbone layers is {list(config.layers)} and the weights in {folder} have {depth} blocks; expected "
            f"numbers from 1 to {depth}"
        )
    if config.positional_rank >= width:
        raise ConfigError(
            f"backbone positional_rank is {config.positional_rank} and tokens of the weights in {folder} have {width} "
            f"channels; expected less than that"
        )
    module: nn.Module = model
    return module
