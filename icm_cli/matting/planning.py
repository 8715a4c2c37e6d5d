"""Plan the images of a run: their sources, outputs, hints and mattes. Neither references nor model are needed."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

from icm_cli.errors import UsageError, format_count, list_first, shorten
from icm_cli.files.atomic_writes import TEMPORARY_PREFIX
from icm_cli.files.paths import RECORD_FOLDER
from icm_cli.guidance.annotations import AREA_NAMES
from icm_cli.images.colour import DEFAULT_COLOUR, ColourSettings
from icm_cli.images.decoding import SourceFile, library_settings
from icm_cli.images.image_file import IMAGE_SUFFIXES, MOVIE_SUFFIXES
from icm_cli.images.writing import FORMAT_SUFFIXES, OutputFormat
from icm_cli.matting.frames import (
    FrameName,
    FramePattern,
    FrameRanges,
    missing_frames,
    page_name,
    parse_frame_range,
)
from icm_cli.matting.hint_files import HintFiles, check_image_hints
from icm_cli.matting.jobs import DEFAULT_NAME, Job, OutputLayout, check_collisions, check_overwrites
from icm_cli.matting.mattes import GARBAGE, KEEP, MatteFiles, assign_mattes
from icm_cli.matting.sources import PathResolver, SkippedFiles, Sources, find_sources, name_below, natural_sort_key
from icm_cli.options import (
    ColourOptions,
    ImageFormat,
    MatteOptions,
    MissingPolicy,
    OutputOptions,
    SequenceOptions,
    SourceOptions,
)
from icm_cli.reports.result import ImageResult

EMPTY_SHARD = "there is nothing to matte, as shard {} contains no image; the other shards contain those of {} ({})"
MAX_MISSING_JOBS = 10_000
"""Largest number of missing frames that are reported one by one."""
_VERSION_SUFFIX = re.compile(r"\.([^\W_]?)[0-9]+")
"""A version at the end of the name of a folder, such as ".2" in mattes##v1.2; it is not the suffix of a file."""


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

    def selects_name(self, name: Path) -> bool:
        """Return whether an image of this name below the root passes ``include`` and ``exclude``."""
        is_included = not self.include or _matches_any(name, self.include)
        return is_included and not _matches_any(name, self.exclude)


