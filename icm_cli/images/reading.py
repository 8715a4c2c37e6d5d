"""Read pictures, masks and true alphas of every usual kind, upright; put foregrounds on backgrounds meanwhile."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.errors import ImageError
from icm_cli.geometry import ImageU8, round_to_u8
from icm_cli.images.colour import DEFAULT_COLOUR, SRGB, ColourSettings, to_display_srgb
from icm_cli.images.decoding import as_image_errors, decode_image, frame_count
from icm_cli.images.pixels import DecodedImage, ImageWindows, reorient

GREY_TOLERANCE = 16
"""Channels of a grey picture differ by no more, after JPEG too."""
RAW_VALUES = ColourSettings(space=SRGB, is_matte=True)
LABEL_VALUES = replace(RAW_VALUES, has_labels=True)
"""Numbers as they are stored: an alpha goes through no profile and no transfer curve."""


@dataclass(frozen=True)
class SourceImage:
    """An upright picture: ``rgb`` sRGB uint8 [H,W,3], ``alpha`` uint8 [H,W] where the file has one; ``space`` is the
    colour space it was taken to be in, and ``notices`` say what is odd about the file."""

    rgb: ImageU8
    alpha: ImageU8 | None
    space: str = SRGB
    notices: tuple[str, ...] = ()
    stored: DecodedImage | None = None
    """The file's own pixels."""

    @property
    def windows(self) -> ImageWindows:
        height, width = self.rgb.shape[:2]
        return ImageWindows.full((height, width)) if self.stored is None else self.stored.windows

    def to_display_window(self, target_windows: ImageWindows | None = None) -> SourceImage:
        """Return the image in its display window, black outside its data window, without the stored pixels.

        ``target_windows``: the windows of another image. If both display windows have the same size, the
        result covers the data window of that image instead.
        """
        there = self.windows.matched_to(target_windows)
        alpha = None if self.alpha is None else self.windows.move_pixels(self.alpha, there)
        return replace(self, rgb=self.windows.move_pixels(self.rgb, there), alpha=alpha, stored=None)


def read_image(path: Path, colour: ColourSettings = DEFAULT_COLOUR, frame: int = 0) -> SourceImage:
    """Read an image file, EXIF rotation applied, as the model sees it: display-referred sRGB.

    ``colour``: in which space the file is, and how scene-referred pictures are shown. ``frame``: of a file of several.
    Raises ImageError for a file that is missing, empty, torn or no image.
    """
    decoded = decode_image(path, frame, colour)
    with as_image_errors(path):
        rgb = to_display_srgb(decoded.pixels, decoded.scale, decoded.space, colour)
    return SourceImage(rgb, _alpha_u8(decoded), decoded.space, decoded.notices, decoded)


def read_alpha(path: Path, *, has_objects: bool = False, target_windows: ImageWindows | None = None) -> ImageU8:
    """Read a mask or an alpha, uint8 [H,W]: the file's alpha channel if it varies, else its brightest channel.

    The alpha of an EXR covers its display window and is 0 outside its data window. ``target_windows`` is
    explained at :func:`read_stored_pixels`. ``has_objects``: palette indices above 0 are objects and become
    255. Raises ImageError as :func:`read_image` does.
    """
    picture = read_image(path, RAW_VALUES)
    objects = _objects(picture.stored) if has_objects else None
    return _matte(picture.to_display_window(target_windows)) if objects is None else objects


@dataclass(frozen=True)
class StoredPixels:
    """A file's own numbers, upright: values [H,W] or [H,W,3] in 0..scale, palette indices where ``is_palette``, and
    alpha [H,W] where there is one. ``orientation``: EXIF's, which was undone."""

    values: NDArray[Any]
    alpha: NDArray[Any] | None
    scale: float
    is_palette: bool
    orientation: int = 1
    notices: tuple[str, ...] = ()
    """Sentences on what is odd about the file."""

    def reoriented(self, orientation: int) -> StoredPixels:
        """The pixels as they lie in the file, turned by another orientation than the file's own."""
        alpha = None if self.alpha is None else reorient(self.alpha, self.orientation, orientation)
        return replace(self, values=reorient(self.values, self.orientation, orientation), alpha=alpha)


def read_stored_pixels(
    path: Path, target_windows: ImageWindows | None = None, *, has_labels: bool = False
) -> StoredPixels:
    """Read an image file's numbers as they are stored, EXIF rotation applied; ``has_labels``: of any size. Raises
    ImageError.

    An EXR's are those of its display window, 0 outside its data window; where the picture that it belongs to,
    ``target_windows``, has a display window of the same size, they are those of that one's data window.
    """
    decoded = decode_image(path, wanted=LABEL_VALUES if has_labels else RAW_VALUES)
    turn, notices = decoded.orientation, decoded.notices
    if decoded.indices is not None:
        return StoredPixels(decoded.indices, None, 255.0, is_palette=True, orientation=turn, notices=notices)
    windows = decoded.windows
    there = windows.matched_to(target_windows)
    values = windows.move_pixels(decoded.pixels[..., 0] if decoded.pixels.shape[-1] == 1 else decoded.pixels, there)
    alpha = None if decoded.alpha is None else windows.move_pixels(decoded.alpha, there)
    return StoredPixels(values, alpha, decoded.scale, is_palette=False, orientation=turn, notices=notices)


