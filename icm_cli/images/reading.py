"""Read images, masks and ground truths upright, and compose foregrounds onto backgrounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from icm_cli.errors import ImageError
from icm_cli.geometry import ImageU8, format_size, round_to_u8
from icm_cli.images.colour import DEFAULT_COLOUR, SRGB, ColourSettings, to_display_srgb
from icm_cli.images.decoding import decode_image, frame_count, open_image
from icm_cli.images.image_file import ImageFile
from icm_cli.images.openimageio import NOT_FINITE
from icm_cli.images.pixels import GREY_TOLERANCE, DecodedImage, ImageWindows

RAW_VALUES = ColourSettings(space=SRGB, is_matte=True)
"""Settings for alphas: no colour profile and no transfer curve is applied."""
LABEL_VALUES = replace(RAW_VALUES, has_labels=True)
"""Settings for masks whose values are labels."""


@dataclass(frozen=True)
class SourceImage:
    """An upright image as the model sees it."""

    rgb: ImageU8
    """sRGB uint8 [H,W,3]."""
    alpha: ImageU8 | None
    """uint8 [H,W]; None if the file has no alpha."""
    space: str = SRGB
    """Colour space that the file was read as."""
    notices: tuple[str, ...] = ()
    """Messages about unusual properties of the file."""
    stored: DecodedImage | None = None
    """The pixels as the file stores them."""

    @property
    def windows(self) -> ImageWindows:
        height, width = self.rgb.shape[:2]
        return ImageWindows.full((height, width)) if self.stored is None else self.stored.windows

    def to_display_window(self, target_windows: ImageWindows | None = None) -> SourceImage:
        """Return the image in its display window, black outside its data window, without stored pixels.

        If ``target_windows`` of another image have a display window of this size, the result covers their data window.
        """
        target = self.windows.matched_to(target_windows)
        alpha = None if self.alpha is None else self.windows.move_pixels(self.alpha, target)
        return replace(self, rgb=self.windows.move_pixels(self.rgb, target), alpha=alpha, stored=None)


def read_image(source: Path | ImageFile, colour: ColourSettings = DEFAULT_COLOUR, frame: int = 0) -> SourceImage:
    """Read an image as the model sees it: upright, display-referred sRGB.

    ``colour``: the colour space of the file, and the view of scene-referred images. ``frame``: the frame or page of a
    file with several. Raises ImageError for a file that is missing, empty, incomplete or not an image.
    """
    with open_image(source) as file:
        decoded = decode_image(file, frame, colour)
        rgb = to_display_srgb(decoded.pixels, decoded.scale, decoded.space, colour)
    return SourceImage(rgb, _alpha_u8(decoded), decoded.space, decoded.notices, decoded)


def read_alpha(
    source: Path | ImageFile, *, is_label_map: bool = False, target_windows: ImageWindows | None = None
) -> ImageU8:
    """Read a mask or an alpha, uint8 [H,W]: the file's alpha channel if that varies, else its brightest channel.

    The alpha of an EXR covers its display window and is 0 outside its data window. ``target_windows`` is explained at
    :func:`read_stored_pixels`. ``is_label_map``: all objects of a palette become 255. Raises ImageError.
    """
    return read_ground_truth(source, is_label_map=is_label_map, target_windows=target_windows).alpha


def read_stored_pixels(
    path: Path, target_windows: ImageWindows | None = None, *, has_labels: bool = False
) -> DecodedImage:
    """Read the values that an image file stores, with its EXIF orientation applied.

    The pixels of an EXR cover its display window, and are 0 outside its data window. ``target_windows``: windows of the
    image that a mask or alpha belongs to. If their display window has the same size, the result covers their data
    window. ``has_labels``: the values are labels and may be any numbers. Raises ImageError.
    """
    decoded = decode_image(path, wanted=LABEL_VALUES if has_labels else RAW_VALUES)
    decoded = decoded.move_to(decoded.windows.matched_to(target_windows))
    if decoded.file_white is None:
        return decoded
    factor = decoded.file_white / decoded.scale  # the decoder has scaled the values of the file
    pixels = np.round(decoded.pixels * factor).astype(decoded.pixels.dtype)
    alpha = None if decoded.alpha is None else decoded.alpha * factor
    return replace(decoded, pixels=pixels, alpha=alpha, scale=float(decoded.file_white), file_white=None)


@dataclass(frozen=True)
class GroundTruthAlpha:
    """A ground-truth alpha."""

    alpha: ImageU8
    """uint8 [H,W]."""
    is_deep: bool
    """Whether the file has 16 bits or more, which are rounded to 8 here."""
    has_colour: bool
    """Whether the channels differ, so that it is not clear which one is the alpha."""


def read_ground_truth(
    source: Path | ImageFile, *, is_label_map: bool = False, target_windows: ImageWindows | None = None
) -> GroundTruthAlpha:
    """Read a ground truth as :func:`read_alpha` does, with its unusual properties.

    Raises ImageError, also for values that are not finite.
    """
    image = read_image(source, RAW_VALUES)
    assert image.stored is not None
    if any(NOT_FINITE in notice for notice in image.notices):
        raise ImageError(f"{source} has {NOT_FINITE}; expected an alpha with values of 0..1; write it again")
    if is_label_map and (objects := _object_mask(image.stored)) is not None:
        return GroundTruthAlpha(objects, is_deep=False, has_colour=False)
    bits, image = image.stored.bits, image.to_display_window(target_windows)
    if image.alpha is not None and image.alpha.min() != image.alpha.max():
        return GroundTruthAlpha(image.alpha, bits > 8, has_colour=False)
    red, green, blue = (image.rgb[..., channel] for channel in range(3))
    alpha = np.maximum(np.maximum(red, green), blue)  # ten times as fast as max(axis=-1)
    spread = alpha - np.minimum(np.minimum(red, green), blue)
    return GroundTruthAlpha(alpha, bits > 8, bool(spread.max() > GREY_TOLERANCE))


def extra_frame_notices(what: str, path: Path) -> list[str]:
    """Return a notice if a file has several images, of which only the first is used; else [].

    ``what``: what the file is used as, such as "mask". Raises ImageError.
    """
    frames = frame_count(path)
    return [f"{what} {path} has {frames} frames or pages; the first one is used"] if frames > 1 else []


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content as hexadecimal digits. Raises ImageError."""
    with open_image(path) as file:
        return file.content_digest()


