"""J and F of DAVIS: how well two masks cover each other, and how well their boundaries meet.

Made after the definitions of Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object
Segmentation", CVPR 2016, section 5.1, and the conventions of their evaluation tool: a boundary is one pixel wide and
lies up to half a pixel towards the origin of the true one, and a pixel of it is met where the other's is within 0.8 %
of the picture's diagonal, rounded up.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.geometry import HALF_U8, ImageU8

TOLERANCE = 0.008
"""Farthest distance of boundaries that meet, in diagonals of the picture."""

Mask = NDArray[np.bool_]


def region_similarity(alpha: ImageU8, truth: ImageU8) -> float:
    """J, 0..1: the intersection over the union of two alphas, uint8 [H,W], above one half; 1 where both are empty."""
    ours, true = alpha > HALF_U8, truth > HALF_U8
    union = np.count_nonzero(ours | true)
    return np.count_nonzero(ours & true) / union if union else 1.0


def boundary_accuracy(alpha: ImageU8, truth: ImageU8) -> float:
    """F, 0..1: the harmonic mean of two shares, uint8 [H,W] each above one half.

    The shares are precision, of our boundary's pixels that meet the true one, and recall, of the true boundary's that
    meet ours. Masks without any boundary (empty or full) agree; one with and one without do not.
    """
    ours, true = (_boundary(each > HALF_U8) for each in (alpha, truth))
    if not ours.any() or not true.any():
        return float(ours.any() == true.any())
    reach = math.ceil(TOLERANCE * math.hypot(*truth.shape))
    precision = np.count_nonzero(ours & _dilated(true, reach)) / np.count_nonzero(ours)
    recall = np.count_nonzero(true & _dilated(ours, reach)) / np.count_nonzero(true)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _boundary(mask: Mask) -> Mask:
    """Pixels [H,W] that differ from the one on the right, below, or right and below; none beyond the border."""
    around = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ around[:-1, 1:]) | (mask ^ around[1:, :-1]) | (mask ^ around[1:, 1:])


def _dilated(boundary: Mask, reach: int) -> Mask:
    """All pixels no farther than ``reach`` from one of the boundary, [H,W]."""
    at = np.arange(-reach, reach + 1)
    disk = (at[:, None] ** 2 + at**2 <= reach**2).astype(np.uint8)
    return cv2.dilate(boundary.astype(np.uint8), disk) > 0
