"""Read a reference's mask as people have them: black and white, soft, a trimap, label indices, instance colours.

Which of several labels is meant cannot be guessed, so it is asked for; only what is beyond doubt is taken.
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
"""Index of pixels that belong to nothing, in the palette PNGs of PASCAL VOC."""
NEAR = 0.05
"""Values this near to 0 or to the largest, as a share of the scale, are background and foreground."""
LEAST_FLAT_SHARE = 1e-4
"""Share of the pixels that lie in the middle of their own value, from which on that value is a label."""
MOST_LABELS = 64
"""A picture of more values than this is no label map but a soft mask."""
MAX_LISTED_LABELS = 12
"""Labels listed in a message."""
UPRIGHT = 1
"""EXIF's orientation of what needs no turn."""


@dataclass(frozen=True)
class Mask:
    """Pixels of the thing, and those that are neither it nor the rest (void, unknown): bool [H,W] each."""

    inside: NDArray[np.bool_]
    unknown: NDArray[np.bool_]


@dataclass(frozen=True)
class MaskPlacement:
    """Size (height, width) of an upright reference, the EXIF orientation that made it upright, and how its mask lies:
    ``wanted`` is "upright" as the reference is seen, "stored" as it lies in its file, or "auto"."""

    size: tuple[int, int]
    orientation: int
    wanted: MaskOrientation


def read_mask(
    path: Path,
    label: str | None,
    notice: Callable[[str], None],
    turn: MaskPlacement | None = None,
    windows: ImageWindows | None = None,
) -> Mask:
    """Read the mask of a reference. ``label``: the value, index or colour ``#rrggbb`` that is the thing.

    ``turn``: of its reference; where a mask could lie in both ways, a notice says which was taken. ``windows``: those
    of its reference; a mask of the same display window comes as that one's data window has it.

    Raises UsageError where it cannot be told what is meant, listing what there is; ImageError for a bad file.
    """
    stored = read_stored_pixels(path, windows, has_labels=label is not None)
    for sentence in (*stored.notices, *extra_frame_notices("mask", path)):
        notice(sentence)
    if turn is not None:
        stored = _laid(stored, turn, path, notice)
    if label is not None:
        return _labelled(stored, label, path)
    if stored.alpha is not None and stored.alpha.min() != stored.alpha.max():
        visible = stored.values[stored.alpha > 0]
        if (visible != visible[0]).any():
            notice(f"mask {path} has an alpha and colours that vary; its alpha was taken, and its colours were not")
        return _without_unknown(stored.alpha > 0.5 * stored.scale)
    if stored.is_palette:
        return _of_indices(stored.values, path)
    values = stored.values
    if values.ndim == 3:
        spread = values.max(axis=-1) - values.min(axis=-1)
        if spread.max() > GREY_TOLERANCE * stored.scale / 255.0:
            return _of_colours(values, stored.scale, path)
        values = values.max(axis=-1)
    return _of_greys(values, stored.scale, path, notice)


def _laid(stored: StoredPixels, turn: MaskPlacement, path: Path, notice: Callable[[str], None]) -> StoredPixels:
    """A mask turned as its reference is, where it was drawn on the pixels as that has them in its file."""
    if turn.wanted != "auto":
        return stored if turn.wanted == "upright" else stored.reoriented(turn.orientation)
    if turn.orientation == UPRIGHT or stored.orientation != UPRIGHT:
        return stored  # there is but one way, or the mask says its own
    size = stored.values.shape[:2]
    as_seen = turn.size
    as_stored = as_seen[::-1] if turn.orientation in TRANSPOSING_ORIENTATIONS else as_seen
    fits = [size == each for each in (as_seen, as_stored)]
    if not any(fits):
        fits = [has_same_aspect(size, each) for each in (as_seen, as_stored)]
    if fits == [False, True]:
        notice(f"mask {path} lies as its reference does in its file, which EXIF turns; the mask was turned too")
        return stored.reoriented(turn.orientation)
    if fits == [True, True]:
        notice(
            f"mask {path} fits its reference both as that is seen and as it lies in its file, which EXIF turns; it was "
            "taken as seen: give --mask-orientation stored, or upright if that is right"
        )
    return stored


def _of_indices(values: NDArray[Any], path: Path) -> Mask:
    labels = [int(each) for each in np.unique(values) if each not in (0, VOID)]
    if len(labels) > 1:
        raise _ambiguous(path, {str(each): float((values == each).mean()) for each in labels}, labels[0])
    inside = values == (labels[0] if labels else VOID)  # black and white, as a palette of two
    return Mask(inside, (values == VOID) & ~inside)


def _of_colours(values: NDArray[Any], scale: float, path: Path) -> Mask:
    colours = (values.astype(np.float32) * (255.0 / scale) + 0.5).astype(np.uint32)
    packed = (colours[..., 0] << 16) | (colours[..., 1] << 8) | colours[..., 2]
    flat = {each: share for each, share in _flat(packed).items() if _brightest(each) > NEAR * 255}
    if len(flat) > 1:
        raise _ambiguous(
            path, {f"#{int(each):06x}": share for each, share in flat.items()}, f"'#{next(iter(flat)):06x}'"
        )
    top = max((_brightest(each) for each in flat), default=255)
    return _without_unknown(colours.max(axis=-1) > 0.5 * top)


