"""Files to pixels: Pillow reads what has 8 bits and is everywhere, OpenImageIO what is deep, linear or of the trade.

A decoder may raise anything; at this file's edge all of it becomes one ImageError.
"""

from __future__ import annotations

import contextlib
import io
import logging
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import OpenImageIO as oiio
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from icm_cli import environment
from icm_cli.errors import ImageError
from icm_cli.geometry import ImageU8, rounded_u8
from icm_cli.images import colour, jpeg
from icm_cli.images.kinds import Kind, kind_of
from icm_cli.images.layers import Layer, picture_layer

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # a damaged file is told in a sentence of ours
Image.MAX_IMAGE_PIXELS = None  # the limit is the memory there is, see _check_memory
oiio.attribute("threads", 1)  # files are read in threads of our own
BYTES_PER_PIXEL = 24
"""Memory that a picture takes while it is read, matted and written, per pixel."""
LARGEST_DISPLAY_VALUE = 1.5
"""A float picture that is not scene-linear and has larger values is on another scale than 0..1."""
TWELVE_BITS = 4095
_LARGEST = {"uint": 2.0**32 - 1, "int": 2.0**31 - 1, "int16": 2.0**15 - 1, "int8": 2.0**7 - 1}
"""Values that are read as 1.0, by OpenImageIO's names of the integers' types."""
KEPT_ATTRIBUTES = frozenset({"PixelAspectRatio", "smpte:TimeCode", "smpte:KeyCode", "FramesPerSecond", "captureRate"})
BAD_PROFILE = "its ICC profile cannot be used; its colours are taken as sRGB"
DECODE_ERRORS = (OSError, SyntaxError, UserWarning, ValueError, EOFError, IndexError, struct.error, zlib.error)
_BY_PILLOW = frozenset({"jpeg", "gif", "webp", "bmp", "dib", "avif", "heic", ""})
_SCENE_LINEAR = frozenset({"openexr", "hdr"})
ON_THEIR_SIDE = frozenset({5, 6, 7, 8})
_UPRIGHT: dict[int, Any] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
"""EXIF's orientations but the upright one (1), and what undoes each."""
_BACK = {6: 8, 8: 6}
"""Orientations that make good for each other; the others are their own opposites."""
MIN_IS_WHITE = 0
"""TIFF's photometric interpretation of a negative."""
REDUCED = 1
"""TIFF's subfile type of a page that is a smaller copy of another."""


@dataclass(frozen=True)
class Decoded:
    """Upright pixels of one frame as the file has them: [H,W,1|3] in 0..``scale``, floats perhaps beyond; ``alpha``
    [H,W] on the same scale where there is one; colours that a file has multiplied by it (associated alpha) are left so,
    which is the picture over black. ``space`` is the colour space's name; ``notices`` say what is odd."""

    pixels: NDArray[Any]
    alpha: NDArray[Any] | None
    scale: float
    space: str
    notices: tuple[str, ...] = ()
    bits: int = 8
    indices: NDArray[Any] | None = None
    """Palette indices [H,W], where the file has a palette without transparency."""
    header: Any = None
    """Specification of a file that OpenImageIO read."""
    orientation: int = 1
    """EXIF's, which was undone."""

    def give_windows(self, spec: Any) -> None:
        """Give a file to be written this one's data and display window, pixel aspect, timecode and frame rate."""
        header = self.header
        if header is None or (header.width, header.height) != (spec.width, spec.height):
            return
        for name in ("x", "y", "full_x", "full_y", "full_width", "full_height"):
            setattr(spec, name, getattr(header, name))
        for attribute in header.extra_attribs:
            if attribute.name in KEPT_ATTRIBUTES:
                spec.attribute(attribute.name, attribute.type, attribute.value)


def decode(path: Path, frame: int = 0, wanted: colour.Colour = colour.AS_LABELLED) -> Decoded:
    """Decode one frame of a picture, EXIF's turn applied. Raises ImageError for any file that is not whole."""
    with named_errors(path):
        kind = kind_of(path)
        if kind.name == "tiff":
            frame = _page(path, frame)
        if _is_for_pillow(path, kind, frame):
            try:
                return _by_pillow(path, frame, wanted)
            except ValueError:
                if kind.name != "png":
                    raise
            except OSError:
                whole = jpeg.with_end(path) if kind.name == "jpeg" else None
                if whole is None:
                    raise
                decoded = _by_pillow(path, frame, wanted, whole)
                return replace(decoded, notices=(*decoded.notices, f"{path} {jpeg.NO_END}"))
        return _by_openimageio(path, frame, kind, wanted)


