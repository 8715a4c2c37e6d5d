"""The guided filter, twice: in torch for a batch on the model's device, and in NumPy for one source in a thread.

He, Sun & Tang, "Guided Image Filtering", TPAMI 2013, equations 14-19, and He & Sun, "Fast Guided Filter", 2015. Where
windows, sizes and epsilon are the same both give the same alpha; a test holds that.
"""

from __future__ import annotations

from typing import cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from icm_cli.geometry import Float, ImageU8, Placement, resize

GUIDED_RADIUS_PX = 2
"""Radius of the guided filter's window, in pixels of the canvas."""
GUIDED_EPSILON = 1e-4
"""Regularisation of the guided filter: the variance of a colour channel (0..1) that counts as an edge."""
STRIP_PIXELS = 1 << 20
"""Source pixels refined at a time: bounds the working memory at any source size."""


def constants() -> str:
    """All numbers of this file that decide an alpha, for the digest of a run."""
    return f"guided filter: radius {GUIDED_RADIUS_PX}, epsilon {GUIDED_EPSILON}, stride {GUIDED_STRIDE}"


def alpha_at_source(alpha: Float, placement: Placement, image: ImageU8) -> Float:
    """Bring an alpha float32 0..1 on the canvas to its source's size, its edges refined by the source image."""
    inside = placement.crop_to_content(alpha)
    if placement.content == placement.source:
        return inside
    if placement.source[0] * placement.source[1] <= inside.size:
        return resize(inside, placement.source)
    return guided_upsample(inside, image)


def guided_upsample(alpha: Float, image: ImageU8) -> Float:
    """Bring an alpha up to its image's size along the image's edges.

    The guided filter with a colour guide (He, Sun & Tang, "Guided Image Filtering", TPAMI 2013, equations 14-19)
    in its fast form (He & Sun 2015): alpha = a . rgb + b locally; a and b are fitted at the alpha's size, then
    brought up bilinearly and applied to the full-resolution image, so hair comes from the image's own pixels.

    alpha float32 [h,w] 0..1, image sRGB uint8 [H,W,3] -> float32 [H,W] 0..1.
    """
    height, width = image.shape[:2]
    guide = resize(image, (alpha.shape[0], alpha.shape[1])).astype(np.float32) / 255.0
    coefficients = _local_linear_fit(guide, alpha)
    out = np.empty((height, width), np.float32)
    rows_at_a_time = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows_at_a_time):
        bottom = min(height, top + rows_at_a_time)
        a = _rows_upsampled(coefficients, top, bottom, height, width)
        strip = image[top:bottom].astype(np.float32) / 255.0
        out[top:bottom] = np.einsum("hwc,hwc->hw", a[..., :3], strip) + a[..., 3]
    return np.clip(out, 0.0, 1.0, out=out)


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


GUIDED_STRIDE = 4
"""Pixels of the canvas for one of the guided filter's fit."""


def along_edges(alpha: Tensor, image: Tensor, radius_share: float, epsilon: float) -> Tensor:
    """An alpha whose edges are soft, brought to the image's edges by the guided filter with a wide window.

    alpha [B,1,H,W] and image [B,3,H,W] in 0..1, float32 -> [B,1,H,W] in 0..1. ``radius_share``: radius of the window
    as a share of the long side; ``epsilon``: the variance of a colour channel that counts as an edge. The fit is made
    at a quarter of the size (He & Sun, "Fast Guided Filter", 2015; the colour guide of He, Sun & Tang, TPAMI 2013,
    equations 14-19). It is part of a head: on the model's device, for a batch; guided_upsample brings any
    alpha to its source's size.
    """
    guide, soft = F.avg_pool2d(image, GUIDED_STRIDE), F.avg_pool2d(alpha, GUIDED_STRIDE)
    radius = max(1, round(radius_share * max(guide.shape[-2:])))

    def mean(values: Tensor) -> Tensor:
        rows = F.avg_pool2d(values, (1, 2 * radius + 1), 1, (0, radius), count_include_pad=False)
        return F.avg_pool2d(rows, (2 * radius + 1, 1), 1, (radius, 0), count_include_pad=False)

    mean_guide, mean_soft = mean(guide), mean(soft)
    covariance = mean(guide * soft) - mean_guide * mean_soft
    variance = mean((guide[:, :, None] * guide[:, None]).flatten(1, 2)).unflatten(1, (3, 3))  # type: ignore[no-untyped-call]
    variance = variance - mean_guide[:, :, None] * mean_guide[:, None]
    variance = variance + epsilon * torch.eye(3, device=image.device)[..., None, None]
    red, green, blue = variance.unbind(dim=1)
    inverse = torch.stack([_cross(green, blue), _cross(blue, red), _cross(red, green)], dim=1)
    determinant = (red * inverse[:, 0]).sum(dim=1, keepdim=True)
    a = (inverse * covariance[:, :, None]).sum(dim=1) / determinant
    b = mean_soft - (a * mean_guide).sum(dim=1, keepdim=True)
    fit = F.interpolate(mean(torch.cat([a, b], dim=1)), size=image.shape[-2:], mode="bilinear", align_corners=False)
    return ((fit[:, :3] * image).sum(dim=1, keepdim=True) + fit[:, 3:]).clamp(0.0, 1.0)


def _cross(one: Tensor, other: Tensor) -> Tensor:
    return torch.linalg.cross(one, other, dim=1)
