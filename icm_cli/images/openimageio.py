"""Files to pixels by OpenImageIO: what is deep, linear or of the trade; TIFF's pages, and the range of values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import OpenImageIO as oiio
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from icm_cli.errors import ImageError
from icm_cli.geometry import ImageU8, round_to_u8
from icm_cli.images import colour
from icm_cli.images.kinds import FileType
from icm_cli.images.layers import ImageLayer, select_layer
from icm_cli.images.pixels import (
    BAD_PROFILE,
    DecodedImage,
    ImageWindows,
    apply_orientation,
    check_memory,
    upright_size,
    valid_orientation,
)

oiio.attribute("threads", 1)  # files are read in threads of our own
LARGEST_DISPLAY_VALUE = 1.5
"""A float picture that is not scene-linear and has larger values is on another scale than 0..1."""
TWELVE_BITS = 4095
_LARGEST = {"uint": 2.0**32 - 1, "int": 2.0**31 - 1, "int16": 2.0**15 - 1, "int8": 2.0**7 - 1}
"""Values that are read as 1.0, by OpenImageIO's names of the integers' types."""
_SCENE_LINEAR = frozenset({"openexr", "hdr"})
MIN_IS_WHITE = 0
"""TIFF's photometric interpretation of a negative."""
REDUCED = 1
"""TIFF's subfile type of a page that is a smaller copy of another."""


@contextlib.contextmanager
def opened(path: Path, *, must_open: bool = True) -> Iterator[Any]:
    """An open file whose alpha is left as it is stored; None for no picture, unless ``must_open`` raises."""
    settings = oiio.ImageSpec()
    settings.attribute("oiio:UnassociatedAlpha", 1)
    file = oiio.ImageInput.open(str(path), settings)
    if file is None:
        reason = oiio.geterror()
        if must_open:
            raise UnidentifiedImageError(reason)
        yield None
        return
    try:
        yield file
    finally:
        file.close()


def pages_of(path: Path) -> list[int]:
    """Numbers of a TIFF's pages that are no smaller copies of others, the first one at least."""
    with opened(path, must_open=False) as file:
        if file is None:
            with Image.open(path) as image:
                return list(range(getattr(image, "n_frames", 1)))
        pages, number = [], 0
        while file.seek_subimage(number, 0):
            if not tag(file.spec(), "tiff:subfiletype", 0) & REDUCED:
                pages.append(number)
            number += 1
        file.geterror()  # of the seek that went too far
        return pages or [0]


def page_of(path: Path, frame: int) -> int:
    """Number of the page that is a TIFF's frame. Raises ImageError where there are fewer."""
    pages = pages_of(path)
    if frame >= len(pages):
        raise ImageError(f"{path} has no frame {frame + 1}")
    return pages[frame]


def is_associated(spec: Any) -> bool:
    """Whether colours are stored multiplied by their alpha; Pillow divides 8-bit ones by it, which loses glows."""
    return spec.alpha_channel >= 0 and not spec.getattribute("oiio:UnassociatedAlpha")


def read(path: Path, frame: int, kind: FileType, wanted: colour.ColourSettings) -> DecodedImage:
    """Decode one part or page, EXIF's turn applied. Raises ImageError, or whatever OpenImageIO says."""
    with opened(path) as file:
        layer, told = layer_of(file, path, frame, kind, wanted.layer, is_picture=not wanted.is_matte)
        file.seek_subimage(layer.part, 0)
        spec = oiio.ImageSpec(file.spec())
        orientation = valid_orientation(tag(spec, "Orientation"))
        windows = windows_of(spec, kind, orientation)
        for height, width in (windows.size, windows.display):
            check_memory(path, width, height)
        first, end = layer.channels
        values = file.read_image(layer.part, 0, first, end, _read_type(spec, wanted))
        if values is None or file.has_error:
            raise ValueError(file.geterror() or "no pixels")
    alpha = None if layer.alpha is None else values[..., layer.alpha - first]
    pixels = _picked(values, [channel - first for channel in layer.colours])
    scale = _scale(spec, values.dtype, wanted.white)
    notices = list(told)
    if tag(spec, "tiff:PhotometricInterpretation", -1) == MIN_IS_WHITE:
        pixels = np.asarray(np.maximum(scale - pixels, 0), values.dtype)
    if values.dtype == np.float32 and not np.isfinite(pixels).all():
        notices.append(f"{path} has pixels that are NaN or infinite; they are taken as 0")
        pixels = np.nan_to_num(pixels, nan=0.0, posinf=0.0, neginf=0.0)
    space = wanted.space if wanted.space != "auto" else _own_space(spec, kind, wanted.config)
    notices += _checked_range(path, pixels, scale, space, wanted)
    profile = spec.getattribute("ICCProfile")
    if profile is None and wanted.space == "auto" and space == colour.SRGB and (gamma := _own_gamma(spec)):
        notices.append(f"{path} has a gamma of {gamma:.4g}, which no known space has; it is taken as sRGB")
    if profile is not None and wanted.space == "auto":
        eight = _eight_bits(pixels, scale)
        converted = colour.to_srgb(Image.fromarray(eight if eight.shape[-1] == 3 else eight[..., 0]), bytes(profile))
        if converted is None:
            notices.append(f"{path}: {BAD_PROFILE}")
        else:
            pixels, space = np.asarray(converted), colour.SRGB
            alpha = None if alpha is None else _eight_bits(alpha, scale)
            scale = 255.0
    upright = None if alpha is None else np.ascontiguousarray(apply_orientation(alpha, orientation))
    pixels = np.ascontiguousarray(apply_orientation(pixels, orientation))
    return DecodedImage(
        pixels,
        upright,
        scale,
        space,
        tuple(notices),
        bits=8 * values.dtype.itemsize,
        header=spec,
        orientation=orientation,
        is_half=all(str((spec.channelformats or [spec.format] * end)[channel]) == "half" for channel in layer.colours),
        own_windows=None if orientation != 1 else windows,
    )


