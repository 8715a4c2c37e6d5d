"""Hints: where the object is in one image, and where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.errors import UsageError
from icm_cli.files import combined_digest

Point: TypeAlias = tuple[float, float]
"""x and y in pixels of the displayed image: from its top left corner, x to the right and y down."""
Box: TypeAlias = tuple[float, float, float, float]
"""x and y of two opposite corners."""
Area: TypeAlias = NDArray[np.bool_]
"""Pixels of an area, bool [H,W]."""
MAX_AREA_POINTS = 8
"""Largest number of points that stand for an area."""
MIN_POINT_DISTANCE = 4.0
"""Points of an area that are closer than this many of its half widths to a chosen one are not chosen."""


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What a person says about the object in one image of ``size`` (height, width).

    Coordinates are pixels of the displayed image: EXIF orientation is applied, and the image of an EXR file is its
    display window. Pixel (0, 0) covers x and y from 0 to 1.

    Raises UsageError if a point or box is outside the image, a point lies on both sides, or an area has another size.
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

    @property
    def digest(self) -> str:
        """Hash of everything that the hints say."""
        values = (getattr(self, each.name) for each in fields(self))
        return combined_digest(*(np.packbits(v).tobytes() if isinstance(v, np.ndarray) else repr(v) for v in values))

    @property
    def is_empty(self) -> bool:
        """Whether the hints say nothing."""
        areas = (self.object_area, self.background_area, self.keep, self.drop)
        has_area = any(area is not None and area.any() for area in areas)
        return not (self.points or self.not_points or self.boxes or has_area)

    def binding_points(self) -> tuple[list[Point], list[Point]]:
        """Return the points on and off the object: those that were given, and those that stand for areas."""
        return (
            [*self.points, *area_points(self.object_area)],
            [*self.not_points, *area_points(self.background_area)],
        )

    def __post_init__(self) -> None:
        height, width = self.size
        for name in ("points", "not_points"):
            for x, y in getattr(self, name):
                if not (0 <= x < width and 0 <= y < height):
                    raise UsageError(f"point {x:g},{y:g} is outside the image, which is {width}x{height}")
        for box in self.boxes:
            x0, y0, x1, y1 = box
            if not (0 <= min(x0, x1) < max(x0, x1) <= width and 0 <= min(y0, y1) < max(y0, y1) <= height):
                raise UsageError(f"box {x0:g},{y0:g},{x1:g},{y1:g} is empty or not inside the image, {width}x{height}")
        pixels = {(int(x), int(y)) for x, y in self.points}
        for x, y in self.not_points:
            if (int(x), int(y)) in pixels:
                raise UsageError(f"point {x:g},{y:g} is given both on the object and off it; give one of the two")
        for name in ("object_area", "background_area", "keep", "drop"):
            area = getattr(self, name)
            if area is not None and area.shape != self.size:
                raise UsageError(f"{name} is {area.shape[1]}x{area.shape[0]} and the image {width}x{height}")


def area_points(area: Area | None) -> list[Point]:
    """Return points that stand for an area: on the centre lines of its strokes, widest first, far from each other."""
    if area is None or not area.any():
        return []
    padded = np.pad(area.astype(np.uint8), 1)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    points: list[Point] = []
    rows, columns = np.indices(area.shape)
    while len(points) < MAX_AREA_POINTS and depth.max() > 0:
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        radius = max(MIN_POINT_DISTANCE * float(depth[row, column]), 1.0)
        points.append((float(column) + 0.5, float(row) + 0.5))
        depth[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = 0
    return points
