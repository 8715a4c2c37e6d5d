"""Items as pixels: photographs as they are, and things cut out of them with their own colours.

Sizes are (height, width); a cut-out's colours are premultiplied, so that warping mixes in nothing from outside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from cachetools import LRUCache, cached

from icm_cli.errors import ImageError
from icm_cli.geometry import UNKNOWN, Float, ImageU8, binarize_alpha, downscaled_size, resize
from icm_cli.images.reading import read_alpha, read_image
from icm_cli.model.training_free.closed_form import load_foreground_estimator
from icm_cli.scoring.metrics import UNKNOWN_RANGE
from icm_cli.training.data.pool import Item

KEPT_BYTES = 500_000_000
"""Memory of each cache of decoded items, per process."""
VISIBLE_U8 = 8
"""Alpha above which a cut-out's bounding box counts a pixel."""


def _bytes(layer: object) -> int:
    arrays = [layer] if isinstance(layer, np.ndarray) else vars(layer).values()
    return sum(each.nbytes for each in arrays if isinstance(each, np.ndarray))


@dataclass(frozen=True)
class Photograph:
    """rgb uint8 [h,w,3], alpha uint8 [h,w]; where a file gives one, trimap uint8 [h,w] in 0, 128, 255 and the coarse
    alpha of a first stage, uint8 [h,w]."""

    rgb: ImageU8
    alpha: ImageU8
    trimap: ImageU8 | None
    coarse: ImageU8 | None = None


@dataclass(frozen=True)
class Cutout:
    """A thing's bounding box: colour float32 [h,w,3] 0..255, premultiplied; alpha float32 [h,w] 0..1."""

    colour: Float
    alpha: Float


@cached(LRUCache(KEPT_BYTES, getsizeof=_bytes))
def shrunk_photograph(item: Item, long_side_px: int) -> Photograph:
    """Read an item, shrunk to ``long_side_px`` where it is larger; kept at hand. Raises ImageError."""
    return photograph(item, long_side_px)


def photograph(item: Item, long_side_px: int | None = None) -> Photograph:
    """Read an item, shrunk to ``long_side_px`` where it is larger. Raises ImageError."""
    rgb, alpha = _read(item)
    size = downscaled_size(alpha.shape, long_side_px or max(alpha.shape))
    trimap = None if item.trimap is None else _read_trimap(item.trimap, alpha.shape, size)
    coarse = None if item.coarse is None else resize(read_alpha(item.coarse), size)
    return Photograph(resize(rgb, size), _resized_alpha(alpha, size, is_binary=item.is_binary), trimap, coarse)


@cached(LRUCache(KEPT_BYTES, getsizeof=_bytes))
def cutout(item: Item, long_side_px: int) -> Cutout:
    """Cut an item's thing out, its bounding box shrunk to ``long_side_px`` where it is larger. Raises ImageError.

    The colours of a photograph are estimated first (Germer et al., "Fast Multi-Level Foreground Estimation", 2020):
    what shines through a soft edge from its old background would be a halo on a new one, and would be learned.
    """
    rgb, alpha = _read(item)
    rows, columns = (np.flatnonzero((alpha > VISIBLE_U8).any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        raise ImageError(f"the alpha of {item.image} is empty, so there is nothing to cut out")
    margin = 2 + max(len(rows), len(columns)) // 32  # some background for the estimate
    box = tuple(slice(max(0, ends[0] - margin), ends[-1] + 1 + margin) for ends in (rows, columns))
    rgb, alpha = rgb[box], alpha[box]
    size = downscaled_size(alpha.shape, long_side_px)
    weight = resize(alpha, size).astype(np.float32) / 255.0
    if item.is_foreground:
        colour = resize((rgb * (alpha[..., None] / np.float32(255))).astype(np.float32), size)
    else:
        estimated = load_foreground_estimator()(resize(rgb, size) / 255.0, weight.astype(np.float64))
        colour = (estimated * 255.0 * weight[..., None]).astype(np.float32)
    return Cutout(colour, weight)


@cached(LRUCache(KEPT_BYTES, getsizeof=_bytes))
def background(path: Path, long_side_px: int) -> ImageU8:
    """Read a picture, uint8 [h,w,3], shrunk to ``long_side_px`` where it is larger. Raises ImageError."""
    rgb = read_image(path).rgb
    return resize(rgb, downscaled_size(rgb.shape[:2], long_side_px))


def _read(item: Item) -> tuple[ImageU8, ImageU8]:
    picture = read_image(item.image).to_display_window()
    if item.alpha is not None:
        alpha = read_alpha(item.alpha)
    elif picture.alpha is not None:
        alpha = picture.alpha
    else:
        raise ImageError(f"{item.image} has no alpha; expected an RGBA cut-out")
    if alpha.shape != picture.rgb.shape[:2]:
        if not item.is_binary:
            raise ImageError(
                f"{item.image} is {picture.rgb.shape[1]}x{picture.rgb.shape[0]} and its alpha {item.alpha} "
                f"{alpha.shape[1]}x{alpha.shape[0]}; expected one size"
            )
        alpha = resize(alpha, (picture.rgb.shape[0], picture.rgb.shape[1]))  # Open Images' masks have their own sizes
    if item.is_binary:
        alpha = binarize_alpha(alpha)
    if item.soften_px:
        alpha = np.asarray(cv2.GaussianBlur(alpha, (0, 0), item.soften_px), np.uint8)
    return picture.rgb, alpha


def _resized_alpha(alpha: ImageU8, size: tuple[int, int], *, is_binary: bool) -> ImageU8:
    small = resize(alpha, size)
    return binarize_alpha(small) if is_binary else small


def _read_trimap(path: Path, shape: tuple[int, ...], size: tuple[int, int]) -> ImageU8:
    trimap = read_alpha(path)
    if trimap.shape != shape:
        raise ImageError(f"trimap {path} is {trimap.shape[1]}x{trimap.shape[0]}, not its image's {shape[1]}x{shape[0]}")
    lowest, known = UNKNOWN_RANGE
    levels = np.where(trimap < lowest, 0, np.where(trimap >= known, 255, UNKNOWN)).astype(np.uint8)
    return np.asarray(cv2.resize(levels, size[::-1], interpolation=cv2.INTER_NEAREST), np.uint8)
