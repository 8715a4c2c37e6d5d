"""``icm_cli.matte``: one reference in, a folder of alphas out. The body of the ``icm matte`` command."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icm_cli import __version__
from icm_cli.config import ModelConfig
from icm_cli.contact_sheet import write_contact_sheet
from icm_cli.device import Device, resolve_device
from icm_cli.engine import Engine, Settings
from icm_cli.errors import OutputError, UsageError
from icm_cli.files import TEMPORARY_PREFIX, digest_of, remove_stale_temporaries, write_error
from icm_cli.geometry import GUIDED_EPSILON, GUIDED_RADIUS_PX
from icm_cli.ground_truth import GroundTruth
from icm_cli.matter import Matter
from icm_cli.model.contracts import Prepared
from icm_cli.model.loading import load_model, model_digest, resolve_config
from icm_cli.references import Reference, read_references
from icm_cli.report import ImageResult, MatteReport
from icm_cli.resume import keep_finished
from icm_cli.sources import Job, plan_jobs

Paths = str | Path | Sequence[str | Path]
DEFAULT_WORKERS = max(1, min(4, (os.cpu_count() or 2) // 2))
"""Threads that read, and as many that write; a few keep a model fed, more only take its cores."""


class Listener:
    """Hears what a run does; the command prints it. Every method may be left as it is."""

    def notice(self, text: str) -> None:
        """Something the user should know; may come from another thread."""

    def detail(self, text: str) -> None:
        """Something only a curious user wants to know."""

    def started(self, total: int) -> None:
        """The model is ready; ``total`` images follow."""

    def finished_image(self, result: ImageResult) -> None:
        """An image ended, well or not."""

    def finished(self, report: MatteReport) -> None:
        """The run ended, by an interrupt too."""


def matte(
    ref: Paths,
    mask: Paths = (),
    *,
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
    report: str | Path | None = None,
    contact_sheet: str | Path | None = None,
    dry_run: bool = False,
    offline: bool = False,
    fail_fast: bool = False,
    listener: Listener | None = None,
) -> MatteReport:
    """Pull the thing that the references show out of every image of ``src``, one alpha PNG each below ``out``.

    The arguments are the options of ``icm matte`` (see its help). Alphas are uint8,
    one channel, of exactly the source's size; one that an earlier run made with the same settings from the same
    source is kept. An image that fails is named in the report and the others go on.

    Returns the report; its ``exit_code`` is 1 if any image failed. Raises UsageError, ConfigError or OutputError.
    """
    hear = listener or Listener()
    start = time.perf_counter()
    if workers < 1:
        raise UsageError(f"workers is {workers}; expected 1 or more")
    if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size >= 1):
        raise UsageError(f"batch size is {batch_size!r}; expected auto, or 1 or more")
    if not str(out):
        raise UsageError("the output folder is empty; give --out a folder for the alphas")
    refs, masks, target = _paths(ref), _paths(mask), Path(out)
    side = _SideOutputs.checked(report, contact_sheet)
    references = read_references(refs, masks, hear.notice)
    jobs = plan_jobs(src, target, include=include, exclude=exclude, references=[*refs, *masks], notice=hear.notice)
    truth = GroundTruth.found(gt, jobs)
    side.check_overwrites_nothing([*refs, *masks, *truth.files.values()], jobs)
    where = resolve_device(device, dtype)
    loader = _Loader(resolve_config(model, _path(checkpoint)), _path(checkpoint), weights, offline, seed)
    if dry_run:
        planned = [ImageResult(str(job.source), str(job.output), "planned") for job in jobs]
        return MatteReport(settings={}, results=planned)
    side.check_writable(target)
    _clean(jobs, hear)

    digest = loader.digest(references, where)
    outcome = _Outcome(jobs, hear, MatteReport(_settings(loader, where, refs, masks, digest)), start)
    hear.started(len(jobs))
    remaining = jobs if overwrite else keep_finished(jobs, digest, truth, workers, outcome.add)
    run = _ready(loader, where, references, hear) if remaining else None
    with outcome.reported(side, where):
        if run is not None:
            at_a_time = batch_size if isinstance(batch_size, int) else where.auto_batch_size
            settings = Settings(digest, at_a_time, workers, overwrite, fail_fast, truth)
            Engine(*run, settings, on_result=outcome.add, notice=hear.notice).run(remaining)
    return outcome.report


@dataclass(frozen=True)
class _Loader:
    """All that decides which model is loaded."""

    config: ModelConfig
    checkpoint: Path | None
    weights: str | None
    offline: bool
    seed: int

    def digest(self, references: Sequence[Reference], where: Device) -> str:
        """Of all that decides an alpha beside its source; reads the weights' content, loads no model."""
        return digest_of(
            __version__,
            model_digest(self.config, checkpoint=self.checkpoint, weights=self.weights, offline=self.offline),
            *(part for one in references for part in (one.rgb.tobytes(), one.guidance.tobytes(), str(one.rgb.shape))),
            str(self.seed),
            where.dtype_name,
            f"guided {GUIDED_RADIUS_PX} {GUIDED_EPSILON}",
        )

    def load(self, where: Device) -> Matter:
        model = load_model(
            self.config, checkpoint=self.checkpoint, weights=self.weights, offline=self.offline, seed=self.seed
        )
        return Matter(model, where)


