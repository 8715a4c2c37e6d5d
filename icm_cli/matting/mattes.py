"""Garbage and keep mattes: areas of an image in which the final alpha is 0, or 1."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from icm_cli.errors import ImageError, UsageError, format_count
from icm_cli.geometry import Float, ImageU8, format_size, has_same_aspect, resize, round_to_u8
from icm_cli.images.areas import has_colour, is_photograph, pack_colours
from icm_cli.images.decoding import image_size
from icm_cli.images.openimageio import NOT_FINITE
from icm_cli.images.pixels import ImageWindows
from icm_cli.images.reading import extra_frame_notices, file_digest, read_stored_pixels
from icm_cli.matting.frames import FrameName, FramePattern
from icm_cli.matting.sources import SkippedFiles, find_sources

if TYPE_CHECKING:  # imports torch, which scoring alone does not need
    from icm_cli.matting.crops import CropBox

GARBAGE, KEEP = "--garbage", "--keep"
HIDDEN_GREY = 127
"""Colour of hidden pixels if the whole image is hidden."""


@dataclass(frozen=True)
class Mattes:
    """The mattes of an image, each float32 [H,W] in 0..1 of its size; None if there is none."""

    garbage: Float | None = None
    keep: Float | None = None

    def crop(self, box: CropBox) -> Mattes:
        """Return the mattes of a crop of the image."""
        return Mattes(*(None if matte is None else box.crop(matte) for matte in (self.garbage, self.keep)))

    def hide_garbage(self, rgb: ImageU8) -> ImageU8:
        """Return the image [H,W,3] with its garbage area filled with the mean colour of the other pixels."""
        if self.garbage is None or not self.garbage.any():
            return rgb
        weight = 1.0 - self.garbage
        total = float(weight.sum(dtype=np.float64))
        colour = np.full(3, HIDDEN_GREY, np.float64)
        if total >= 1.0:
            colour = np.einsum("hwc,hw->c", rgb, weight, dtype=np.float64) / total
        return round_to_u8(rgb * weight[..., None] + colour.astype(np.float32) * self.garbage[..., None])

    def apply_to_alpha(self, alpha: Float) -> Float:
        """Return the alpha [H,W] with 0 in the garbage area and 1 in the kept area. Where both overlap, it is 1."""
        if self.garbage is not None:
            alpha = alpha * (1.0 - self.garbage)
        return alpha if self.keep is None else np.maximum(alpha, self.keep)

    def combined(self, size: tuple[int, ...]) -> Float:
        """Return the maximum of both mattes, float32 [H,W] of this size."""
        given = [matte for matte in (self.garbage, self.keep) if matte is not None]
        return functools.reduce(np.maximum, given, np.zeros(size, np.float32))

    @property
    def overlap(self) -> float:
        """Fraction of the image in which both mattes are above one half."""
        if self.garbage is None or self.keep is None:
            return 0.0
        return float(((self.garbage > 0.5) & (self.keep > 0.5)).mean())


@dataclass(frozen=True)
class MatteFile:
    """The file of a matte of one image."""

    path: Path
    problem: str = ""
    """Why the image has no file, such as a missing frame; "" if it has one."""

    @functools.cached_property
    def _content_digest(self) -> str:
        """Hash of the content; "" for a file that cannot be read, whose image will fail."""
        with contextlib.suppress(ImageError):
            return file_digest(self.path)
        return ""

    @property
    def digest(self) -> str:
        """Hash of the content. For a file that could not be read, a text with its path."""
        return self._content_digest or f"unreadable: {self.path}"

    @property
    def was_unreadable(self) -> bool:
        """Whether the file could not be read for its digest."""
        return not self._content_digest

    @functools.cached_property
    def _size(self) -> tuple[int, int]:
        return image_size(self.path)

    def check(self, windows: ImageWindows | None) -> None:
        """Raise ImageError if the matte is missing or has another aspect ratio than the image, by its header.

        ``windows``: those of the image; None if they are not known.
        """
        if self.problem:
            raise ImageError(self.problem)
        if windows is not None:
            _check_size(self.path, self._size, windows)

    def read(self, windows: ImageWindows) -> Float:
        """Return the matte for an image with these windows. Raises ImageError."""
        if self.problem:
            raise ImageError(self.problem)
        return read_matte(self.path, windows)


@dataclass(frozen=True)
class ImageMattes:
    """The files of the mattes of an image."""

    garbage: MatteFile | None = None
    keep: MatteFile | None = None

    def check(self, windows: ImageWindows | None) -> None:
        """Check both files, see :meth:`MatteFile.check`. Raises ImageError."""
        for file in filter(None, (self.garbage, self.keep)):
            file.check(windows)

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """Hashes of the content of the files, by the kind of matte."""
        files = {"garbage": self.garbage, "keep": self.keep}
        return {kind: file.digest for kind, file in files.items() if file is not None}

    @property
    def were_unreadable(self) -> bool:
        """Whether a file could not be read for the digests."""
        return any(file.was_unreadable for file in (self.garbage, self.keep) if file is not None)

    def read(self, windows: ImageWindows) -> Mattes:
        """Read the mattes for an image with these windows. Raises ImageError."""
        return Mattes(*(None if file is None else file.read(windows) for file in (self.garbage, self.keep)))


@dataclass(frozen=True)
class MatteFiles:
    """The mattes of ``--garbage`` or ``--keep``: one file for all images, or one for each frame number."""

    flag: str
    where: str
    """Value of the option."""
    files: dict[int | None, MatteFile]
    """Frame number -> file. A single file for all images has the key None."""

    @classmethod
    def find(cls, flag: str, where: str | None, notice: Callable[[str], None]) -> MatteFiles | None:
        """Find the files that an option names; None without the option. Raises UsageError."""
        if where is None:
            return None
        path = Path(where)
        if not path.is_file() and FramePattern.parse(where) is not None:
            found = find_sources(where, None, SkippedFiles(notice)).files
            return cls(flag, where, {FrameName.from_path(frame).number: MatteFile(frame) for frame in found})
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "does not exist"
            raise UsageError(f"{flag} {where} {problem}; expected an image, or frames such as matte.####.exr")
        try:
            read_matte(path, None)
            for sentence in extra_frame_notices(f"{flag} matte", path):
                notice(sentence)
        except ImageError as error:
            raise UsageError(f"{flag} cannot be used: {error}") from error
        return cls(flag, where, {None: MatteFile(path)})

    @property
    def paths(self) -> list[Path]:
        """All files."""
        return [file.path for file in self.files.values()]

    def find_file(self, name: Path) -> MatteFile:
        """Return the file for the image with this name; without one, a file that states the problem."""
        if None in self.files:  # one matte for all images
            return self.files[None]
        number = FrameName.from_path(name).number
        if number in self.files:
            return self.files[number]
        if number is None:
            problem = f"{name} has no frame number, which {self.flag} {self.where} needs; rename it, or give one matte"
        else:
            problem = f"{self.flag} {self.where} has no frame {number}, which {name} needs; add this matte"
        return MatteFile(Path(self.where), problem)


def assign_mattes(
    names: Sequence[Path], other_names: Sequence[Path], garbage: MatteFiles | None, keep: MatteFiles | None
) -> list[ImageMattes]:
    """Return the mattes of each image of ``names``, in order.

    ``other_names``: images that are not matted. Raises UsageError if the frames of an option belong to no image at all.
    """
    for files in (garbage, keep):
        if files is not None and names and all(files.find_file(name).problem for name in (*names, *other_names)):
            raise UsageError(
                f"{files.flag} {files.where} has {format_count(len(files.files), 'frame')}, none with the frame number "
                f"of an image, such as that of {names[0]}; expected the same frame numbers"
            )

    def find_mattes(name: Path) -> ImageMattes:
        return ImageMattes(
            None if garbage is None else garbage.find_file(name), None if keep is None else keep.find_file(name)
        )

    return [find_mattes(name) for name in names]


def read_matte(path: Path, windows: ImageWindows | None) -> Float:
    """Read the matte of an image as float32 [H,W] in 0..1. Raises ImageError.

    It is the alpha channel of the file if that varies, else the maximum of the channels. A matte of the size of the
    data window is used as it is. Any other matte is resized to the display window of the image, and cropped to its data
    window. ``windows``: those of the image; None to keep the stored size.
    """
    stored = read_stored_pixels(path, windows)
    if any(NOT_FINITE in sentence for sentence in stored.notices):
        raise ImageError(f"matte {path} has {NOT_FINITE}; expected values of 0..1; write it again")
    if stored.alpha is not None and stored.alpha.min() != stored.alpha.max():
        plane = stored.alpha
    elif has_colour(stored.values, stored.scale) and is_photograph(pack_colours(stored.values, stored.scale)):
        raise ImageError(
            f"matte {path} is a photograph: it has many colours, and nearly no areas of one colour; expected white "
            "where the matte applies, and black elsewhere"
        )
    else:
        plane = stored.values if stored.values.ndim == 2 else stored.values.max(axis=-1)
    matte = np.clip(plane.astype(np.float32) / np.float32(stored.scale), 0.0, 1.0)
    if windows is None or matte.shape == windows.size:
        return matte
    _check_size(path, matte.shape, windows)
    return windows.display_window.move_pixels(resize(matte, windows.display), windows)


def _check_size(path: Path, size: tuple[int, ...], windows: ImageWindows) -> None:
    """Raise ImageError if a matte has neither the size of the data window nor the aspect ratio of its image."""
    if size != windows.size and not has_same_aspect(size, windows.display):
        raise ImageError(
            f"matte {path} is {format_size(size)} and its image {format_size(windows.display)}; expected the "
            "same aspect ratio; give a matte of this image"
        )
