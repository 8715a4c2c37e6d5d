"""Hints: what a person marks on the object and off it in one image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.errors import UsageError, shorten
from icm_cli.files.digests import combined_digest
from icm_cli.geometry import distance_inside, format_size
from icm_cli.values import is_number

Point: TypeAlias = tuple[float, float]
"""x and y in pixels of the displayed image: from its top left corner, x to the right and y down."""
Box: TypeAlias = tuple[float, float, float, float]
"""x and y of two opposite corners, in the same pixels."""
Area: TypeAlias = NDArray[np.bool_]
"""Pixels of an area, bool [H,W]."""
MAX_AREA_POINTS = 8
"""Largest number of points that represent an area."""
MIN_POINT_DISTANCE = 4.0
"""Smallest distance between two points of an area, as a multiple of half of the area's width there."""
MAX_CELLS = 512
"""Largest number of cells along a side of the grid on which the points of an area are searched."""
RIDGE_TOLERANCE = 0.5
"""A cell is on a centre line if no neighbour is deeper inside the area by this much, in cells."""
MIN_WIDTH_RATIO = 0.5
"""Points are placed only where a connected part of an area has at least this fraction of its largest width."""
MIN_MASK_FRACTION = 0.95
"""If the areas on and off the object cover more of the image than this, they are a rough mask and not strokes."""
MAX_SHOWN_NUMBERS = 8
"""An array with more numbers than this is not written out in error messages."""


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What a person marks in one image of ``size`` (height, width).

    Coordinates are pixels of the displayed image: EXIF orientation is applied, and the image of an EXR file is its
    display window. Pixel (0, 0) covers x and y from 0 to 1. Points [N,2] and boxes [N,4] may be given as sequences or
    arrays; they are stored as tuples of float.

    Raises UsageError for values of other types, a point or box outside the image, areas of another size, and hints that
    contradict each other.
    """

    size: tuple[int, int]
    points: Sequence[Point] = ()
    """Points on the object. The final alpha is above one half there."""
    not_points: Sequence[Point] = ()
    """Points off the object. The final alpha is below one half there."""
    boxes: Sequence[Box] = ()
    """Boxes around the object."""
    object_area: Area | None = None
    """Strokes or a rough mask on the object."""
    background_area: Area | None = None
    """Strokes or a rough mask off the object."""
    keep: Area | None = None
    """Pixels whose final alpha is 1."""
    drop: Area | None = None
    """Pixels whose final alpha is 0."""
    is_outlined: bool = False
    """Whether ``object_area`` is the whole object, such as an outline or a mask, and not strokes on it."""

    @property
    def digest(self) -> str:
        """Hash of all fields."""
        values = [getattr(self, field.name) for field in fields(self)]
        parts = [np.packbits(value).tobytes() if isinstance(value, np.ndarray) else repr(value) for value in values]
        return combined_digest(*parts)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is marked."""
        areas = (self.object_area, self.background_area, self.keep, self.drop)
        has_area = any(area is not None and area.any() for area in areas)
        return not (self.points or self.not_points or self.boxes or has_area)

    @property
    def is_rough_mask(self) -> bool:
        """Whether the two areas together mark nearly every pixel, as a roughly painted mask does."""
        on, off = self.object_area, self.background_area
        if on is None or off is None or not (on.any() and off.any()):
            return False
        return bool((on | off).mean() > MIN_MASK_FRACTION)

    def binding_points(self) -> tuple[list[Point], list[Point]]:
        """Return the points that the final alpha must follow: those on the object, and those off it.

        Both include points inside the painted areas.
        """
        on_object = [*self.points, *area_points(self.object_area)]
        off_object = [*self.not_points, *area_points(self.background_area)]
        return on_object, off_object

    def __post_init__(self) -> None:
        self._convert_size()
        self._convert_positions()
        self._check_areas()
        self._check_positions()
        self._check_contradictions()

    def _check_positions(self) -> None:
        """Raise UsageError for a point or box outside the image, and for an empty box."""
        height, width = self.size
        for name in ("points", "not_points"):
            for x, y in getattr(self, name):
                if not (0 <= x < width and 0 <= y < height):
                    raise UsageError(
                        f"point {x:g},{y:g} is outside the image, which is {width}x{height}; give pixels of the image "
                        "as it is displayed"
                    )
        for box in self.boxes:
            x0, y0, x1, y1 = box
            name = f"box {x0:g},{y0:g},{x1:g},{y1:g}"
            if not (min(x0, x1) >= 0 and max(x0, x1) <= width and min(y0, y1) >= 0 and max(y0, y1) <= height):
                raise UsageError(f"{name} is outside the image, which is {width}x{height}; give two corners inside it")
            if x0 == x1 or y0 == y1:
                raise UsageError(f"{name} is empty; give two opposite corners of the object's box")

    def _convert_size(self) -> None:
        """Store the size as a tuple of int. Raises UsageError if it is not a height and a width."""
        size = self.size
        is_pair = isinstance(size, (tuple, list)) and len(size) == 2
        if not (is_pair and all(is_number(side, Integral) and side > 0 for side in size)):
            raise UsageError(
                f"size= is {_describe(size)}; expected the height and width of the image, such as image.shape[:2]"
            )
        object.__setattr__(self, "size", (int(size[0]), int(size[1])))

    def _convert_positions(self) -> None:
        """Store the points and boxes as tuples of float. Raises UsageError for values of other types and shapes."""
        for name, count, expected in (
            ("points", 2, "points as x and y, such as [(365, 500)]"),
            ("not_points", 2, "points as x and y, such as [(365, 500)]"),
            ("boxes", 4, "boxes as x and y of two corners, such as [(155, 70, 610, 690)]"),
        ):
            rows = _convert_rows(getattr(self, name), count)
            if rows is None:
                raise UsageError(f"{name}= is {_describe(getattr(self, name))}; expected {expected}, in finite numbers")
            object.__setattr__(self, name, rows)

    def _check_areas(self) -> None:
        """Raise UsageError for an area that is not a bool array of the size of the image."""
        for name in ("object_area", "background_area", "keep", "drop"):
            area = getattr(self, name)
            if area is None:
                continue
            if not isinstance(area, np.ndarray) or area.dtype != np.bool_ or area.ndim != 2:
                raise UsageError(
                    f"{name}= is {_describe(area)}; expected a bool array [H,W] of the size of the image; convert it: "
                    "area > 127, or area > 0 if its values are 0 and 1"
                )
            if area.shape != self.size:
                raise UsageError(
                    f"{name}= is {format_size(area.shape)} and the image {format_size(self.size)}; give an area that "
                    "was drawn on this image, or resize it"
                )

    def _check_contradictions(self) -> None:
        """Raise UsageError if a pixel is marked both on the object and off it, or a point is outside all boxes."""
        object_pixels = {(int(x), int(y)) for x, y in self.points}
        for x, y in self.not_points:
            if (int(x), int(y)) in object_pixels:
                raise UsageError(f"point {x:g},{y:g} is given both on the object and off it; give one of the two")
        for x, y in self.points:
            if self.boxes and not any(_is_in_box(x, y, box) for box in self.boxes):
                raise UsageError(
                    f"point {x:g},{y:g} is on the object and outside its box; give a box that contains it, or omit one "
                    "of the two"
                )
        _refuse_points_in(self.not_points, "off", self.keep, "in an area to keep")
        _refuse_points_in(self.points, "on", self.drop, "in an area to drop")
        if not self.is_rough_mask:  # points correct a rough mask
            _refuse_points_in(self.not_points, "off", self.object_area, "in a stroke or an area on it")
            _refuse_points_in(self.points, "on", self.background_area, "in a stroke or an area off it")
        for area, opposite, names in (
            (self.keep, self.drop, "in an area to keep and in one to drop"),
            (self.object_area, self.background_area, "in a stroke or an area on the object and in one off it"),
        ):
            if area is not None and opposite is not None and (area & opposite).any():
                row, column = np.argwhere(area & opposite)[0]
                raise UsageError(f"pixel {column},{row} is {names}; give one of the two")


