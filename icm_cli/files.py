"""Whole files or none: atomic writes, content digests, and the cache folder."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

from icm_cli.errors import ImageError, OutputError

Paths: TypeAlias = str | Path | Sequence[str | Path]
TEMPORARY_PREFIX = ".icm-"
TEMPORARY_SUFFIX = ".tmp"
STALE_AFTER_S = 3600.0
"""A temporary file of another machine counts as left behind by a dead process after this long without a write."""


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a hidden temporary file beside ``path``; on success it is synced and renamed, on failure removed.

    Raises OutputError when the file system refuses (full, read-only, no permission), ImageError when only this
    name is refused.
    """
    temporary = path.parent / temporary_name()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
    except OSError as error:
        raise write_error(path, error) from error


def temporary_name() -> str:
    """A name for a hidden file that a later run removes, should this process die before it does."""
    return f"{TEMPORARY_PREFIX}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"


def write_error(path: Path, error: OSError) -> ImageError | OutputError:
    """The sentence for an output that the file system refuses; an ImageError where others could still be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{path} cannot be written: no space left on the device; free some and run the same command again, "
            "it goes on where it stopped"
        )
    reason = error.strerror or str(error)
    if error.errno in (errno.ENAMETOOLONG, errno.EISDIR, errno.EILSEQ):
        return ImageError(
            f"{path} cannot be written: {reason}; this file name is not allowed there; the other images go on"
        )
    return OutputError(f"{path} cannot be written: {reason}; give an output location you can write to")


def remove_stale_temporaries(folder: Path) -> int:
    """Remove temporary files that dead processes of ours left in ``folder`` itself; returns how many."""
    removed = 0
    for path in folder.glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            if _is_stale(path):
                path.unlink()
                removed += 1
    return removed


def _is_stale(path: Path) -> bool:
    host, _, rest = path.name.removeprefix(TEMPORARY_PREFIX).rpartition("-")[0].rpartition("-")
    if host == socket.gethostname() and rest.isdigit():
        return not _is_running(int(rest))
    return time.time() - path.stat().st_mtime > STALE_AFTER_S


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def digest_of(*parts: bytes | str) -> str:
    """SHA-256 of the parts, each told apart from the next, as hexadecimal digits."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()


def content_digest(path: Path) -> str:
    """SHA-256 of a file's content; remembered in the cache by path, size and time, as weights are gigabytes."""
    state = path.stat()
    key = digest_of(str(path.resolve()), str(state.st_size), str(state.st_mtime_ns), str(state.st_ino))
    remembered = cache_folder() / "digests" / key
    with contextlib.suppress(OSError):
        digest = remembered.read_text()
        if len(digest) == 64:
            return digest
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(OutputError), atomic_write(remembered) as out:
        out.write(digest.encode())
    return digest


@functools.cache
def cache_folder() -> Path:
    """Folder of files that can be made again: $ICM_CACHE, else $XDG_CACHE_HOME/icm, else ~/.cache/icm.

    Falls back to a folder of this user's under the temporary directory where none of those can be written (farm
    nodes often have no home).
    """
    for folder in _cache_candidates():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"icm-{user}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != user:
        return Path(tempfile.mkdtemp(prefix="icm-"))  # somebody else's, perhaps put there to be run
    return folder


def _cache_candidates() -> Iterator[Path]:
    if "ICM_CACHE" in os.environ:
        yield Path(os.environ["ICM_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        yield Path(os.environ["XDG_CACHE_HOME"]) / "icm"
    with contextlib.suppress(RuntimeError):  # a user without a home, as in many containers
        yield Path.home() / ".cache" / "icm"


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as JSON, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")


def as_paths(value: Paths) -> list[Path]:
    """One or several paths -> a list."""
    return [Path(value)] if isinstance(value, (str, Path)) else [Path(one) for one in value]


def as_path(value: str | Path | None) -> Path | None:
    """A path where one is given."""
    return None if value is None else Path(value)
