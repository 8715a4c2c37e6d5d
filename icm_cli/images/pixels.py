"""Decoded pixels of one frame, their windows, EXIF orientations and the memory limit."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icm_cli.environment import FreeMemory, format_gb, measure_free_memory
from icm_cli.errors import ImageMemoryError
from icm_cli.geometry import format_size

BYTES_PER_PIXEL = 24
"""Memory that an image of 8 bits needs per pixel while it is read, matted and written."""
COPIED_ATTRIBUTES = frozenset({"PixelAspectRatio", "smpte:TimeCode", "smpte:KeyCode", "FramesPerSecond", "captureRate"})
BAD_PROFILE = "its ICC profile cannot be used, so its colours are read as sRGB; embed another profile to change this"
GREY_TOLERANCE = 16
"""Channels of a grey image differ by at most this much, also after JPEG compression."""
TRANSPOSING_ORIENTATIONS = frozenset({5, 6, 7, 8})
"""EXIF orientations that swap height and width."""
_UPRIGHT: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],
    7: lambda stored: stored.swapaxes(0, 1)[::-1, ::-1],
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}
"""EXIF orientation -> operation that turns the stored pixels upright."""
_INVERSE = {6: 8, 8: 6}
"""Orientation -> orientation whose operation undoes it. Every orientation that is not listed undoes itself."""


@dataclass(frozen=True)
class ImageWindows:
    """The data window and the display window of an EXR. Other images have one window of their size."""

    size: tuple[int, int]
    """Height and width of the data window, which holds the pixels."""
    offset: tuple[int, int]
    """Row and column of the data window's top left corner in the display window."""
    display: tuple[int, int]
    """Height and width of the display window."""

    @classmethod
    def full(cls, size: tuple[int, int]) -> ImageWindows:
        """Return the windows of an image in which both windows are equal."""
        return cls(size, (0, 0), size)

    @classmethod
    def from_spec(cls, spec: Any) -> ImageWindows:
        """Return the windows in an OpenImageIO specification."""
        offset = spec.y - spec.full_y, spec.x - spec.full_x
        return cls((spec.height, spec.width), offset, (spec.full_height, spec.full_width))

    @property
    def is_full(self) -> bool:
        """Whether the data window is equal to the display window."""
        return self == ImageWindows.full(self.size)

    @property
    def display_window(self) -> ImageWindows:
        """Windows in which the data window is the whole display window."""
        return ImageWindows.full(self.display)

    def choose_target(self, target: ImageWindows | None) -> ImageWindows:
        """Return the windows to which the pixels of a mask or alpha are moved.

        They are ``target``, those of its image, if both display windows have the same size; else the display window.
        """
        if target is not None and target.display == self.display:
            return target
        return self.display_window

    def move_pixels(self, pixels: NDArray[Any], target: ImageWindows) -> NDArray[Any]:
        """Move pixels [H,W] or [H,W,C] of this data window to that of ``target``; new pixels are 0.

        Both data windows are of the same display window.
        """
        if target == self:
            return pixels
        moved = np.zeros((*target.size, *pixels.shape[2:]), pixels.dtype)
        target_rows, own_rows = _overlap(self.size[0], self.offset[0] - target.offset[0], target.size[0])
        target_columns, own_columns = _overlap(self.size[1], self.offset[1] - target.offset[1], target.size[1])
        moved[target_rows, target_columns] = pixels[own_rows, own_columns]
        return moved

    def __str__(self) -> str:
        row, column = self.offset
        size, display = format_size(self.size), format_size(self.display)
        return f"a data window of {size} at ({column},{row}) in a display window of {display}"


def _overlap(length: int, shift: int, target_length: int) -> tuple[slice, slice]:
    """Return the slices of target and source that overlap if ``length`` pixels of the source are moved by ``shift``."""
    start = max(0, shift)
    end = max(start, min(target_length, length + shift))
    return slice(start, end), slice(start - shift, end - shift)


