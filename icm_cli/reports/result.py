"""The result of one image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from icm_cli.reports.scores import Region, Scores

Status = Literal["done", "skipped", "unscored", "failed", "planned", "not reached"]


@dataclass(frozen=True)
class ImageResult:
    """Result of one image. Numbers are None, and ``scores`` empty, where there is no alpha to measure."""

    source: str
    output: str
    status: Status
    """"skipped": a whole alpha made with the same settings from the same source was already there; "unscored": its
    alpha or ground truth is bad or missing."""
    name: str = ""
    """Name in its dataset, or path below the sources' root."""
    group: str = ""
    categories: Mapping[str, str] = field(default_factory=dict)
    round: int = 0
    """Round of an evaluation, from 1; 0 where there are none."""
    page: int = 0
    """Page of a file of several pictures, from 1; 0 of all others."""
    colorspace: str = ""
    """Colour space that the source was taken to be in."""
    truth: str = ""
    """The ground truth's file."""
    seconds: float | None = None
    """From the start of reading to the written file, waiting between stages left out."""
    foreground: float | None = None
    """Share of foreground: the mean of the alpha, 0..1."""
    confidence: float | None = None
    """Confidence of the model, 0..1, as its head measures it."""
    not_found: bool | None = None
    """True where the reference's thing does not seem to be in the picture."""
    scores: Mapping[Region, Scores] = field(default_factory=dict)
    dt_ssd: float | None = None
    """Flicker to the frame before, in groups that are videos."""
    jaccard: float | None = None
    """J of DAVIS, 0..1, in datasets of shots."""
    boundary_f: float | None = None
    """F of DAVIS, 0..1."""
    was_resized: bool = False
    """The alpha was not of its ground truth's size; it was brought there bilinearly to be scored."""
    is_seen: bool | None = None
    """Whether the model was trained on this very file; None where its checkpoint does not say."""
    reason: str = ""
    """Why it failed or has no score."""

    @property
    def has_alpha(self) -> bool:
        """Whether its alpha is there to look at."""
        return self.status in ("done", "skipped", "unscored") and bool(self.output)

    @property
    def key(self) -> tuple[int, str]:
        """Unique key within the run: (round, name)."""
        return self.round, self.name or self.source

    def as_row(self) -> dict[str, Any]:
        """Flat, as a line of a table: ``whole_mse``, ``unknown_grad``, ``category_class``."""
        flat = {column.name: getattr(self, column.name) for column in dataclasses.fields(self)}
        scores, categories = flat.pop("scores"), flat.pop("categories")
        for region, metrics in scores.items():
            flat |= {f"{region}_{name}": value for name, value in dataclasses.asdict(metrics).items()}
        return flat | {f"category_{name}": value for name, value in categories.items()}
