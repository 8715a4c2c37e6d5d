"""Tiles of a large picture that overlap, and weights that blend them without a seam."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

from icm_cli.geometry import Float

Box = tuple[slice, slice]
"""Rows and columns of a tile."""


def blended(size: tuple[int, int], tile_px: int, overlap_px: int, answer: Callable[[Box], Float]) -> Float:
    """Answers [h,w] of tiles of ``tile_px``, blended where they overlap, float32 [H,W] for a picture of ``size``.

    Shares of neighbours rise and fall in a straight line over ``overlap_px``, so where that is at most a third of a
    tile, tiles that disagree altogether (0 and 1) make a step of at most 1/``overlap_px`` from one pixel to the next:
    less than 1/255 with 256 px.
    """
    out, weight = np.zeros(size, np.float32), np.zeros(size, np.float32)
    for (row, down), (column, across) in itertools.product(*(_pieces(length, tile_px, overlap_px) for length in size)):
        box = slice(row, row + len(down)), slice(column, column + len(across))
        share = down[:, None] * across
        out[box] += answer(box) * share
        weight[box] += share
    return out / weight


def _pieces(length: int, tile: int, overlap: int) -> list[tuple[int, Float]]:
    """Tiles of ``tile`` px along ``length`` px, the last one at the end: where each starts, and its weights.

    Weights rise over the overlap with the tile before, are 1 in the middle and fall over that with the tile after.
    """
    if length <= tile:
        return [(0, np.ones(length, np.float32))]
    count = math.ceil((length - overlap) / (tile - overlap))
    ramp = np.minimum(1.0, np.arange(1, tile + 1, dtype=np.float32) / max(1, overlap))
    level = np.ones(tile, np.float32)
    return [
        (
            round(number * (length - tile) / (count - 1)),
            np.minimum(ramp if number else level, ramp[::-1] if number < count - 1 else level),
        )
        for number in range(count)
    ]
