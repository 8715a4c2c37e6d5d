"""Jobs: the images to matte, and the place of each one's alpha."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from icm_cli.errors import ImageError, UsageError
from icm_cli.files import TEMPORARY_PREFIX, combined_digest
from icm_cli.images.colour import DEFAULT_COLOUR, ColourSettings
from icm_cli.images.decoding import frame_count, windows_and_turn
from icm_cli.images.kinds import FileType
from icm_cli.images.reading import CompositeSource, SourceImage, content_sha256, read_source_image
from icm_cli.matting.frames import FrameName, FramePattern, MissingPolicy, format_frame_ranges, missing_frames
from icm_cli.matting.sources import (
    MAX_LISTED_FILES,
    SkippedFiles,
    Sources,
    file_type_or_unknown,
    natural_sort_key,
    real_path,
)
from icm_cli.reports.result import ImageResult

DEFAULT_NAME = "{stem}{frame}"
NAME_FIELDS = ("stem", "frame", "suffix")


@dataclass(frozen=True)
class Job:
    """One image to matte: its file, its name below the sources' root, and its alpha's file."""

    source: Path | CompositeSource
    name: Path
    output: Path
    planned: ImageResult
    """Result as far as it is known before."""
    example: int = 0
    """Index of the example whose references show its thing."""
    page: int = 0
    """Page of a file of several pictures, from 0."""
    colour: ColourSettings = DEFAULT_COLOUR
    root: str = ""
    """Absolute path of the sources' root."""
    is_missing: bool = False
    """Whether it stands for a frame that is not there, and is to fail."""
    has_trimap: bool = False
    """Whether a trimap is written beside the alpha."""

    @property
    def trimap(self) -> Path:
        """File of a trimap beside the alpha."""
        return self.output.with_name(f"{self.output.stem}.trimap.png")

    @property
    def outputs(self) -> Sequence[Path]:
        """All files that are written for it."""
        return (self.output, self.trimap) if self.has_trimap else (self.output,)

    def read(self) -> SourceImage:
        """The picture to matte. Raises ImageError."""
        return read_source_image(self.source, self.colour, self.page)

    @property
    def files(self) -> Sequence[Path]:
        """All files that it is made from."""
        return self.source.files if isinstance(self.source, CompositeSource) else (self.source,)

    def _files_there(self) -> Sequence[Path]:
        if self.is_missing:
            raise ImageError(f"{self.source} is missing: the sequence has no such frame; add it and run again")
        return self.files

    def state(self) -> str:
        """Size in bytes, time of last change in nanoseconds, size in px and turn of what it is made from.

        Raises ImageError.
        """
        return " ".join(_state(path) for path in self._files_there())

    def content(self) -> str:
        """SHA-256 of what it is made from, as hexadecimal digits. Raises ImageError."""
        return combined_digest(*(_content(path, _state(path)) for path in self._files_there()))


@dataclass(frozen=True)
class OutputLayout:
    """The folder of the alphas and their names, as ``--out`` and ``--name`` say."""

    folder: Path
    template: str = DEFAULT_NAME
    suffix: str = ".png"
    pattern: FramePattern | None = None
    """Pattern that ``--out`` is, whose number is the source's."""
    has_trimap: bool = False
    """Whether a trimap lies beside every alpha."""

    def __post_init__(self) -> None:
        try:
            fields = [field for _, field, *_ in string.Formatter().parse(self.template) if field is not None]
        except ValueError as error:
            raise UsageError(f"--name {self.template!r} cannot be read: {error}; {_NAME_EXPECTED}") from error
        if unknown := [field for field in fields if field not in NAME_FIELDS]:
            raise UsageError(f"--name has the field {{{unknown[0]}}}, which is not known; {_NAME_EXPECTED}")
        if not self.template or "/" in self.template or os.sep in self.template:
            raise UsageError(f"--name {self.template!r} is no name of a file; {_NAME_EXPECTED}")
        if self.pattern is not None and self.template != DEFAULT_NAME:
            raise UsageError("--name and the pattern of --out both name the alphas; leave one out")

    def output_path(self, name: Path) -> Path:
        """The file of the alpha of an image of this name below the sources' root. Raises UsageError."""
        parts = FrameName.from_path(name)
        if self.pattern is None:
            shown = self.template.format(stem=parts.stem, frame=parts.frame, suffix=name.suffix)
            return self.folder / name.with_name(shown + self.suffix)
        if parts.number is None:
            raise UsageError(f"{name} has no frame number, which the pattern of --out asks for; give --out a folder")
        return self.folder / name.with_name(self.pattern.frame_name(parts.number))


_NAME_EXPECTED = "expected a name with {stem}, {frame} and {suffix}, such as '{stem}_matte{frame}'"


@dataclass(frozen=True)
class SourceFilter:
    """Choice among the sources."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    """Globs, matched against the path below the sources' root and against the bare name."""
    frames: frozenset[int] | None = None
    """Numbers of frames; None: all."""
    missing: MissingPolicy = "skip"
    shard: tuple[int, int] | None = None
    """Number of a shard, from 1, and how many there are."""


