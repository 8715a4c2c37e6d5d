"""Alphas as tensors: resizing with the rules of :func:`icm_cli.geometry.resize`, batches of equal sizes, and tiles."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from icm_cli.geometry import resize

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def apply_in_batches(
    function: Callable[[Sequence[ItemT]], Sequence[ResultT]],
    items: Sequence[ItemT],
    size_of: Callable[[ItemT], Hashable],
    max_batch: int | None = None,
) -> list[ResultT]:
    """Apply a function of a batch to items of different sizes, and return the results in the order of the items.

    ``function`` gets items for which ``size_of`` is equal, at most ``max_batch``, and returns a result for each.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[size_of(item)].append(index)
    results: dict[int, ResultT] = {}
    for indices in groups.values():
        step = max_batch or len(indices)
        for start in range(0, len(indices), step):
            batch = indices[start : start + step]
            results.update(zip(batch, function([items[index] for index in batch]), strict=True))
    return [results[index] for index in range(len(items))]


def max_batch_size(device: torch.device) -> int | None:
    """Return the largest batch of images for a network on this device; None for no limit.

    On the CPU it is 1: larger batches are not faster there, and an alpha would depend, in its last bits, on the other
    images of its batch.
    """
    return 1 if device.type == "cpu" else None


def resize_alpha(alpha: Tensor, size: Sequence[int]) -> Tensor:
    """Resize an alpha float32 [h,w] to (height, width): by area averaging to fewer pixels, bilinearly to more pixels.

    On the CPU, OpenCV is several times faster than torch.
    """
    height, width = alpha.shape
    if (height, width) == tuple(size):
        return alpha
    if alpha.device.type == "cpu":
        return torch.from_numpy(resize(np.ascontiguousarray(alpha.numpy()), (size[0], size[1])))
    return resize_on_device(alpha, size)


def resize_on_device(alpha: Tensor, size: Sequence[int]) -> Tensor:
    """Resize an alpha as :func:`resize_alpha` does, without leaving its device."""
    if size[0] * size[1] >= alpha.numel():
        return F.interpolate(alpha[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]
    return _average_rows(_average_rows(alpha, size[0]).mT, size[1]).mT.contiguous()


def _average_rows(alpha: Tensor, count: int) -> Tensor:
    """Resize an alpha [h,w] to ``count`` rows. Each is the mean of the rows that it covers, weighted by the overlap."""
    rows, columns = alpha.shape
    if count >= rows:
        return F.interpolate(alpha[None, None], size=(count, columns), mode="bilinear", align_corners=False)[0, 0]
    edges = torch.arange(count + 1, dtype=torch.float64) * (rows / count)
    starts, ends = edges[:-1], edges[1:]  # of the range of rows that each new row covers
    averaged = torch.zeros((count, columns), device=alpha.device)
    for step in range(math.ceil(rows / count) + 1):  # add the row number ``step`` of every range
        row = starts.floor() + step
        overlap = (torch.minimum(ends, row + 1) - torch.maximum(starts, row)).clamp(min=0.0) / (ends - starts)
        index = row.clamp(max=rows - 1).long().to(alpha.device)
        averaged += alpha.index_select(0, index) * overlap.to(alpha)[:, None]
    return averaged


@dataclass(frozen=True)
class Tile:
    """A tile of an image: its rows and columns, and the weights with which it is blended with its neighbours."""

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
        """The tile as an index of an array [H,W,...] of the image."""
        return self.rows, self.columns


def split_into_tiles(size: tuple[int, int], tile_px: int, overlap_px: int) -> list[Tile]:
    """Split an image of ``size`` (height, width) into tiles with sides of at most ``tile_px``.

    Where two tiles overlap, the weight of one falls linearly over ``overlap_px``, and the weight of the other rises.
    If the overlap is at most a third of a tile, the step between neighbouring pixels is at most 1 / ``overlap_px``,
    even if one tile is 0 and the other 1. With 256 px, that is less than 1/255.
    """
    row_ranges, column_ranges = (_split_side(length, tile_px, overlap_px) for length in size)
    return [
        Tile(rows, columns, row_weights, column_weights)
        for (rows, row_weights), (columns, column_weights) in itertools.product(row_ranges, column_ranges)
    ]


def blend_tiles(size: tuple[int, int], tiles: Sequence[Tile], alphas: Iterable[Tensor], device: torch.device) -> Tensor:
    """Blend the alphas [h,w] of an image's tiles into one alpha, float32 [H,W] of ``size``: their weighted mean."""
    weighted_sum, weights = (torch.zeros(size, dtype=torch.float32, device=device) for _ in range(2))
    for tile, alpha in zip(tiles, alphas, strict=True):
        weight = tile.weight.to(device)
        weighted_sum[tile.slices] += alpha * weight
        weights[tile.slices] += weight
    return weighted_sum.div_(weights)


def _split_side(length: int, tile: int, overlap: int) -> list[tuple[slice, Tensor]]:
    """Return the range and the weights of each tile along a side of ``length`` px, which the tiles cover exactly.

    The weights rise over the overlap with the previous tile, are 1 in the middle, and fall over the overlap with the
    next tile.
    """
    if length <= tile:
        return [(slice(0, length), torch.ones(length))]
    count = math.ceil((length - overlap) / (tile - overlap))
    rising = torch.clamp(torch.arange(1, tile + 1, dtype=torch.float32) / max(1, overlap), max=1.0)
    tiles = []
    for number in range(count):
        start = round(number * (length - tile) / (count - 1))
        weights = torch.ones(tile)
        if number > 0:
            weights = torch.minimum(weights, rising)
        if number < count - 1:
            weights = torch.minimum(weights, rising.flip(0))
        tiles.append((slice(start, start + tile), weights))
    return tiles
