"""Alphas and masks from the prompts of hints, decoded again in a crop if the object is small."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import cachetools
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icm_cli.config import CropSettings
from icm_cli.device import Device, device_errors
from icm_cli.geometry import ImageU8, resize
from icm_cli.guidance.hints import Hints
from icm_cli.images.pixels import ImageWindows
from icm_cli.matting.crops import CropBox, align_box, crop_box
from icm_cli.matting.false_objects import find_false_objects
from icm_cli.matting.hinting import apply_hints_to_alpha, clip_to_boxes, make_prompts, move_hints
from icm_cli.model.alphas import resize_alpha
from icm_cli.model.contracts import Edges, EmbeddedImage, Objects, PointPrompts
from icm_cli.model.loading import load_objects_and_edges

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
        objects: The object model.
        image: Embedding of the whole image.
    """

    def __init__(self, objects: Objects, rgb: ImageU8) -> None:
        """Embed the image, sRGB uint8 [H,W,3]."""
        self.objects, self._rgb = objects, rgb
        self._crops: cachetools.LRUCache[str, EmbeddedImage] = cachetools.LRUCache(MAX_KEPT_CROPS)
        self.image: EmbeddedImage
        (self.image,) = objects.embed_images([rgb])

    def has_crop(self, box: CropBox) -> bool:
        """Return whether the embedding of a crop is kept, so that :meth:`crop` is fast."""
        return repr(box) in self._crops

    def crop(self, box: CropBox) -> EmbeddedImage:
        """Return the embedding of a crop."""
        if not self.has_crop(box):
            (self._crops[repr(box)],) = self.objects.embed_images([box.crop(self._rgb)])
        return self._crops[repr(box)]


def complete_by_prompts(
    embedder: ImageEmbedder, coarse: Tensor, hints: Hints, prompts: PointPrompts, *, embeds_crops: bool = True
) -> Tensor:
    """Complete a coarse alpha, float32 [h,w] of any size, with the prompts of hints. Returns float32 [h',w'] in 0..1.

    False objects at points off the object are removed, see :func:`find_false_objects`. A small object is decoded again
    in a crop, where the first result is the mask prompt.

    Args:
        prompts: Those that :func:`make_prompts` makes from the hints.
        embeds_crops: Whether a new crop may be embedded. This takes more time than all else. Without it, only crops
            whose embeddings are kept are used.
    """
    alpha, false_regions = _complete_in_image(embedder, coarse, hints, prompts)
    box = find_zoom_box(alpha, hints)
    if box is None or not (embeds_crops or embedder.has_crop(box)):
        return alpha
    zoomed = _complete_in_crop(embedder, alpha, hints, box)
    if zoomed is None:
        return alpha
    return zoomed if false_regions is None else zoomed * (1 - resize_alpha(false_regions, hints.size))


def _complete_in_image(
    embedder: ImageEmbedder, coarse: Tensor, hints: Hints, prompts: PointPrompts
) -> tuple[Tensor, Tensor | None]:
    """Complete a coarse alpha in the whole image. Returns it with the regions that were removed from it as false.

    The regions are None if there are none.
    """
    objects, image = embedder.objects, embedder.image
    false_objects = None
    if hints.not_points and objects.has_object(coarse):
        (completed,) = objects.complete_embedded_alphas([image], [coarse])
        false_objects = find_false_objects(objects, image, completed, hints)
    if false_objects is None:
        (alpha,) = objects.complete_embedded_alphas([image], [coarse], [prompts])
        return clip_to_boxes(alpha, hints), None
    mask = false_objects.remove_from(completed)
    (alpha,) = objects.complete_embedded_alphas([image], [mask], [prompts], are_completed=True)
    return clip_to_boxes(alpha * (1 - false_objects.regions), hints), false_objects.regions


