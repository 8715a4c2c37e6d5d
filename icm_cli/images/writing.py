"""Write alphas, foregrounds and trimaps with their provenance (what made them), and read provenance."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from icm_cli.errors import FileAccessError, ImageError, UsageError
from icm_cli.files.atomic_writes import WriteCheck, atomic_write
from icm_cli.geometry import Float, round_to_u8
from icm_cli.images import openimageio
from icm_cli.images.colour import colour_space_attributes, to_scene_linear
from icm_cli.images.decoding import decode_image, library_settings, open_image, retry_decoding
from icm_cli.images.image_file import ICM_ALPHA_MARK, ICM_MASK_MARK, ImageFile
from icm_cli.images.pixels import DecodedImage
from icm_cli.images.reading import LABEL_VALUES
from icm_cli.options import BitDepth, ForegroundMode, ImageFormat, TrimapMode

BIT_DEPTHS: Mapping[ImageFormat, tuple[BitDepth, ...]] = {
    "png": ("8", "16"),
    "tiff": ("8", "16", "float"),
    "exr": ("half", "float"),
}
"""Bit depths of each format, the default first."""
FORMAT_SUFFIXES: Mapping[ImageFormat, tuple[str, ...]] = {"png": (".png",), "tiff": (".tif", ".tiff"), "exr": (".exr",)}
"""File name suffixes of each format. The first one is written."""
PNG_COMPRESSION = 1
"""zlib level. Alphas are mostly flat, so higher levels save little space and take far more time."""
PROVENANCE_KEY = "ImageDescription"
"""Attribute of a TIFF or EXR that holds the provenance as JSON."""
PIXELS_KEY = "icm-pixels"
"""Key of the digest of the pixels, by which a retouched alpha is recognised."""
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_FILE_DIGEST_BYTES = 85 + len(_PNG_END)
"""Size of the digest chunk that :func:`_add_file_digest` adds and of the end chunk, together."""
_OIIO_TYPES = {"uint8": "uint8", "uint16": "uint16", "float16": "half", "float32": "float"}
"""NumPy's name of a data type -> OpenImageIO's name."""


@dataclass(frozen=True)
class OutputFormat:
    """Format and content of the files that are written for each image."""

    format: ImageFormat = "png"
    depth: BitDepth | None = None
    """Bit depth; None: the default of the format for an alpha, the depth of the source for a foreground."""
    channel: str = "A"
    """Name of an EXR's alpha channel."""
    foreground: ForegroundMode = "none"
    invert: bool = False
    trimap: TrimapMode = "none"
    band_px: int = 10
    """Distance from the edge of the alpha within which a trimap is unknown."""

    def __post_init__(self) -> None:
        """Raise UsageError for contradictory options."""
        if self.depth is not None and self.depth not in BIT_DEPTHS[self.format]:
            fitting = ", ".join(BIT_DEPTHS[self.format])
            raise UsageError(f"--depth {self.depth!r} does not fit --format {self.format}; expected one of {fitting}")
        if self.channel != "A" and self.format != "exr":
            raise UsageError(
                f"--channel {self.channel} names the channel of an EXR, and the format is "
                f"{self.format}; give --format exr, or omit --channel"
            )
        if self.channel != "A" and self.foreground != "none":
            raise UsageError(
                f"--channel {self.channel} names the channel of an alpha, and --foreground writes R, G, B and A; "
                "omit one of the two"
            )
        if self.trimap == "instead" and self.format != "png":
            raise UsageError(
                f"--trimap instead writes PNGs, and the format is {self.format}; omit --format, and give --out a "
                "folder or a pattern that ends in .png"
            )
        if self.trimap == "none" and self.band_px != OutputFormat.band_px:
            raise UsageError(
                f"--trimap-band is {self.band_px}, and no trimap is written; give --trimap "
                "also or instead, or omit --trimap-band"
            )
        if self.foreground != "none" and (self.invert or self.trimap == "instead"):
            raise UsageError(
                f"--foreground {self.foreground} writes the object's colours with its alpha; "
                "omit --invert and --trimap instead"
            )

    @property
    def suffix(self) -> str:
        """File name suffix of the format, such as ".png"."""
        return FORMAT_SUFFIXES[self.format][0]

    @property
    def keeps_windows(self) -> bool:
        """Whether the format stores a data window and a display window."""
        return self.format == "exr"

    @property
    def is_premultiplied(self) -> bool:
        """Whether the colours of a foreground are multiplied by its alpha, as is usual in EXR."""
        return self.foreground == "premultiplied" or (self.foreground == "auto" and self.format == "exr")

    def depth_for(self, source: DecodedImage | None) -> BitDepth:
        """Return the bit depth of the foreground of a source; of an alpha if ``source`` is None.

        By default, a foreground has a depth that holds all values of its source, if the format has one.
        """
        supported = BIT_DEPTHS[self.format]
        if self.depth is not None:
            return self.depth
        if source is None:
            return supported[0]
        if self.format == "exr":
            return "half" if source.bits in (8, 16) or source.is_half else "float"
        source_depth: BitDepth = "8" if source.bits == 8 else "16" if source.bits == 16 else "float"
        return source_depth if source_depth in supported else "16"


