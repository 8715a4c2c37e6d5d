"""Report of a run: settings, the result of every image, and totals."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icm_cli.errors import ImageError, Problem
from icm_cli.geometry import ImageU8, downscaled_size, resize
from icm_cli.images.colour import DEFAULT_COLOUR, ColourSettings
from icm_cli.images.reading import CompositeSource, read_source_image
from icm_cli.options import DEFAULT_REVIEW_BELOW, Region
from icm_cli.reports.means import Means, ShotScores, compute_means, compute_shot_scores
from icm_cli.reports.result import ImageResult, Status

REFERENCES_SCHEMA = [{"*": [str]}]
"""Schema of the references in JSON: for every round, the names of the references by group."""
REFERENCE_CAPTION, NEGATIVE_CAPTION = "reference with mask", "negative reference"
"""Captions of references."""
PREVIEW_PX = 420
"""Long side of the images on pages and contact sheets."""
SCHEMA_VERSION = 3
"""Version of the JSON report: raised when a value changes its name, type or meaning.

Reports of icm 0.1.0, which do not state it, have version 1. Version 3 has ``quality``, ``reasons`` and ``signals`` in
place of ``confidence``.
"""


@dataclass(frozen=True)
class PageImages:
    """Images that the HTML page shows in addition to sources and alphas."""

    references: Mapping[tuple[int, str], Sequence[tuple[Path | CompositeSource, Path]]] = field(default_factory=dict)
    """References of an evaluation by round and group, as pairs of image and alpha."""
    references_with_masks: Sequence[tuple[ImageU8, NDArray[np.bool_], str]] = ()
    """References that apply to all images: sRGB uint8 [H,W,3], mask of the object or of a negative [H,W], and caption.
    """
    colour: ColourSettings = DEFAULT_COLOUR
    composites: Mapping[str, CompositeSource] = field(default_factory=dict)
    """Composites that are sources, by the name of their result."""
    previews: dict[tuple[Path | CompositeSource, int], ImageU8 | None] = field(default_factory=dict, repr=False)
    """Images that were read for the page or the contact sheet, by source and frame."""

    def read_preview(self, source: Path | CompositeSource, frame: int = 0) -> ImageU8 | None:
        """Return an image of at most PREVIEW_PX, sRGB uint8 [H,W,3]; None if it cannot be read.

        Every image is read only once, for all pages and contact sheets.
        """
        if (source, frame) not in self.previews:
            preview = None
            with contextlib.suppress(ImageError):
                image = read_source_image(source, self.colour, frame)
                preview = shrink_image(image.to_display_window().rgb, PREVIEW_PX)
            self.previews[source, frame] = preview
        return self.previews[source, frame]

    def read_source(self, result: ImageResult) -> ImageU8 | None:
        """Return the preview of the source of a result."""
        source = self.composites.get(result.name, Path(result.source))
        frame = max(0, result.page - 1)  # pages are counted from 1, and a page of 0 is a file with one image
        return self.read_preview(source, frame)


@dataclass(repr=False)
class Report:
    """Report of a run: settings, a result for every image, and totals."""

    settings: dict[str, Any]
    results: list[ImageResult] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    """Problems with the input data; see ``icm_cli.errors.PROBLEM_KINDS``."""
    skipped_files: Mapping[str, int] = field(default_factory=dict)
    """Number of files among the sources that were not matted, by reason."""
    allowed: frozenset[str] = frozenset()
    """Kinds of problems that do not affect the exit code."""
    references: list[dict[str, list[str]]] = field(default_factory=list)
    """References of an evaluation: for every round, the names of the references by group."""
    page_images: PageImages = field(default_factory=PageImages)
    review_below: float = DEFAULT_REVIEW_BELOW
    """Quality below which an alpha should be looked at by a person."""
    review_list: Path | None = None
    """File that lists the images of :attr:`to_review`, if it was requested."""
    seconds: float = 0.0
    """Wall time of the run, including loading the model."""
    matting_seconds: float = 0.0
    """Wall time of matting."""
    peak_memory_bytes: int = 0

    @property
    def protocol(self) -> Mapping[str, Any]:
        """What the scores depend on, apart from the alphas; empty without scores."""
        return self.settings.get("protocol", {})

    @property
    def is_evaluation(self) -> bool:
        """Whether the run scored a dataset. Its alphas may be deleted at its end."""
        return bool(self.protocol.get("dataset"))

    def count(self, status: Status) -> int:
        """Return the number of images with this status."""
        return sum(result.status == status for result in self.results)

    def __repr__(self) -> str:
        return f"<Report of {len(self.results)} images: {dict(Counter(result.status for result in self.results))}>"

    @property
    def is_complete(self) -> bool:
        """Whether the run processed every image."""
        return not self.count("not reached")

    @property
    def method_name(self) -> str:
        """What made the alphas: "icm", or the name of the folder of predictions."""
        return Path(self.settings["predictions"]).name if "predictions" in self.settings else "icm"

    @property
    def failures(self) -> list[ImageResult]:
        """Results of the images that failed."""
        return [result for result in self.results if result.status == "failed"]

    @property
    def by_quality(self) -> list[ImageResult]:
        """Results of the images that have an alpha, sorted by quality, lowest first."""
        return sorted((result for result in self.results if result.has_alpha), key=lambda result: result.quality_key)

    @property
    def to_review(self) -> list[ImageResult]:
        """Results with a quality below ``review_below``, lowest first."""
        return [result for result in self.by_quality if result.quality_key < self.review_below]

    @property
    def images_per_second(self) -> float:
        """Number of matted images per second of matting."""
        return self.count("done") / self.matting_seconds if self.matting_seconds else 0.0

    @property
    def exit_code(self) -> int:
        """0 if no image failed and there are no problems except allowed ones, otherwise 1."""
        if self.failures or any(problem.kind not in self.allowed for problem in self.problems):
            return 1
        return 1 if self.count("unscored") and not self.means else 0

    @property
    def means(self) -> dict[Region, Means]:
        """Means of all metrics over the scored images."""
        return compute_means(self.results)

    @property
    def measured_metrics(self) -> list[str]:
        """Names of the metrics that have a mean."""
        return list(dict.fromkeys(name for means in self.means.values() for name in means.metrics))

    @property
    def means_unseen(self) -> dict[Region, Means] | None:
        """Means over the images not used for training; None if no image was used for training."""
        if not any(result.evaluation.is_seen for result in self.results):
            return None
        return compute_means([result for result in self.results if not result.evaluation.is_seen])

    @property
    def shots(self) -> dict[str, ShotScores]:
        """J and F of every shot, and last their mean; empty if the dataset has no shots."""
        return compute_shot_scores(self.results)

    def as_dict(self) -> dict[str, Any]:
        """Return the complete report as JSON values."""
        statuses: tuple[Status, ...] = ("done", "kept", "unscored", "failed", "not reached")
        return {
            "schema_version": SCHEMA_VERSION,
            "settings": self.settings,
            "references": self.references,
            "summary": {
                "complete": self.is_complete,
                **{status.replace(" ", "_"): self.count(status) for status in statuses},
                "to_review": len(self.to_review),
                "review_below": self.review_below,
                "skipped_files": dict(self.skipped_files),
                "seconds": self.seconds,
                "matting_seconds": self.matting_seconds,
                "images_per_second": self.images_per_second,
                "peak_memory_bytes": self.peak_memory_bytes,
                "means": _as_dicts(self.means),
                "means_without_images_trained_on": _as_dicts(self.means_unseen),
                "shots": _as_dicts(self.shots),
                "problems": dict(Counter(problem.kind for problem in self.problems)),
                "allowed_problems": sorted(self.allowed),
            },
            "problems": [dataclasses.asdict(problem) for problem in self.problems],
            "images": [result.as_dict() for result in self.results],
        }


def _as_dicts(values: Mapping[Any, Means | ShotScores] | None) -> dict[str, Any] | None:
    return None if values is None else {key: dataclasses.asdict(value) for key, value in values.items()}


def shrink_image(image: ImageU8, long_side_px: int) -> ImageU8:
    """Scale an image down to at most this long side."""
    return resize(image, downscaled_size(image.shape[:2], long_side_px))
