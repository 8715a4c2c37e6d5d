"""Coarse alphas made by degrading true ones, like those that a first stage or a hasty user would give.

Every function draws random numbers only from the generator that it is given.
"""

from __future__ import annotations

import cv2
import numpy as np

from icm_cli.geometry import Float, ImageU8
from icm_cli.training.data.augment import Rng

TOKEN_CELL = (1 / 52, 1 / 14)
"""Side of a token's cell, as a fraction of the image's long side."""
OBJECT_CELL = (1 / 256, 1 / 128)
"""Side of an object mask's cell, as a fraction of the image's long side."""
OBJECT_BLUR = (0.4, 3.0)
"""Standard deviation, in cells, of the blur of an object mask's outline. A network trained with larger
ones distrusts masks that are correct."""
CERTAIN_LOGIT = 4.0
"""Smallest distance below 0 of an object mask's logit far from the object."""
MAX_REGION_FRACTION = 0.12
"""Largest fraction of the image that an uncertain region covers."""
INSIDE_PROBABILITY = 0.65
"""Probability that an uncertain region is inside the object instead of outside."""


def degrade_to_tokens(alpha: Float, rng: Rng) -> Float:
    """Degrade an alpha, [H,W] 0..1, to the output of a head on tokens: large cells, smooth errors, holes and blobs."""
    height, width = alpha.shape
    cell = max(height, width) * np.exp(rng.uniform(*np.log(TOKEN_CELL)))
    rows, columns = max(2, round(height / cell)), max(2, round(width / cell))
    shifted = _shift_alpha(alpha, rng.uniform(-0.6, 0.6, 2) * cell * (rng.random() < 0.5))
    if rng.random() < 0.4:
        shifted = _dilate_or_erode(shifted, rng.uniform(-0.6, 0.6) * cell)
    grid = cv2.resize(shifted, (columns, rows), interpolation=cv2.INTER_AREA)
    logit = np.log((grid + 0.02) / (1.02 - grid)) * rng.uniform(0.5, 2.0) + rng.uniform(-0.7, 0.7)
    logit += draw_smooth_noise((rows, columns), rng.uniform(1.0, 4.0), rng) * rng.uniform(0.0, 1.6)
    logit += rng.standard_normal((rows, columns)) * rng.uniform(0.0, 0.8)
    for strength in (-1.0, 1.0):
        if rng.random() < 0.35:
            logit += strength * rng.uniform(1.0, 4.5) * _draw_blob((rows, columns), rng)
    coarse = 1.0 / (1.0 + np.exp(-logit))
    return np.asarray(cv2.resize(coarse.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR))


def degrade_outline(alpha: Float, rng: Rng) -> Float:
    """Degrade the outline of an alpha, [H,W] 0..1: displaced by a few pixels, hardened at random, and blurred."""
    reach = rng.uniform(0.5, 7.0)
    coarse = (alpha > rng.uniform(0.3, 0.7)).astype(np.float32) if rng.random() < 0.5 else alpha
    if rng.random() < 0.8:
        coarse = _warp_outline(coarse, reach, rng)
    if rng.random() < 0.5:
        coarse = _dilate_or_erode(coarse, rng.uniform(-1.0, 1.0) * reach)
    if rng.random() < 0.25:
        holes = _draw_blob(alpha.shape, rng, largest=0.15)
        coarse = coarse * (1 - holes) if rng.random() < 0.6 else np.maximum(coarse, holes * rng.uniform(0.2, 0.8))
    if rng.random() < 0.85:
        coarse = np.asarray(
            cv2.GaussianBlur(coarse, (0, 0), float(np.exp(rng.uniform(np.log(0.5), np.log(5.0))))), np.float32
        )
    return np.clip(coarse, 0.0, 1.0).astype(np.float32)


def degrade_to_object_mask(alpha: Float, rng: Rng) -> Float:
    """Degrade an alpha, [H,W] 0..1, to the output of an object segmentation model.

    The outline is smooth and confident on both sides. Hair extends beyond it, or the gaps between
    strands are closed.
    """
    height, width = alpha.shape
    longest = max(height, width)
    cell = longest * np.exp(rng.uniform(*np.log(OBJECT_CELL)))
    smooth = np.asarray(cv2.GaussianBlur(alpha, (0, 0), cell * np.exp(rng.uniform(*np.log(OBJECT_BLUR)))))
    rows, columns = max(2, round(height / cell)), max(2, round(width / cell))
    grid = cv2.resize(smooth, (columns, rows), interpolation=cv2.INTER_AREA)
    steepness = np.exp(rng.uniform(np.log(8.0), np.log(40.0)))
    noise = draw_smooth_noise((rows, columns), rng.uniform(4.0, 24.0), rng) * rng.uniform(0.0, 0.12)
    threshold = np.maximum(rng.uniform(0.25, 0.65) + noise, CERTAIN_LOGIT / steepness)
    mask = 1.0 / (1.0 + np.exp(-steepness * (grid - threshold)))
    return np.asarray(cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR))


