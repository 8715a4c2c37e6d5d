"""``icm_cli.matte``: one reference in, a folder of alphas out. The body of the ``icm matte`` command."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from icm_cli.device import parse_devices
from icm_cli.environment import DEFAULT_WORKERS
from icm_cli.errors import Problem, UsageError, did_you_mean
from icm_cli.events import Listener
from icm_cli.files import Paths, as_path, as_paths, remove_stale_temporaries
from icm_cli.images.colour import ColourSettings
from icm_cli.images.image_file import IMAGE_SUFFIXES, MOVIE_SUFFIXES, movie_message
from icm_cli.images.writing import FORMAT_SUFFIXES, OutputFormat
from icm_cli.matting.cluster import RayCluster
from icm_cli.matting.devices import EngineSetup, Runner, WorkerPool
from icm_cli.matting.engine import EngineOptions, keep_finished
from icm_cli.matting.frames import FramePattern, MissingPolicy, parse_frame_range
from icm_cli.matting.jobs import DEFAULT_NAME, Job, OutputLayout, SourceFilter, check_overwrites, parse_shard, plan_jobs
from icm_cli.matting.model_choice import ModelChoice
from icm_cli.matting.outcome import Outcome, environment_settings
from icm_cli.matting.references import Reference, read_references
from icm_cli.matting.shot import Key, Shot, apart, described
from icm_cli.matting.sources import SkippedFiles, find_sources, real_path
from icm_cli.model.lite.finetuning import finetuning_digest_text
from icm_cli.reports.report import PageImages, Report
from icm_cli.reports.result import ImageResult
from icm_cli.reports.write import ReportFiles

ALLOWED = frozenset({"empty-alpha", "16-bit-alpha", "missing-alpha"})
"""Kinds of odd or missing ground truths that are no failure here."""


def matte(
    ref: Paths,
    mask: Paths = (),
    *,
    mask_label: str | None = None,
    mask_orientation: str = "auto",
    src: str | Path,
    out: str | Path,
    model: str | None = None,
    checkpoint: str | Path | None = None,
    weights: str | None = None,
    edges: str = "model",
    edges_weights: str | None = None,
    device: str = "auto",
    ray: str | None = None,
    ray_cpus: int | None = None,
    dtype: str = "auto",
    batch_size: int | str = "auto",
    seed: int = 0,
    workers: int = DEFAULT_WORKERS,
    colorspace: str = "auto",
    ref_colorspace: str | None = None,
    layer: str = "",
    ref_layer: str | None = None,
    ocio: str | Path | None = None,
    view: str | None = None,
    exposure: float = 0.0,
    root: str | Path | None = None,
    white: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    frames: str | None = None,
    missing: str = "skip",
    shard: str | None = None,
    shot: bool = False,
    learn_steps: int | None = None,
    name: str | None = None,
    keep_suffix: bool = False,
    format: str | None = None,
    depth: str | None = None,
    channel: str = "A",
    foreground: str = "none",
    invert: bool = False,
    trimap: str = "none",
    trimap_band: int = 10,
    overwrite: bool = False,
    gt: str | Path | None = None,
    report: Paths = (),
    contact_sheet: str | Path | None = None,
    dry_run: bool = False,
    offline: bool = False,
    fail_fast: bool = False,
    listener: Listener | None = None,
) -> Report:
    """Pull the thing that the references show out of every image of ``src``, one alpha PNG each below ``out``.

    The arguments are the options of ``icm matte`` (see its help). Alphas are uint8,
    one channel, of exactly the source's size; one that an earlier run made with the same settings from the same
    source is kept. An image that fails is named in the report and the others go on.

    Returns the report; its ``exit_code`` is 1 if any image failed or its ground truth could not be used. Raises
    UsageError, ConfigError or OutputError.
    """
    listener = listener or Listener()
    start = time.perf_counter()
    _check(workers, out)
    if ray is not None or len(parse_devices(device)) > 1:
        _refuse_on_several(shot=shot, learn_steps=learn_steps)
    refs, masks = as_paths(ref), as_paths(mask)
    report_files = ReportFiles.from_options(report, contact_sheet)
    pattern, format = _pattern_and_format(out, format)
    form = {"format": format, "depth": depth, "channel": channel, "foreground": foreground, "invert": invert}
    output = OutputFormat.from_options(**form, trimap=trimap, band_px=trimap_band)
    place = _place(out, pattern, name, output, keep_suffix=keep_suffix)
    wanted = _choice(include, exclude, frames, missing, None if shot else shard)
    if gt is not None and (output.invert or output.trimap == "instead"):
        raise UsageError("--gt scores alphas; leave --invert and --trimap instead out")
    shared = ColourSettings(colorspace, str(ocio or ""), view or "", exposure, layer, white)
    colour, of_references = _colours(shared, ref_colorspace, ref_layer)
    references = read_references(refs, masks, listener.on_notice, mask_label, of_references, mask_orientation)
    skipped_files, shown = SkippedFiles(listener.on_notice), [*refs, *masks]
    sources = find_sources(src, as_path(root), skipped_files)
    jobs = plan_jobs(sources, place, source_filter=wanted, references=shown, colour=colour, skipped_files=skipped_files)
    jobs, in_order = _as_shot(jobs, refs, references, shard) if shot else (jobs, None)
    jobs, in_order, truths, problems = _with_truths(jobs, in_order, gt)
    inputs = [str(path) for job in jobs for path in (job.source, *job.outputs)]
    report_files.check_no_overwrite([*shown, *truths, *inputs])
    checked = functools.partial(
        ModelChoice.checked,
        model,
        as_path(checkpoint),
        weights=weights,
        dtype=dtype,
        batch_size=batch_size,
        seed=seed,
        offline=offline,
        edges=edges,
        edges_weights=edges_weights,
    )
    with RayCluster.from_options(ray, ray_cpus, device) or contextlib.nullcontext() as cluster:
        choices = [cluster.choose_model(checked)] if cluster else [checked(device=one) for one in parse_devices(device)]
        if dry_run:
            return Report(settings={}, results=[_planned(job) for job in jobs])
        report_files.check_writable(place.folder)
        _clean({*(job.output.parent for job in jobs), *(path.parent for path in report_files.paths)}, listener)

        steps = choices[0].learn_steps(learn_steps, is_shot=shot)
        digest = _digest(choices[0], references, colour, output, steps, is_shot=shot)
        where = [*(choice.where.description for choice in choices), *([cluster.describe()] if cluster else [])]
        settings = _settings(src, choices[0], refs, masks, colour) | {"digest": digest, "device": "; ".join(where)}
        settings |= {"shot": shot, "learn_steps": steps}
        scoring = None
        if truths:
            from icm_cli.matting.ground_truth import RULE, ground_truth_scoring

            settings["protocol"] = {"title": str(src), **RULE.as_protocol(), "rounds": 1, "refs_per_group": len(refs)}
            scoring = ground_truth_scoring(workers, ALLOWED)
        page_images = PageImages(references_with_masks=[(one.rgb, one.guidance) for one in references], colour=colour)
        outcome = Outcome(
            Report(settings, allowed=ALLOWED, skipped_files=+skipped_files, page_images=page_images),
            [job.planned for job in jobs],
            listener,
            start=start,
            scoring=scoring,
        )
        for problem in problems:
            outcome.add_problem(problem)
        engine = EngineOptions([digest], choices[0].batch_size, workers, overwrite, fail_fast, output, in_order)
        works = [EngineSetup(choice, references, steps, engine) for choice in choices]
        crew = functools.partial(_crew, works, cluster, place.folder, listener)
        _run(jobs, works[0], crew, outcome, report_files, listener)
        return outcome.report


def _check(workers: int, out: str | Path) -> None:
    """Raises UsageError for numbers and names that nothing can be done with."""
    if workers < 1:
        raise UsageError(f"workers is {workers}; expected 1 or more")
    if not str(out):
        raise UsageError("the output folder is empty; give --out a folder for the alphas")


def _refuse_on_several(*, shot: bool, learn_steps: int | None) -> None:
    """Raises UsageError for what needs one device."""
    if shot:
        raise UsageError("--shot goes from frame to frame on one device; leave the others out, or share by --shard")
    if learn_steps:
        raise UsageError("--learn-steps learns on one device; leave the others out, or share by --shard")


def _with_truths(
    jobs: list[Job], in_order: Shot | None, gt: str | Path | None
) -> tuple[list[Job], Shot | None, list[Path], list[Problem]]:
    """Jobs, and their order, with their true alphas; all files of these; images without. Raises UsageError."""
    if gt is None:
        return jobs, in_order, [], []
    from icm_cli.matting.ground_truth import attach_ground_truth

    found, truths, problems = attach_ground_truth(jobs, gt)
    check_overwrites(found, truths, "a ground truth")
    return found, in_order and in_order.of_jobs(found), truths, problems


def _run(
    jobs: Sequence[Job],
    work: EngineSetup,
    crew: Callable[[Callable[[ImageResult], None]], contextlib.AbstractContextManager[Runner]],
    outcome: Outcome,
    report_files: ReportFiles,
    listener: Listener,
) -> None:
    """Keep the alphas that are there and matte the other images; the model is loaded only for these."""
    options = work.options
    listener.on_run_start(len(jobs))
    with outcome:
        remaining = list(options.shot.order if options.shot else jobs)
        if not options.overwrite:
            remaining = keep_finished(remaining, options.digests, options.workers, outcome.add, options.shot)
        with crew(outcome.add) if remaining else contextlib.nullcontext() as those:
            peak = those.peak_memory_bytes if those else work.choice.where.peak_memory_bytes
            with outcome.reported(report_files, peak):
                if those:
                    those.run(remaining)


def _as_shot(
    jobs: Sequence[Job], refs: Sequence[Path], references: Sequence[Reference], shard: str | None
) -> tuple[list[Job], Shot]:
    """The frames of shots, or of a shard of them, by name; and their order, from the references that are frames of one.

    Raises UsageError.
    """
    folders = {real_path(Path(job.root) / job.name.parent): job.name.parent for job in jobs}
    keys = []
    for number, ref in enumerate(refs):
        there = next((path for path in (ref, real_path(ref)) if real_path(path.parent) in folders), None)
        if there is not None:
            name = folders[real_path(there.parent)] / there.name
            keys.append(Key(name, functools.partial(references.__getitem__, number)))
    in_order = Shot.of(apart(jobs, keys))
    if shard is not None:
        in_order = in_order.shard(*parse_shard(shard))
    mine = {job.output for job in in_order.order}
    return [job for job in jobs if job.output in mine], in_order


def _digest(
    choice: ModelChoice,
    references: Sequence[Reference],
    colour: ColourSettings,
    output: OutputFormat,
    learn_steps: int,
    *,
    is_shot: bool,
) -> str:
    """Hash of all that decides an alpha beside its source, and its form."""
    carried = described() if is_shot else ""
    forms = filter(None, [colour.digest_text(), output.digest_text(), finetuning_digest_text(learn_steps), carried])
    return choice.digester()([*(one.digest for one in references), *forms])


def _settings(
    src: str | Path, choice: ModelChoice, refs: Sequence[Path], masks: Sequence[Path], colour: ColourSettings
) -> dict[str, Any]:
    """Settings that the report states."""
    shown = {"references": [str(path) for path in refs], "masks": [str(path) for path in masks]}
    sources = {"colorspace": colour.space, "layer": colour.layer, "white": colour.white}
    return {"title": str(src), **environment_settings(), **choice.as_settings(), **shown, **sources}


def _planned(job: Job) -> ImageResult:
    """The result of a job that nothing is done for, failed where its source cannot be a picture."""
    source = job.source
    assert isinstance(source, Path)
    if not source.exists():
        return replace(job.planned, status="failed", reason=f"{source} does not exist")
    if job.inspected is not None and job.inspected.type.is_movie:
        return replace(job.planned, status="failed", reason=f"{source}: {movie_message(source)}")
    return job.planned


def _pattern_and_format(out: str | Path, format_: str | None) -> tuple[FramePattern | None, str]:
    """The frame pattern that ``--out`` is, and the format: that of its ending where nothing else is said.

    Raises UsageError where the two do not agree, and for the name of one picture.
    """
    pattern = None if Path(out).is_dir() else FramePattern.parse(str(out))
    ending = "" if pattern is None else Path(f"x{pattern.after}").suffix.lower()
    if pattern is None and Path(out).suffix.lower() in MOVIE_SUFFIXES and not Path(out).is_dir():
        raise UsageError(f"--out {out} is named like a movie, and icm writes an alpha per frame; expected a folder")
    if pattern is None and Path(out).suffix.lower() in IMAGE_SUFFIXES and not Path(out).is_dir():
        raise UsageError(
            f"--out {out} is named like a picture, and every image has an alpha of its own; expected a folder, or "
            f"a pattern of frames such as {Path(out).with_suffix('.####' + Path(out).suffix)}"
        )
    if pattern is None or not ending:
        return None, format_ or "png"
    fitting = next((name for name, suffixes in FORMAT_SUFFIXES.items() if ending in suffixes), None)
    if fitting is None:
        raise UsageError(f"--out {out} is a pattern of frames and ends in {ending}; expected .png, .tif, .tiff or .exr")
    if format_ not in (None, fitting):
        raise UsageError(f"--out {out} is of format {fitting} by its ending, and --format is {format_}; leave one out")
    return pattern, fitting


def _place(
    out: str | Path, pattern: FramePattern | None, name: str | None, output: OutputFormat, *, keep_suffix: bool
) -> OutputLayout:
    """The place of the alphas. Raises UsageError for names that cannot be made."""
    if keep_suffix and (name is not None or pattern is not None):
        raise UsageError("--keep-suffix names alphas a.jpg.png; leave --name and a pattern as --out out, or it")
    template = "{stem}{frame}{suffix}" if keep_suffix else name if name is not None else DEFAULT_NAME
    folder = Path(out if pattern is None else pattern.folder)
    return OutputLayout(folder, template, output.suffix, pattern, has_trimap=output.trimap == "beside")


def _choice(
    include: Sequence[str], exclude: Sequence[str], frames: str | None, missing: str, shard: str | None
) -> SourceFilter:
    """The sources that are wanted. Raises UsageError."""
    if missing not in get_args(MissingPolicy):
        raise UsageError(f"--missing {missing!r} is not known. {did_you_mean(missing, get_args(MissingPolicy))}")
    numbers = None if frames is None else parse_frame_range(frames)
    return SourceFilter(include, exclude, numbers, missing, None if shard is None else parse_shard(shard))  # type: ignore[arg-type]


def _colours(
    colour: ColourSettings, ref_colorspace: str | None, ref_layer: str | None
) -> tuple[ColourSettings, ColourSettings]:
    """Colours of the sources and of the references. Raises UsageError for a name that is not known."""
    of_references = replace(
        colour,
        space=ref_colorspace or colour.space,
        layer=colour.layer if ref_layer is None else ref_layer,
    )
    for each in (colour, of_references):
        each.validate()
    return colour, of_references


def _crew(
    works: Sequence[EngineSetup],
    cluster: RayCluster | None,
    folder: Path,
    listener: Listener,
    on_result: Callable[[ImageResult], None],
) -> contextlib.AbstractContextManager[Runner]:
    """Make ready the model here, on several devices in a process for each, or in a cluster."""
    for work in works:
        listener.on_detail(work.choice.describe())
    if cluster:
        return contextlib.nullcontext(cluster.create_runner(works[0], folder, on_result, listener.on_notice))
    if len(works) > 1:
        return WorkerPool(works, on_result=on_result, notice=listener.on_notice)
    return contextlib.nullcontext(works[0].create_engine(on_result, listener.on_notice))


def _clean(folders: Collection[Path], listener: Listener) -> None:
    removed = sum(remove_stale_temporaries(folder) for folder in folders)
    if removed:
        listener.on_notice(f"removed {removed} temporary file(s) that a killed run left behind")