@dataclass(frozen=True)
class GroundTruthAlpha:
    """A ground truth: ``alpha`` uint8 [H,W], and what is odd about its file."""

    alpha: ImageU8
    is_deep: bool
    """Whether the file has 16 bits or more, rounded to 8 here."""
    has_colour: bool
    """Whether channels differ, so that none of them is plainly the alpha."""


def read_ground_truth(path: Path, *, has_objects: bool = False) -> GroundTruthAlpha:
    """Read a ground truth as :func:`read_alpha` does, and say what is odd about it. Raises ImageError."""
    decoded = decode_image(path, wanted=RAW_VALUES)
    if has_objects and (objects := _objects(decoded)) is not None:
        return GroundTruthAlpha(objects, is_deep=False, has_colour=False)
    shown_as_stored = to_display_srgb(decoded.pixels, decoded.scale, SRGB, RAW_VALUES)
    picture = SourceImage(shown_as_stored, _alpha_u8(decoded), stored=decoded).to_display_window()
    alpha = _matte(picture)
    spread = alpha - picture.rgb.min(axis=-1)  # of the channels, where the alpha is their brightest
    has_colour = alpha is not picture.alpha and bool(spread.max() > GREY_TOLERANCE)
    return GroundTruthAlpha(alpha, decoded.bits > 8, has_colour)


def extra_frame_notices(what: str, path: Path) -> list[str]:
    """A sentence where a file of which one picture is taken, a "mask" or the like, holds several. Raises ImageError."""
    frames = frame_count(path)
    return [f"{what} {path} has {frames} frames or pages; the first one was taken"] if frames > 1 else []


def content_sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal. Raises ImageError."""
    with as_image_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _alpha_u8(decoded: DecodedImage) -> ImageU8 | None:
    if decoded.alpha is None or decoded.alpha.dtype == np.uint8:
        return decoded.alpha
    return round_to_u8(decoded.alpha.astype(np.float32) * np.float32(255.0 / decoded.scale))


def _objects(decoded: DecodedImage | None) -> ImageU8 | None:
    """Objects by their palette indices, all 255 of uint8 [H,W]; None of a file without a palette."""
    if decoded is None or decoded.indices is None:
        return None
    return np.where(decoded.indices > 0, 255, 0).astype(np.uint8)


def _matte(picture: SourceImage) -> ImageU8:
    if picture.alpha is not None and picture.alpha.min() != picture.alpha.max():
        return picture.alpha
    red, green, blue = (picture.rgb[..., channel] for channel in range(3))
    return np.maximum(np.maximum(red, green), blue)  # ten times as fast as max(axis=-1)


@dataclass(frozen=True)
class CompositeSource:
    """A foreground with its alpha on a background, as the test sets of the composition lineage are made; nothing is
    written to disk."""

    foreground: Path
    alpha: Path
    background: Path

    @property
    def files(self) -> tuple[Path, Path, Path]:
        return self.foreground, self.alpha, self.background

    def __str__(self) -> str:
        return f"{self.foreground} on {self.background.name}"

    def read(self) -> SourceImage:
        """alpha * foreground + (1 - alpha) * background, at the foreground's size.

        As the composition code published with Deep Image Matting: a background that is smaller is enlarged until
        it covers the foreground, then its upper left part is taken. Raises ImageError.
        """
        foreground, alpha = read_image(self.foreground).to_display_window().rgb, read_alpha(self.alpha)
        if foreground.shape[:2] != alpha.shape:
            raise ImageError(
                f"{self.foreground} is {foreground.shape[1]}x{foreground.shape[0]} and its alpha {self.alpha} "
                f"{alpha.shape[1]}x{alpha.shape[0]}; expected one size"
            )
        background = _covering(read_image(self.background).to_display_window().rgb, *alpha.shape)
        weight = alpha[..., None] / np.float32(255)
        return SourceImage(round_to_u8(np.asarray(foreground * weight + background * (1 - weight), np.float32)), None)


def read_source_image(
    source: Path | CompositeSource, colour: ColourSettings = DEFAULT_COLOUR, frame: int = 0
) -> SourceImage:
    """The picture of a file or a composite. Raises ImageError."""
    return source.read() if isinstance(source, CompositeSource) else read_image(source, colour, frame)


def _covering(background: ImageU8, height: int, width: int) -> ImageU8:
    ratio = max(height / background.shape[0], width / background.shape[1])
    if ratio > 1:
        size = math.ceil(background.shape[1] * ratio), math.ceil(background.shape[0] * ratio)
        background = np.asarray(cv2.resize(background, size, interpolation=cv2.INTER_CUBIC), np.uint8)
    return background[:height, :width]
