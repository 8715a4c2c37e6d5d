"""Coarse alphas made from true ones: what a first stage, or a person in a hurry, would have given.

Every function draws from the generator it is given and from nothing else.
"""

from __future__ import annotations

import cv2
import numpy as np

from icm_cli.geometry import Float, ImageU8
from icm_cli.training.data.augment import Rng

LEAST = 1e-3
TOKEN_SHARE = (1 / 52, 1 / 14)
"""Side of a token's cell, as a share of the picture's long side."""
OBJECT_CELL = (1 / 256, 1 / 128)
"""Side of a cell of a mask of whole things, as a share of the picture's long side."""
OBJECT_BLUR = (0.4, 3.0)
"""Blur of such a mask's outline, the deviation in cells; wider ones teach a network to doubt what is right."""
SURE_LOGIT = 4.0
"""Least distance below 0 of such a mask's logit where nothing of the thing is near."""
LARGEST_PART = 0.12
"""Share of the picture that a doubted part covers at most."""
INSIDE_SHARE = 0.65
"""Share of the doubted parts that belong to the thing; the others lie beside it."""


def by_tokens(alpha: Float, rng: Rng) -> Float:
    """An alpha [H,W] 0..1 as tokens tell it: means over large cells, wrong by smooth noise, with holes and blobs."""
    height, width = alpha.shape
    cell = max(height, width) * np.exp(rng.uniform(*np.log(TOKEN_SHARE)))
    rows, columns = max(2, round(height / cell)), max(2, round(width / cell))
    shifted = _shifted(alpha, rng.uniform(-0.6, 0.6, 2) * cell * (rng.random() < 0.5))
    if rng.random() < 0.4:
        shifted = _grown(shifted, rng.uniform(-0.6, 0.6) * cell)
    grid = cv2.resize(shifted, (columns, rows), interpolation=cv2.INTER_AREA)
    logit = np.log((grid + 0.02) / (1.02 - grid)) * rng.uniform(0.5, 2.0) + rng.uniform(-0.7, 0.7)
    logit += smooth_noise((rows, columns), rng.uniform(1.0, 4.0), rng) * rng.uniform(0.0, 1.6)
    logit += rng.standard_normal((rows, columns)) * rng.uniform(0.0, 0.8)
    for strength in (-1.0, 1.0):
        if rng.random() < 0.35:
            logit += strength * rng.uniform(1.0, 4.5) * _blob((rows, columns), rng)
    coarse = 1.0 / (1.0 + np.exp(-logit))
    return np.asarray(cv2.resize(coarse.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR))


def by_outline(alpha: Float, rng: Rng) -> Float:
    """An alpha [H,W] 0..1 with its outline moved by a few pixels, hardened at times, and blurred."""
    reach = rng.uniform(0.5, 7.0)
    coarse = (alpha > rng.uniform(0.3, 0.7)).astype(np.float32) if rng.random() < 0.5 else alpha
    if rng.random() < 0.8:
        coarse = _warped(coarse, reach, rng)
    if rng.random() < 0.5:
        coarse = _grown(coarse, rng.uniform(-1.0, 1.0) * reach)
    if rng.random() < 0.25:
        holes = _blob(alpha.shape, rng, largest=0.15)
        coarse = coarse * (1 - holes) if rng.random() < 0.6 else np.maximum(coarse, holes * rng.uniform(0.2, 0.8))
    if rng.random() < 0.85:
        coarse = np.asarray(
            cv2.GaussianBlur(coarse, (0, 0), float(np.exp(rng.uniform(np.log(0.5), np.log(5.0))))), np.float32
        )
    return np.clip(coarse, 0.0, 1.0).astype(np.float32)


def by_objects(alpha: Float, rng: Rng) -> Float:
    """An alpha [H,W] 0..1 as a network tells it that knows things and not their hair: a smooth outline, sure on both
    sides, beyond which strands stick out or which closes the gaps between them."""
    height, width = alpha.shape
    longest = max(height, width)
    cell = longest * np.exp(rng.uniform(*np.log(OBJECT_CELL)))
    smooth = np.asarray(cv2.GaussianBlur(alpha, (0, 0), cell * np.exp(rng.uniform(*np.log(OBJECT_BLUR)))))
    rows, columns = max(2, round(height / cell)), max(2, round(width / cell))
    grid = cv2.resize(smooth, (columns, rows), interpolation=cv2.INTER_AREA)
    steepness = np.exp(rng.uniform(np.log(8.0), np.log(40.0)))
    noise = smooth_noise((rows, columns), rng.uniform(4.0, 24.0), rng) * rng.uniform(0.0, 0.12)
    least = np.maximum(rng.uniform(0.25, 0.65) + noise, SURE_LOGIT / steepness)
    sure = 1.0 / (1.0 + np.exp(-steepness * (grid - least)))
    return np.asarray(cv2.resize(sure.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR))


