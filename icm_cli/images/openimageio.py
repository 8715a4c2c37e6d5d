"""Read pixels with OpenImageIO: select the layer of an EXR, keep its windows, and check values."""

from __future__ import annotations

import contextlib
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from icm_cli.errors import ImageError
from icm_cli.geometry import scale_to_u8
from icm_cli.images import colour, containers
from icm_cli.images.image_file import FileType, ImageFile
from icm_cli.images.pixels import (
    BAD_PROFILE,
    DecodedImage,
    ImageWindows,
    check_memory,
    upright_size,
    valid_orientation,
)

NOT_FINITE = "pixels that are NaN or infinite"
MAX_DISPLAY_VALUE = 1.5
"""If a float image that is not scene-linear has larger values, its scale is not 0..1 but perhaps 0..255."""
MAX_12_BIT = 4095
_INTEGER_TYPES = ("uint8", "uint16", "uint", "int8", "int16", "int")
_INTEGER_WHITE = {"uint": 2.0**32 - 1, "int": 2.0**31 - 1, "int16": 2.0**15 - 1, "int8": 2.0**7 - 1}
"""Integer type of OpenImageIO -> the value that it converts to 1.0."""
_SCENE_LINEAR_FORMATS = frozenset({"openexr", "hdr"})
_WITHOUT_STRAIGHT_ALPHA = frozenset({"openexr", "hdr", "cineon", "pnm"})
DPX_DESCRIPTOR_OFFSET, DPX_RGB = 800, bytes([50])
"""Offset of the byte that states which channels a DPX has, and its value for RGB."""
MIN_IS_WHITE = 0
"""TIFF's photometric interpretation of a negative."""

DEFAULT_LAYER = "RGB"
"""Name that selects the channels R, G and B without a prefix."""
DATA_NAMES = re.compile(
    r"z|z_?back|.*depth.*|(object|obj|material|mat|asset|instance|prim|render|user|mesh|node)?_?ids?|index(ob|ma)|.*crypto.*",
    re.IGNORECASE,
)
"""Names of layers, parts or channels that hold depth, ids or cryptomattes, which are not images."""
BEAUTY_NAMES = frozenset({"beauty", "combined", "rgb", "rgba"})
"""Names of layers, or of their last parts, that hold the whole image and not a component of it."""


class SharedSettings:
    """Context with changed global settings. They are restored when the last thread leaves the context."""

    def __init__(self, change: Callable[[contextlib.ExitStack], None]) -> None:
        """``change`` changes the settings, and registers callbacks that restore them."""
        self._change = change
        self._restorers = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._threads = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._threads += 1
            if self._threads == 1:
                self._change(self._restorers)
        try:
            yield
        finally:
            with self._lock:
                self._threads -= 1
                if not self._threads:
                    self._restorers.close()


def import_library() -> Any:
    """Return the module ``OpenImageIO``. It takes 30 MB, so it is imported when the first file needs it."""
    import OpenImageIO

    return OpenImageIO


def _use_one_thread(restorers: contextlib.ExitStack) -> None:
    """Let OpenImageIO use one thread: icm reads several files at once in threads of its own."""
    oiio = import_library()
    restorers.callback(oiio.attribute, "threads", oiio.get_int_attribute("threads"))
    oiio.attribute("threads", 1)


one_thread = SharedSettings(_use_one_thread)
"""Context in which OpenImageIO uses one thread."""


@contextlib.contextmanager
def open_reader(file: ImageFile, *, must_open: bool = True) -> Iterator[Any]:
    """Open a file so that its colours are read as they are stored, not multiplied by its alpha.

    If that fails: raise UnidentifiedImageError, or yield None if not ``must_open``.
    """
    oiio = import_library()
    with one_thread():
        if _may_have_straight_alpha(file):
            settings = oiio.ImageSpec()
            settings.attribute("oiio:UnassociatedAlpha", 1)
            reader = oiio.ImageInput.open(str(file.path), settings)
        else:
            reader = oiio.ImageInput.open(str(file.path))  # faster: with settings, OpenImageIO opens a file twice
        if reader is None:
            reason = oiio.geterror()  # also clears the error
            if must_open:
                raise UnidentifiedImageError(reason)
            yield None
            return
        try:
            yield reader
        finally:
            reader.close()