def _complete_in_crop(embedder: ImageEmbedder, alpha: Tensor, hints: Hints, box: CropBox) -> Tensor | None:
    """Decode the object again in a crop. Returns an alpha of the size of the image; None without prompts in the crop.

    ``alpha``: completed alpha of the whole image, of any size.
    """
    windows = ImageWindows(box.size, (box.rows.start, box.columns.start), hints.size)
    hints_in_crop = move_hints(hints, windows)
    prompts = make_prompts(hints_in_crop)
    if prompts is None:
        return None
    zoomed = resize_alpha(alpha, hints.size).clone()
    (in_crop,) = embedder.objects.complete_embedded_alphas(
        [embedder.crop(box)], [zoomed[box.slices]], [prompts], are_completed=True
    )
    zoomed[box.slices] = clip_to_boxes(resize_alpha(in_crop, box.size), hints_in_crop)
    return zoomed


def select_by_prompts(objects: Objects, image: EmbeddedImage, hints: Hints) -> Tensor:
    """Select what hints mark, without a coarse alpha. Returns float32 [h,w] in 0..1.

    Points alone are ambiguous: without boxes and strokes on the object, it is selected again with a box around the
    first result.
    """
    (alpha,) = objects.complete_embedded_alphas([image], [None], [make_prompts(hints)])
    cells = np.argwhere(alpha.numpy(force=True) > 0.5)
    if not len(cells) or hints.boxes or hints.object_area is not None:
        return alpha
    corners = np.concatenate([cells, cells + 1]) * (np.array(hints.size) / alpha.shape)  # as row and column
    corners = np.concatenate([corners[:, ::-1], np.reshape(hints.points, (-1, 2))])
    start, end = corners.min(axis=0), np.minimum(corners.max(axis=0), hints.size[::-1])
    with_box = replace(hints, boxes=[(*start.tolist(), *end.tolist())])
    (alpha,) = objects.complete_embedded_alphas([image], [None], [make_prompts(with_box)])
    return alpha


def find_zoom_box(alpha: Tensor, hints: Hints) -> CropBox | None:
    """Return the box of a crop around a small object; None if there is no object, or if it is not small.

    The object is the foreground of an alpha, float32 [h,w], together with everything that the hints mark on it.
    """
    mask = (alpha > 0.5).numpy(force=True)
    shape = np.array(mask.shape)
    corners = np.reshape([*hints.points, *np.reshape(hints.boxes, (-1, 2))], (-1, 2))[:, ::-1]  # as row and column
    rows, columns = np.minimum((corners * (shape / hints.size)).astype(int), shape - 1).T
    mask[rows, columns] = True
    for area in (hints.object_area, hints.keep):
        if area is not None:
            mask |= resize(area.astype(np.float32), (mask.shape[0], mask.shape[1])) > 0
    box = crop_box(mask, hints.size, ZOOM)
    if box is None:
        return None
    box = align_box(box, hints.size, GRID_CELLS)
    return box if max(box.size) <= MAX_CROP_FRACTION * max(hints.size) else None


class MaskMaker:
    """Makes masks of the objects that a person marks. It loads a part of ``lite`` at its first use.

    Its dtypes do not depend on the model that mattes, so that every model gets the same mask.
    """

    def __init__(self, select_device: Callable[[], Device]) -> None:
        """``select_device`` is called at the first use."""
        self._select_device = select_device

    @functools.cached_property
    def _device(self) -> Device:
        return self._select_device()

    @functools.cached_property
    def _parts(self) -> tuple[Objects, Edges]:
        with device_errors(self._device, "the model that makes masks was loaded"):
            return load_objects_and_edges(self._device)

    @property
    def objects(self) -> Objects:
        """The object model of ``lite``."""
        return self._parts[0]

    def make_mask(self, rgb: ImageU8, hints: Hints) -> NDArray[np.bool_]:
        """Return the mask, bool [H,W], of the object that hints mark in an image, sRGB uint8 [H,W,3].

        It contains all points and areas on the object, and none of those off it. Raises ConfigError if memory runs out.
        """
        objects, edges = self._parts
        with device_errors(self._device, "the mask of a reference was made"), torch.inference_mode():
            (image,) = objects.embed_images([rgb])
            coarse = select_by_prompts(objects, image, hints)
            (alpha,) = edges.refine_alphas([rgb], [clip_to_boxes(coarse, hints)])
        mask: NDArray[np.bool_] = apply_hints_to_alpha(alpha.numpy(force=True), hints) > 0.5
        return mask
