"""Jobs: the images to matte, each with the output path of its alpha."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import string
import threading
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from itertools import combinations
from pathlib import Path

import cachetools

from icm_cli.errors import ImageError, UsageError, format_count, shorten
from icm_cli.files.atomic_writes import TEMPORARY_PREFIX, TEMPORARY_SUFFIX, FileIdentity, temporary_name
from icm_cli.files.digests import combined_digest
from icm_cli.files.paths import MAX_NAME_BYTES, RECORD_FOLDER, describe_obstacle
from icm_cli.guidance.annotations import AREA_NAMES
from icm_cli.images.colour import DEFAULT_COLOUR, ColourSettings
from icm_cli.images.decoding import SourceFile, library_settings, open_image
from icm_cli.images.image_file import ImageFile
from icm_cli.images.reading import CompositeSource, SourceImage, compose_image, read_image, read_source_image
from icm_cli.matting.frames import FrameName, FramePattern, FrameRanges, missing_frames
from icm_cli.matting.hint_files import HintFiles, ImageHints, check_image_hints
from icm_cli.matting.mattes import ImageMattes, MatteFiles, assign_mattes
from icm_cli.matting.sources import (
    MAX_LISTED_FILES,
    PathResolver,
    SkippedFiles,
    Sources,
    name_below,
    natural_sort_key,
    real_path,
)
from icm_cli.options import MissingPolicy
from icm_cli.reports.result import ImageResult

DEFAULT_NAME = "{stem}{frame}"
TRIMAP_SUFFIX = ".trimap.png"
"""End of the name of a trimap that is written next to an alpha."""
OBSTACLE_ADVICE = "remove it, or give another folder or name"
EMPTY_SHARD = "there is nothing to matte, as shard {} contains no image; the other shards contain those of {} ({})"
MAX_MISSING_JOBS = 10_000
"""Largest number of missing frames that are reported one by one."""
NAME_FIELDS = ("stem", "frame", "suffix")
_digests: cachetools.LRUCache[tuple[Path, str], str] = cachetools.LRUCache(maxsize=64)
"""Content digests by path and state, because the pages of a file and composites share files."""
_digests_lock = threading.Lock()


@dataclass(frozen=True)
class Job:
    """One image to matte: its file, its path below the root of the sources, and the path of its alpha."""

    source: Path | CompositeSource
    name: Path
    output: Path
    planned: ImageResult
    """The result as far as it is known before the image is read."""
    example_index: int = 0
    """Index of the example: the references that are used for this image. A run of ``icm matte`` has only one."""
    page: int = 0
    """Index of the frame or page in a file with several."""
    colour: ColourSettings = DEFAULT_COLOUR
    root: str = ""
    """Absolute path of the sources' root."""
    is_missing: bool = False
    """Whether the frame is missing from its sequence. Such a job fails, so that reports list the frame."""
    has_trimap: bool = False
    """Whether a trimap is written next to the alpha."""
    inspected: SourceFile | None = None
    """What was read from the file's header during planning; None for composites and missing frames."""
    hints: ImageHints | None = None
    """Files with hints about this image."""
    mattes: ImageMattes | None = None
    """Files of the garbage and keep mattes of this image."""
    replaceable: Mapping[Path, FileIdentity] = field(default_factory=dict, compare=False)
    """Outputs that existed before the run, which ``--overwrite`` may replace."""

    @property
    def trimap(self) -> Path:
        """File of the trimap next to the alpha."""
        return self.output.with_name(f"{self.output.stem}{TRIMAP_SUFFIX}")

    @property
    def outputs(self) -> Sequence[Path]:
        """All files that are written for this image."""
        return (self.output, self.trimap) if self.has_trimap else (self.output,)

    @property
    def output_folder(self) -> Path:
        """Folder of all outputs of the run, below which the tree of the sources is mirrored."""
        return self.output.parents[len(self.name.parts) - 1]

    @property
    def files(self) -> Sequence[Path]:
        """All files that the image is read from."""
        return self.source.files if isinstance(self.source, CompositeSource) else (self.source,)

    @property
    def header_file(self) -> Path | None:
        """The file whose header states the size of the image; None if it is missing or has several pages."""
        is_single = self.inspected is not None and self.inspected.frame_count == 1
        return self.source if is_single and isinstance(self.source, Path) else None

    def read_image(self) -> SourceImage:
        """Read the image. Raises ImageError."""
        return read_source_image(self.source, self.colour, self.page)

    def read_with_digest(self) -> tuple[SourceImage, str, str]:
        """Return the image with the state and the content digest of its files. Each file is opened only once.

        Raises ImageError.
        """
        with self._open_files() as files:
            if self.inspected is not None:
                self.inspected.check_frame_count(files[0])
            states = [file.read_state() for file in files]
            state, digest = " ".join(states), combined_digest(*map(_content_digest, files, states))
            if isinstance(self.source, CompositeSource):
                return compose_image(*files), state, digest
            return read_image(files[0], self.colour, self.page), state, digest

    def state(self) -> str:
        """Return a text with the sizes, modification times and first bytes of the files. Raises ImageError."""
        if self.inspected is not None:
            return self.inspected.state()
        with self._open_files() as files:
            return " ".join(file.read_state() for file in files)

    def content_digest(self) -> str:
        """Return the SHA-256 of the content of the image's files. Raises ImageError."""
        with self._open_files() as files:
            return combined_digest(*(_content_digest(file, file.read_state()) for file in files))

    @contextlib.contextmanager
    def _open_files(self) -> Iterator[Sequence[ImageFile]]:
        if self.is_missing:
            raise ImageError(f"{self.source} is missing: the sequence has no such frame; add it and run again")
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(open_image(path)) for path in self.files]


