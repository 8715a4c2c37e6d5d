"""Sources: which files are to be matted, the root that their alphas' tree mirrors, and what is left out."""

from __future__ import annotations

import functools
import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from icm_cli.errors import UsageError
from icm_cli.files import TEMPORARY_PREFIX
from icm_cli.images.kinds import IMAGE_SUFFIXES, Kind, kind_of
from icm_cli.matting.frames import FramePattern

SERVICE_FOLDERS = frozenset({"@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "__MACOSX"})
"""Folders that storage servers and archivers make for themselves: thumbnails, bins, snapshots, resource forks."""
LIST_SUFFIXES = frozenset({".txt", ".lst", ".list"})
EXPECTED = "expected a folder, an image, a quoted glob, a frame pattern such as shot.####.exr, a text list or -"
MOST_NAMED = 8
"""Files named one by one in an error."""


class LeftOut(Counter[str]):
    """Files that are not matted, counted by reason; each reason is told once, with the first of its files."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        super().__init__()
        self.tell = notice

    def add(self, paths: Sequence[Path], reason: str, *, is_told: bool = True) -> None:
        """Count files of one reason, and say so."""
        self[reason] += len(paths)
        if paths and is_told:
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            self.tell(f"{min(paths)}{more} left out: {reason}")

    def without(
        self, paths: Sequence[Path], is_dropped: Callable[[Path], bool], reason: str, *, is_told: bool = True
    ) -> list[Path]:
        """The paths but for those that ``is_dropped`` says."""
        dropped = {path for path in paths if is_dropped(path)}
        self.add(sorted(dropped), reason, is_told=is_told)
        return [path for path in paths if path not in dropped]


@dataclass(frozen=True)
class Sources:
    """Files in the order of their names, numbers counted as numbers, all below ``root``."""

    root: Path
    files: Sequence[Path]
    is_sequence: bool = False
    """Whether they were named by a frame pattern."""


def find_sources(src: str | Path, root: Path | None, left_out: LeftOut) -> Sources:
    """Find the files that ``src`` names.

    The root is the folder itself; of a file its folder, of a glob or frame pattern its fixed part, of a list the
    working directory; ``root`` overrides it. It depends on no other file of the run, so neither does an alpha's place.
    Raises UsageError, for files outside the root too.
    """
    own, files, is_sequence = _find(src, left_out)
    if root is not None:
        if not root.is_dir():
            raise UsageError(f"--root {root} is no folder; expected the folder that the sources lie below")
        files = [Path(os.path.abspath(path)) for path in files]  # noqa: PTH100  resolve() would rename links
        own = Path(os.path.abspath(root))  # noqa: PTH100
    outside = [path for path in files if not path.is_relative_to(own)]
    if outside:
        named = ", ".join(map(str, outside[:MOST_NAMED])) + (", ..." if len(outside) > MOST_NAMED else "")
        raise UsageError(
            f"{len(outside)} of the images lie outside {own}, which their alphas' places are told from: {named}; give "
            "--root with a folder that holds all of them"
        )
    return Sources(own, sorted(set(files), key=natural), is_sequence)


def natural(path: Path) -> list[list[tuple[int, int, str]]]:
    """Sorting key of a path: numbers in it count as numbers, so that a9 comes before a10."""
    return [_natural_name(name) for name in path.parts]


@functools.lru_cache(maxsize=1024)
def _natural_name(name: str) -> list[tuple[int, int, str]]:
    """Sorting key of one part of a path; folders have many files."""
    return [(0, int(part), part) if part.isascii() and part.isdigit() else (1, 0, part) for part in _split(name)]


def real(path: Path) -> Path:
    """Links followed; unlike ``Path.resolve`` a link to itself is no error here, it fails when it is read."""
    return Path(os.path.realpath(path))


def look_at(path: Path) -> Kind:
    """The kind by content; one that cannot be read is told when it is matted."""
    try:
        return kind_of(path)
    except OSError:
        return Kind("")


def expanded(pattern: str) -> Iterator[str]:
    """Paths that a glob matches; a folder whose name has brackets and exists is taken literally."""
    fixed, rest = _split_fixed(pattern)
    yield from glob.iglob(os.path.join(glob.escape(fixed), *rest), recursive=True)  # noqa: PTH118


def _split(name: str) -> list[str]:
    return [part for part in re.split(r"(\d+)", name) if part]


def _split_fixed(pattern: str) -> tuple[str, tuple[str, ...]]:
    """The folder that exists or has no wildcards, and the parts after it."""
    parts = Path(pattern).parts
    fixed = ""
    for number, part in enumerate(parts):
        longer = os.path.join(fixed, part)  # noqa: PTH118  a Path would lose the empty one
        if glob.has_magic(part) and not os.path.lexists(longer):
            return fixed, parts[number:]
        fixed = longer
    return fixed, ()


def _find(src: str | Path, left_out: LeftOut) -> tuple[Path, list[Path], bool]:
    """The root, the files, and whether a frame pattern named them."""
    text, path = str(src), Path(src)
    if not text:
        raise UsageError(f"the source is empty; {EXPECTED}")
    if text == "-":
        return *_listed(sys.stdin or (), "standard input", left_out), False
    if path.is_dir():
        found = left_out.without(list(_walk(path, left_out)), lambda file: not _is_picture(file), "no picture")
        return path, found, False
    if path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"the list {path} cannot be read ({error}); expected UTF-8 text, one path per line"
            ) from error
        return *_listed(lines, str(path), left_out), False
    if path.is_file():
        return path.parent, [path], False
    if (pattern := FramePattern.parsed(text)) is not None:
        return *_sequence(pattern, text), True
    if glob.has_magic(text):
        files = [Path(match) for match in expanded(text) if Path(match).is_file()]
        if not files:
            raise UsageError(
                f"no file matches {text}; it does not exist as it stands, so its *, ? and [] were taken as wildcards"
            )
        root = Path(_split_fixed(text)[0])
        return root, left_out.without(files, lambda file: not _is_picture(file), "no picture"), False
    raise UsageError(f"source {text} does not exist; {EXPECTED}")


def _sequence(pattern: FramePattern, text: str) -> tuple[Path, list[Path]]:
    folders = [pattern.folder] if Path(pattern.folder).is_dir() else list(expanded(pattern.folder))
    found = []
    for folder in map(Path, folders):
        if folder.is_dir():
            found += [folder / name for name in pattern.matching(path.name for path in folder.iterdir())]
    if not found:
        raise UsageError(
            f"no file matches {text}; its name was taken as a pattern of frames, with {pattern.digits} or more digits"
        )
    return Path(_split_fixed(pattern.folder)[0]), [path for path in found if path.is_file()]


def _is_picture(path: Path) -> bool:
    """Whether a file is a picture by its ending or by its content."""
    return path.suffix.lower() in IMAGE_SUFFIXES or bool(look_at(path).name)


def _walk(folder: Path, left_out: LeftOut) -> Iterable[Path]:
    """Every file below a folder that is not hidden; links to folders are followed, each folder entered once."""
    entered = {os.path.realpath(folder)}
    hidden: list[Path] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        for name in sorted(folders):
            inside = os.path.realpath(Path(parent) / name)
            if inside in entered:
                folders.remove(name)
            elif name.startswith("."):
                folders.remove(name)
                hidden += _files_below(Path(parent) / name)
            elif name in SERVICE_FOLDERS:
                folders.remove(name)
                left_out.add(_files_below(Path(parent) / name), f"in {name}, a folder of a storage server or archiver")
            entered.add(inside)
        hidden += [Path(parent) / name for name in files if name.startswith(".")]
        yield from (Path(parent) / name for name in files if not name.startswith("."))
    left_out.add([path for path in hidden if not path.name.startswith(TEMPORARY_PREFIX)], "hidden")


def _files_below(folder: Path) -> list[Path]:
    return [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]


def _listed(lines: Iterable[str], where: str, left_out: LeftOut) -> tuple[Path, list[Path]]:
    """The working directory, and the files of a list in it; folders among them are left out."""
    paths = [Path(line.strip()) for line in lines if line.strip()]
    if not paths:
        raise UsageError(f"{where} lists no images; expected one path per line")
    if any("\0" in str(path) for path in paths):
        raise UsageError(f"{where} has NUL characters; expected one path per line (find -print, not -print0)")
    absolute = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100  resolve() would rename links
    files = left_out.without(absolute, Path.is_dir, "a folder in a list, whose files were not listed")
    return Path.cwd(), files
