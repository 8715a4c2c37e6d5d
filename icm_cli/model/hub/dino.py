"""The dino backbone: DINOv2 or DINOv3 of any size, from the Hugging Face hub.

DINOv2: Oquab et al., 2023; with registers: Darcet et al., ICLR 2024; DINOv3: Siméoni et al., 2025. The transformer is
that of ``transformers`` and is frozen.

The tokens of DINOv3 depend on their position, which misleads comparisons between images. As in INSID3 (Cuttano et al.,
CVPR 2026, arXiv 2603.28480, section 3.2), this positional subspace is estimated from an empty image and removed for
these comparisons. The tokens of one image are grouped without this step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.config import Section, limited
from icm_cli.errors import ConfigError
from icm_cli.geometry import CanvasRule
from icm_cli.model.contracts import IMAGENET_MEAN, IMAGENET_STD, MAX_ENLARGEMENT, Backbone, Features
from icm_cli.model.hub.folders import (
    CONFIG_FILE,
    PixelStatistics,
    find_model_files,
    load_pretrained,
    read_hub_json,
    read_pixel_statistics,
)
from icm_cli.model.similarity import SelfSimilarity, valid_token_mask

CLASSES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel", "dinov3_vit": "DINOv3ViTModel"}
"""``model_type`` in config.json -> class of transformers."""
IMAGENET: PixelStatistics = (IMAGENET_MEAN, IMAGENET_STD)
"""Pixel statistics of the published models, for folders without ``preprocessor_config.json``."""


@dataclass(frozen=True)
class DinoConfig(Section, title="backbone"):
    """Settings of the dino backbone."""

    weights: str = "facebook/dinov2-large"
    """Hub id or local folder in the layout of Hugging Face. ``--weights`` overrides it."""
    patch_px: int = limited(14, 1)
    """Side of a token's cell, in px, as in the weights: 14 for DINOv2, 16 for DINOv3."""
    long_side_px: int = 896
    """Long side of the canvas, a multiple of ``patch_px``."""
    layers: tuple[int, ...] = (24,)
    """Blocks, counted from 1, whose outputs are the correspondence features."""
    positional_rank: int = 0
    """Dimensions of the positional subspace that is removed before images are compared; 0 removes nothing.

    The paper uses 500 of the 1024 dimensions of DINOv3 ViT-L.
    """
    temperature: float = limited(0.15, above=0)
    """Temperature of the intra-similarity, in cosine units."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Dtype of the transformer if ``--dtype`` is "auto"; "auto" selects the default of the device. DINOv3 does not
    support float16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        patch, side, layers = self.patch_px, self.long_side_px, self.layers
        is_multiple = side >= patch and side % patch == 0
        self.check("long_side_px", is_multiple, f"a multiple of {patch}")
        is_distinct = bool(layers) and min(layers) >= 1 and len(set(layers)) == len(layers)
        self.check("layers", is_distinct, "distinct numbers of 1 or more")
        max_rank = (side // patch) ** 2 - 1
        expected = f"0 to {max_rank}, less than the number of tokens of the canvas"
        self.check("positional_rank", 0 <= self.positional_rank <= max_rank, expected)


class Dino(Backbone):
    """Tokens of selected blocks of a frozen vision transformer, an instance of one of :data:`CLASSES`.

    ``statistics``: of the pixels on which it was trained.
    """

    Config = DinoConfig
    has_transformer = True

    def __init__(self, config: DinoConfig, transformer: nn.Module, statistics: PixelStatistics = IMAGENET) -> None:
        super().__init__()
        self.config = config
        self.transformer = transformer
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in statistics)
        self._bases: list[Tensor] | None = None
        """The positional subspace of each configured block, computed when it is needed first."""

    @classmethod
    def preferred_transformer_dtype(cls, config: Any) -> str:
        return config.dtype

    @classmethod
    def weight_files(cls, config: Any, weights: str | None = None, *, offline: bool) -> list[Path]:
        source = config.weights if weights is None else weights
        return find_model_files(source, DinoConfig.weights, offline=offline, option="--weights")

    @classmethod
    def load(cls, config: Any, weights: str | None, *, offline: bool, seed: int) -> Self:  # noqa: ARG003
        folder = cls.weight_files(config, weights, offline=offline)[0].parent
        return cls(config, _load_transformer(config, folder), read_pixel_statistics(folder, IMAGENET)).eval()

    def set_dtype(self, dtype: torch.dtype, fast_dtype: torch.dtype) -> None:  # noqa: ARG002
        self.transformer.to(fast_dtype)

    @property
    def canvas(self) -> CanvasRule:
        return CanvasRule(self.config.long_side_px, self.config.patch_px, square=False, max_enlargement=MAX_ENLARGEMENT)

    def reference_features(self, image: Tensor, valid: Tensor, noise_keys: Sequence[str]) -> Features:  # noqa: ARG002
        correspondence = self._remove_positions(self.extract_tokens(image))
        return Features(correspondence, valid_token_mask(valid, self.config.patch_px), {}, {})

    def target_features(self, image: Tensor, valid: Tensor, noise_keys: Sequence[str]) -> Features:  # noqa: ARG002
        stride = self.config.patch_px
        layers, is_valid = self.extract_tokens(image), valid_token_mask(valid, stride)
        grouping = torch.cat(layers, dim=1)
        intra = {stride: SelfSimilarity(grouping, is_valid, self.config.temperature)}
        return Features(self._remove_positions(layers), is_valid, {}, intra, grouping)

    @torch.no_grad()
    def extract_tokens(self, image: Tensor) -> list[Tensor]:
        """Return the tokens of each configured block, float32 [B,C,h,w], after the last LayerNorm and with unit length.

        ``image``: sRGB float32 [B,3,H,W] in 0..1; H and W are multiples of ``patch_px``.
        """
        model: Any = self.transformer
        norm = model.layernorm if hasattr(model, "layernorm") else model.norm
        pixels = (image - self.mean.to(image.device)) / self.std.to(image.device)
        states = model(pixel_values=pixels.to(norm.weight.dtype), output_hidden_states=True).hidden_states
        grid = image.shape[-2] // self.config.patch_px, image.shape[-1] // self.config.patch_px
        first = states[0].shape[1] - grid[0] * grid[1]  # after the class token and the registers
        layers = []
        for layer in self.config.layers:
            tokens = F.normalize(norm(states[layer])[:, first:].float(), dim=-1)
            layers.append(tokens.transpose(1, 2).reshape(len(image), -1, *grid))
        return layers

    def _remove_positions(self, layers: list[Tensor]) -> Tensor:
        """Return the tokens of :meth:`extract_tokens` without their positional part, with all channels in one tensor.

        The tokens of each layer have unit length.
        """
        rank = self.config.positional_rank
        if not rank:
            return torch.cat(layers, dim=1)
        if self._bases is None:
            side = self.config.long_side_px
            blank = torch.zeros(1, 3, side, side, device=layers[0].device)
            self._bases = [positional_subspace(tokens, rank) for tokens in self.extract_tokens(blank)]
        projected = [project_out_subspace(tokens, basis) for tokens, basis in zip(layers, self._bases, strict=True)]
        return torch.cat(projected, dim=1)


def positional_subspace(tokens: Tensor, rank: int) -> Tensor:
    """Return the principal directions of the tokens [1,C,h,w] of an empty image, as orthonormal columns [C,rank].

    Such tokens differ only by their position. The directions are the left singular vectors of the centred tokens
    (INSID3, section 3.2). They are computed on the CPU, because not every device supports the decomposition.
    """
    columns = tokens[0].flatten(1).cpu()
    vectors = torch.linalg.svd(columns - columns.mean(dim=1, keepdim=True), full_matrices=False).U
    return vectors[:, :rank].contiguous().to(tokens.device)


def project_out_subspace(tokens: Tensor, basis: Tensor) -> Tensor:
    """Project tokens [B,C,h,w] onto the orthogonal complement of ``basis`` [C,rank], and normalise them."""
    columns = tokens.flatten(2)
    rest = columns - basis @ (basis.T @ columns)
    return F.normalize(rest, dim=1).view_as(tokens)


def _load_transformer(config: DinoConfig, folder: Path) -> nn.Module:
    """Load the transformer of a folder. Raises ConfigError if it does not fit the configuration."""
    import transformers

    path = folder / CONFIG_FILE
    kind = read_hub_json(path).get("model_type")
    if kind not in CLASSES:
        raise ConfigError(f"{path} has the model_type {kind!r}; expected one of {', '.join(CLASSES)}")
    model = load_pretrained(getattr(transformers, CLASSES[kind]), folder)
    depth, width, patch = model.config.num_hidden_layers, model.config.hidden_size, model.config.patch_size
    if patch != config.patch_px:
        raise ConfigError(
            f"backbone patch_px is {config.patch_px}, but the weights in {folder} have {patch}; set patch_px to {patch}"
        )
    if max(config.layers) > depth:
        raise ConfigError(
            f"backbone layers is {list(config.layers)}, but the weights in {folder} have {depth} "
            f"blocks; expected numbers from 1 to {depth}"
        )
    if config.positional_rank >= width:
        raise ConfigError(
            f"backbone positional_rank is {config.positional_rank}, but tokens of the weights in "
            f"{folder} have {width} channels; expected less than {width}"
        )
    return model
