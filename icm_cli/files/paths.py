"""Checks of paths, and the search of folders and globs for files."""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from icm_cli.errors import UsageError, shorten
from icm_cli.files.atomic_writes import TEMPORARY_PREFIX
from icm_cli.files.system_errors import is_transient

RECORD_FOLDER = ".icm"
"""Folder below the alphas of a run with the options of the run and the state of its review.

No command searches it for files.
"""
MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4095
SERVICE_FOLDERS = frozenset({"@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "__MACOSX"})
"""Folders that storage servers and archivers create: thumbnails, recycle bins, snapshots, resource forks."""
HIDDEN = "hidden"
LINK_INTO_TREE = "a link to a folder of the same tree, whose files are found there"
LINK_LOOP = "a link to a folder that contains it"
UNREADABLE = "a folder that cannot be read"
SkippedPaths: TypeAlias = dict[str, list[Path]]
"""Paths that a walk skips, by reason: files, links to folders, and folders that cannot be read."""
LIST_SUFFIXES = frozenset({".txt", ".lst", ".list"})
"""Suffixes of lists of paths."""
ROOT_MARK = "/./"
"""Ends the root in a line of a list, as for ``rsync -R``: in ``/plates/./sh010/a.png`` it is ``/plates``."""


def is_file(path: str | Path) -> bool:
    """Return whether a path is a file; False for a path that cannot be one, such as a name that is too long."""
    return os.path.isfile(path)  # noqa: PTH113  Path.is_file raises errors


def special_file_kind(mode: int) -> str:
    """Return what a file with this mode is; "" for a regular file or folder."""
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return ""
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def describe_obstacle(path: str | Path) -> str:
    """Return what prevents writing a file at a path, such as "a folder" or "a pipe" that is there.

    Returns "" for a regular file or a link to one, and if the path does not exist.
    """
    if is_file(path) or not os.path.lexists(path):
        return ""
    if os.path.isdir(path):  # noqa: PTH112  Path.is_dir raises errors
        return "a folder"
    if not os.path.exists(path):  # noqa: PTH110  Path.exists raises errors
        return "a link to a file that does not exist"
    return special_file_kind(os.stat(path).st_mode)  # noqa: PTH116


def check_path(text: str | Path, name: str) -> None:
    """Raise UsageError for a text that cannot be a path. ``name``: its option, for the message."""
    text = str(text)
    short = shorten(text)
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} {short!r} has characters that no file name has ({error.reason})") from error
    if b"\0" in data:
        raise UsageError(f"{name} {short!r} has a NUL character; expected a path")
    if is_too_long(data):
        longest = max(map(len, data.split(os.sep.encode())))
        has_lines = len(text.split()) > 1
        remedy = "; give several files as a text list, or as lines on standard input" if has_lines else ""
        raise UsageError(
            f"{name} {short!r} is too long for a path: it has {len(data)} bytes, and its longest name {longest}; "
            f"expected at most {MAX_PATH_BYTES}, and {MAX_NAME_BYTES} in a name{remedy}"
        )


def is_too_long(path: bytes) -> bool:
    """Return whether no drive has a file of this path."""
    return len(path) > MAX_PATH_BYTES or max(map(len, path.split(os.sep.encode()))) > MAX_NAME_BYTES


def walk_files(folder: Path, skipped: SkippedPaths, trees: Sequence[str] = ()) -> Iterator[Path]:
    """Yield every file below a folder that is not hidden, and add skipped paths to ``skipped``.

    A link to a folder outside the tree is followed. A link into a tree that is walked anyway is skipped, because its
    files are found there. A link to a folder that contains it is skipped. ``trees``: used by the recursion; the real
    folders whose walk led to this one through links, outermost first.
    """
    trees = (*trees, os.path.realpath(folder))

    def report_unreadable(error: OSError) -> None:
        if is_transient(error):  # the images in it are expected to be matted
            raise error
        skipped.setdefault(UNREADABLE, []).append(Path(error.filename))

    for parent, folders, files in os.walk(folder, onerror=report_unreadable):
        folders[:] = [name for name in folders if name != RECORD_FOLDER]
        for name in list(folders):
            path = Path(parent) / name
            if reason := _skip_reason(path, trees):
                folders.remove(name)  # os.walk does not enter it
                skipped_paths = [path] if reason in (LINK_INTO_TREE, LINK_LOOP) else _files_below(path)
                skipped.setdefault(reason, []).extend(skipped_paths)
            elif path.is_symlink():
                folders.remove(name)
                yield from walk_files(path, skipped, trees)
        for name in files:
            if not name.startswith("."):
                yield Path(parent) / name
            elif not name.startswith(TEMPORARY_PREFIX):
                skipped.setdefault(HIDDEN, []).append(Path(parent) / name)


def expand_glob(pattern: str, skipped: SkippedPaths) -> Iterator[Path]:
    """Yield the files that a glob matches. ``**`` matches folders as :func:`walk_files` finds them.

    A folder that exists is read literally, even with brackets in its name.
    """
    fixed, parts = split_glob(pattern)
    before_stars = parts[: parts.index("**")] if "**" in parts else parts
    from_stars = parts[len(before_stars) :]
    matches = map(Path, glob.iglob(os.path.join(glob.escape(fixed), *before_stars)))  # noqa: PTH118
    if not from_stars:
        yield from (path for path in matches if path.is_file())
        return
    for folder in matches if before_stars else [Path(fixed)]:
        if folder.is_dir():
            for path in walk_files(folder, skipped):
                if _matches_parts(path.relative_to(folder).parts, from_stars):
                    yield path


def split_glob(pattern: str) -> tuple[str, tuple[str, ...]]:
    """Return the path of the leading parts that have no wildcards or exist, and the parts after them."""
    parts = Path(pattern).parts
    fixed = ""
    for number, part in enumerate(parts):
        extended = os.path.join(fixed, part)  # noqa: PTH118  a Path cannot be empty
        if glob.has_magic(part) and not os.path.lexists(extended):
            return fixed, parts[number:]
        fixed = extended
    return fixed, ()


def _skip_reason(path: Path, trees: Sequence[str]) -> str:
    """Return the reason to skip a folder, "" if it is walked. ``trees``: as in :func:`walk_files`."""
    if path.is_symlink():
        target = Path(os.path.realpath(path))
        if any(Path(tree).is_relative_to(target) for tree in trees):
            return LINK_LOOP
        if any(target.is_relative_to(tree) and _is_searched(target.relative_to(tree).parts) for tree in trees):
            return LINK_INTO_TREE
    if path.name.startswith("."):
        return HIDDEN
    if path.name in SERVICE_FOLDERS:
        return f"in {path.name}, a folder that a storage server or archiver created"
    return ""


def _is_searched(parts: Iterable[str]) -> bool:
    """Return whether no part of a path is hidden or a service folder."""
    return not any(part.startswith(".") or part in SERVICE_FOLDERS for part in parts)


def _files_below(folder: Path) -> list[Path]:
    """Return all files below a folder, also hidden ones, except temporary files."""
    paths = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    return [path for path in paths if not path.name.startswith(TEMPORARY_PREFIX)]


def _matches_parts(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return whether the parts of a path match the parts of a glob. ``**`` matches any number of parts."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_matches_parts(names[count:], patterns[1:]) for count in range(len(names) + 1))
    if not names:
        return False
    return fnmatch.fnmatch(names[0], patterns[0]) and _matches_parts(names[1:], patterns[1:])