DEFAULT_OUTPUT = OutputFormat()


def write_alpha(
    path: Path,
    alpha: Float,
    provenance: Mapping[str, str],
    output: OutputFormat = DEFAULT_OUTPUT,
    source: DecodedImage | None = None,
    check: WriteCheck | None = None,
) -> None:
    """Write an alpha, float32 [H,W] in 0..1, atomically.

    ``source``: the image from which an EXR copies its windows and timecode. Raises OutputError, and FileWriteError if
    only this file cannot be written.
    """
    values = _quantize((1.0 - alpha if output.invert else alpha)[..., None], output.depth_for(None))
    texts = _add_pixel_digest(provenance, values)
    if output.format == "png":
        _write_png(path, values, texts, check)
    else:
        spec = _make_spec(values, (output.channel,), texts, output.format, source)
        with atomic_write(path, check) as file:
            _write_with_openimageio(file.name, spec, values, output.format)


def write_foreground(
    path: Path,
    colours: Float,
    alpha: Float,
    provenance: Mapping[str, str],
    output: OutputFormat,
    source: DecodedImage,
    config: str = "",
    check: WriteCheck | None = None,
) -> None:
    """Write the colours of the object with its alpha, atomically.

    ``colours``: float32 [H,W,3] on the scale 0..1; HDR exceeds 1. An EXR stores them scene-linear. ``config``: the
    OpenColorIO configuration with the colour space of the source. Everything else: see :func:`write_alpha`.
    """
    attributes: dict[str, Any] = {}
    if output.format == "exr":
        colours, space = to_scene_linear(colours, source.space, config)
        attributes = colour_space_attributes(space, config)
    if output.is_premultiplied:
        colours = colours * alpha[..., None]
        if output.format == "tiff":  # PNG supports straight alpha only
            attributes["oiio:UnassociatedAlpha"] = 0
    values = _quantize(np.concatenate([colours, alpha[..., None]], axis=-1), output.depth_for(source))
    texts = _add_pixel_digest(provenance, values)
    if output.format == "png" and values.dtype == np.uint8:  # Pillow has no RGBA of 16 bits
        _write_png(path, values, texts, check)
    else:
        spec = _make_spec(values, ("R", "G", "B", "A"), texts, output.format, source, attributes)
        with atomic_write(path, check) as file:
            _write_with_openimageio(file.name, spec, values, output.format)


def write_trimap(
    path: Path, trimap: NDArray[np.uint8], provenance: Mapping[str, str], check: WriteCheck | None = None
) -> None:
    """Write a trimap, uint8 [H,W] with 0, 128 and 255, as PNG."""
    values = np.asarray(trimap[..., None], np.uint8)
    _write_png(path, values, _add_pixel_digest(provenance, values), check)


def write_mask(path: Path, mask: NDArray[np.bool_]) -> None:
    """Write the mask of a reference, bool [H,W], as PNG: white on the object, black elsewhere."""
    values = mask[..., None].astype(np.uint8) * np.uint8(255)
    _write_png(path, values, _add_pixel_digest({ICM_MASK_MARK.decode(): "mask"}, values))


def read_provenance(path: Path) -> dict[str, str] | None:
    """Return the provenance of a file of icm; for another PNG, the texts that it contains.

    Returns None for other files, damaged files and missing files. Raises FileAccessError.
    """
    try:
        with open_image(path) as file:
            content = file.stream.read()
            if file.type.name != "png":
                return _read_openimageio_provenance(file) if ICM_ALPHA_MARK in content else None
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                texts = _texts_of_png(image)
                image.verify()  # checks the checksum of every chunk except the last one
    except FileAccessError:
        raise
    except ImageError:
        return None
    return texts if content.endswith(_PNG_END) else None


def _texts_of_png(image: Image.Image) -> dict[str, str]:
    """Return the texts of an open PNG, by their keys."""
    return {str(key): value for key, value in image.info.items() if isinstance(value, str)}


def read_provenance_header(path: Path) -> dict[str, str]:
    """Return the provenance of a file of icm without reading its pixels; {} for other files. Raises ImageError."""
    with open_image(path) as file:
        if not file.type.is_icm_output:
            return {}
        if file.type.name == "png":
            with Image.open(file.stream, formats=["PNG"]) as image:
                return _texts_of_png(image)
        with openimageio.open_reader(file) as reader:
            provenance = json.loads(reader.spec().getattribute(PROVENANCE_KEY) or "{}")
            return provenance if isinstance(provenance, dict) else {}