def windows_of(spec: Any, kind: FileType, orientation: int) -> ImageWindows:
    """Upright windows of an EXR; those of a file that has none, or that is turned, are its size."""
    if kind.name == "openexr" and orientation == 1:
        return ImageWindows.from_spec(spec)
    return ImageWindows.full(upright_size((spec.width, spec.height), orientation))


def layer_of(
    file: Any, path: Path, frame: int, kind: FileType, wanted: str, *, is_picture: bool = False
) -> tuple[ImageLayer, tuple[str, ...]]:
    """Channels to be read of a frame; the formats but EXR have no layers. Raises ImageError."""
    if kind.name == "openexr":
        return select_layer(file, path, wanted, is_picture=is_picture)
    if not file.seek_subimage(frame, 0):
        raise ImageError(f"{path} has no frame {frame + 1}")
    names = [name.upper() for name in file.spec().channelnames]
    colours = tuple(names.index(name) for name in "RGB") if {"R", "G", "B"} <= set(names) else (0,)
    return ImageLayer(frame, colours, names.index("A") if "A" in names else None), ()


def _picked(values: NDArray[Any], channels: list[int]) -> NDArray[Any]:
    """Channels of pixels [H,W,C]; those that lie side by side are not copied."""
    first, end = channels[0], channels[-1] + 1
    return values[..., first:end] if channels == list(range(first, end)) else values[..., channels]


def _read_type(spec: Any, wanted: colour.ColourSettings) -> str:
    """uint8 and uint16 as they are; all else, integers of 32 bits too, as float, which has no room for ids of masks."""
    name = str(spec.format)
    as_it_is = ("uint8", "uint16", "uint") if wanted.is_matte else ("uint8", "uint16")
    return name if name in as_it_is else "float"


def tag(spec: Any, name: str, otherwise: int = 1) -> int:
    """A whole number of a file's header."""
    value = spec.getattribute(name)
    return int(value) if isinstance(value, int) else otherwise


def _scale(spec: Any, dtype: Any, white: float | None) -> float:
    """Value of pixels, as they are read, that stands for white or opaque."""
    if dtype == np.uint8:
        return 255.0
    if dtype == np.uint16:
        return white or 65535.0
    if dtype == np.uint32:
        return _LARGEST["uint"]
    return (white or _LARGEST.get(str(spec.format), 1.0)) / _LARGEST.get(str(spec.format), 1.0)


def _checked_range(
    path: Path, pixels: NDArray[Any], scale: float, space: str, wanted: colour.ColourSettings
) -> list[str]:
    """Say what is odd about a deep picture's range. Raises ImageError for a float picture on another scale."""
    largest = pixels.max()
    if wanted.has_labels:
        return []
    if pixels.dtype == np.float32 and space == colour.SRGB and largest > LARGEST_DISPLAY_VALUE * scale:
        how = "give its white, as in --white 255, or say with --colorspace in which space it is"
        if wanted.is_matte:
            how = "save it with 1 for the thing, or with 8 bits, or say with --mask-label which value is the thing"
        raise ImageError(f"{path} has values up to {largest:.6g}; expected 0..{scale:g}: {how}")
    if pixels.dtype == np.uint16 and not (wanted.white or wanted.is_matte) and 255 < largest <= TWELVE_BITS:
        return [
            f"{path} has 16 bits and no value above {largest}, so it is dark; perhaps it has 12 bits: then give "
            f"--white {TWELVE_BITS}"
        ]
    return []


def _eight_bits(values: NDArray[Any], scale: float) -> ImageU8:
    return round_to_u8(values.astype(np.float32) * np.float32(255.0 / scale))


def _own_gamma(spec: Any) -> float | None:
    """Exponent that a file's label names, as in g20_rec709_scene; OpenImageIO keeps it beside that."""
    gamma = spec.getattribute("oiio:Gamma")
    return float(gamma) if isinstance(gamma, float) else None


def _own_space(spec: Any, kind: FileType, config: str) -> str:
    """The space that a file says it is in, else the usual one of its kind."""
    for key in ("colorInteropID", "oiio:ColorSpace"):
        label = spec.getattribute(key)
        if label in ("srgb_rec709_scene", "srgb_rec709_display"):
            return colour.SRGB
        if found := colour.find_colour_space(label, config):
            return found
    primaries = spec.getattribute("chromaticities")
    if primaries is not None and (found := colour.space_of_primaries(tuple(primaries))):
        return colour.find_colour_space(found, config) or found
    return colour.LINEAR if kind.name in _SCENE_LINEAR else colour.SRGB
