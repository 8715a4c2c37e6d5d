"""Read the structure of JPEG, PNG and TIFF files, to find damaged ones before they are decoded.

libpng and libtiff print messages about a damaged file to the terminal. The checks here find the damage first, so that
icm reports it itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from icm_cli.images.colour import CodePoints
from icm_cli.images.image_file import ImageFile

JPEG_END = b"\xff\xd9"
NO_JPEG_END = "is a JPEG without its end marker; all rows are present, so the image is used"
PROGRESSIVE, SCAN = 0xC2, 0xDA
"""JPEG markers of a progressive image's header, and of a scan."""
MARKER_START = 0xFF
WITHOUT_LENGTH = frozenset({0x00, 0x01, MARKER_START, *range(0xD0, 0xDA)})
"""Second bytes of JPEG markers without a length, and of 0xFF in coded data, which is no marker."""
COEFFICIENTS = 64
"""Coefficients of a JPEG block."""
_TRIED_ENDS = 2
"""Number of random endings with which a JPEG without end marker is decoded; see :func:`complete_jpeg`."""
_NOISE_RUNS, _NOISE_RUN_BYTES = 64, 64

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_HEADER_OFFSET = len(PNG_SIGNATURE) + 8
"""Offset of the content of a PNG's header chunk, which is the first chunk."""
PNG_DEPTH_OFFSET = 24
"""Offset of the number of bits per channel."""
PNG_OPAQUE = frozenset({b"\0", b"\2"})
"""Colour types without alpha and palette: grey and RGB."""
CRITICAL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
"""Chunks that the pixels depend on. The others hold metadata, which may be damaged."""
ISOBMFF_PROPERTY_BYTES = 1 << 16
"""Bytes at the start of an AVIF or HEIC that are searched for its colour space."""
CHUNKS_BEFORE_GAMMA = frozenset({b"sRGB", b"iCCP", b"cICP"})
"""Chunks that take precedence over gAMA."""
SRGB_GAMMA = 45455
"""1/2.2 as a gAMA chunk stores it, in units of 1/100000."""
INFLATED_BYTES = 1 << 20
"""Number of bytes that are decompressed at a time."""

JPEG2000_SIZES, JPEG2000_COMPONENTS_OFFSET = b"\xff\x4f\xff\x51", 40
"""Markers at the start of a codestream, and the offset of the number of components from there."""
BMP_HEADER_OFFSET, BMP_BITS_OFFSET, BMP_COLOURS_OFFSET = 14, 28, 46
PNM_HEADER = re.compile(rb"P[2356](?:\s+|#[^\n]*\n)+(?:\d+(?:\s+|#[^\n]*\n)+){2}(\d+)")
"""Header of a PGM or PPM; the group is its value of white."""

TIFF_SUBFILE_TYPE = 254
TIFF_BITS, TIFF_SAMPLES, TIFF_SAMPLE_FORMAT = 258, 277, 339
TIFF_EXTRA_SAMPLES = 338
TIFF_SHORT = 3
TIFF_REDUCED = 1
"""Bit of the subfile type that marks a page as a smaller copy of another page."""
MAX_TIFF_PAGES = 65535


def complete_jpeg(file: ImageFile) -> io.BytesIO | None:
    """Return the bytes of a JPEG with its missing end marker added; None if more is missing.

    To find that out, the file is decoded with several random endings. If the pixels differ, rows are missing. In a
    progressive file, the first scan already has all rows, so its scans are checked too. Raises OSError.
    """
    data = file.stream.read().rstrip(b"\xff")  # the first half of the end marker may be there
    if not _has_every_scan(data):
        return None
    endings = [JPEG_END, *(_noise_bytes(seed) for seed in range(_TRIED_ENDS))]
    try:
        digests = {_pixel_digest(data + ending) for ending in endings}
    except (OSError, ValueError):
        return None
    return io.BytesIO(data + JPEG_END) if len(digests) == 1 else None


def is_16_bit_png(head: bytes) -> bool:
    """Return whether a PNG with this head has 16 bits per channel. Pillow silently reduces 16-bit RGB to 8 bits."""
    return head.startswith(PNG_SIGNATURE) and head[PNG_DEPTH_OFFSET : PNG_DEPTH_OFFSET + 1] == b"\x10"


def is_grey_png(head: bytes) -> bool:
    """Return whether a file with this head is a PNG with a grey channel, with or without alpha."""
    return head.startswith(PNG_SIGNATURE) and head[PNG_DEPTH_OFFSET + 1 : PNG_DEPTH_OFFSET + 2] in (b"\x00", b"\x04")


def has_unusual_gamma(file: ImageFile) -> bool:
    """Return whether a PNG has a gamma that differs from that of sRGB (about 1/2.2).

    A gAMA chunk is ignored if a chunk with precedence over it is present. Raises ValueError for a damaged file.
    """
    gamma = 0
    for name, data in _png_chunks(file, stop_before=b"IDAT"):
        if name in CHUNKS_BEFORE_GAMMA:
            return False
        if name == b"gAMA" and len(data) == 4:
            gamma = int.from_bytes(data, "big")
    return gamma > 0 and abs(gamma - SRGB_GAMMA) > SRGB_GAMMA // 50


