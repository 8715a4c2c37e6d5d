"""Decode image files: with Pillow if they have 8 bits, with OpenImageIO if they have more bits or are linear.

Decoders may raise any exception. This module converts all of them to ImageError.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from icm_cli.environment import OUT_OF_MEMORY, is_out_of_memory, measure_free_memory
from icm_cli.errors import FileAccessError, IcmError, ImageError, ImageMemoryError, UsageError
from icm_cli.files.system_errors import describe_os_error, is_system_error, is_transient
from icm_cli.images import colour, containers, openimageio
from icm_cli.images.image_file import EMPTY_FILE, UNKNOWN_TYPE, FileType, ImageFile, has_state, movie_message
from icm_cli.images.pixels import (
    BAD_PROFILE,
    GREY_TOLERANCE,
    DecodedImage,
    ImageWindows,
    check_memory,
    upright_size,
    valid_orientation,
)

Result = TypeVar("Result")
_PILLOW_FORMATS = frozenset({"jpeg", "gif", "webp", "bmp", "dib", "avif", "heic", ""})


@dataclass(frozen=True)
class SourceFile:
    """What planning reads from the start of a source file: its type, its number of frames and its state."""

    path: Path
    type: FileType = UNKNOWN_TYPE
    frame_count: int = 1
    planned_state: str = ""
    """State (see :meth:`ImageFile.read_state`) at planning; "" if the file could not be read."""
    error: FileAccessError | None = None
    """Error of the system when the file was opened; None if it could be read."""

    @classmethod
    def inspect(cls, path: Path) -> SourceFile:
        """Inspect a file. A file that cannot be read is reported when it is matted, not here."""
        try:
            with open_image(path) as file:
                return cls(path, file.type, _frame_count_or_one(file), file.read_state())
        except FileAccessError as error:
            return cls(path, error=error)
        except ImageError:
            return cls(path)

    def check_frame_count(self, file: ImageFile) -> None:
        """Raise ImageError if a file with several frames could not be read when the run was planned."""
        if self.error and frame_count(file) > 1:
            raise FileAccessError(
                f"{self.path} has several frames, and it could not be read when the run was planned; run the same "
                "command again"
            )

    def state(self) -> str:
        """Return the state of the file now. It is read again only if size or time have changed. Raises ImageError."""
        if self.planned_state and not self.has_changed():
            return self.planned_state
        with open_image(self.path) as file:
            return file.read_state()

    def has_changed(self) -> bool:
        """Return whether a file that could be read at planning has another size or time now, or does not exist."""
        try:
            return bool(self.planned_state) and not has_state(self.path, self.planned_state)
        except OSError:
            return True


def _change_settings(restorers: contextlib.ExitStack) -> None:
    """Change the settings, and register callbacks that restore them."""
    logger = logging.getLogger("PIL")
    restorers.callback(logger.setLevel, logger.level)
    logger.setLevel(logging.CRITICAL)  # icm reports damaged files itself
    restorers.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
    restorers.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    Image.MAX_IMAGE_PIXELS = None  # check_memory limits the size by the free memory instead
    for libtiff in _pillow_libtiffs():
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            set_handler = getattr(libtiff, name)
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            former_handler = set_handler(None)  # None: print nothing
            restorers.callback(set_handler, former_handler)


library_settings = openimageio.SharedSettings(_change_settings)
"""Context in which image libraries neither limit sizes nor print."""


@functools.cache
def _pillow_libtiffs() -> list[ctypes.CDLL]:
    """Return the libtiff that Pillow's wheel contains on Linux or macOS. It prints errors to the terminal."""
    site_packages = Path(PIL.__file__).parents[1]
    paths = [*site_packages.glob("pillow.libs/libtiff*"), *site_packages.glob("PIL/.dylibs/libtiff*")]
    return [ctypes.CDLL(str(path)) for path in paths]


@contextlib.contextmanager
def open_image(source: Path | ImageFile) -> Iterator[ImageFile]:
    """Context of an image file that is opened from its path, or is open already.

    Inside it, :func:`library_settings` apply, and every exception becomes an ImageError.
    """
    if isinstance(source, ImageFile):
        with library_settings(), as_image_errors(source.path, source.type):
            yield source
    else:
        with as_image_errors(source), ImageFile.open(source) as file, open_image(file):
            yield file


