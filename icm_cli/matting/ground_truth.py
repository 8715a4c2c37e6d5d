"""Ground truths of the images (``--gt``), and scoring against them."""

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
from icm_cli.scoring.task import ScoreTask, ScoringRule

RULE = ScoringRule()
"""Scores cover the whole image at its own size, with GRAD and CONN of the composition variant."""


def attach_ground_truth(jobs: Sequence[Job], where: str | Path) -> tuple[list[Job], list[Path], list[Problem]]:
    """Return the jobs with their ground truths, all their files, and the problems.

    An image without a ground truth is a problem.

    ``where``: a folder with the same layout as the sources, or a frame pattern with the same frame
    numbers. Raises UsageError if no ground truth belongs to any image.
    """
    folder = Path(where)
    if not folder.is_dir() and FramePattern.parse(str(where)) is not None:
        numbered = {
            FrameName.from_path(path).number: path
            for path in find_sources(where, None, SkippedFiles(_ignore_notice)).files
        }
        found = [_add_truth(job, numbered.get(FrameName.from_path(job.name).number)) for job in jobs]
        if jobs and not any(job.planned.dataset.truth for job in found):
            raise UsageError(
                f"ground truth {where} has no frame number of any image, such as that of "
                f"{jobs[0].name}; expected the same frame numbers; check the pattern"
            )
        return found, list(numbered.values()), _missing_truth_problems(found, where)
    if not folder.is_dir():
        problem = f"{folder} is a file" if folder.exists() else f"folder {folder} does not exist"
        raise UsageError(f"ground truth {problem}; expected a folder of alphas with the names of the images")
    files = {path.relative_to(folder).with_suffix(""): path for path in list_images(folder)}
    if jobs and not any(job.name.with_suffix("") in files for job in jobs):
        expected = jobs[0].name.with_suffix(".png")
        raise UsageError(
            f"ground truth folder {folder} has no alpha with the name of an image; expected names such as {expected}"
        )
    found = [_add_truth(job, files.get(job.name.with_suffix(""))) for job in jobs]
    return found, list(files.values()), _missing_truth_problems(found, where)


def ground_truth_scoring(processes: int, allowed: frozenset[str]) -> Scorer:
    """Return a scorer for alphas with a ground truth, which may be empty."""

    def make_task(result: ImageResult) -> ScoreTask | None:
        if not result.dataset.truth:
            return None
        truth, image = Path(result.dataset.truth), Path(result.source)
        return ScoreTask(result.source, Path(result.output), truth, RULE, image_path=image, allowed=allowed)

    return Scorer(ScoringPool(processes), make_task)


def _ignore_notice(notice: str) -> None:
    """Ignore notices about skipped files."""


def _missing_truth_problems(jobs: Sequence[Job], where: str | Path) -> list[Problem]:
    return [
        Problem("missing-alpha", job.planned.name, f"{job.source} has no ground truth in {where}, so it is not scored")
        for job in jobs
        if not job.planned.dataset.truth
    ]


def _add_truth(job: Job, truth: Path | None) -> Job:
    if truth is None:
        return job
    return replace(job, planned=replace(job.planned, dataset=DatasetEntry(truth=str(truth))))
