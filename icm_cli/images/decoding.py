"""Files to pixels: Pillow reads what has 8 bits and is everywhere, OpenImageIO what is deep, linear or of the trade.

A decoder may raise anything; at this file's edge all of it becomes one ImageError.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
from PIL import ExifTags, Image, UnidentifiedImageError

from icm_cli.errors import ImageError
from icm_cli.images import colour, jpeg, openimageio, png
from icm_cli.images.kinds import FileType, detect_file_type, movie_message
from icm_cli.images.pixels import (
    BAD_PROFILE,
    DecodedImage,
    ImageWindows,
    apply_orientation,
    check_memory,
    upright_size,
    valid_orientation,
)

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # a damaged file is told in a sentence of ours
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
Image.MAX_IMAGE_PIXELS = None  # the limit is the memory there is, see check_memory
DECODE_ERRORS = (OSError, SyntaxError, UserWarning, ValueError, EOFError, IndexError, struct.error, zlib.error)
_BY_PILLOW = frozenset({"jpeg", "gif", "webp", "bmp", "dib", "avif", "heic", ""})


def decode_image(path: Path, frame: int = 0, wanted: colour.ColourSettings = colour.DEFAULT_COLOUR) -> DecodedImage:
    """Decode one frame of a picture, EXIF's turn applied. Raises ImageError for any file that is not whole."""
    with as_image_errors(path):
        kind = detect_file_type(path)
        if kind.name == "tiff":
            frame = openimageio.page_of(path, frame)
        if _is_for_pillow(path, kind, frame, wanted):
            try:
                return _by_pillow(path, frame, wanted)
            except ValueError:  # as of windows_and_turn
                if kind.name != "png":
                    raise
            except OSError:
                whole = jpeg.with_end(path) if kind.name == "jpeg" else None
                if whole is None:
                    raise
                decoded = _by_pillow(path, frame, wanted, whole)
                return replace(decoded, notices=(*decoded.notices, f"{path} {jpeg.NO_END}"))
        if kind.name == "png":
            png.check_pixels(path)
        return openimageio.read(path, frame, kind, wanted)


def frame_count(path: Path) -> int:
    """Number of frames or pages; smaller copies of one (thumbnails, pyramids) are none. Raises ImageError."""
    with as_image_errors(path):
        kind = detect_file_type(path)
        if not kind.may_have_frames:
            return 1
        if kind.name == "tiff":
            return len(openimageio.pages_of(path))
        with Image.open(path) as image:
            return int(getattr(image, "n_frames", 1))


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an upright picture, an EXR's display window, from its header alone. Raises ImageError."""
    return windows_and_turn(path)[0].display


def windows_and_turn(path: Path) -> tuple[ImageWindows, int]:
    """Windows of an upright picture and EXIF's orientation, from its header alone. Raises ImageError."""
    with as_image_errors(path):
        kind = detect_file_type(path)
        frame = openimageio.page_of(path, 0) if kind.name == "tiff" else 0
        if _is_for_pillow(path, kind, frame, colour.DEFAULT_COLOUR):
            try:
                with Image.open(path) as image:
                    if frame:
                        image.seek(frame)
                    turn = _orientation(image)
                    return ImageWindows.full(upright_size(image.size, turn)), turn
            except ValueError:  # of a PNG with more metadata than Pillow reads past
                if kind.name != "png":
                    raise
        if kind.name == "png":
            png.check_pixels(path)
        with openimageio.opened(path) as file:
            file.seek_subimage(openimageio.layer_of(file, path, frame, kind, "")[0].part, 0)
            spec = file.spec()
            turn = valid_orientation(openimageio.tag(spec, "Orientation"))
            return openimageio.windows_of(spec, kind, turn), turn


@contextlib.contextmanager
def as_image_errors(path: Path) -> Iterator[None]:
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
        said = next(iter(str(error).splitlines()), type(error).__name__)  # OpenImageIO adds a line for every strip
        raise ImageError(f"{path} is damaged or cut short ({' '.join(said.split())}); get a whole copy") from None


