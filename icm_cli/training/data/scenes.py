"""Scenes: an image on the canvas with its alpha. A photograph or a composite, with distractors pasted in.

Sizes are (height, width). The colours of a cut-out are premultiplied, so that warping adds no colour from outside the
object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from cachetools import LRUCache, cached
from numpy.typing import NDArray

from icm_cli.errors import ImageError
from icm_cli.geometry import (
    HALF_U8,
    UNKNOWN,
    CanvasRule,
    Float,
    ImageU8,
    binarize_alpha,
    downscaled_size,
    format_size,
    resize,
    round_to_u8,
)
from icm_cli.images.reading import HAS_COLOUR, read_ground_truth, read_image
from icm_cli.model.training_free.closed_form import load_foreground_estimator
from icm_cli.scoring.metrics import UNKNOWN_RANGE
from icm_cli.training.data.augment import (
    Affine,
    Rng,
    degrade_image,
    draw_cutout_transform,
    draw_photograph_transform,
    jitter_colours,
)
from icm_cli.training.data.pool import TrainingItem, TrainingPool
from icm_cli.training.settings import TrainConfig

CACHE_BYTES = 500_000_000
"""Memory of each cache of decoded items, per process."""
VISIBLE_U8 = 8
"""Pixels with an alpha above this are inside the bounding box of a cut-out."""
MAX_PLACEMENTS = 6
"""Number of random placements that are tried."""
MIN_VISIBLE_FRACTION = 0.4
"""Fraction of an object that must be visible on the canvas."""
MAX_HIDDEN_FRACTION = (1 - MIN_VISIBLE_FRACTION) / 2
"""Fraction of the target object that a distractor may hide."""
MAX_OBJECT_SIDE = 0.95
"""Longest side of a composited object, as a fraction of the canvas' side."""
MAX_DISTRACTOR_SIDE = 0.6
"""Longest side of a distractor, as a fraction of the canvas' side."""


def _size_bytes(layer: object) -> int:
    """Return the memory of the arrays of a layer."""
    arrays = [layer] if isinstance(layer, np.ndarray) else vars(layer).values()
    return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))


@dataclass(frozen=True)
class Scene:
    """An image with its alpha: rgb uint8 [h,w,3], alpha uint8 [h,w], and valid bool [h,w], False at padding.

    If the data have them: a trimap, uint8 [h,w] of 0, 128 and 255, and another model's coarse alpha, uint8 [h,w].
    """

    rgb: ImageU8
    alpha: ImageU8
    valid: NDArray[np.bool_]
    trimap: ImageU8 | None = None
    coarse: ImageU8 | None = None

    @property
    def has_object(self) -> bool:
        """Whether any pixel of the alpha is above one half."""
        return bool((self.alpha > HALF_U8).any())


@dataclass(frozen=True)
class Cutout:
    """An object's bounding box: colour float32 [h,w,3] 0..255, premultiplied; alpha float32 [h,w] 0..1."""

    colour: Float
    alpha: Float


def read_photograph(item: TrainingItem, long_side_px: int | None = None) -> Scene:
    """Read an item, reduced to at most ``long_side_px``. Raises ImageError."""
    rgb, alpha = _read_image_and_alpha(item)
    size = downscaled_size(alpha.shape, long_side_px or max(alpha.shape))
    trimap = None if item.trimap is None else _read_trimap(item.trimap, alpha.shape, size)
    coarse = None if item.coarse is None else resize(_read_alpha(item.coarse, "coarse"), size)
    small_alpha = resize(alpha, size)
    if item.is_binary:
        small_alpha = binarize_alpha(small_alpha)
    return Scene(resize(rgb, size), small_alpha, np.ones(size, np.bool_), trimap, coarse)


read_cached_photograph = cached(LRUCache(CACHE_BYTES, getsizeof=_size_bytes))(read_photograph)
"""Like :func:`read_photograph`, with a cache in memory."""


