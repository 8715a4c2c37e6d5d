"""The kind of a file, told by its first bytes: a picture, of how many frames, a movie, icm's own output."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 4096
"""Bytes that are looked at."""
OWN_MARK = b"icm-digest"
OWN_SHEET_MARK = b"icm-sheet"
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".cin", ".dds", ".dib", ".dpx", ".exr", ".gif", ".hdr", ".heic", ".j2c", ".j2k", ".jfif", ".jp2"}
    | {".jpe", ".jpeg", ".jpg", ".jpx", ".jxl", ".mpo", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".sgi"}
    | {".tga", ".tif", ".tiff", ".webp"}
)
"""Endings of pictures. A file with one of these is taken for a picture even where its content does not look so, as a
damaged one must be named; others are taken where their content is a picture's."""
_STARTS = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
    (b"BM", "bmp"),
    (b"\x28\0\0\0", "dib"),
    (b"8BPS", "psd"),
    (b"\x76\x2f\x31\x01", "openexr"),
    (b"SDPX", "dpx"),
    (b"XPDS", "dpx"),
    (b"\x80\x2a\x5f\xd7", "cineon"),
    (b"\xd7\x5f\x2a\x80", "cineon"),
    (b"#?RADIANCE", "hdr"),
    (b"#?RGBE", "hdr"),
    (b"\0\0\0\x0cjP  ", "jpeg2000"),
    (b"\xff\x4f\xff\x51", "jpeg2000"),
    (b"\xff\x0a", "jpegxl"),
    (b"\0\0\0\x0cJXL ", "jpegxl"),
    (b"DDS ", "dds"),
    (b"SIMPLE  =", "fits"),
    (b"\x01\xda", "sgi"),
    *((b"P" + letter, "pnm") for letter in (b"1", b"2", b"3", b"4", b"5", b"6", b"F", b"f")),
)
_CHECKS = {
    "bmp": re.compile(rb"BM.{4}\0{4}", re.DOTALL),
    "dib": re.compile(rb"\x28\0\0\0.{8}\x01\0", re.DOTALL),
    "pnm": re.compile(rb"P.(\s|#[^\n]*\n)+\d+\s"),
    "sgi": re.compile(rb"\x01\xda[\0\x01][\x01\x02]"),
}
"""Kinds whose first bytes stand before text and other data too, and what a picture has after them."""
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_MOVIE_BRANDS = (b"isom", b"iso2", b"iso5", b"iso6", b"mp41", b"mp42", b"M4V", b"qt  ", b"avc1", b"dash", b"3gp")
_MOVIE_ATOMS = (b"moov", b"mdat", b"wide")
"""First atoms of QuickTime movies that do not say what they are."""
_MOVIE_STARTS = (b"\x1aE\xdf\xa3", b"\x06\x0e+4", b"\0\0\1\xba", b"FLV\1", b"0&\xb2u", b"OggS", b"YUV4MPEG2")
"""First bytes of Matroska and WebM, MXF, MPEG, Flash, Windows Media, Ogg and YUV4MPEG."""
MOVIE_SUFFIXES = frozenset(
    {".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".webm", ".wmv"}
)
"""Endings of movies, for names of what is not there yet."""
_MANY = frozenset({"gif", "webp", "tiff", "avif", "heic"})
"""Kinds that may hold more than one frame; a PNG may where it has a chunk that says so."""


@dataclass(frozen=True)
class FileType:
    """``name`` of the format, "" where the content is no picture's; whether it may hold several frames, whether icm
    wrote it, and whether it is a movie."""

    name: str
    may_have_frames: bool = False
    is_icm_output: bool = False
    is_movie: bool = False


def detect_file_type(path: Path) -> FileType:
    """Look at a file's first bytes. Raises OSError where it cannot be read."""
    if not stat.S_ISREG(path.stat().st_mode):
        return FileType("")  # reading a pipe or a device could wait for ever
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    name = _name(head)
    animated = name in _MANY or (name == "png" and b"acTL" in head)
    is_icm_output = name in ("png", "tiff", "openexr") and (OWN_MARK in head or OWN_SHEET_MARK in head)
    return FileType(name, animated, is_icm_output, is_movie=not name and _is_movie(head))


def movie_message(path: Path) -> str:
    """End of a sentence that begins with the path of a movie, and says what to do with it."""
    return f"is a movie, and icm mattes pictures; write its frames first, for example: ffmpeg -i {path} frames/%05d.png"


def _is_movie(head: bytes) -> bool:
    if head[4:8] == b"ftyp":
        return any(brand in head[8:64] for brand in _MOVIE_BRANDS)
    is_avi = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    # Packets of MPEG-TS begin with a G, each after a time of four bytes in M2TS.
    is_stream = any(head[at::step][:3] == b"GGG" for at, step in ((0, 188), (4, 192)))
    is_red = head[4:8] in (b"RED1", b"RED2")
    return is_avi or is_stream or is_red or head[4:8] in _MOVIE_ATOMS or head.startswith(_MOVIE_STARTS)


def _name(head: bytes) -> str:
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp":
        brands = head[8:64]
        if b"avif" in brands or b"avis" in brands:
            return "avif"
        return "heic" if any(brand in brands for brand in _HEIC_BRANDS) else ""
    found = next((name for start, name in _STARTS if head.startswith(start)), "")
    check = _CHECKS.get(found)
    return found if check is None or check.match(head) else ""
