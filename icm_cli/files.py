"""Whole files or none, digests, the cache folder; and files below folders and of globs, by links too."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import glob
import hashlib
import json
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

from icm_cli.errors import ImageError, OutputError

Paths: TypeAlias = str | Path | Sequence[str | Path]
TEMPORARY_PREFIX = ".icm-"
TEMPORARY_SUFFIX = ".tmp"
STALE_AFTER_S = 3600.0
"""A temporary file of another machine counts as left behind by a dead process after this long without a write."""
SERVICE_FOLDERS = frozenset({"@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "__MACOSX"})
"""Folders that storage servers and archivers make for themselves: thumbnails, bins, snapshots, resource forks."""
HIDDEN = "hidden"
LINKED = "a link to a folder of the same tree, whose files have their places there"
AROUND = "a link to a folder that holds it, a loop"
UNREADABLE = "a folder that cannot be read"

SkippedPaths: TypeAlias = dict[str, list[Path]]
"""Everything that a walk passed by, by reason: files, links to folders, and folders that cannot be read."""


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


def combined_digest(*parts: bytes | str) -> str:
    """SHA-256 of the parts, each told apart from the next, as hexadecimal digits."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()


def cached_file_digest(path: Path) -> str:
    """SHA-256 of a file's content; remembered in the cache by path, size and time, as weights are gigabytes."""
    state = path.stat()
    key = combined_digest(str(path.resolve()), str(state.st_size), str(state.st_mtime_ns), str(state.st_ino))
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


def walk_files(folder: Path, passed: SkippedPaths, trees: Sequence[str] = ()) -> Iterator[Path]:
    """Every file below a folder that is not hidden.

    A link to a folder elsewhere is a folder of its own. One into a tree that is walked already is passed by, whatever
    its name: the files have their real places; so is one to a folder that holds it. ``trees``: the real folders of the
    links that led here, the first first.
    """
    trees = (*trees, os.path.realpath(folder))

    def unreadable(error: OSError) -> None:
        passed.setdefault(UNREADABLE, []).append(Path(error.filename))

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        for name in list(folders):
            path = Path(parent) / name
            if reason := _why_passed(path, trees):
                folders.remove(name)
                passed.setdefault(reason, []).extend([path] if reason in (LINKED, AROUND) else _files_below(path))
            elif path.is_symlink():
                folders.remove(name)
                yield from walk_files(path, passed, trees)
        shown = [name for name in files if not name.startswith(".")]
        if len(shown) < len(files):
            own = {*shown, *(name for name in files if name.startswith(TEMPORARY_PREFIX))}
            passed.setdefault(HIDDEN, []).extend(Path(parent) / name for name in files if name not in own)
        yield from (Path(parent) / name for name in shown)


def expand_glob(pattern: str, passed: SkippedPaths) -> Iterator[Path]:
    """Files that a glob matches; a folder whose name has brackets and exists is taken literally.

    ``**`` stands for any folders below, found as a walk finds them.
    """
    fixed, rest = split_glob(pattern)
    plain = rest[: rest.index("**")] if "**" in rest else rest
    found = map(Path, glob.iglob(os.path.join(glob.escape(fixed), *plain)))  # noqa: PTH118
    if plain == rest:
        yield from (path for path in found if path.is_file())
        return
    for folder in found if plain else [Path(fixed)]:
        if folder.is_dir():
            below = walk_files(folder, passed)
            yield from (path for path in below if _fits(path.relative_to(folder).parts, rest[len(plain) :]))


def split_glob(pattern: str) -> tuple[str, tuple[str, ...]]:
    """The folder that exists or has no wildcards, and the parts after it."""
    parts = Path(pattern).parts
    fixed = ""
    for number, part in enumerate(parts):
        longer = os.path.join(fixed, part)  # noqa: PTH118  a Path would lose the empty one
        if glob.has_magic(part) and not os.path.lexists(longer):
            return fixed, parts[number:]
        fixed = longer
    return fixed, ()


def _why_passed(path: Path, trees: Sequence[str]) -> str:
    """The reason for which a folder is not walked; "" for one that is."""
    if path.is_symlink():
        target = Path(os.path.realpath(path))
        if any(Path(tree).is_relative_to(target) for tree in trees):
            return AROUND
        if any(target.is_relative_to(tree) and _is_walked(target.relative_to(tree).parts) for tree in trees):
            return LINKED
    if path.name.startswith("."):
        return HIDDEN
    return f"in {path.name}, a folder of a storage server or archiver" if path.name in SERVICE_FOLDERS else ""


def _is_walked(parts: Iterable[str]) -> bool:
    return not any(part.startswith(".") or part in SERVICE_FOLDERS for part in parts)


def _files_below(folder: Path) -> list[Path]:
    found = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    return [path for path in found if not path.name.startswith(TEMPORARY_PREFIX)]


def _fits(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a glob."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_fits(names[skipped:], patterns[1:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatch(names[0], patterns[0]) and _fits(names[1:], patterns[1:])
