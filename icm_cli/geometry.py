"""From a frame to the model's canvas with its aspect ratio kept, and from the canvas back to every source pixel.

Nothing is cropped and nothing stretched. The frame lies in the canvas' top left corner; what is left over on the
right and below is edge replication, never reflection, which would double the object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar, cast

import cv2
import numpy as np
from numpy.typing import NDArray

ImageU8: TypeAlias = NDArray[np.uint8]
Float: TypeAlias = NDArray[np.float32]
Pixels = TypeVar("Pixels", ImageU8, Float)

HALF_U8 = 127
"""An alpha of uint8 above this is foreground."""
UNKNOWN = 128
"""The value of a trimap's unknown pixels."""
ASPECT_TOLERANCE = 0.01
"""Largest relative difference between the aspect ratios of pictures that count as one shape."""
SURE = 0.1
"""Coarse alphas this near to 0 or 1 are sure, but for the band along what is not."""


@dataclass(frozen=True)
class CanvasRule:
    """Canvas sizes of a backbone: the frame's long side is scaled to ``long_side_px``.

    A square canvas is ``long_side_px`` on both sides; otherwise each side is rounded up to ``multiple_px``.
    A frame is enlarged at most ``max_enlargement`` times, but its canvas has at least half of ``long_side_px``.
    """

    long_side_px: int
    multiple_px: int
    square: bool
    max_enlargement: float = math.inf
    min_side_px: int = 1
    """Neither side of the canvas is shorter: the layers of a backbone may need so much to see anything at all."""

    def placement(self, height: int, width: int) -> Placement:
        """Place a frame of height x width pixels."""
        scale = self._long_side(max(height, width)) / max(height, width)
        content = max(1, round(height * scale)), max(1, round(width * scale))
        if self.square:
            canvas = self.long_side_px, self.long_side_px
        else:
            height_px, width_px = (max(_round_up(side, self.multiple_px), self.min_side_px) for side in content)
            canvas = height_px, width_px
        return Placement((height, width), content, canvas)

    def _long_side(self, source: int) -> int:
        if self.max_enlargement * source >= self.long_side_px:
            return self.long_side_px
        return max(_round_up(math.ceil(self.max_enlargement * source), self.multiple_px), self.long_side_px // 2)


@dataclass(frozen=True)
class Placement:
    """A frame on a canvas; sizes are (height, width) in pixels."""

    source: tuple[int, int]
    content: tuple[int, int]
    canvas: tuple[int, int]

    def to_canvas(self, image: ImageU8) -> ImageU8:
        """uint8 [H,W,3] or [H,W] at the source's size -> the same on the canvas, padded by edge replication."""
        small = resize(image, self.content)
        below = self.canvas[0] - self.content[0]
        right = self.canvas[1] - self.content[1]
        if not (below or right):
            return small
        return cast(ImageU8, cv2.copyMakeBorder(small, 0, below, 0, right, cv2.BORDER_REPLICATE))

    def content_mask(self) -> NDArray[np.bool_]:
        """True on the canvas where the frame lies, False at padding."""
        mask = np.zeros(self.canvas, np.bool_)
        mask[: self.content[0], : self.content[1]] = True
        return mask

    def crop_to_content(self, alpha: Float) -> Float:
        """An alpha on the canvas without its padding."""
        return np.ascontiguousarray(alpha[: self.content[0], : self.content[1]])


def has_same_aspect(size: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a picture of (height, width) is another of ``expected`` scaled, but for rounding."""
    ratio = (size[1] / size[0]) / (expected[1] / expected[0])
    return abs(ratio - 1) <= ASPECT_TOLERANCE


def resize(image: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize to (height, width): area averaging where it shrinks, bicubic uint8 or bilinear float32 where it grows."""
    if image.shape[:2] == size:
        return image
    if size[0] * size[1] < image.shape[0] * image.shape[1]:
        how = cv2.INTER_AREA
    else:
        how = cv2.INTER_CUBIC if image.dtype == np.uint8 else cv2.INTER_LINEAR
    return cast(Pixels, cv2.resize(image, size[::-1], interpolation=how))


def downscaled_size(size: Sequence[int], long_side_px: int) -> tuple[int, int]:
    """(height, width) scaled down so that the longer is at most ``long_side_px``."""
    scale = min(1.0, long_side_px / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def binarize_alpha(alpha: ImageU8) -> ImageU8:
    """An alpha uint8 as 0 and 255, above and up to one half."""
    return np.where(alpha > HALF_U8, 255, 0).astype(np.uint8)


def round_to_u8(values: Float) -> ImageU8:
    """Values 0..255 (anything outside is clipped) -> uint8, rounded to nearest."""
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


def alpha_to_u8(alpha: Float) -> ImageU8:
    """Alpha 0..1 (anything outside is clipped) -> uint8 0..255, rounded to nearest."""
    return round_to_u8(alpha * np.float32(255.0))


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


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def _depth(inside: NDArray[np.bool_]) -> Float:
    """Distance in px of each pixel that is ``inside`` [H,W] from the nearest that is not; beyond the picture all is."""
    if inside.all():
        return np.full(inside.shape, np.inf, np.float32)
    return cast(Float, cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE))