def _alpha_u8(decoded: DecodedImage) -> ImageU8 | None:
    if decoded.alpha is None or decoded.alpha.dtype == np.uint8:
        return decoded.alpha
    return round_to_u8(decoded.alpha.astype(np.float32) * np.float32(255.0 / decoded.scale))


def _object_mask(decoded: DecodedImage) -> ImageU8 | None:
    """Return 255 at the objects of a palette image and 0 elsewhere, uint8 [H,W]; None without a palette.

    In a palette of greys, everything but black is an object. In other palettes, every index but 0 is an object.
    """
    if decoded.indices is None:
        return None
    is_object = (decoded.pixels[..., 0] if decoded.has_grey_palette else decoded.indices) > 0
    return np.where(is_object if decoded.alpha is None else is_object & (decoded.alpha > 0), 255, 0).astype(np.uint8)


@dataclass(frozen=True)
class CompositeSource:
    """A foreground, its alpha and a background, from which an image is composed in memory.

    The test sets of the composition variant are made in this way.
    """

    foreground: Path
    alpha: Path
    background: Path

    @property
    def files(self) -> tuple[Path, Path, Path]:
        return self.foreground, self.alpha, self.background

    def __str__(self) -> str:
        return f"{self.foreground} on {self.background.name}"


def compose_image(
    foreground_file: Path | ImageFile, alpha_file: Path | ImageFile, background_file: Path | ImageFile
) -> SourceImage:
    """Return alpha * foreground + (1 - alpha) * background at the size of the foreground.

    This follows the composition code published with Deep Image Matting: a smaller background is enlarged until it
    covers the foreground, then its upper left part is used. Raises ImageError.
    """
    foreground, alpha = read_image(foreground_file).to_display_window().rgb, read_alpha(alpha_file)
    if foreground.shape[:2] != alpha.shape:
        raise ImageError(
            f"{foreground_file} is {format_size(foreground.shape)} and its alpha {alpha_file} is "
            f"{format_size(alpha.shape)}; expected the same size; give the alpha of this foreground"
        )
    background = _enlarge_to_cover(read_image(background_file).to_display_window().rgb, *alpha.shape)
    weight = alpha[..., None] / np.float32(255)
    return SourceImage(round_to_u8(np.asarray(foreground * weight + background * (1 - weight), np.float32)), None)


def read_source_image(
    source: Path | CompositeSource, colour: ColourSettings = DEFAULT_COLOUR, frame: int = 0
) -> SourceImage:
    """Read the image of a file, or compose it. Raises ImageError."""
    return compose_image(*source.files) if isinstance(source, CompositeSource) else read_image(source, colour, frame)


def _enlarge_to_cover(background: ImageU8, height: int, width: int) -> ImageU8:
    """Enlarge a background so that it covers height x width, and cut out its upper left part."""
    ratio = max(height / background.shape[0], width / background.shape[1])
    if ratio > 1:
        size = math.ceil(background.shape[1] * ratio), math.ceil(background.shape[0] * ratio)
        background = np.asarray(cv2.resize(background, size, interpolation=cv2.INTER_CUBIC), np.uint8)
    return background[:height, :width]