def _refuse_points_in(points: Sequence[Point], side: str, area: Area | None, position: str) -> None:
    """Raise UsageError if a point ("on" or "off" the object) is in an area that says the opposite."""
    for x, y in points:
        if area is not None and area[int(y), int(x)]:
            raise UsageError(f"point {x:g},{y:g} is {side} the object and {position}; give one of the two")


def _is_in_box(x: float, y: float, box: Box) -> bool:
    """Return whether a point is inside a box or on its border."""
    x0, y0, x1, y1 = box
    return min(x0, x1) <= x <= max(x0, x1) and min(y0, y1) <= y <= max(y0, y1)


def _convert_rows(values: Any, count: int) -> tuple[tuple[float, ...], ...] | None:
    """Return rows of ``count`` finite numbers; None if the values are anything else."""
    if isinstance(values, (str, bytes)) or not isinstance(values, (Sequence, np.ndarray)):
        return None
    rows: list[tuple[float, ...]] = []
    try:
        for row in values:
            numbers = tuple(row)
            if len(numbers) != count or not all(is_number(number, Real) for number in numbers):
                return None
            rows.append(tuple(float(number) for number in numbers))
    except (TypeError, OverflowError):  # a value that is no row, or a number that is too large
        return None
    return tuple(rows) if np.isfinite(rows).all() else None