NO_FILTER = SourceFilter()


def plan_jobs(
    sources: Sources,
    place: OutputLayout,
    *,
    choice: SourceFilter = NO_FILTER,
    references: Sequence[Path] = (),
    colour: ColourSettings = DEFAULT_COLOUR,
    skipped_files: SkippedFiles,
) -> list[Job]:
    """List every image that is wanted, with the place of its alpha, sorted by name.

    The output tree, the references and their masks are left out. Frames that are missing are told, or come as jobs
    that fail, as ``choice.missing`` says; where none is left that is told. Raises UsageError before anything is
    written.
    """
    root, out = sources.root, place.folder
    if real_path(root) == real_path(out) and place.template == DEFAULT_NAME and place.pattern is None:
        raise UsageError(f"the source folder {root} is also the output folder; give --out another folder")
    found = sources.files
    _check_filters(found, root, choice)
    if real_path(root) != real_path(out):
        found = skipped_files.exclude(found, _below(out, root), "in the output folder")
    protected = {real_path(path) for path in references}
    found = skipped_files.exclude(found, lambda path: real_path(path) in protected, "a reference or its mask")
    found = [path for path in found if not path.name.startswith(TEMPORARY_PREFIX)]
    found = skipped_files.exclude(
        found,
        lambda path: not _is_wanted(path.relative_to(root), choice),
        "by --include or --exclude",
        is_reported=False,
    )
    kinds = {path: file_type_or_unknown(path) for path in found}
    found = skipped_files.exclude(found, lambda path: kinds[path].is_icm_output, "made by icm")
    missing = _missing(found, sources, choice, place, skipped_files, protected)
    if choice.frames is not None:
        found = skipped_files.exclude(
            found,
            lambda path: FrameName.from_path(path).number not in (choice.frames or ()),
            "not of --frames",
            is_reported=False,
        )
    kinds |= dict.fromkeys(missing, FileType(""))
    everything = sorted([*found, *missing], key=natural_sort_key)
    absent = frozenset(missing)
    jobs = [
        replace(job, is_missing=path in absent, has_trimap=place.has_trimap)
        for path in everything
        for job in _jobs(path, root, place, colour, kinds[path])
    ]
    if not jobs:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in skipped_files.items() if count)
        skipped_files.notify(f"nothing is to be matted, as every image in {root} is left out: {reasons}")
    check_overwrites(jobs, [path for job in jobs for path in job.files], "a source image")
    check_overwrites(jobs, references, "a reference or its mask")
    _check_collisions(jobs, place)
    return jobs if choice.shard is None else _shard(jobs, *choice.shard)


def parse_shard(text: str) -> tuple[int, int]:
    """Parse ``i/n``. Raises UsageError."""
    number, _, count = text.partition("/")
    if not (number.isascii() and number.isdigit() and count.isascii() and count.isdigit()):
        raise UsageError(f"--shard is {text!r}; expected i/n, such as 1/8 for the first of eight")
    if int(count) < 1:
        raise UsageError(f"--shard is {text}; expected 1 shard or more, such as 1/8 for the first of eight")
    if not 1 <= int(number) <= int(count):
        raise UsageError(f"--shard is {text}; expected a number from 1 to {count}, and the shards' count")
    return int(number), int(count)


def _shard(jobs: Sequence[Job], number: int, count: int) -> list[Job]:
    """The jobs of a shard. Its name alone decides where an image belongs, so files that come or go move no other."""
    return [job for job in jobs if int(hashlib.sha256(job.planned.name.encode()).hexdigest(), 16) % count == number - 1]


def _missing(
    found: Sequence[Path],
    sources: Sources,
    choice: SourceFilter,
    place: OutputLayout,
    skipped_files: SkippedFiles,
    protected: set[Path],
) -> list[Path]:
    """Files of missing frames that are to fail. Raises UsageError where none may be missing."""
    if not sources.is_sequence and choice.frames is None:
        return []
    there = [*found, *(path for path in sources.files if real_path(path) in protected)]
    excluded = set(sources.files) - set(there)
    files: list[Path] = []
    for pattern, lost in missing_frames(there, choice.frames).items():
        each = FramePattern.parse(pattern.name)
        if each is None:
            continue
        numbers = [number for number in lost if pattern.with_name(each.frame_name(number)) not in excluded]
        if not numbers:
            continue
        of_pattern = [pattern.with_name(each.frame_name(number)) for number in numbers]
        files += of_pattern
        text = f"{pattern} has no frame {format_frame_ranges(numbers)}"
        if choice.missing == "error":
            raise UsageError(f"{text}; nothing was made, as --missing error wants it")
        if choice.missing == "skip":
            alphas = [place.output_path(file.relative_to(sources.root)) for file in of_pattern]
            stay = [str(alpha) for alpha in alphas if alpha.exists()]
            more = f" and {len(stay) - 1} more" if len(stay) > 1 else ""
            earlier = f"its earlier alpha {stay[0]}{more} stays" if stay else "there will be no alpha either"
            skipped_files.notify(f"{text}; {earlier}")
    return [] if choice.missing == "skip" else files


