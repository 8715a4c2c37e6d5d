"""Fit frames into the model's canvas, resize images and alphas, and make trimaps.

A frame is neither cropped nor stretched. It fills the top left corner of the canvas. The rest is padded by replicating
the edge, because reflection would show the object twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

import cv2
import numpy as np
from numpy.typing import NDArray

ImageU8: TypeAlias = NDArray[np.uint8]
Float: TypeAlias = NDArray[np.float32]
ImageArray = TypeVar("ImageArray", ImageU8, Float)

HALF_U8 = 127
"""A uint8 alpha above this value is foreground."""
UNKNOWN = 128
"""Value of unknown pixels in a trimap."""
ASPECT_TOLERANCE = 0.01
"""Largest relative difference between aspect ratios that count as equal."""
ALPHA_TOLERANCE = 0.05
"""A final alpha within this distance of 0 or 1 counts as background or foreground in its trimap."""
COARSE_TOLERANCE = 0.1
"""A coarse alpha within this distance of 0 or 1 counts as background or foreground in its trimap."""


@dataclass(frozen=True)
class CanvasRule:
    """Canvas sizes of a backbone: the frame's long side is scaled to ``long_side_px``.

    A square canvas is ``long_side_px`` on both sides. Otherwise, each side is rounded up to a multiple of
    ``multiple_px``. A frame is enlarged at most ``max_enlargement`` times, unless its long side would be less than half
    of ``long_side_px``.
    """

    long_side_px: int
    multiple_px: int
    square: bool
    max_enlargement: float = math.inf
    min_side_px: int = 1
    """Smallest side of the canvas, which the layers of a backbone may need."""

    def placement(self, height: int, width: int) -> Placement:
        """Return the placement of a frame of height x width pixels."""
        scale = self._long_side(max(height, width)) / max(height, width)
        content = max(1, round(height * scale)), max(1, round(width * scale))
        if self.square:
            canvas = self.long_side_px, self.long_side_px
        else:
            canvas = self._canvas_side(content[0]), self._canvas_side(content[1])
        return Placement((height, width), content, canvas)

    def _canvas_side(self, content_side: int) -> int:
        """Return the side of a canvas that is not square, from the side of its content."""
        return max(_round_up(content_side, self.multiple_px), self.min_side_px)

    def _long_side(self, source: int) -> int:
        """Return the long side of the canvas for a frame whose long side is ``source`` px."""
        if self.max_enlargement * source >= self.long_side_px:
            return self.long_side_px
        return max(_round_up(math.ceil(self.max_enlargement * source), self.multiple_px), self.long_side_px // 2)


@dataclass(frozen=True)
class Placement:
    """The position of a frame on a canvas, as sizes (height, width) in pixels.

    Attributes:
        source: Size of the frame.
        content: Size of the resized frame, which is in the top left corner of the canvas.
        canvas: Size of the canvas.
    """

    source: tuple[int, int]
    content: tuple[int, int]
    canvas: tuple[int, int]

    def fit_to_canvas(self, image: ImageU8) -> ImageU8:
        """Resize uint8 [H,W,3] or [H,W] to ``content``, and pad it to the canvas by edge replication."""
        small = resize(image, self.content)
        below = self.canvas[0] - self.content[0]
        right = self.canvas[1] - self.content[1]
        if not (below or right):
            return small
        return cast(ImageU8, cv2.copyMakeBorder(small, 0, below, 0, right, cv2.BORDER_REPLICATE))

    def content_mask(self) -> NDArray[np.bool_]:
        """Return bool [H,W] of the canvas: True in the frame, False in the padding."""
        mask = np.zeros(self.canvas, np.bool_)
        mask[: self.content[0], : self.content[1]] = True
        return mask


def has_same_aspect(size: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return whether (height, width) has the aspect ratio of ``expected``, except for rounding."""
    ratio = (size[1] / size[0]) / (expected[1] / expected[0])
    return abs(ratio - 1) <= ASPECT_TOLERANCE


def format_size(shape: Sequence[int]) -> str:
    """Return the shape (height, width, ...) of an image as messages show it: WIDTHxHEIGHT."""
    return f"{shape[1]}x{shape[0]}"