@dataclass(frozen=True)
class OutputLayout:
    """The output folder and the names of the alphas, as given by ``--out`` and ``--name``."""

    folder: Path
    template: str = DEFAULT_NAME
    suffix: str = ".png"
    pattern: FramePattern | None = None
    """The frame pattern of ``--out``, into which the frame number of the source is inserted."""
    has_trimap: bool = False
    """Whether a trimap is written next to every alpha."""

    def __post_init__(self) -> None:
        problem = _find_template_problem(self.template)
        if problem:
            raise UsageError(f"--name {shorten(self.template)!r} {problem}; {_EXPECTED_NAME}")
        if self.pattern is not None and self.template != DEFAULT_NAME:
            raise UsageError("--name and the frame pattern of --out both name the alphas; give only one of them")

    def output_path(self, name: Path) -> Path:
        """Return the path of the alpha of an image. ``name``: its path below the root. Raises UsageError."""
        parts = FrameName.from_path(name)
        if self.pattern is None:
            stem = self.template.format(stem=parts.stem, frame=parts.frame, suffix=name.suffix)
            if not stem:
                raise UsageError(f"--name {self.template!r} makes no name for {name}; {_EXPECTED_NAME}")
            return self.folder / name.with_name(stem + self.suffix)
        if parts.number is None:
            raise UsageError(f"{name} has no frame number, which the pattern of --out needs; give --out a folder")
        return self.folder / name.with_name(self.pattern.frame_name(parts.number))


def _find_template_problem(template: str) -> str:
    """Return what is wrong with a template of file names; "" if it is valid."""
    if not template or "/" in template or os.sep in template or "\0" in template:
        return "is not a file name"
    if len(os.fsencode(template)) > MAX_NAME_BYTES:
        return f"is longer than a file name, which has at most {MAX_NAME_BYTES} bytes"
    try:
        fields = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError:
        return "has an unpaired { or }"
    for name, form, conversion in fields:
        if name not in NAME_FIELDS:
            return f"has the unknown field {{{name}}}"
        if form or conversion:
            return f"has a format for {{{name}}}; fields are inserted unchanged"
    return ""


_EXPECTED_NAME = "expected a file name with {stem}, {frame} and {suffix}, such as '{stem}_matte{frame}'"