def _matches_any(name: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name.as_posix(), pattern) or fnmatch(name.name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class InputFiles:
    """Files that a run reads, other than the images to matte."""

    references: Sequence[Path] = ()
    """References and their masks."""
    hints: HintFiles | None = None
    garbage: MatteFiles | None = None
    keep: MatteFiles | None = None

    @property
    def mattes(self) -> list[Path]:
        """Files of the garbage and keep mattes."""
        return [path for files in (self.garbage, self.keep) if files for path in files.paths]


@dataclass(frozen=True)
class PlannedImages:
    """The images of a run, and the files that are read for them."""

    jobs: Sequence[Job]
    """A job for every image to matte, sorted by name, with its hints, mattes and output paths."""
    inputs: InputFiles
    names_outside_range: Sequence[Path]
    """Names of the images outside of the range of ``--frames``."""


def plan_images(
    options: MatteOptions,
    layout: OutputLayout,
    colour: ColourSettings,
    skipped_files: SkippedFiles,
    notice: Callable[[str], None],
) -> PlannedImages:
    """Find the images of a run with their hints and mattes, and choose their output paths. Raises UsageError."""
    inputs = InputFiles(
        options.references.files,
        None if options.hints.hints is None else HintFiles.find(options.hints.hints, skipped_files),
        MatteFiles.find(GARBAGE, options.hints.garbage, notice),
        MatteFiles.find(KEEP, options.hints.keep, notice),
    )
    is_ignored = () if inputs.hints is None else (inputs.hints.is_hint_file,)
    sources = find_sources(options.sources.src, options.sources.root, skipped_files, *is_ignored)
    source_filter = _source_filter(options.sources, options.sequences)
    return JobPlanner(sources, layout, skipped_files, source_filter, inputs, colour).plan_images()


@dataclass(frozen=True)
class JobPlanner:
    """Chooses the images to matte among the sources, and their output paths."""

    sources: Sources
    layout: OutputLayout
    skipped_files: SkippedFiles
    source_filter: SourceFilter = SourceFilter()
    inputs: InputFiles = InputFiles()
    colour: ColourSettings = DEFAULT_COLOUR
    _resolve: PathResolver = field(default_factory=PathResolver)

    def plan_images(self) -> PlannedImages:
        """Return the jobs of the images that pass the filter, and the names of those outside of ``--frames``.

        Files in the output folder, references, masks and mattes are skipped. ``missing`` of the filter decides what
        happens with missing frames: a notice, jobs that fail, or an error. A notice is given if no image is left.
        Nothing is written. Raises UsageError.
        """
        self._check_folders()
        self._check_filter()
        images = self.sources.files
        if self.inputs.hints is not None:
            images = self.inputs.hints.remove_hint_files(images, self.sources.root)
        inspected = self._select_images(images)
        missing = self._plan_missing_frames(inspected)
        selected = self._select_frames(inspected)
        outside = inspected.keys() - set(selected)
        files = sorted([*selected, *missing], key=natural_sort_key)
        jobs = [job for path in files for job in self._jobs_of_file(path, inspected.get(path))]
        if not jobs:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in self.skipped_files.items() if count)
            self.skipped_files.notify(
                f"there is nothing to matte, as every image in {self.sources.root} is skipped: {reasons}"
            )
        self._check_outputs(jobs)
        jobs = self._add_mattes(jobs)
        hint_files = self._assign_hints(jobs, images)
        if self.source_filter.shard is not None:
            jobs = self._select_shard(jobs, *self.source_filter.shard)
        names_outside_range = [name for path in outside for name in self._names_in_file(path, inspected[path])]
        return PlannedImages(self._add_hints(jobs, hint_files), self.inputs, names_outside_range)

    @cached_property
    def _real_output(self) -> Path:
        return self._resolve(self.layout.folder)

    @cached_property
    def _real_references(self) -> set[Path]:
        """Real paths of the references and masks."""
        return set(map(self._resolve, self.inputs.references))

    def _check_folders(self) -> None:
        """Raise UsageError if alphas would be written next to the sources or the hints, with the same names."""
        root, hints = self.sources.root, self.inputs.hints
        has_same_names = self.layout.template == DEFAULT_NAME and self.layout.pattern is None
        if has_same_names and self._resolve(root) == self._real_output:
            raise UsageError(f"the source folder {root} is also the output folder; give --out another folder")
        if hints is not None and hints.folder == self._real_output:
            raise UsageError(f"the folder of --hints {hints.where} is also the output folder; give another --out")

    def _check_filter(self) -> None:
        """Raise UsageError if ``--include`` matches no image, or if ``--frames`` is given and no image has a number."""
        files, root = self.sources.files, self.sources.root
        include = SourceFilter(self.source_filter.include)
        if not any(include.selects_name(name_below(path, root)) for path in files):
            patterns = " or ".join(f"--include {pattern!r}" for pattern in include.include)
            raise UsageError(
                f"{patterns} matches no image in {root}, which has {format_count(len(files), 'image')}, such as "
                f"{name_below(files[0], root)}; expected a glob for the path below that folder, or for "
                "the file name"
            )
        if self.source_filter.frames is not None and all(FrameName.from_path(path).number is None for path in files):
            raise UsageError(
                f"--frames selects by frame number, and no image in {root} has one, such as "
                f"{name_below(files[0], root)}; expected names such as shot.1001.exr; omit --frames"
            )

    def _select_images(self, files: Sequence[Path]) -> dict[Path, SourceFile]:
        """Return the images that may be matted, with what their headers state. Other files are counted as skipped."""
        root, resolve, exclude = self.sources.root, self._resolve, self.skipped_files.exclude
        if resolve(root) in self._real_output.parents:
            files = exclude(files, lambda path: self._real_output in resolve(path).parents, "in the output folder")
        files = exclude(files, self._is_reference, "a reference or its mask")
        real_mattes = set(map(resolve, self.inputs.mattes))
        files = exclude(files, lambda path: resolve(path) in real_mattes, "a garbage or keep matte")
        files = [path for path in files if not path.name.startswith(TEMPORARY_PREFIX)]
        files = exclude(
            files,
            lambda path: not self.source_filter.selects_name(name_below(path, root)),
            "excluded by --include or --exclude",
            is_reported=False,
        )
        with library_settings():  # entered once instead of for each file
            inspected = {path: self.sources.inspected.get(path) or SourceFile.inspect(path) for path in files}
        files = exclude(files, lambda path: inspected[path].type.is_icm_output, "made by icm")
        return {path: inspected[path] for path in files}

    def _select_frames(self, files: Collection[Path]) -> Collection[Path]:
        """Return the files whose frame number is in ``--frames``."""
        frames = self.source_filter.frames
        if frames is None:
            return files
        return self.skipped_files.exclude(
            files, lambda path: FrameName.from_path(path).number not in frames, "not in --frames", is_reported=False
        )

    def _is_reference(self, path: Path) -> bool:
        """Return whether a file is a reference or its mask."""
        return self._resolve(path) in self._real_references

    def _plan_missing_frames(self, found: Collection[Path]) -> list[Path]:
        """With ``--missing report``, return the paths of the missing frames; their planned jobs will fail.

        With ``--missing skip``, a notice names the missing frames. With ``--missing error``, they raise UsageError.
        ``found``: files that are not excluded. References and masks in the sequence count as present, too.
        """
        wanted, policy = self.source_filter.frames, self.source_filter.missing
        if not self.sources.is_sequence and wanted is None:
            return []
        present = [*found, *filter(self._is_reference, self.sources.files)]
        excluded = set(self.sources.files).difference(present)
        files: list[Path] = []
        for pattern, frames in missing_frames(present, wanted, excluded).items():
            problem = f"{pattern} has no frame {frames}"
            if policy == "error":
                raise UsageError(
                    f"{problem}; nothing was written, as --missing error demands; add the frames and run again"
                )
            if policy == "skip":
                alphas = self._find_earlier_alphas(pattern, frames)
                result = f"its earlier alpha {list_first(alphas)} is kept" if alphas else "no alpha is written"
                self.skipped_files.notify(f"{problem}; {result}")
                continue
            if len(files) + frames.count > MAX_MISSING_JOBS:
                raise UsageError(
                    f"{problem}, which are {frames.count} frames; --missing report lists at most {MAX_MISSING_JOBS} "
                    "missing frames; select frames with --frames, or give --missing skip"
                )
            files += [Path(pattern.folder, pattern.frame_name(number)) for number in frames]
        return files

    def _find_earlier_alphas(self, pattern: FramePattern, frames: FrameRanges) -> list[Path]:
        """Return the existing alphas of missing frames, in order.

        For more missing frames than files in the folder, the numbers in the names of the files are tried instead of
        all frames, so that a gap of a million frames takes no time.
        """

        def alpha_of(number: int) -> Path:
            source = Path(pattern.folder, pattern.frame_name(number))
            return self.layout.output_path(name_below(source, self.sources.root))

        folder = alpha_of(frames.ranges[0].start).parent
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if frames.count <= len(names):
            numbers = set(frames)
        else:
            candidates = {int(digits) for name in names for digits in re.findall("[0-9]+", name)}
            numbers = {number for number in candidates if number in frames}
        return [alpha for alpha in map(alpha_of, sorted(numbers)) if alpha.name in names]

    def _names_in_file(self, source: Path, inspected: SourceFile | None) -> list[Path]:
        """Return the names of the images in a file: a.png, or a.0001.png, a.0002.png, ... for several.

        ``inspected``: None for a missing frame.
        """
        name = name_below(source, self.sources.root)
        page_count = 1 if inspected is None else inspected.frame_count
        return [name] if page_count == 1 else [page_name(name, page) for page in range(page_count)]

    def _jobs_of_file(self, source: Path, inspected: SourceFile | None) -> list[Job]:
        """Return a job for each image in a file. ``inspected``: None for a missing frame."""
        names = self._names_in_file(source, inspected)
        jobs = []
        for page, name in enumerate(names):
            output, page_number = self.layout.output_path(name), page + 1 if len(names) > 1 else 0
            job = Job(
                source,
                name,
                output,
                ImageResult(str(source), str(output), "planned", name=name.as_posix(), page=page_number),
                page=page,
                colour=self.colour,
                root=os.path.abspath(self.sources.root),  # noqa: PTH100  resolve() would follow links
                is_missing=inspected is None,
                has_trimap=self.layout.has_trimap,
                inspected=inspected,
            )
            jobs.append(job)
        return jobs

    def _check_outputs(self, jobs: Sequence[Job]) -> None:
        """Raise UsageError if an output would replace an input or another output."""
        check_overwrites(jobs, [path for job in jobs for path in job.files], "a source image", self._resolve)
        check_overwrites(jobs, self.inputs.references, "a reference or its mask", self._resolve)
        check_overwrites(jobs, self.inputs.mattes, "a garbage or keep matte", self._resolve)
        check_collisions(jobs, self.layout)

    def _add_mattes(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs with the files of their mattes. Raises UsageError if the mattes belong to no source."""
        if self.inputs.garbage is None and self.inputs.keep is None:
            return list(jobs)
        others = self._real_references.union(map(self._resolve, self.inputs.mattes))
        images = [path for path in self.sources.files if self._resolve(path) not in others]
        names = [name_below(path, self.sources.root) for path in images]
        mattes = assign_mattes([job.name for job in jobs], names, self.inputs.garbage, self.inputs.keep)
        return [replace(job, mattes=job_mattes) for job, job_mattes in zip(jobs, mattes, strict=True)]

    def _assign_hints(self, jobs: Sequence[Job], images: Sequence[Path]) -> dict[Path, list[Path]]:
        """Return the hint files of each image that has some, by the name of its job. Raises UsageError.

        ``images``: all sources, also those that are not matted.
        """
        if self.inputs.hints is None:
            return {}
        real_inputs = self._real_references.union(map(self._resolve, images))

        def is_input_or_output(path: Path) -> bool:
            real = self._resolve(path)
            return real in real_inputs or self._is_output(real)

        files, unused = self.inputs.hints.assign_files([job.name for job in jobs], is_input_or_output)
        files_with_pages = {path for job in jobs if job.planned.page for path in job.files}
        self.inputs.hints.report_unused(unused, self.sources, files_with_pages, self._is_reference, self.skipped_files)
        check_overwrites(jobs, [path for paths in files.values() for path in paths], "a hint", self._resolve)
        return files

    def _is_output(self, path: Path) -> bool:
        """Return whether a file is in the output folder. Files in its ``.icm`` are not: hints may be stored there."""
        folder = self._real_output
        return folder in path.parents and RECORD_FOLDER not in path.relative_to(folder).parts

    def _select_shard(self, jobs: Sequence[Job], number: int, count: int) -> list[Job]:
        """Return the jobs of shard ``number`` (from 1) of ``count``, or give a notice if it is empty.

        The hash of its name decides the shard of an image, so all machines agree, whatever other images they find.
        """

        def shard_of(job: Job) -> int:
            name = job.planned.name.encode(errors="surrogateescape")
            return int(hashlib.sha256(name).hexdigest(), 16) % count + 1

        selected = [job for job in jobs if shard_of(job) == number]
        if jobs and not selected:
            self.skipped_files.notify(EMPTY_SHARD.format(f"{number}/{count}", self.sources.root, len(jobs)))
        return selected

    def _add_hints(self, jobs: Sequence[Job], files: Mapping[Path, Sequence[Path]]) -> list[Job]:
        """Return the jobs with their hint files. Raises UsageError for a file that cannot be used."""
        with_hints = [job for job in jobs if job.name in files]
        headers = {job.name: job.header_file for job in with_hints}
        hints = check_image_hints({job.name: files[job.name] for job in with_hints}, headers)
        files_by_label: defaultdict[str, list[Path]] = defaultdict(list)
        for image_hints in hints.values():
            for label, path in image_hints.other_labels.items():
                files_by_label[label].append(path)
            for sentence in image_hints.notices:
                self.skipped_files.notify(sentence)
        for label, paths in files_by_label.items():
            self.skipped_files.notify(
                f"the label {label} of hints {list_first(paths)} was taken for fg, on the object; expected one of "
                f"{', '.join(AREA_NAMES)}; change the label if it marks something else"
            )
        return [
            replace(job, hints=hints[job.name], planned=replace(job.planned, has_hints=True))
            if job.name in hints
            else job
            for job in jobs
        ]


def choose_output(options: OutputOptions) -> tuple[OutputFormat, OutputLayout]:
    """Return the format of the output files, and the layout of their paths. Raises UsageError."""
    pattern, format_ = _pattern_and_format(options.out, options.format)
    output = OutputFormat(
        format=format_,
        depth=options.depth,
        channel=options.channel,
        foreground=options.foreground,
        invert=options.invert,
        trimap=options.trimap,
        band_px=options.trimap_band,
    )
    if options.keep_suffix and (options.name is not None or pattern is not None):
        raise UsageError(
            "--keep-suffix names alphas a.jpg.png; remove it, or remove --name and the frame pattern of --out"
        )
    template = DEFAULT_NAME if options.name is None else options.name
    if options.keep_suffix:
        template = "{stem}{frame}{suffix}"
    folder = Path(options.out if pattern is None else pattern.folder)
    return output, OutputLayout(folder, template, output.suffix, pattern, has_trimap=output.trimap == "also")


def _pattern_and_format(out: str, format_: ImageFormat | None) -> tuple[FramePattern | None, ImageFormat]:
    """Return the frame pattern in ``--out``, None if it is a folder, and the file format.

    Raises UsageError if the two contradict each other, or if ``out`` is named like a single image or a movie.
    """
    path, default = Path(out), format_ or "png"
    if path.is_dir():
        return None, default
    pattern = FramePattern.parse(out)
    if pattern is None:
        _check_folder_name(out)
        return None, default
    suffix = Path(f"x{pattern.after}").suffix.lower()  # Path finds a suffix only after a name, such as "x"
    fitting = next((name for name, suffixes in FORMAT_SUFFIXES.items() if suffix in suffixes), None)
    if fitting is None:
        if not suffix or _VERSION_SUFFIX.fullmatch(suffix):  # the name of a folder, such as show.####.v2
            return None, default
        raise UsageError(f"--out {out} is a frame pattern with extension {suffix}; expected .png, .tif, .tiff or .exr")
    if format_ not in (None, fitting):
        raise UsageError(
            f"--out {out} has the extension of format {fitting}, and --format is {format_}; remove one of the two"
        )
    return pattern, fitting


def _check_folder_name(out: str) -> None:
    """Raise UsageError if ``--out`` is named like a single image or a movie."""
    path = Path(out)
    suffix = path.suffix.lower()
    if suffix in MOVIE_SUFFIXES:
        raise UsageError(f"--out {out} is named like a movie, and icm writes an alpha per frame; expected a folder")
    if suffix in IMAGE_SUFFIXES:
        raise UsageError(
            f"--out {out} is named like an image, and every image has its own alpha; expected a folder, or a frame "
            f"pattern such as {path.with_suffix('.####' + path.suffix)}"
        )


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


def _source_filter(sources: SourceOptions, sequences: SequenceOptions) -> SourceFilter:
    """Return the filter that ``--include``, ``--frames``, ``--shard`` and others define.

    With ``--shot``, ``--shard`` is applied later, because it must divide the frames in the order of the shot.
    """
    numbers = None if sequences.frames is None else parse_frame_range(sequences.frames)
    shard = None if sequences.shard is None or sequences.shot else parse_shard(sequences.shard)
    return SourceFilter(sources.include, sources.exclude, numbers, sequences.missing, shard)


def choose_colour_settings(options: ColourOptions) -> tuple[ColourSettings, ColourSettings]:
    """Return the colour settings for reading the sources, and those for reading the references.

    References are read as the sources are, unless ``--ref-colorspace`` or ``--ref-layer`` is given. Raises UsageError
    for an unknown OpenColorIO configuration, colour space or view.
    """
    layer = options.layer or ""
    sources = ColourSettings(
        options.colorspace, options.ocio or "", options.view or "", options.exposure, layer, options.white
    )
    references = replace(
        sources,
        space=options.ref_colorspace or sources.space,
        layer=layer if options.ref_layer is None else options.ref_layer,
    )
    for colour in (sources, references):
        colour.validate()
    return sources, references
