"""Sources: which files are to be matted, the root that their alphas' tree mirrors, and what is left out."""

from __future__ import annotations

import functools
import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from icm_cli.errors import UsageError
from icm_cli.files import SkippedPaths, expand_glob, split_glob, walk_files
from icm_cli.images.kinds import IMAGE_SUFFIXES, FileType, detect_file_type, movie_message
from icm_cli.matting.frames import FramePattern

LIST_SUFFIXES = frozenset({".txt", ".lst", ".list"})
EXPECTED = "expected a folder, an image, a quoted glob, a frame pattern such as shot.####.exr, a text list or -"
A_MOVIE = "a movie"
ADVICE = {A_MOVIE: "; write its frames first, for example with ffmpeg"}
"""Further words of a notice, by the reason that is counted."""
MAX_LISTED_FILES = 8
"""Files named one by one in an error."""


class SkippedFiles(Counter[str]):
    """Files that are not matted, counted by reason; each reason is told once, with the first of its files."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        super().__init__()
        self.notify = notice

    def add(self, paths: Sequence[Path], reason: str, *, is_reported: bool = True) -> None:
        """Count files of one reason, and say so."""
        self[reason] += len(paths)
        if paths and is_reported:
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            self.notify(f"{min(paths)}{more} left out: {reason}{ADVICE.get(reason, '')}")

    def exclude(
        self, paths: Sequence[Path], is_excluded: Callable[[Path], bool], reason: str, *, is_reported: bool = True
    ) -> list[Path]:
        """The paths but for those that ``is_excluded`` says."""
        dropped = {path for path in paths if is_excluded(path)}
        self.add(sorted(dropped), reason, is_reported=is_reported)
        return [path for path in paths if path not in dropped]

    def add_skipped_paths(self, passed: SkippedPaths) -> None:
        """Count and tell what a walk passed by."""
        for reason, paths in passed.items():
            self.add(paths, reason)

    def keep_images(self, paths: Sequence[Path], passed: SkippedPaths) -> list[Path]:
        """The pictures of a walk, which passed others by."""
        self.add_skipped_paths(passed)
        unknown = {path: file_type_or_unknown(path) for path in paths if path.suffix.lower() not in IMAGE_SUFFIXES}
        still = self.exclude(paths, lambda path: path in unknown and unknown[path].is_movie, A_MOVIE)
        return self.exclude(still, lambda path: path in unknown and not unknown[path].name, "no picture")


@dataclass(frozen=True)
class Sources:
    """Files in the order of their names, numbers counted as numbers, all below ``root``."""

    root: Path
    files: Sequence[Path]
    is_sequence: bool = False
    """Whether they were named by a frame pattern."""


def find_sources(src: str | Path, root: Path | None, skipped_files: SkippedFiles) -> Sources:
    """Find the files that ``src`` names.

    The root is the folder itself; of a file its folder, of a glob or frame pattern its fixed part, of a list the
    working directory; ``root`` overrides it. It depends on no other file of the run, so neither does an alpha's place.
    Raises UsageError, for files outside the root too.
    """
    own, files, is_sequence = _find(src, skipped_files)
    if root is not None:
        if not root.is_dir():
            raise UsageError(f"--root {root} is no folder; expected the folder that the sources lie below")
        files = [Path(os.path.abspath(path)) for path in files]  # noqa: PTH100  resolve() would rename links
        own = Path(os.path.abspath(root))  # noqa: PTH100
    if not files:
        named = "standard input" if str(src) == "-" else src
        raise UsageError(
            f"no images were found in {named}; expected at least one of "
            f"{', '.join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))}"
        )
    outside = [path for path in files if not path.is_relative_to(own)]
    if outside:
        named = ", ".join(map(str, outside[:MAX_LISTED_FILES])) + (", ..." if len(outside) > MAX_LISTED_FILES else "")
        raise UsageError(
            f"{len(outside)} of the images lie outside {own}, which their alphas' places are told from: {named}; give "
            "--root with a folder that holds all of them"
        )
    signed = [path for path in files if re.search(r"[._]-[0-9]+$", path.stem)]
    if signed:
        more = f" and {len(signed) - 1} more" if len(signed) > 1 else ""
        skipped_files.notify(
            f"{min(signed, key=natural_sort_key)}{more}: numbers below 0 are not known, so the - counts for a part "
            "of the name; number frames from 0"
        )
    return Sources(own, sorted(set(files), key=natural_sort_key), is_sequence)


def natural_sort_key(path: Path) -> list[list[tuple[int, int, str]]]:
    """Sorting key of a path: numbers in it count as numbers, so that a9 comes before a10."""
    return [_natural_name(name) for name in path.parts]


@functools.lru_cache(maxsize=1024)
def _natural_name(name: str) -> list[tuple[int, int, str]]:
    """Sorting key of one part of a path; folders have many files."""
    return [(0, int(part), part) if part.isascii() and part.isdigit() else (1, 0, part) for part in _split(name)]


def real_path(path: Path) -> Path:
    """Links followed; unlike ``Path.resolve`` a link to itself is no error here, it fails when it is read."""
    return Path(os.path.realpath(path))


def file_type_or_unknown(path: Path) -> FileType:
    """The kind by content; one that cannot be read is told when it is matted."""
    try:
        return detect_file_type(path)
    except OSError:
        return FileType("")


def _split(name: str) -> list[str]:
    return [part for part in re.split(r"(\d+)", name) if part]


def _find(src: str | Path, skipped_files: SkippedFiles) -> tuple[Path, list[Path], bool]:
    """The root, the files, and whether a frame pattern named them."""
    text, path = str(src), Path(src)
    if not text:
        raise UsageError(f"the source is empty; {EXPECTED}")
    if text == "-":
        return *_listed(sys.stdin or (), "standard input", skipped_files), False
    if path.is_dir():
        passed: SkippedPaths = {}
        return path, skipped_files.keep_images(list(walk_files(path, passed)), passed), False
    if path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"the list {path} cannot be read ({error}); expected UTF-8 text, one path per line"
            ) from error
        return *_listed(lines, str(path), skipped_files), False
    if path.is_file():
        return path.parent, [_no_movie(path)], False
    if (pattern := FramePattern.parse(text)) is not None:
        return *_sequence(pattern, text, skipped_files), True
    if glob.has_magic(text):
        passed = {}
        files = list(expand_glob(text, passed))
        if not files:
            raise UsageError(
                f"no file matches {text}; it does not exist as it stands, so its *, ? and [] were taken as wildcards"
            )
        return Path(split_glob(text)[0]), skipped_files.keep_images(files, passed), False
    raise UsageError(f"source {text} does not exist; {EXPECTED}")


def _no_movie(path: Path) -> Path:
    if file_type_or_unknown(path).is_movie:
        raise UsageError(f"source {path} {movie_message(path)}")
    return path


def _sequence(pattern: FramePattern, text: str, skipped_files: SkippedFiles) -> tuple[Path, list[Path]]:
    passed: SkippedPaths = {}
    folder = Path(pattern.folder)
    files = folder.iterdir() if folder.is_dir() else expand_glob(str(folder / "*"), passed)
    names: dict[str, list[Path]] = {}
    for path in files:
        names.setdefault(path.name, []).append(path)
    if not pattern.matching_names(names) and pattern.escape_wildcards().matching_names(names):
        pattern = pattern.escape_wildcards()
    found = [path for name in pattern.matching_names(names) for path in names[name] if path.is_file()]
    others = [path for name in pattern.names_with_other_numbers(names) for path in names[name] if path.is_file()]
    skipped_files.add(others, f"a number that {Path(text).name} does not fit, by its sign or its digits")
    skipped_files.add_skipped_paths(passed)
    if not found:
        raise UsageError(
            f"no file matches {text}; its name was taken as a pattern of frames, with {pattern.digits} or more digits"
        )
    return Path(split_glob(pattern.folder)[0]), found


def _listed(lines: Iterable[str], where: str, skipped_files: SkippedFiles) -> tuple[Path, list[Path]]:
    """The working directory, and the files of a list in it; folders among them are left out."""
    paths = [Path(line.strip()) for line in lines if line.strip()]
    if not paths:
        raise UsageError(f"{where} lists no images; expected one path per line")
    if any("\0" in str(path) for path in paths):
        raise UsageError(f"{where} has NUL characters; expected one path per line (find -print, not -print0)")
    absolute = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100  resolve() would rename links
    files = skipped_files.exclude(absolute, Path.is_dir, "a folder in a list, whose files were not listed")
    return Path.cwd(), files
