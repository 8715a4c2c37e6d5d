"""Find the files that ``--src`` names, and the root below which output paths mirror them."""

from __future__ import annotations

import codecs
import functools
import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from icm_cli.errors import UsageError, list_first
from icm_cli.files.paths import (
    LIST_SUFFIXES,
    ROOT_MARK,
    SkippedPaths,
    expand_glob,
    special_file_kind,
    split_glob,
    walk_files,
)
from icm_cli.files.system_errors import describe_os_error, retry_transient
from icm_cli.images.decoding import SourceFile
from icm_cli.images.image_file import IMAGE_SUFFIXES, movie_message
from icm_cli.matting.frames import FramePattern

EXPECTED_SOURCE = "expected a folder, an image, a quoted glob, a frame pattern such as shot.####.exr, a text list or -"
A_MOVIE = "a movie"
NOT_AN_IMAGE = "not an image"
UNREADABLE_FILE = "not readable for this user"
ADVICE = {A_MOVIE: "; extract its frames first, for example with ffmpeg"}
"""Advice about skipped files, by reason."""
NUL_PICTURE = "\u2400"
"""The character that shows NUL. It replaces NUL in lists, because no path may contain NUL."""
MAX_LISTED_FILES = 8
"""Largest number of files that an error lists."""


class SkippedFiles(Counter[str]):
    """Files that are not matted, counted by reason. A notice names the first file of each reason."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        super().__init__()
        self.notify = notice

    def add(self, paths: Sequence[Path], reason: str, *, is_reported: bool = True) -> None:
        """Count files that are skipped for a reason, and give a notice."""
        self[reason] += len(paths)
        if paths and is_reported:
            self.notify(f"{list_first(sorted(paths))} skipped: {reason}{ADVICE.get(reason, '')}")

    def exclude(
        self, paths: Collection[Path], is_excluded: Callable[[Path], bool], reason: str, *, is_reported: bool = True
    ) -> list[Path]:
        """Count the paths for which ``is_excluded`` is true, with a reason, and return the other paths."""
        excluded = {path for path in paths if is_excluded(path)}
        self.add(sorted(excluded), reason, is_reported=is_reported)
        return [path for path in paths if path not in excluded]

    def add_skipped_paths(self, skipped: SkippedPaths) -> None:
        """Count and report what :func:`icm_cli.files.paths.walk_files` has skipped."""
        for reason, paths in skipped.items():
            self.add(paths, reason)


@dataclass(frozen=True)
class Sources:
    """Source files below ``root``, sorted by name with numbers compared as numbers."""

    root: Path
    files: Sequence[Path]
    is_sequence: bool = False
    """Whether ``--src`` is a frame pattern."""
    inspected: Mapping[Path, SourceFile] = field(default_factory=dict)
    """Headers of those files that were already opened to find out whether they are images."""


def find_sources(
    src: str | Path,
    root: Path | None,
    skipped_files: SkippedFiles,
    is_ignored: Callable[[Path, Path], bool] = lambda path, folder: False,  # noqa: ARG005
) -> Sources:
    """Find the files that ``src`` names. Raises UsageError if there are none, or if images are outside the root.

    The root is ``root`` if it is given. Otherwise it depends on ``src``:

    - a folder: that folder;
    - a file: its folder;
    - a glob or frame pattern: the folder before the first wildcard;
    - a list: the part of its lines before ROOT_MARK, else the working directory.

    So the root, and with it every output path, does not depend on which files exist. ``is_ignored(path, folder)``:
    whether a file that was found in a folder is not a source.
    """
    sources = _find_files(src, skipped_files, is_ignored)
    if root is not None:
        sources = _change_root(sources, root)
    if not sources.files:
        where = "standard input" if str(src) == "-" else src
        raise UsageError(
            f"no images were found in {where}; expected at least one of "
            f"{', '.join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))}"
        )
    inspected_outside = _inspect_files_outside_root(sources)
    signed = sorted(filter(_has_signed_number, sources.files), key=natural_sort_key)
    if signed:
        skipped_files.notify(
            f"{list_first(signed)}: negative frame numbers are not supported, "
            "so the - is read as part of the name; number frames from 0"
        )
    files = sorted(set(sources.files), key=natural_sort_key)
    return replace(sources, files=files, inspected={**sources.inspected, **inspected_outside})


def _has_signed_number(path: Path) -> bool:
    """Return whether a file has a negative frame number, such as a.-5.png."""
    return re.search(r"[._]-[0-9]+$", path.stem) is not None


def _change_root(sources: Sources, root: Path) -> Sources:
    """Return sources below another root, with absolute paths. Raises UsageError if the root is not a folder."""
    if not root.is_dir():
        raise UsageError(f"--root {root} is not a folder; expected a folder that contains the sources")
    absolute = {path: _absolute_path(path) for path in sources.files}
    inspected = {absolute[path]: file for path, file in sources.inspected.items() if path in absolute}
    return replace(sources, root=_absolute_path(root), files=list(absolute.values()), inspected=inspected)


def _absolute_path(path: str | Path) -> Path:
    """Return a path as absolute, without "..". Unlike ``Path.resolve`` this does not follow links."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def _inspect_files_outside_root(sources: Sources) -> dict[Path, SourceFile]:
    """Return what the headers of files outside the root state. Raises UsageError if one of these may be an image.

    Files that are no images will fail one by one, with a better message.
    """
    outside = [path for path in sources.files if not path.is_relative_to(sources.root)]
    inspected = {path: sources.inspected.get(path) or SourceFile.inspect(path) for path in outside}
    images = [path for path in outside if _may_be_image(inspected[path])]
    if images:
        listed = ", ".join(map(str, images[:MAX_LISTED_FILES])) + (", ..." if len(images) > MAX_LISTED_FILES else "")
        raise UsageError(
            f"{len(images)} of the images are outside {sources.root}, to which output paths are "
            f"relative: {listed}; give --root a folder that contains all of them"
        )
    return inspected


