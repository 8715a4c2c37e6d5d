"""Writes alphas, foregrounds and trimaps that say what decided them, and reads that again."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import OpenImageIO as oiio
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from icm_cli.errors import UsageError
from icm_cli.files import atomic_write
from icm_cli.geometry import Float, round_to_u8
from icm_cli.images.colour import colour_space_attributes, to_scene_linear
from icm_cli.images.decoding import DECODE_ERRORS
from icm_cli.images.image_file import OWN_MARK
from icm_cli.images.pixels import DecodedImage
from icm_cli.options import BitDepth, ForegroundMode, ImageFormat, TrimapMode

DEPTHS: Mapping[ImageFormat, tuple[BitDepth, ...]] = {
    "png": ("8", "16"),
    "tiff": ("8", "16", "float"),
    "exr": ("half", "float"),
}
"""Depths of each format, the default first."""
FORMAT_SUFFIXES: Mapping[ImageFormat, tuple[str, ...]] = {"png": (".png",), "tiff": (".tif", ".tiff"), "exr": (".exr",)}
"""Endings of names that say each format, the one that is written first."""
PNG_COMPRESSION = 1
"""zlib level: an alpha is mostly flat, and higher levels cost far more time than they save space."""
STAMP_KEY = "ImageDescription"
"""Attribute of a TIFF or EXR that holds the stamp, as JSON."""
NO_LABEL: Mapping[str, Any] = {}
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_OIIO_TYPES: Mapping[BitDepth, str] = {"8": "uint8", "16": "uint16", "half": "half", "float": "float"}


@dataclass(frozen=True)
class OutputFormat:
    """The form of what is written for each image."""

    format: ImageFormat = "png"
    depth: BitDepth | None = None
    """None: the format's usual one for an alpha, the source's for a foreground."""
    channel: str = "A"
    """Name of an EXR's alpha channel."""
    foreground: ForegroundMode = "none"
    invert: bool = False
    trimap: TrimapMode = "none"
    band_px: int = 10
    """Distance from the alpha's edge within which a trimap is unknown."""

    @classmethod
    def from_options(cls, **options: Any) -> OutputFormat:
        """From options of the same names. Raises UsageError for one that is not known or fits no other."""
        output = cls(**options)
        if output.depth is not None and output.depth not in DEPTHS[output.format]:
            fitting = ", ".join(DEPTHS[output.format])
            raise UsageError(
                f"--depth {output.depth!r} does not fit --format {output.format}; expected one of {fitting}"
            )
        if output.channel != "A" and output.format != "exr":
            raise UsageError("--channel names the channel of an EXR; give --format exr too, or leave it out")
        if output.trimap == "instead" and output.format != "png":
            raise UsageError(
                f"--trimap instead writes PNGs, and the format is {output.format}; leave --format and the like out"
            )
        if output.trimap == "none" and output.band_px != cls.band_px:
            raise UsageError("--trimap-band is of a trimap; give --trimap beside or instead, or leave it out")
        if output.foreground != "none" and (output.invert or output.trimap == "instead"):
            raise UsageError(
                "--foreground writes the thing's colours with its alpha; leave --invert and --trimap instead out"
            )
        return output

    @property
    def suffix(self) -> str:
        return FORMAT_SUFFIXES[self.format][0]

    @property
    def has_windows(self) -> bool:
        """Whether the format says where in its display window a picture lies."""
        return self.format == "exr"

    @property
    def is_premultiplied(self) -> bool:
        """Whether a foreground's colours are multiplied by its alpha: usual in EXR, not elsewhere."""
        return self.foreground == "premultiplied" or (self.foreground == "auto" and self.format == "exr")

    def digest_text(self) -> str:
        """All of it in one line, for the digest of a run; "" where it is as ever."""
        return "" if self == OutputFormat() else repr(self)

    def depth_for(self, source: DecodedImage | None) -> BitDepth:
        """Depth of what is written of a source; None: of an alpha."""
        usual = DEPTHS[self.format]
        if self.depth is not None or source is None:
            return self.depth or usual[0]
        wanted: BitDepth = "8" if source.bits == 8 else "16" if source.bits == 16 else "float"
        if source.is_half and self.format == "exr":
            wanted = "half"
        return wanted if wanted in usual else usual[0] if self.format == "exr" else usual[1]


DEFAULT_OUTPUT = OutputFormat()


def write_alpha(
    path: Path,
    alpha: Float,
    stamp: Mapping[str, str],
    output: OutputFormat = DEFAULT_OUTPUT,
    source: DecodedImage | None = None,
) -> None:
    """Write an alpha, float32 [H,W] 0..1, whole or not at all; ``source`` gives an EXR its windows and timecode.

    Raises OutputError, or ImageError where only this file cannot be written.
    """
    written = 1.0 - alpha if output.invert else alpha
    _write(path, written[..., None], (output.channel,), stamp, output.format, output.depth_for(None), source)


