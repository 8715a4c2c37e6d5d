"""Augmentation of images and guidance masks: position on the canvas, colour, image quality, mask errors.

Every function draws random numbers only from the generator that it is given.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.geometry import HALF_U8, ImageU8, round_to_u8
from icm_cli.training.settings import AugmentConfig, PairConfig

Rng = np.random.Generator
Affine = NDArray[np.float64]
"""[2,3]: maps (x, y) in an image to (x, y) on the canvas."""
MAX_JITTER = 1 / 40
"""Largest displacement of a guidance mask's outline, as a fraction of the canvas' side."""
STROKE_WIDTH = 1 / 40
"""Width of a scribble or a point, as a fraction of the canvas' side."""


def draw_photograph_transform(size: tuple[int, int], canvas_px: int, config: AugmentConfig, rng: Rng) -> Affine:
    """Draw a transform of a photograph of ``size`` (height, width) to the canvas.

    Its long side becomes at least as long as the canvas. A side that is longer than the canvas is cropped at a random
    position, a side that is shorter is placed at a random position.
    """
    zoom = config.zoom ** rng.random()  # 1 to config.zoom
    scale = canvas_px / max(size) * zoom
    scaled = np.array([size[1], size[0]]) * scale
    corner = (canvas_px - scaled) * rng.random(2)  # negative: cropped; positive: placed inside the canvas
    return _draw_affine(np.array([size[1], size[0]]) / 2, corner + scaled / 2, scale, config, rng)


def draw_cutout_transform(
    size: tuple[int, int], canvas_px: int, config: AugmentConfig, rng: Rng, largest: float
) -> Affine:
    """Draw a transform of a cut-out of ``size`` (height, width) to the canvas.

    Its long side becomes a quarter to ``largest`` of the canvas' side. At most a tenth of each side is outside the
    canvas.
    """
    long_side = canvas_px * rng.uniform(0.25, largest)
    scale = long_side / max(size)
    scaled = np.array([size[1], size[0]]) * scale
    # A centre 0.4 of a side from the edge of the canvas leaves 0.1 of that side outside.
    lowest, highest = 0.4 * scaled, canvas_px - 0.4 * scaled
    centre = rng.uniform(np.minimum(lowest, highest), np.maximum(lowest, highest))
    return _draw_affine(np.array([size[1], size[0]]) / 2, centre, scale, config, rng)


def _draw_affine(source_centre: Affine, centre: Affine, scale: float, config: AugmentConfig, rng: Rng) -> Affine:
    """Draw rotation, stretch and mirroring about ``source_centre``, which is mapped to ``centre``."""
    angle = np.deg2rad(rng.uniform(-1, 1) * config.rotate_degrees)
    aspect, shear = rng.uniform(-1, 1, 2) * config.stretch
    mirror = -1.0 if rng.random() < config.flip else 1.0
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = scale * rotation @ np.array([[mirror * (1 + aspect / 2), shear], [0.0, 1 - aspect / 2]])
    return np.concatenate([linear, (centre - linear @ source_centre)[:, None]], axis=1)


def jitter_colours(rgb: ImageU8, amount: float, rng: Rng) -> ImageU8:
    """Change brightness, contrast, saturation and white balance of an image, uint8 [H,W,3], by up to ``amount``."""
    brightness, contrast, saturation = 1 + rng.uniform(-1, 1, 3) * amount
    balance = 1 + rng.uniform(-1, 1, 3) * amount / 3
    image = rgb.astype(np.float32) * (brightness * balance).astype(np.float32)
    grey = image.mean(axis=-1, keepdims=True)
    image = grey + (image - grey) * np.float32(saturation)
    image = image.mean() + (image - image.mean()) * np.float32(contrast)
    return round_to_u8(image)


def degrade_image(rgb: ImageU8, config: AugmentConfig, rng: Rng) -> ImageU8:
    """Apply blur, noise and JPEG compression to an image, uint8 [H,W,3], each with its probability."""
    if rng.random() < config.blur:
        rgb = np.asarray(cv2.GaussianBlur(rgb, (0, 0), rng.uniform(0.4, 1.6)), np.uint8)
    if rng.random() < config.noise:
        noise = rng.standard_normal(rgb.shape, np.float32) * np.float32(rng.uniform(1, 10))
        rgb = round_to_u8(rgb + noise)
    if rng.random() < config.jpeg:
        quality = int(rng.integers(40, 95))
        _, encoded = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        rgb = np.ascontiguousarray(np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))[..., ::-1], np.uint8)
    return rgb


def draw_guidance(alpha: ImageU8, config: PairConfig, rng: Rng) -> NDArray[np.bool_]:
    """Return the guidance, bool [H,W], for a reference's alpha, uint8 [H,W].

    It is the mask, which may be jittered, or a scribble or a point inside it. It is not empty if any pixel of the alpha
    is above one half.
    """
    mask = (alpha > HALF_U8).astype(np.uint8)
    kind = rng.random()
    if kind < config.point_probability:
        return _draw_stroke(mask, _draw_inner_points(mask, 1, rng))
    if kind < config.point_probability + config.scribble_probability:
        return _draw_stroke(mask, _draw_inner_points(mask, int(rng.integers(3, 6)), rng))
    if rng.random() < config.mask_jitter_probability:
        return _jitter_mask(mask, rng)
    return mask > 0


def _jitter_mask(mask: ImageU8, rng: Rng) -> NDArray[np.bool_]:
    """Dilate, erode or shift a mask; return it unchanged if nothing would be left."""
    reach = max(1, round(mask.shape[0] * MAX_JITTER * rng.random()))
    kind = rng.integers(3)
    if kind < 2:
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
        changed = cv2.dilate(mask, kernel) if kind == 0 else cv2.erode(mask, kernel)
    else:
        dx, dy = rng.integers(-reach, reach + 1, 2)
        changed = cv2.warpAffine(mask, np.array([[1, 0, dx], [0, 1, dy]], np.float32), mask.shape[::-1])
    jittered: NDArray[np.bool_] = np.asarray(changed) > 0
    return jittered if jittered.any() else mask > 0


def _draw_inner_points(mask: ImageU8, count: int, rng: Rng) -> NDArray[np.int32]:
    """Draw points (x, y) of a mask, with a probability proportional to the distance from its outline."""
    depth = cv2.distanceTransform(mask, cv2.DIST_L2, 3).astype(np.float64).ravel()
    if not depth.any():
        return np.zeros((0, 2), np.int32)
    chosen = rng.choice(depth.size, count, p=depth / depth.sum())
    return np.stack([chosen % mask.shape[1], chosen // mask.shape[1]], axis=-1).astype(np.int32)


def _draw_stroke(mask: ImageU8, points: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return a stroke through points, restricted to the mask."""
    stroke = np.zeros_like(mask)
    width = max(1, round(mask.shape[0] * STROKE_WIDTH))
    for x, y in points:
        cv2.circle(stroke, (int(x), int(y)), max(1, width // 2), 1, -1)
    if len(points) > 1:
        cv2.polylines(stroke, [points], isClosed=False, color=1, thickness=width)
    return (stroke > 0) & (mask > 0)