def decode_image(
    source: Path | ImageFile, frame: int = 0, settings: colour.ColourSettings = colour.DEFAULT_COLOUR
) -> DecodedImage:
    """Decode one frame or page of an image and apply its EXIF orientation.

    A file is opened at most twice: by Python, and by OpenImageIO, which opens files by name. Raises ImageError for a
    file that is missing, damaged, incomplete or not an image.
    """
    with open_image(source) as file:
        return retry_decoding(file, lambda: _decode(file, frame, settings))


def retry_decoding(file: ImageFile, decode: Callable[[], Result]) -> Result:
    """Return ``decode()``, and repeat it once after an error that a failing drive may have caused.

    A library may report such a failure as damage. So the whole file is read before the second attempt. This raises
    OSError if the drive still fails.
    """
    try:
        return decode()
    except (IcmError, MemoryError):
        raise
    except Exception as error:
        if is_system_error(error):
            raise
        with ImageFile.open(file.path) as reopened:
            reopened.content_digest()
    return decode()


def _decode(file: ImageFile, frame: int, settings: colour.ColourSettings) -> DecodedImage:
    """Decode with the library that suits the format of the file."""
    if file.type.name in ("tiff", "pnm"):
        return _decode_tiff_or_pnm(file, frame, settings)
    if file.type.name == "png":
        return _decode_png(file, frame, settings)
    if file.type.name == "jpeg":
        return _decode_jpeg(file, frame, settings)
    if file.type.name in _PILLOW_FORMATS and not containers.is_black_and_white_bmp(file.head):
        return _decode_with_pillow(file, frame, settings)
    with openimageio.open_reader(file) as reader:
        return openimageio.read_pixels(reader, file, frame, settings)


def frame_count(source: Path | ImageFile) -> int:
    """Return the number of frames or pages. Smaller copies of a page are not counted. Raises ImageError."""
    with open_image(source) as file:
        if not file.type.may_have_frames:
            return 1
        if file.type.name == "tiff":
            return len(containers.tiff_pages(file))
        with _open_with_pillow(file) as image:
            return int(getattr(image, "n_frames", 1))


def _frame_count_or_one(file: ImageFile) -> int:
    """Return the number of frames; 1 for a damaged file. Raises FileAccessError."""
    try:
        return frame_count(file)
    except FileAccessError:
        raise
    except ImageError:  # a damaged file fails when it is matted
        return 1


def image_size(path: Path) -> tuple[int, int]:
    """Return height and width of an image with its EXIF orientation applied. An EXR has the size of its display window.

    Reads the header only. Raises ImageError.
    """
    return image_windows(path).display


def image_windows(path: Path) -> ImageWindows:
    """Return the windows of an image with its EXIF orientation applied. Reads the header only. Raises ImageError."""
    with open_image(path) as file:
        return retry_decoding(file, lambda: _read_windows(file))


def _read_windows(file: ImageFile) -> ImageWindows:
    """Return the windows of the first image of a file; see :func:`image_windows`."""
    if file.type.name in _PILLOW_FORMATS:
        return ImageWindows.full(_size_by_pillow(file))
    if file.type.name == "png":
        if not containers.is_16_bit_png(file.head):
            with contextlib.suppress(ValueError):  # a PNG with more metadata than Pillow accepts
                return ImageWindows.full(_size_by_pillow(file))
        containers.check_png_pixels(file)
    frame = containers.tiff_pages(file)[0] if file.type.name == "tiff" else 0
    with openimageio.open_reader(file, must_open=file.type.name not in ("tiff", "pnm")) as reader:
        if reader is None or not reader.seek_subimage(frame, 0):
            return ImageWindows.full(_size_by_pillow(file, frame))
        return openimageio.read_windows(reader, file, frame)


@contextlib.contextmanager
def as_image_errors(path: Path, file_type: FileType = UNKNOWN_TYPE) -> Iterator[None]:
    """Convert every exception of a decoder to an ImageError with one sentence."""
    try:
        yield
    except ImageError:
        raise
    except UsageError as error:  # the OpenColorIO configuration
        raise ImageError(f"{path} cannot be read: {error}") from None
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder; expected an image file") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} {_describe_undecodable_file(path, file_type)}") from None
    except Exception as error:  # noqa: BLE001  decoders raise anything
        if is_out_of_memory(error):
            raise ImageMemoryError(f"{path} {OUT_OF_MEMORY.format(measure_free_memory())}") from None
        if isinstance(error, OSError) and is_system_error(error):
            failure = FileAccessError(f"{path} cannot be read: {describe_os_error(error)}")
            failure.is_transient = is_transient(error)
            raise failure from None
        lines = str(error).splitlines()  # OpenImageIO adds a line for every strip
        reason = " ".join((lines[0] if lines else type(error).__name__).split())
        raise ImageError(f"{path} is damaged or cut short ({reason}); get a complete copy") from None


