"""Detect the type of image files, and open each file once for everything that is read from it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from icm_cli.errors import ImageError
from icm_cli.files.paths import special_file_kind
from icm_cli.files.system_errors import retry_transient

HEAD_BYTES = 4096
"""Size of the head: the bytes at the start of a file from which its type and its state are found."""
STATE_DIGEST_DIGITS = 16
EMPTY_FILE = "is empty (0 bytes); get a complete copy"
ICM_ALPHA_MARK = b"icm-digest"
ICM_SHEET_MARK = b"icm-sheet"
ICM_MASK_MARK = b"icm-mask"
ICM_MARKS = ICM_ALPHA_MARK, ICM_SHEET_MARK, ICM_MASK_MARK
"""Keys of texts in the files that icm writes, by which it recognises them."""
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".cin", ".dds", ".dib", ".dpx", ".exr", ".gif", ".hdr", ".heic", ".j2c", ".j2k", ".jfif", ".jp2"}
    | {".jpe", ".jpeg", ".jpg", ".jpx", ".jxl", ".mpo", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".sgi"}
    | {".tga", ".tif", ".tiff", ".webp"}
)
"""File name suffixes of images.

A file with one of them is always treated as an image, so that a damaged image is reported. Files with other suffixes
are images only if their content is one.
"""
_SIGNATURES: dict[str, tuple[bytes, ...]] = {
    "jpeg": (b"\xff\xd8\xff",),
    "png": (b"\x89PNG\r\n\x1a\n",),
    "gif": (b"GIF87a", b"GIF89a"),
    "tiff": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "bmp": (b"BM",),
    "dib": (b"\x28\0\0\0",),
    "psd": (b"8BPS",),
    "openexr": (b"\x76\x2f\x31\x01",),
    "dpx": (b"SDPX", b"XPDS"),
    "cineon": (b"\x80\x2a\x5f\xd7", b"\xd7\x5f\x2a\x80"),
    "hdr": (b"#?RADIANCE", b"#?RGBE"),
    "jpeg2000": (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
    "jpegxl": (b"\xff\x0a", b"\0\0\0\x0cJXL "),
    "dds": (b"DDS ",),
    "fits": (b"SIMPLE  =",),
    "sgi": (b"\x01\xda",),
    "pnm": (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"PF", b"Pf"),
}
_HEADER_PATTERNS = {
    "bmp": re.compile(rb"BM.{4}\0{4}", re.DOTALL),
    "dib": re.compile(rb"\x28\0\0\0.{8}\x01\0", re.DOTALL),
    "pnm": re.compile(rb"P.(\s|#[^\n]*\n)+\d+\s"),
    "sgi": re.compile(rb"\x01\xda[\0\x01][\x01\x02]"),
}
"""Format whose signature is so short that other files begin with it too -> pattern of a real header."""
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_MOVIE_BRANDS = (b"isom", b"iso2", b"iso5", b"iso6", b"mp41", b"mp42", b"M4V", b"qt  ", b"avc1", b"dash", b"3gp")
_MOVIE_ATOMS = (b"moov", b"mdat", b"wide")
"""First atoms of old QuickTime movies, which have no atom "ftyp"."""
_MOVIE_SIGNATURES = (b"\x1aE\xdf\xa3", b"\x06\x0e+4", b"\0\0\1\xba", b"FLV\1", b"0&\xb2u", b"OggS", b"YUV4MPEG2")
"""Signatures of Matroska and WebM, MXF, MPEG, Flash, Windows Media, Ogg and YUV4MPEG."""
MOVIE_SUFFIXES = frozenset(
    {".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".webm", ".wmv"}
)
"""File name suffixes of movies. They are only used for output names, because an output has no content to check yet."""
_MULTI_FRAME = frozenset({"gif", "webp", "tiff", "avif", "heic"})
"""Formats that may contain several frames or pages. A PNG does if it has an acTL chunk."""


@dataclass(frozen=True)
class FileType:
    """The type of a file, by its first bytes."""

    name: str
    """Name of the image format; "" for a file that is not an image."""
    may_have_frames: bool = False
    """Whether the file may contain several frames or pages."""
    is_icm_output: bool = False
    is_movie: bool = False


UNKNOWN_TYPE = FileType("")


def detect_file_type(head: bytes) -> FileType:
    """Return the type of a file that begins with these bytes."""
    name = _image_format(head)
    may_have_frames = name in _MULTI_FRAME or (name == "png" and b"acTL" in head)
    is_icm_output = name in ("png", "tiff", "openexr") and any(mark in head for mark in ICM_MARKS)
    return FileType(name, may_have_frames, is_icm_output, is_movie=not name and _is_movie(head))


Result = TypeVar("Result")


class ReopeningFile(io.FileIO):
    """A file that is opened again and read on after a transient error, such as a stale handle."""

    def __init__(self, path: Path) -> None:
        retry_transient(lambda: super(ReopeningFile, self).__init__(path))
        self._path = path
        self._state = _size_and_time(os.fstat(self.fileno()))

    def seekable(self) -> bool:
        return True  # FileIO would ask the system, which may fail

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return retry_transient(lambda: super(ReopeningFile, self).seek(offset, whence))

    def readinto(self, buffer: Any, /) -> int:
        return self._retry(lambda: super(ReopeningFile, self).readinto(buffer))

    def readall(self) -> bytes:
        return self._retry(super().readall)

    def _retry(self, read: Callable[[], Result]) -> Result:
        """Return ``read()``. After a transient error, reopen the file at the same position and read again."""
        position = self.seek(0, os.SEEK_CUR)

        def read_or_reopen() -> Result:
            try:
                return read()
            except OSError:
                self._reopen(position)
                raise

        return retry_transient(read_or_reopen)

    def _reopen(self, position: int) -> None:
        """Open the file again under the same descriptor. Raises ImageError if it was replaced.

        If it cannot be opened, the next attempt to read reports the error.
        """
        with contextlib.suppress(OSError), self._path.open("rb", buffering=0) as file:
            if _size_and_time(os.fstat(file.fileno())) != self._state:
                raise ImageError(f"{self._path} was replaced while it was read; run the same command again")
            os.dup2(file.fileno(), self.fileno(), inheritable=False)
            self.seek(position)


class ImageFile:
    """An image file that is open for reading.

    One handle gives the type, the state and the digest of the file, and serves the decoders that read from a stream.
    """

    def __init__(self, path: Path, stream: BufferedReader[Any]) -> None:
        self.path = path
        self._stream = stream
        self.head = stream.read(HEAD_BYTES)
        self.type = detect_file_type(self.head)

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[ImageFile]:
        """Open a file. Raises OSError, and ImageError for a pipe, socket or device, where reading could block."""
        mode = retry_transient(path.stat).st_mode
        if kind := special_file_kind(mode):
            raise ImageError(f"{path} is {kind}; expected an image file")
        with BufferedReader(ReopeningFile(path)) as stream:
            yield cls(path, stream)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def stream(self) -> BufferedReader[Any]:
        """The open handle, rewound to the start of the file."""
        self._stream.seek(0)
        return self._stream

    @property
    def size_bytes(self) -> int:
        return os.fstat(self._stream.fileno()).st_size

    def read_state(self) -> str:
        """Return a text that changes with the file: size, modification time in nanoseconds, and a digest of the head.

        The head usually contains the dimensions and the orientation of the image. A TIFF may store them at its end, so
        its last bytes are part of the digest too.
        """
        status = os.fstat(self._stream.fileno())
        hasher = hashlib.sha256(self.head)
        if self.type.name == "tiff":
            self._stream.seek(max(0, status.st_size - HEAD_BYTES))
            hasher.update(self._stream.read(HEAD_BYTES))
        return f"{_size_and_time(status)} {hasher.hexdigest()[:STATE_DIGEST_DIGITS]}"

    def content_digest(self) -> str:
        """Return the SHA-256 of the file's content as hexadecimal digits. This reads the whole file."""
        return hashlib.file_digest(self.stream, "sha256").hexdigest()


