"""From the coarse alpha of a head to the trimap that solvers of edges take."""

from __future__ import annotations

from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.geometry import Float, resize

SURE = 0.1
"""Coarse alphas this near to 0 or 1 are sure, but for the band along what is not."""


def trimap_of_coarse(coarse: Float, size: tuple[int, int], band_share: float) -> Float:
    """A trimap float32 [H,W] of 0 background, 0.5 unknown, 1 foreground for a picture of ``size``, from a coarse alpha.

    coarse [h,w] 0..1 of any size. Unknown is what is not sure, and every pixel within ``band_share`` of the picture's
    long side of it or of the other side. A thing thinner than the band keeps the middle half of its depth, so that
    nothing that was found loses its foreground.
    """
    alpha = resize(coarse, size)
    band = max(1.0, band_share * max(size))
    trimap = np.full(size, 0.5, np.float32)
    foreground = alpha > 1.0 - SURE
    trimap[_depth(alpha < SURE) > band] = 0.0
    depth = _depth(foreground)
    count, found = cv2.connectedComponents(foreground.astype(np.uint8))
    label = found.astype(np.intp)
    deepest = np.zeros(count, np.float32)
    np.maximum.at(deepest, label, depth)
    trimap[foreground & (depth > np.minimum(band, deepest[label] / 2))] = 1.0
    return trimap


def _depth(inside: NDArray[np.bool_]) -> Float:
    """Distance in px of each pixel that is ``inside`` [H,W] from the nearest that is not; beyond the picture all is."""
    if inside.all():
        return np.full(inside.shape, np.inf, np.float32)
    return cast(Float, cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE))