def frame_count(path: Path) -> int:
    """Number of frames or pages; smaller copies of one (thumbnails, pyramids) are none. Raises ImageError."""
    with named_errors(path):
        kind = kind_of(path)
        if not kind.may_have_frames:
            return 1
        if kind.name == "tiff":
            return len(_pages(path))
        with Image.open(path) as image:
            return int(getattr(image, "n_frames", 1))


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an upright picture, from its header alone. Raises ImageError."""
    return image_size_and_turn(path)[:2]


def image_size_and_turn(path: Path) -> tuple[int, int, int]:
    """Height and width of an upright picture and EXIF's orientation, from its header alone. Raises ImageError."""
    with named_errors(path):
        kind = kind_of(path)
        frame = _page(path, 0) if kind.name == "tiff" else 0
        if _is_for_pillow(path, kind, frame):
            with Image.open(path) as image:
                if frame:
                    image.seek(frame)
                turn = _orientation(image)
                return *_upright_size(image.size, turn), turn
        with _openimageio(path) as file:
            file.seek_subimage(_layer(file, path, frame, kind, "")[0].part, 0)
            spec = file.spec()
            turn = _tag(spec, "Orientation")
            return *_upright_size((spec.width, spec.height), turn), turn


def turned_as(pixels: NDArray[Any], orientation: int, wanted: int) -> NDArray[Any]:
    """Pixels [H,W] or [H,W,C] that were turned by one EXIF orientation, turned by the ``wanted`` one in its place."""
    return np.ascontiguousarray(_turned(_turned(pixels, _BACK.get(orientation, orientation)), wanted))


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into an ImageError of one sentence."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ImageError(f"{path} is a pipe or a device; expected an image file")  # reading could wait for ever
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder; expected an image file") from None
    except PermissionError:
        raise ImageError(f"{path} cannot be read: permission denied") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} {_not_an_image(path)}") from None
    except MemoryError:
        raise ImageError(f"{path} is too large for this machine's memory") from None
    except Exception as error:  # noqa: BLE001  decoders raise anything
        raise ImageError(f"{path} is damaged or cut short ({' '.join(str(error).split())}); get a whole copy") from None


def _is_for_pillow(path: Path, kind: Kind, frame: int) -> bool:
    """Whether Pillow reads it right: 8 bits a channel in a format that it knows."""
    if kind.name == "png":
        return not _is_deep_png(path)
    if kind.name in ("tiff", "pnm"):
        with _openimageio(path, must_open=False) as file:
            if file is None or not file.seek_subimage(frame, 0):
                return True
            return str(file.spec().format) == "uint8" and not _is_associated(file.spec())
    return kind.name in _BY_PILLOW


def _is_associated(spec: Any) -> bool:
    """Whether colours are stored multiplied by their alpha; Pillow divides 8-bit ones by it, which loses glows."""
    return spec.alpha_channel >= 0 and not spec.getattribute("oiio:UnassociatedAlpha")


def _is_deep_png(path: Path) -> bool:
    """Whether a PNG of any number of channels has 16 bits in each; Pillow gives 8 of RGB and does not say so."""
    with path.open("rb") as file:
        header = file.read(26)
    return header.startswith(b"\x89PNG") and header[24:25] == b"\x10"


def _by_pillow(path: Path, frame: int, wanted: colour.Colour, content: io.BytesIO | None = None) -> Decoded:
    """``content``: what is read in place of the file."""
    with Image.open(content or path) as image:
        _check_memory(path, *image.size)
        if frame:
            image.seek(frame)
        image.load()
        orientation, profile = _orientation(image), image.info.get("icc_profile")
        space = wanted.space if wanted.space != "auto" else colour.SRGB
        alpha, notices = None, []
        shown: Image.Image = image
        if image.has_transparency_data:
            shown = image.convert("RGBA")
            alpha = np.ascontiguousarray(_turned(np.asarray(shown.getchannel("A")), orientation))
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            values = _turned(np.nan_to_num(np.asarray(image, dtype=np.float32))[..., None], orientation)
            return Decoded(
                values,
                None,
                wanted.white or (1.0 if image.mode == "F" else 65535.0),
                space,
                bits=32,
                orientation=orientation,
            )
        indices = None
        if image.mode == "P" and alpha is None:
            indices = np.ascontiguousarray(_turned(np.asarray(image), orientation))
        if shown.mode in ("RGBA", "P", "PA", "LA"):
            shown = shown.convert("RGB")
        elif shown.mode == "1":
            shown = shown.convert("L")
        if profile and wanted.space == "auto":
            converted = colour.to_srgb(shown, profile)
            notices += [] if converted else [f"{path}: {BAD_PROFILE}"]
            shown = converted or shown
        pixels = np.asarray(shown)[..., None] if shown.mode == "L" else np.asarray(shown.convert("RGB"))
    pixels = np.ascontiguousarray(_turned(pixels, orientation))
    return Decoded(pixels, alpha, 255.0, space, tuple(notices), indices=indices, orientation=orientation)


