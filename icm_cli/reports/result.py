"""The result of one image, and its scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args

from icm_cli.options import Region

Status = Literal["done", "kept", "unscored", "failed", "planned", "not reached"]
REGIONS: tuple[Region, ...] = get_args(Region)


@dataclass(frozen=True)
class Scores:
    """The metrics of one image over one region. Lower is better; 0 means equal to the ground truth."""

    mse: float
    """Mean squared error."""
    sad: float
    """Sum of absolute differences, in thousands."""
    grad: float
    """Sum of squared differences of the gradient magnitude, scaled as in its variant."""
    conn: float
    """Sum of differences in connectivity, in thousands."""
    mad: float
    """Mean absolute difference."""


METRICS: tuple[str, ...] = tuple(field.name for field in fields(Scores))
METRIC_TITLES = {"mse": "MSE", "sad": "SAD", "grad": "GRAD", "conn": "CONN", "mad": "MAD", "dt_ssd": "dtSSD"}


@dataclass(frozen=True)
class MattingDetails:
    """Details about the computation of an alpha. Values that were not computed are None."""

    colorspace: str = ""
    """Colour space in which the source was interpreted."""
    seconds: float | None = None
    """Processing time from reading to writing, without waiting time between stages."""
    foreground: float | None = None
    """Mean of the alpha, 0..1."""
    quality: float | None = None
    """Expected intersection over union of the alpha with the true alpha, 0..1."""
    reasons: tuple[str, ...] = ()
    """Why the alpha may be wrong, such as "split"."""
    signals: Mapping[str, float] = field(default_factory=dict)
    """Measurements from which the quality is estimated, by name."""
    not_found: bool | None = None
    """Whether the model did not find the object of the reference in the image."""
    made_by: str = ""
    """Version of icm that made the alpha; "" if icm did not make it."""
    reviewed: str = ""
    """How and when a person accepted the alpha, such as "corrected 2026-11-30T09:15:00Z"; "" if nobody did."""


@dataclass(frozen=True)
class ImageEvaluation:
    """Scores of an image. Values that were not computed are empty or None."""

    scores: Mapping[Region, Scores] = field(default_factory=dict)
    dt_ssd: float | None = None
    """Flicker between the frame before and this one, for groups that are videos."""
    jaccard: float | None = None
    """J of DAVIS, 0..1, for datasets of shots."""
    boundary_f: float | None = None
    """F of DAVIS, 0..1, for datasets of shots."""
    was_resized: bool = False
    """Whether the alpha was resized bilinearly to the size of the ground truth for scoring."""
    is_seen: bool | None = None
    """Whether the model was trained on this file; None if the checkpoint does not list them."""


@dataclass(frozen=True)
class ImageResult:
    """Result of one image."""

    source: str
    output: str
    status: Status
    """"kept": a complete alpha, made from the same source with the same settings, already existed. "unscored": the
    alpha or the ground truth is bad or missing."""
    name: str = ""
    """Name in its dataset, or path relative to the root of the sources."""
    page: int = 0
    """Page of a file with several images, from 1; 0 for files with one image."""
    has_hints: bool = False
    """Whether a person gave hints about this image."""
    group: str = ""
    """Group in its dataset: images of the same object, or a shot."""
    categories: Mapping[str, str] = field(default_factory=dict)
    """Categories in its dataset, such as {"class": "animal"}."""
    round: int = 0
    """Round of an evaluation, from 1; 0 outside evaluations."""
    truth: str = ""
    """Path of the ground truth."""
    matting: MattingDetails = MattingDetails()
    evaluation: ImageEvaluation = ImageEvaluation()
    reason: str = ""
    """Why the image failed or has no score."""

    @property
    def has_alpha(self) -> bool:
        """Whether the alpha file exists."""
        return self.status in ("done", "kept", "unscored") and bool(self.output)

    @property
    def quality_key(self) -> float:
        """Sort key that brings the lowest quality first, and results without one last."""
        return math.inf if self.matting.quality is None else self.matting.quality

    @property
    def key(self) -> tuple[int, str]:
        """Unique key within the run: (round, name)."""
        return self.round, self.name or self.source

    def as_dict(self) -> dict[str, Any]:
        """Return all values in a flat dictionary, in which ``scores`` and ``categories`` are dictionaries."""
        values = dataclasses.asdict(self)
        values |= values.pop("matting") | values.pop("evaluation")
        return {name: values[name] for name in RESULT_FIELDS}

    def as_row(self) -> dict[str, Any]:
        """Return a row of a table, with columns such as ``whole_mse`` and ``category_class``, without the signals."""
        values = self.as_dict()
        row = {name: values[name] for name in COLUMNS} | {"reasons": ", ".join(self.matting.reasons)}
        for region, metrics in values["scores"].items():
            row |= {f"{region}_{name}": value for name, value in metrics.items()}
        return row | {f"category_{name}": value for name, value in self.categories.items()}


def _flat_field_names() -> Iterator[str]:
    """Yield the names of the fields of a result. The fields of ``matting`` and ``evaluation`` replace these two."""
    for outer in fields(ImageResult):
        if is_dataclass(outer.default):
            yield from (inner.name for inner in fields(outer.default))
        else:
            yield outer.name


RESULT_FIELDS = tuple(_flat_field_names())
"""Names of all values of a result, in the order of reports."""
COLUMNS = tuple(name for name in RESULT_FIELDS if name not in ("scores", "categories", "signals"))
"""Names of the values of a result that are a column of a table."""