def resize(image: ImageArray, size: tuple[int, int]) -> ImageArray:
    """Resize an image or alpha to (height, width).

    Pixels are averaged to make it smaller. To make it larger, uint8 values are interpolated bicubically, float32 values
    bilinearly.
    """
    height, width = size
    if image.shape[:2] == size:
        return image
    if height * width < image.shape[0] * image.shape[1]:
        interpolation = cv2.INTER_AREA
    elif image.dtype == np.uint8:
        interpolation = cv2.INTER_CUBIC
    else:
        interpolation = cv2.INTER_LINEAR
    return cast(ImageArray, cv2.resize(image, (width, height), interpolation=interpolation))


def downscaled_size(size: Sequence[int], long_side_px: int) -> tuple[int, int]:
    """Return (height, width) scaled down so that the longer side is at most ``long_side_px``."""
    scale = min(1.0, long_side_px / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def binarize_alpha(alpha: ImageU8) -> ImageU8:
    """Return a uint8 alpha as 255 above one half, else 0."""
    return np.where(alpha > HALF_U8, 255, 0).astype(np.uint8)


def round_to_u8(values: Float) -> ImageU8:
    """Round values to the nearest uint8; values outside 0..255 are clipped."""
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


def scale_to_u8(values: NDArray[Any], white: float) -> ImageU8:
    """Convert values in 0..``white`` to uint8; values outside are clipped."""
    return round_to_u8(values.astype(np.float32) * np.float32(255.0 / white))


def alpha_to_u8(alpha: Float) -> ImageU8:
    """Convert an alpha in 0..1 to uint8; values outside are clipped."""
    return round_to_u8(alpha * np.float32(255.0))


def trimap_from_coarse(coarse: Float, size: tuple[int, int], band_fraction: float) -> Float:
    """Return a trimap float32 [H,W] of ``size`` from a coarse alpha.

    Its values are 0 background, 0.5 unknown and 1 foreground. A pixel is background or foreground if all pixels nearer
    than the band are too. In a region of the object that is thinner than twice the band, the inner half is foreground,
    so that thin objects keep some foreground.

    ``coarse``: [h,w] in 0..1, of any size. ``band_fraction``: width of the band, as a fraction of the long side.
    """
    alpha = resize(coarse, size)
    band_px = max(1.0, band_fraction * max(size))
    trimap = np.full(size, 0.5, np.float32)
    trimap[distance_inside(alpha < COARSE_TOLERANCE) > band_px] = 0.0
    foreground = alpha > 1.0 - COARSE_TOLERANCE
    depth = distance_inside(foreground)
    region_count, labels = cv2.connectedComponents(foreground.astype(np.uint8))
    region = labels.astype(np.intp)  # of every pixel
    max_depth = np.zeros(region_count, np.float32)
    np.maximum.at(max_depth, region, depth)
    min_depth = np.minimum(band_px, max_depth[region] / 2)
    trimap[foreground & (depth > min_depth)] = 1.0
    return trimap


def trimap_from_alpha(alpha: Float, band_px: int) -> NDArray[np.uint8]:
    """Return the trimap, uint8 [H,W] of 0, 128 and 255, of an alpha [H,W] in 0..1.

    A pixel is background or foreground if all pixels within ``band_px`` are too. Otherwise it is unknown.
    """
    trimap = np.full(alpha.shape, UNKNOWN, np.uint8)
    trimap[distance_inside(alpha > 1.0 - ALPHA_TOLERANCE) > band_px] = 255
    trimap[distance_inside(alpha < ALPHA_TOLERANCE) > band_px] = 0
    return trimap


def _round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is not below ``value``."""
    return math.ceil(value / multiple) * multiple


def distance_inside(inside: NDArray[np.bool_]) -> Float:
    """Return the distance in px of every pixel of ``inside`` [H,W] to the nearest pixel outside it, float32 [H,W].

    Pixels beyond the image count as inside. The distances are infinite if there is no pixel outside.
    """
    if inside.all():
        return np.full(inside.shape, np.inf, np.float32)
    uses_ipp = cv2.ipp.useIPP()
    cv2.ipp.setUseIPP(False)  # the last bits of IPP's distances depend on the memory address of its output
    try:
        return cast(Float, cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE))
    finally:
        cv2.ipp.setUseIPP(uses_ipp)