def _by_openimageio(path: Path, frame: int, kind: Kind, wanted: colour.Colour) -> Decoded:
    with _openimageio(path) as file:
        layer, told = _layer(file, path, frame, kind, wanted.layer)
        file.seek_subimage(layer.part, 0)
        spec = oiio.ImageSpec(file.spec())
        _check_memory(path, spec.width, spec.height)
        first, end = layer.channels
        values = file.read_image(layer.part, 0, first, end, _read_type(spec))
        if values is None or file.has_error:
            raise ValueError(file.geterror() or "no pixels")
    alpha = None if layer.alpha is None else values[..., layer.alpha - first]
    pixels = _picked(values, [channel - first for channel in layer.colours])
    scale = _scale(spec, values.dtype, wanted.white)
    notices = list(told)
    if _tag(spec, "tiff:PhotometricInterpretation", -1) == MIN_IS_WHITE:
        pixels = np.asarray(np.maximum(scale - pixels, 0), values.dtype)
    if values.dtype == np.float32 and not np.isfinite(pixels).all():
        notices.append(f"{path} has pixels that are NaN or infinite; they are taken as 0")
        pixels = np.nan_to_num(pixels, nan=0.0, posinf=0.0, neginf=0.0)
    space = wanted.space if wanted.space != "auto" else _own_space(spec, kind, wanted.config)
    notices += _checked_range(path, pixels, scale, space, wanted.white)
    profile = spec.getattribute("ICCProfile")
    if profile is not None and wanted.space == "auto" and len(layer.colours) == 3:
        converted = colour.to_srgb(Image.fromarray(_eight_bits(pixels, scale)), bytes(profile))
        if converted is None:
            notices.append(f"{path}: {BAD_PROFILE}")
        else:
            pixels, space = np.asarray(converted), colour.SRGB
            alpha = None if alpha is None else _eight_bits(alpha, scale)
            scale = 255.0
    orientation = _known(_tag(spec, "Orientation"))
    upright = None if alpha is None else np.ascontiguousarray(_turned(alpha, orientation))
    pixels = np.ascontiguousarray(_turned(pixels, orientation))
    bits = 8 * values.dtype.itemsize
    return Decoded(pixels, upright, scale, space, tuple(notices), bits, header=spec, orientation=orientation)


def _picked(values: NDArray[Any], channels: list[int]) -> NDArray[Any]:
    """Channels of pixels [H,W,C]; those that lie side by side are not copied."""
    first, end = channels[0], channels[-1] + 1
    return values[..., first:end] if channels == list(range(first, end)) else values[..., channels]


def _scale(spec: Any, dtype: Any, white: float | None) -> float:
    """Value of pixels, as they are read, that stands for white or opaque."""
    if dtype == np.uint8:
        return 255.0
    if dtype == np.uint16:
        return white or 65535.0
    return (white or _LARGEST.get(str(spec.format), 1.0)) / _LARGEST.get(str(spec.format), 1.0)


def _checked_range(path: Path, pixels: NDArray[Any], scale: float, space: str, white: float | None) -> list[str]:
    """Say what is odd about a deep picture's range. Raises ImageError for a float picture on another scale."""
    largest = pixels.max()
    if pixels.dtype == np.float32 and space == colour.SRGB and largest > LARGEST_DISPLAY_VALUE * scale:
        raise ImageError(
            f"{path} has values up to {largest:.6g}; expected 0..{scale:g}: give its white, as in --white 255, or "
            "say with --colorspace in which space it is"
        )
    if pixels.dtype == np.uint16 and white is None and 255 < largest <= TWELVE_BITS:
        return [
            f"{path} has 16 bits and no value above {largest}, so it is dark; perhaps it has 12 bits: then give "
            f"--white {TWELVE_BITS}"
        ]
    return []


