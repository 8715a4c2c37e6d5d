"""Signals of the quality of an alpha: numbers that the model knows without the truth.

:mod:`icm_cli.quality` estimates the quality from them, and compares images of a run by them. They are measured on
alphas that are reduced to ``LONG_SIDE_PX``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.geometry import Float, ImageU8, downscaled_size, resize

LONG_SIDE_PX = 256
"""Largest long side, in px, of the alphas on which signals are measured."""
DIGITS = 4
"""Signals are rounded to so many decimal places, so that recorded ones equal measured ones."""
SOFT = (0.1, 0.9)
"""Alphas between these are soft."""
INTERIOR_PX = 4.0
"""Distance from the outline, on the reduced alpha, beyond which a pixel is in the interior."""


def measure_signals(
    rgb: ImageU8, alpha: Float, completed: Float, earlier: Mapping[str, Float], of_head: Mapping[str, float]
) -> dict[str, float]:
    """Measure the signals of an alpha of an image, sRGB uint8 [H,W,3].

    All alphas are float32 [h,w] in 0..1 of any sizes and cover exactly the image. ``completed`` is the alpha before its
    edges were refined, and ``earlier`` are the alphas with which it is compared, by the name of the signal. Returns the
    signals ``of_head``, which are

    - ``confidence``: that of the head;
    - ``presence``: logit of the presence of the object. It is missing if the head does not predict it, or a hint says
      that the object is present;
    - ``similarity``, ``background_similarity``: see :class:`icm_cli.model.contracts.Matte`;

    and these, which are measured here:

    - ``aspect_ratio``: width of the image as a fraction of its height;
    - ``foreground``: mean of the alpha;
    - ``coarse_agreement``, ``completed_agreement``: IoU of the alpha with that of the head, and with the completed one;
    - ``completed_confidence``: mean of |2a - 1| of the completed alpha over the pixels that are not background;
    - ``soft_interior``: fraction of soft pixels far from the outline of the object;
    - ``largest_component``: its fraction of the foreground;
    - ``border``: length of the frame's border that the object covers, in units of the root of the object's area;
    - ``left``, ``top``, ``right``, ``bottom``: bounding box of the object, as fractions of the image;
    - ``lightness``, ``green_red``, ``blue_yellow``: mean colour of the object, in CIELAB.

    The signals from ``soft_interior`` on are missing if the alpha is nowhere above one half.
    """
    size = downscaled_size(rgb.shape[:2], LONG_SIDE_PX)
    last = resize(alpha, size)
    is_soft = (last > SOFT[0]) & (last < SOFT[1])
    signals = dict(of_head) | {
        "aspect_ratio": rgb.shape[1] / rgb.shape[0],
        "foreground": float(last.mean()),
        "completed_confidence": _confidence(resize(completed, size)),
    }
    signals |= {name: _soft_iou(resize(each, size), last) for name, each in earlier.items()}
    if (mask := last > 0.5).any():
        signals |= _measure_interior(mask, is_soft) | _measure_components(mask) | _measure_position(mask)
        signals |= _measure_colour(resize(rgb, size), mask)
    return {name: round(value, DIGITS) for name, value in signals.items()}


def _confidence(alpha: Float) -> float:
    visible = alpha[alpha > SOFT[0]]
    return float(np.abs(2 * visible - 1).mean()) if visible.size else 0.0


def _soft_iou(one: Float, other: Float) -> float:
    """IoU of two alphas; 1 if both are empty."""
    union = float(np.maximum(one, other).sum())
    return float(np.minimum(one, other).sum()) / union if union > 0 else 1.0


def _measure_interior(mask: NDArray[np.bool_], is_soft: NDArray[np.bool_]) -> dict[str, float]:
    filled = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8))
    depth = cv2.distanceTransform(filled, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    interior = depth > min(INTERIOR_PX, float(depth.max()) / 2)
    return {"soft_interior": float((is_soft | ~mask)[interior].mean())}


def _measure_components(mask: NDArray[np.bool_]) -> dict[str, float]:
    """Return the fraction of the mask that is in its largest connected component."""
    _, _, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return {"largest_component": float(statistics[1:, cv2.CC_STAT_AREA].max() / mask.sum())}


def _measure_position(mask: NDArray[np.bool_]) -> dict[str, float]:
    """Return the bounding box in fractions of the image, and how much of the image border is in the mask."""
    (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis=axis))[[0, -1]] + (0, 1) for axis in (1, 0))
    height, width = mask.shape
    covered = mask[0].sum() + mask[-1].sum() + mask[:, 0].sum() + mask[:, -1].sum()
    return {
        "border": float(covered / math.sqrt(mask.sum())),
        "left": float(left / width),
        "top": float(top / height),
        "right": float(right / width),
        "bottom": float(bottom / height),
    }


def _measure_colour(rgb: ImageU8, mask: NDArray[np.bool_]) -> dict[str, float]:
    mean = rgb[mask].mean(axis=0, dtype=np.float64) / 255
    lab = cv2.cvtColor(mean.astype(np.float32)[None, None], cv2.COLOR_RGB2LAB)[0, 0]
    return dict(zip(("lightness", "green_red", "blue_yellow"), map(float, lab), strict=True))
