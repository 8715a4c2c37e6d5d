"""Digests of texts and files, and the cache folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from icm_cli.errors import OutputError
from icm_cli.files.atomic_writes import atomic_write


def combined_digest(*parts: bytes | str) -> str:
    """Return the SHA-256 of the parts as hexadecimal digits. Parts that are divided differently have another digest."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()


def cached_file_digest(path: Path) -> str:
    """Return the SHA-256 of a file. It is cached by path, size and time, because weights are large."""
    state = path.stat()
    key = combined_digest(str(path.resolve()), str(state.st_size), str(state.st_mtime_ns), str(state.st_ino))
    cached = cache_folder() / "digests" / key
    with contextlib.suppress(OSError):
        digest = cached.read_text()
        if len(digest) == 64:
            return digest
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(OutputError), atomic_write(cached) as out:
        out.write(digest.encode())
    return digest


@functools.cache
def cache_folder() -> Path:
    """Return the first of these that is writable: $ICM_CACHE, $XDG_CACHE_HOME/icm, ~/.cache/icm, a temporary folder."""
    for folder in _cache_candidates():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    folder = Path(tempfile.gettempdir()) / f"icm-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    is_own = folder.stat().st_uid == os.getuid()  # the content of another user's folder is not trusted
    return folder if is_own else Path(tempfile.mkdtemp(prefix="icm-"))


def _cache_candidates() -> Iterator[Path]:
    if "ICM_CACHE" in os.environ:
        yield Path(os.environ["ICM_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        yield Path(os.environ["XDG_CACHE_HOME"]) / "icm"
    with contextlib.suppress(RuntimeError):  # a user without a home folder, as in many containers
        yield Path.home() / ".cache" / "icm"