def with_doubted_parts(coarse: Float, rgb: ImageU8, truth: Float, rng: Rng) -> Float:
    """A coarse alpha [H,W] 0..1 unsure of one to three parts of the picture, uint8 [H,W,3], each of about one colour:
    parts of the thing fade, things beside it appear, as a first stage errs that judges by looks."""
    height, width = truth.shape
    scale = min(1.0, 160 / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    colours = np.asarray(cv2.GaussianBlur(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), (0, 0), 1.0), np.uint8)
    is_inside = cv2.resize(truth, size, interpolation=cv2.INTER_AREA) > 0.5
    for _ in range(int(rng.integers(1, 4))):
        inside = bool(rng.random() < INSIDE_SHARE)
        part = cv2.GaussianBlur(
            _part_of_one_colour(colours, is_inside == inside, rng), (0, 0), max(size) * rng.uniform(*TOKEN_SHARE) * 0.5
        )
        weight = cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR) * rng.uniform(0.5, 1.0)
        level = rng.uniform(0.05, 0.7) if inside else rng.uniform(0.2, 0.7)
        doubted = np.minimum(coarse, level) if inside else np.maximum(coarse, level)
        coarse = (coarse + weight * (doubted - coarse)).astype(np.float32)
    return np.clip(coarse, 0.0, 1.0).astype(np.float32)


def smooth_noise(size: tuple[int, int], cell: float, rng: Rng) -> Float:
    """Normal noise [H,W] that changes over about ``cell`` pixels, of deviation near 1."""
    small = rng.standard_normal((max(2, round(size[0] / cell)), max(2, round(size[1] / cell)))).astype(np.float32)
    return np.asarray(cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC))


def _shifted(alpha: Float, by: np.ndarray) -> Float:
    matrix = np.array([[1, 0, by[0]], [0, 1, by[1]]], np.float32)
    return np.asarray(cv2.warpAffine(alpha, matrix, alpha.shape[::-1], borderMode=cv2.BORDER_REPLICATE))


def _grown(alpha: Float, px: float) -> Float:
    reach = round(abs(px))
    if not reach:
        return alpha
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    return np.asarray(cv2.dilate(alpha, kernel) if px > 0 else cv2.erode(alpha, kernel))


def _warped(alpha: Float, reach: float, rng: Rng) -> Float:
    cell = rng.uniform(4.0, 12.0) * max(1.0, reach)
    height, width = alpha.shape
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    dx, dy = (smooth_noise(alpha.shape, cell, rng) * np.float32(reach * 0.7) for _ in range(2))
    return np.asarray(cv2.remap(alpha, x + dx, y + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))


def _part_of_one_colour(colours: ImageU8, may_be: np.ndarray, rng: Rng) -> Float:
    """Weights [h,w], 1 for the pixels around one of those that may be, bool [h,w], as far as its colour reaches."""
    found = np.flatnonzero(may_be)
    if not len(found):
        return np.zeros(may_be.shape, np.float32)
    y, x = divmod(int(found[rng.integers(len(found))]), may_be.shape[1])
    reached = np.zeros((may_be.shape[0] + 2, may_be.shape[1] + 2), np.uint8)
    difference = (float(rng.uniform(8.0, 40.0)),) * 3
    how = 4 | cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE | 1 << 8
    cv2.floodFill(colours, reached, (x, y), 0, difference, difference, how)
    part = (reached[1:-1, 1:-1] > 0) & may_be
    if part.mean() > LARGEST_PART:
        part &= _blob(part.shape, rng, largest=0.2, centre=(x, y)) > 0.5
    return part.astype(np.float32)


def _blob(size: tuple[int, int], rng: Rng, largest: float = 0.3, centre: tuple[float, float] | None = None) -> Float:
    """A soft ellipse, 1 inside, around a centre (x, y) or somewhere."""
    height, width = size
    blob = np.zeros(size, np.float32)
    centre = centre or (rng.uniform(0, width), rng.uniform(0, height))
    axes = rng.uniform(0.04, largest, 2) * max(size)
    box = (centre, (float(2 * max(axes[0], 0.7)), float(2 * max(axes[1], 0.7))), float(rng.uniform(0, 180)))
    cv2.ellipse(blob, box, 1.0, -1)
    return np.asarray(cv2.GaussianBlur(blob, (0, 0), max(0.5, 0.15 * float(min(axes)))))