def add_uncertain_regions(coarse: Float, rgb: ImageU8, truth: Float, rng: Rng) -> Float:
    """Make a coarse alpha, [H,W] 0..1, uncertain about one to three regions of similar colour.

    Regions of the object fade and regions of the background appear, as with a first stage that judges
    by appearance. ``rgb`` is the image, uint8 [H,W,3].
    """
    height, width = truth.shape
    scale = min(1.0, 160 / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    colours = np.asarray(cv2.GaussianBlur(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), (0, 0), 1.0), np.uint8)
    is_object = cv2.resize(truth, size, interpolation=cv2.INTER_AREA) > 0.5
    for _ in range(int(rng.integers(1, 4))):
        is_inside = bool(rng.random() < INSIDE_PROBABILITY)
        region = cv2.GaussianBlur(
            _draw_colour_region(colours, is_object == is_inside, rng),
            (0, 0),
            max(size) * rng.uniform(*TOKEN_CELL) * 0.5,
        )
        weight = cv2.resize(region, (width, height), interpolation=cv2.INTER_LINEAR) * rng.uniform(0.5, 1.0)
        level = rng.uniform(0.05, 0.7) if is_inside else rng.uniform(0.2, 0.7)
        uncertain = np.minimum(coarse, level) if is_inside else np.maximum(coarse, level)
        coarse = (coarse + weight * (uncertain - coarse)).astype(np.float32)
    return np.clip(coarse, 0.0, 1.0).astype(np.float32)


def draw_smooth_noise(size: tuple[int, int], cell: float, rng: Rng) -> Float:
    """Draw normal noise, [H,W], that varies over about ``cell`` pixels, with a standard deviation near 1."""
    small = rng.standard_normal((max(2, round(size[0] / cell)), max(2, round(size[1] / cell)))).astype(np.float32)
    return np.asarray(cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC))


def _shift_alpha(alpha: Float, offset: np.ndarray) -> Float:
    matrix = np.array([[1, 0, offset[0]], [0, 1, offset[1]]], np.float32)
    return np.asarray(cv2.warpAffine(alpha, matrix, alpha.shape[::-1], borderMode=cv2.BORDER_REPLICATE))


def _dilate_or_erode(alpha: Float, px: float) -> Float:
    """Dilate an alpha by ``px`` pixels, or erode it if ``px`` is negative."""
    reach = round(abs(px))
    if not reach:
        return alpha
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    return np.asarray(cv2.dilate(alpha, kernel) if px > 0 else cv2.erode(alpha, kernel))


def _warp_outline(alpha: Float, reach: float, rng: Rng) -> Float:
    """Displace the pixels of an alpha smoothly, by about ``reach`` pixels."""
    cell = rng.uniform(4.0, 12.0) * max(1.0, reach)
    height, width = alpha.shape
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    dx, dy = (draw_smooth_noise(alpha.shape, cell, rng) * np.float32(reach * 0.7) for _ in range(2))
    return np.asarray(cv2.remap(alpha, x + dx, y + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))


def _draw_colour_region(colours: ImageU8, candidates: np.ndarray, rng: Rng) -> Float:
    """Draw a pixel of ``candidates``, bool [h,w]; return 1 where its colour extends around it within them, else 0."""
    indices = np.flatnonzero(candidates)
    if not len(indices):
        return np.zeros(candidates.shape, np.float32)
    y, x = divmod(int(indices[rng.integers(len(indices))]), candidates.shape[1])
    filled = np.zeros((candidates.shape[0] + 2, candidates.shape[1] + 2), np.uint8)
    difference = (float(rng.uniform(8.0, 40.0)),) * 3
    flags = 4 | cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE | 1 << 8
    cv2.floodFill(colours, filled, (x, y), 0, difference, difference, flags)
    region = (filled[1:-1, 1:-1] > 0) & candidates
    if region.mean() > MAX_REGION_FRACTION:
        region &= _draw_blob(region.shape, rng, largest=0.2, centre=(x, y)) > 0.5
    return region.astype(np.float32)


def _draw_blob(
    size: tuple[int, int], rng: Rng, largest: float = 0.3, centre: tuple[float, float] | None = None
) -> Float:
    """Draw a soft ellipse, 1 inside, around a centre (x, y) or at a random place."""
    height, width = size
    blob = np.zeros(size, np.float32)
    centre = centre or (rng.uniform(0, width), rng.uniform(0, height))
    axes = rng.uniform(0.04, largest, 2) * max(size)
    box = (centre, (float(2 * max(axes[0], 0.7)), float(2 * max(axes[1], 0.7))), float(rng.uniform(0, 180)))
    cv2.ellipse(blob, box, 1.0, -1)
    return np.asarray(cv2.GaussianBlur(blob, (0, 0), max(0.5, 0.15 * float(min(axes)))))
