"""``icm_cli.matte``: one reference in, a folder of alphas out. The body of the ``icm matte`` command."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from icm_cli.engine import Engine, Settings
from icm_cli.errors import UsageError
from icm_cli.evaluation.scoring import Rule, ScoreTask
from icm_cli.files import remove_stale_temporaries
from icm_cli.ground_truth import GroundTruth
from icm_cli.matter import Matter
from icm_cli.model.contracts import Prepared
from icm_cli.model_choice import ModelChoice
from icm_cli.references import Reference, read_references
from icm_cli.report import Album, ImageResult, Report
from icm_cli.resume import keep_finished
from icm_cli.runs import (
    DEFAULT_WORKERS,
    Listener,
    Outcome,
    Paths,
    SideOutputs,
    as_path,
    as_paths,
    check_workers,
    environment_settings,
)
from icm_cli.sources import Job, plan_jobs

RULE = Rule()
"""Scores are over the whole image at its own size, GRAD and CONN of the composition lineage."""
ALLOWED = frozenset({"empty-alpha", "16-bit-alpha"})
"""Kinds of odd ground truths that are no failure here."""


def matte(
    ref: Paths,
    mask: Paths = (),
    *,
    mask_label: str | None = None,
    src: str | Path,
    out: str | Path,
    model: str | None = None,
    checkpoint: str | Path | None = None,
    weights: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | str = "auto",
    seed: int = 0,
    workers: int = DEFAULT_WORKERS,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
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
    hear = listener or Listener()
    start = time.perf_counter()
    check_workers(workers)
    if not str(out):
        raise UsageError("the output folder is empty; give --out a folder for the alphas")
    refs, masks, target = as_paths(ref), as_paths(mask), Path(out)
    side = SideOutputs.checked(report, contact_sheet)
    references = read_references(refs, masks, hear.notice, mask_label)
    jobs = plan_jobs(src, target, include=include, exclude=exclude, references=[*refs, *masks], notice=hear.notice)
    truth = GroundTruth.found(gt, jobs)
    jobs = [_with_truth(job, truth) for job in jobs]
    inputs = [str(path) for job in jobs for path in (job.source, job.output)]
    side.check_overwrites_nothing([*refs, *masks, *truth.files.values(), *inputs])
    choice = ModelChoice.checked(
        model,
        as_path(checkpoint),
        weights=weights,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        seed=seed,
        offline=offline,
    )
    if dry_run:
        return Report(settings={}, results=[job.planned for job in jobs])
    side.check_writable(target)
    _clean(jobs, hear)

    digest = choice.digester()([one.digest for one in references])
    settings = {
        "title": str(src),
        **environment_settings(),
        **choice.as_settings(),
        "references": [str(path) for path in refs],
        "masks": [str(path) for path in masks],
        "digest": digest,
    }
    if truth.files:
        settings["protocol"] = {"title": str(src), **RULE.as_protocol(), "rounds": 1, "refs_per_group": len(refs)}
    outcome = Outcome(
        Report(settings, allowed=ALLOWED, album=Album(references={(0, ""): list(zip_longest(refs, masks))})),
        [job.planned for job in jobs],
        hear,
        start=start,
        processes=workers,
        task_for=_score_task,
    )
    hear.started(len(jobs))
    with outcome:
        remaining = jobs if overwrite else keep_finished(jobs, [digest], workers, outcome.add)
        run = _ready(choice, references, hear) if remaining else None
        with outcome.reported(side, choice.where.peak_memory_bytes):
            if run is not None:
                matter, prepared = run
                engine = Settings([digest], choice.batch_size, workers, overwrite, fail_fast)
                Engine(matter, lambda _: prepared, engine, on_result=outcome.add, notice=hear.notice).run(remaining)
    return outcome.report


def _with_truth(job: Job, truth: GroundTruth) -> Job:
    path = truth.of(job)
    return job if path is None else replace(job, planned=replace(job.planned, truth=str(path)))


def _score_task(result: ImageResult) -> ScoreTask | None:
    """A ground truth may be empty: the thing need not be in every picture."""
    if not result.truth:
        return None
    truth, image = Path(result.truth), Path(result.source)
    return ScoreTask(result.source, Path(result.output), truth, RULE, image=image, allowed=ALLOWED)


def _ready(choice: ModelChoice, references: Sequence[Reference], hear: Listener) -> tuple[Matter, Prepared]:
    """The model on its device, and the references as it sees them: once per run."""
    hear.detail(choice.describe())
    matter = choice.load()
    prepared = matter.reference(references)
    for sentence in prepared.notices:
        hear.notice(sentence)
    return matter, prepared


def _clean(jobs: Sequence[Job], hear: Listener) -> None:
    removed = sum(remove_stale_temporaries(folder) for folder in {job.output.parent for job in jobs})
    if removed:
        hear.notice(f"removed {removed} temporary file(s) that a killed run left behind")