def has_changed_pixels(path: Path, provenance: Mapping[str, str]) -> bool:
    """Return whether a file was retouched: its pixels are not those that icm wrote, by the digest in its provenance.

    False for files of icm 0.1, which have no digest of their pixels. An unchanged PNG is not decoded. Raises
    ImageError.
    """
    expected = provenance.get(PIXELS_KEY)
    if expected is None:
        return False
    with open_image(path) as file:
        if file.type.name == "png":
            content = file.stream.read()
            if content == _add_file_digest(content[:-_FILE_DIGEST_BYTES]):
                return False
        decoded = decode_image(file, settings=LABEL_VALUES)
    channels = [decoded.pixels] if decoded.alpha is None else [decoded.pixels, decoded.alpha[..., None]]
    return _pixel_digest(np.concatenate(channels, axis=-1)) != expected


def set_provenance_entry(path: Path, key: str, value: str | None, check: WriteCheck | None = None) -> None:
    """Set one entry of the provenance of a file of icm, or with None remove it, atomically.

    The pixels and everything else in the file stay as they are. ``value``: ASCII text. Raises OutputError, and
    ImageError for a file that icm did not write.
    """
    with open_image(path) as file:
        if file.type.name == "png":
            content = _set_png_text(file.stream.read(), key, value)
            with atomic_write(path, check) as out:
                out.write(content)
            return
        provenance = read_provenance(path)
        if provenance is None:
            raise ImageError(
                f"{path} is not an alpha of icm, or another program removed its metadata; its provenance cannot be "
                "changed; run icm matte again"
            )
        provenance.pop(key, None)
        if value is not None:
            provenance[key] = value
        with openimageio.open_reader(file) as reader:
            spec = openimageio.import_library().ImageSpec(reader.spec())
            pixels = reader.read_image(0, 0, 0, spec.nchannels, "unknown")  # in the type of the file
            has_one_part = not reader.seek_subimage(1, 0)
    if pixels is None or not has_one_part:
        raise ImageError(f"{path} has several parts or cannot be read completely; expected an alpha that icm wrote")
    spec.erase_attribute("tiff:RowsPerStrip")
    spec.attribute(PROVENANCE_KEY, json.dumps(provenance))
    spec.attribute("DateTime", spec.getattribute("DateTime") or "")  # see _make_spec
    with atomic_write(path, check) as out:
        _write_with_openimageio(out.name, spec, pixels, "tiff" if file.type.name == "tiff" else "exr")


def _set_png_text(content: bytes, key: str, value: str | None) -> bytes:
    """Return a PNG with a text chunk replaced; None removes it. The digest of its bytes is updated."""
    has_file_digest = content == _add_file_digest(content[:-_FILE_DIGEST_BYTES])
    body = content[:-_FILE_DIGEST_BYTES] if has_file_digest else content.removesuffix(_PNG_END)
    signature_bytes = 8
    kept, start = [body[:signature_bytes]], signature_bytes
    while start + 8 <= len(body):
        length, kind = struct.unpack_from(">I4s", body, start)
        chunk = body[start : start + length + 12]  # length, kind, data and checksum
        if kind == b"IDAT" and value is not None:  # the text precedes the first chunk of pixels
            kept.append(_png_text(key, value))
            value = None
        is_replaced = kind == b"tEXt" and chunk[8:].startswith(key.encode() + b"\0")
        if not is_replaced:
            kept.append(chunk)
        start += len(chunk)
    edited = b"".join(kept)
    return _add_file_digest(edited) if has_file_digest else edited + _PNG_END


def _read_openimageio_provenance(file: ImageFile) -> dict[str, str]:
    """Return the provenance of a TIFF or EXR of icm. Raises ValueError if its pixels are incomplete."""

    def read() -> Any:
        with openimageio.open_reader(file) as reader:
            pixels = reader.read_image(0, 0, 0, reader.spec().nchannels, "half")
            if pixels is None or reader.has_error:
                raise ValueError(reader.geterror())
            return json.loads(reader.spec().getattribute(PROVENANCE_KEY))

    provenance = retry_decoding(file, read)
    if not isinstance(provenance, dict):
        raise ValueError(f"its {PROVENANCE_KEY} is not a JSON object")
    return provenance


def _write_png(path: Path, values: NDArray[Any], texts: Mapping[str, str], check: WriteCheck | None = None) -> None:
    """Write values [H,W,C] as a PNG with these texts, atomically."""
    with atomic_write(path, check) as file:
        file.write(_encode_png(values, texts))


