"""Jobs: the images to matte, and the place of each one's alpha."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from icm_cli.errors import ImageError, UsageError
from icm_cli.files import TEMPORARY_PREFIX
from icm_cli.images.composites import Composite, read_source
from icm_cli.images.kinds import IMAGE_SUFFIXES
from icm_cli.images.reading import Picture
from icm_cli.reports.result import ImageResult

SERVICE_FOLDERS = frozenset({"@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "__MACOSX"})
"""Folders that storage servers and archivers make for themselves: thumbnails, bins, snapshots, resource forks."""

LIST_SUFFIXES = frozenset({".txt", ".lst", ".list"})


@dataclass(frozen=True)
class Job:
    """One image to matte: its file, its name below the sources' root, and its alpha's file."""

    source: Path | Composite
    name: Path
    output: Path
    planned: ImageResult
    """Result as far as it is known before."""
    example: int = 0
    """Index of the example whose references show its thing."""

    def read(self) -> Picture:
        """The picture to matte. Raises ImageError."""
        return read_source(self.source)

    def state(self) -> str:
        """Size in bytes and time of last change in nanoseconds of what it is made from. Raises ImageError."""
        files = self.source.files if isinstance(self.source, Composite) else (self.source,)
        return " ".join(_state(path) for path in files)


def plan_jobs(
    src: str | Path,
    out: Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    references: Sequence[Path] = (),
    notice: Callable[[str], None],
) -> list[Job]:
    """List every image that ``src`` names, with its mirrored output below ``out``, sorted by name.

    ``src``: a folder (searched recursively), an image, a glob, a text file with one path per line (relative to the
    working directory), or "-" for such a list on standard input. ``include`` and ``exclude`` are globs matched
    against the path below the sources' root and against the bare name. The output tree, the references and
    their masks are left out. Raises UsageError before anything is written.
    """
    root, found = _find(src, notice)
    if _real(root) == _real(out):
        raise UsageError(f"the source folder {root} is also the output folder; give --out another folder")
    found = _without(found, _below(out, root), "in the output folder", notice)
    protected = {_real(path) for path in references}
    found = _without(found, lambda path: _real(path) in protected, "a reference or its mask", notice)
    jobs = [
        _job(path, root, out) for path in sorted(set(found)) if _is_wanted(path.relative_to(root), include, exclude)
    ]
    if not jobs:
        raise UsageError(f"no images were found in {src}; {_what_was_expected(include, exclude)}")
    _check_collisions(jobs)
    return jobs


def _state(path: Path) -> str:
    try:
        state = path.stat()
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    return f"{state.st_size} {state.st_mtime_ns}"


def _real(path: Path) -> Path:
    """Links followed; unlike ``Path.resolve`` a link to itself is no error here, it fails when it is read."""
    return Path(os.path.realpath(path))


def _find(src: str | Path, notice: Callable[[str], None]) -> tuple[Path, list[Path]]:
    """The root that the output tree mirrors, and the files."""
    text, path = str(src), Path(src)
    if not text:
        raise UsageError("the source is empty; expected a folder, an image, a quoted glob, a text list or -")
    if text == "-":
        return _listed(sys.stdin or (), "standard input")
    if path.is_dir():
        return path, [file for file in _walk(path, notice) if file.suffix.lower() in IMAGE_SUFFIXES]
    if path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
        try:
            return _listed(path.read_text(encoding="utf-8-sig").splitlines(), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"the list {path} cannot be read ({error}); expected UTF-8 text, one path per line"
            ) from error
    if path.is_file():
        return path.parent, [path]
    if glob.has_magic(text):
        return _common_root(Path(match) for match in glob.iglob(text, recursive=True) if Path(match).is_file())
    raise UsageError(f"source {text} does not exist; expected a folder, an image, a quoted glob, a text list or -")


def _walk(folder: Path, notice: Callable[[str], None]) -> Iterable[Path]:
    """Every file below a folder that is not hidden; links to folders are followed, each folder entered once."""
    entered = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        for name in sorted(folders):
            real = os.path.realpath(Path(parent) / name)
            if name.startswith(".") or real in entered:
                folders.remove(name)
            elif name in SERVICE_FOLDERS:
                folders.remove(name)
                notice(f"{Path(parent) / name} skipped: a folder of a storage server or archiver, not of pictures")
            entered.add(real)
        yield from (Path(parent) / name for name in files if not name.startswith("."))


def _listed(lines: Iterable[str], where: str) -> tuple[Path, list[Path]]:
    paths = [Path(line.strip()) for line in lines if line.strip()]
    if not paths:
        raise UsageError(f"{where} lists no images; expected one path per line")
    if any("\0" in str(path) for path in paths):
        raise UsageError(f"{where} has NUL characters; expected one path per line (find -print, not -print0)")
    return _common_root(paths)


def _common_root(paths: Iterable[Path]) -> tuple[Path, list[Path]]:
    absolute = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100  resolve() would rename links
    if not absolute:
        return Path.cwd(), []
    return Path(os.path.commonpath([path.parent for path in absolute])), absolute


def _below(folder: Path, root: Path) -> Callable[[Path], bool]:
    """Whether a path lies below ``folder``, asked only where that itself lies below the sources' root."""
    inside = _real(folder)
    if _real(root) not in inside.parents:
        return lambda _: False
    return lambda path: inside in _real(path).parents


def _without(
    paths: Sequence[Path], is_dropped: Callable[[Path], bool], why: str, notice: Callable[[str], None]
) -> list[Path]:
    dropped = {path for path in paths if is_dropped(path)}
    if dropped:
        first = min(dropped)
        more = f" and {len(dropped) - 1} more" if len(dropped) > 1 else ""
        notice(f"{first}{more} skipped: {why}")
    return [path for path in paths if path not in dropped]


def _is_wanted(name: Path, include: Sequence[str], exclude: Sequence[str]) -> bool:
    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatch(name.as_posix(), pattern) or fnmatch(name.name, pattern) for pattern in patterns)

    return (not include or matches(include)) and not matches(exclude) and not name.name.startswith(TEMPORARY_PREFIX)


def _job(source: Path, root: Path, out: Path) -> Job:
    name = source.relative_to(root)
    output = out / name.with_suffix(".png")
    return Job(source, name, output, ImageResult(str(source), str(output), "planned"))


def _check_collisions(jobs: Sequence[Job]) -> None:
    sources = {os.path.realpath(str(job.source)) for job in jobs}
    taken: dict[Path, Path | Composite] = {}
    for job in jobs:
        first = taken.setdefault(job.output, job.source)
        if first != job.source:
            raise UsageError(
                f"{first} and {job.source} would both be written to {job.output}; "
                "rename one, or leave one out with --exclude"
            )
        if os.path.realpath(job.output) in sources:
            raise UsageError(f"{job.output} would be written over a source image; give --out another folder")


def _what_was_expected(include: Sequence[str], exclude: Sequence[str]) -> str:
    kinds = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
    if include or exclude:
        return f"--include and --exclude may leave none; expected at least one of {kinds}"
    return f"expected at least one of {kinds}"