def _state(path: Path) -> str:
    try:
        state = path.stat()
        windows, turn = windows_and_turn(path)
    except FileNotFoundError as error:
        raise ImageError(f"{path} does not exist; put it there and run again") from error
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    height, width = windows.size
    lies = "" if windows.is_full else f" {windows}"
    return f"{state.st_size} {state.st_mtime_ns} {width}x{height} {turn}{lies}"


@functools.lru_cache(maxsize=64)
def _content(path: Path, state: str) -> str:  # noqa: ARG001 (a key: the content is that of this state)
    """SHA-256 of a file; read once for all of its frames."""
    return content_sha256(path)


def _below(folder: Path, root: Path) -> Callable[[Path], bool]:
    """Whether a path lies below ``folder``, asked only where that itself lies below the sources' root."""
    inside = real_path(folder)
    if real_path(root) not in inside.parents:
        return lambda _: False
    return lambda path: inside in real_path(path).parents


def _is_wanted(name: Path, choice: SourceFilter) -> bool:
    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatch(name.as_posix(), pattern) or fnmatch(name.name, pattern) for pattern in patterns)

    return (not choice.include or matches(choice.include)) and not matches(choice.exclude)


def _jobs(source: Path, root: Path, place: OutputLayout, colour: ColourSettings, kind: FileType) -> list[Job]:
    """One job per picture: name.png, or name.0001.png and following where the file has several."""
    name, count = source.relative_to(root), 1
    absolute = os.path.abspath(root)  # noqa: PTH100  resolve() would follow links
    if kind.may_have_frames:
        with contextlib.suppress(ImageError):  # told when it is matted
            count = frame_count(source)
    if count == 1:
        output = place.output_path(name)
        planned = ImageResult(str(source), str(output), "planned", name=name.as_posix())
        return [Job(source, name, output, planned, colour=colour, root=absolute)]
    jobs = []
    for page in range(count):
        numbered = name.with_name(f"{name.stem}.{page + 1:04d}{name.suffix}")
        output = place.output_path(numbered)
        planned = ImageResult(str(source), str(output), "planned", name=numbered.as_posix(), page=page + 1)
        jobs.append(Job(source, numbered, output, planned, page=page, colour=colour, root=absolute))
    return jobs


def _check_filters(found: Sequence[Path], root: Path, choice: SourceFilter) -> None:
    """Raises UsageError for filters that not one image matches: slips, not choices."""
    if choice.include and not any(_is_wanted(path.relative_to(root), SourceFilter(choice.include)) for path in found):
        patterns = " and ".join(f"--include {pattern!r}" for pattern in choice.include)
        raise UsageError(
            f"{patterns} matches none of the {len(found)} image(s) in {root}, such as {found[0].relative_to(root)}; "
            "expected a glob of the path below that folder, or of the bare name"
        )
    if choice.frames is not None and all(FrameName.from_path(path).number is None for path in found):
        raise UsageError(
            f"--frames chooses by frame number, and none of the {len(found)} image(s) in {root} has one, such as "
            f"{found[0].relative_to(root)}; expected names such as shot.1001.exr, or leave --frames out"
        )


def check_overwrites(jobs: Sequence[Job], files: Sequence[Path], what: str) -> None:
    """Raises UsageError where an output is one of these files."""
    kept = {os.path.realpath(path) for path in files}
    for output in (output for job in jobs for output in job.outputs):
        if os.path.realpath(output) in kept:
            raise UsageError(f"{output} would be written over {what}; give --out another folder")


def _check_collisions(jobs: Sequence[Job], place: OutputLayout) -> None:
    taken: dict[Path, list[str]] = {}
    for job in jobs:
        for output in job.outputs:
            maker = str(job.source) if output == job.output else f"the trimap of {job.source}"
            taken.setdefault(output, []).append(maker)
    shared = {output: found for output, found in taken.items() if len(found) > 1}
    if shared:
        lines = [f"{' and '.join(found)} to {output}" for output, found in list(shared.items())[:MAX_LISTED_FILES]]
        more = f"; and {len(shared) - MAX_LISTED_FILES} more" if len(shared) > MAX_LISTED_FILES else ""
        remedy = "give --keep-suffix (a.jpg.png, a.png.png)"
        if place.pattern is not None:
            remedy = "give a folder as --out, not a pattern of frames"
        elif place.template != DEFAULT_NAME:
            remedy = "give --name more of {stem}, {frame} and {suffix}"
        raise UsageError(
            f"{len(shared)} file(s) would come of several images each: {'; '.join(lines)}{more}; {remedy}, rename "
            "some, or leave some out with --exclude"
        )