def _is_for_pillow(path: Path, kind: FileType, frame: int, wanted: colour.ColourSettings) -> bool:
    """Whether Pillow reads it right: 8 bits a channel in a format that it knows, without a gamma that it ignores."""
    if kind.name == "png":
        minds_gamma = wanted.space == "auto" and not kind.may_have_frames
        return not (png.is_deep(path) or (minds_gamma and png.has_own_gamma(path)))
    if kind.name in ("tiff", "pnm"):
        with openimageio.opened(path, must_open=False) as file:
            if file is None or not file.seek_subimage(frame, 0):
                return True
            return str(file.spec().format) == "uint8" and not openimageio.is_associated(file.spec())
    return kind.name in _BY_PILLOW


def _by_pillow(
    path: Path, frame: int, wanted: colour.ColourSettings, content: io.BytesIO | None = None
) -> DecodedImage:
    """``content``: what is read in place of the file."""
    with Image.open(content or path) as image:
        check_memory(path, *image.size)
        if frame:
            image.seek(frame)
        image.load()
        orientation, profile = _orientation(image), image.info.get("icc_profile")
        space = wanted.space if wanted.space != "auto" else colour.SRGB
        alpha, notices = None, []
        shown: Image.Image = image
        if image.has_transparency_data:
            shown = image.convert("RGBA")
            alpha = np.ascontiguousarray(apply_orientation(np.asarray(shown.getchannel("A")), orientation))
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            values = apply_orientation(np.nan_to_num(np.asarray(image, dtype=np.float32))[..., None], orientation)
            return DecodedImage(
                values,
                None,
                wanted.white or (1.0 if image.mode == "F" else 65535.0),
                space,
                bits=32,
                orientation=orientation,
            )
        indices = None
        if image.mode == "P" and alpha is None:
            indices = np.ascontiguousarray(apply_orientation(np.asarray(image), orientation))
        if shown.mode in ("RGBA", "P", "PA", "LA"):
            shown = shown.convert("RGB")
        elif shown.mode == "1":
            shown = shown.convert("L")
        if profile and wanted.space == "auto":
            converted = colour.to_srgb(shown, profile)
            notices += [] if converted else [f"{path}: {BAD_PROFILE}"]
            shown = converted or shown
        pixels = np.asarray(shown)[..., None] if shown.mode == "L" else np.asarray(shown.convert("RGB"))
    pixels = np.ascontiguousarray(apply_orientation(pixels, orientation))
    return DecodedImage(pixels, alpha, 255.0, space, tuple(notices), indices=indices, orientation=orientation)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 where there is none; EXIF that cannot be read turns nothing."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001  EXIF is written by anything, and can never fail a picture
        return 1
    return valid_orientation(orientation)


def _not_an_image(path: Path) -> str:
    if path.stat().st_size == 0:
        return "is empty (0 bytes); get a whole copy"
    seen = detect_file_type(path)
    if seen.is_movie:
        return movie_message(path)
    kind = seen.name
    if kind == "heic":
        return "is HEIC; to read it run: pip install 'icm-cli[heif]'"
    if kind:
        return f"begins as {kind} and cannot be decoded: it is damaged, cut short or of an odd kind; get a whole copy"
    return "is not an image in a format that can be read; expected JPEG, PNG, TIFF, EXR, WebP or the like"


def _register_heif() -> None:
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


def _silence_libtiff() -> None:
    """Keep the libtiff in Pillow's wheels from printing what is wrong with a file; it is told in a sentence of ours."""
    site = Path(PIL.__file__).parents[1]
    for path in (*site.glob("pillow.libs/libtiff*"), *site.glob("PIL/.dylibs/libtiff*")):
        libtiff = ctypes.CDLL(str(path))
        libtiff.TIFFSetErrorHandler(None)
        libtiff.TIFFSetWarningHandler(None)


_register_heif()
_silence_libtiff()