def _ready(loader: _Loader, where: Device, references: Sequence[Reference], hear: Listener) -> tuple[Matter, Prepared]:
    """The model on its device, and the references as it sees them: once per run."""
    hear.detail(f"model {loader.config.backbone.name} + {loader.config.head.name} on {where.describe()}")
    matter = loader.load(where)
    prepared = matter.reference(references)
    for sentence in prepared.notices:
        hear.notice(sentence)
    return matter, prepared


@dataclass(frozen=True)
class _SideOutputs:
    """The files beside the alphas."""

    report: Path | None
    contact_sheet: Path | None

    @classmethod
    def checked(cls, report: str | Path | None, contact_sheet: str | Path | None) -> _SideOutputs:
        side = cls(_path(report), _path(contact_sheet))
        if side.report and side.report.suffix.lower() not in {".csv", ".json"}:
            raise UsageError(f"report {report} is neither .csv nor .json; give the file one of these names")
        if side.contact_sheet and side.contact_sheet.suffix.lower() != ".png":
            raise UsageError(f"contact sheet {contact_sheet} is no .png; give the file such a name")
        return side

    def check_overwrites_nothing(self, inputs: Sequence[Path], jobs: Sequence[Job]) -> None:
        """Raises UsageError for a report or sheet in the place of a folder, an input or an alpha."""
        taken = {os.path.realpath(path) for path in inputs}
        taken.update(os.path.realpath(path) for job in jobs for path in (job.source, job.output))
        for path in filter(None, (self.report, self.contact_sheet)):
            if path.is_dir():
                raise UsageError(f"{path} is a folder; give the report or contact sheet the name of a file")
            if os.path.realpath(path) in taken:
                raise UsageError(f"{path} is an image of this run; give the report or contact sheet another name")

    def check_writable(self, out: Path) -> None:
        """Raises OutputError now rather than after hours of work."""
        for folder in {out, *(path.parent for path in (self.report, self.contact_sheet) if path)}:
            probe = folder / f"{TEMPORARY_PREFIX}probe-{os.getpid()}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe.touch()
                probe.unlink()
            except OSError as error:
                raise write_error(folder, error) from error

    def write(self, report: MatteReport) -> None:
        if self.report:
            report.write(self.report)
        if self.contact_sheet:
            write_contact_sheet(self.contact_sheet, report.results)


@dataclass
class _Outcome:
    """Gathers results and, however the run ends, sees the report written."""

    jobs: Sequence[Job]
    hear: Listener
    report: MatteReport
    start: float
    ended: set[str] = field(default_factory=set)

    def add(self, result: ImageResult) -> None:
        self.report.results.append(result)
        self.ended.add(result.source)
        self.hear.finished_image(result)

    @contextlib.contextmanager
    def reported(self, side: _SideOutputs, where: Device) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        except BaseException:
            with contextlib.suppress(OutputError):
                self._finish(side, begun, where)
            raise
        self._finish(side, begun, where)

    def _finish(self, side: _SideOutputs, begun: float, where: Device) -> None:
        self.report.results += [
            ImageResult(str(job.source), str(job.output), "not reached")
            for job in self.jobs
            if str(job.source) not in self.ended
        ]
        order = {str(job.source): number for number, job in enumerate(self.jobs)}
        self.report.results.sort(key=lambda result: order[result.source])
        now = time.perf_counter()
        self.report.seconds, self.report.matting_seconds = now - self.start, now - begun
        self.report.peak_memory_bytes = where.peak_memory_bytes()
        try:
            side.write(self.report)
        finally:
            self.hear.finished(self.report)


def _settings(
    loader: _Loader, where: Device, refs: Sequence[Path], masks: Sequence[Path], digest: str
) -> dict[str, Any]:
    return {
        "icm": __version__,
        "model": loader.config.as_dict(),
        "checkpoint": str(loader.checkpoint) if loader.checkpoint else None,
        "weights": loader.weights,
        "references": [str(path) for path in refs],
        "masks": [str(path) for path in masks],
        "device": where.describe(),
        "seed": loader.seed,
        "digest": digest,
    }


def _clean(jobs: Sequence[Job], hear: Listener) -> None:
    removed = sum(remove_stale_temporaries(folder) for folder in {job.output.parent for job in jobs})
    if removed:
        hear.notice(f"removed {removed} temporary file(s) that a killed run left behind")


def _paths(value: Paths) -> list[Path]:
    return [Path(value)] if isinstance(value, (str, Path)) else [Path(one) for one in value]


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)
