"""Augmentation of pictures and guidance: where a picture lies on the canvas, its colours, its damage, its mask.

Every function draws from the generator it is given and from nothing else.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.geometry import HALF_U8, Float, ImageU8, round_to_u8
from icm_cli.training.settings import AugmentConfig, PairConfig

Rng = np.random.Generator
Affine = NDArray[np.float64]
"""[2,3]: from (x, y) in a layer to (x, y) on the canvas."""
MOST_JITTER = 1 / 40
"""Largest change of a guidance mask's outline, in canvas sides."""
STROKE_WIDTH = 1 / 40
"""Width of a scribble, in canvas sides; a point is as wide."""


def place_photograph(size: tuple[int, int], canvas_px: int, config: AugmentConfig, rng: Rng) -> Affine:
    """Lay a picture over the canvas: its long side at least as long, a random part of what is too large.

    Where a side is shorter than the canvas' the picture lies anywhere along it.
    """
    zoom = config.zoom ** rng.random()
    scale = canvas_px / max(size) * zoom
    content = np.array([size[1], size[0]]) * scale
    spare = content - canvas_px
    corner = -spare * rng.random(2)
    return _affine(np.array([size[1], size[0]]) / 2, corner + content / 2, scale, config, rng)


def place_cutout(size: tuple[int, int], canvas_px: int, config: AugmentConfig, rng: Rng, largest: float) -> Affine:
    """Put a cut-out anywhere: a quarter of the canvas to ``largest`` of it long, at most a tenth of it outside."""
    long_side = canvas_px * rng.uniform(0.25, largest)
    scale = long_side / max(size)
    content = np.array([size[1], size[0]]) * scale
    lowest, highest = 0.4 * content, canvas_px - 0.4 * content
    centre = rng.uniform(np.minimum(lowest, highest), np.maximum(lowest, highest))
    return _affine(np.array([size[1], size[0]]) / 2, centre, scale, config, rng)


def _affine(source_centre: Affine, centre: Affine, scale: float, config: AugmentConfig, rng: Rng) -> Affine:
    angle = np.deg2rad(rng.uniform(-1, 1) * config.rotate_degrees)
    aspect, shear = rng.uniform(-1, 1, 2) * config.stretch
    mirror = -1.0 if rng.random() < config.flip else 1.0
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = scale * turn @ np.array([[mirror * (1 + aspect / 2), shear], [0.0, 1 - aspect / 2]])
    return np.concatenate([linear, (centre - linear @ source_centre)[:, None]], axis=1)


def recolour(rgb: ImageU8, amount: float, rng: Rng) -> ImageU8:
    """Change brightness, contrast, saturation and white balance of a picture uint8 [H,W,3] by up to ``amount`` each."""
    brightness, contrast, saturation = 1 + rng.uniform(-1, 1, 3) * amount
    balance = 1 + rng.uniform(-1, 1, 3) * amount / 3
    image = rgb.astype(np.float32) * (brightness * balance).astype(np.float32)
    grey = image.mean(axis=-1, keepdims=True)
    image = grey + (image - grey) * np.float32(saturation)
    image = image.mean() + (image - image.mean()) * np.float32(contrast)
    return _to_u8(image)


def damage(rgb: ImageU8, config: AugmentConfig, rng: Rng) -> ImageU8:
    """Blur, noise and JPEG compression of a picture uint8 [H,W,3], each at its share."""
    if rng.random() < config.blur:
        rgb = np.asarray(cv2.GaussianBlur(rgb, (0, 0), rng.uniform(0.4, 1.6)), np.uint8)
    if rng.random() < config.noise:
        noise = rng.standard_normal(rgb.shape, np.float32) * np.float32(rng.uniform(1, 10))
        rgb = _to_u8(rgb + noise)
    if rng.random() < config.jpeg:
        quality = int(rng.integers(40, 95))
        _, coded = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        rgb = np.ascontiguousarray(np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR))[..., ::-1], np.uint8)
    return rgb


def jittered_guidance(alpha: ImageU8, config: PairConfig, rng: Rng) -> NDArray[np.bool_]:
    """Guidance bool [H,W] from a reference's alpha uint8: its mask, perhaps jittered, or a scribble or a point in it.

    Never empty where any pixel of the alpha is above half.
    """
    mask = (alpha > HALF_U8).astype(np.uint8)
    kind = rng.random()
    if kind < config.point_share:
        return _marked(mask, _inner_points(mask, 1, rng))
    if kind < config.point_share + config.scribble_share:
        return _marked(mask, _inner_points(mask, int(rng.integers(3, 6)), rng))
    if rng.random() < config.mask_jitter:
        return _jittered(mask, rng)
    return mask > 0


def _jittered(mask: ImageU8, rng: Rng) -> NDArray[np.bool_]:
    """Grown, shrunk or shifted; as it was where nothing would be left."""
    reach = max(1, round(mask.shape[0] * MOST_JITTER * rng.random()))
    how = rng.integers(3)
    if how < 2:
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
        changed = cv2.dilate(mask, kernel) if how == 0 else cv2.erode(mask, kernel)
    else:
        dx, dy = rng.integers(-reach, reach + 1, 2)
        changed = cv2.warpAffine(mask, np.array([[1, 0, dx], [0, 1, dy]], np.float32), mask.shape[::-1])
    jittered: NDArray[np.bool_] = np.asarray(changed) > 0
    return jittered if jittered.any() else mask > 0


def _inner_points(mask: ImageU8, count: int, rng: Rng) -> NDArray[np.int32]:
    """Points (x, y) of the mask, the likelier the deeper inside."""
    depth = cv2.distanceTransform(mask, cv2.DIST_L2, 3).astype(np.float64).ravel()
    if not depth.any():
        return np.zeros((0, 2), np.int32)
    chosen = rng.choice(depth.size, count, p=depth / depth.sum())
    return np.stack([chosen % mask.shape[1], chosen // mask.shape[1]], axis=-1).astype(np.int32)


def _marked(mask: ImageU8, points: NDArray[np.int32]) -> NDArray[np.bool_]:
    """A stroke through the points that stays inside the mask."""
    stroke = np.zeros_like(mask)
    width = max(1, round(mask.shape[0] * STROKE_WIDTH))
    for x, y in points:
        cv2.circle(stroke, (int(x), int(y)), max(1, width // 2), 1, -1)
    if len(points) > 1:
        cv2.polylines(stroke, [points], isClosed=False, color=1, thickness=width)
    return (stroke > 0) & (mask > 0)


def _to_u8(image: Float) -> ImageU8:
    return round_to_u8(image)