def _may_have_straight_alpha(file: ImageFile) -> bool:
    """Return whether a file may have an alpha that OpenImageIO would multiply with the colours."""
    if file.type.name == "png":
        return containers.has_png_alpha(file)
    if file.type.name == "tiff":
        return containers.has_tiff_extra_samples(file)
    if file.type.name == "jpeg2000":
        return containers.may_have_jpeg2000_alpha(file.head)
    if file.type.name == "dpx":
        return file.head[DPX_DESCRIPTOR_OFFSET : DPX_DESCRIPTOR_OFFSET + 1] != DPX_RGB
    return file.type.name not in _WITHOUT_STRAIGHT_ALPHA


def is_plain_8_bit(spec: Any) -> bool:
    """Return whether a file has 8 bits per channel and no associated alpha.

    Pillow would divide the colours by an associated alpha.
    """
    is_associated = spec.alpha_channel >= 0 and not spec.getattribute("oiio:UnassociatedAlpha")
    return str(spec.format) == "uint8" and not is_associated


def read_windows(reader: Any, file: ImageFile, frame: int) -> ImageWindows:
    """Return the windows of an image; see :func:`~icm_cli.images.decoding.image_windows`. Raises ImageError."""
    layer, _ = _find_layer(reader, file, frame, "")
    reader.seek_subimage(layer.part, 0)
    spec = reader.spec()
    return _image_windows(spec, file.type, _orientation(spec))


def read_header(reader: Any, file: ImageFile) -> Any:
    """Return a copy of the specification of the current image.

    Only an EXR has windows. The offset of a TIFF or DPX, such as that of a scanned page, is set to 0.
    """
    spec = import_library().ImageSpec(reader.spec())
    if file.type.name != "openexr":
        spec.x = spec.y = spec.full_x = spec.full_y = 0
        spec.full_width, spec.full_height = spec.width, spec.height
    return spec


def read_pixels(reader: Any, file: ImageFile, frame: int, settings: colour.ColourSettings) -> DecodedImage:
    """Decode one part or page and apply its EXIF orientation. Raises ImageError, or an exception of OpenImageIO."""
    path = file.path
    layer, notices = _find_layer(reader, file, frame, settings.layer, refuse_data=not settings.is_matte)
    reader.seek_subimage(layer.part, 0)
    spec = read_header(reader, file)
    orientation = _orientation(spec)
    windows = _image_windows(spec, file.type, orientation)
    read_type = _read_type(spec, settings)
    # "float" has 4 bytes in OpenImageIO, and 8 in NumPy.
    sample_bytes = 4 if read_type == "float" else np.dtype(read_type).itemsize
    height, width = max(windows.size, windows.display, key=math.prod)
    check_memory(path, width, height, sample_bytes)
    pixels, alpha = _read_channels(reader, layer, read_type)
    dtype = pixels.dtype
    scale = _white_value(spec, dtype, settings.white)
    if _integer_attribute(spec, "tiff:PhotometricInterpretation", -1) == MIN_IS_WHITE:
        pixels = np.asarray(np.maximum(scale - pixels, 0), dtype)
    if dtype == np.float32 and not (np.isfinite(pixels).all() and (alpha is None or np.isfinite(alpha).all())):
        notices.append(f"{path} has {NOT_FINITE}; they are set to 0")
        pixels = np.nan_to_num(pixels, nan=0.0, posinf=0.0, neginf=0.0)
        alpha = None if alpha is None else np.nan_to_num(alpha, nan=0.0, posinf=0.0, neginf=0.0)
    space, profile, space_notices = _space_and_profile(spec, file, settings)
    notices += [*space_notices, *_check_range(path, pixels, scale, space, settings)]
    channel_formats = spec.channelformats or [spec.format] * spec.nchannels  # empty if all are equal
    decoded = DecodedImage(
        pixels,
        alpha,
        scale,
        space,
        tuple(notices),
        bits=8 * dtype.itemsize,
        file_white=_file_white(spec, file, dtype),
        header=spec,
        is_half=all(str(channel_formats[channel]) == "half" for channel in layer.colours),
        own_windows=windows,
    )
    if profile is not None:
        decoded = _convert_by_profile(decoded, profile, path)
    return decoded.reorient(orientation)


