"""Conventions of scoring: regions, size, variant of the metrics, and unknown pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.geometry import UNKNOWN, ImageU8
from icm_cli.options import MetricVariant, Region, ScoredSize

ImageT = TypeVar("ImageT", ImageU8, NDArray[np.float64])
LONG_SIDE_PX = 1024
SQUARE_PX = 768
DECIMALS = 6
"""Resized alphas in 0..1 are rounded to this many decimals, which are finer than 16 bits."""


@dataclass(frozen=True)
class ScoringRule:
    """The conventions that a score depends on. Every report states them."""

    regions: tuple[Region, ...] = ("whole",)
    scored_size: ScoredSize = "original"
    metric_variant: MetricVariant = "composition"
    trimap_kernel_px: int = 25
    """Side of the square that dilates 0 < alpha < 1 to the unknown region, at the scored size.

    Published trimaps take precedence over generated ones.
    """
    has_detail_maps: bool = False
    """The published trimaps are detail maps: every pixel above 0 is unknown."""
    has_shots: bool = False
    """Score J and F, accept empty frames, and treat all palette indices above 0 as the object."""

    def as_protocol(self) -> dict[str, Any]:
        """Return the settings that reports compare."""
        return {"regions": list(self.regions), "size": self.scored_size, "metric_variant": self.metric_variant}


def resize_for_scoring(
    image: ImageT, truth_shape: tuple[int, ...], size: ScoredSize, interpolation: int = cv2.INTER_LINEAR
) -> ImageT:
    """Resize an alpha or trimap [h,w] to the size at which it is scored. Floats are not rounded to 8 bits.

    ``original`` is the size of the ground truth. ``long1024`` scales its long side to 1024 pixels.
    ``square768`` crops the centre square and scales it to 768 x 768 pixels, like the code of
    In-Context Matting.
    """
    height, width = truth_shape
    if size == "square768":
        side = min(image.shape)
        top, left = ((length - side) // 2 for length in image.shape)
        image = image[top : top + side, left : left + side]
        height = width = SQUARE_PX
    elif size == "long1024":
        scale = LONG_SIDE_PX / max(truth_shape)
        height, width = (max(1, round(length * scale)) for length in truth_shape)
    if image.shape == (height, width):
        return image
    resized = cv2.resize(image, (width, height), interpolation=interpolation)
    return cast(ImageT, resized.round(DECIMALS))  # so that constant regions keep their value


def make_trimap(truth: ImageU8, kernel_px: int) -> ImageU8:
    """Generate a trimap, uint8 [H,W] of 0, 128 and 255, from a true alpha.

    The unknown region is 0 < alpha < 1, dilated by a square of ``kernel_px``.
    """
    soft = ((truth > 0) & (truth < 255)).astype(np.uint8)
    unknown = cv2.dilate(soft, np.ones((kernel_px, kernel_px), np.uint8)) > 0
    return np.where(unknown, UNKNOWN, truth).astype(np.uint8)
