"""Means of scores over images, rounds, groups, categories and shots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, stdev

from icm_cli.options import Region
from icm_cli.reports.result import METRICS, REGIONS, ImageEvaluation, ImageResult

MEAN_OF_SHOTS = "mean of shots"
"""Name of the row with the mean over all shots. Every shot has the same weight."""
RECALL_THRESHOLD = 0.5
"""A frame above this score counts as recalled."""
SHOT_PARTS = 4
"""Decay compares the first and the last of this many parts of a shot."""


@dataclass(frozen=True)
class Mean:
    """Mean of a metric over images. With several rounds, the mean of the means of the rounds."""

    mean: float
    std: float | None = None
    """Sample standard deviation of the means of the rounds; None for a single round."""


@dataclass(frozen=True)
class Means:
    """Means of all metrics over ``images`` scored images in ``rounds`` rounds."""

    images: int
    rounds: int
    metrics: dict[str, Mean]
    """Means by metric name. Besides METRICS, ``dt_ssd`` if there are videos."""


@dataclass(frozen=True)
class ShotScores:
    """J (region similarity) and F (boundary accuracy) of a shot, 0..1, as in the tool of DAVIS."""

    frames: int
    j_mean: float
    j_recall: float
    j_decay: float
    f_mean: float
    f_recall: float
    f_decay: float


SHOT_SCORE_TITLES = {
    field.name: f"{field.name[0].upper()} {field.name[2:]}" for field in fields(ShotScores) if field.name != "frames"
}
"""Printed names of the scores of a shot, such as "J mean", by field name."""


def compute_means(results: Sequence[ImageResult]) -> dict[Region, Means]:
    """Return the means of every region that has scores."""
    means = {}
    for region in REGIONS:
        by_round: dict[int, list[ImageEvaluation]] = {}
        for result in results:
            if region in result.evaluation.scores:
                by_round.setdefault(result.round, []).append(result.evaluation)
        if by_round:
            means[region] = _region_means(region, list(by_round.values()))
    return means


def _region_means(region: Region, rounds: Sequence[Sequence[ImageEvaluation]]) -> Means:
    """Return the means over a region, given the images of each round."""
    metrics = {}
    for name in METRICS:
        values = [[getattr(image.scores[region], name) for image in images] for images in rounds]
        metrics[name] = _mean_over_rounds(values)
    flicker = [[image.dt_ssd for image in images if image.dt_ssd is not None] for images in rounds]
    if region == "whole" and any(flicker):
        metrics["dt_ssd"] = _mean_over_rounds([values for values in flicker if values])
    return Means(sum(map(len, rounds)), len(rounds), metrics)


def compute_means_by(
    results: Sequence[ImageResult], key: Callable[[ImageResult], str | None]
) -> dict[str, dict[Region, Means]]:
    """Return the means for every value of ``key``, sorted by value.

    Results for which ``key`` returns "" or None are excluded, as are values without scores.
    """
    by_value: dict[str, list[ImageResult]] = {}
    for result in results:
        if value := key(result):
            by_value.setdefault(value, []).append(result)
    means = {value: compute_means(by_value[value]) for value in sorted(by_value)}
    return {value: means_of_value for value, means_of_value in means.items() if means_of_value}


def compute_shot_scores(results: Iterable[ImageResult]) -> dict[str, ShotScores]:
    """Return the scores of every shot, and under the key MEAN_OF_SHOTS their mean and the total number of frames.

    ``results`` must be in the order of the frames. Frames that lack J or F are excluded.
    """
    shots: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        jaccard, boundary_f = result.evaluation.jaccard, result.evaluation.boundary_f
        if jaccard is not None and boundary_f is not None:
            shots.setdefault(result.group, []).append((jaccard, boundary_f))
    scores = {shot: _score_shot(frames) for shot, frames in shots.items()}
    if scores:
        means = {name: fmean(getattr(score, name) for score in scores.values()) for name in SHOT_SCORE_TITLES}
        scores[MEAN_OF_SHOTS] = ShotScores(sum(score.frames for score in scores.values()), **means)
    return scores


def format_metric(value: float | None, metric: str) -> str:
    """Format a metric with its usual number of digits, or a dash for None."""
    if value is None:
        return "-"
    return f"{value:.5f}" if metric in ("mse", "mad") else f"{value:.2f}"


def format_mean(mean: Mean | None, metric: str) -> str:
    """Format a mean and, if known, its standard deviation over rounds."""
    if mean is None:
        return "-"
    std = f" ± {format_metric(mean.std, metric)}" if mean.std is not None else ""
    return format_metric(mean.mean, metric) + std


def _mean_over_rounds(rounds: Sequence[Sequence[float]]) -> Mean:
    """Return the mean of the means of the rounds, given the values of the images of each round."""
    means = [fmean(values) for values in rounds]
    return Mean(fmean(means), stdev(means) if len(means) > 1 else None)


def _score_shot(frames: Sequence[tuple[float, float]]) -> ShotScores:
    """Return the scores of a shot, given J and F of each frame."""
    j_values = [jaccard for jaccard, _ in frames]
    f_values = [boundary_f for _, boundary_f in frames]
    return ShotScores(
        frames=len(frames),
        j_mean=fmean(j_values),
        j_recall=fmean(value > RECALL_THRESHOLD for value in j_values),
        j_decay=_compute_decay(j_values),
        f_mean=fmean(f_values),
        f_recall=fmean(value > RECALL_THRESHOLD for value in f_values),
        f_decay=_compute_decay(f_values),
    )


def _compute_decay(values: Sequence[float]) -> float:
    """Return the mean of the first quarter minus that of the last.

    As in the tool of DAVIS, a quarter ends with the frame with which the next one begins.
    """
    last = len(values) - 1
    # The tool rounds indices that begin with 1, and rounds half up; 1e-10 makes up for the error of the division.
    bounds = [math.floor(1 + last * part / SHOT_PARTS + 0.5 + 1e-10) - 1 for part in range(SHOT_PARTS + 1)]
    first_quarter, last_quarter = values[: bounds[1] + 1], values[bounds[-2] :]
    return fmean(first_quarter) - fmean(last_quarter)
