"""Overlapping tiles of a large image, and the blending of their alphas without visible seams."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a tile, and their weights where tiles overlap, float32 [h] and [w]."""

    rows: slice
    columns: slice
    row_weights: Tensor
    column_weights: Tensor

    @property
    def weight(self) -> Tensor:
        """Weight of each pixel, float32 [h,w]."""
        return self.row_weights[:, None] * self.column_weights

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of the tile in an array [H,W,...] of the image."""
        return self.rows, self.columns


def split_into_tiles(size: tuple[int, int], tile_px: int, overlap_px: int) -> list[Tile]:
    """Split an image of ``size`` (height, width) into tiles with sides of at most ``tile_px``.

    The weights of neighbours rise and fall linearly over ``overlap_px``. If that is at most a third of a tile, two
    tiles that disagree completely (0 and 1) differ by at most 1 / ``overlap_px`` from one pixel to the next. With 256
    px that is less than 1/255.
    """
    sides = (_split_side(length, tile_px, overlap_px) for length in size)
    return [
        Tile(slice(top, top + len(down)), slice(left, left + len(across)), down, across)
        for (top, down), (left, across) in itertools.product(*sides)
    ]


def blend_tiles(size: tuple[int, int], tiles: Sequence[Tile], alphas: Iterable[Tensor], device: torch.device) -> Tensor:
    """Blend the alphas of an image's tiles into one alpha, float32 [H,W] of ``size``.

    ``alphas``: one [h,w] for each tile, in the order of ``tiles``.
    """
    total, weights = (torch.zeros(size, dtype=torch.float32, device=device) for _ in range(2))
    for tile, alpha in zip(tiles, alphas, strict=True):
        weight = tile.weight.to(device)
        total[tile.slices] += alpha * weight
        weights[tile.slices] += weight
    return total.div_(weights)


def _split_side(length: int, tile: int, overlap: int) -> list[tuple[int, Tensor]]:
    """Start and weights of each tile along a side of ``length`` px; the last tile ends at the end of the side.

    Weights rise over the overlap with the tile before, are 1 in the middle, and fall over that with the tile after.
    """
    if length <= tile:
        return [(0, torch.ones(length))]
    count = math.ceil((length - overlap) / (tile - overlap))
    ramp = torch.clamp(torch.arange(1, tile + 1, dtype=torch.float32) / max(1, overlap), max=1.0)
    constant = torch.ones(tile)
    return [
        (
            round(number * (length - tile) / (count - 1)),
            torch.minimum(ramp if number else constant, ramp.flip(0) if number < count - 1 else constant),
        )
        for number in range(count)
    ]