def _make_spec(
    values: NDArray[Any],
    channels: tuple[str, ...],
    texts: Mapping[str, str],
    format_: ImageFormat,
    source: DecodedImage | None,
    attributes: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Return OpenImageIO's specification of a file with values [H,W,C], and with texts in its metadata.

    ``source``: image from which an EXR copies its windows and timecode. ``attributes``: further attributes.
    """
    oiio = openimageio.import_library()
    spec = oiio.ImageSpec(values.shape[1], values.shape[0], len(channels), _OIIO_TYPES[values.dtype.name])
    spec.channelnames = channels
    if "A" in channels:
        spec.alpha_channel = channels.index("A")
    # Without DateTime, OpenImageIO would write the time of day, and equal alphas would differ.
    metadata = texts if format_ == "png" else {PROVENANCE_KEY: json.dumps(texts), "DateTime": ""}
    # UnassociatedAlpha describes the pixels, which stay unchanged.
    for key, value in {**metadata, "compression": "zip", "oiio:UnassociatedAlpha": 1, **attributes}.items():
        if isinstance(value, tuple):
            spec.attribute(key, f"float[{len(value)}]", value)
        else:
            spec.attribute(key, value)
    if format_ == "exr" and source is not None:
        source.copy_metadata_to(spec)
    return spec


def _add_pixel_digest(provenance: Mapping[str, str], values: NDArray[Any]) -> dict[str, str]:
    """Return a provenance with the digest of the stored values [H,W,C]."""
    return {**provenance, PIXELS_KEY: _pixel_digest(values)}


def _encode_png(values: NDArray[Any], texts: Mapping[str, str]) -> bytes:
    """Return values [H,W,C] as a PNG with these texts and the digest of its bytes."""
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    encoded = io.BytesIO()
    image = Image.fromarray(values if values.shape[-1] > 1 else values[..., 0])
    image.save(encoded, format="PNG", compress_level=PNG_COMPRESSION, pnginfo=info)
    return _add_file_digest(encoded.getvalue().removesuffix(_PNG_END))


def _write_with_openimageio(path: str, spec: Any, values: NDArray[Any], format_: str) -> None:
    """Write values [H,W,C] to a file. Raises OSError."""
    writer = openimageio.import_library().ImageOutput.create(format_)
    assert writer is not None
    with library_settings(), openimageio.one_thread():
        is_written = writer.open(path, spec) and writer.write_image(values) and writer.close()
    if not is_written:
        raise _write_failure(Path(path), writer.geterror(), values.nbytes)


def _quantize(pixels: Float, depth: BitDepth) -> NDArray[Any]:
    """Return pixels on the scale 0..1 as the values that a file of this depth stores."""
    if depth == "8":
        return round_to_u8(pixels * np.float32(255.0))
    if depth == "16":
        return np.clip(pixels * np.float32(65535.0) + 0.5, 0, 65535).astype(np.uint16)
    with np.errstate(over="ignore"):  # values above 65504 are infinite in a half
        return np.ascontiguousarray(pixels, np.float16 if depth == "half" else np.float32)


def _pixel_digest(values: NDArray[Any]) -> str:
    """Return the SHA-256 of the stored values [H,W,C] as hexadecimal digits.

    It is equal for halves and floats of equal values.
    """
    if values.dtype.kind == "f":  # values that are not finite are read as 0
        values = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    hasher = hashlib.sha256(f"{values.dtype} {values.shape}".encode())
    hasher.update(np.ascontiguousarray(values).data)
    return hasher.hexdigest()


def _add_file_digest(content: bytes) -> bytes:
    """Return a PNG with a text chunk that holds the digest of its bytes, and its end chunk.

    By this digest, an unchanged file is recognised without decoding it. ``content``: the PNG without these two chunks.
    """
    return content + _png_text("icm-file", hashlib.sha256(content).hexdigest()) + _PNG_END


def _png_text(key: str, text: str) -> bytes:
    """Return the chunk of a PNG that holds an ASCII text."""
    kind, data = b"tEXt", key.encode() + b"\0" + text.encode()
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _write_failure(path: Path, message: str, size: int) -> OSError:
    """Return the error of the file system that a library's message contains, or else one with the message.

    ``path``: the temporary file, which the message may name. ``size``: number of bytes that were to be written.
    """
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        if os.strerror(number).lower() in message.lower():
            return OSError(number, os.strerror(number))
    if shutil.disk_usage(path.parent).free < size:  # libtiff gives no reason
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    first_line = (message.strip().splitlines() or ["unknown reason"])[0]
    return OSError(first_line.replace(str(path), "the file").rstrip("."))