def _read_channels(reader: Any, layer: ImageLayer, read_type: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Return the colours [H,W,3] or the grey [H,W,1] of a layer, and its alpha [H,W]; None without one."""
    first, end = layer.channel_range
    values = reader.read_image(layer.part, 0, first, end, read_type)
    if values is None or reader.has_error:
        raise ValueError(reader.geterror() or "no pixels")
    alpha = None if layer.alpha is None else values[..., layer.alpha - first]
    indices = [channel - first for channel in layer.colours]
    if indices == list(range(indices[0], indices[-1] + 1)):
        return values[..., indices[0] : indices[-1] + 1], alpha  # a slice is not copied
    return values[..., indices], alpha


def _convert_by_profile(image: DecodedImage, profile: bytes, path: Path) -> DecodedImage:
    """Convert an image from its ICC profile to sRGB in 8 bits. If the profile cannot be used, add a notice."""
    pixels_u8 = scale_to_u8(image.pixels, image.scale)
    converted = colour.to_srgb(Image.fromarray(pixels_u8 if pixels_u8.shape[-1] == 3 else pixels_u8[..., 0]), profile)
    if converted is None:
        return replace(image, notices=(*image.notices, f"{path}: {BAD_PROFILE}"))
    alpha = None if image.alpha is None else scale_to_u8(image.alpha, image.scale)
    return replace(image, pixels=np.asarray(converted), alpha=alpha, scale=255.0, space=colour.SRGB)


def _image_windows(spec: Any, file_type: FileType, orientation: int) -> ImageWindows:
    """Return the windows of an upright EXR. Other formats, and a file with an EXIF orientation, have only a size."""
    if file_type.name == "openexr" and orientation == 1:
        return ImageWindows.from_spec(spec)
    return ImageWindows.full(upright_size((spec.width, spec.height), orientation))


def _find_layer(
    reader: Any, file: ImageFile, frame: int, wanted: str, *, refuse_data: bool = False
) -> tuple[ImageLayer, list[str]]:
    """Return the channels to read, and notices. Only EXR has layers; other files have frames. Raises ImageError."""
    if file.type.name == "openexr":
        return select_layer(reader, file.path, wanted, refuse_data=refuse_data)
    if not reader.seek_subimage(frame, 0):
        raise ImageError(f"{file.path} has no frame {frame + 1}")
    names = [name.upper() for name in reader.spec().channelnames]
    has_colours = {"R", "G", "B"} <= set(names)
    colours = (names.index("R"), names.index("G"), names.index("B")) if has_colours else (0,)
    return ImageLayer(frame, colours, names.index("A") if "A" in names else None), []


def _read_type(spec: Any, settings: colour.ColourSettings) -> str:
    """Return the type to read: uint8 and uint16 unchanged, all others as float.

    Masks are read as the integers that they store, because a float cannot hold every label.
    """
    stored_type = str(spec.format)
    unchanged_types = _INTEGER_TYPES if settings.is_matte else ("uint8", "uint16")
    return stored_type if stored_type in unchanged_types else "float"


def _integer_attribute(spec: Any, name: str, default: int) -> int:
    """Return an integer attribute of a specification; ``default`` if it is missing or of another type."""
    value = spec.getattribute(name)
    return int(value) if isinstance(value, int) else default


def _orientation(spec: Any) -> int:
    """Return the EXIF orientation in a specification; 1 (upright) if there is no valid one."""
    return valid_orientation(_integer_attribute(spec, "Orientation", 1))


def _white_value(spec: Any, dtype: Any, white: float | None) -> float:
    """Return the value of white, or opaque, on the scale of the pixels that are read.

    ``dtype``: type of the pixels that are read. ``white``: value of white in the file, if the user gives it.
    """
    if dtype == np.uint8:
        return 255.0
    if dtype.kind in "iu":
        return white or float(np.iinfo(dtype).max)
    stored_value_of_one = _INTEGER_WHITE.get(str(spec.format), 1.0)  # OpenImageIO has divided by it
    return (white or stored_value_of_one) / stored_value_of_one


def _file_white(spec: Any, file: ImageFile, dtype: Any) -> int | None:
    """Return the value of white in the file, such as 4095 for 12 bits, if OpenImageIO has scaled it; None otherwise.

    OpenImageIO scales it to the maximum of the type, such as 65535.
    """
    if file.type.name == "pnm":
        return containers.file_white(file)
    bits = _integer_attribute(spec, "oiio:BitsPerSample", 0)
    return 2**bits - 1 if dtype.kind == "u" and 0 < bits < 8 * dtype.itemsize else None


def _check_range(
    path: Path, pixels: NDArray[Any], scale: float, space: str, settings: colour.ColourSettings
) -> list[str]:
    """Return notices about the values of an image with more than 8 bits.

    Raises ImageError for a float image in sRGB whose values are not in 0..1 but perhaps in 0..255.
    """
    if settings.has_labels:
        return []
    largest = pixels.max()
    if pixels.dtype == np.float32 and space == colour.SRGB and largest > MAX_DISPLAY_VALUE * scale:
        remedy = "give the value of white, as in --white 255, or its colour space with --colorspace"
        if settings.is_matte:
            remedy = "save it with 1 for the object or with 8 bits, or give the object's value with --mask-label"
        raise ImageError(f"{path} has values up to {largest:.6g}; expected 0..{scale:g}; {remedy}")
    has_default_white = settings.white is None and not settings.is_matte
    if pixels.dtype == np.uint16 and has_default_white and 255 < largest <= MAX_12_BIT:
        return [
            f"{path} has 16 bits and no value above {largest}, so it is dark; if it has 12 bits, "
            f"give --white {MAX_12_BIT}"
        ]
    return []


def _space_and_profile(
    spec: Any, file: ImageFile, settings: colour.ColourSettings
) -> tuple[str, bytes | None, list[str]]:
    """Return the colour space, the ICC profile to convert the colours from, if any, and notices."""
    if settings.space != "auto":
        return settings.space, None, []
    profile = spec.getattribute("ICCProfile")
    space, notice = _file_colour_space(spec, file.type, settings.config)
    notices = [f"{file.path} has {notice}"] if notice and profile is None else []
    # In a PNG, a label of another space than sRGB takes precedence over the profile.
    is_used = profile is not None and (file.type.name != "png" or space == colour.SRGB)
    return space, bytes(profile) if is_used else None, notices


def _file_colour_space(spec: Any, file_type: FileType, config: str) -> tuple[str, str]:
    """Return the colour space by the labels of a file, else by its format, and the end of a notice; "" for none.

    The labels are tried in order of precedence: code points (CICP), names of a space, chromaticities.
    """
    codes = spec.getattribute("CICP")
    if codes is not None:
        stated_space, notice = colour.CodePoints(codes[0], codes[1], bool(codes[3])).find_space(config)
        return stated_space or colour.SRGB, notice
    for attribute in ("colorInteropID", "oiio:ColorSpace"):
        label = spec.getattribute(attribute)
        if label in ("srgb_rec709_scene", "srgb_rec709_display"):
            return colour.SRGB, ""
        if space := colour.find_colour_space(label, config):
            return space, ""
    chromaticities = spec.getattribute("chromaticities")
    if chromaticities is not None and (space := colour.space_of_primaries(tuple(chromaticities))):
        return colour.find_colour_space(space, config) or space, ""
    if file_type.name in _SCENE_LINEAR_FORMATS:
        return colour.LINEAR, ""
    gamma = spec.getattribute("oiio:Gamma")  # of a labelled gamma space such as g20_rec709_scene
    if isinstance(gamma, float) and gamma:
        return colour.SRGB, f"a gamma of {gamma:.4g}, which matches no known colour space; it is read as sRGB"
    return colour.SRGB, ""


Parts: TypeAlias = list[tuple[int, tuple[str, ...]]]
"""Index and channel names of every part of an EXR that is not deep."""


@dataclass(frozen=True)
class ImageLayer:
    """The channels to read from one part: three colours or one grey, and perhaps an alpha."""

    part: int
    colours: tuple[int, ...]
    """Indices of the colour channels."""
    alpha: int | None
    """Index of the alpha channel."""
    prefix: str = ""
    """Channel name before the last dot, such as "beauty" in beauty.R."""
    part_name: str = ""

    @property
    def name(self) -> str:
        return self.prefix or self.part_name or DEFAULT_LAYER

    def has_name(self, wanted: str) -> bool:
        """Return whether ``wanted`` is its prefix or the name of its part; RGB selects a layer without a prefix."""
        is_default = not self.prefix and wanted.upper() == DEFAULT_LAYER
        return is_default or wanted in (self.prefix, self.part_name)

    @property
    def is_data(self) -> bool:
        """Whether the layer holds depth, ids or a cryptomatte, by its name."""
        return _is_data(self.prefix or self.part_name)

    @property
    def channel_range(self) -> tuple[int, int]:
        """Start and end of the range of channels to read; the end is excluded."""
        channels = self.colours if self.alpha is None else (*self.colours, self.alpha)
        return min(channels), max(channels) + 1


def select_layer(reader: Any, path: Path, wanted: str, *, refuse_data: bool = False) -> tuple[ImageLayer, list[str]]:
    """Return the layer of an open EXR to read, and a notice if the choice was not obvious.

    ``wanted``: the name of a part or a channel prefix. "" selects the first R, G, B without a prefix, else a layer
    named beauty or similar, else the first layer. ``refuse_data``: refuse a file that holds only depth, ids or
    cryptomattes; a mask may hold ids. Raises ImageError if there is no such layer.
    """
    layers, parts = _colour_layers(reader)
    if wanted:
        named = next((layer for layer in layers if layer.has_name(wanted)), None)
        if named is None:
            raise ImageError(
                f"{path} has no layer {wanted!r} with R, G and B; expected one of: "
                f"{_list_names(layers) or 'none'}; give one with --layer"
            )
        return named, []
    has_only_data = all(layer.is_data for layer in layers) if layers else _hold_only_data(parts)
    if refuse_data and has_only_data:
        raise _data_error(parts, path)
    if not layers:
        return _grey_layer(parts, path), []
    candidates = layers if has_only_data else [layer for layer in layers if not layer.is_data]
    without_prefix = [layer for layer in candidates if not layer.prefix]
    if without_prefix or len(candidates) == 1:
        return (without_prefix or candidates)[0], []
    beauties = [layer for layer in candidates if layer.prefix.rpartition(".")[2].lower() in BEAUTY_NAMES]
    chosen = (beauties or candidates)[0]
    notice = f"{path} has the layers {_list_names(layers)}; {chosen.name} is used; give --layer to use another one"
    return chosen, [notice]


def _list_names(layers: Sequence[ImageLayer]) -> str:
    return ", ".join(dict.fromkeys(layer.name for layer in layers))


def _is_data(name: str) -> bool:
    """Return whether any word of a dotted name means depth, ids or a cryptomatte."""
    return any(DATA_NAMES.fullmatch(word) for word in name.split("."))


def _channels_of(parts: Parts) -> list[str]:
    """Return the channel names of all parts."""
    return [channel for _, channels in parts for channel in channels]


def _hold_only_data(parts: Parts) -> bool:
    """Return whether all channels of all parts hold depth, ids or cryptomattes."""
    channels = _channels_of(parts)
    return bool(channels) and all(_is_data(channel) for channel in channels)


def _data_error(parts: Parts, path: Path) -> ImageError:
    return ImageError(
        f"{path} has only depth, ids or cryptomattes ({', '.join(_channels_of(parts))}); expected colours; give an "
        "image with R, G, B"
    )


def _colour_layers(reader: Any) -> tuple[list[ImageLayer], Parts]:
    """Return the colour layers in file order, and the channels of every part."""
    layers, parts = [], []
    part = 0
    while reader.seek_subimage(part, 0):
        spec = reader.spec()
        if not spec.deep:  # a deep part has any number of values per pixel, and must be flattened first
            layers += _layers_of_part(part, str(spec.getattribute("oiio:subimagename") or ""), spec.channelnames)
            parts.append((part, tuple(spec.channelnames)))
        part += 1
    reader.geterror()  # clears the error of the last seek
    return layers, parts


def _layers_of_part(part: int, part_name: str, channels: tuple[str, ...]) -> list[ImageLayer]:
    """Return the layers of a part that have R, G and B, by the prefixes of its channels."""
    by_prefix: dict[str, dict[str, int]] = {}
    for number, channel in enumerate(channels):
        prefix, _, name = channel.rpartition(".")
        by_prefix.setdefault(prefix, {})[name.upper()] = number
    return [
        ImageLayer(part, (names["R"], names["G"], names["B"]), names.get("A"), prefix, part_name)
        for prefix, names in by_prefix.items()
        if names.keys() >= {"R", "G", "B"}
    ]


def _grey_layer(parts: Parts, path: Path) -> ImageLayer:
    """Return the single channel, the luminance or the alpha of a file without colours. Raises ImageError.

    ``parts``: those with flat pixels. Parts with only data, such as depth or normals, are tried last.
    """
    if not parts:
        raise ImageError(f"{path} has only deep pixels; expected flat ones; flatten it")
    parts_with_data_last = sorted(parts, key=lambda part: _hold_only_data([part]))
    for part, channels in parts_with_data_last:
        names = [channel.upper() for channel in channels]
        if len(names) == 1:
            return ImageLayer(part, (0,), None)
        if "Y" in names and "X" not in names:  # with an X, the Y is that of a vector
            return ImageLayer(part, (names.index("Y"),), names.index("A") if "A" in names else None)
        if "A" in names:
            return ImageLayer(part, (names.index("A"),), None)
    if _hold_only_data(parts):
        raise _data_error(parts, path)
    listed = ", ".join(_channels_of(parts))
    raise ImageError(f"{path} has no channels R, G and B; it has only {listed}; give an image with R, G and B")
