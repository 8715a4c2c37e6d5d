"""Edges by ViTMatte (Yao et al., Information Fusion 2024).

It computes the alpha from an image and a trimap, at the size of the source, with ``VitMatteForImageMatting`` of
``transformers``. Preprocessing is that of the published processor: pixels in 0..1 are normalised by the statistics of
the weights' folder. The trimap of 0, 0.5 and 1 is a fourth channel and is not normalised. All channels are padded with
zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.config import Section, limited
from icm_cli.errors import ConfigError
from icm_cli.geometry import ImageU8, trimap_from_coarse
from icm_cli.model.alphas import blend_tiles, split_into_tiles
from icm_cli.model.contracts import Edges
from icm_cli.model.hub.catalogue import VITMATTE
from icm_cli.model.hub.folders import (
    CONFIG_FILE,
    PixelStatistics,
    find_model_files,
    load_pretrained,
    read_hub_json,
    read_pixel_statistics,
)

MULTIPLE_PX = 32
"""Images are padded to a multiple of this, as by the published processor."""
DEFAULT_STATISTICS: PixelStatistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Statistics of the published processor, for folders without statistics."""


@dataclass(frozen=True)
class VitMatteEdgesConfig(Section, title="edges"):
    """Settings of the edges by ViTMatte."""

    weights: str = VITMATTE
    """Hub id, or local folder in the layout of Hugging Face. The option ``--edges-weights`` replaces it."""
    band: float = 0.015
    """Width of the unknown region on either side of the coarse edge, as a fraction (0..0.5) of the long side."""
    tile_px: int = limited(1024, multiple=MULTIPLE_PX)
    """Side of the tiles of a larger source. The memory of attention grows with its fourth power."""
    overlap_px: int = 256
    """Overlap of tiles, in px, over which they are blended; at most a third of a tile.

    With 256 px, seams of the tiles are less than 1/255.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("band", 0 < self.band < 0.5, "above 0 and below 0.5")
        self.check("overlap_px", 0 <= self.overlap_px <= self.tile_px // 3, "0 to a third of tile_px")


class VitMatteEdges(Edges):
    """Frozen ViTMatte, or a module with the same interface.

    It computes the unknown region of the trimap of the coarse alpha.
    """

    Config = VitMatteEdgesConfig

    def __init__(
        self, config: VitMatteEdgesConfig, network: nn.Module, statistics: PixelStatistics = DEFAULT_STATISTICS
    ) -> None:
        super().__init__()
        self.config = config
        self.network = network
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in statistics)

    @classmethod
    def settings_with_weights(cls, config: Any, weights: str) -> Any:
        return replace(config, weights=weights)

    @classmethod
    def weight_files(cls, config: Any, weights: str | None = None, *, offline: bool) -> list[Path]:  # noqa: ARG003
        return find_model_files(config.weights, VITMATTE, offline=offline, option="--edges-weights")

    @classmethod
    def load(cls, config: Any, *, offline: bool) -> Self:
        from transformers import VitMatteForImageMatting

        folder = cls.weight_files(config, offline=offline)[0].parent
        kind = read_hub_json(folder / CONFIG_FILE).get("model_type")
        if kind != "vitmatte":
            raise ConfigError(f"{folder / CONFIG_FILE} is of a model of type {kind!r}; expected vitmatte")
        return cls(
            config, load_pretrained(VitMatteForImageMatting, folder), read_pixel_statistics(folder, DEFAULT_STATISTICS)
        ).eval()

    def refine_alphas(self, images: Sequence[ImageU8], coarse: Sequence[Tensor]) -> list[Tensor]:
        return [self._refine_alpha(rgb, alpha) for rgb, alpha in zip(images, coarse, strict=True)]

    def _refine_alpha(self, rgb: ImageU8, coarse: Tensor) -> Tensor:
        """Compute the unknown pixels of one alpha in tiles."""
        size = rgb.shape[0], rgb.shape[1]
        trimap = torch.from_numpy(trimap_from_coarse(coarse.numpy(force=True), size, self.config.band))
        trimap = trimap.to(coarse.device)
        tiles = split_into_tiles(size, self.config.tile_px, self.config.overlap_px)

        def solve_tiles() -> Iterator[Tensor]:
            for tile in tiles:
                tile_trimap = trimap[tile.slices]
                has_unknown = bool((tile_trimap == 0.5).any())
                yield self.solve(rgb[tile.slices], tile_trimap) if has_unknown else tile_trimap

        alpha = blend_tiles(size, tiles, solve_tiles(), trimap.device)
        return torch.where(trimap == 0.5, alpha, trimap)

    @torch.inference_mode()
    def solve(self, rgb: ImageU8, trimap: Tensor) -> Tensor:
        """Run the network on an image, sRGB uint8 [H,W,3], and its trimap [H,W] of 0, 0.5 and 1; return [H,W]."""
        weight = next(self.network.parameters())
        pixels = self._network_input(rgb, trimap).to(weight.device, weight.dtype)
        alpha: Tensor = self.network(pixel_values=pixels).alphas
        return alpha[0, 0, : rgb.shape[0], : rgb.shape[1]].float().clamp(0.0, 1.0)

    def _network_input(self, rgb: ImageU8, trimap: Tensor) -> Tensor:
        """Return the input of the network, float32 [1,4,H,W] with H and W padded to multiples of 32."""
        image = torch.from_numpy(rgb.copy()).permute(2, 0, 1).float() / 255.0
        normalised = (image - self.mean) / self.std
        channels = torch.cat([normalised, trimap.cpu()[None]])[None]
        below, right = (-length % MULTIPLE_PX for length in trimap.shape)
        return F.pad(channels, (0, right, 0, below))
