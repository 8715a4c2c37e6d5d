"""Foreground colours without the background that shines through soft edges, and trimaps for other
tools."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.geometry import UNKNOWN, Float
from icm_cli.images.pixels import DecodedImage
from icm_cli.model.training_free.closed_form import load_foreground_estimator

CERTAIN = 0.05
"""Alphas within this distance of 0 or 1 count as background or foreground in a trimap."""


def estimate_foreground(source: DecodedImage, alpha: Float) -> Float:
    """Estimate the foreground colours of a source, given its alpha [H,W] in 0..1.

    The method is multi-level estimation (Germer et al., "Fast Multi-Level Foreground Estimation",
    ICPR 2020). Where alpha is 0, the colours are those of the nearest foreground, so that no
    compositing operation shows a halo.

    Returns:
        float32 [H,W,3] on the source's scale of 0..1, with HDR values beyond.
    """
    pixels = source.pixels.astype(np.float32) / np.float32(source.scale)
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, axis=-1)
    least, largest = min(0.0, float(pixels.min())), max(1.0, float(pixels.max()))  # the estimator clips to 0..1
    scaled = (pixels.astype(np.float64) - least) / (largest - least)
    colours = load_foreground_estimator()(scaled, alpha.astype(np.float64))
    return np.asarray(colours * (largest - least) + least, np.float32)


def trimap_from_alpha(alpha: Float, band_px: int) -> NDArray[np.uint8]:
    """Return the trimap, uint8 [H,W] of 0, 128 and 255, of an alpha [H,W] in 0..1.

    Pixels within ``band_px`` of an uncertain pixel are unknown.
    """
    trimap = np.full(alpha.shape, UNKNOWN, np.uint8)
    for value, certain in ((255, alpha > 1.0 - CERTAIN), (0, alpha < CERTAIN)):
        if certain.all():
            trimap[:] = value
            continue
        distance = cv2.distanceTransform(certain.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        trimap[distance > band_px] = value
    return trimap
