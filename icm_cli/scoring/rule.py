"""The conventions of a score: over which region, at which size, and where alpha counts as unknown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from icm_cli.datasets.registry import Size
from icm_cli.geometry import UNKNOWN, ImageU8
from icm_cli.reports.scores import Lineage, Region

LONG_SIDE_PX = 1024
SQUARE_PX = 768


@dataclass(frozen=True)
class Rule:
    """The conventions that a score depends on; every report states them."""

    regions: tuple[Region, ...] = ("whole",)
    size: Size = "original"
    lineage: Lineage = "composition"
    trimap_kernel_px: int = 25
    """Side of the square that dilates 0 < alpha < 1 to unknown, at the scored size, where no trimap is published."""
    has_detail_maps: bool = False
    """Trimaps are detail maps: every pixel above 0 is unknown."""
    is_shots: bool = False
    """J and F are scored too, a frame may be empty, and of a palette every index above 0 is the thing."""

    def as_protocol(self) -> dict[str, Any]:
        """State the rule, for reports."""
        return {"regions": list(self.regions), "size": self.size, "lineage": self.lineage}


def scored_size(
    image: ImageU8, truth_shape: tuple[int, ...], size: Size, interpolation: int = cv2.INTER_LINEAR
) -> ImageU8:
    """Bring an alpha or trimap, uint8 [h,w], to the size at which it is scored.

    ``original`` is the ground truth's own size; ``long1024`` makes its long side 1024; ``square768`` takes the centre
    square and makes it 768 x 768 (the code of In-Context Matting). Bilinear, trimaps by nearest neighbour.
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
    return np.asarray(cv2.resize(image, (width, height), interpolation=interpolation), np.uint8)


def trimap_of(truth: ImageU8, kernel_px: int) -> ImageU8:
    """A trimap, uint8 [H,W] in 0, 128, 255, whose unknown is 0 < alpha < 1 dilated by a square kernel."""
    soft = ((truth > 0) & (truth < 255)).astype(np.uint8)
    unknown = cv2.dilate(soft, np.ones((kernel_px, kernel_px), np.uint8)) > 0
    return np.where(unknown, UNKNOWN, truth).astype(np.uint8)
