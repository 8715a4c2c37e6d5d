"""Make the alpha of an image follow its hints.

Hints act in three places: they edit the coarse alpha, they are prompts of the object model, and they correct the final
alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icm_cli.errors import UsageError
from icm_cli.geometry import Float, distance_inside, resize
from icm_cli.guidance.hints import Area, Box, Hints, Point, area_points
from icm_cli.images.pixels import ImageWindows
from icm_cli.model.contracts import PointPrompts

BORDER_PX = 3.0
"""Distance over which corrected pixels, and areas to keep or drop, fade into the alpha around them."""
BOX_MARGINS = 0.05, 0.10
"""Outside a box, an alpha fades to 0 between these distances from it, because boxes are drawn imprecisely.

They are fractions of the longer side of the box.
"""
MIN_DIFFERENCE = 1 / 255
"""A pixel follows a hint if its alpha is at least this far above or below one half, so that rounding keeps the side."""
OFF_OBJECT, ON_OBJECT, BOX_START, BOX_END = range(4)
"""Labels of :class:`~icm_cli.model.contracts.PointPrompts`."""
Cell: TypeAlias = tuple[int, int]
"""Row and column of a pixel of an alpha."""


def says_present(hints: Hints) -> bool:
    """Return whether hints mark a part of the object, so that it must be in the image."""
    areas = (hints.object_area, hints.keep)
    return bool(hints.points or hints.boxes) or any(area is not None and bool(area.any()) for area in areas)


def find_cell(point: Point, size: tuple[int, int], shape: tuple[int, ...]) -> Cell:
    """Return the pixel of an alpha at a point (x, y) of its image.

    ``size``: height and width of the image. ``shape``: that of the alpha, [h,w], which may differ.
    """
    row, column = (
        min(count - 1, int(position / length * count))
        for position, length, count in zip(point[::-1], size, shape, strict=True)
    )
    return row, column


def move_hints(hints: Hints, windows: ImageWindows) -> Hints:
    """Return hints in pixels of the data window of an image, from hints in pixels of its display window.

    Areas and boxes are cut off at the data window. Points off the object that are outside of it are dropped, because
    the alpha is 0 there. Raises UsageError if a point, a box or an area on the object is completely outside of it.
    """
    if windows.is_full:
        return hints
    points = _move_points(hints.points, windows)
    for (x, y), moved in zip(hints.points, points, strict=True):
        if not _is_inside(moved, windows):
            raise _outside_error(f"point {x:g},{y:g} on the object", windows)
    return replace(
        hints,
        size=windows.size,
        points=points,
        not_points=[point for point in _move_points(hints.not_points, windows) if _is_inside(point, windows)],
        boxes=[_move_box(box, windows) for box in hints.boxes],
        object_area=_move_object_area(hints.object_area, windows, "on the object"),
        background_area=_move_area(hints.background_area, windows),
        keep=_move_object_area(hints.keep, windows, "to keep"),
        drop=_move_area(hints.drop, windows),
    )


def _move_points(points: Sequence[Point], windows: ImageWindows) -> list[Point]:
    """Convert points of the display window to the data window."""
    top, left = windows.offset
    return [(x - left, y - top) for x, y in points]


def _is_inside(point: Point, windows: ImageWindows) -> bool:
    """Return whether a point is inside the data window."""
    height, width = windows.size
    return 0 <= point[0] < width and 0 <= point[1] < height


def _move_box(box: Box, windows: ImageWindows) -> Box:
    """Convert a box of the display window to the data window, and cut it off there.

    Raises UsageError if it is outside.
    """
    height, width = windows.size
    corners = np.array(_move_points([box[:2], box[2:]], windows))
    (x0, y0), (x1, y1) = np.clip(np.sort(corners, axis=0), 0, (width, height)).tolist()
    if x0 >= x1 or y0 >= y1:
        raise _outside_error(f"box {','.join(f'{number:g}' for number in box)}", windows)
    return x0, y0, x1, y1


def _move_area(area: Area | None, windows: ImageWindows) -> Area | None:
    return None if area is None else windows.display_window.move_pixels(area, windows)


def _move_object_area(area: Area | None, windows: ImageWindows, what: str) -> Area | None:
    """Convert an area of the display window to the data window. ``what``: its name in messages.

    Raises UsageError if no pixel of the area is inside.
    """
    moved = _move_area(area, windows)
    if area is not None and area.any() and not np.any(moved):
        row, column = np.argwhere(area)[0]
        raise _outside_error(f"area {what} at {column},{row}", windows)
    return moved


def _outside_error(what: str, windows: ImageWindows) -> UsageError:
    advice = "the image has no pixels there; move it inside or remove it"
    return UsageError(f"{what} is outside the data window: {windows}; {advice}")


def edit_coarse_alpha(alpha: Tensor, hints: Hints) -> Tensor:
    """Return a coarse alpha, float32 [h,w] of any size, set to 1 in the object area and 0 in the background area."""
    for area, value in ((hints.object_area, 1.0), (hints.background_area, 0.0)):
        if area is not None:
            fraction = resize(area.astype(np.float32), (alpha.shape[0], alpha.shape[1]))
            alpha = alpha + torch.from_numpy(fraction).to(alpha) * (value - alpha)
    return alpha


def make_prompts(hints: Hints) -> PointPrompts | None:
    """Return the points and the boxes of hints as prompts for the object model; None if there are none.

    Several boxes become one, their common bounding box, because the model was trained with one box for each object.
    """
    on, off = hints.binding_points()
    coordinates = [*on, *off]
    labels = [ON_OBJECT] * len(on) + [OFF_OBJECT] * len(off)
    if hints.boxes:
        corners = np.reshape(hints.boxes, (-1, 2))
        coordinates += [tuple(corners.min(axis=0)), tuple(corners.max(axis=0))]
        labels += [BOX_START, BOX_END]
    if not labels:
        return None
    height, width = hints.size
    fractions = torch.tensor(np.asarray(coordinates) / (width, height), dtype=torch.float32)
    return PointPrompts(fractions, torch.tensor(labels))


def clip_to_boxes(alpha: Tensor, hints: Hints) -> Tensor:
    """Return an alpha, float32 [h,w] of any size, faded to 0 outside the boxes of the hints.

    As in :func:`make_prompts`, several boxes are one: their common bounding box.
    """
    if not hints.boxes:
        return alpha
    corners = np.reshape(hints.boxes, (-1, 2))
    start, end = corners.min(axis=0), corners.max(axis=0)
    fade_start, fade_end = (margin * float((end - start).max()) for margin in BOX_MARGINS)
    weights = []
    for length, low, high, pixels in zip(alpha.shape, start[::-1], end[::-1], hints.size, strict=True):
        centres = (torch.arange(length, device=alpha.device) + 0.5) * (pixels / length)
        distance = torch.maximum(low - centres, centres - high)  # negative inside the box
        weights.append(((fade_end - distance) / (fade_end - fade_start)).clamp(0, 1))
    weights_of_rows, weights_of_columns = weights
    return alpha * weights_of_rows[:, None] * weights_of_columns


def apply_hints_to_alpha(alpha: Float, hints: Hints) -> Float:
    """Return a final alpha, float32 [H,W] of the size of the hints, corrected where it does not follow them.

    The result is above one half at points and in areas on the object, and below one half at those off it, also after
    rounding to 8 bits. It is 1 in ``keep`` and 0 in ``drop``, which take precedence over areas. A rough mask is wrong
    at the edge of the object, so only a few points inside it are followed.

    A pixel that does not follow the hints becomes 1 or 0. Other pixels change only if they are closer than
    ``BORDER_PX`` to such a pixel, or to ``keep`` or ``drop``.
    """
    on, off, keep, drop = _enforced_areas(hints)
    bound = alpha.copy()
    fade = np.where(off, 0, _fade(on & ~_follows(bound, True)))
    bound = np.maximum(bound, fade)
    fade = np.where(on, 0, _fade(off & ~_follows(bound, False)))
    bound = np.minimum(bound, 1 - fade)
    bound = np.maximum(np.minimum(bound, 1 - _fade(drop)), _fade(keep))
    # The fading at the border of keep and drop may have moved pixels of hints to the wrong side of one half again.
    bound[on & ~_follows(bound, True)] = 0.5 + 2 * MIN_DIFFERENCE
    bound[off & ~_follows(bound, False)] = 0.5 - 2 * MIN_DIFFERENCE
    bound[keep] = 1
    bound[drop] = 0
    return bound


def apply_hints_to_trimap(trimap: NDArray[np.uint8], hints: Hints) -> NDArray[np.uint8]:
    """Return a trimap, uint8 [H,W] of the size of the hints, set to 255 on the object and 0 off it.

    These are the pixels of :func:`apply_hints_to_alpha`. Without this, those close to an edge would be unknown (128).
    """
    on, off, keep, drop = _enforced_areas(hints)
    bound = trimap.copy()
    bound[on | keep] = 255
    bound[off | drop] = 0
    return bound


def _enforced_areas(hints: Hints) -> tuple[Area, Area, Area, Area]:
    """Return the pixels that the alpha must follow: on the object, off it, to keep and to drop, each bool [H,W].

    No pixel is in two of them.
    """
    nothing = np.zeros(hints.size, np.bool_)
    areas = (hints.object_area, hints.background_area, hints.keep, hints.drop)
    on, off, keep, drop = (nothing if area is None else area for area in areas)
    labelled_points = [(hints.points, True), (hints.not_points, False)]
    if hints.is_rough_mask:  # its edge is not exact, so the alpha follows only points inside of it
        labelled_points = [(area_points(on), True), (area_points(off), False), *labelled_points]
        on = off = nothing
    # Background takes precedence over object, points over areas, and keep and drop over both.
    on, off = on & ~off, off.copy()
    for points, is_on in labelled_points:
        for x, y in points:
            pixel = int(y), int(x)
            on[pixel] = is_on
            off[pixel] = not is_on
    is_free = ~(keep | drop)
    return on & is_free, off & is_free, keep, drop


def _follows(alpha: Float, is_on: bool) -> Area:
    """Return where an alpha follows hints on the object (above one half), or off it (below), bool [H,W]."""
    return np.asarray(alpha >= 0.5 + MIN_DIFFERENCE if is_on else alpha <= 0.5 - MIN_DIFFERENCE)


def _fade(area: Area) -> Float:
    """Return 1 in an area, falling to 0 over ``BORDER_PX`` outside of it, float32 [H,W]."""
    return np.asarray(np.clip(1 - distance_inside(~area) / BORDER_PX, 0, 1), np.float32)
