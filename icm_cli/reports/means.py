"""Means over images, rounds, groups and categories."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icm_cli.reports.scores import METRICS, REGIONS, Region

if TYPE_CHECKING:
    from icm_cli.reports.result import ImageResult


@dataclass(frozen=True)
class Mean:
    """A mean over images; with several rounds the mean of the rounds' means, and their sample deviation."""

    mean: float
    spread: float | None = None
    """Standard deviation of the rounds' means; None for a single round."""


@dataclass(frozen=True)
class Means:
    """The means of every metric over ``images`` scores in ``rounds`` rounds."""

    images: int
    rounds: int
    metrics: dict[str, Mean]
    """Means by the names of METRICS and, where there are videos, ``dt_ssd``."""


def summarise(results: Iterable[ImageResult]) -> dict[Region, Means]:
    """The means of every region that has scores."""
    scored = [result for result in results if result.scores]
    summary: dict[Region, Means] = {}
    for region in REGIONS:
        having = [result for result in scored if region in result.scores]
        if not having:
            continue
        rounds: dict[int, list[ImageResult]] = {}
        for result in having:
            rounds.setdefault(result.round, []).append(result)
        metrics = {
            name: _mean([[getattr(each.scores[region], name) for each in group] for group in rounds.values()])
            for name in METRICS
        }
        flicker = [[each.dt_ssd for each in group if each.dt_ssd is not None] for group in rounds.values()]
        if region == "whole" and any(flicker):
            metrics["dt_ssd"] = _mean([group for group in flicker if group])
        summary[region] = Means(len(having), len(rounds), metrics)
    return summary


def by(results: Sequence[ImageResult], key: Callable[[ImageResult], str | None]) -> dict[str, dict[Region, Means]]:
    """The means of every value of ``key``, in their alphabetical order; results without one are left out."""
    parts: dict[str, list[ImageResult]] = {}
    for result in results:
        if value := key(result):
            parts.setdefault(value, []).append(result)
    return {value: means for value in sorted(parts) if (means := summarise(parts[value]))}


def number_text(value: float | None, metric: str) -> str:
    """A metric with the digits that matter; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:.5f}" if metric in ("mse", "mad") else f"{value:.2f}"


def mean_text(mean: Mean | None, metric: str) -> str:
    """A mean with its spread over rounds."""
    if mean is None:
        return "-"
    spread = f" ± {number_text(mean.spread, metric)}" if mean.spread is not None else ""
    return number_text(mean.mean, metric) + spread


def _mean(rounds: Sequence[Sequence[float]]) -> Mean:
    means = [math.fsum(values) / len(values) for values in rounds]
    return Mean(math.fsum(means) / len(means), statistics.stdev(means) if len(means) > 1 else None)