def _of_greys(values: NDArray[Any], scale: float, path: Path, notice: Callable[[str], None]) -> Mask:
    low, high = NEAR * scale, (1.0 - NEAR) * scale
    present = np.unique(values)
    if len(present) == 3 and present[0] <= low and abs(present[1] / scale - 0.5) < NEAR and present[2] >= high:
        notice(f"mask {path} is a trimap; its unknown pixels count as neither inside nor outside")
        return Mask(values > high, (values > low) & (values <= high))
    if len(present) > MOST_LABELS or present[0] > low:  # soft, or not black where the thing is not
        return _without_unknown(values > 0.5 * scale)
    flat = _flat(values)
    if present[-1] >= high and (nearly := [f"{each:g}" for each in flat if each <= low]):
        notice(
            f"mask {path} has areas of {', '.join(nearly[:MAX_LISTED_LABELS])} of {scale:g} next to black and "
            "white; they were taken as black: give --mask-label if they are labels"
        )
        flat = {each: share for each, share in flat.items() if each > low}
    middle = [each for each in flat if each < high]
    if not middle:
        return _without_unknown(values > 0.5 * scale)
    if len(flat) == 1:
        (only,) = flat
        notice(f"mask {path} has one label, {_text(only)} of {scale:.10g}; it was taken for the thing")
        return _without_unknown(values > 0.5 * float(only))
    raise _ambiguous(path, {_text(each): share for each, share in flat.items()}, _text(next(iter(flat))))


def _labelled(stored: StoredPixels, label: str, path: Path) -> Mask:
    values = stored.values
    unknown = values == VOID if stored.is_palette and label != str(VOID) else np.zeros(values.shape[:2], np.bool_)
    if label.startswith("#"):
        if values.ndim == 2:
            raise UsageError(f"mask {path} has no colours, and its label is given as {label}; give a number")
        if not re.fullmatch("#[0-9a-fA-F]{6}", label):
            raise UsageError(f"mask label {label!r} is no colour; expected #rrggbb, as in '#fa3253'")
        colour = np.array([int(label[at : at + 2], 16) for at in (1, 3, 5)])
        inside = (np.abs(values * (255.0 / stored.scale) - colour) < 1.0).all(axis=-1)
    else:
        try:
            number = float(label)
        except ValueError:
            raise UsageError(f"mask label {label!r} is neither a number nor a colour #rrggbb") from None
        if values.ndim == 3 and (values.max(axis=-1) != values.min(axis=-1)).any():
            raise UsageError(f"mask {path} has colours, and its label is given as a number; give #rrggbb")
        inside = (values if values.ndim == 2 else values[..., 0]) == number
    if not inside.any():
        raise UsageError(f"mask {path} has no pixel of the label {label}; it has {_listed(_all_labels(stored))}")
    return Mask(inside, unknown & ~inside)


def _all_labels(stored: StoredPixels) -> dict[str, float]:
    values = stored.values
    if values.ndim == 2:
        return {_text(each): share for each, share in _shares(values).items()}
    colours = (values.astype(np.float32) * (255.0 / stored.scale) + 0.5).astype(np.uint32)
    packed = (colours[..., 0] << 16) | (colours[..., 1] << 8) | colours[..., 2]
    return {f"#{int(each):06x}": share for each, share in _shares(packed).items()}


def _text(label: Any) -> str:
    """A label as it can be given: %g would round large ids."""
    return f"{float(label):.10g}"


def _flat(values: NDArray[Any]) -> dict[Any, float]:
    """Share of the pixels of each value but 0 that fills areas: an antialiased edge's values do not."""
    numbers = np.asarray(values, np.float64)
    kernel = np.ones((3, 3), np.uint8)
    middle = cv2.dilate(numbers, kernel) == cv2.erode(numbers, kernel)
    found = _shares(values[middle], values.size)
    every = _shares(values)
    return {each: every[each] for each, share in found.items() if each != 0 and share >= LEAST_FLAT_SHARE}


def _shares(values: NDArray[Any], total: int | None = None) -> dict[Any, float]:
    """Share of each value, the commonest first."""
    found, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts)
    return {found[at]: float(counts[at]) / (total or values.size) for at in order}


def _brightest(packed: Any) -> int:
    return max(int(packed) >> 16, int(packed) >> 8 & 255, int(packed) & 255)


def _without_unknown(inside: NDArray[np.bool_]) -> Mask:
    return Mask(inside, np.zeros(inside.shape, np.bool_))


def _ambiguous(path: Path, labels: dict[str, float], example: object) -> UsageError:
    return UsageError(
        f"mask {path} has several labels, {_listed(labels)}; say which is the thing, as in --mask-label {example}"
    )


def _listed(labels: dict[str, float]) -> str:
    named = [f"{label} ({share:.1%} of the picture)" for label, share in list(labels.items())[:MAX_LISTED_LABELS]]
    more = len(labels) - len(named)
    return ", ".join(named) + (f" and {more} more" if more > 0 else "")
