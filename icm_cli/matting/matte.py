"""``icm_cli.matte``: extract the object of the references from images. The command ``icm matte`` calls it."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icm_cli.device import parse_devices, resolve_device
from icm_cli.environment import DEFAULT_WORKERS, limited_threads
from icm_cli.errors import Problem, UsageError, format_count
from icm_cli.events import Listener, check_argument
from icm_cli.files.atomic_writes import check_would_be_writable, check_writable, remove_stale_temporaries
from icm_cli.files.digests import combined_digest
from icm_cli.files.paths import is_file
from icm_cli.images.colour import ColourSettings
from icm_cli.images.writing import OutputFormat, write_mask
from icm_cli.matting.cluster import RayCluster
from icm_cli.matting.devices import EngineSetup, Runner, WorkerPool
from icm_cli.matting.digest import AlphaDigest, alpha_digest
from icm_cli.matting.dry_run import find_damage, planned_result
from icm_cli.matting.engine import EngineOptions
from icm_cli.matting.frames import FrameName, FramePattern
from icm_cli.matting.jobs import Job, OutputLayout, check_obstacles, check_overwrites
from icm_cli.matting.model_choice import ModelChoice, sequence_digest_parts
from icm_cli.matting.planning import EMPTY_SHARD, choose_colour_settings, choose_output, parse_shard, plan_images
from icm_cli.matting.prompting import MaskMaker
from icm_cli.matting.provenance import file_identities
from icm_cli.matting.references import Reference, ReferenceReader, check_negatives
from icm_cli.matting.result_collector import ResultCollector, environment_settings
from icm_cli.matting.resume import (
    ExistingAlphas,
    add_source_states,
    find_existing_alphas,
    read_source_states,
    report_alphas_without_source,
    report_lost_hints,
)
from icm_cli.matting.run_record import record_run
from icm_cli.matting.shot import Keyframe, Shot, split_shots
from icm_cli.matting.sources import SkippedFiles, find_sources, real_path
from icm_cli.options import MatteOptions, keyword_arguments
from icm_cli.options.definition import DigestPart
from icm_cli.quality.batch import add_batch_reasons
from icm_cli.reports.report import NEGATIVE_CAPTION, REFERENCE_CAPTION, PageImages, Report
from icm_cli.reports.result import ImageResult
from icm_cli.reports.write import ReportFiles

if TYPE_CHECKING:
    from icm_cli.scoring.pool import Scorer
    from icm_cli.scoring.task import ScoringRule

ALLOWED_PROBLEMS = frozenset({"empty-alpha", "16-bit-alpha", "missing-alpha"})
"""Kinds of bad or missing ground truths that do not count as failures in a matting run."""
PARTIAL_OPTIONS = frozenset({"include", "exclude", "frames", "shard"})
"""Options that select a part of the sources."""


@keyword_arguments(MatteOptions)
@limited_threads()
def matte(options: MatteOptions, *, listener: Listener | None = None) -> Report:
    """Extract the object of the references from every image of ``src`` as an alpha below ``out``.

    Alphas have exactly the size of their source. An alpha that an earlier run made with the same settings from the same
    source is kept. An image that fails is named in the report, and the other images are done.

    Returns the report. Its ``exit_code`` is 1 if an image failed or a ground truth could not be used. Raises
    UsageError, ConfigError or OutputError.

    >>> report = icm_cli.matte("ref.png", "mask.png", src="imgs", out="alphas")
    >>> report.exit_code
    0
    """
    listener = check_argument(listener, Listener, "listener")
    start = time.perf_counter()
    _check_devices(options)
    plan = make_plan(options, listener)
    if not options.given & PARTIAL_OPTIONS and not is_file(options.sources.src) and options.sources.src != "-":
        workers = options.resources.workers or DEFAULT_WORKERS
        report_alphas_without_source(plan.layout.folder, plan.jobs, workers=workers, notice=listener.on_notice)
    if path := options.references.save_mask:
        check_writable(path.parent)
        write_mask(path, plan.references[0].display_mask)
        listener.on_notice(f"wrote the mask of the reference to {path}")
    select_model = functools.partial(ModelChoice.from_options, options.model, options.resources.batch_size)
    ray = RayCluster.from_options(options.sequences.ray, options.sequences.ray_cpus, options.model.device)
    with ray or contextlib.nullcontext() as cluster:
        if cluster:
            choices = [cluster.choose_model(select_model)]
        else:
            choices = [select_model(device=name) for name in parse_devices(options.model.device)]
        if options.reports.dry_run:
            _check_folders_without_writing(plan)
            if downloads := choices[0].weights_to_download():  # digests need the weights
                listener.on_notice(
                    f"would download {', '.join(downloads)}; which alphas are kept is not known before that"
                )
                return Report(settings={}, results=[planned_result(job) for job in plan.jobs])
        run = _MattingRun(options, plan, _make_setups(options, plan, choices), cluster, listener)
        if options.reports.dry_run:
            return run.preview()
        plan.report_files.check_writable(plan.layout.folder)
        _remove_temporaries(plan, listener)
        with plan.report_files.claim_for_shard(plan.layout.folder, _shard_of(options)):
            return run.matte_all(start)


@dataclass(frozen=True)
class MattingPlan:
    """Everything that is known about a run before a model is chosen."""

    references: Sequence[Reference]
    colour: ColourSettings
    """Colour settings of the sources."""
    output: OutputFormat
    layout: OutputLayout
    report_files: ReportFiles
    jobs: Sequence[Job]
    shot: Shot | None
    skipped_files: SkippedFiles
    truths: Sequence[Path]
    """Paths of all ground truths."""


def make_plan(options: MatteOptions, listener: Listener) -> MattingPlan:
    """Read the references, find the sources and choose their outputs, without writing anything.

    Raises UsageError.
    """
    sequences, ground_truth, notice = options.sequences, options.reports.gt, listener.on_notice
    report_files = ReportFiles(
        options.reports.report,
        options.reports.contact_sheet,
        mask=options.references.save_mask,
        review_list=options.reports.review_list,
    )
    output, layout = choose_output(options.output)
    if ground_truth is not None and (output.invert or output.trimap == "instead"):
        raise UsageError("--gt scores alphas; omit --invert and --trimap instead")
    colour, _ = choose_colour_settings(options.colour)
    _check_report_paths(options, ReportFiles(mask=options.references.save_mask), [])  # before a model makes the mask
    references = read_all_references(options, notice)
    skipped_files = SkippedFiles(notice)
    images = plan_images(options, layout, colour, skipped_files, notice)
    jobs = images.jobs
    hint_files = [path for job in jobs if job.hints for path in job.hints.paths]
    if images.inputs.hints is not None:
        notice(f"{format_count(sum(job.hints is not None for job in jobs), 'image')} with hints")
    shot = None
    if sequences.shot:
        count = len(jobs)
        jobs, shot = order_as_shot(
            jobs, options.references.ref, references, sequences.shard, images.names_outside_range
        )
        if count and not jobs:
            notice(EMPTY_SHARD.format(sequences.shard, options.sources.src, count))
    truths: list[Path] = []
    if ground_truth is not None:
        jobs, truths = _add_ground_truth(jobs, ground_truth, is_part=bool(options.given & PARTIAL_OPTIONS))
        check_overwrites(jobs, truths, "a ground truth")
        shot = shot and shot.with_jobs(jobs)
    check_obstacles(jobs)
    check_overwrites(jobs, options.references.not_ref, "a negative reference")
    outputs = [output for job in jobs for output in job.outputs]
    sources = [options.sources.src, *(str(job.source) for job in jobs)]
    _check_report_paths(options, report_files, [*images.inputs.mattes, *hint_files, *truths, *sources, *outputs])
    report_files.check_shard(layout.folder, _shard_of(options))
    return MattingPlan(references, colour, output, layout, report_files, jobs, shot, skipped_files, truths)


def _shard_of(options: MatteOptions) -> tuple[int, int] | None:
    """Return the number of the shard and the number of shards; None without ``--shard``."""
    return None if options.sequences.shard is None else parse_shard(options.sequences.shard)


def _check_report_paths(options: MatteOptions, report_files: ReportFiles, files: Sequence[str | Path]) -> None:
    """Raise UsageError if a report would replace a reference, one of ``files`` or a file that icm did not write."""
    remedy = None if options.output.overwrite else "give another name, or --overwrite to replace it"
    report_files.check_no_overwrite([*options.references.files, *options.references.not_ref, *files], remedy)


def read_all_references(options: MatteOptions, notice: Callable[[str], None]) -> list[Reference]:
    """Return the references of a run with their masks, and then its negative references. Raises UsageError."""
    _, colour = choose_colour_settings(options.colour)
    masks = MaskMaker(lambda: resolve_device(parse_devices(options.model.device)[0]))
    reader = ReferenceReader(notice, colour, masks.make_mask)
    references = reader.read_references(options.references) + reader.read_negatives(options.references)
    check_negatives(references)
    return references


@dataclass(frozen=True)
class _MattingRun:
    """A run whose plan and model are chosen."""

    _options: MatteOptions
    _plan: MattingPlan
    _setups: Sequence[EngineSetup]
    """One engine setup for each device."""
    _cluster: RayCluster | None
    _listener: Listener

    def matte_all(self, start: float) -> Report:
        """Keep the alphas that are up to date, and matte the other images.

        ``start``: time.perf_counter() at the start of the run.
        """
        plan, listener = self._plan, self._listener
        collector = self._make_collector(start)
        is_recorded = False

        def add_result(result: ImageResult) -> None:
            """Add a result to the report. With its first alpha, the run replaces the run record.

            A run that makes no alpha does not: it may have been refused because of another run in the same folder.
            """
            nonlocal is_recorded
            if not is_recorded and result.status in ("done", "kept"):
                record_run(self._options, plan.layout.folder, plan.jobs, listener.on_notice)
                is_recorded = True
            collector.add(result)

        listener.on_run_start(len(plan.jobs))
        with collector:
            remaining = self._keep_existing_alphas(add_result).remaining
            with self._runner(add_result) if remaining else contextlib.nullcontext() as runner:
                read_peak = runner.peak_memory_bytes if runner else self._setups[0].choice.device.peak_memory_bytes
                with collector.writing_reports(plan.report_files, read_peak):
                    if runner:
                        runner.run(remaining)
        return collector.report

    def preview(self) -> Report:
        """Return what the run would do (``--dry-run``), and give a notice with the counts. Raises UsageError."""
        options = self._setups[0].options  # setups differ only in their device
        existing = self._keep_existing_alphas(on_result=lambda _: None)
        kept = {alpha.job.output: alpha.result for alpha in existing.kept}
        reasons = {alpha.job.output: alpha.outdated_reason() for alpha in existing.recomputed}  # why it is recomputed
        for job in existing.remaining:
            if os.path.lexists(job.output):  # without a reason so far, the file is overwritten or damaged
                reasons.setdefault(job.output, "--overwrite" if options.overwrite else find_damage(job))
        results = [
            kept.get(job.output)
            or planned_result(job, reasons.get(job.output, ""), is_output_read=not options.overwrite)
            for job in self._plan.jobs
        ]
        failing = {result.output for result in results if result.status == "failed"}
        planned = [job for job in existing.remaining if str(job.output) not in failing]
        recomputed = sum(os.path.lexists(job.output) for job in planned)
        self._listener.on_notice(
            f"{format_count(len(results), 'image')}: {len(planned) - recomputed} new, {recomputed} to be recomputed, "
            f"{len(kept)} kept, {len(failing)} that would fail"
        )
        return Report(settings={}, results=results)

    def _keep_existing_alphas(self, on_result: Callable[[ImageResult], None]) -> ExistingAlphas:
        """Return which existing alphas are kept, and report them. Raises UsageError."""
        shot, options, folder = self._plan.shot, self._setups[0].options, self._plan.layout.folder
        jobs = shot.order if shot else self._plan.jobs
        if options.overwrite:
            existing = ExistingAlphas([replace(job, replaceable=file_identities(job)) for job in jobs])
        else:
            existing = find_existing_alphas(
                jobs,
                options.job_digest,
                workers=options.workers,
                keep_all=options.keep_existing,
                reusable_outputs=shot.reusable_outputs if shot else None,
                source_states=read_source_states(folder),
            )
        if existing.new_source_states and not self._options.reports.dry_run:
            add_source_states(folder, existing.new_source_states)
        existing.report(on_result, self._listener.on_notice, hint="; --keep-existing prevents this")
        if self._options.hints.hints is None:
            report_lost_hints(existing.remaining, workers=options.workers, notice=self._listener.on_notice)
        return existing

    def _runner(self, on_result: Callable[[ImageResult], None]) -> contextlib.AbstractContextManager[Runner]:
        """Return a context with the engine in this process, a process for each device, or the actors of a cluster."""
        setups, notice = self._setups, self._listener.on_notice
        for setup in setups:
            self._listener.on_detail(setup.choice.description)
        if self._cluster:
            return contextlib.nullcontext(
                self._cluster.create_runner(setups[0], self._plan.layout.folder, on_result, notice)
            )
        if len(setups) > 1:
            return WorkerPool(setups, on_result=on_result, notice=notice)
        return contextlib.nullcontext(setups[0].create_engine(on_result, notice))

    def _make_collector(self, start: float) -> ResultCollector:
        """Return a collector with an empty report.

        If there are ground truths, it scores the alphas, and its report lists the images without one.
        """
        plan, settings = self._plan, self._settings()
        scorer = None
        if plan.truths:
            scorer, rule = _make_scorer(self._setups[0].options.workers)
            rounds = {"rounds": 1, "refs_per_group": len(self._options.references.ref)}
            settings["protocol"] = {"title": settings["title"], **rule.as_protocol(), **rounds}
        references = [
            (reference.rgb, reference.selected, NEGATIVE_CAPTION if reference.is_negative else REFERENCE_CAPTION)
            for reference in plan.references
        ]
        page_images = PageImages(references_with_masks=references, colour=plan.colour)
        report = Report(
            settings,
            allowed=ALLOWED_PROBLEMS,
            skipped_files=+plan.skipped_files,  # without reasons of count 0
            page_images=page_images,
            review_below=self._options.reports.review_below,
            review_list=plan.report_files.review_list,
        )
        planned = [job.planned for job in plan.jobs]
        add_reasons = functools.partial(add_batch_reasons, is_shot=self._options.sequences.shot)
        collector = ResultCollector(
            report, planned, self._listener, start=start, scorer=scorer, add_reasons=add_reasons
        )
        for job in plan.jobs if plan.truths else ():
            if not job.planned.truth:
                reason = f"{job.source} has no ground truth in {self._options.reports.gt}, so it is not scored"
                collector.add_problem(Problem("missing-alpha", job.planned.name, reason))
        return collector

    def _settings(self) -> dict[str, Any]:
        """Return the settings of the run for the report."""
        colour = self._plan.colour
        devices = [setup.choice.device.description for setup in self._setups]
        devices += [self._cluster.describe()] if self._cluster else []
        return {
            "title": self._options.sources.src,
            **environment_settings(),
            **self._options.as_settings(),
            **self._setups[0].choice.as_settings(),
            "format": self._plan.output.format,
            "colorspace": colour.space,
            "layer": colour.layer,
            "white": colour.white,
            "digest": self._setups[0].options.digests[0].value,
            "device": "; ".join(devices),
            "learn_steps": self._setups[0].learn_steps,
        }


def run_digest(
    options: MatteOptions, references: Sequence[Reference], output: OutputFormat, choice: ModelChoice
) -> AlphaDigest:
    """Return the digest of everything that decides the alphas of a run, except their sources, hints and mattes."""
    learn_steps = choice.resolve_learn_steps(options.sequences.learn_steps, is_shot=options.sequences.shot)
    parts = {
        **choice.digest_parts(),
        DigestPart.REFERENCES: combined_digest(*(reference.digest for reference in references)),
        **sequence_digest_parts(learn_steps, is_shot=options.sequences.shot),
        DigestPart.FORMAT: output.format,
        DigestPart.IMAGE: "",
        DigestPart.COLOUR_CONFIG: choose_colour_settings(options.colour)[0].config_identity,
    }
    return alpha_digest(options.digest_values(parts), options.given_by_part())


def _make_setups(options: MatteOptions, plan: MattingPlan, choices: Sequence[ModelChoice]) -> list[EngineSetup]:
    """Return one engine setup per device, in the order of ``choices``, which differ only in their device.

    Raises UsageError or ConfigError.
    """
    engine = EngineOptions(
        digests=[run_digest(options, plan.references, plan.output, choices[0])],
        batch_size=choices[0].batch_size,
        workers=options.resources.workers or DEFAULT_WORKERS,
        overwrite=options.output.overwrite,
        keep_existing=options.output.keep_existing,
        fail_fast=options.sequences.fail_fast,
        output=plan.output,
        shot=plan.shot,
        processes=len(choices),
        decoder_digest=choices[0].decoder_digest() if any(job.hints for job in plan.jobs) else "",
    )
    choices[0].check_guidance(plan.references)
    if options.sequences.shot:
        choices[0].check_shot()
    steps = choices[0].resolve_learn_steps(options.sequences.learn_steps, is_shot=options.sequences.shot)
    return [EngineSetup(choice, plan.references, steps, engine) for choice in choices]


def _check_folders_without_writing(plan: MattingPlan) -> None:
    """Raise OutputError if a folder of the run could not be created or written."""
    for folder in {plan.layout.folder, *(path.parent for path in plan.report_files.paths)}:
        check_would_be_writable(folder)


def _check_devices(options: MatteOptions) -> None:
    """Raise UsageError if several devices are given with an option that works on one device only."""
    sequences = options.sequences
    if sequences.ray is None and len(parse_devices(options.model.device)) == 1:
        return
    for flag, is_given in (("--shot", sequences.shot), ("--learn-steps", bool(sequences.learn_steps))):
        if is_given:
            raise UsageError(
                f"{flag} works on one device, and several were given; give one --device, or divide the images "
                "with --shard"
            )


def _add_ground_truth(jobs: Sequence[Job], where: str, *, is_part: bool) -> tuple[list[Job], list[Path]]:
    """Return the jobs with the paths of their ground truths, and the paths of all ground truths.

    ``where``: a folder with the same layout as the sources, or a frame pattern with the same frame numbers.
    ``is_part``: whether the jobs are only a part of the sources. Raises UsageError if no ground truth belongs to any
    image, unless they may belong to the other images.
    """
    folder = Path(where)
    truths: dict[Path | int | None, Path] = {}
    has_numbers = not folder.is_dir() and FramePattern.parse(where) is not None

    def key_of(name: Path) -> Path | int | None:
        """Return what an image and its ground truth have in common: the frame number, or the path without suffix."""
        return FrameName.from_path(name).number if has_numbers else name.with_suffix("")

    if has_numbers:
        truths = {key_of(path): path for path in find_sources(where, None, SkippedFiles(lambda _: None)).files}
        lacking = "has no frame number of any image, such as that of {0}; expected the same frame numbers"
    elif folder.is_dir():
        from icm_cli.datasets.layouts import list_images

        truths = {key_of(path.relative_to(folder)): path for path in list_images(folder)}
        lacking = "has no alpha with the name of an image; expected names such as {1}"
    else:
        problem = f"{folder} is a file" if folder.exists() else f"folder {folder} does not exist"
        raise UsageError(f"ground truth {problem}; expected a folder of alphas with the names of the images")
    jobs_with_truth = []
    for job in jobs:
        truth = truths.get(key_of(job.name))
        jobs_with_truth.append(replace(job, planned=replace(job.planned, truth=str(truth or ""))))
    if jobs and not is_part and not any(job.planned.truth for job in jobs_with_truth):
        name = jobs[0].name
        raise UsageError(f"ground truth {where} {lacking.format(name, name.with_suffix('.png'))}; check the path")
    return jobs_with_truth, list(truths.values())


def _make_scorer(processes: int) -> tuple[Scorer, ScoringRule]:
    """Return a scorer for the alphas that have a ground truth, and its rule."""
    from icm_cli.scoring.pool import Scorer, ScoringPool
    from icm_cli.scoring.task import ScoreTask, ScoringRule

    rule = ScoringRule()  # the whole image at its own size

    def make_task(result: ImageResult) -> ScoreTask | None:
        if not result.truth:
            return None
        truth, image = Path(result.truth), Path(result.source)
        return ScoreTask(result.source, Path(result.output), truth, rule, image_path=image, allowed=ALLOWED_PROBLEMS)

    return Scorer(ScoringPool(processes), make_task), rule


def order_as_shot(
    jobs: Sequence[Job],
    refs: Sequence[Path],
    references: Sequence[Reference],
    shard: str | None,
    other_names: Iterable[Path] = (),
) -> tuple[list[Job], Shot]:
    """Return the jobs of shots sorted by name, and their :class:`Shot`; both only of a shard if one is given.

    ``refs``: paths of the references. Those that are frames of the sources become keyframes. ``shard``: ``--shard``.
    ``other_names``: see :func:`split_shots`.
    """
    folders = {real_path(Path(job.root) / job.name.parent): job.name.parent for job in jobs}
    keyframes = []
    for number, ref in enumerate(refs):
        path = next((path for path in (ref, real_path(ref)) if real_path(path.parent) in folders), None)
        if path is not None:
            name = folders[real_path(path.parent)] / path.name
            keyframes.append(Keyframe(name, functools.partial(references.__getitem__, number)))
    shot = Shot.from_examples(split_shots(jobs, keyframes, other_names))
    if shard is not None:
        shot = shot.shard(*parse_shard(shard))
    outputs = {job.output for job in shot.order}
    return [job for job in jobs if job.output in outputs], shot


def _remove_temporaries(plan: MattingPlan, listener: Listener) -> None:
    """Remove temporary files of killed runs from the folders that this run writes to."""
    folders = {*(job.output.parent for job in plan.jobs), *(path.parent for path in plan.report_files.paths)}
    removed = sum(remove_stale_temporaries(folder) for folder in folders)
    if removed:
        listener.on_notice(f"removed {format_count(removed, 'temporary file')} of killed runs")
