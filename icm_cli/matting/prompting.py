"""Complete alphas with the prompts of hints: in the whole image, and again in a crop if the object is small."""

from __future__ import annotations

import cachetools
import numpy as np
from torch import Tensor

from icm_cli.config import CropSettings
from icm_cli.geometry import ImageU8, resize
from icm_cli.guidance.hints import Hints
from icm_cli.images.pixels import ImageWindows
from icm_cli.matting.crops import CropBox, align_box, crop_box
from icm_cli.matting.false_objects import find_false_objects
from icm_cli.matting.hinting import clip_to_boxes, make_prompts, move_hints
from icm_cli.model.alphas import resize_alpha
from icm_cli.model.contracts import EmbeddedImage, Objects, PointPrompts

ZOOM = CropSettings(margin=0.3, min_side=0.15)
MAX_CROP_FRACTION = 0.6
"""An object is small if the longer side of its crop is at most this fraction of the longer side of the image."""
GRID_CELLS = 16
"""Crops are aligned to a grid of this many cells along the longer side.

So a further click rarely changes the crop, and its embedding need not be computed again.
"""
MAX_KEPT_CROPS = 4
"""Number of crops whose embeddings are kept for an image."""


class ImageEmbedder:
    """Embeddings of an image and of its crops, computed once by the encoder of an object model.

    Attributes:
        image: Embedding of the whole image.
    """

    def __init__(self, objects: Objects, rgb: ImageU8) -> None:
        """Embed the image, sRGB uint8 [H,W,3]."""
        self._objects, self._rgb = objects, rgb
        self._crops: cachetools.LRUCache[str, EmbeddedImage] = cachetools.LRUCache(MAX_KEPT_CROPS)
        self.image: EmbeddedImage
        (self.image,) = objects.embed_images([rgb])

    def has_crop(self, box: CropBox) -> bool:
        """Return whether the embedding of a crop is kept, so that :meth:`crop` is fast."""
        return repr(box) in self._crops

    def crop(self, box: CropBox) -> EmbeddedImage:
        """Return the embedding of a crop."""
        if not self.has_crop(box):
            (self._crops[repr(box)],) = self._objects.embed_images([box.crop(self._rgb)])
        return self._crops[repr(box)]


def complete_by_prompts(
    objects: Objects,
    embedder: ImageEmbedder,
    coarse: Tensor,
    hints: Hints,
    prompts: PointPrompts,
    *,
    embeds_crops: bool = True,
) -> Tensor:
    """Complete a coarse alpha, float32 [h,w] of any size, with the prompts of hints. Returns float32 [h',w'] in 0..1.

    First, the false objects at points off the object are removed from the mask prompt, see :func:`find_false_objects`.
    Whole false regions are removed from the result too. A small object is decoded again in a crop, where the first
    result is the mask prompt. ``prompts``: those that :func:`make_prompts` makes from the hints. ``embeds_crops``:
    whether a new crop may be embedded. This takes more time than all else; without it, only crops whose embeddings are
    kept are used.
    """
    false_objects = None
    if hints.not_points and objects.has_object(coarse):
        (completed,) = objects.complete_embedded_alphas([embedder.image], [coarse])
        false_objects = find_false_objects(objects, embedder.image, completed, hints)
    if false_objects is None:
        (alpha,) = objects.complete_embedded_alphas([embedder.image], [coarse], [prompts])
    else:
        mask = false_objects.remove_from(completed)
        (alpha,) = objects.complete_embedded_alphas([embedder.image], [mask], [prompts], are_completed=True)
        alpha = alpha * (1 - false_objects.regions)
    alpha = clip_to_boxes(alpha, hints)
    box = find_zoom_box(alpha, hints)
    if box is None or not (embeds_crops or embedder.has_crop(box)):
        return alpha
    windows = ImageWindows(box.size, (box.rows.start, box.columns.start), hints.size)
    hints_in_crop = move_hints(hints, windows)
    prompts_in_crop = make_prompts(hints_in_crop)
    if prompts_in_crop is None:
        return alpha
    zoomed = resize_alpha(alpha, hints.size).clone()
    (in_crop,) = objects.complete_embedded_alphas(
        [embedder.crop(box)], [zoomed[box.slices]], [prompts_in_crop], are_completed=True
    )
    zoomed[box.slices] = clip_to_boxes(resize_alpha(in_crop, box.size), hints_in_crop)
    return zoomed if false_objects is None else zoomed * (1 - resize_alpha(false_objects.regions, hints.size))


def find_zoom_box(alpha: Tensor, hints: Hints) -> CropBox | None:
    """Return the box of a crop around a small object; None if there is no object, or if it is not small.

    The object is the foreground of an alpha, float32 [h,w], together with everything that the hints mark on it.
    """
    mask = (alpha > 0.5).numpy(force=True)
    scale = np.array(mask.shape[::-1]) / hints.size[::-1]  # of x and y: pixels of the mask per pixel of the image
    corners = np.concatenate(
        [np.reshape(each, (-1, 2)) for each in (hints.points, hints.boxes) if each] or [np.empty((0, 2))]
    )
    columns, rows = np.minimum((corners * scale).astype(int), np.array(mask.shape[::-1]) - 1).T
    mask[rows, columns] = True
    for area in (hints.object_area, hints.keep):
        if area is not None:
            mask |= resize(area.astype(np.float32), (mask.shape[0], mask.shape[1])) > 0
    box = crop_box(mask, hints.size, ZOOM)
    if box is None:
        return None
    box = align_box(box, hints.size, GRID_CELLS)
    return box if max(box.size) <= MAX_CROP_FRACTION * max(hints.size) else None