def _may_be_image(file: SourceFile) -> bool:
    """Return whether a file exists and may be an image.

    This is decided by its content; by its suffix if it cannot be read, or for Targa, the only format without a
    signature.
    """
    has_image_suffix = file.path.suffix.lower() in IMAGE_SUFFIXES
    is_unreadable_image = file.error is not None and has_image_suffix and os.path.exists(file.path)  # noqa: PTH110
    is_targa = bool(file.planned_state) and file.path.suffix.lower() == ".tga"
    return bool(file.type.name) or is_unreadable_image or is_targa


def name_below(path: Path, root: Path) -> Path:
    """Return a path relative to the root. A path outside the root, whose image will fail, is made relative to /."""
    try:
        return path.relative_to(root)
    except ValueError:
        return path.relative_to(path.anchor)


def natural_sort_key(path: Path) -> list[list[tuple[int, int, str, str]]]:
    """Return a sort key in which numbers are compared as numbers, so that a9 comes before a10."""
    return [_natural_name_key(name) for name in path.parts]


@functools.lru_cache(maxsize=1024)
def _natural_name_key(name: str) -> list[tuple[int, int, str, str]]:
    """Return the sort key of one part of a path. It is cached, because many files have the same folders."""
    keys = []
    for part in filter(None, re.split("([0-9]+)", name)):
        if part[0] in "0123456789":  # numbers are compared by their number of digits, then as text
            digits = part.lstrip("0")
            keys.append((0, len(digits), digits, part))
        else:
            keys.append((1, 0, part, ""))
    return keys


def real_path(path: Path) -> Path:
    """Return the path with links followed. Unlike ``Path.resolve`` this accepts a link to itself."""
    return Path(os.path.realpath(path))


class PathResolver:
    """Follows links in paths as :func:`real_path` does, but resolves each path and folder only once.

    For use within a single plan, because links may change later.
    """

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}
        self._paths: dict[Path, Path] = {}

    def __call__(self, path: Path) -> Path:
        real = self._paths.get(path)
        if real is None:
            real = self._paths[path] = self._resolve(path)
        return real

    def _resolve(self, path: Path) -> Path:
        parent, name = os.path.split(path)
        if name in ("", os.pardir):
            return real_path(path)
        folder = self._folders.get(parent)
        if folder is None:
            folder = self._folders[parent] = os.path.realpath(parent)
        real = f"{folder.rstrip(os.sep)}{os.sep}{name}"
        return real_path(path) if os.path.islink(real) else Path(real)  # noqa: PTH114


def _find_files(src: str | Path, skipped_files: SkippedFiles, is_ignored: Callable[[Path, Path], bool]) -> Sources:
    """Return the sources in any order, perhaps none."""
    text, path = str(src), Path(src)
    if not text:
        raise UsageError(f"the source is empty; {EXPECTED_SOURCE}")
    skipped: SkippedPaths = {}
    if text == "-":
        stream = getattr(sys.stdin, "buffer", sys.stdin)  # None if the process was started without one
        return _read_list(os.fsencode(stream.read()) if stream else b"", "standard input", skipped_files)
    if retry_transient(path.is_dir):
        files = [file for file in walk_files(path, skipped) if not is_ignored(file, path)]
        return _keep_images(path, files, skipped, skipped_files)
    if path.is_file():
        return _read_file(path, skipped_files)
    kind = special_file_kind(path.stat().st_mode) if path.exists() else ""
    if kind:
        raise UsageError(f"source {text} is {kind}; {EXPECTED_SOURCE}")
    files = list(expand_glob(text, skipped)) if glob.has_magic(text) else []
    if files:
        folder = Path(split_glob(text)[0])
        files = [file for file in files if not is_ignored(file, folder)]
        return _keep_images(folder, files, skipped, skipped_files)
    if (pattern := FramePattern.parse(text)) is not None:
        return _find_sequence(pattern, text, skipped_files)
    if glob.has_magic(text):
        raise UsageError(
            f"no file matches {text}; no file has this exact name, so *, ? and [] were read as "
            "wildcards; check the path"
        )
    raise UsageError(f"source {text} does not exist; {EXPECTED_SOURCE}")


