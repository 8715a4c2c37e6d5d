"""Read the mask of a reference: binary, soft, a trimap, label indices or instance colours.

If a mask has several labels, the user must name one. Only unambiguous masks are read without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.errors import UsageError
from icm_cli.geometry import has_same_aspect
from icm_cli.images.pixels import TRANSPOSING_ORIENTATIONS, ImageWindows
from icm_cli.images.reading import GREY_TOLERANCE, StoredPixels, extra_frame_notices, read_stored_pixels
from icm_cli.options import MaskOrientation

VOID = 255
"""Palette index of void pixels in the PNGs of PASCAL VOC."""
END_TOLERANCE = 0.05
"""Values this close to 0 or to the maximum, as a fraction of the scale, are background and
foreground."""
MIN_FLAT_FRACTION = 1e-4
"""Minimum fraction of pixels that are surrounded by their own value, for that value to be a
label."""
MAX_LABELS = 64
"""An image with more values than this is a soft mask and not a label map."""
MAX_LISTED_LABELS = 12
"""Maximum number of labels that a message lists."""
UPRIGHT = 1
"""EXIF orientation of an image that is upright as stored."""


@dataclass(frozen=True)
class Mask:
    """The mask of an object."""

    inside: NDArray[np.bool_]
    """Pixels of the object, bool [H,W]."""
    unknown: NDArray[np.bool_]
    """Pixels that are neither object nor background (void, unknown), bool [H,W]."""


@dataclass(frozen=True)
class MaskPlacement:
    """How a mask is placed on its reference."""

    size: tuple[int, int]
    """Height and width of the upright reference."""
    orientation: int
    """EXIF orientation that was applied to the reference."""
    wanted: MaskOrientation
    """Orientation of the mask: "upright" as the reference is shown, "stored" as in the reference's
    file, or "auto"."""


def read_mask(
    path: Path,
    label: str | None,
    notice: Callable[[str], None],
    placement: MaskPlacement | None = None,
    windows: ImageWindows | None = None,
) -> Mask:
    """Read the mask of a reference.

    ``label``: the value, index or colour ``#rrggbb`` of the object. ``placement``: how the mask is
    placed on its reference; a notice says which orientation is used if both fit. ``windows``: those
    of the reference; a mask of the same display window is cut to its data window.

    Raises UsageError for an ambiguous mask, listing its labels, and ImageError for an unreadable
    file.
    """
    stored = read_stored_pixels(path, windows, has_labels=label is not None)
    for sentence in (*stored.notices, *extra_frame_notices("mask", path)):
        notice(sentence)
    if placement is not None:
        stored = _orient_mask(stored, placement, path, notice)
    if label is not None:
        return _select_label(stored, label, path)
    if stored.alpha is not None and stored.alpha.min() != stored.alpha.max():
        visible = stored.values[stored.alpha > 0]
        if (visible != visible[0]).any():
            notice(f"mask {path} has an alpha and colours that vary; its alpha is used and its colours are ignored")
        return _mask_without_unknown(stored.alpha > 0.5 * stored.scale)
    if stored.is_palette:
        return _mask_from_indices(stored.values, path)
    values = stored.values
    if values.ndim == 3:
        spread = values.max(axis=-1) - values.min(axis=-1)
        if spread.max() > GREY_TOLERANCE * stored.scale / 255.0:
            return _mask_from_colours(values, stored.scale, path)
        values = values.max(axis=-1)
    return _mask_from_greys(values, stored.scale, path, notice)


def _orient_mask(
    stored: StoredPixels, placement: MaskPlacement, path: Path, notice: Callable[[str], None]
) -> StoredPixels:
    """Apply the EXIF orientation of the reference to a mask that was drawn on its stored pixels."""
    if placement.wanted != "auto":
        return stored if placement.wanted == "upright" else stored.reorient(placement.orientation)
    if placement.orientation == UPRIGHT or stored.orientation != UPRIGHT:
        return stored  # both orientations are equal, or the mask has its own
    size = stored.values.shape[:2]
    upright = placement.size
    as_stored = upright[::-1] if placement.orientation in TRANSPOSING_ORIENTATIONS else upright
    fits = [size == each for each in (upright, as_stored)]
    if not any(fits):
        fits = [has_same_aspect(size, each) for each in (upright, as_stored)]
    if fits == [False, True]:
        notice(
            f"mask {path} has the orientation of its reference's stored pixels; the EXIF "
            "orientation of the reference is applied to the mask too"
        )
        return stored.reorient(placement.orientation)
    if fits == [True, True]:
        notice(
            f"mask {path} fits its reference both upright and as stored, because EXIF changes its "
            "orientation; it is used as upright; give --mask-orientation stored, or upright to "
            "confirm"
        )
    return stored


def _mask_from_indices(values: NDArray[Any], path: Path) -> Mask:
    labels = [int(each) for each in np.unique(values) if each not in (0, VOID)]
    if len(labels) > 1:
        raise _ambiguous_error(path, {str(each): float((values == each).mean()) for each in labels}, labels[0])
    inside = values == (labels[0] if labels else VOID)  # black and white, as a palette of two colours
    return Mask(inside, (values == VOID) & ~inside)


def _mask_from_colours(values: NDArray[Any], scale: float, path: Path) -> Mask:
    colours = (values.astype(np.float32) * (255.0 / scale) + 0.5).astype(np.uint32)
    packed = (colours[..., 0] << 16) | (colours[..., 1] << 8) | colours[..., 2]
    flat = {
        each: fraction for each, fraction in _flat_fractions(packed).items() if _max_channel(each) > END_TOLERANCE * 255
    }
    if len(flat) > 1:
        raise _ambiguous_error(
            path, {f"#{int(each):06x}": fraction for each, fraction in flat.items()}, f"'#{next(iter(flat)):06x}'"
        )
    top = max((_max_channel(each) for each in flat), default=255)
    return _mask_without_unknown(colours.max(axis=-1) > 0.5 * top)


def _mask_from_greys(values: NDArray[Any], scale: float, path: Path, notice: Callable[[str], None]) -> Mask:
    low, high = END_TOLERANCE * scale, (1.0 - END_TOLERANCE) * scale
    present = np.unique(values)
    if len(present) == 3 and present[0] <= low and abs(present[1] / scale - 0.5) < END_TOLERANCE and present[2] >= high:
        notice(f"mask {path} is a trimap; its unknown pixels are neither object nor background")
        return Mask(values > high, (values > low) & (values <= high))
    if len(present) > MAX_LABELS or present[0] > low:  # a soft mask, or one without black
        return _mask_without_unknown(values > 0.5 * scale)
    flat = _flat_fractions(values)
    if present[-1] >= high and (near_black := [f"{each:g}" for each in flat if each <= low]):
        notice(
            f"mask {path} has areas of {', '.join(near_black[:MAX_LISTED_LABELS])} of {scale:g} "
            "next to black and white; they are used as black; give --mask-label if they are labels"
        )
        flat = {each: fraction for each, fraction in flat.items() if each > low}
    if not any(each < high for each in flat):
        return _mask_without_unknown(values > 0.5 * scale)
    if len(flat) == 1:
        (only,) = flat
        notice(f"mask {path} has one label, {_label_text(only)} of {scale:.10g}; it is used as the object")
        return _mask_without_unknown(values > 0.5 * float(only))
    labels = {_label_text(each): fraction for each, fraction in flat.items()}
    raise _ambiguous_error(path, labels, next(iter(labels)))


def _select_label(stored: StoredPixels, label: str, path: Path) -> Mask:
    values = stored.values
    unknown = values == VOID if stored.is_palette and label != str(VOID) else np.zeros(values.shape[:2], np.bool_)
    if label.startswith("#"):
        if values.ndim == 2:
            raise UsageError(f"mask {path} has no colours, and --mask-label is {label}; expected a number")
        if not re.fullmatch("#[0-9a-fA-F]{6}", label):
            raise UsageError(f"--mask-label {label!r} is not a colour; expected #rrggbb, such as '#fa3253'")
        colour = np.array([int(label[at : at + 2], 16) for at in (1, 3, 5)])
        inside = (np.abs(values * (255.0 / stored.scale) - colour) < 1.0).all(axis=-1)
    else:
        try:
            number = float(label)
        except ValueError:
            raise UsageError(
                f"--mask-label {label!r} is neither a number nor a colour; expected a label such as 1 or '#fa3253'"
            ) from None
        if values.ndim == 3 and (values.max(axis=-1) != values.min(axis=-1)).any():
            raise UsageError(f"mask {path} has colours, and --mask-label is the number {label}; expected #rrggbb")
        inside = (values if values.ndim == 2 else values[..., 0]) == number
    if not inside.any():
        raise UsageError(
            f"mask {path} has no pixel with the label {label}; expected one of {_format_labels(_all_labels(stored))}"
        )
    return Mask(inside, unknown & ~inside)


def _all_labels(stored: StoredPixels) -> dict[str, float]:
    values = stored.values
    if values.ndim == 2:
        return {_label_text(each): fraction for each, fraction in _value_fractions(values).items()}
    colours = (values.astype(np.float32) * (255.0 / stored.scale) + 0.5).astype(np.uint32)
    packed = (colours[..., 0] << 16) | (colours[..., 1] << 8) | colours[..., 2]
    return {f"#{int(each):06x}": fraction for each, fraction in _value_fractions(packed).items()}


def _label_text(label: Any) -> str:
    """Return a label as the user can give it. The format %g would round large ids."""
    return f"{float(label):.10g}"


def _flat_fractions(values: NDArray[Any]) -> dict[Any, float]:
    """Return the fraction of pixels of every value except 0 that fills areas.

    The values of antialiased edges fill no areas.
    """
    numbers = np.asarray(values, np.float64)
    kernel = np.ones((3, 3), np.uint8)
    middle = cv2.dilate(numbers, kernel) == cv2.erode(numbers, kernel)
    found = _value_fractions(values[middle], values.size)
    every = _value_fractions(values)
    return {each: every[each] for each, fraction in found.items() if each != 0 and fraction >= MIN_FLAT_FRACTION}


def _value_fractions(values: NDArray[Any], total: int | None = None) -> dict[Any, float]:
    """Return the fraction of pixels of each value, the most frequent first."""
    found, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts)
    return {found[at]: float(counts[at]) / (total or values.size) for at in order}


def _max_channel(packed: Any) -> int:
    return max(int(packed) >> 16, int(packed) >> 8 & 255, int(packed) & 255)


def _mask_without_unknown(inside: NDArray[np.bool_]) -> Mask:
    return Mask(inside, np.zeros(inside.shape, np.bool_))


def _ambiguous_error(path: Path, labels: dict[str, float], example: object) -> UsageError:
    return UsageError(
        f"mask {path} has several labels: {_format_labels(labels)}; expected one object; select "
        f"it, as in --mask-label {example}"
    )


def _format_labels(labels: dict[str, float]) -> str:
    named = [f"{label} ({fraction:.1%} of the image)" for label, fraction in list(labels.items())[:MAX_LISTED_LABELS]]
    more = len(labels) - len(named)
    return ", ".join(named) + (f" and {more} more" if more > 0 else "")
