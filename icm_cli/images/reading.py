"""Read images, masks and ground truths upright, and compose foregrounds onto backgrounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from icm_cli.errors import ImageError
from icm_cli.geometry import ImageU8, format_size, round_to_u8, scale_to_u8
from icm_cli.images.areas import has_colour, is_photograph, maximum_of_channels, pack_colours
from icm_cli.images.colour import DEFAULT_COLOUR, SRGB, ColourSettings, to_display_srgb
from icm_cli.images.containers import is_grey_png
from icm_cli.images.decoding import decode_image, frame_count, open_image
from icm_cli.images.image_file import ImageFile
from icm_cli.images.openimageio import NOT_FINITE
from icm_cli.images.pixels import DecodedImage, ImageWindows

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
        """Windows of ``rgb`` and ``alpha``; without stored pixels, they fill their display window."""
        height, width = self.rgb.shape[:2]
        return ImageWindows.full((height, width)) if self.stored is None else self.stored.windows

    def to_display_window(self, target_windows: ImageWindows | None = None) -> SourceImage:
        """Return the image in its display window, black outside its data window, without stored pixels.

        If ``target_windows`` of another image have a display window of this size, the result covers their data window.
        """
        target = self.windows.choose_target(target_windows)
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
    decoded = decode_image(path, settings=LABEL_VALUES if has_labels else RAW_VALUES)
    decoded = decoded.move_to(decoded.windows.choose_target(target_windows))
    if decoded.file_white is None:
        return decoded
    # The decoder has scaled the values of the file, such as those of 4 bits to 0..255.
    factor = decoded.file_white / decoded.scale
    pixels = np.round(decoded.pixels * factor).astype(decoded.pixels.dtype)
    alpha = None if decoded.alpha is None else decoded.alpha * factor
    return replace(decoded, pixels=pixels, alpha=alpha, scale=float(decoded.file_white), file_white=None)


HAS_COLOUR = "has colour; expected an alpha with a single grey channel"
"""Description of an alpha with :attr:`GroundTruthAlpha.has_colour`, for messages."""


@dataclass(frozen=True)
class GroundTruthAlpha:
    """A ground-truth alpha."""

    alpha: ImageU8
    """uint8 [H,W]."""
    has_16_bits: bool
    """Whether the file has 16 bits or more, which are rounded to 8 here."""
    has_colour: bool
    """Whether the channels differ, so that it is not clear which one is the alpha."""
    is_photograph: bool = False
    """Whether it has so many colours that it is a photograph, and not a mask in the colours of a palette."""


def read_ground_truth(
    source: Path | ImageFile, *, is_label_map: bool = False, target_windows: ImageWindows | None = None
) -> GroundTruthAlpha:
    """Read a ground truth as :func:`read_alpha` does, and return its unusual properties with it.

    Raises ImageError, also for values that are not finite.
    """
    image = read_image(source, RAW_VALUES)
    assert image.stored is not None
    if any(NOT_FINITE in notice for notice in image.notices):
        raise ImageError(f"{source} has {NOT_FINITE}; expected an alpha with values of 0..1; write it again")
    if is_label_map and image.stored.indices is not None:
        return GroundTruthAlpha(_object_mask(image.stored), has_16_bits=False, has_colour=False)
    has_16_bits = image.stored.bits > 8
    image = image.to_display_window(target_windows)
    if image.alpha is not None and image.alpha.min() != image.alpha.max():
        return GroundTruthAlpha(image.alpha, has_16_bits, has_colour=False)
    is_coloured = has_colour(image.rgb, 255)
    shows_photograph = is_coloured and is_photograph(pack_colours(image.rgb, 255))
    return GroundTruthAlpha(maximum_of_channels(image.rgb), has_16_bits, is_coloured, shows_photograph)


def is_coloured_file(path: Path, *, is_label_map: bool = False) -> bool:
    """Return :attr:`GroundTruthAlpha.has_colour` of a file. Of a grey PNG, no pixels are read. Raises ImageError."""
    with open_image(path) as file:
        return not is_grey_png(file.head) and read_ground_truth(file, is_label_map=is_label_map).has_colour


def extra_frame_notices(role: str, path: Path) -> list[str]:
    """Return a notice if a file has several images, of which only the first is used; else [].

    ``role``: what the file is used as, such as "mask". Raises ImageError.
    """
    frames = frame_count(path)
    return [f"{role} {path} has {frames} frames or pages; the first one is used"] if frames > 1 else []


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content as hexadecimal digits. Raises ImageError."""
    with open_image(path) as file:
        return file.content_digest()


def _alpha_u8(decoded: DecodedImage) -> ImageU8 | None:
    if decoded.alpha is None or decoded.alpha.dtype == np.uint8:
        return decoded.alpha
    return scale_to_u8(decoded.alpha, decoded.scale)


def _object_mask(decoded: DecodedImage) -> ImageU8:
    """Return 255 at the objects of an image with a palette and 0 elsewhere, uint8 [H,W].

    In a palette of greys, everything but black is an object. In other palettes, every index but 0 is an object.
    Transparent pixels are never objects.
    """
    labels = decoded.pixels[..., 0] if decoded.has_grey_palette else decoded.indices
    is_object = np.asarray(labels) > 0
    if decoded.alpha is not None:
        is_object &= decoded.alpha > 0
    return np.where(is_object, 255, 0).astype(np.uint8)


@dataclass(frozen=True)
class CompositeSource:
    """A foreground, its alpha and a background, from which an image is composed in memory.

    The test images of datasets of foregrounds, such as Composition-1k, are made in this way.
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
    foreground = read_image(foreground_file).to_display_window().rgb
    alpha = read_alpha(alpha_file)
    if foreground.shape[:2] != alpha.shape:
        raise ImageError(
            f"{foreground_file} is {format_size(foreground.shape)} and its alpha {alpha_file} is "
            f"{format_size(alpha.shape)}; expected the same size; give the alpha of this foreground"
        )
    height, width = alpha.shape
    background = _enlarge_to_cover(read_image(background_file).to_display_window().rgb, height, width)
    weight = alpha[..., None] / np.float32(255)
    composite = np.asarray(foreground * weight + background * (1 - weight), np.float32)
    return SourceImage(round_to_u8(composite), alpha=None)


def read_source_image(
    source: Path | CompositeSource, colour: ColourSettings = DEFAULT_COLOUR, frame: int = 0
) -> SourceImage:
    """Read the image of a file, or compose a composite. Raises ImageError.

    ``colour`` and ``frame`` apply only to a file.
    """
    if isinstance(source, CompositeSource):
        return compose_image(source.foreground, source.alpha, source.background)
    return read_image(source, colour, frame)


def _enlarge_to_cover(background: ImageU8, height: int, width: int) -> ImageU8:
    """Enlarge a smaller background so that it covers height x width, and return its upper left part of this size."""
    own_height, own_width = background.shape[:2]
    ratio = max(height / own_height, width / own_width)
    if ratio > 1:
        enlarged_size = math.ceil(own_width * ratio), math.ceil(own_height * ratio)
        background = np.asarray(cv2.resize(background, enlarged_size, interpolation=cv2.INTER_CUBIC), np.uint8)
    return background[:height, :width]
