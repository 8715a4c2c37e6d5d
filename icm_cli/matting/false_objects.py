"""Whole false objects in an alpha, which a person has marked by points off the object."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icm_cli.geometry import Float, distance_inside
from icm_cli.guidance.hints import Area, Hints, Point
from icm_cli.matting.hinting import OFF_OBJECT, ON_OBJECT, Cell, find_cell
from icm_cli.model.contracts import EmbeddedImage, Objects, PointPrompts

REGION_THRESHOLD = 0.3
"""Connected pixels above this alpha are one region."""
MIN_REGION_DEPTH = 0.5
"""A point marks a whole region if its distance to the border of the region is at least this fraction of the largest
one. A point closer to the border corrects the border."""
MIN_PART_DEPTH = 0.8
"""The same for a selected part of a region. The decoder often selects more than the error at a point, and then the
point is rarely in the middle of the selection."""
MIN_REMAINING = 0.3
"""A region can be false as a whole if the rest of the foreground has at least this fraction of its area."""
MIN_SELECTED = 0.5
"""A region is false as a whole if the decoder selects at least this fraction of it."""
MAX_PART = 0.6
"""A selection of more than this fraction of the foreground is the object, and not a false part of it."""
MARGIN_PX = 2
"""Distance around a false region that is removed too, in pixels of the alpha."""


@dataclass(frozen=True)
class FalseObjects:
    """What is false in an alpha [h,w].

    Attributes:
        regions: Connected regions of the alpha, float32 [h,w]: 1 in them, else 0.
        parts: Selected parts of other regions, float32 [h,w] in 0..1.
    """

    regions: Tensor
    parts: Tensor

    def remove_from(self, alpha: Tensor) -> Tensor:
        """Return an alpha [h,w] without the regions and the parts."""
        return alpha * (1 - torch.maximum(self.regions, self.parts))


def find_false_objects(objects: Objects, image: EmbeddedImage, alpha: Tensor, hints: Hints) -> FalseObjects | None:
    """Return the false objects that points off the object mark in a completed alpha, float32 [h,w]; None if there are
    none.

    The decoder selects what is at each of these points. Only the pixels of the selection that are connected to the
    point count. If they are most of a connected region, and other foreground remains, the region is false. Otherwise
    they are a false part, unless they are most of the foreground. Nothing that contains a point on the object is false.
    """
    values: Float = alpha.numpy(force=True)
    on_cells = [find_cell(point, hints.size, values.shape) for point in hints.points]
    foreground = values > 0.5
    regions, parts = np.zeros_like(values), np.zeros_like(values)
    for point in hints.not_points:
        cell = find_cell(point, hints.size, values.shape)
        region = _find_connected(values > REGION_THRESHOLD, cell)
        if not region.any():
            continue
        selection = _select_object(objects, image, point, hints)
        selected = _find_connected(region & (selection > 0.5), cell)
        remaining = (foreground & ~region).sum()
        if (
            remaining >= MIN_REMAINING * (foreground & region).sum()
            and selected.sum() >= MIN_SELECTED * region.sum()
            and _is_marked(region, cell, on_cells, MIN_REGION_DEPTH)
        ):
            regions[_grow(region)] = 1
        elif (selected & foreground).sum() <= MAX_PART * foreground.sum() and _is_marked(
            selected, cell, on_cells, MIN_PART_DEPTH
        ):
            parts = np.maximum(parts, np.where(_grow(selected), selection, 0))
    if not (regions.any() or parts.any()):
        return None
    return FalseObjects(torch.from_numpy(regions).to(alpha), torch.from_numpy(parts).to(alpha))


def _find_connected(area: Area, cell: Cell) -> Area:
    """Return the pixels of an area [h,w] that are connected to a cell; none if the cell is not in the area."""
    _, labels = cv2.connectedComponents(area.astype(np.uint8), connectivity=4)
    return np.asarray(area & (labels == labels[cell]))


def _select_object(objects: Objects, image: EmbeddedImage, point: Point, hints: Hints) -> Float:
    """Return the alpha [h,w] of what is at a point, if it is selected instead of the object."""
    coordinates = np.array([point, *hints.points]) / hints.size[::-1]
    labels = torch.tensor([ON_OBJECT] + [OFF_OBJECT] * len(hints.points))
    prompts = PointPrompts(torch.tensor(coordinates, dtype=torch.float32), labels)
    (alpha,) = objects.complete_embedded_alphas([image], [None], [prompts])
    selection: Float = alpha.numpy(force=True)
    return selection


def _is_marked(area: Area, cell: Cell, on_cells: list[Cell], min_depth: float) -> bool:
    """Return whether a cell is in the middle of an area that has no point on the object."""
    if not area[cell] or any(area[each] for each in on_cells):
        return False
    distance = distance_inside(np.pad(area, 1))[1:-1, 1:-1]
    return bool(distance[cell] >= min_depth * distance.max())


def _grow(area: Area) -> NDArray[np.bool_]:
    """Return an area with its margin."""
    side = 2 * MARGIN_PX + 1
    return np.asarray(cv2.dilate(area.astype(np.uint8), np.ones((side, side), np.uint8)) > 0)
