"""``icm_cli.matte``: one reference in, a folder of alphas out. The body of the ``icm matte`` command."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from icm_cli.environment import DEFAULT_WORKERS
from icm_cli.errors import UsageError
from icm_cli.events import Listener
from icm_cli.files import Paths, as_path, as_paths, remove_stale_temporaries
from icm_cli.images.colour import Colour
from icm_cli.images.writing import Output
from icm_cli.matting.engine import Engine, EngineOptions, keep_finished
from icm_cli.matting.jobs import Job, LeftOut, plan_jobs
from icm_cli.matting.model_choice import ModelChoice
from icm_cli.matting.outcome import Outcome, environment_settings
from icm_cli.matting.predictor import Predictor
from icm_cli.matting.references import Reference, read_references
from icm_cli.model.contracts import Prepared
from icm_cli.reports.report import Album, Report
from icm_cli.reports.write import SideOutputs

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
    edges: str = "model",
    edges_weights: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | str = "auto",
    seed: int = 0,
    workers: int = DEFAULT_WORKERS,
    colorspace: str = "auto",
    ref_colorspace: str | None = None,
    ocio: str | Path | None = None,
    view: str | None = None,
    exposure: float = 0.0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    format: str = "png",
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
    if workers < 1:
        raise UsageError(f"workers is {workers}; expected 1 or more")
    if not str(out):
        raise UsageError("the output folder is empty; give --out a folder for the alphas")
    refs, masks, target = as_paths(ref), as_paths(mask), Path(out)
    side = SideOutputs.checked(report, contact_sheet)
    form = {"format": format, "depth": depth, "channel": channel, "foreground": foreground, "invert": invert}
    output = Output.checked(**form, trimap=trimap, band_px=trimap_band)
    if gt is not None and (output.invert or output.trimap == "instead"):
        raise UsageError("--gt scores alphas; leave --invert and --trimap instead out")
    colour, of_references = _colours(colorspace, ref_colorspace or colorspace, ocio, view, exposure)
    references = read_references(refs, masks, listener.notice, mask_label, of_references)
    left_out, shown = LeftOut(listener.notice), [*refs, *masks]
    jobs = plan_jobs(
        src,
        target,
        include=include,
        exclude=exclude,
        references=shown,
        colour=colour,
        suffix=output.suffix,
        left_out=left_out,
    )
    truths: list[Path] = []
    if gt is not None:
        from icm_cli.matting.ground_truth import with_truths

        jobs, truths = with_truths(jobs, Path(gt))
    inputs = [str(path) for job in jobs for path in (job.source, job.output)]
    side.check_overwrites_nothing([*shown, *truths, *inputs])
    choice = ModelChoice.checked(
        model,
        as_path(checkpoint),
        weights=weights,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        seed=seed,
        offline=offline,
        edges=edges,
        edges_weights=edges_weights,
    )
    if dry_run:
        return Report(settings={}, results=[job.planned for job in jobs])
    side.check_writable(target)
    _clean(jobs, listener)

    digest = choice.digester()(
        [*(one.digest for one in references), *filter(None, [colour.describe(), output.describe()])]
    )
    settings = _settings(src, choice, refs, masks) | {"digest": digest, "colorspace": colorspace}
    scoring = None
    if truths:
        from icm_cli.matting.ground_truth import RULE, scoring_of

        settings["protocol"] = {"title": str(src), **RULE.as_protocol(), "rounds": 1, "refs_per_group": len(refs)}
        scoring = scoring_of(workers, ALLOWED)
    album = Album(references={(0, ""): list(zip_longest(refs, masks))}, colour=colour)
    outcome = Outcome(
        Report(settings, allowed=ALLOWED, left_out=+left_out, album=album),
        [job.planned for job in jobs],
        listener,
        start=start,
        scoring=scoring,
    )
    engine = EngineOptions([digest], choice.batch_size, workers, overwrite, fail_fast, output)
    _run(jobs, references, choice, engine, outcome, side, listener)
    return outcome.report


def _run(
    jobs: Sequence[Job],
    references: Sequence[Reference],
    choice: ModelChoice,
    options: EngineOptions,
    outcome: Outcome,
    side: SideOutputs,
    listener: Listener,
) -> None:
    """Keep the alphas that are there and matte the other images; the model is loaded only for these."""
    listener.started(len(jobs))
    with outcome:
        remaining = list(jobs)
        if not options.overwrite:
            has_trimap = options.output.trimap == "beside"
            remaining = keep_finished(jobs, options.digests, options.workers, outcome.add, has_trimap=has_trimap)
        ready = _ready(choice, references, listener) if remaining else None
        with outcome.reported(side, choice.where.peak_memory_bytes):
            if ready is not None:
                predictor, prepared = ready
                engine = Engine(predictor, lambda _: prepared, options, on_result=outcome.add, notice=listener.notice)
                engine.run(remaining)


def _settings(src: str | Path, choice: ModelChoice, refs: Sequence[Path], masks: Sequence[Path]) -> dict[str, Any]:
    """Settings that the report states."""
    shown = {"references": [str(path) for path in refs], "masks": [str(path) for path in masks]}
    return {"title": str(src), **environment_settings(), **choice.as_settings(), **shown}


def _colours(
    space: str, ref_space: str, ocio: str | Path | None, view: str | None, exposure: float
) -> tuple[Colour, Colour]:
    """Colours of the sources and of the references. Raises UsageError for a name that is not known."""
    found = tuple(Colour(each, str(ocio or ""), view or "", exposure) for each in (space, ref_space))
    for each in found:
        each.check()
    return found[0], found[1]


def _ready(choice: ModelChoice, references: Sequence[Reference], listener: Listener) -> tuple[Predictor, Prepared]:
    """The model on its device, and the references as it sees them: once per run."""
    listener.detail(choice.describe())
    predictor = choice.load()
    prepared = predictor.reference(references)
    for sentence in prepared.notices:
        listener.notice(sentence)
    return predictor, prepared


def _clean(jobs: Sequence[Job], listener: Listener) -> None:
    removed = sum(remove_stale_temporaries(folder) for folder in {job.output.parent for job in jobs})
    if removed:
        listener.notice(f"removed {removed} temporary file(s) that a killed run left behind")
