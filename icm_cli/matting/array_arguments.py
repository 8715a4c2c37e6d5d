"""Checks of the arrays and hints that are given to ``Predictor``, and their conversion. All raise UsageError."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icm_cli.errors import UsageError
from icm_cli.geometry import Float, ImageU8, alpha_to_u8, format_size
from icm_cli.guidance.hints import Hints
from icm_cli.images.pixels import ImageWindows
from icm_cli.matting.mattes import Mattes
from icm_cli.matting.references import MakeMask, Reference, make_guidance, mask_from_hints


def as_references(pairs: Any, make_mask: MakeMask) -> list[Reference]:
    """Return the references of ``pairs``, which may be a single pair. Raises UsageError."""
    expected = "expected pairs of image and mask, such as [(image, mask)]"
    is_pair = isinstance(pairs, tuple) and len(pairs) == 2 and all(isinstance(n, (np.ndarray, Hints)) for n in pairs)
    if isinstance(pairs, Reference) or is_pair:
        pairs = [pairs]
    if isinstance(pairs, (str, bytes, np.ndarray)) or not isinstance(pairs, Iterable):
        raise UsageError(f"the references are {describe_value(pairs)}; {expected}")
    references = []
    for number, pair in enumerate(pairs, 1):
        if isinstance(pair, Reference):
            references.append(pair)
        elif isinstance(pair, (tuple, list)) and len(pair) == 2:
            references.append(_as_reference(pair[0], pair[1], f"of reference {number}", make_mask))
        else:
            raise UsageError(f"reference {number} is {describe_value(pair)}; {expected}")
    if all(reference.is_negative for reference in references):
        raise UsageError(f"no reference was given; {expected}")
    return references


def as_negatives(negatives: Any, make_mask: MakeMask) -> list[Reference]:
    """Return negative references of images, and of pairs of image and mask. Raises UsageError."""
    if isinstance(negatives, (str, bytes, np.ndarray)) or not isinstance(negatives, Iterable):
        raise UsageError(f"the negatives are {describe_value(negatives)}; expected images, or pairs of image and mask")
    references = []
    for number, each in enumerate(negatives, 1):
        if isinstance(each, (tuple, list)) and len(each) == 2:
            image = _as_reference(each[0], each[1], f"of negative {number}", make_mask)
            references.append(Reference.negative(image.rgb, image.guidance))
        else:
            rgb = as_rgb(each, f"negative {number}")
            references.append(Reference.negative(rgb, np.ones(rgb.shape[:2], np.bool_)))
    return references


def _as_reference(image: Any, mask: Any, of_which: str, make_mask: MakeMask) -> Reference:
    """Return a reference from an image and its mask or hints. ``of_which``: "of reference 2", for messages.

    Raises UsageError.
    """
    rgb = as_rgb(image, f"the image {of_which}")
    mask_name = f"the mask {of_which}"
    notice = functools.partial(warnings.warn, stacklevel=5)  # the user's line
    if isinstance(mask, Hints):
        hints = check_hints(mask, rgb, f" {of_which}")
        mask = mask_from_hints(hints, rgb, f"the mask from the hints {of_which}", notice, make_mask)
    mask = _check_alpha(mask, rgb, mask_name)
    u8 = mask if mask.dtype == np.uint8 else alpha_to_u8(mask.astype(np.float32))
    windows = ImageWindows.full((rgb.shape[0], rgb.shape[1]))
    return Reference(rgb, make_guidance(u8, windows, mask_name, notice))


def as_mattes(garbage: Any, keep: Any, rgb: ImageU8) -> Mattes | None:
    """Return the garbage and the keep matte of an image; None if neither is given. Raises UsageError."""
    if garbage is None and keep is None:
        return None
    named = (garbage, "the garbage matte"), (keep, "the keep matte")
    return Mattes(*(None if matte is None else _as_matte(matte, rgb, name) for matte, name in named))


def _as_matte(matte: Any, rgb: ImageU8, name: str) -> Float:
    """Return a garbage or keep matte of an image as float32 [H,W] in 0..1. Raises UsageError."""
    checked = _check_alpha(matte, rgb, name)
    return checked.astype(np.float32) / np.float32(255 if checked.dtype == np.uint8 else 1)


def _check_alpha(alpha: Any, rgb: ImageU8, name: str) -> NDArray[Any]:
    """Return a mask or matte [H,W] of an image: bool, uint8 0..255 or float in 0..1. Raises UsageError."""
    expected = f"expected bool, uint8 0..255 or float 0..1, {list(rgb.shape[:2])} as its image"
    _refuse_masked_array(alpha, name)
    if not isinstance(alpha, np.ndarray) or (alpha.dtype.kind not in "bf" and alpha.dtype != np.uint8):
        raise UsageError(f"{name} is {describe_value(alpha)}; {expected}")
    alpha = alpha[..., 0] if alpha.ndim == 3 and alpha.shape[-1] == 1 else alpha
    if alpha.shape != rgb.shape[:2]:
        raise UsageError(f"{name} is {describe_value(alpha)}; {expected}")
    if alpha.dtype == np.uint8 and alpha.max() == 1:
        raise UsageError(f"{name} has no values but 0 and 1, and is uint8; {expected}; give array.astype(bool)")
    if alpha.dtype.kind == "f" and not (alpha.min() >= 0 and alpha.max() <= 1):  # also for NaN
        raise UsageError(f"{name} has values from {alpha.min():g} to {alpha.max():g}; {expected}")
    return alpha


def as_rgb(image: Any, name: str) -> ImageU8:
    """Return an image that may be grey as contiguous uint8 [H,W,3]. Raises UsageError."""
    _refuse_masked_array(image, name)
    expected = "expected sRGB, uint8 [H,W,3]"
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or not image.size:
        raise UsageError(f"{name} is {describe_value(image)}; {expected}{_advice_about_type(image)}")
    if image.ndim == 2 or image.shape[2:] == (1,):
        image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=-1)
    if image.shape[2:] != (3,):
        advice = ""
        if image.shape[2:] == (4,):
            advice = "; give image[..., :3] if the fourth channel is an alpha"
        elif image.ndim == 3 and image.shape[0] == 3:
            advice = "; give image.transpose(1, 2, 0) if the channels are first"
        raise UsageError(f"{name} is {describe_value(image)}; {expected}{advice}")
    return np.ascontiguousarray(image)


def _advice_about_type(image: Any) -> str:
    """Return how to convert an object that is no uint8 array to one, as the end of a message; "" if unknown."""
    if not isinstance(image, np.ndarray):
        return "" if image is None else "; give an array, such as numpy.asarray(PIL.Image.open(path).convert('RGB'))"
    if image.dtype.kind == "f":
        return "; convert sRGB values in 0..1 with (255 * image + 0.5).astype(numpy.uint8)"
    if image.dtype == np.uint16:
        return "; convert 16-bit values with (image / 257 + 0.5).astype(numpy.uint8)"
    return ""


def check_hints(hints: Any, image: ImageU8, of_which: str = "") -> Hints:
    """Return ``hints`` unchanged.

    Raises UsageError if they are not an instance of Hints, or not of the size of the image.
    """
    if not isinstance(hints, Hints):
        raise UsageError(f"the hints{of_which} are {describe_value(hints)}; expected icm_cli.Hints")
    if hints.size != image.shape[:2]:
        raise UsageError(
            f"the hints{of_which} are for an image of {format_size(hints.size)} and the image is "
            f"{format_size(image.shape)}; give Hints with the size (height, width) of this image"
        )
    return hints


def _refuse_masked_array(array: Any, name: str) -> None:
    if isinstance(array, np.ma.MaskedArray):
        raise UsageError(
            f"{name} is a masked array, whose masked values have no meaning here; give array.filled(value), or "
            "array.data to use all values"
        )


def describe_value(value: Any) -> str:
    """Return the type of a value for a message; for an array, its dtype and shape."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return "None" if value is None else f"of type {type(value).__module__}.{type(value).__qualname__}"
