"""Jobs: the images to matte, and the place of each one's alpha."""

from __future__ import annotations

import contextlib
import glob
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from icm_cli.errors import ImageError, UsageError
from icm_cli.files import TEMPORARY_PREFIX
from icm_cli.images.colour import AS_LABELLED, Colour
from icm_cli.images.composites import Composite, read_source
from icm_cli.images.decoding import frame_count
from icm_cli.images.kinds import IMAGE_SUFFIXES, Kind, kind_of
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
    frame: int = 0
    """Frame of a file of several, from 0."""
    colour: Colour = AS_LABELLED

    @property
    def trimap(self) -> Path:
        """File of a trimap beside the alpha."""
        return self.output.with_name(f"{self.output.stem}.trimap.png")

    def read(self) -> Picture:
        """The picture to matte. Raises ImageError."""
        return read_source(self.source, self.colour, self.frame)

    def state(self) -> str:
        """Size in bytes and time of last change in nanoseconds of what it is made from. Raises ImageError."""
        files = self.source.files if isinstance(self.source, Composite) else (self.source,)
        return " ".join(_state(path) for path in files)


class LeftOut(Counter[str]):
    """Files that are not matted, counted by reason; each reason is told once, with the first of its files."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        super().__init__()
        self._notice = notice

    def add(self, paths: Sequence[Path], reason: str, *, is_told: bool = True) -> None:
        """Count files of one reason, and say so."""
        self[reason] += len(paths)
        if paths and is_told:
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            self._notice(f"{min(paths)}{more} left out: {reason}")

    def without(
        self, paths: Sequence[Path], is_dropped: Callable[[Path], bool], reason: str, *, is_told: bool = True
    ) -> list[Path]:
        """The paths but for those that ``is_dropped`` says."""
        dropped = {path for path in paths if is_dropped(path)}
        self.add(sorted(dropped), reason, is_told=is_told)
        return [path for path in paths if path not in dropped]


def plan_jobs(
    src: str | Path,
    out: Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    references: Sequence[Path] = (),
    colour: Colour = AS_LABELLED,
    suffix: str = ".png",
    left_out: LeftOut,
) -> list[Job]:
    """List every image that ``src`` names, with its mirrored output below ``out``, sorted by name.

    ``src``: a folder (searched recursively), an image, a glob, a text file with one path per line (relative to the
    working directory), or "-" for such a list on standard input. ``include`` and ``exclude`` are globs matched
    against the path below the sources' root and against the bare name. The output tree, the references and
    their masks are left out. Raises UsageError before anything is written.
    """
    root, found = _find(src, left_out)
    if _real(root) == _real(out):
        raise UsageError(f"the source folder {root} is also the output folder; give --out another folder")
    found = left_out.without(sorted(set(found)), _below(out, root), "in the output folder")
    protected = {_real(path) for path in references}
    found = left_out.without(found, lambda path: _real(path) in protected, "a reference or its mask")
    found = [path for path in found if not path.name.startswith(TEMPORARY_PREFIX)]
    found = left_out.without(
        found,
        lambda path: not _is_wanted(path.relative_to(root), include, exclude),
        "by --include or --exclude",
        is_told=False,
    )
    kinds = {path: _kind(path) for path in found}
    found = left_out.without(found, lambda path: kinds[path].is_own, "made by icm")
    jobs = [job for path in found for job in _jobs(path, root, out, suffix, colour, kinds[path])]
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


def _find(src: str | Path, left_out: LeftOut) -> tuple[Path, list[Path]]:
    """The root that the output tree mirrors, and the files."""
    text, path = str(src), Path(src)
    if not text:
        raise UsageError("the source is empty; expected a folder, an image, a quoted glob, a text list or -")
    if text == "-":
        return _listed(sys.stdin or (), "standard input")
    if path.is_dir():
        return path, left_out.without(list(_walk(path, left_out)), lambda file: not _is_picture(file), "no picture")
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
        root, files = _common_root(Path(match) for match in glob.iglob(text, recursive=True) if Path(match).is_file())
        return root, left_out.without(files, lambda file: not _is_picture(file), "no picture")
    raise UsageError(f"source {text} does not exist; expected a folder, an image, a quoted glob, a text list or -")


def _is_picture(path: Path) -> bool:
    """Whether a file is a picture by its ending or by its content."""
    return path.suffix.lower() in IMAGE_SUFFIXES or bool(_kind(path).name)


def _kind(path: Path) -> Kind:
    """The kind by content; one that cannot be read is told when it is matted."""
    try:
        return kind_of(path)
    except OSError:
        return Kind("")


def _walk(folder: Path, left_out: LeftOut) -> Iterable[Path]:
    """Every file below a folder that is not hidden; links to folders are followed, each folder entered once."""
    entered = {os.path.realpath(folder)}
    hidden: list[Path] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        for name in sorted(folders):
            real = os.path.realpath(Path(parent) / name)
            if real in entered:
                folders.remove(name)
            elif name.startswith("."):
                folders.remove(name)
                hidden += _files_below(Path(parent) / name)
            elif name in SERVICE_FOLDERS:
                folders.remove(name)
                left_out.add(_files_below(Path(parent) / name), f"in {name}, a folder of a storage server or archiver")
            entered.add(real)
        hidden += [Path(parent) / name for name in files if name.startswith(".")]
        yield from (Path(parent) / name for name in files if not name.startswith("."))
    left_out.add([path for path in hidden if not path.name.startswith(TEMPORARY_PREFIX)], "hidden")


def _files_below(folder: Path) -> list[Path]:
    return [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]


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


def _is_wanted(name: Path, include: Sequence[str], exclude: Sequence[str]) -> bool:
    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatch(name.as_posix(), pattern) or fnmatch(name.name, pattern) for pattern in patterns)

    return (not include or matches(include)) and not matches(exclude)


def _jobs(source: Path, root: Path, out: Path, suffix: str, colour: Colour, kind: Kind) -> list[Job]:
    """One job per frame: name.png, or name.0001.png and following where the file has several."""
    name, count = source.relative_to(root), 1
    if kind.may_have_frames:
        with contextlib.suppress(ImageError):  # told when it is matted
            count = frame_count(source)
    if count == 1:
        output = out / name.with_suffix(suffix)
        planned = ImageResult(str(source), str(output), "planned", name=name.as_posix())
        return [Job(source, name, output, planned, colour=colour)]
    jobs = []
    for frame in range(count):
        numbered = name.with_name(f"{name.stem}.{frame + 1:04d}{suffix}")
        planned = ImageResult(
            str(source), str(out / numbered), "planned", name=numbered.with_suffix("").as_posix(), frame=frame + 1
        )
        jobs.append(Job(source, numbered, out / numbered, planned, frame=frame, colour=colour))
    return jobs


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