def write_foreground(
    path: Path,
    colours: Float,
    alpha: Float,
    stamp: Mapping[str, str],
    output: OutputFormat,
    source: DecodedImage,
    config: str = "",
) -> None:
    """Write a thing's own colours, float32 [H,W,3] on the scale 0..1 of its source (HDR beyond), with its alpha.

    An EXR has them scene-linear; ``config``: the OpenColorIO configuration that knows the source's space.
    """
    label: dict[str, Any] = {}
    if output.format == "exr":
        colours, space = to_scene_linear(colours, source.space, config)
        label = colour_space_attributes(space, config)
    shown = colours * alpha[..., None] if output.is_premultiplied else colours
    pixels = np.concatenate([shown, alpha[..., None]], axis=-1)
    names = ("R", "G", "B", "A")
    is_associated = output.is_premultiplied and output.format == "tiff"  # PNG knows no other than straight alpha
    _write(
        path, pixels, names, stamp, output.format, output.depth_for(source), source, label, is_associated=is_associated
    )


def write_trimap(path: Path, trimap: NDArray[np.uint8], stamp: Mapping[str, str]) -> None:
    """Write a trimap, uint8 [H,W] in 0, 128, 255, as PNG."""
    values = trimap[..., None].astype(np.float32) / np.float32(255.0)
    _write(path, values, ("Y",), stamp, "png", "8", None)


def read_stamp(path: Path) -> dict[str, str] | None:
    """The stamp of a whole file of icm, or the text of another whole PNG; None for anything else."""
    try:
        data = path.read_bytes()
        if not data.startswith(b"\x89PNG"):
            return _openimageio_stamp(path) if OWN_MARK in data else None
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            stamp = dict(image.info)
            image.verify()  # tests every chunk's checksum
    except DECODE_ERRORS:
        return None
    if not data.endswith(_PNG_END):  # the one chunk that verify() leaves out
        return None
    return {str(key): value for key, value in stamp.items() if isinstance(value, str)}


def _openimageio_stamp(path: Path) -> dict[str, str] | None:
    file = oiio.ImageInput.open(str(path))
    if file is None:
        oiio.geterror()
        return None
    try:
        whole = file.read_image(0, 0, 0, file.spec().nchannels, "half") is not None and not file.has_error
        text = file.spec().getattribute(STAMP_KEY)
        stamp = json.loads(text) if whole and isinstance(text, str) else None
    except ValueError:
        return None
    finally:
        file.geterror()
        file.close()
    return cast(dict[str, str], stamp) if isinstance(stamp, dict) else None


def _write(
    path: Path,
    pixels: Float,
    names: tuple[str, ...],
    stamp: Mapping[str, str],
    format_: ImageFormat,
    depth: BitDepth,
    source: DecodedImage | None,
    label: Mapping[str, Any] = NO_LABEL,
    *,
    is_associated: bool = False,
) -> None:
    with atomic_write(path) as file:
        if format_ == "png":
            info = PngImagePlugin.PngInfo()
            for key, value in stamp.items():
                info.add_text(key, value)
            options = {"format": "PNG", "compress_level": PNG_COMPRESSION, "pnginfo": info}
            if depth == "8" or len(names) == 1:
                values = round_to_u8(pixels * np.float32(255.0)) if depth == "8" else _sixteen(pixels)
                Image.fromarray(values if len(names) > 1 else values[..., 0]).save(file, **options)  # type: ignore[arg-type]
                return
        _by_openimageio(Path(file.name), pixels, names, stamp, format_, depth, source, label, int(not is_associated))


def _by_openimageio(
    path: Path,
    pixels: Float,
    names: tuple[str, ...],
    stamp: Mapping[str, str],
    format_: ImageFormat,
    depth: BitDepth,
    source: DecodedImage | None,
    label: Mapping[str, Any],
    straight: int,
) -> None:
    height, width = pixels.shape[:2]
    spec = oiio.ImageSpec(width, height, len(names), _OIIO_TYPES[depth])
    spec.channelnames = names
    if "A" in names:
        spec.alpha_channel = names.index("A")
    if format_ == "png":
        for key, value in stamp.items():
            spec.attribute(key, value)
    else:
        spec.attribute(STAMP_KEY, json.dumps(dict(stamp)))
        spec.attribute("DateTime", "")  # else OpenImageIO writes the time of day, and no two files are the same
    for key, value in label.items():
        spec.attribute(key, *((f"float[{len(value)}]", value) if isinstance(value, tuple) else (value,)))
    spec.attribute("compression", "zip")
    spec.attribute("oiio:UnassociatedAlpha", straight)  # what the pixels are; they are written as they are
    if format_ == "exr" and source is not None:
        source.copy_metadata_to(spec)
    values: NDArray[Any] = pixels
    if depth in ("8", "16"):
        values = round_to_u8(pixels * np.float32(255.0)) if depth == "8" else _sixteen(pixels)
    writer = oiio.ImageOutput.create(format_)
    assert writer is not None
    if not (writer.open(str(path), spec) and writer.write_image(np.ascontiguousarray(values)) and writer.close()):
        raise _refusal(path, writer.geterror(), values.nbytes)


def _refusal(path: Path, text: str, size: int) -> OSError:
    """The file system's error behind a library's text, whose lines repeat it and name the temporary file."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        if os.strerror(number).lower() in text.lower():
            return OSError(number, os.strerror(number))
    if shutil.disk_usage(path.parent).free < size:  # libtiff gives no reason
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return OSError((text.strip().splitlines() or ["no reason was given"])[0].replace(str(path), "the file").rstrip("."))


def _sixteen(pixels: Float) -> NDArray[np.uint16]:
    return np.clip(pixels * np.float32(65535.0) + 0.5, 0, 65535).astype(np.uint16)
