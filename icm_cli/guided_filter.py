"""Guided filters: a NumPy one that enlarges the alpha of a source, and a torch one that aligns a batch of soft alphas.

Both fit alpha = a . rgb + b in every window (He, Sun & Tang, "Guided Image Filtering", TPAMI 2013, equations 14-19) at
a reduced size, and apply the enlarged coefficients to the full image (He & Sun, "Fast Guided Filter", 2015). With the
same windows and epsilon they give the same alpha, except at the border of the image: there, the first one reflects the
image, and the second one averages fewer pixels.
"""

from __future__ import annotations

from typing import cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from icm_cli.config import GuidedFilterConfig
from icm_cli.geometry import Float, ImageU8, resize

STRIP_PIXELS = 1 << 20
"""Source pixels that are computed at a time. This limits the memory for sources of any size."""


def alpha_at_source(alpha: Float, image: ImageU8, config: GuidedFilterConfig) -> Float:
    """Return an alpha [h,w] of a frame at the size of its source.

    If the source has more pixels, the guided filter enlarges the alpha. Otherwise it is resized.

    Args:
        alpha: float32 [h,w] in 0..1, covers exactly the frame.
        image: The source, sRGB uint8 [H,W,3].
        config: Settings of the guided filter.
    """
    size = image.shape[0], image.shape[1]
    if alpha.shape == size:
        return alpha
    if size[0] * size[1] <= alpha.size:
        return resize(alpha, size)
    return guided_upsample(alpha, image, config)


def guided_upsample(alpha: Float, image: ImageU8, config: GuidedFilterConfig) -> Float:
    """Enlarge an alpha float32 [h,w] in 0..1 along the edges of its image, sRGB uint8 [H,W,3]; return float32 [H,W].

    The coefficients are fitted at the size of the alpha and enlarged bilinearly. Fine structures such as hair come from
    the pixels of the full-size image.
    """
    height, width = image.shape[:2]
    guide = resize(image, (alpha.shape[0], alpha.shape[1])).astype(np.float32) / 255.0
    coefficients = _fit_linear_model(guide, alpha, config)
    out = np.empty((height, width), np.float32)
    strip_rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, strip_rows):
        bottom = min(height, top + strip_rows)
        a_and_b = _upsample_rows(coefficients, top, bottom, height, width)
        strip = image[top:bottom].astype(np.float32) / 255.0
        out[top:bottom] = np.einsum("hwc,hwc->hw", a_and_b[..., :3], strip) + a_and_b[..., 3]
    return np.clip(out, 0.0, 1.0, out=out)


def _fit_linear_model(guide: Float, alpha: Float, config: GuidedFilterConfig) -> Float:
    """Return the coefficients [h,w,4] of alpha = a . rgb + b, averaged over all windows that contain a pixel."""

    def mean(values: Float) -> Float:
        side = 2 * config.radius_px + 1
        return cast(Float, cv2.blur(values, (side, side), borderType=cv2.BORDER_REFLECT))

    mean_guide, mean_alpha = mean(guide), mean(alpha)
    covariance = mean(guide * alpha[..., None]) - mean_guide * mean_alpha[..., None]
    products = np.stack([guide[..., i] * guide[..., j] for i, j in _CHANNEL_PAIRS], axis=-1)
    moments = np.concatenate([mean(products[..., :3]), mean(products[..., 3:])], axis=-1)
    # The variance of red, green and blue, a symmetric 3 x 3 matrix at every pixel.
    rr, rg, rb, gg, gb, bb = (
        moments[..., n] - mean_guide[..., i] * mean_guide[..., j] for n, (i, j) in enumerate(_CHANNEL_PAIRS)
    )
    rr, gg, bb = rr + config.epsilon, gg + config.epsilon, bb + config.epsilon
    # Its inverse is written out as cofactors (c_) and determinant: one solve per pixel is far slower.
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


_CHANNEL_PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
"""Upper triangle of the variance of red, green and blue."""


def _upsample_rows(coefficients: Float, top: int, bottom: int, height: int, width: int) -> Float:
    """Return rows ``top`` to ``bottom`` (excluded) of the coefficients, enlarged bilinearly to height x width."""
    rows = coefficients.shape[0]
    centres = np.arange(top, bottom, dtype=np.float32) + 0.5
    y = np.clip(centres * (rows / height) - 0.5, 0, rows - 1)  # rows of the coefficients
    above = np.floor(y).astype(np.intp)
    below = np.minimum(above + 1, rows - 1)
    weight = (y - above)[:, None, None]
    mixed = coefficients[above] * (1 - weight) + coefficients[below] * weight
    return cast(Float, cv2.resize(mixed, (width, bottom - top), interpolation=cv2.INTER_LINEAR))


def align_to_edges(alpha: Tensor, image: Tensor, radius_fraction: float, epsilon: float, stride: int) -> Tensor:
    """Align the soft edges of a batch of alphas with the edges of their images.

    Args:
        alpha: float32 [B,1,H,W] in 0..1.
        image: float32 [B,3,H,W] in 0..1.
        radius_fraction: Radius of the window, as a fraction of the long side. It is wide, because edges are soft.
        epsilon: Variance of a colour channel above which a window counts as an edge.
        stride: The coefficients are fitted on an image that is this many times smaller.

    Returns:
        float32 [B,1,H,W] in 0..1, on the same device.
    """
    guide, soft = F.avg_pool2d(image, stride), F.avg_pool2d(alpha, stride)
    radius = max(1, round(radius_fraction * max(guide.shape[-2:])))

    def mean(values: Tensor) -> Tensor:
        rows = F.avg_pool2d(values, (1, 2 * radius + 1), 1, (0, radius), count_include_pad=False)
        return F.avg_pool2d(rows, (2 * radius + 1, 1), 1, (radius, 0), count_include_pad=False)

    mean_guide, mean_soft = mean(guide), mean(soft)
    covariance = mean(guide * soft) - mean_guide * mean_soft
    variance = mean((guide[:, :, None] * guide[:, None]).flatten(1, 2)).unflatten(1, (3, 3))  # type: ignore[no-untyped-call]
    variance = variance - mean_guide[:, :, None] * mean_guide[:, None]
    variance = variance + epsilon * torch.eye(3, device=image.device)[..., None, None]
    red, green, blue = variance.unbind(dim=1)  # the rows of the 3 x 3 matrix, whose inverse has their cross products
    inverse = torch.stack([_cross_product(green, blue), _cross_product(blue, red), _cross_product(red, green)], dim=1)
    determinant = (red * inverse[:, 0]).sum(dim=1, keepdim=True)
    a = (inverse * covariance[:, :, None]).sum(dim=1) / determinant
    b = mean_soft - (a * mean_guide).sum(dim=1, keepdim=True)
    fit = F.interpolate(mean(torch.cat([a, b], dim=1)), size=image.shape[-2:], mode="bilinear", align_corners=False)
    return ((fit[:, :3] * image).sum(dim=1, keepdim=True) + fit[:, 3:]).clamp(0.0, 1.0)


def _cross_product(first: Tensor, second: Tensor) -> Tensor:
    """Cross product of vectors [B,3,H,W]."""
    return torch.linalg.cross(first, second, dim=1)