def has_state(path: Path, state: str) -> bool:
    """Return whether a file still has the size and the modification time of this state. Raises OSError."""
    return state.startswith(_size_and_time(path.stat()) + " ")


def movie_message(path: Path) -> str:
    """Return the end of an error message that begins with the path of a movie."""
    command = f"ffmpeg -i {path} frames/%05d.png"
    return f"is a movie, and icm reads images only; extract its frames first, for example: {command}"


def _size_and_time(status: os.stat_result) -> str:
    """Return the start of a state; see :meth:`ImageFile.read_state`."""
    return f"{status.st_size} {status.st_mtime_ns}"


def _is_movie(head: bytes) -> bool:
    """Return whether a file that begins with these bytes is a movie."""
    if head[4:8] == b"ftyp":
        return any(brand in head[8:64] for brand in _MOVIE_BRANDS)
    is_avi = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    # Packets of 188 bytes (MPEG-TS) begin with "G". In M2TS, a time stamp of four bytes precedes each packet.
    is_transport_stream = head[::188].startswith(b"GGG") or head[4::192].startswith(b"GGG")
    is_red = head[4:8] in (b"RED1", b"RED2")
    has_movie_atom = head[4:8] in _MOVIE_ATOMS
    return is_avi or is_transport_stream or is_red or has_movie_atom or head.startswith(_MOVIE_SIGNATURES)


def _image_format(head: bytes) -> str:
    """Return the name of the image format of a file that begins with these bytes; "" for another file."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp":
        brands = head[8:64]
        if b"avif" in brands or b"avis" in brands:
            return "avif"
        return "heic" if any(brand in brands for brand in _HEIC_BRANDS) else ""
    for name, signatures in _SIGNATURES.items():
        if head.startswith(signatures):
            pattern = _HEADER_PATTERNS.get(name)
            return name if pattern is None or pattern.match(head) else ""
    return ""
