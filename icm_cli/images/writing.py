"""Writes alphas that say what decided them, and reads that again."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, PngImagePlugin

from icm_cli.files import atomic_write
from icm_cli.geometry import ImageU8
from icm_cli.images.decoding import DECODE_ERRORS

PNG_COMPRESSION = 1
"""zlib level: an alpha is mostly flat, and higher levels cost far more time than they save space."""
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


def write_alpha(path: Path, alpha: ImageU8, stamp: Mapping[str, str]) -> None:
    """Write an alpha, uint8 [H,W], as a single-channel PNG with ``stamp`` in its text chunks: whole or not at all.

    Raises OutputError.
    """
    text = PngImagePlugin.PngInfo()
    for key, value in stamp.items():
        text.add_text(key, value)
    with atomic_write(path) as file:
        Image.fromarray(alpha).save(file, format="PNG", compress_level=PNG_COMPRESSION, pnginfo=text)


def read_stamp(path: Path) -> dict[str, str] | None:
    """The text chunks of a whole PNG (every chunk's checksum is tested), None for anything else."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            stamp = dict(image.info)
            image.verify()
    except DECODE_ERRORS:
        return None
    if not data.endswith(_PNG_END):  # the one chunk that verify() leaves out
        return None
    return {str(key): value for key, value in stamp.items() if isinstance(value, str)}
