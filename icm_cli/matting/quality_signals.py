"""Signals of the quality of an alpha: measurements that need no ground truth.

:mod:`icm_cli.quality` estimates the quality of an alpha from them, and finds outliers of a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.geometry import Float, ImageU8, distance_inside, downscaled_size, resize

LONG_SIDE_PX = 256
"""Alphas whose long side is larger are reduced to this before signals are measured."""
DIGITS = 4
"""Decimal places of signals. They are rounded at once, so that signals read from a file equal measured ones."""
SOFT = (0.1, 0.9)
"""Pixels with an alpha between these values are soft: partly transparent or uncertain."""
INTERIOR_PX = 4.0
"""Pixels at least this far inside the outline of the reduced alpha are its interior."""


def measure_signals(
    rgb: ImageU8,
    alpha: Float,
    completed: Float,
    earlier: Mapping[str, Float],
    of_head: Mapping[str, float],
    *,
    shows_object: bool = False,
) -> dict[str, float]:
    """Return the signals of an alpha by name: those of the head, and those that are measured here.

    ``rgb`` is the image, sRGB uint8 [H,W,3]. All alphas are float32 [h,w] in 0..1. They may have any size and show the
    whole image. ``completed``: the alpha before its edges were refined. ``earlier``: other alphas of the image, by the
    name of the signal that compares ``alpha`` with them. ``shows_object``: whether a hint marks the object. Then the
    alpha is empty only if no pixel of it is above one half; else, if no pixel of the reduced alpha is.

    Signals of the head (``of_head``):

    - ``confidence``: confidence of the head;
    - ``presence``: logit of the probability that the object is in the image. Missing if the head does not predict it,
      or if a hint marks the object;
    - ``similarity``, ``background_similarity``: see :class:`icm_cli.model.contracts.Matte`;
    - ``object_similarity``: with ``--match same``, the similarity of the best object before others were removed.
      Missing if a hint marks the object.

    Signals that are measured here. If the alpha is empty, those from ``soft_interior`` on are missing:

    - ``aspect_ratio``: width / height of the image;
    - ``foreground``: mean of the alpha;
    - ``coarse_agreement``, ``completed_agreement``: IoU of the alpha with the coarse one, and with the completed one;
    - ``completed_confidence``: mean of |2a - 1| over the pixels of the completed alpha that are not background;
    - ``soft_interior``: fraction of the interior of the object that is soft or a hole;
    - ``largest_component``: fraction of the object that is in its largest connected part;
    - ``border``: length of the image border that the object covers, divided by the square root of the object's area;
    - ``left``, ``top``, ``right``, ``bottom``: bounding box of the object, as fractions of the image;
    - ``lightness``, ``green_red``, ``blue_yellow``: mean colour of the object, in CIELAB.
    """
    size = downscaled_size(rgb.shape[:2], LONG_SIDE_PX)
    reduced = resize(alpha, size)
    is_soft = (reduced > SOFT[0]) & (reduced < SOFT[1])
    signals = dict(of_head) | {
        "aspect_ratio": rgb.shape[1] / rgb.shape[0],
        "foreground": float(reduced.mean()),
        "completed_confidence": _confidence(resize(completed, size)),
    }
    signals |= {name: _soft_iou(resize(each, size), reduced) for name, each in earlier.items()}
    mask = reduced > 0.5
    if shows_object and not mask.any() and (alpha > 0.5).any():
        mask = reduced >= reduced.max()
    if mask.any():
        signals |= _measure_interior(mask, is_soft) | _measure_components(mask) | _measure_position(mask)
        signals |= _measure_colour(resize(rgb, size), mask)
    return {name: round(value, DIGITS) for name, value in signals.items()}


def _confidence(alpha: Float) -> float:
    """Return the mean of |2a - 1| over the pixels that are not background: 1 if all are opaque, 0 without any."""
    visible = alpha[alpha > SOFT[0]]
    return float(np.abs(2 * visible - 1).mean()) if visible.size else 0.0


def _soft_iou(one: Float, other: Float) -> float:
    """Return the IoU of two alphas: the sum of their minima divided by that of their maxima; 1 if both are empty."""
    union = float(np.maximum(one, other).sum())
    return float(np.minimum(one, other).sum()) / union if union > 0 else 1.0


def _measure_interior(mask: NDArray[np.bool_], is_soft: NDArray[np.bool_]) -> dict[str, float]:
    """Return the fraction of the interior of a mask that is soft or a hole."""
    filled = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8))
    depth = distance_inside(filled > 0)
    interior = depth > min(INTERIOR_PX, float(depth.max()) / 2)
    return {"soft_interior": float((is_soft | ~mask)[interior].mean())}


def _measure_components(mask: NDArray[np.bool_]) -> dict[str, float]:
    """Return the fraction of the mask that is in its largest connected component."""
    _, _, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return {"largest_component": float(statistics[1:, cv2.CC_STAT_AREA].max() / mask.sum())}


def _measure_position(mask: NDArray[np.bool_]) -> dict[str, float]:
    """Return the bounding box in fractions of the image, and the length of the image border that is in the mask.

    The length is divided by the square root of the area of the mask.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    height, width = mask.shape
    covered = mask[0].sum() + mask[-1].sum() + mask[:, 0].sum() + mask[:, -1].sum()
    return {
        "border": float(covered / math.sqrt(mask.sum())),
        "left": float(columns[0] / width),
        "top": float(rows[0] / height),
        "right": float((columns[-1] + 1) / width),
        "bottom": float((rows[-1] + 1) / height),
    }


def _measure_colour(rgb: ImageU8, mask: NDArray[np.bool_]) -> dict[str, float]:
    mean = rgb[mask].mean(axis=0, dtype=np.float64) / 255
    lab = cv2.cvtColor(mean.astype(np.float32)[None, None], cv2.COLOR_RGB2LAB)[0, 0]
    return dict(zip(("lightness", "green_red", "blue_yellow"), map(float, lab), strict=True))
