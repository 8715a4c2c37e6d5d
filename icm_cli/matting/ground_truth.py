"""True alphas beside the images (``--gt``), and how the alphas are scored against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from icm_cli.datasets.layouts import list_images
from icm_cli.errors import Problem, UsageError
from icm_cli.matting.frames import FrameName, FramePattern
from icm_cli.matting.jobs import Job
from icm_cli.matting.sources import SkippedFiles, find_sources
from icm_cli.reports.result import DatasetEntry, ImageResult
from icm_cli.scoring.pool import Scorer, ScoringPool
from icm_cli.scoring.rule import ScoringRule
from icm_cli.scoring.task import ScoreTask

RULE = ScoringRule()
"""Scores are over the whole image at its own size, GRAD and CONN of the composition lineage."""


def attach_ground_truth(jobs: Sequence[Job], where: str | Path) -> tuple[list[Job], list[Path], list[Problem]]:
    """The jobs with their true alphas, all files of these, and the images without: of a folder laid out like the
    sources, or of a frame pattern, whose numbers are theirs.

    Raises UsageError if none belongs to any image.
    """
    folder = Path(where)
    if not folder.is_dir() and FramePattern.parse(str(where)) is not None:
        numbered = {
            FrameName.from_path(path).number: path for path in find_sources(where, None, SkippedFiles(_nowhere)).files
        }
        found = [_with_truth(job, numbered.get(FrameName.from_path(job.name).number)) for job in jobs]
        if jobs and not any(job.planned.dataset.truth for job in found):
            raise UsageError(f"ground truth {where} has no frame of any image, such as {jobs[0].name}")
        return found, list(numbered.values()), _without_truth(found, where)
    if not folder.is_dir():
        fault = f"{folder} is a file" if folder.exists() else f"folder {folder} does not exist"
        raise UsageError(f"ground truth {fault}; expected a folder of alphas named like the images")
    files = {path.relative_to(folder).with_suffix(""): path for path in list_images(folder)}
    if jobs and not any(job.name.with_suffix("") in files for job in jobs):
        expected = jobs[0].name.with_suffix(".png")
        raise UsageError(f"ground truth folder {folder} has no alpha named like any image, such as {expected}")
    found = [_with_truth(job, files.get(job.name.with_suffix(""))) for job in jobs]
    return found, list(files.values()), _without_truth(found, where)


def ground_truth_scoring(processes: int, allowed: frozenset[str]) -> Scorer:
    """Score every alpha whose image has a ground truth; that may be empty, for the thing need not be everywhere."""

    def task_for(result: ImageResult) -> ScoreTask | None:
        if not result.dataset.truth:
            return None
        truth, image = Path(result.dataset.truth), Path(result.source)
        return ScoreTask(result.source, Path(result.output), truth, RULE, image=image, allowed=allowed)

    return Scorer(ScoringPool(processes), task_for)


def _nowhere(sentence: str) -> None:
    """Tell nobody."""


def _without_truth(jobs: Sequence[Job], where: str | Path) -> list[Problem]:
    return [
        Problem("missing-alpha", job.planned.name, f"{job.source} has no true alpha in {where}, so it is not scored")
        for job in jobs
        if not job.planned.dataset.truth
    ]


def _with_truth(job: Job, truth: Path | None) -> Job:
    if truth is None:
        return job
    return replace(job, planned=replace(job.planned, dataset=DatasetEntry(truth=str(truth))))