@cached(LRUCache(CACHE_BYTES, getsizeof=_size_bytes))
def read_cutout(item: TrainingItem, long_side_px: int) -> Cutout:
    """Cut out an item's object, with its bounding box reduced to at most ``long_side_px``. Raises ImageError.

    The foreground colours of a photograph are estimated first (Germer et al., "Fast Multi-Level Foreground Estimation",
    2020). Otherwise the old background, visible through soft edges, would become a halo on a new background, and the
    model would learn it. The cut-out of an image without an object is transparent.
    """
    rgb, alpha = _read_image_and_alpha(item)
    is_visible = alpha > VISIBLE_U8
    rows, columns = np.flatnonzero(is_visible.any(axis=1)), np.flatnonzero(is_visible.any(axis=0))
    if not len(rows):
        return Cutout(np.zeros((1, 1, 3), np.float32), np.zeros((1, 1), np.float32))
    margin = 2 + max(len(rows), len(columns)) // 32  # some background, for the estimate
    box = (
        slice(max(0, rows[0] - margin), rows[-1] + 1 + margin),
        slice(max(0, columns[0] - margin), columns[-1] + 1 + margin),
    )
    rgb, alpha = rgb[box], alpha[box]
    size = downscaled_size(alpha.shape, long_side_px)
    weight = resize(alpha, size).astype(np.float32) / 255.0
    if item.is_foreground:
        colour = resize((rgb * (alpha[..., None] / np.float32(255))).astype(np.float32), size)
    else:
        estimated = load_foreground_estimator()(resize(rgb, size) / 255.0, weight.astype(np.float64))
        colour = (estimated * 255.0 * weight[..., None]).astype(np.float32)
    return Cutout(colour, weight)


@cached(LRUCache(CACHE_BYTES, getsizeof=_size_bytes))
def read_background(path: Path, long_side_px: int) -> ImageU8:
    """Read an image, uint8 [h,w,3], reduced to at most ``long_side_px``, and keep it in memory. Raises ImageError."""
    rgb = read_image(path).rgb
    return resize(rgb, downscaled_size(rgb.shape[:2], long_side_px))


def _read_image_and_alpha(item: TrainingItem) -> tuple[ImageU8, ImageU8]:
    """Read the image, uint8 [H,W,3], and the alpha, uint8 [H,W], of an item. Raises ImageError."""
    image = read_image(item.image).to_display_window()
    if item.alpha is not None:
        alpha = _read_alpha(item.alpha, "alphas", is_binary=item.is_binary)
        if alpha.max() == 1:
            raise ImageError(
                f"the largest value of {item.alpha} is 1; expected values of 0..255; multiply the alpha by 255"
            )
    elif image.alpha is not None:
        alpha = image.alpha
    else:
        raise ImageError(f"{item.image} has no alpha; expected an RGBA cut-out")
    if alpha.shape != image.rgb.shape[:2]:
        if not item.is_binary:
            raise ImageError(
                f"{item.image} is {format_size(image.rgb.shape)} and its alpha {item.alpha} "
                f"{format_size(alpha.shape)}; expected the same size"
            )
        alpha = resize(alpha, (image.rgb.shape[0], image.rgb.shape[1]))  # masks of Open Images differ in size
    if item.is_binary:
        alpha = binarize_alpha(alpha)
    if item.soften_px:
        alpha = np.asarray(cv2.GaussianBlur(alpha, (0, 0), item.soften_px), np.uint8)
    return image.rgb, alpha


def _read_alpha(path: Path, key: str, *, is_binary: bool = False) -> ImageU8:
    """Read the alpha or trimap that ``key`` of the data names, uint8 [H,W]. Raises ImageError, also for colour.

    A binary mask may have the colours of a palette, but it may not be a photograph.
    """
    alpha = read_ground_truth(path)
    if alpha.is_photograph or (alpha.has_colour and not is_binary):
        raise ImageError(f"{path} {HAS_COLOUR}; check '{key}' of the data")
    return alpha.alpha


def _read_trimap(path: Path, shape: tuple[int, ...], size: tuple[int, int]) -> ImageU8:
    """Read a trimap for an image of ``shape``, and resize it. Raises ImageError."""
    trimap = _read_alpha(path, "trimaps")
    if trimap.shape != shape:
        raise ImageError(f"trimap {path} is {format_size(trimap.shape)}, not its image's {format_size(shape)}")
    lowest, known = UNKNOWN_RANGE
    levels = np.where(trimap < lowest, 0, np.where(trimap >= known, 255, UNKNOWN)).astype(np.uint8)
    return np.asarray(cv2.resize(levels, size[::-1], interpolation=cv2.INTER_NEAREST), np.uint8)


