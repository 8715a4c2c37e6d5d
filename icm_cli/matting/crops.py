"""Crops of pictures about a thing, which then gets the whole grid of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from icm_cli.geometry import Float
from icm_cli.images.pixels import ImageWindows

Seen = TypeVar("Seen")
MARGIN = 0.175
"""Margin of a crop about the thing, as a share of the thing's longer side."""
LEAST_SIDE = 0.2
"""Least height and width of a crop, as shares of the frame's."""
CUT_FROM = 0.02
"""Least part of a crop's side, as a share of that side, along which the thing lies where it is taken to be cut."""
WIDER = 0.5
"""Growth of a crop at a side where it cuts the thing, as a share of its height or width."""
MOST_LOOKS = 4
"""Most crops of one picture, each wider than the one before."""
FADE = 0.05
"""Share of a crop's side over which its alpha fades to nothing at that side."""
Place = tuple[slice, slice]
"""Rows and columns of a picture."""


def place_of(
    thing: NDArray[np.bool_],
    size: tuple[int, int],
    windows: ImageWindows | None = None,
    *,
    margin: float = MARGIN,
    least_side: float = LEAST_SIDE,
) -> Place | None:
    """The part of a picture of ``size`` about a thing, with a margin; None where there is no thing, or outside of it.

    ``thing``: bool [h,w] of the same picture, of any size, or of the display window in which the picture lies where
    ``windows`` say. ``margin``, ``least_side``: as :data:`MARGIN` and :data:`LEAST_SIDE` say.
    """
    if not thing.any():
        return None
    display, at = (size, (0, 0)) if windows is None else (windows.display, windows.at)
    ends = [np.flatnonzero(thing.any(axis=axis))[[0, -1]] + (0, 1) for axis in (1, 0)]
    around = margin * max(end - start for start, end in ends)
    found = []
    for n, (start, end) in enumerate(ends):
        middle, half = (start + end) / 2, max((end - start) / 2 + around, least_side * thing.shape[n] / 2)
        scale = display[n] / thing.shape[n]
        low = max(0, math.floor((middle - half) * scale) - at[n])
        high = min(size[n], math.ceil((middle + half) * scale) - at[n])
        if low >= high:
            return None
        found.append(slice(low, high))
    return found[0], found[1]


def wider(place: Place, thing: NDArray[np.bool_], size: tuple[int, int]) -> Place:
    """A crop of a picture of ``size``, wider where it cuts the thing, bool [h,w] of the crop; else the same crop."""
    found = []
    for n, along in enumerate((thing, thing.T)):
        start, end = place[n].start, place[n].stop
        more = math.ceil(WIDER * (end - start))
        first, last = (along[edge].mean() >= CUT_FROM for edge in (0, -1))
        found.append(slice(max(0, start - more * first), min(size[n], end + more * last)))
    return found[0], found[1]


def looked(
    place: Place, size: tuple[int, int], look: Callable[[Place], tuple[Seen, Float] | None], most: int = MOST_LOOKS
) -> tuple[Seen, Float, Place] | None:
    """Look at a crop of a picture of ``size``, and at wider ones where it cuts the thing, ``most`` at most.

    ``look`` gives what it saw and the alpha [h,w] of the crop, or None to end it all. Returns the last look and its
    place.
    """
    while (found := look(place)) is not None:
        seen, alpha = found
        further, most = wider(place, alpha > 0.5, size), most - 1
        if further == place or most <= 0:
            return seen, alpha, place
        place = further
    return None


def put(part: Float, place: Place, size: tuple[int, int]) -> Float:
    """Put an alpha [h,w] of a crop in its place in a picture of ``size``, float32 [H,W], 0 beside it.

    Where the picture goes on beyond the crop it fades over :data:`FADE` of the crop's side, so that no edge of a crop
    shows.
    """
    whole = np.zeros(size, np.float32)
    rows, columns = (
        _fading(side.stop - side.start, at_start=side.start > 0, at_end=side.stop < length)
        for side, length in zip(place, size, strict=True)
    )
    whole[place] = part * rows[:, None] * columns
    return whole


def _fading(length: int, *, at_start: bool, at_end: bool) -> Float:
    ramp = np.minimum(1.0, np.arange(length, dtype=np.float32) / max(1.0, FADE * length))
    level = np.ones(length, np.float32)
    return np.minimum(ramp if at_start else level, ramp[::-1] if at_end else level)


def area_of(place: Place) -> int:
    """Pixels of a part of a picture."""
    rows, columns = place
    return (rows.stop - rows.start) * (columns.stop - columns.start)