def read_code_points(file: ImageFile) -> CodePoints | None:
    """Return the colour space that a PNG, AVIF or HEIC states by code points; None for other files.

    Raises ValueError for a damaged PNG.
    """
    if file.type.name == "png":
        for name, data in _png_chunks(file, stop_before=b"IDAT"):
            if name == b"cICP" and len(data) == 4:
                return CodePoints(data[0], data[1], bool(data[3]))
    if file.type.name in ("avif", "heic"):
        _, _, codes = file.stream.read(ISOBMFF_PROPERTY_BYTES).partition(b"colrnclx")
        if len(codes) >= 7:
            primaries, transfer = struct.unpack_from(">HH", codes)
            return CodePoints(primaries, transfer)  # decoders expand the range
    return None


def check_png_pixels(file: ImageFile) -> None:
    """Raise ValueError for a PNG without an end chunk whose pixels are damaged or incomplete."""
    if any(name == b"IEND" for name, _ in _png_chunks(file)):
        return
    inflater = zlib.decompressobj()
    for name, data in _png_chunks(file):
        while name == b"IDAT" and data:
            try:
                inflater.decompress(data, INFLATED_BYTES)
            except zlib.error as error:
                raise ValueError("its pixels are damaged") from error
            data = inflater.unconsumed_tail
    if not inflater.eof:
        raise ValueError("it ends before its pixels do")


def file_white(file: ImageFile) -> int | None:
    """Return the value of white in a PGM, PPM, or grey PNG or TIFF of less than 8 bits; None for other files."""
    if file.type.name == "pnm":
        match = PNM_HEADER.match(file.head)
        return int(match[1]) if match else None
    if file.type.name == "png":
        bits, is_grey = file.head[PNG_DEPTH_OFFSET], file.head[PNG_DEPTH_OFFSET + 1] == 0
    elif file.type.name == "tiff":
        tags_of_first_page = next(_tiff_tags(file), {})
        bits, is_grey = tags_of_first_page.get(TIFF_BITS, 8), tags_of_first_page.get(TIFF_SAMPLES, 1) == 1
    else:
        return None
    return 2**bits - 1 if bits < 8 and is_grey else None


def is_black_and_white_bmp(head: bytes) -> bool:
    """Return whether a file begins as a BMP of 4 or 8 bits with only black and white in its palette.

    Pillow reads its pixels as single bits.
    """
    if not head.startswith(b"BM") or len(head) < BMP_COLOURS_OFFSET + 4:
        return False
    (header_bytes,) = struct.unpack_from("<I", head, BMP_HEADER_OFFSET)
    (bits,) = struct.unpack_from("<H", head, BMP_BITS_OFFSET)
    (colours,) = struct.unpack_from("<I", head, BMP_COLOURS_OFFSET)
    if header_bytes < 40 or bits not in (4, 8) or colours != 2:
        return False
    palette = head[BMP_HEADER_OFFSET + header_bytes :]  # entries of 4 bytes: blue, green, red and an unused byte
    return palette[:3] == b"\0\0\0" and palette[4:7] == b"\xff\xff\xff"


def may_have_jpeg2000_alpha(head: bytes) -> bool:
    """Return whether a JPEG 2000 has neither 1 nor 3 components. True too if ``head`` ends before their number."""
    codestream = head.find(JPEG2000_SIZES)
    if codestream < 0:
        return True
    components = head[codestream + JPEG2000_COMPONENTS_OFFSET :][:2]
    return components not in (b"\0\1", b"\0\3")


def has_64_bit_integers(file: ImageFile) -> bool:
    """Return whether a TIFF stores integers of 64 bits, which no decoder supports."""
    return any(tags.get(TIFF_BITS) == 64 and tags.get(TIFF_SAMPLE_FORMAT, 1) in (1, 2) for tags in _tiff_tags(file))


def has_png_alpha(file: ImageFile) -> bool:
    """Return whether a PNG has an alpha channel or a transparent colour. Raises ValueError for a damaged file."""
    colour_type = file.head[PNG_DEPTH_OFFSET + 1 : PNG_DEPTH_OFFSET + 2]
    return colour_type not in PNG_OPAQUE or any(name == b"tRNS" for name, _ in _png_chunks(file, stop_before=b"IDAT"))


def tiff_pages(file: ImageFile) -> list[int]:
    """Return the indices of a TIFF's pages. Smaller copies of other pages (thumbnails, pyramids) are excluded."""
    is_copy = [bool(tags.get(TIFF_SUBFILE_TYPE, 0) & TIFF_REDUCED) for tags in _tiff_tags(file)]
    return [page for page in range(len(is_copy)) if not is_copy[page]] or [0]


def has_tiff_extra_samples(file: ImageFile) -> bool:
    """Return whether any page of a TIFF has further channels than its colours, such as an alpha."""
    return any(TIFF_EXTRA_SAMPLES in tags for tags in _tiff_tags(file))