class SceneMaker:
    """Makes scenes of one canvas size, which depend only on the arguments and the random generator.

    Methods that read an image raise ImageError.
    """

    def __init__(self, pool: TrainingPool, config: TrainConfig, canvas_px: int | None = None) -> None:
        """``canvas_px`` replaces the setting."""
        self.pool = pool
        self.pairs = config.pairs
        self.augment = config.augment
        self.canvas_px = config.canvas_px if canvas_px is None else canvas_px

    def make_view(self, item: TrainingItem, rng: Rng) -> Scene:
        """Make a complete scene of an item, as a target or a reference, with random distractors."""
        scene = self.make_scene(item, rng)
        scene = self.add_distractors(scene, self.draw_distractors(item, rng), rng)
        return self.augment_colours(scene, rng)

    def make_scene(self, item: TrainingItem, rng: Rng) -> Scene:
        """Make a scene of an item: its photograph, or its object on another background."""
        can_composite = bool(self.pool.backgrounds) and not item.is_binary
        if item.is_foreground or (rng.random() < self.pairs.composite_probability and can_composite):
            background = self.make_background(self.pool.draw_background(rng), rng)
            return self.make_composite(item, background.rgb, rng)
        return self.make_photograph(item, rng)

    def make_photograph(self, item: TrainingItem, rng: Rng) -> Scene:
        """Place an item's image on the canvas by a random transform.

        If the augmentation moves no pixels, or if no random transform leaves enough of the object visible, the whole
        image is fitted into the canvas.
        """
        if not self.augment.moves_pixels:
            return self._fit_photograph(item)
        layer = read_cached_photograph(item, round(self.canvas_px * self.augment.zoom))
        placement = self._draw_visible_placement(layer.alpha, rng)
        if placement is None:
            return self._fit_photograph(item)
        affine, alpha = placement
        rgb = self._warp_layer(layer.rgb, affine, cv2.BORDER_REPLICATE)
        valid = self._warp_layer(layer.valid * np.uint8(255), affine) > HALF_U8
        nearest = cv2.INTER_NEAREST
        trimap = None if layer.trimap is None else self._warp_layer(layer.trimap, affine, interpolation=nearest)
        coarse = None if layer.coarse is None else self._warp_layer(layer.coarse, affine)
        return Scene(rgb, alpha, valid, trimap, coarse)

    def _draw_visible_placement(self, alpha: ImageU8, rng: Rng) -> tuple[Affine, ImageU8] | None:
        """Draw a transform of a photograph that leaves enough of its object visible; return it and the warped alpha.

        Returns None if none was found in MAX_PLACEMENTS draws.
        """
        total = max(1.0, float(alpha.sum()))
        for _ in range(MAX_PLACEMENTS):
            affine = draw_photograph_transform(alpha.shape, self.canvas_px, self.augment, rng)
            warped = self._warp_layer(alpha, affine)
            area_scale = abs(np.linalg.det(affine[:, :2]))
            if warped.sum() >= MIN_VISIBLE_FRACTION * total * area_scale:
                return affine, warped
        return None

    def make_background(self, path: Path, rng: Rng) -> Scene:
        """Crop a square of a background image; the alpha is 0."""
        rgb = read_background(path, 2 * self.canvas_px)
        side = min(rgb.shape[:2])
        crop_side = round(side * rng.uniform(0.5, 1.0))
        top, left = (int(rng.integers(length - crop_side + 1)) for length in rgb.shape[:2])
        square = rgb[top : top + crop_side, left : left + crop_side]
        interpolation = cv2.INTER_AREA if crop_side > self.canvas_px else cv2.INTER_LINEAR
        size = (self.canvas_px, self.canvas_px)
        canvas = np.asarray(cv2.resize(square, size, interpolation=interpolation), np.uint8)
        if rng.random() < self.augment.flip:
            canvas = canvas[:, ::-1]
        alpha = np.zeros(canvas.shape[:2], np.uint8)
        return Scene(canvas, alpha, np.ones(alpha.shape, np.bool_))

    def make_composite(self, item: TrainingItem, behind: ImageU8, rng: Rng) -> Scene:
        """Composite an item's object onto an image, uint8 [S,S,3]."""
        colour, weight = self._place_cutout(read_cutout(item, self.canvas_px), MAX_OBJECT_SIDE, rng)
        rgb = _composite_over(colour, weight, behind)
        return Scene(rgb, round_to_u8(weight * 255), np.ones(weight.shape, np.bool_))

    def draw_distractors(self, item: TrainingItem, rng: Rng) -> list[TrainingItem]:
        """Draw items whose objects are pasted into a scene of ``item``."""
        if rng.random() >= self.pairs.distractor_probability or not self.pairs.max_distractors:
            return []
        count = int(rng.integers(1, self.pairs.max_distractors + 1))
        drawn = (self.pool.draw_negative(item, rng, for_cutout=True) for _ in range(count))
        return [distractor for distractor in drawn if distractor is not None]

    def add_distractors(self, scene: Scene, items: Sequence[TrainingItem], rng: Rng) -> Scene:
        """Paste other objects onto a scene; each hides only a part of the target object."""
        for item in items:
            layer = read_cutout(item, self.canvas_px)
            total = max(1.0, float(scene.alpha.sum()))
            for _ in range(MAX_PLACEMENTS):
                colour, weight = self._place_cutout(layer, MAX_DISTRACTOR_SIDE, rng)
                if (scene.alpha * weight).sum() <= MAX_HIDDEN_FRACTION * total:
                    scene = _cover_scene(scene, colour, weight)
                    break
        return scene

    def augment_colours(self, scene: Scene, rng: Rng) -> Scene:
        """Apply the augmentations that move no pixels: colours, blur, noise and compression."""
        rgb = jitter_colours(scene.rgb, self.augment.colour, rng) if self.augment.colour else scene.rgb
        return replace(scene, rgb=np.ascontiguousarray(degrade_image(rgb, self.augment, rng)))

    def _fit_photograph(self, item: TrainingItem) -> Scene:
        """Place the whole image in the top left corner of the canvas, as in inference."""
        layer = read_photograph(item)
        placement = CanvasRule(self.canvas_px, 1, square=True).placement(*layer.alpha.shape)
        valid = placement.content_mask()
        alpha = np.where(valid, placement.fit_to_canvas(layer.alpha), 0).astype(np.uint8)
        if item.is_binary:
            alpha = binarize_alpha(alpha)
        trimap = None
        if layer.trimap is not None:
            height, width = placement.content
            trimap = np.zeros_like(alpha)
            trimap[valid] = cv2.resize(layer.trimap, (width, height), interpolation=cv2.INTER_NEAREST).ravel()
        coarse = None if layer.coarse is None else placement.fit_to_canvas(layer.coarse)
        return Scene(placement.fit_to_canvas(layer.rgb), alpha, valid, trimap, coarse)

    def _place_cutout(self, layer: Cutout, largest: float, rng: Rng) -> tuple[Float, Float]:
        """Place a cut-out on the canvas at random; return colour [S,S,3], premultiplied 0..255, and alpha [S,S]."""
        affine = draw_cutout_transform(layer.alpha.shape, self.canvas_px, self.augment, rng, largest)
        return self._warp_layer(layer.colour, affine), self._warp_layer(layer.alpha, affine)

    def _warp_layer(
        self,
        layer: NDArray[Any],
        affine: Affine,
        border: int = cv2.BORDER_CONSTANT,
        interpolation: int = cv2.INTER_LINEAR,
    ) -> NDArray[Any]:
        """Warp a layer to the canvas. Beyond the layer, the canvas is 0, or with BORDER_REPLICATE repeats its edge.

        If the transform reduces the layer so much that it would skip pixels, the layer is first reduced by averaging.
        """
        scale = float(np.sqrt(abs(np.linalg.det(affine[:, :2]))))
        if scale < 0.75 and interpolation == cv2.INTER_LINEAR:
            height, width = (max(1, round(length * scale)) for length in layer.shape[:2])
            back = np.array([[layer.shape[1] / width, 0.0], [0.0, layer.shape[0] / height]])
            affine = np.concatenate([affine[:, :2] @ back, affine[:, 2:]], axis=1)
            layer = cv2.resize(layer, (width, height), interpolation=cv2.INTER_AREA)
        shifted = affine.copy()  # converts from pixel edges, which the transform uses, to cv2's pixel centres
        shifted[:, 2] += affine[:, :2] @ [0.5, 0.5] - 0.5
        size = (self.canvas_px, self.canvas_px)
        return np.asarray(cv2.warpAffine(layer, shifted, size, flags=interpolation, borderMode=border))


def _cover_scene(scene: Scene, colour: Float, layer_alpha: Float) -> Scene:
    """Composite a premultiplied layer over a scene.

    Parts of the object that the layer hides are removed from the alpha and the trimap. The coarse alpha is dropped.
    """
    alpha = round_to_u8(scene.alpha * (1 - layer_alpha))
    trimap = scene.trimap
    if trimap is not None:
        soft_edge = (layer_alpha > 0) & (layer_alpha < 1) & (trimap > 0)
        trimap = np.where(layer_alpha >= 1, 0, np.where(soft_edge, 128, trimap)).astype(np.uint8)
    return replace(scene, rgb=_composite_over(colour, layer_alpha, scene.rgb), alpha=alpha, trimap=trimap, coarse=None)


def _composite_over(colour: Float, layer_alpha: Float, behind: ImageU8) -> ImageU8:
    """Composite a premultiplied layer, colour [S,S,3] 0..255 and alpha [S,S], onto an image uint8 [S,S,3]."""
    return round_to_u8(colour + behind * (1 - layer_alpha[..., None]))