def _layer(file: Any, path: Path, frame: int, kind: Kind, wanted: str) -> tuple[Layer, tuple[str, ...]]:
    """Channels to be read of a frame; the formats but EXR have no layers. Raises ImageError."""
    if kind.name == "openexr":
        return picture_layer(file, path, wanted)
    if not file.seek_subimage(frame, 0):
        raise ImageError(f"{path} has no frame {frame + 1}")
    names = [name.upper() for name in file.spec().channelnames]
    colours = tuple(names.index(name) for name in "RGB") if {"R", "G", "B"} <= set(names) else (0,)
    return Layer(frame, colours, names.index("A") if "A" in names else None), ()


def _eight_bits(values: NDArray[Any], scale: float) -> ImageU8:
    return rounded_u8(values.astype(np.float32) * np.float32(255.0 / scale))


def _own_space(spec: Any, kind: Kind, config: str) -> str:
    """The space that a file says it is in, else the usual one of its kind."""
    for key in ("colorInteropID", "oiio:ColorSpace"):
        label = spec.getattribute(key)
        if label in ("srgb_rec709_scene", "srgb_rec709_display"):
            return colour.SRGB
        if found := colour.known_space(label, config):
            return found
    primaries = spec.getattribute("chromaticities")
    if primaries is not None and (found := colour.space_of_primaries(tuple(primaries))):
        return colour.known_space(found, config) or found
    return colour.LINEAR if kind.name in _SCENE_LINEAR else colour.SRGB


@contextlib.contextmanager
def _openimageio(path: Path, *, must_open: bool = True) -> Iterator[Any]:
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


def _read_type(spec: Any) -> str:
    """uint8 and uint16 as they are; all else, integers of 32 bits too, as float."""
    name = str(spec.format)
    return name if name in ("uint8", "uint16") else "float"


def _tag(spec: Any, name: str, otherwise: int = 1) -> int:
    value = spec.getattribute(name)
    return int(value) if isinstance(value, int) else otherwise


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 where there is none; EXIF that cannot be read turns nothing."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001  EXIF is written by anything, and can never fail a picture
        return 1
    return _known(orientation)


def _known(orientation: object) -> int:
    return orientation if isinstance(orientation, int) and orientation in _UPRIGHT else 1


def _turned(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    return _UPRIGHT[orientation](pixels) if orientation in _UPRIGHT else pixels


def _upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(height, width) of a stored (width, height)."""
    return size if orientation in ON_THEIR_SIDE else (size[1], size[0])


def _pages(path: Path) -> list[int]:
    """Numbers of a TIFF's pages that are no smaller copies of others, the first one at least."""
    with _openimageio(path, must_open=False) as file:
        if file is None:
            with Image.open(path) as image:
                return list(range(getattr(image, "n_frames", 1)))
        pages, number = [], 0
        while file.seek_subimage(number, 0):
            if not _tag(file.spec(), "tiff:subfiletype", 0) & REDUCED:
                pages.append(number)
            number += 1
        file.geterror()  # of the seek that went too far
        return pages or [0]


def _page(path: Path, frame: int) -> int:
    """Number of the page that is a TIFF's frame. Raises ImageError where there are fewer."""
    pages = _pages(path)
    if frame >= len(pages):
        raise ImageError(f"{path} has no frame {frame + 1}")
    return pages[frame]


def _check_memory(path: Path, width: int, height: int) -> None:
    """Raises ImageError for a picture that this machine's free memory does not hold."""
    needed, free = width * height * BYTES_PER_PIXEL, environment.available_memory_bytes()
    if free is not None and needed > free:
        raise ImageError(
            f"{path} is {width}x{height}, which takes about {needed / 1e9:.0f} GB of memory, and "
            f"{free / 1e9:.0f} GB are free; scale it down"
        )


def _not_an_image(path: Path) -> str:
    if path.stat().st_size == 0:
        return "is empty (0 bytes); get a whole copy"
    if kind_of(path).name == "heic":
        return "is HEIC; to read it run: pip install 'icm-cli[heif]'"
    return "is not an image in a format that can be read; expected JPEG, PNG, TIFF, EXR, WebP or the like"


def _register_heif() -> None:
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


_register_heif()