@dataclass(frozen=True)
class SourceFilter:
    """Which images of the sources are matted."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    """Globs, as in ``include``, for the path below the root or for the file name."""
    frames: FrameRanges | None = None
    """Frame numbers; None for all."""
    missing: MissingPolicy = "skip"
    shard: tuple[int, int] | None = None
    """Number of a shard, from 1, and the number of shards."""


NO_FILTER = SourceFilter()


def plan_jobs(
    sources: Sources,
    layout: OutputLayout,
    *,
    source_filter: SourceFilter = NO_FILTER,
    references: Sequence[Path] = (),
    colour: ColourSettings = DEFAULT_COLOUR,
    skipped_files: SkippedFiles,
    hint_files: HintFiles | None = None,
    garbage: MatteFiles | None = None,
    keep: MatteFiles | None = None,
) -> list[Job]:
    """Return a job for every image that passes the filter, sorted by name.

    Files in the output folder, references, masks and mattes are skipped. ``source_filter.missing`` decides what happens
    with missing frames: a notice, jobs that fail, or an error. A notice is given if no image is left. Nothing is
    written. Raises UsageError.
    """
    root, found, resolve = sources.root, sources.files, PathResolver()
    real_root, real_out = resolve(root), resolve(layout.folder)
    if real_root == real_out and layout.template == DEFAULT_NAME and layout.pattern is None:
        raise UsageError(f"the source folder {root} is also the output folder; give --out another folder")
    _check_filters(found, root, source_filter)
    if hint_files is not None:
        if hint_files.folder == real_out:
            raise UsageError(f"the folder of --hints {hint_files.where} is also the output folder; give another --out")
        found = images = hint_files.without_hints(found, root)

    # Skip files that are no sources, and sources that the filter excludes.
    if real_root in real_out.parents:
        found = skipped_files.exclude(found, lambda path: real_out in resolve(path).parents, "in the output folder")
    protected = {resolve(path) for path in references}
    found = skipped_files.exclude(found, lambda path: resolve(path) in protected, "a reference or its mask")
    matte_paths = [*(garbage.paths if garbage else ()), *(keep.paths if keep else ())]
    real_mattes = {resolve(path) for path in matte_paths}
    found = skipped_files.exclude(found, lambda path: resolve(path) in real_mattes, "a garbage or keep matte")
    found = [path for path in found if not path.name.startswith(TEMPORARY_PREFIX)]
    found = skipped_files.exclude(
        found,
        lambda path: not is_wanted(name_below(path, root), source_filter),
        "excluded by --include or --exclude",
        is_reported=False,
    )
    with library_settings():  # entered once instead of for each file
        inspected = {path: sources.inspected.get(path) or SourceFile.inspect(path) for path in found}
    found = skipped_files.exclude(found, lambda path: inspected[path].type.is_icm_output, "made by icm")
    missing = _plan_missing_frames(found, sources, source_filter, layout, skipped_files, protected)
    if (frames := source_filter.frames) is not None:
        found = skipped_files.exclude(
            found, lambda path: FrameName.from_path(path).number not in frames, "not in --frames", is_reported=False
        )

    jobs = [
        job
        for path in sorted([*found, *missing], key=natural_sort_key)
        for job in _jobs_of_file(path, root, layout, colour, inspected.get(path))
    ]
    if not jobs:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in skipped_files.items() if count)
        skipped_files.notify(f"there is nothing to matte, as every image in {root} is skipped: {reasons}")

    # Refuse output paths that would replace inputs or each other.
    check_overwrites(jobs, [path for job in jobs for path in job.files], "a source image", resolve)
    check_overwrites(jobs, references, "a reference or its mask", resolve)
    check_overwrites(jobs, matte_paths, "a garbage or keep matte", resolve)
    _check_collisions(jobs, layout)

    # Find the mattes and hints of every job.
    names = [job.name for job in jobs]
    mattes = assign_mattes(names, garbage, keep)
    jobs = [replace(job, mattes=job_mattes) for job, job_mattes in zip(jobs, mattes, strict=True)]
    files: dict[Path, list[Path]] = {}
    if hint_files is not None:
        inputs = protected.union(map(resolve, images))

        def is_input_or_output(path: Path) -> bool:
            real = resolve(path)
            return real in inputs or _is_output(real, real_out)

        files = hint_files.assign_files(names, sources, protected, is_input_or_output, skipped_files)
        check_overwrites(jobs, [path for paths in files.values() for path in paths], "a hint", resolve)
    if source_filter.shard is not None:
        jobs = _select_shard(jobs, source_filter.shard, root, skipped_files.notify)
    return _add_hints(jobs, files, skipped_files.notify)


def _is_output(path: Path, folder: Path) -> bool:
    """Return whether a file is in the output folder. Files in its ``.icm`` are not: hints may be stored there."""
    return folder in path.parents and RECORD_FOLDER not in path.relative_to(folder).parts


def _add_hints(jobs: Sequence[Job], files: Mapping[Path, Sequence[Path]], notice: Callable[[str], None]) -> list[Job]:
    """Return the jobs with their hint files. Raises UsageError for a file that cannot be used."""
    with_hints = [job for job in jobs if job.name in files]
    headers = {job.name: job.header_file for job in with_hints}
    hints = check_image_hints({job.name: files[job.name] for job in with_hints}, headers)
    files_by_label: defaultdict[str, list[Path]] = defaultdict(list)
    jobs_with_hints = []
    for job in jobs:
        if job.name in hints:
            for label, path in hints[job.name].other_labels.items():
                files_by_label[label].append(path)
            for sentence in hints[job.name].notices:
                notice(sentence)
            job = replace(job, hints=hints[job.name], planned=replace(job.planned, has_hints=True))
        jobs_with_hints.append(job)
    for label, paths in files_by_label.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        notice(
            f"the label {label} of hints {paths[0]}{more} was taken for fg, on the object; expected one of "
            f"{', '.join(AREA_NAMES)}; change the label if it marks something else"
        )
    return jobs_with_hints


def parse_shard(text: str) -> tuple[int, int]:
    """Parse ``--shard``: "2/8" is (2, 8). Raises UsageError."""
    match = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(
            f"--shard is {shorten(text)!r}; expected the number of a shard from 1 to the number of shards, such as "
            "1/8 for the first of eight"
        )
    return number, count


def check_overwrites(
    jobs: Sequence[Job], files: Sequence[Path], what: str, resolve: Callable[[Path], Path] = real_path
) -> None:
    """Raise UsageError if an output path is one of ``files``. ``what``: what these are, such as "a source image"."""
    protected = {resolve(path) for path in files}
    if not protected:
        return
    for job in jobs:
        for output in job.outputs:
            if resolve(output) in protected:
                raise UsageError(f"{output} would be written over {what}; give --out another folder")


def check_obstacles(jobs: Sequence[Job]) -> None:
    """Raise UsageError if an output path is a folder, a pipe or anything else that is not a file."""
    obstacles = [(path, what) for job in jobs for path in job.outputs if (what := describe_obstacle(path))]
    if obstacles:
        path, what = obstacles[0]
        more = f"; and {len(obstacles) - 1} more" if len(obstacles) > 1 else ""
        raise UsageError(f"{path} is {what}, and an alpha would be written there; {OBSTACLE_ADVICE}{more}")


def _select_shard(jobs: Sequence[Job], shard: tuple[int, int], root: Path, notice: Callable[[str], None]) -> list[Job]:
    """Return the jobs of a shard, such as (2, 8), or give a notice if it is empty.

    The hash of its name decides the shard of an image, so all machines agree, whatever other images they find.
    """
    number, count = shard

    def shard_of(job: Job) -> int:
        name = job.planned.name.encode(errors="surrogateescape")
        return int(hashlib.sha256(name).hexdigest(), 16) % count + 1

    selected = [job for job in jobs if shard_of(job) == number]
    if jobs and not selected:
        notice(EMPTY_SHARD.format(f"{number}/{count}", root, len(jobs)))
    return selected


def _plan_missing_frames(
    found: Sequence[Path],
    sources: Sources,
    source_filter: SourceFilter,
    layout: OutputLayout,
    skipped_files: SkippedFiles,
    protected: set[Path],
) -> list[Path]:
    """With ``--missing report``, return the paths of the missing frames; their planned jobs will fail.

    With ``--missing skip``, a notice names the missing frames. With ``--missing error``, they raise UsageError.
    ``found``: files that are not excluded. ``protected``: references and masks; those in the sequence count as present.
    """
    if not sources.is_sequence and source_filter.frames is None:
        return []
    present = [*found, *(path for path in sources.files if real_path(path) in protected)]
    present_set = set(present)
    excluded = [path for path in sources.files if path not in present_set]
    files: list[Path] = []
    for pattern, frames in missing_frames(present, source_filter.frames, excluded).items():
        text = f"{pattern} has no frame {frames}"
        if source_filter.missing == "error":
            raise UsageError(f"{text}; nothing was written, as --missing error demands; add the frames and run again")
        if source_filter.missing == "skip":
            alphas = _earlier_alphas(pattern, frames, sources.root, layout)
            more = f" and {len(alphas) - 1} more" if len(alphas) > 1 else ""
            skipped_files.notify(
                f"{text}; " + (f"its earlier alpha {alphas[0]}{more} is kept" if alphas else "no alpha is written")
            )
            continue
        if len(files) + frames.count > MAX_MISSING_JOBS:
            raise UsageError(
                f"{text}, which are {frames.count} frames; --missing report lists at most {MAX_MISSING_JOBS} "
                "missing frames; select frames with --frames, or give --missing skip"
            )
        files += [Path(pattern.folder, pattern.frame_name(number)) for number in frames]
    return files


def _earlier_alphas(pattern: FramePattern, frames: FrameRanges, root: Path, layout: OutputLayout) -> list[Path]:
    """Return the existing alphas of missing frames, in order.

    For more missing frames than files in the folder, the numbers in the names of the files are tried instead of all
    frames, so that a gap of a million frames takes no time.
    """

    def alpha_of(number: int) -> Path:
        return layout.output_path(name_below(Path(pattern.folder, pattern.frame_name(number)), root))

    folder = alpha_of(frames.ranges[0].start).parent
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if frames.count <= len(names):
        numbers = set(frames)
    else:
        candidates = {int(digits) for name in names for digits in re.findall("[0-9]+", name)}
        numbers = {number for number in candidates if number in frames}
    return [alpha for alpha in map(alpha_of, sorted(numbers)) if alpha.name in names]


def _content_digest(file: ImageFile, state: str) -> str:
    """Return the content digest of an open file. It is cached, so that a file of many pages is read only once."""
    path_and_state = file.path, state
    with _digests_lock:
        digest = _digests.get(path_and_state)
    if digest is None:
        digest = file.content_digest()
        with _digests_lock:
            _digests[path_and_state] = digest
    return digest


def is_wanted(name: Path, source_filter: SourceFilter) -> bool:
    """Return whether an image of this name below the root passes ``include`` and ``exclude``."""

    def matches_any(patterns: Sequence[str]) -> bool:
        return any(fnmatch(name.as_posix(), pattern) or fnmatch(name.name, pattern) for pattern in patterns)

    return (not source_filter.include or matches_any(source_filter.include)) and not matches_any(source_filter.exclude)


def _jobs_of_file(
    source: Path, root: Path, layout: OutputLayout, colour: ColourSettings, inspected: SourceFile | None
) -> list[Job]:
    """Return a job for each image in a file. The outputs are a.png, or a.0001.png, a.0002.png, ... for several."""
    name = name_below(source, root)
    count = 1 if inspected is None else inspected.frame_count
    absolute_root = os.path.abspath(root)  # noqa: PTH100  resolve() would follow links
    jobs = []
    for page in range(count):
        numbered = name if count == 1 else name.with_name(f"{name.stem}.{page + 1:04d}{name.suffix}")
        output = layout.output_path(numbered)
        planned = ImageResult(
            str(source), str(output), "planned", name=numbered.as_posix(), page=0 if count == 1 else page + 1
        )
        jobs.append(
            Job(
                source,
                numbered,
                output,
                planned,
                page=page,
                colour=colour,
                root=absolute_root,
                is_missing=inspected is None,
                has_trimap=layout.has_trimap,
                inspected=inspected,
            )
        )
    return jobs


def _check_filters(found: Sequence[Path], root: Path, source_filter: SourceFilter) -> None:
    """Raise UsageError if ``--include`` matches no image, or if ``--frames`` is given and no image has a number."""
    include = SourceFilter(source_filter.include)
    if source_filter.include and not any(is_wanted(name_below(path, root), include) for path in found):
        patterns = " or ".join(f"--include {pattern!r}" for pattern in source_filter.include)
        raise UsageError(
            f"{patterns} matches none of the {format_count(len(found), 'image')} in {root}, such as "
            f"{name_below(found[0], root)}; expected a glob for the path below that folder, or for "
            "the file name"
        )
    if source_filter.frames is not None and all(FrameName.from_path(path).number is None for path in found):
        raise UsageError(
            f"--frames selects by frame number, and none of the {format_count(len(found), 'image')} in {root} "
            f"has one, such as {name_below(found[0], root)}; expected names such as shot.1001.exr; "
            "omit --frames"
        )


def _check_collisions(jobs: Sequence[Job], layout: OutputLayout) -> None:
    """Raise UsageError if two images have the same output path, or one output is a folder of another."""
    writers: dict[Path, list[str]] = {}
    for job in jobs:
        writers.setdefault(job.output, []).append(str(job.source))
        if job.has_trimap:
            writers.setdefault(job.trimap, []).append(f"the trimap of {job.source}")
    shared = {output: sources for output, sources in writers.items() if len(sources) > 1}
    if shared:
        lines = [f"{' and '.join(sources)} to {output}" for output, sources in list(shared.items())[:MAX_LISTED_FILES]]
        more = f"; and {len(shared) - MAX_LISTED_FILES} more" if len(shared) > MAX_LISTED_FILES else ""
        remedy = "give --keep-suffix (a.jpg.png, a.png.png)"
        if layout.pattern is not None:
            remedy = "give --out a folder instead of a frame pattern"
        elif layout.template != DEFAULT_NAME:
            remedy = "use more of {stem}, {frame} and {suffix} in --name"
        raise UsageError(
            f"{format_count(len(shared), 'file')} would be written by several images each: "
            f"{'; '.join(lines)}{more}; {remedy}, rename some images, or skip some with --exclude"
        )
    for output, (source,) in writers.items():
        for parent in output.parents:
            if parent in writers:
                raise UsageError(
                    f"{parent} would be the alpha of {writers[parent][0]} and also the folder of the alpha of "
                    f"{source}; give --keep-suffix or --name, or rename one of the two"
                )
            if parent == layout.folder:
                break
    _check_similar_names({output: source for output, (source,) in writers.items()}, layout.folder)


def _check_similar_names(writers: Mapping[Path, str], folder: Path) -> None:
    """Raise UsageError if two output paths are the same file on this drive.

    Some drives ignore case, or whether an accented letter is stored as one character or two.
    ``writers``: the source of each output.
    """
    groups: dict[str, list[Path]] = {}
    for output in writers:
        groups.setdefault(_fold_name(str(output.relative_to(folder))), []).append(output)
    similar = [pair for group in groups.values() for pair in combinations(group, 2)]
    if not similar:
        return
    is_same_name = functools.cache(functools.partial(_is_same_name, folder))
    with contextlib.suppress(OSError), _existing_folder(folder):  # the run reports a folder that cannot be created
        for output, other in similar:
            if all(
                name == other_name or is_same_name(name, other_name)
                for name, other_name in zip(output.parts, other.parts, strict=True)
            ):
                raise UsageError(
                    f"{writers[output]} and {writers[other]} would be written to the same file: {folder} does not "
                    f"distinguish {output} from {other}, whose names differ only by case or by the encoding of "
                    "accents; rename one of the images, or skip it with --exclude"
                )


def _fold_name(name: str) -> str:
    """Return a name without the differences that some drives ignore: case, and the encoding of accents."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


@contextlib.contextmanager
def _existing_folder(folder: Path) -> Iterator[None]:
    """Context in which a folder exists. If it did not exist before, it is removed afterwards."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in created:
                path.rmdir()


def _is_same_name(folder: Path, name: str, other: str) -> bool:
    """Return whether two names are the same file in a folder, by writing a test file; False if that fails."""
    start = temporary_name().removesuffix(TEMPORARY_SUFFIX)
    probe = folder / f"{start}{name}{TEMPORARY_SUFFIX}"
    with contextlib.suppress(OSError):
        probe.touch()
        try:
            return (folder / f"{start}{other}{TEMPORARY_SUFFIX}").exists()
        finally:
            probe.unlink()
    return False