def _decode_tiff_or_pnm(file: ImageFile, frame: int, settings: colour.ColourSettings) -> DecodedImage:
    """Decode with Pillow if the file has 8 bits and straight alpha, else with OpenImageIO.

    Pillow is also used if OpenImageIO cannot open the file. ``frame``: index among the pages that are frames;
    others are skipped, see :func:`~icm_cli.images.containers.tiff_pages`.
    """
    if file.type.name == "tiff":
        pages = containers.tiff_pages(file)
        if frame >= len(pages):
            raise ImageError(f"{file.path} has no frame {frame + 1}; it has {len(pages)}")
        frame = pages[frame]  # index in the file
    header = None
    with openimageio.open_reader(file, must_open=False) as reader:
        if reader is not None and reader.seek_subimage(frame, 0):
            if not openimageio.is_plain_8_bit(reader.spec()):
                return openimageio.read_pixels(reader, file, frame, settings)
            header = openimageio.read_header(reader, file)
    if file.type.name == "tiff" and containers.has_64_bit_integers(file):
        raise ImageError(f"{file.path} has integers of 64 bits; expected at most 32 bits; save it with 32-bit integers")
    return replace(_decode_with_pillow(file, frame, settings), header=header)


def _decode_png(file: ImageFile, frame: int, settings: colour.ColourSettings) -> DecodedImage:
    """Decode with OpenImageIO if the file has 16 bits or an unusual gamma, which Pillow ignores; else with Pillow."""
    respects_gamma = settings.space == "auto" and not file.type.may_have_frames  # only Pillow decodes the frames
    needs_openimageio = containers.is_16_bit_png(file.head) or (respects_gamma and containers.has_unusual_gamma(file))
    if not needs_openimageio:
        with contextlib.suppress(ValueError):  # a PNG with more metadata than Pillow accepts
            return _decode_with_pillow(file, frame, settings)
    containers.check_png_pixels(file)
    with openimageio.open_reader(file) as reader:
        return openimageio.read_pixels(reader, file, frame, settings)


def _decode_jpeg(file: ImageFile, frame: int, settings: colour.ColourSettings) -> DecodedImage:
    """Decode a JPEG. If only its end marker is missing, it is decoded with a notice."""
    try:
        return _decode_with_pillow(file, frame, settings)
    except OSError as error:
        content = None if is_system_error(error) else containers.complete_jpeg(file)
        if content is None:
            raise
        decoded = _decode_with_pillow(file, frame, settings, content)
        return replace(decoded, notices=(*decoded.notices, f"{file.path} {containers.NO_JPEG_END}"))


def _decode_with_pillow(
    file: ImageFile, frame: int, settings: colour.ColourSettings, content: io.BytesIO | None = None
) -> DecodedImage:
    """Decode with Pillow. ``content`` replaces the content of the file."""
    with _open_with_pillow(file, content) as image:
        check_memory(file.path, *image.size)
        if frame:
            image.seek(frame)
        image.load()
        orientation = _exif_orientation(image)
        space, profile, notices = _space_and_profile(file, image.info.get("icc_profile"), settings)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # one channel of more than 8 bits
            values = np.nan_to_num(np.asarray(image, dtype=np.float32))[..., None]
            scale = settings.white or (1.0 if image.mode == "F" else 65535.0)
            return DecodedImage(values, None, scale, space, bits=32).reorient(orientation)  # ``values`` are float32
        indices, has_grey_palette = _read_palette_indices(image)
        colours, alpha = _split_alpha(image)
        if profile:
            converted = colour.to_srgb(colours, profile)
            if converted is None:
                notices.append(f"{file.path}: {BAD_PROFILE}")
            else:
                colours = converted
        pixels = np.asarray(colours)[..., None] if colours.mode == "L" else np.asarray(colours.convert("RGB"))
    decoded = DecodedImage(
        pixels,
        alpha,
        scale=255.0,
        space=space,
        notices=tuple(notices),
        file_white=containers.file_white(file),
        indices=indices,
        has_grey_palette=has_grey_palette,
    )
    return decoded.reorient(orientation)


