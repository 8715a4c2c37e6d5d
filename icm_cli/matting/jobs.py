"""Jobs: the images to matte, each with the output path of its alpha."""

from __future__ import annotations

import contextlib
import functools
import os
import string
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import cachetools

from icm_cli.errors import FileAccessError, ImageError, ImageMemoryError, UsageError, format_count, list_first, shorten
from icm_cli.files.atomic_writes import TEMPORARY_SUFFIX, FileIdentity, temporary_name
from icm_cli.files.digests import combined_digest
from icm_cli.files.paths import MAX_NAME_BYTES, describe_obstacle
from icm_cli.images.colour import DEFAULT_COLOUR, ColourSettings
from icm_cli.images.decoding import SourceFile, open_image
from icm_cli.images.image_file import ImageFile
from icm_cli.images.reading import CompositeSource, SourceImage, compose_image, read_image, read_source_image
from icm_cli.matting.frames import FrameName, FramePattern
from icm_cli.matting.hint_files import ImageHints
from icm_cli.matting.mattes import ImageMattes
from icm_cli.matting.sources import MAX_LISTED_FILES, real_path
from icm_cli.reports.result import ImageResult

DEFAULT_NAME = "{stem}{frame}"
TRIMAP_SUFFIX = ".trimap.png"
"""End of the name of a trimap that is written next to an alpha."""
OBSTACLE_ADVICE = "remove it, or give another folder or name"
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

    @property
    def hints_digest(self) -> str:
        """Digest of the hints of this image; "" without hints."""
        return "" if self.hints is None else self.hints.digest

    def input_digest(self) -> str:
        """Return a digest of the files of the image, its hints and its mattes, as they were when it was planned."""
        state = self.inspected and (self.inspected.planned_state or self.inspected.error)
        matte_digests = None if self.mattes is None else self.mattes.digests
        return combined_digest(self.planned.name, str(state), self.hints_digest, str(matte_digests))

    def is_permanent_error(self, error: ImageError) -> bool:
        """Return whether an error in reading the image occurs in every run with the same :meth:`input_digest`."""
        if self.inspected is None or isinstance(error, ImageMemoryError):
            return False
        was_unreadable = not self.inspected.planned_state or (self.mattes is not None and self.mattes.were_unreadable)
        if isinstance(error, FileAccessError) and (error.is_transient or not was_unreadable):
            return False  # a file that was readable before may be readable again
        return not self.inspected.has_changed()

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


def check_collisions(jobs: Sequence[Job], layout: OutputLayout) -> None:
    """Raise UsageError if two images have the same output path, or one output is a folder of another."""
    writers: dict[Path, list[str]] = {}
    for job in jobs:
        writers.setdefault(job.output, []).append(str(job.source))
        if job.has_trimap:
            writers.setdefault(job.trimap, []).append(f"the trimap of {job.source}")
    shared = {output: sources for output, sources in writers.items() if len(sources) > 1}
    if shared:
        lines = [f"{' and '.join(sources)} to {output}" for output, sources in shared.items()]
        listed = list_first(lines, MAX_LISTED_FILES, "; ", "; and")
        remedy = "give --keep-suffix (a.jpg.png, a.png.png)"
        if layout.pattern is not None:
            remedy = "give --out a folder instead of a frame pattern"
        elif layout.template != DEFAULT_NAME:
            remedy = "use more of {stem}, {frame} and {suffix} in --name"
        raise UsageError(
            f"{format_count(len(shared), 'file')} would be written by several images each: "
            f"{listed}; {remedy}, rename some images, or skip some with --exclude"
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