def _has_every_scan(data: bytes) -> bool:
    """Return whether the scans of a progressive JPEG contain all bits of all coefficients; True for other JPEGs.

    Each scan refines a range of coefficients of some components, and states how many of their low bits are missing.
    """
    components: set[int] = set()
    missing_bits: dict[tuple[int, int], int] = {}  # by component and coefficient
    for marker, content in _jpeg_segments(data):
        if marker == PROGRESSIVE:
            components = set(content[6::3])  # after 6 bytes, 3 for each component: the first is its id
        if marker == SCAN and components:
            component_count = content[0]
            scanned = content[1 : 1 + 2 * component_count : 2]
            first, last, bits = content[1 + 2 * component_count :][:3]
            low_bits = bits & 15  # the upper half of the byte holds the state before the scan
            missing_bits |= dict.fromkeys(itertools.product(scanned, range(first, last + 1)), low_bits)
    return all(missing_bits.get(wanted) == 0 for wanted in itertools.product(components, range(COEFFICIENTS)))


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and content of every segment that has a length, up to an incomplete one."""
    start = 2  # after the marker at the start of the file
    while (start := data.find(b"\xff", start)) >= 0 and start + 4 <= len(data):
        marker = data[start + 1]
        if marker in WITHOUT_LENGTH:
            start += 1 if marker == MARKER_START else 2  # bytes 0xFF before a marker are padding
            continue
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if end > len(data):
            return
        yield marker, data[start + 4 : end]
        start = end


def _pixel_digest(data: bytes) -> bytes:
    """Return the digest of the decoded pixels of a JPEG. Raises OSError or ValueError."""
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        return hashlib.sha256(image.tobytes()).digest()


def _noise_bytes(seed: int) -> bytes:
    """Return random bytes that decode to some rows of a JPEG, with all restart markers and an end marker."""
    shape = (_NOISE_RUNS, _NOISE_RUN_BYTES)
    runs = np.random.default_rng(seed).integers(0, MARKER_START, shape, np.uint8)
    restart_markers = [bytes([MARKER_START, 0xD0 + number % 8]) for number in range(_NOISE_RUNS)]
    return b"".join(run.tobytes() + marker for run, marker in zip(runs, restart_markers, strict=True)) + JPEG_END


def _png_chunks(file: ImageFile, stop_before: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """Yield name and content of the chunks up to the end chunk. Stop before ``stop_before`` or an incomplete chunk.

    Raises ValueError for a damaged chunk.
    """
    stream = file.stream
    stream.seek(len(PNG_SIGNATURE))
    while len(head := stream.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if not (name.isalpha() and name.isascii()):
            raise ValueError(f"it has a chunk named {name.hex()}")
        is_first = stream.tell() == PNG_HEADER_OFFSET
        if (name == b"IHDR") != is_first:
            raise ValueError("its header is not the first chunk, or occurs twice")
        if name == stop_before:
            return
        data, checksum = stream.read(min(length, file.size_bytes)), stream.read(4)
        if len(checksum) < 4:
            return
        if name in CRITICAL_CHUNKS and zlib.crc32(name + data) != int.from_bytes(checksum, "big"):
            raise ValueError(f"the checksum of its chunk {name.decode()} is wrong")
        yield name, data
        if name == b"IEND":
            return


def _tiff_tags(file: ImageFile) -> Iterator[dict[int, int]]:
    """Yield the tags of every readable page of a TIFF or BigTIFF: number -> value.

    The value is only correct for tags that hold a single integer.
    """
    stream = file.stream
    byte_order = "<" if file.head.startswith(b"II") else ">"
    is_big = b"+" in file.head[2:4]
    offset_layout, count_layout, tag_layout = ("Q", "Q", "HHQ8s") if is_big else ("I", "H", "HHI4s")
    page_offset_struct = struct.Struct(byte_order + offset_layout)
    tag_count_struct = struct.Struct(byte_order + count_layout)
    tag_struct = struct.Struct(byte_order + tag_layout)
    stream.seek(8 if is_big else 4)
    seen: set[int] = set()
    with contextlib.suppress(struct.error, OverflowError):
        while len(seen) < MAX_TIFF_PAGES:
            # The offset of the first page is in the header. That of each further page follows the tags of a page.
            (page_offset,) = page_offset_struct.unpack(stream.read(page_offset_struct.size))
            if not page_offset or page_offset in seen:  # the last page, or pages that refer to each other
                return
            seen.add(page_offset)
            stream.seek(page_offset)
            (tag_count,) = tag_count_struct.unpack(stream.read(tag_count_struct.size))
            data = stream.read(min(tag_count * tag_struct.size, file.size_bytes))
            yield {tag: _tiff_value(type_, value, byte_order) for tag, type_, _, value in tag_struct.iter_unpack(data)}


def _tiff_value(type_: int, data: bytes, byte_order: str) -> int:
    """Return the integer that the value field of a tag begins with."""
    return int(struct.unpack_from(byte_order + ("H" if type_ == TIFF_SHORT else "I"), data)[0])
