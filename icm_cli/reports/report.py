"""The report of a run: settings, results of all images, totals."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icm_cli.errors import Problem
from icm_cli.geometry import ImageU8
from icm_cli.images.colour import DEFAULT_COLOUR, ColourSettings
from icm_cli.images.reading import CompositeSource
from icm_cli.reports.means import Means, ShotScores, compute_means, compute_shot_scores
from icm_cli.reports.result import ImageResult, Region, Status


@dataclass(frozen=True)
class Album:
    """Pictures that the page shows."""

    references: Mapping[tuple[int, str], Sequence[tuple[Path | CompositeSource, Path]]] = field(default_factory=dict)
    """References by round and group: images with their alphas."""
    marked: Sequence[tuple[ImageU8, NDArray[np.bool_]]] = ()
    """References of every image, as the model saw them: pictures, sRGB uint8 [H,W,3], and where the thing is [H,W]."""
    colour: ColourSettings = DEFAULT_COLOUR
    composites: Mapping[str, CompositeSource] = field(default_factory=dict)
    """Sources that are not files, by the name of their result."""


@dataclass(repr=False)
class Report:
    """The whole run: settings, a result for every image in the order of their names, and totals."""

    settings: dict[str, Any]
    results: list[ImageResult] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    """Problems of the data; see ``icm_cli.errors.PROBLEM_KINDS``."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Files among the sources that were not to be matted, by reason."""
    allowed: frozenset[str] = frozenset()
    """Kinds of problems that do not count in the exit code."""
    references: list[dict[str, list[str]]] = field(default_factory=list)
    """References of an evaluation: for every round, the names of each group's references."""
    album: Album = field(default_factory=Album)
    seconds: float = 0.0
    """Wall time of the run, loading included."""
    matting_seconds: float = 0.0
    """Wall time of the images alone."""
    peak_memory_bytes: int = 0

    def count(self, status: Status) -> int:
        return sum(result.status == status for result in self.results)

    def __repr__(self) -> str:
        return f"<Report of {len(self.results)} images: {dict(Counter(each.status for each in self.results))}>"

    @property
    def is_complete(self) -> bool:
        """Whether the run reached every image."""
        return not self.count("not reached")

    @property
    def maker(self) -> str:
        """Who made the alphas: icm, or the folder they were found in."""
        return Path(self.settings["predictions"]).name if "predictions" in self.settings else "icm"

    @property
    def failures(self) -> list[ImageResult]:
        return [result for result in self.results if result.status == "failed"]

    @property
    def images_per_second(self) -> float:
        return self.count("done") / self.matting_seconds if self.matting_seconds else 0.0

    @property
    def exit_code(self) -> int:
        """0 when every image has its alpha and, but for what is allowed, no data were bad, else 1."""
        if self.failures or any(each.kind not in self.allowed for each in self.problems):
            return 1
        return 1 if self.count("unscored") and not self.means else 0

    @property
    def means(self) -> dict[Region, Means]:
        """Means of every metric over the images that were scored."""
        return compute_means(self.results)

    @property
    def means_unseen(self) -> dict[Region, Means] | None:
        """The same without images that the model was trained on; None where there are no such images."""
        if not any(result.is_seen for result in self.results):
            return None
        return compute_means([result for result in self.results if not result.is_seen])

    @property
    def shots(self) -> dict[str, ShotScores]:
        """J and F of every shot, and last their means over the shots; empty where the dataset is none of shots."""
        return compute_shot_scores(self.results)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        statuses: tuple[Status, ...] = ("done", "skipped", "unscored", "failed", "not reached")
        return {
            "settings": self.settings,
            "references": self.references,
            "summary": {
                "complete": self.is_complete,
                **{status.replace(" ", "_"): self.count(status) for status in statuses},
                "left_out": dict(self.left_out),
                "seconds": self.seconds,
                "matting_seconds": self.matting_seconds,
                "images_per_second": self.images_per_second,
                "peak_memory_bytes": self.peak_memory_bytes,
                "means": _plain(self.means),
                "means_without_images_trained_on": _plain(self.means_unseen),
                "shots": _plain(self.shots),
                "problems": dict(Counter(each.kind for each in self.problems)),
                "allowed_problems": sorted(self.allowed),
            },
            "problems": [dataclasses.asdict(each) for each in self.problems],
            "images": [_plain(result) for result in self.results],
        }


def _plain(value: Any) -> Any:
    """Dataclasses and mappings as dictionaries, all the way down."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value
