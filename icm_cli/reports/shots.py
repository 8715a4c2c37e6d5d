"""J and F over the frames of a shot: mean, recall and decay, as the evaluation tool of DAVIS gives them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from icm_cli.reports.result import ImageResult

ALL_SHOTS = "mean of shots"
"""Name of the row whose figures are means over the shots, each of which counts alike."""
RECALLED = 0.5
"""A frame above it is recalled."""
BINS = 4
"""Parts of a shot; decay is the first one's mean less the last one's."""


@dataclass(frozen=True)
class ShotScores:
    """J (region) and F (boundary) of a shot, 0..1; a decay below 0 says that the shot becomes better."""

    frames: int
    j_mean: float
    j_recall: float
    j_decay: float
    f_mean: float
    f_recall: float
    f_decay: float


FIGURES = {
    field.name: f"{field.name[0].upper()} {field.name[2:]}" for field in fields(ShotScores) if field.name != "frames"
}
"""Fields of ShotScores that are scores -> printed names, such as "J mean"."""


def shot_scores(results: Iterable[ImageResult]) -> dict[str, ShotScores]:
    """The scores of every shot that has any, and ALL_SHOTS last; empty where no frame has J and F.

    Results are in the order of their frames. A frame without a score is left out; what keeps it from one is a problem
    of its own.
    """
    shots: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        if result.jaccard is not None and result.boundary_f is not None:
            shots.setdefault(result.group, []).append((result.jaccard, result.boundary_f))
    scores = {shot: _scores(frames) for shot, frames in shots.items()}
    return scores | ({ALL_SHOTS: _mean_of(list(scores.values()))} if scores else {})


def _scores(frames: Sequence[tuple[float, float]]) -> ShotScores:
    figures = [
        figure for values in zip(*frames, strict=True) for figure in (_mean(values), _recall(values), _decay(values))
    ]
    return ShotScores(len(frames), *figures)


def _mean_of(shots: Sequence[ShotScores]) -> ShotScores:
    means = [_mean([getattr(shot, name) for shot in shots]) for name in FIGURES]
    return ShotScores(sum(shot.frames for shot in shots), *means)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _recall(values: Sequence[float]) -> float:
    return sum(value > RECALLED for value in values) / len(values)


def _decay(values: Sequence[float]) -> float:
    """Mean of the first quarter less that of the last; as in the tool, quarters share the frame where they meet."""
    last = len(values) - 1
    ends = [math.floor(1 + last * part / BINS + 0.5 + 1e-10) - 1 for part in range(BINS + 1)]
    return _mean(values[: ends[1] + 1]) - _mean(values[ends[-2] :])