def _describe(value: Any) -> str:
    """Return a wrong value for a message; for a large array, only its dtype and shape."""
    if isinstance(value, np.ndarray) and value.size > MAX_SHOWN_NUMBERS:
        return f"an array of {value.dtype} {list(value.shape)}"
    return shorten(" ".join(repr(value).split()))


def area_points(area: Area | None) -> list[Point]:
    """Return up to ``MAX_AREA_POINTS`` points inside an area that represent it: on the centre lines of its strokes.

    The first point is where the area is widest. Each further one is as far as possible from the points before it.
    """
    if area is None or not area.any():
        return []
    rows, columns = np.flatnonzero(area.any(axis=1)), np.flatnonzero(area.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    inside = area[top : rows[-1] + 1, left : columns[-1] + 1]
    cell_px = math.ceil(max(inside.shape) / MAX_CELLS)
    inside = np.pad(inside, [(0, -side % cell_px) for side in inside.shape])  # to whole cells
    grid = inside.shape[0] // cell_px, inside.shape[1] // cell_px
    cells: Area = np.asarray(inside.reshape(grid[0], cell_px, grid[1], cell_px).any(axis=(1, 3)))
    candidates, widths = _find_centre_line(cells)
    is_free = np.ones(len(candidates), np.bool_)
    nearest = np.full(len(candidates), np.inf)  # distance to the nearest chosen candidate
    chosen = int(widths.argmax())
    points: list[Point] = []
    while is_free.any() and len(points) < MAX_AREA_POINTS:
        row, column = _find_deepest_pixel(inside, candidates[chosen].tolist(), cell_px)
        points.append((left + column + 0.5, top + row + 0.5))
        distance = np.hypot(*(candidates - candidates[chosen]).T)
        min_distance = np.maximum(MIN_POINT_DISTANCE * np.maximum(widths, widths[chosen]), 1.0)
        is_free &= distance >= min_distance
        nearest = np.minimum(nearest, distance)
        chosen = int(np.where(is_free, nearest, -1.0).argmax())
    return points


def _find_centre_line(cells: Area) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return row and column of every cell on a centre line of an area, [N,2], and half the area's width there, [N]."""
    depth = _depths(cells)
    part_count, part = cv2.connectedComponents(cells.astype(np.uint8))
    max_depth = np.zeros(part_count, np.float32)
    np.maximum.at(max_depth, part.astype(np.intp), depth)
    deepest_neighbour = cv2.dilate(depth, np.ones((3, 3), np.uint8))
    is_ridge = depth > deepest_neighbour - RIDGE_TOLERANCE
    is_centre = cells & is_ridge & (depth >= MIN_WIDTH_RATIO * max_depth[part])
    return np.argwhere(is_centre), depth[is_centre]


def _find_deepest_pixel(inside: Area, cell: Sequence[int], cell_px: int) -> tuple[int, int]:
    """Return the pixel (row, column) of a cell that is furthest from the pixels outside the area.

    ``inside``: the area, bool [H,W]. ``cell``: row and column of the cell, which has ``cell_px`` x ``cell_px`` pixels.
    Only the cell and its neighbours are considered.
    """
    top, left = cell[0] * cell_px, cell[1] * cell_px
    around_top, around_left = max(0, top - cell_px), max(0, left - cell_px)
    depth_around = _depths(inside[around_top : top + 2 * cell_px, around_left : left + 2 * cell_px])
    depth = depth_around[top - around_top :, left - around_left :][:cell_px, :cell_px]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return top + int(row), left + int(column)


def _depths(area: Area) -> NDArray[np.float32]:
    """Return the distance of every pixel to the nearest one outside the area or the array, float32 [H,W]."""
    return distance_inside(np.pad(area, 1))[1:-1, 1:-1]
