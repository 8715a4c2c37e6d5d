"""A picture on the canvas with its alpha: a photograph, or a thing on another background, and others pasted in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.errors import ImageError
from icm_cli.geometry import HALF_U8, CanvasRule, Float, ImageU8, binarize_alpha, round_to_u8
from icm_cli.training.data.augment import Affine, Rng, damage, place_cutout, place_photograph, recolour
from icm_cli.training.data.layers import Cutout, background, cutout, photograph, shrunk_photograph
from icm_cli.training.data.pool import Item
from icm_cli.training.settings import AugmentConfig

TRIES = 6
"""Placements that are tried before the last one is taken as it is."""
LEAST_VISIBLE = 0.4
"""Share of a thing that must stay on the canvas and in sight."""
LARGEST_THING = 0.95
LARGEST_DISTRACTOR = 0.6
"""Longest side of a pasted thing, in canvas sides."""


@dataclass(frozen=True)
class Scene:
    """rgb uint8 [S,S,3], alpha uint8 [S,S], valid bool [S,S], and where a file gave one, trimap uint8 [S,S] and the
    coarse alpha of a first stage, uint8 [S,S]."""

    rgb: ImageU8
    alpha: ImageU8
    valid: NDArray[np.bool_]
    trimap: ImageU8 | None = None
    coarse: ImageU8 | None = None


class SceneMaker:
    """Makes scenes of one canvas size; what it is given and the generator decide every pixel."""

    def __init__(self, canvas_px: int, augment: AugmentConfig) -> None:
        self.canvas_px = canvas_px
        self.augment = augment
        self._photograph_px = round(canvas_px * augment.zoom)

    def photograph(self, item: Item, rng: Rng) -> Scene:
        """An item's picture as it is, moved by the augmentation. Raises ImageError."""
        if not self.augment.moves_pixels:
            return self._whole(item)
        layer = shrunk_photograph(item, self._photograph_px)
        total = max(1.0, float(layer.alpha.sum()))
        for _ in range(TRIES):
            affine = place_photograph(layer.alpha.shape, self.canvas_px, self.augment, rng)
            alpha = self._warped(layer.alpha, affine)
            if alpha.sum() >= LEAST_VISIBLE * total * abs(np.linalg.det(affine[:, :2])):
                break
        else:
            return self._whole(item)
        rgb = self._warped(layer.rgb, affine, cv2.BORDER_REPLICATE)
        inside = self._warped(np.full(layer.alpha.shape, 255, np.uint8), affine) > HALF_U8
        trimap = None if layer.trimap is None else self._warped(layer.trimap, affine, how=cv2.INTER_NEAREST)
        coarse = None if layer.coarse is None else self._warped(layer.coarse, affine)
        return Scene(rgb, alpha, inside, trimap, coarse)

    def backdrop(self, path: Path, rng: Rng) -> Scene:
        """A square part of a picture, with nothing in it. Raises ImageError."""
        rgb = background(path, 2 * self.canvas_px)
        side = min(rgb.shape[:2])
        part = round(side * rng.uniform(0.5, 1.0))
        top, left = (int(rng.integers(length - part + 1)) for length in rgb.shape[:2])
        square = rgb[top : top + part, left : left + part]
        how = cv2.INTER_AREA if part > self.canvas_px else cv2.INTER_LINEAR
        canvas = np.asarray(cv2.resize(square, (self.canvas_px, self.canvas_px), interpolation=how), np.uint8)
        if rng.random() < self.augment.flip:
            canvas = canvas[:, ::-1]
        nothing = np.zeros(canvas.shape[:2], np.uint8)
        return Scene(canvas, nothing, np.ones(nothing.shape, np.bool_))

    def composite(self, item: Item, behind: Scene, rng: Rng) -> Scene:
        """An item's thing before a scene, whose own alpha counts for nothing. Raises ImageError."""
        colour, weight = self._placed(cutout(item, self.canvas_px), LARGEST_THING, rng)
        return replace(
            behind, rgb=_over(colour, weight, behind.rgb), alpha=round_to_u8(weight * 255), trimap=None, coarse=None
        )

    def distracted(self, scene: Scene, items: Sequence[Item], rng: Rng) -> Scene:
        """Paste other things over a scene; each hides at most some of what is wanted. Raises ImageError."""
        for item in items:
            layer = cutout(item, self.canvas_px)
            total = max(1.0, float(scene.alpha.sum()))
            for _ in range(TRIES):
                colour, weight = self._placed(layer, LARGEST_DISTRACTOR, rng)
                if (scene.alpha * weight).sum() <= (1 - LEAST_VISIBLE) / 2 * total:
                    scene = _covered(scene, colour, weight)
                    break
        return scene

    def finished(self, scene: Scene, rng: Rng) -> Scene:
        """With the colours and the damage of the augmentation."""
        rgb = recolour(scene.rgb, self.augment.colour, rng) if self.augment.colour else scene.rgb
        return replace(scene, rgb=np.ascontiguousarray(damage(rgb, self.augment, rng)))

    def _whole(self, item: Item) -> Scene:
        """The picture as inference would see it: whole, in the canvas' corner."""
        layer = photograph(item)
        placement = CanvasRule(self.canvas_px, 1, square=True).placement(*layer.alpha.shape)
        valid = placement.content_mask()
        alpha = np.where(valid, placement.to_canvas(layer.alpha), 0).astype(np.uint8)
        if item.is_binary:
            alpha = binarize_alpha(alpha)
        trimap = None
        if layer.trimap is not None:
            size = placement.content[::-1]
            trimap = np.zeros_like(alpha)
            trimap[valid] = cv2.resize(layer.trimap, size, interpolation=cv2.INTER_NEAREST).ravel()
        coarse = None if layer.coarse is None else placement.to_canvas(layer.coarse)
        return Scene(placement.to_canvas(layer.rgb), alpha, valid, trimap, coarse)

    def _placed(self, layer: Cutout, largest: float, rng: Rng) -> tuple[Float, Float]:
        """Colour [S,S,3], premultiplied 0..255, and alpha [S,S] of a cut-out somewhere on the canvas."""
        affine = place_cutout(layer.alpha.shape, self.canvas_px, self.augment, rng, largest)
        return self._warped(layer.colour, affine), self._warped(layer.alpha, affine)

    def _warped(
        self, layer: NDArray[Any], affine: Affine, border: int = cv2.BORDER_CONSTANT, how: int = cv2.INTER_LINEAR
    ) -> NDArray[Any]:
        """A layer on the canvas, 0 (or its own edge) outside; first shrunk where the affine map would skip pixels."""
        shrink = float(np.sqrt(abs(np.linalg.det(affine[:, :2]))))
        if shrink < 0.75 and how == cv2.INTER_LINEAR:
            height, width = (max(1, round(length * shrink)) for length in layer.shape[:2])
            back = np.array([[layer.shape[1] / width, 0.0], [0.0, layer.shape[0] / height]])
            affine = np.concatenate([affine[:, :2] @ back, affine[:, 2:]], axis=1)
            layer = cv2.resize(layer, (width, height), interpolation=cv2.INTER_AREA)
        shifted = affine.copy()  # from pixel edges, which the maps are in, to cv2's pixel centres
        shifted[:, 2] += affine[:, :2] @ [0.5, 0.5] - 0.5
        size = (self.canvas_px, self.canvas_px)
        return np.asarray(cv2.warpAffine(layer, shifted, size, flags=how, borderMode=border))


def require_foreground(scene: Scene, item: Item) -> Scene:
    """The scene; raises ImageError where nothing of it could be shown."""
    if not (scene.alpha > HALF_U8).any():
        raise ImageError(f"the alpha of {item.image} has no pixel above half, so it can show nothing")
    return scene


def _covered(scene: Scene, colour: Float, weight: Float) -> Scene:
    alpha = round_to_u8(scene.alpha * (1 - weight))
    trimap = scene.trimap
    if trimap is not None:
        soft_edge = (weight > 0) & (weight < 1) & (trimap > 0)
        trimap = np.where(weight >= 1, 0, np.where(soft_edge, 128, trimap)).astype(np.uint8)
    return replace(scene, rgb=_over(colour, weight, scene.rgb), alpha=alpha, trimap=trimap, coarse=None)


def _over(colour: Float, weight: Float, behind: ImageU8) -> ImageU8:
    return round_to_u8(colour + behind * (1 - weight[..., None]))
