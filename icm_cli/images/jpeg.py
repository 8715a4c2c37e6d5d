"""JPEG files that stop before their end marker: whole but for it, or with rows missing."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

END = b"\xff\xd9"
NO_END = "is a JPEG without its end marker; all its rows are there, so it is read"
_FOLLOWERS = 2
"""Other ends that are tried."""
_RUNS, _RUN_BYTES = 64, 64


def with_end(path: Path) -> io.BytesIO | None:
    """A JPEG's bytes with the end marker that they lack, None where more than that is missing.

    Of a file whose rows are all there the decoder reads no further, so its pixels are the same whatever follows; where
    rows are missing it takes what follows for them. Raises OSError where the file cannot be read.
    """
    data = path.read_bytes().rstrip(b"\xff")
    try:
        pixels = {_pixels(data + end) for end in (END, *map(_noise, range(_FOLLOWERS)))}
    except (OSError, ValueError):
        return None
    return io.BytesIO(data + END) if len(pixels) == 1 else None


def _pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        return hashlib.sha256(image.tobytes()).digest()


def _noise(seed: int) -> bytes:
    """Bytes that decode to some picture or other, with every restart marker among them, and the end marker."""
    runs = np.random.default_rng(seed).integers(0, 0xFF, (_RUNS, _RUN_BYTES), np.uint8)  # 0xFF would begin a marker
    return b"".join(run.tobytes() + bytes([0xFF, 0xD0 + number % 8]) for number, run in enumerate(runs)) + END
