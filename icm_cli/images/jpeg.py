"""JPEG files that stop before their end marker: whole but for it, or with rows or scans missing."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

END = b"\xff\xd9"
NO_END = "is a JPEG without its end marker; all its rows are there, so it is read"
PROGRESSIVE, SCAN = 0xC2, 0xDA
"""Markers of a progressive picture's header, and of a scan."""
FILL = 0xFF
WITHOUT_LENGTH = frozenset({0x00, 0x01, FILL, *range(0xD0, 0xDA)})
"""Bytes that follow 0xFF in coded data, and markers that stand alone."""
COEFFICIENTS = 64
_FOLLOWERS = 2
"""Other ends that are tried."""
_RUNS, _RUN_BYTES = 64, 64


def with_end(path: Path) -> io.BytesIO | None:
    """A JPEG's bytes with the end marker that they lack, None where more than that is missing.

    Of a file whose rows are all there the decoder reads no further, so its pixels are the same whatever follows; where
    rows are missing it takes what follows for them. A progressive file has them all after its first scan, so its scans
    are counted too. Raises OSError where the file cannot be read.
    """
    data = path.read_bytes().rstrip(b"\xff")
    if not _has_every_scan(data):
        return None
    try:
        pixels = {_pixels(data + end) for end in (END, *map(_noise, range(_FOLLOWERS)))}
    except (OSError, ValueError):
        return None
    return io.BytesIO(data + END) if len(pixels) == 1 else None


def _has_every_scan(data: bytes) -> bool:
    """Whether the scans of a progressive JPEG give every coefficient of every component to its last bit."""
    components: set[int] = set()
    open_bits: dict[tuple[int, int], int] = {}
    for marker, content in _segments(data):
        if marker == PROGRESSIVE:
            components = set(content[6::3])
        if marker == SCAN and components:
            count = content[0]
            first, last, bits = content[1 + 2 * count], content[2 + 2 * count], content[3 + 2 * count] & 15
            open_bits |= {(each, at): bits for each in content[1 : 1 + 2 * count : 2] for at in range(first, last + 1)}
    return all(open_bits.get((each, at)) == 0 for each in components for at in range(COEFFICIENTS))


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers with a length, and what is in them, in the order of the file; a cut one is left out."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker in WITHOUT_LENGTH:
            at += 1 if marker == FILL else 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if end > len(data):
            return
        yield marker, data[at + 4 : end]
        at = end


def _pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        return hashlib.sha256(image.tobytes()).digest()


def _noise(seed: int) -> bytes:
    """Bytes that decode to some picture or other, with every restart marker among them, and the end marker."""
    runs = np.random.default_rng(seed).integers(0, 0xFF, (_RUNS, _RUN_BYTES), np.uint8)  # 0xFF would begin a marker
    return b"".join(run.tobytes() + bytes([0xFF, 0xD0 + number % 8]) for number, run in enumerate(runs)) + END
