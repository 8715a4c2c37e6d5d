"""Read painted images: strokes, or a rough mask, that mark the object and what is not the object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.errors import ImageError, UsageError
from icm_cli.geometry import format_size
from icm_cli.guidance.hints import MIN_MASK_FRACTION, Hints
from icm_cli.images.pixels import DecodedImage
from icm_cli.images.reading import read_stored_pixels

DARK, BRIGHT = 0.25, 0.75
"""A colour whose channels are all below ``DARK`` is black, and above ``BRIGHT`` white."""
MIN_CHROMA = 0.3
"""A colour is red or green if that channel exceeds the two others by more than this."""
MAX_CANVAS_FRACTION = 0.5
"""If the image has coloured strokes, and black or white covers more of it than this, that is an unpainted canvas."""
EXPECTED = (
    "expected white or green where the object is, black or red where it is not, and transparent or mid-grey elsewhere"
)


def read_scribble(path: Path, size: tuple[int, int]) -> Hints:
    """Read strokes: white or green on the object, black or red off it. Unpainted pixels are transparent or mid-grey.

    A file in which nearly all pixels have these colours is a rough mask. ``size``: height and width of the image that
    was painted on. Raises UsageError for a file that cannot be read, has another size, other colours or no stroke.
    """
    try:
        stored = read_stored_pixels(path)
    except ImageError as error:
        raise UsageError(f"scribble cannot be used: {error}") from error
    if stored.values.shape[:2] != size:
        raise UsageError(
            f"scribble {path} is {format_size(stored.values.shape)}, and the image is {format_size(size)}; give "
            "strokes that were drawn on this image"
        )
    is_object, is_background = _classify(stored, path)
    if not (is_object.any() or is_background.any()):
        raise UsageError(f"scribble {path} has no stroke; {EXPECTED}")
    is_mask = bool((is_object | is_background).mean() > MIN_MASK_FRACTION)
    return Hints(size=size, object_area=is_object, background_area=is_background, is_outlined=is_mask)


def _classify(stored: DecodedImage, path: Path) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the pixels on the object and those off it, bool [H,W]. Raises UsageError for other colours."""
    pixels = np.clip(stored.pixels.astype(np.float32) / np.float32(stored.scale), 0, 1)
    colours = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    red, green, blue = colours[..., 0], colours[..., 1], colours[..., 2]
    darkest, brightest = colours.min(axis=-1), colours.max(axis=-1)
    is_opaque: Any = True if stored.alpha is None else stored.alpha > 0.5 * stored.scale
    is_green = is_opaque & (green - np.maximum(red, blue) > MIN_CHROMA)
    is_red = is_opaque & (red - np.maximum(green, blue) > MIN_CHROMA)
    is_white = is_opaque & (darkest > BRIGHT)
    is_black = is_opaque & (brightest < DARK)
    is_other = is_opaque & (brightest - darkest > MIN_CHROMA) & ~is_green & ~is_red
    # Erosion removes the mixed colours at the edges of strokes, which are not an error.
    other_stroke = cv2.erode(is_other.astype(np.uint8), np.ones((3, 3), np.uint8))
    if other_stroke.any():
        row, column = np.unravel_index(int(other_stroke.argmax()), other_stroke.shape)
        colour = "".join(f"{round(255 * float(channel)):02x}" for channel in colours[row, column])
        raise UsageError(f"scribble {path} has the colour #{colour} at {column},{row}; {EXPECTED}")
    if (is_green.any() or is_red.any()) and max(is_white.mean(), is_black.mean()) > MAX_CANVAS_FRACTION:
        canvas = "white" if is_white.mean() > MAX_CANVAS_FRACTION else "black"
        raise UsageError(f"scribble {path} has red or green strokes, and is {canvas} elsewhere; {EXPECTED}")
    return is_white | is_green, is_black | is_red
