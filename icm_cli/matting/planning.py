"""Plan the images of a run: their sources, outputs, hints and mattes. Neither references nor model are needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from icm_cli.errors import UsageError
from icm_cli.images.colour import ColourSettings
from icm_cli.images.image_file import IMAGE_SUFFIXES, MOVIE_SUFFIXES
from icm_cli.images.writing import FORMAT_SUFFIXES, OutputFormat
from icm_cli.matting.frames import FramePattern, parse_frame_range
from icm_cli.matting.hint_files import HintFiles
from icm_cli.matting.jobs import DEFAULT_NAME, Job, OutputLayout, SourceFilter, parse_shard, plan_jobs
from icm_cli.matting.mattes import GARBAGE, KEEP, MatteFiles
from icm_cli.matting.sources import SkippedFiles, find_sources
from icm_cli.options import ColourOptions, ImageFormat, MatteOptions, OutputOptions, SequenceOptions, SourceOptions

_VERSION_SUFFIX = re.compile(r"\.([^\W_]?)[0-9]+")
"""A version at the end of the name of a folder, such as ".2" in mattes##v1.2; it is not the suffix of a file."""


@dataclass(frozen=True)
class PlannedImages:
    """The images of a run, and the files with hints and mattes for them."""

    jobs: Sequence[Job]
    hint_files: HintFiles | None
    mattes: Sequence[Path]
    """Files of the garbage and keep mattes."""


def plan_images(
    options: MatteOptions,
    layout: OutputLayout,
    colour: ColourSettings,
    skipped_files: SkippedFiles,
    notice: Callable[[str], None],
) -> PlannedImages:
    """Find the images of a run with their hints and mattes, and choose their output paths. Raises UsageError."""
    hint_files = None if options.hints.hints is None else HintFiles.find(options.hints.hints, skipped_files)
    garbage = MatteFiles.find(GARBAGE, options.hints.garbage, notice)
    keep = MatteFiles.find(KEEP, options.hints.keep, notice)
    is_ignored = () if hint_files is None else (hint_files.is_hint_file,)
    jobs = plan_jobs(
        find_sources(options.sources.src, options.sources.root, skipped_files, *is_ignored),
        layout,
        source_filter=_source_filter(options.sources, options.sequences),
        references=options.references.files,
        colour=colour,
        skipped_files=skipped_files,
        hint_files=hint_files,
        garbage=garbage,
        keep=keep,
    )
    return PlannedImages(jobs, hint_files, [path for each in (garbage, keep) if each for path in each.paths])


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
    path = Path(out)
    if path.is_dir():
        return None, format_ or "png"
    pattern = FramePattern.parse(out)
    if pattern is None and path.suffix.lower() in MOVIE_SUFFIXES:
        raise UsageError(f"--out {out} is named like a movie, and icm writes an alpha per frame; expected a folder")
    if pattern is None and path.suffix.lower() in IMAGE_SUFFIXES:
        raise UsageError(
            f"--out {out} is named like an image, and every image has its own alpha; expected a folder, or a frame "
            f"pattern such as {path.with_suffix('.####' + path.suffix)}"
        )
    # Path finds a suffix only after a name, such as "x".
    suffix = "" if pattern is None else Path(f"x{pattern.after}").suffix.lower()
    if not suffix:  # the name of a folder
        return None, format_ or "png"
    fitting = next((name for name, suffixes in FORMAT_SUFFIXES.items() if suffix in suffixes), None)
    if fitting is None and _VERSION_SUFFIX.fullmatch(suffix):  # a folder named like show.####.v2
        return None, format_ or "png"
    if fitting is None:
        raise UsageError(f"--out {out} is a frame pattern with extension {suffix}; expected .png, .tif, .tiff or .exr")
    if format_ not in (None, fitting):
        raise UsageError(
            f"--out {out} has the extension of format {fitting}, and --format is {format_}; remove one of the two"
        )
    return pattern, fitting


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
