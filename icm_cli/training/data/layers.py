"""Reading training items: photographs, objects cut out of them with their own colours, and backgrounds.

Sizes are (height, width). The colours of a cut-out are premultiplied, so that warping adds no colour
from outside the object.
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
from icm_cli.training.data.pool import TrainingItem

CACHE_BYTES = 500_000_000
"""Memory of each cache of decoded items, per process."""
VISIBLE_U8 = 8
"""Pixels with an alpha above this are inside the bounding box of a cut-out."""


def _size_bytes(layer: object) -> int:
    """Return the memory of the arrays of a layer."""
    arrays = [layer] if isinstance(layer, np.ndarray) else vars(layer).values()
    return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))


@dataclass(frozen=True)
class Photograph:
    """An image, uint8 [h,w,3], with its alpha, uint8 [h,w].

    If the data have them: a trimap, uint8 [h,w] of 0, 128 and 255, and a first stage's coarse alpha,
    uint8 [h,w].
    """

    rgb: ImageU8
    alpha: ImageU8
    trimap: ImageU8 | None
    coarse: ImageU8 | None = None


@dataclass(frozen=True)
class Cutout:
    """An object's bounding box: colour float32 [h,w,3] 0..255, premultiplied; alpha float32 [h,w] 0..1."""

    colour: Float
    alpha: Float


@cached(LRUCache(CACHE_BYTES, getsizeof=_size_bytes))
def read_cached_photograph(item: TrainingItem, long_side_px: int) -> Photograph:
    """Read an item, reduced to at most ``long_side_px``, and keep it in memory. Raises ImageError."""
    return read_photograph(item, long_side_px)


def read_photograph(item: TrainingItem, long_side_px: int | None = None) -> Photograph:
    """Read an item, reduced to at most ``long_side_px``. Raises ImageError."""
    rgb, alpha = _read_image_and_alpha(item)
    size = downscaled_size(alpha.shape, long_side_px or max(alpha.shape))
    trimap = None if item.trimap is None else _read_trimap(item.trimap, alpha.shape, size)
    coarse = None if item.coarse is None else resize(read_alpha(item.coarse), size)
    return Photograph(resize(rgb, size), _resize_alpha(alpha, size, is_binary=item.is_binary), trimap, coarse)


@cached(LRUCache(CACHE_BYTES, getsizeof=_size_bytes))
def read_cutout(item: TrainingItem, long_side_px: int) -> Cutout:
    """Cut out an item's object, with its bounding box reduced to at most ``long_side_px``. Raises ImageError.

    The foreground colours of a photograph are estimated first (Germer et al., "Fast Multi-Level
    Foreground Estimation", 2020). Otherwise the old background, visible through soft edges, would become
    a halo on a new background, and the model would learn it.
    """
    rgb, alpha = _read_image_and_alpha(item)
    rows, columns = (np.flatnonzero((alpha > VISIBLE_U8).any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        raise ImageError(f"the alpha of {item.image} is empty, so its object cannot be cut out")
    margin = 2 + max(len(rows), len(columns)) // 32  # some background, for the estimate
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


@cached(LRUCache(CACHE_BYTES, getsizeof=_size_bytes))
def read_background(path: Path, long_side_px: int) -> ImageU8:
    """Read an image, uint8 [h,w,3], reduced to at most ``long_side_px``, and keep it in memory. Raises ImageError."""
    rgb = read_image(path).rgb
    return resize(rgb, downscaled_size(rgb.shape[:2], long_side_px))


def _read_image_and_alpha(item: TrainingItem) -> tuple[ImageU8, ImageU8]:
    image = read_image(item.image).to_display_window()
    if item.alpha is not None:
        alpha = read_alpha(item.alpha)
    elif image.alpha is not None:
        alpha = image.alpha
    else:
        raise ImageError(f"{item.image} has no alpha; expected an RGBA cut-out")
    if alpha.shape != image.rgb.shape[:2]:
        if not item.is_binary:
            raise ImageError(
                f"{item.image} is {image.rgb.shape[1]}x{image.rgb.shape[0]} and its alpha {item.alpha} "
                f"{alpha.shape[1]}x{alpha.shape[0]}; expected the same size"
            )
        alpha = resize(alpha, (image.rgb.shape[0], image.rgb.shape[1]))  # masks of Open Images differ in size
    if item.is_binary:
        alpha = binarize_alpha(alpha)
    if item.soften_px:
        alpha = np.asarray(cv2.GaussianBlur(alpha, (0, 0), item.soften_px), np.uint8)
    return image.rgb, alpha


def _resize_alpha(alpha: ImageU8, size: tuple[int, int], *, is_binary: bool) -> ImageU8:
    small = resize(alpha, size)
    return binarize_alpha(small) if is_binary else small


def _read_trimap(path: Path, shape: tuple[int, ...], size: tuple[int, int]) -> ImageU8:
    trimap = read_alpha(path)
    if trimap.shape != shape:
        raise ImageError(f"trimap {path} is {trimap.shape[1]}x{trimap.shape[0]}, not its image's {shape[1]}x{shape[0]}")
    lowest, known = UNKNOWN_RANGE
    levels = np.where(trimap < lowest, 0, np.where(trimap >= known, 255, UNKNOWN)).astype(np.uint8)
    return np.asarray(cv2.resize(levels, size[::-1], interpolation=cv2.INTER_NEAREST), np.uint8)
