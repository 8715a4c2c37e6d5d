"""Read the mask of a reference: binary, soft, a trimap, label indices or instance colours.

The kind of the mask is found from its values. If it has several labels, the user must select one (``--mask-label``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icm_cli.errors import UsageError, list_first
from icm_cli.geometry import has_same_aspect
from icm_cli.images.areas import MAX_LABELS, find_flat_pixels, has_colour, is_photograph, pack_colours, value_fractions
from icm_cli.images.decoding import open_image
from icm_cli.images.pixels import GREY_TOLERANCE, TRANSPOSING_ORIENTATIONS, DecodedImage, ImageWindows
from icm_cli.images.reading import extra_frame_notices, read_stored_pixels
from icm_cli.options import MaskOrientation

VOID = 255
"""Palette index of void pixels in the PNGs of PASCAL VOC."""
END_TOLERANCE = 0.05
"""A value this close to black or white, as a fraction of the scale, counts as black or white."""
MIN_AREA_FRACTION = 1e-4
"""A value is a label if at least this fraction of the pixels has it and only neighbours with the same value."""
WHITES = 255.0, 1023.0, 4095.0, 16383.0
"""Possible values of white in a 16-bit file: 8, 10, 12 and 14 bits may be stored in it without scaling."""
LOSSY_TYPES = frozenset({"jpeg", "avif", "heic"})
"""File types whose compression changes values slightly. WebP is checked separately, because it may be lossless."""
MAX_SOFT_STEP = 2
"""In a soft mask, neighbouring pixels of a gradient usually differ by at most this."""
MAX_LISTED_LABELS = 12
"""Largest number of labels that a message lists."""
UPRIGHT = 1
"""EXIF orientation of an image that is upright as stored."""


class AmbiguousMaskError(UsageError):
    """A mask has several labels, and none was selected."""

    def __init__(self, path: Path, labels: dict[str, float], example: object) -> None:
        """``labels``: label -> its fraction of the image. ``example``: a label that the user could select."""
        self.problem = f"mask {path} has several labels: {_format_labels(labels)}"
        super().__init__(f"{self.problem}; expected one object; select it, as in --mask-label {example}")


@dataclass(frozen=True)
class Mask:
    """The mask of an object."""

    inside: NDArray[np.bool_]
    """Pixels of the object, bool [H,W]."""
    unknown: NDArray[np.bool_]
    """Pixels that are neither object nor background (void, unknown), bool [H,W]."""


@dataclass(frozen=True)
class ReferenceOrientation:
    """Size and orientation of a reference, from which the orientation of its mask follows."""

    size: tuple[int, int]
    """Height and width of the upright reference."""
    exif: int
    """EXIF orientation that was applied to the reference."""
    requested: MaskOrientation
    """Value of ``--mask-orientation``."""


def read_mask(
    path: Path,
    label: str | None,
    notice: Callable[[str], None],
    orientation: ReferenceOrientation | None = None,
    windows: ImageWindows | None = None,
) -> Mask:
    """Read the mask of a reference.

    Args:
        label: Value, index or colour ``#rrggbb`` of the object, if the mask has several labels.
        notice: Gets a sentence for each assumption about the mask, such as its orientation.
        orientation: Orientation of the reference; None to keep the orientation of the mask.
        windows: Windows of the reference. An EXR mask with the same display window is cut to the data window.

    Raises UsageError for an ambiguous mask, listing its labels, and ImageError for an unreadable file.
    """
    stored = read_stored_pixels(path, windows, has_labels=label is not None)
    for sentence in (*stored.notices, *extra_frame_notices("mask", path)):
        notice(sentence)
    if orientation is not None:
        stored = _orient_mask(stored, orientation, path, notice)
    if label is not None:
        return _select_label(stored, label, path)
    values, opaque = stored.values, None
    if stored.alpha is not None and stored.alpha.min() != stored.alpha.max():
        opaque = stored.alpha > 0.5 * stored.scale
        if stored.indices is None or len(np.unique(stored.indices)) > MAX_LABELS or not opaque.any():
            return _mask_from_alpha(stored, path, notice)
    if stored.labels is not None:
        return _mask_from_indices(stored, stored.labels, opaque, path)
    if opaque is not None:
        _check_transparency(stored, path)
        notice(f"mask {path} has a palette with a transparent colour, which is used as black")
        values = np.where(opaque[..., None], values, 0)
    if values.ndim == 3:
        if has_colour(values, stored.scale):
            return _mask_from_colours(values, stored.scale, path, notice)
        values = values.max(axis=-1)
    return _mask_from_greys(values, stored.scale, path, notice)


def _orient_mask(
    stored: DecodedImage, orientation: ReferenceOrientation, path: Path, notice: Callable[[str], None]
) -> DecodedImage:
    """Apply the EXIF orientation of the reference to a mask that was drawn on its stored pixels."""
    if orientation.requested != "auto":
        return stored if orientation.requested == "upright" else stored.reorient(orientation.exif)
    if orientation.exif == UPRIGHT or stored.orientation != UPRIGHT:
        return stored  # both orientations are equal, or the mask has its own
    size = stored.values.shape[:2]
    upright = orientation.size
    as_stored = upright[::-1] if orientation.exif in TRANSPOSING_ORIENTATIONS else upright
    fits = [size == candidate for candidate in (upright, as_stored)]
    if not any(fits):
        fits = [has_same_aspect(size, candidate) for candidate in (upright, as_stored)]
    if fits == [False, True]:
        notice(
            f"mask {path} has the orientation of its reference's stored pixels; the EXIF "
            "orientation of the reference is applied to the mask too"
        )
        return stored.reorient(orientation.exif)
    if fits == [True, True]:
        notice(
            f"mask {path} fits its reference both upright and as stored, because EXIF changes its "
            "orientation; it is used as upright; give --mask-orientation stored, or upright to "
            "confirm"
        )
    return stored


def _mask_from_alpha(stored: DecodedImage, path: Path, notice: Callable[[str], None]) -> Mask:
    """Return the mask of a file with transparency: its opaque pixels. Raises UsageError."""
    assert stored.alpha is not None
    _check_transparency(stored, path)
    is_visible, values = stored.alpha > 0, stored.values
    visible, hidden = values[is_visible], values[~is_visible]
    # No notice if the colours cannot contradict the alpha: one colour on transparent black, or the same everywhere.
    has_visible_differences = (visible != visible[0]).any()
    has_bright_hidden_colour = (hidden != visible[0]).any() and hidden.max() > 0.5 * visible.max()
    if has_visible_differences or has_bright_hidden_colour:
        notice(f"mask {path} has an alpha and colours that vary; its alpha is used and its colours are ignored")
    return _mask_without_unknown(stored.alpha > 0.5 * stored.scale)


def _check_transparency(stored: DecodedImage, path: Path) -> None:
    """Raise UsageError if opaque pixels are black and transparent ones white, so that the object is not clear."""
    assert stored.alpha is not None
    opaque = stored.alpha > 0.5 * stored.scale
    brightness = stored.values if stored.values.ndim == 2 else stored.values.max(axis=-1)
    visible, hidden = brightness[opaque], brightness[~opaque]
    half, black = 0.5 * stored.scale, END_TOLERANCE * stored.scale
    if visible.size and visible.max() <= half and np.median(visible) <= black and (hidden > half).any():
        raise UsageError(
            f"mask {path} has transparent white and opaque black, so that its colours and its transparency mark "
            "opposite areas; expected the object in white; save the mask without transparency"
        )


def _mask_from_indices(
    stored: DecodedImage, indices: NDArray[Any], opaque: NDArray[np.bool_] | None, path: Path
) -> Mask:
    """Return the mask of a label map with a palette. Raises AmbiguousMaskError for several labels.

    The background is index 0, or black if index 0 has another colour; and all transparent pixels.
    """
    is_black = (stored.values == 0).all(axis=-1)
    background = indices == 0
    if is_black.any() and not is_black.all() and not is_black[background].any():
        background = is_black
    if opaque is not None:
        background = background | ~opaque
    labels = [int(label) for label in np.unique(indices[~background]) if label != VOID]
    if len(labels) > 1:
        raise AmbiguousMaskError(path, {str(label): float((indices == label).mean()) for label in labels}, labels[0])
    inside = (indices == (labels[0] if labels else VOID)) & ~background
    return Mask(inside, (indices == VOID) & ~inside & ~background)


def _mask_from_colours(values: NDArray[Any], scale: float, path: Path, notice: Callable[[str], None]) -> Mask:
    """Return the mask of a file with one colour on black. Raises AmbiguousMaskError for several colours.

    Raises UsageError for a photograph.
    """
    packed = pack_colours(values, scale)
    is_flat = find_flat_pixels(packed)
    if is_photograph(packed, is_flat):
        raise UsageError(
            f"mask {path} is a photograph: it has many colours, and nearly no areas of one colour; expected the object "
            "in white, and black elsewhere; check the order of --ref and --mask; save a mask of thin lines as PNG"
        )
    all_colours = _merge_noise(_label_fractions(packed, is_flat), path)
    bright = {colour: part for colour, part in all_colours.items() if _max_channel(colour) > END_TOLERANCE * 255}
    labels = bright or all_colours
    near_black = _name_colours({colour: part for colour, part in all_colours.items() if colour not in labels})
    if near_black:
        notice(
            f"mask {path} has areas of {', '.join(list(near_black)[:MAX_LISTED_LABELS])} besides brighter ones; they "
            "are used as black; give --mask-label if they are labels"
        )
    if len(labels) > 1:
        raise _several_colours_error(labels, path)
    if not labels and not _has_one_colour(values):
        fractions = value_fractions(packed)
        fractions.pop(0, None)  # black
        raise _several_colours_error(fractions, path)
    brightness = (values.max(axis=-1).astype(np.float32) * (255.0 / scale) + 0.5).astype(np.uint32)
    object_channel = max((_max_channel(colour) for colour in labels), default=int(brightness.max()))
    return _mask_without_unknown(brightness > 0.5 * object_channel)


def _several_colours_error(colours: Mapping[Any, float], path: Path) -> AmbiguousMaskError:
    named = _name_colours(colours)
    return AmbiguousMaskError(path, named, f"'{next(iter(named))}'")


def _mask_from_greys(values: NDArray[Any], scale: float, path: Path, notice: Callable[[str], None]) -> Mask:
    """Return the mask of a grey file: a trimap, a soft or binary mask, or one label. Raises AmbiguousMaskError."""
    present = np.unique(values)
    white = _guess_white(present, scale)
    if white < scale:
        notice(
            f"mask {path} has values up to {_label_text(present[-1])} of {scale:.10g}; {white:.10g} is used as "
            "white; give --mask-label if the values are labels"
        )
    low, high = END_TOLERANCE * white, (1.0 - END_TOLERANCE) * white
    if _is_trimap(present, white):
        notice(f"mask {path} is a trimap; its unknown pixels are neither object nor background")
        return Mask(values > high, (values > low) & (values <= high))
    if len(present) > MAX_LABELS:
        return _mask_from_soft_values(values, white, path)
    has_black = present[0] <= low
    if not has_black:
        return _mask_without_unknown(values > 0.5 * white)
    return _mask_from_grey_labels(values, white, path, notice)


def _guess_white(present: NDArray[Any], scale: float) -> float:
    """Return the value of white in a soft mask or a trimap of integers, which may use fewer bits than its type has.

    ``present``: the sorted values of the mask. ``scale``: the largest value of its type, which is white otherwise.
    """
    may_be_unscaled = len(present) > MAX_LABELS or _is_trimap(present, WHITES[0])
    if present.dtype.kind not in "iu" or not may_be_unscaled:
        return scale
    return min(scale, next((white for white in WHITES if present[-1] <= white), scale))


def _mask_from_grey_labels(values: NDArray[Any], scale: float, path: Path, notice: Callable[[str], None]) -> Mask:
    """Return the mask of a grey file with few values: black and white, or black and one label.

    Raises AmbiguousMaskError for several labels.
    """
    low, high = END_TOLERANCE * scale, (1.0 - END_TOLERANCE) * scale
    darkest, brightest = values.min(), values.max()
    labels = _merge_noise(_label_fractions(values, find_flat_pixels(values)), path)
    near_black = [f"{value:g}" for value in labels if value <= low]
    if brightest >= high and near_black:
        notice(
            f"mask {path} has areas of {', '.join(near_black[:MAX_LISTED_LABELS])} of {scale:g} "
            "besides black and white; they are used as black; give --mask-label if they are labels"
        )
        labels = {value: fraction for value, fraction in labels.items() if value > low}
    is_binary = all(value >= high for value in labels)
    is_one_negative_value = darkest == brightest < 0
    if is_binary or is_one_negative_value:
        return _mask_without_unknown(values > 0.5 * scale)
    first_label = next(iter(labels))
    if len(labels) == 1 and first_label > 0:
        notice(f"mask {path} has one label, {_label_text(first_label)} of {scale:.10g}; it is used as the object")
        return _mask_without_unknown(values > 0.5 * float(first_label))
    named = {_label_text(value): fraction for value, fraction in labels.items()}
    if darkest < 0 and (values == 0).any():  # 0 may be an object on a negative background
        named["0"] = float((values == 0).mean())
    raise AmbiguousMaskError(path, named, "0" if len(labels) == 1 and "0" in named else _label_text(first_label))


def _mask_from_soft_values(values: NDArray[Any], scale: float, path: Path) -> Mask:
    """Return the mask of an image with many values. Raises UsageError if they are labels, or if none is above half."""
    is_flat = find_flat_pixels(values)
    if values.dtype.kind in "iu" and _has_label_areas(values, is_flat, (1.0 - END_TOLERANCE) * scale):
        labels = _merge_noise(_label_fractions(values, is_flat), path)
        if len(labels) > 1:
            named = {_label_text(value): fraction for value, fraction in labels.items()}
            raise AmbiguousMaskError(path, named, next(iter(named)))
    inside = values > 0.5 * scale
    if not inside.any():
        raise UsageError(
            f"mask {path} is empty: its largest value is {_label_text(values.max())}, and {scale:.10g} is used as "
            "white; expected values above one half in the object; rescale the values, or give --mask-label if they "
            "are labels"
        )
    return _mask_without_unknown(inside)


def _is_trimap(present: NDArray[Any], scale: float) -> bool:
    """Return whether the sorted values of an image are black, one half and white."""
    if len(present) != 3:
        return False
    low, middle, high = (float(value) / scale for value in present)
    return abs(low) <= END_TOLERANCE and abs(middle - 0.5) < END_TOLERANCE and abs(high - 1.0) <= END_TOLERANCE


def _select_label(stored: DecodedImage, label: str, path: Path) -> Mask:
    """Return the mask of the label, index or colour that the user gave. Raises UsageError."""
    unknown = np.zeros(stored.values.shape[:2], np.bool_)
    if label.startswith("#"):
        inside = _find_colour(stored, label, path)
    elif stored.labels is not None:
        inside, unknown = _find_number(stored.labels, label, path), stored.labels == VOID
    else:
        inside = _find_number(stored.values, label, path)
    if not inside.any():
        raise UsageError(
            f"mask {path} has no pixel with the label {label}; expected one of {_format_labels(_all_labels(stored))}"
        )
    return Mask(inside, unknown & ~inside)


def _find_colour(stored: DecodedImage, label: str, path: Path) -> NDArray[np.bool_]:
    """Return the pixels of a colour such as "#fa3253", bool [H,W]. Raises UsageError."""
    if stored.values.ndim == 2:
        raise UsageError(f"mask {path} has no colours, and --mask-label is {label}; expected a number")
    if not re.fullmatch("#[0-9a-fA-F]{6}", label):
        raise UsageError(f"--mask-label {label!r} is not a colour; expected #rrggbb, such as '#fa3253'")
    colour = np.array(list(bytes.fromhex(label[1:])))
    difference = np.abs(stored.values * (255.0 / stored.scale) - colour)
    return np.asarray((difference < _noise_tolerance(path) + 1.0).all(axis=-1))


def _find_number(values: NDArray[Any], label: str, path: Path) -> NDArray[np.bool_]:
    """Return the pixels with a value such as "75", bool [H,W]. Raises UsageError."""
    if not re.fullmatch(r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?", label, re.ASCII):
        raise UsageError(
            f"--mask-label {label!r} is neither a number nor a colour; expected a label such as 1 or '#fa3253'"
        )
    tolerance = _noise_tolerance(path)
    if values.ndim == 3:
        if np.ptp(values, axis=-1).max() > tolerance:
            raise UsageError(f"mask {path} has colours, and --mask-label is the number {label}; expected #rrggbb")
        values = values[..., 0]
    number = float(label)
    return np.asarray(np.abs(values.astype(np.float64) - number) <= tolerance if tolerance else values == number)


def _noise_tolerance(path: Path) -> int:
    """Return the difference from a label that compression may cause in a file."""
    return GREY_TOLERANCE if _is_lossy(path) else 0


def _all_labels(stored: DecodedImage) -> dict[str, float]:
    """Return all labels, as text for --mask-label, each with its fraction of the image."""
    values = stored.values if stored.labels is None else stored.labels
    if values.ndim == 2:
        return {_label_text(value): fraction for value, fraction in value_fractions(values).items()}
    return _name_colours(value_fractions(pack_colours(values, stored.scale)))


def _name_colours(colours: Mapping[Any, float]) -> dict[str, float]:
    """Return packed colours as text for --mask-label, such as "#fa3253", with their fractions of the image."""
    return {f"#{int(colour):06x}": fraction for colour, fraction in colours.items()}


def _label_text(label: Any) -> str:
    """Return a label as text for ``--mask-label``, with all digits of large ids."""
    return f"{float(label):.10g}"


def _has_one_colour(values: NDArray[Any]) -> bool:
    """Return whether all colours, [H,W,3], are shades between black and one colour, as in antialiased lines."""
    colours = values.reshape(-1, 3).astype(np.float32)
    brightness = colours.max(axis=-1, keepdims=True)
    brightest = colours[brightness.argmax()] / brightness.max()
    return bool(np.abs(colours - brightness * brightest).max() <= GREY_TOLERANCE / 255.0 * brightness.max())


def _label_fractions(values: NDArray[Any], is_flat: NDArray[np.bool_]) -> dict[Any, float]:
    """Return the fraction of pixels of every value that fills areas, and so may be a label. 0 is excluded.

    Values that occur only in antialiased edges fill no areas. ``is_flat``: see :func:`find_flat_pixels`.
    """
    in_areas = value_fractions(values[is_flat], values.size)
    everywhere = value_fractions(values)
    return {value: everywhere[value] for value, part in in_areas.items() if value != 0 and part >= MIN_AREA_FRACTION}


def _merge_noise(labels: dict[Any, float], path: Path) -> dict[Any, float]:
    """Merge labels of a lossy file that differ only by noise, into the most frequent of them or into black.

    ``labels``: packed colour or grey value -> its fraction of the image, most frequent first.
    """
    if len(labels) < 2 or not _is_lossy(path):
        return labels
    merged: dict[Any, float] = {0: 0.0}
    for label, fraction in labels.items():
        similar = next((other for other in merged if _differs_by_noise(int(other), int(label))), label)
        merged[similar] = merged.get(similar, 0.0) + fraction
    del merged[0]  # labels that were merged into black
    return merged or labels


def _differs_by_noise(label: int, other: int) -> bool:
    """Return whether two labels, as in :func:`_merge_noise`, differ by at most ``GREY_TOLERANCE`` in each channel."""
    return all(abs((label >> shift & 255) - (other >> shift & 255)) <= GREY_TOLERANCE for shift in (0, 8, 16))


def _is_lossy(path: Path) -> bool:
    with open_image(path) as file:
        return file.type.name in LOSSY_TYPES or (file.type.name == "webp" and b"VP8L" not in file.head)


def _has_label_areas(values: NDArray[Any], is_flat: NDArray[np.bool_], white: float) -> bool:
    """Return whether values between black and white fill areas with steps between them, as labels do.

    In a soft mask they form gradients instead.
    """
    is_between = (values != 0) & (values < white)
    if not is_between.any() or is_flat[is_between].mean() <= 0.5:
        return False
    steps = np.abs(np.diff(values.astype(np.float64), axis=1))
    return bool(np.median(steps[steps > 0]) > MAX_SOFT_STEP)


def _max_channel(packed: Any) -> int:
    """Return the largest channel, 0 to 255, of a colour 0xrrggbb."""
    return max(int(packed) >> 16, int(packed) >> 8 & 255, int(packed) & 255)


def _mask_without_unknown(inside: NDArray[np.bool_]) -> Mask:
    return Mask(inside, np.zeros(inside.shape, np.bool_))


def _format_labels(labels: dict[str, float]) -> str:
    named = [f"{label} ({fraction:.1%} of the image)" for label, fraction in labels.items()]
    return list_first(named, MAX_LISTED_LABELS)
