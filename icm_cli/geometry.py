"""From a frame to the model's canvas with its aspect ratio kept, and from the canvas back to every source pixel.

Nothing is cropped and nothing stretched. The frame lies in the canvas' top left corner; what is left over on the
right and below is edge replication, never reflection, which would double the object.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias, TypeVar, cast

import cv2
import numpy as np
from numpy.typing import NDArray

ImageU8: TypeAlias = NDArray[np.uint8]
Float: TypeAlias = NDArray[np.float32]
Pixels = TypeVar("Pixels", ImageU8, Float)

GUIDED_RADIUS_PX = 2
"""Radius of the guided filter's window, in pixels of the canvas."""
GUIDED_EPSILON = 1e-4
"""Regularisation of the guided filter: the variance of a colour channel (0..1) that counts as an edge."""
STRIP_PIXELS = 1 << 20
"""Source pixels refined at a time: bounds the working memory at any source size."""


@dataclass(frozen=True)
class CanvasRule:
    """Which canvas sizes a backbone takes: the frame's long side is scaled to ``long_side_px``.

    A square canvas is ``long_side_px`` on both sides; otherwise each side is rounded up to ``multiple_px``. A frame
    that would grow to more than ``enlarge`` times its size gets a smaller canvas, but not below half of that: there is
    nothing more in it to see.
    """

    long_side_px: int
    multiple_px: int
    square: bool
    enlarge: float = math.inf
    least_px: int = 1
    """Neither side of the canvas is shorter: the layers of a backbone may need so much to see anything at all."""

    def place(self, height: int, width: int) -> Placement:
        """Where a frame of height x width pixels goes."""
        scale = self._long_side(max(height, width)) / max(height, width)
        content = max(1, round(height * scale)), max(1, round(width * scale))
        if self.square:
            canvas = self.long_side_px, self.long_side_px
        else:
            height_px, width_px = (max(_round_up(side, self.multiple_px), self.least_px) for side in content)
            canvas = height_px, width_px
        return Placement((height, width), content, canvas)

    def _long_side(self, source: int) -> int:
        if self.enlarge * source >= self.long_side_px:
            return self.long_side_px
        return max(_round_up(math.ceil(self.enlarge * source), self.multiple_px), self.long_side_px // 2)


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

    def valid(self) -> NDArray[np.bool_]:
        """True on the canvas where the frame lies, False at padding."""
        mask = np.zeros(self.canvas, np.bool_)
        mask[: self.content[0], : self.content[1]] = True
        return mask

    def inside(self, alpha: Float) -> Float:
        """An alpha on the canvas without its padding."""
        return np.ascontiguousarray(alpha[: self.content[0], : self.content[1]])

    def to_source(self, alpha: Float, image: ImageU8) -> ImageU8:
        """Alpha float32 0..1 on the canvas -> uint8 at the source's size, its edges refined by the source image."""
        inside = self.inside(alpha)
        if self.content == self.source:
            return to_u8(inside)
        if self.source[0] * self.source[1] <= inside.size:
            return to_u8(resize(inside, self.source))
        return guided_upsample(inside, image)


def resize(image: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize to (height, width): area averaging where it shrinks, bicubic uint8 or bilinear float32 where it grows."""
    if image.shape[:2] == size:
        return image
    if size[0] * size[1] < image.shape[0] * image.shape[1]:
        how = cv2.INTER_AREA
    else:
        how = cv2.INTER_CUBIC if image.dtype == np.uint8 else cv2.INTER_LINEAR
    return cast(Pixels, cv2.resize(image, size[::-1], interpolation=how))


def guided_upsample(alpha: Float, image: ImageU8) -> ImageU8:
    """Bring an alpha up to its image's size along the image's edges.

    The guided filter with a colour guide (He, Sun & Tang, "Guided Image Filtering", TPAMI 2013, equations 14-19)
    in its fast form (He & Sun 2015): alpha = a . rgb + b locally; a and b are fitted at the alpha's size, then
    brought up bilinearly and applied to the full-resolution image, so hair comes from the image's own pixels.

    alpha float32 [h,w] 0..1, image sRGB uint8 [H,W,3] -> uint8 [H,W].
    """
    height, width = image.shape[:2]
    guide = resize(image, (alpha.shape[0], alpha.shape[1])).astype(np.float32) / 255.0
    coefficients = _local_linear_fit(guide, alpha)
    out = np.empty((height, width), np.uint8)
    rows_at_a_time = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows_at_a_time):
        bottom = min(height, top + rows_at_a_time)
        a = _rows_upsampled(coefficients, top, bottom, height, width)
        strip = image[top:bottom].astype(np.float32) / 255.0
        out[top:bottom] = to_u8(np.einsum("hwc,hwc->hw", a[..., :3], strip) + a[..., 3])
    return out


def to_u8(alpha: Float) -> ImageU8:
    """Alpha 0..1 (anything outside is clipped) -> uint8 0..255, rounded to nearest."""
    return cast(ImageU8, np.clip(alpha * 255.0 + 0.5, 0, 255).astype(np.uint8))


def _local_linear_fit(guide: Float, alpha: Float) -> Float:
    """Coefficients [h,w,4] of alpha = a . rgb + b in each window, averaged over the windows that hold a pixel."""

    def mean(values: Float) -> Float:
        size = 2 * GUIDED_RADIUS_PX + 1
        return cast(Float, cv2.blur(values, (size, size), borderType=cv2.BORDER_REFLECT))

    mean_guide, mean_alpha = mean(guide), mean(alpha)
    covariance = mean(guide * alpha[..., None]) - mean_guide * mean_alpha[..., None]
    products = np.stack([guide[..., i] * guide[..., j] for i, j in _UPPER], axis=-1)
    moments = np.concatenate([mean(products[..., :3]), mean(products[..., 3:])], axis=-1)
    rr, rg, rb, gg, gb, bb = (
        moments[..., n] - mean_guide[..., i] * mean_guide[..., j] for n, (i, j) in enumerate(_UPPER)
    )
    rr, gg, bb = rr + GUIDED_EPSILON, gg + GUIDED_EPSILON, bb + GUIDED_EPSILON
    # The inverse of the symmetric 3 x 3 variance, written out: one solve a pixel is far slower.
    c_rr, c_rg, c_rb = gg * bb - gb * gb, gb * rb - rg * bb, rg * gb - gg * rb
    c_gg, c_gb, c_bb = rr * bb - rb * rb, rb * rg - rr * gb, rr * gg - rg * rg
    determinant = rr * c_rr + rg * c_rg + rb * c_rb
    cr, cg, cb = covariance[..., 0], covariance[..., 1], covariance[..., 2]
    a = np.stack(
        [
            (c_rr * cr + c_rg * cg + c_rb * cb) / determinant,
            (c_rg * cr + c_gg * cg + c_gb * cb) / determinant,
            (c_rb * cr + c_gb * cg + c_bb * cb) / determinant,
        ],
        axis=-1,
    )
    b = mean_alpha - np.einsum("hwc,hwc->hw", a, mean_guide)
    return mean(np.concatenate([a, b[..., None]], axis=-1, dtype=np.float32))


_UPPER = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))


def _rows_upsampled(coefficients: Float, top: int, bottom: int, height: int, width: int) -> Float:
    """Rows top..bottom of the coefficients brought bilinearly to height x width (pixel centres aligned)."""
    rows = coefficients.shape[0]
    y = np.clip((np.arange(top, bottom, dtype=np.float32) + 0.5) * (rows / height) - 0.5, 0, rows - 1)
    above = np.floor(y).astype(np.intp)
    below = np.minimum(above + 1, rows - 1)
    weight = (y - above)[:, None, None]
    mixed = coefficients[above] * (1 - weight) + coefficients[below] * weight
    return cast(Float, cv2.resize(mixed, (width, bottom - top), interpolation=cv2.INTER_LINEAR))


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
