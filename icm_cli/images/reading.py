"""Read pictures and masks of every usual kind, and write alphas that say what decided them."""

from __future__ import annotations

import contextlib
import hashlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from icm_cli.errors import ImageError
from icm_cli.geometry import ImageU8

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm"}
    | {".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)

COLOUR_TOLERANCE = 16
"""Channels of a grey picture differ by no more, after JPEG too."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientations but the upright one (1), and what undoes each."""
_ON_THEIR_SIDE = frozenset(_TURNS[orientation] for orientation in (5, 6, 7, 8))

DECODE_ERRORS = (OSError, SyntaxError, UserWarning, ValueError, EOFError, IndexError, struct.error, zlib.error)


@dataclass(frozen=True)
class Picture:
    """An upright picture: ``rgb`` sRGB uint8 [H,W,3], ``alpha`` uint8 [H,W] where the file has one."""

    rgb: ImageU8
    alpha: ImageU8 | None


def read_picture(path: Path) -> Picture:
    """Read an image file, EXIF rotation applied; greyscale, 16-bit, CMYK and palette pictures become RGB.

    Raises ImageError for a file that is missing, empty, torn or no image.
    """
    with _opened(path) as image:
        return _picture(image)


def read_matte(path: Path) -> ImageU8:
    """Read a mask or an alpha, uint8 [H,W]: the file's own alpha where that varies, else its brightest channel.

    Raises ImageError like :func:`read_picture`.
    """
    return _matte(read_picture(path))


@dataclass(frozen=True)
class StoredPixels:
    """A file's own numbers, upright: values [H,W] or [H,W,3] in 0..scale, palette indices where ``is_palette``, and
    alpha [H,W] where there is one."""

    values: NDArray[Any]
    alpha: NDArray[Any] | None
    scale: float
    is_palette: bool


def read_stored(path: Path) -> StoredPixels:
    """Read an image file's numbers as they are stored, EXIF rotation applied. Raises ImageError."""
    with _opened(path) as image:
        if image.mode == "P" and "transparency" not in image.info:
            return StoredPixels(np.asarray(image), None, 255.0, is_palette=True)
        if _is_deep_grey(image):
            values = np.nan_to_num(np.asarray(image))
            return StoredPixels(values, None, 1.0 if image.mode == "F" else 65535.0, is_palette=False)
        if image.mode in {"1", "L"}:
            return StoredPixels(np.asarray(image.convert("L")), None, 255.0, is_palette=False)
        picture = _picture(image)
        return StoredPixels(picture.rgb, picture.alpha, 255.0, is_palette=False)


@dataclass(frozen=True)
class TrueAlpha:
    """A ground truth: ``alpha`` uint8 [H,W], and what is odd about its file."""

    alpha: ImageU8
    is_deep: bool
    """Whether the file has 16 bits or more, rounded to 8 here."""
    has_colour: bool
    """Whether channels differ, so that none of them is plainly the alpha."""


def read_true_alpha(path: Path) -> TrueAlpha:
    """Read a ground truth like :func:`read_matte`, and say what is odd about it. Raises ImageError."""
    with _opened(path) as image:
        is_deep = _is_deep_grey(image) or _is_deep_png(path)
        picture = _picture(image)
    alpha = _matte(picture)
    spread = alpha - picture.rgb.min(axis=-1)  # of the channels, where the alpha is their brightest
    has_colour = alpha is not picture.alpha and bool(spread.max() > COLOUR_TOLERANCE)
    return TrueAlpha(alpha, is_deep, has_colour)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an upright picture, from its header alone. Raises ImageError."""
    with _named_errors(path), Image.open(path) as image:
        width, height = image.size
        turn = _turn(image)
    return (width, height) if turn in _ON_THEIR_SIDE else (height, width)


def content_sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal. Raises ImageError."""
    with _named_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _picture(image: Image.Image) -> Picture:
    if _is_deep_grey(image):
        grey = _deep_grey_u8(image)
        return Picture(np.repeat(grey[..., None], 3, axis=-1), None)
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        return Picture(np.ascontiguousarray(rgba[..., :3]), np.ascontiguousarray(rgba[..., 3]))
    return Picture(np.asarray(image.convert("RGB")), None)


def _matte(picture: Picture) -> ImageU8:
    if picture.alpha is not None and picture.alpha.min() != picture.alpha.max():
        return picture.alpha
    red, green, blue = (picture.rgb[..., channel] for channel in range(3))
    return np.maximum(np.maximum(red, green), blue)  # ten times as fast as max(axis=-1)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The decoded, upright image; every way a file can be bad becomes one ImageError."""
    with _named_errors(path), Image.open(path) as image:
        image.load()
        turn = _turn(image)
        yield image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Find the turn that brings a picture upright by EXIF; EXIF that cannot be read turns nothing."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001  EXIF is written by anything, and can never fail a picture
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ImageError(f"{path} is a pipe or a device; expected an image file")  # reading could wait for ever
    try:
        yield
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder; expected an image file") from None
    except PermissionError:
        raise ImageError(f"{path} cannot be read: permission denied") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{path} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels; scale it down") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} {_not_an_image(path)}") from None
    except DECODE_ERRORS as error:
        raise ImageError(f"{path} is damaged or cut short ({' '.join(str(error).split())}); get a whole copy") from None


def _not_an_image(path: Path) -> str:
    if path.stat().st_size == 0:
        return "is empty (0 bytes); get a whole copy"
    return "is not an image in a format that can be read; expected JPEG, PNG, TIFF, WebP or the like"


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode in {"I", "F"} or image.mode.startswith("I;16")


def _is_deep_png(path: Path) -> bool:
    """Whether a PNG of any number of channels has 16 bits in each; Pillow gives 8 of RGB and does not say so."""
    with path.open("rb") as file:
        header = file.read(26)
    return header.startswith(b"\x89PNG") and header[24:25] == b"\x10"


def _deep_grey_u8(image: Image.Image) -> ImageU8:
    """16-bit integers (0..65535) or floats (0..1) in one channel -> uint8."""
    values: NDArray[np.float32] = np.asarray(image, dtype=np.float32)
    scale = 255.0 if image.mode == "F" else 255.0 / 65535.0
    eight: ImageU8 = np.clip(np.nan_to_num(values) * scale + 0.5, 0, 255).astype(np.uint8)
    return eight