@dataclass(frozen=True)
class DecodedImage:
    """Upright pixels of one frame as the file stores them.

    Colours that the file stores multiplied by the alpha (associated alpha) are not divided by it.
    """

    pixels: NDArray[Any]
    """[H,W,1] or [H,W,3] in 0..``scale``; floats may exceed it, and signed integers may be negative."""
    alpha: NDArray[Any] | None
    """[H,W] in 0..``scale``; None if the file has no alpha."""
    scale: float
    """Value of white, and of an opaque alpha."""
    space: str
    """Name of the colour space."""
    notices: tuple[str, ...] = ()
    """Messages about unusual properties of the file."""
    bits: int = 8
    file_white: int | None = None
    """Value of white in the file, if the decoder has scaled integers of fewer bits to ``scale``."""
    indices: NDArray[Any] | None = None
    """Palette indices [H,W], if the file has a palette."""
    has_grey_palette: bool = False
    """Whether the colours of the palette, or those that are used, are greys, so that the file is not a label map."""
    header: Any = None
    """OpenImageIO's specification of the file, if it has read the file."""
    orientation: int = 1
    """EXIF orientation, which has been applied."""
    is_half: bool = False
    """Whether the file stores 16-bit floats."""
    own_windows: ImageWindows | None = None
    """Windows of the pixels; None if the pixels fill their display window."""

    @property
    def values(self) -> NDArray[Any]:
        """The pixels as [H,W] if they have one channel, else as [H,W,3]."""
        return self.pixels[..., 0] if self.pixels.shape[-1] == 1 else self.pixels

    @property
    def labels(self) -> NDArray[Any] | None:
        """Palette indices [H,W], if they are labels; else None."""
        return None if self.has_grey_palette else self.indices

    def reorient(self, orientation: int) -> DecodedImage:
        """Return the image with this EXIF orientation applied instead of ``self.orientation``."""
        to_stored = _UPRIGHT[_INVERSE.get(self.orientation, self.orientation)]
        to_upright = _UPRIGHT[orientation]
        image = self._change_planes(lambda plane: np.ascontiguousarray(to_upright(to_stored(plane))))
        windows = self.own_windows if orientation == self.orientation else None
        return replace(image, orientation=orientation, own_windows=windows)

    def move_to(self, windows: ImageWindows) -> DecodedImage:
        """Return the image in another data window of its display window; new pixels are 0."""
        image = self._change_planes(lambda plane: self.windows.move_pixels(plane, windows))
        return replace(image, own_windows=windows)

    def _change_planes(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> DecodedImage:
        """Return the image with a function applied to its pixels, alpha and indices."""
        alpha = None if self.alpha is None else change(self.alpha)
        indices = None if self.indices is None else change(self.indices)
        return replace(self, pixels=change(self.pixels), alpha=alpha, indices=indices)

    @property
    def windows(self) -> ImageWindows:
        """Windows of the pixels. Only those of an EXR without an EXIF orientation may differ from each other."""
        height, width = self.pixels.shape[:2]
        return self.own_windows or ImageWindows.full((height, width))

    def copy_metadata_to(self, spec: Any) -> None:
        """Copy windows, pixel aspect ratio, timecode and frame rate to an OpenImageIO specification of an output.

        Windows are only copied to an output of the same size and orientation. If the output is transposed, nothing is.
        """
        header = self.header
        if header is None or self.orientation in TRANSPOSING_ORIENTATIONS:
            return
        if self.orientation == 1 and (header.width, header.height) == (spec.width, spec.height):
            for name in ("x", "y", "full_x", "full_y", "full_width", "full_height"):
                setattr(spec, name, getattr(header, name))
        for attribute in header.extra_attribs:
            if attribute.name in COPIED_ATTRIBUTES:
                spec.attribute(attribute.name, attribute.type, attribute.value)


def valid_orientation(orientation: object) -> int:
    """Return the EXIF orientation if it is valid, 1..8, else 1."""
    return orientation if isinstance(orientation, int) and orientation in _UPRIGHT else 1


def upright_size(stored_size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return (height, width) of an upright image. ``stored_size``: (width, height) before its EXIF orientation."""
    width, height = stored_size
    return (width, height) if orientation in TRANSPOSING_ORIENTATIONS else (height, width)


reserve_memory: ContextVar[Callable[[Path, str, int], None] | None] = ContextVar("reserve_memory", default=None)
"""Function that :func:`check_memory` calls instead, in threads that read while other images are being processed."""


def check_memory(path: Path, width: int, height: int, sample_bytes: int = 1) -> None:
    """Raise ImageMemoryError for an image that does not fit into the free memory.

    Decoders call it when they know the size of an image, before they decode it. ``sample_bytes``: bytes of one channel
    of a decoded pixel.
    """
    bytes_per_pixel = BYTES_PER_PIXEL + 3 * (sample_bytes - 1)  # three colour channels
    size, needed = f"{width}x{height}", width * height * bytes_per_pixel
    if reserve := reserve_memory.get():
        reserve(path, size, needed)
        return
    free = measure_free_memory()
    if needed > free.size:
        raise ImageMemoryError(too_large_message(path, size, needed, free))


def too_large_message(path: Path, size: str, needed: int, free: FreeMemory) -> str:
    """Return the error message about an image of a ``size`` such as "640x480" that needs ``needed`` bytes."""
    return (
        f"{path} is {size}, which needs about {format_gb(needed)} of memory, and only {free}; free memory, raise the "
        "limit or scale the image down"
    )
