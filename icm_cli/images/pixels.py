"""Pixels of one frame, upright: what decoders give, EXIF's turn, and the memory that they may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icm_cli import environment
from icm_cli.errors import ImageError

BYTES_PER_PIXEL = 24
"""Memory that a picture takes while it is read, matted and written, per pixel."""
KEPT_ATTRIBUTES = frozenset({"PixelAspectRatio", "smpte:TimeCode", "smpte:KeyCode", "FramesPerSecond", "captureRate"})
BAD_PROFILE = "its ICC profile cannot be used; its colours are taken as sRGB"
TRANSPOSING_ORIENTATIONS = frozenset({5, 6, 7, 8})
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


@dataclass(frozen=True)
class ImageWindows:
    """The place of an EXR's pixels: ``size`` (height, width) of its data window, the place ``at`` (row, column) of that
    one's top left corner in the display window, and ``display``, the display window's size."""

    size: tuple[int, int]
    at: tuple[int, int]
    display: tuple[int, int]

    @classmethod
    def full(cls, size: tuple[int, int]) -> ImageWindows:
        """Windows of a picture that has no others than its size."""
        return cls(size, (0, 0), size)

    @classmethod
    def from_spec(cls, spec: Any) -> ImageWindows:
        at = spec.y - spec.full_y, spec.x - spec.full_x
        return cls((spec.height, spec.width), at, (spec.full_height, spec.full_width))

    @property
    def is_full(self) -> bool:
        """Whether the pixels are the display window's, no more and no fewer."""
        return self == ImageWindows.full(self.size)

    @property
    def display_window(self) -> ImageWindows:
        """The display window alone."""
        return ImageWindows.full(self.display)

    def matched_to(self, other: ImageWindows | None) -> ImageWindows:
        """The windows of another picture where its display window is of the same size, else the display window."""
        return other if other is not None and other.display == self.display else self.display_window

    def move_pixels(self, pixels: NDArray[Any], to: ImageWindows) -> NDArray[Any]:
        """Pixels [H,W] or [H,W,C] of this data window as those of another of the same display window, 0 outside."""
        if to == self:
            return pixels
        found = np.zeros((*to.size, *pixels.shape[2:]), pixels.dtype)
        shift = self.at[0] - to.at[0], self.at[1] - to.at[1]
        starts = [max(0, each) for each in shift]
        ends = [max(start, min(to.size[n], self.size[n] + shift[n])) for n, start in enumerate(starts)]
        rows, columns = (slice(start, end) for start, end in zip(starts, ends, strict=True))
        here = (slice(start - by, end - by) for start, end, by in zip(starts, ends, shift, strict=True))
        found[rows, columns] = pixels[tuple(here)]
        return found

    def __str__(self) -> str:
        height, width = self.size
        return (
            f"a data window of {width}x{height} at ({self.at[1]},{self.at[0]}) in a display window of "
            f"{self.display[1]}x{self.display[0]}"
        )


@dataclass(frozen=True)
class DecodedImage:
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
    is_half: bool = False
    """Whether the file has floats of 16 bits."""
    own_windows: ImageWindows | None = None
    """Those of an EXR that is not turned."""

    @property
    def windows(self) -> ImageWindows:
        height, width = self.pixels.shape[:2]
        return self.own_windows or ImageWindows.full((height, width))

    def copy_metadata_to(self, spec: Any) -> None:
        """Give a file to be written this one's data and display window, pixel aspect, timecode and frame rate."""
        header = self.header
        if header is None or self.orientation in TRANSPOSING_ORIENTATIONS:
            return
        if self.orientation == 1 and (header.width, header.height) == (spec.width, spec.height):
            for name in ("x", "y", "full_x", "full_y", "full_width", "full_height"):
                setattr(spec, name, getattr(header, name))
        for attribute in header.extra_attribs:
            if attribute.name in KEPT_ATTRIBUTES:
                spec.attribute(attribute.name, attribute.type, attribute.value)


def reorient(pixels: NDArray[Any], orientation: int, wanted: int) -> NDArray[Any]:
    """Pixels [H,W] or [H,W,C] that were turned by one EXIF orientation, turned by the ``wanted`` one in its place."""
    return np.ascontiguousarray(
        apply_orientation(apply_orientation(pixels, _BACK.get(orientation, orientation)), wanted)
    )


def apply_orientation(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Stored pixels [H,W] or [H,W,C] as they are seen, by EXIF's orientation; a view."""
    return _UPRIGHT[orientation](pixels) if orientation in _UPRIGHT else pixels


def valid_orientation(orientation: object) -> int:
    """EXIF's orientation, 1..8; 1 for anything else that a file may say."""
    return orientation if isinstance(orientation, int) and orientation in _UPRIGHT else 1


def upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(height, width) of a stored (width, height)."""
    return size if orientation in TRANSPOSING_ORIENTATIONS else (size[1], size[0])


def check_memory(path: Path, width: int, height: int) -> None:
    """Raises ImageError for a picture that this machine's free memory does not hold."""
    needed, free = width * height * BYTES_PER_PIXEL, environment.available_memory_bytes()
    if free is not None and needed > free:
        raise ImageError(
            f"{path} is {width}x{height}, which takes about {needed / 1e9:.0f} GB of memory, and "
            f"{free / 1e9:.0f} GB are free; scale it down"
        )