def _read_file(path: Path, skipped_files: SkippedFiles) -> Sources:
    """Return a single image, or the files of a list."""
    if path.suffix.lower() in LIST_SUFFIXES:
        try:
            data = retry_transient(path.read_bytes)
        except OSError as error:
            raise UsageError(f"the list {path} cannot be read: {describe_os_error(error)}") from error
        return _read_list(data, str(path), skipped_files)
    file = SourceFile.inspect(path)
    if file.type.is_movie:
        raise UsageError(f"source {path} {movie_message(path)}")
    return Sources(path.parent, [path], inspected={path: file})


def _keep_images(root: Path, paths: Sequence[Path], skipped: SkippedPaths, skipped_files: SkippedFiles) -> Sources:
    """Return the images among the files of a walk. Files without an image suffix are inspected."""
    skipped_files.add_skipped_paths(skipped)
    inspected = {path: SourceFile.inspect(path) for path in paths if path.suffix.lower() not in IMAGE_SUFFIXES}
    reasons = {path: _reason_to_skip(file) for path, file in inspected.items()}
    for reason in (UNREADABLE_FILE, A_MOVIE, NOT_AN_IMAGE):
        skipped_files.add(sorted({path for path in paths if reasons.get(path) == reason}), reason)
    images = [path for path in paths if not reasons.get(path)]
    return Sources(root, images, inspected={path: inspected[path] for path in images if path in inspected})


def _reason_to_skip(file: SourceFile) -> str:
    """Return the reason to skip an inspected file; "" for an image, and for a file that may be readable later."""
    if file.error is not None:
        return "" if file.error.is_transient else UNREADABLE_FILE
    if file.type.is_movie:
        return A_MOVIE
    return "" if file.type.name else NOT_AN_IMAGE


def _find_sequence(pattern: FramePattern, text: str, skipped_files: SkippedFiles) -> Sources:
    """Return the files that match a frame pattern. Raises UsageError if there are none."""
    skipped: SkippedPaths = {}
    folder = Path(pattern.folder)
    files = folder.iterdir() if folder.is_dir() else expand_glob(str(folder / "*"), skipped)
    names: dict[str, list[Path]] = {}
    for path in files:
        names.setdefault(path.name, []).append(path)
    if not pattern.matching_names(names) and pattern.escape_wildcards().matching_names(names):
        pattern = pattern.escape_wildcards()
    matching = [path for name in pattern.matching_names(names) for path in names[name] if path.is_file()]
    others = [path for name in pattern.names_with_other_numbers(names) for path in names[name] if path.is_file()]
    skipped_files.add(others, f"its number does not match {Path(text).name}, by its sign or its digits")
    skipped_files.add_skipped_paths(skipped)
    if not (names or glob.has_magic(pattern.folder) or folder.is_dir()):
        raise UsageError(f"no file matches {text}: the folder {folder} does not exist; check the path")
    if not matching:
        raise UsageError(
            f"no file matches {text}; its name was read as a frame pattern with {pattern.digits} "
            f"or more digits; check the path and the number of digits{pattern.similar_names(names)}"
        )
    return Sources(Path(split_glob(pattern.folder)[0]), matching, is_sequence=True)


def _read_list(data: bytes, where: str, skipped_files: SkippedFiles) -> Sources:
    """Return the files of a list, without folders. ``where``: what messages call the list.

    A line that cannot be a path is kept, so that only this image fails. Raises UsageError if lines have different
    roots.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UsageError(f"{where} is UTF-16 text; expected UTF-8 with one path per line; save it as UTF-8")
    lines = [line.strip() for line in os.fsdecode(data.removeprefix(codecs.BOM_UTF8)).split("\n")]
    lines = [line for line in lines if line]
    if not lines:
        raise UsageError(f"{where} lists no images; expected one path per line")
    if all("\0" in line for line in lines):
        raise UsageError(
            f"{where} has NUL characters in every line; expected UTF-8 text with one path per line; "
            "use find -print, not -print0"
        )
    absolute = [_absolute_path(line.replace("\0", NUL_PICTURE)) for line in lines]
    files = skipped_files.exclude(absolute, os.path.isdir, "a folder in a list; list its files instead")
    return Sources(_find_list_root(lines, where), files)


def _find_list_root(lines: Sequence[str], where: str) -> Path:
    """Return the part of the lines of a list before ``/./``, else the working directory.

    Raises UsageError for different roots.
    """
    marked_roots = [line.rpartition(ROOT_MARK)[0] for line in lines if ROOT_MARK in line]
    roots = sorted({_absolute_path(root or "/") for root in marked_roots})
    if len(roots) > 1:
        raise UsageError(
            f"{where} has lines of {len(roots)} roots, such as {roots[0]} and {roots[1]}, and output paths are "
            f"relative to one root; make a list for each root, or remove {ROOT_MARK} from the lines and give --root"
        )
    return roots[0] if roots else Path.cwd()