def _split_alpha(image: Image.Image) -> tuple[Image.Image, NDArray[Any] | None]:
    """Return the colours of an image of 8 bits, without alpha or palette, and its alpha [H,W]; None without one."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), np.asarray(rgba.getchannel("A"))
    if image.mode == "P":
        return image.convert("RGB"), None
    return image.convert("L") if image.mode == "1" else image, None


def _read_palette_indices(image: Image.Image) -> tuple[NDArray[Any] | None, bool]:
    """Return the palette indices [H,W] of an image, and whether it is one of greys; None without a palette.

    See :attr:`DecodedImage.has_grey_palette`.
    """
    if image.mode != "P":
        return None, False
    indices = np.asarray(image)
    palette = np.array(image.getpalette("RGB") or [0, 0, 0]).reshape(-1, 3)
    return indices, _is_grey_palette(palette, np.unique(indices))


def _is_grey_palette(palette: NDArray[Any], used_indices: NDArray[Any]) -> bool:
    """Return whether a palette, uint8 [N,3], is one of greys, so that an image with it is not a label map.

    Either all its colours are greys, and not all the same; or the colours of the used indices are greys that include
    black and white. Programs fill unused entries with arbitrary colours.
    """
    used_colours = palette[used_indices[used_indices < len(palette)]]
    if _are_greys(palette) and (palette != palette[0]).any():
        return True
    has_black_and_white = used_colours.min() <= GREY_TOLERANCE and used_colours.max() >= 255 - GREY_TOLERANCE
    return bool(_are_greys(used_colours) and has_black_and_white)


def _are_greys(colours: NDArray[Any]) -> bool:
    """Return whether the channels of all colours [N,3] are nearly equal."""
    return bool(np.ptp(colours, axis=-1).max() <= GREY_TOLERANCE)


def _space_and_profile(
    file: ImageFile, profile: bytes | None, settings: colour.ColourSettings
) -> tuple[str, bytes | None, list[str]]:
    """Return the colour space of the image, its ICC profile, if any, and notices.

    Colours with a profile are first converted from it to this space, which is then sRGB. In a PNG, code points have
    precedence over a profile. In AVIF and HEIC, the profile has precedence.
    """
    if settings.space != "auto":
        return settings.space, None, []
    code_points = containers.read_code_points(file)
    profile_has_precedence = bool(profile) and file.type.name != "png"
    if code_points is None or profile_has_precedence:
        return colour.SRGB, profile, []
    space, notice = code_points.find_space(settings.config)
    if space is not None:
        return space, None, []
    notices = [f"{file.path} has {notice}"] if notice and not profile else []
    return colour.SRGB, profile, notices


def _open_with_pillow(file: ImageFile, content: io.BytesIO | None = None) -> Image.Image:
    """Open a file with Pillow, which reads only its header. ``content`` replaces the content of the file."""
    if file.type.name == "heic":  # without registering the plugin, which would change Pillow for the whole process
        with contextlib.suppress(ImportError):
            from pillow_heif import HeifImageFile

            return HeifImageFile(file.stream)  # type: ignore[no-untyped-call]
    return Image.open(content or file.stream)


def _size_by_pillow(file: ImageFile, frame: int = 0) -> tuple[int, int]:
    """Return height and width of a frame with its EXIF orientation applied."""
    with _open_with_pillow(file) as image:
        if frame:
            image.seek(frame)
        return upright_size(image.size, _exif_orientation(image))


def _exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) if there is none or the EXIF data cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:
        if is_system_error(error):
            raise
        return 1  # damaged EXIF data must never fail an image
    return valid_orientation(orientation)


def _describe_undecodable_file(path: Path, file_type: FileType) -> str:
    """Return the end of a message about a file that no decoder accepts."""
    if path.stat().st_size == 0:
        return EMPTY_FILE
    if file_type.is_movie:
        return movie_message(path)
    if file_type.name == "heic":
        return "is HEIC; to read it run: pip install 'icm-cli[heif]'"
    if file_type.name:
        damage = "it is damaged, cut short or of an unsupported variant; get a complete copy"
        return f"begins as {file_type.name} and cannot be decoded; {damage}"
    return "is not an image in a supported format; expected JPEG, PNG, TIFF, EXR, WebP or the like"
