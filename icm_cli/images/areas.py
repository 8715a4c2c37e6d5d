"""Areas of one value or colour in an image, by which masks differ from photographs."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.images.pixels import GREY_TOLERANCE

MAX_LABELS = 64
"""A mask has at most this many labels."""
MIN_FLAT_FRACTION = 0.25
"""Smallest fraction of pixels with the colour of all their neighbours in a mask with areas."""
MIN_LABELLED_FRACTION = 0.7
"""Smallest fraction of pixels with one of the MAX_LABELS most frequent colours in a mask of thin lines."""


def is_photograph(colours: NDArray[np.uint32], is_flat: NDArray[np.bool_] | None = None) -> bool:
    """Return whether an image has many colours, and hardly any areas of one colour, so that it is no mask.

    ``colours``: result of :func:`pack_colours`. ``is_flat``: result of :func:`find_flat_pixels`, if it is known.
    """
    is_flat = find_flat_pixels(colours) if is_flat is None else is_flat
    if is_flat.mean() >= MIN_FLAT_FRACTION:
        return False
    return sum(list(value_fractions(colours).values())[:MAX_LABELS]) < MIN_LABELLED_FRACTION


def has_colour(values: NDArray[Any], scale: float) -> bool:
    """Return whether the channels of an image, [H,W] or [H,W,3] in 0..``scale``, differ."""
    if values.ndim == 2:
        return False
    minimum = np.minimum(np.minimum(values[..., 0], values[..., 1]), values[..., 2])
    return bool((maximum_of_channels(values) - minimum).max() > GREY_TOLERANCE * scale / 255.0)


def maximum_of_channels(values: NDArray[Any]) -> NDArray[Any]:
    """Return the maximum of three channels, [H,W], ten times as fast as ``values.max(axis=-1)``."""
    return np.asarray(np.maximum(np.maximum(values[..., 0], values[..., 1]), values[..., 2]))


def pack_colours(values: NDArray[Any], scale: float) -> NDArray[np.uint32]:
    """Return colours [H,W,3] in 0..``scale`` as numbers 0xrrggbb."""
    colours = (np.clip(values, 0, scale).astype(np.float32) * (255.0 / scale) + 0.5).astype(np.uint32)
    return np.asarray((colours[..., 0] << 16) | (colours[..., 1] << 8) | colours[..., 2], np.uint32)


def find_flat_pixels(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where all neighbours of a pixel have its value, bool [H,W]."""
    numbers, kernel = np.asarray(values, np.float64), np.ones((3, 3), np.uint8)
    return np.asarray(cv2.dilate(numbers, kernel) == cv2.erode(numbers, kernel))


def value_fractions(values: NDArray[Any], total: int | None = None) -> dict[Any, float]:
    """Return the fraction of pixels of each value, the most frequent first.

    ``total``: number of pixels by which counts are divided; None for all ``values``.
    """
    distinct, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts)
    return {distinct[index]: float(counts[index]) / (total or values.size) for index in order}
