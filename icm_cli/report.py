"""What became of every image, and the files that say so."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from icm_cli.datasets.composites import Composite
from icm_cli.datasets.samples import Problem
from icm_cli.errors import UsageError
from icm_cli.evaluation.metrics import METRICS, REGIONS, Region, Scores
from icm_cli.evaluation.summary import Means, summarise
from icm_cli.files import atomic_write, write_json

Status = Literal["done", "skipped", "unscored", "failed", "planned", "not reached"]
REPORT_SUFFIXES = (".csv", ".json", ".html")


@dataclass(frozen=True)
class ImageResult:
    """What became of one image. Numbers are None, and ``scores`` empty, where there is no alpha to measure."""

    source: str
    output: str
    status: Status
    """"skipped": a whole alpha made with the same settings from the same source was already there; "unscored": its
    alpha or ground truth is bad or missing."""
    name: str = ""
    """In its dataset."""
    group: str = ""
    categories: Mapping[str, str] = field(default_factory=dict)
    round: int = 0
    """Of an evaluation, from 1; 0 where there are none."""
    truth: str = ""
    """The ground truth's file."""
    seconds: float | None = None
    """From the start of reading to the written file, waiting between stages left out."""
    foreground: float | None = None
    """Share of foreground: the mean of the alpha, 0..1."""
    confidence: float | None = None
    """How sure the model is, 0..1; what it measures is said by the model's head."""
    not_found: bool | None = None
    """True where the reference's thing does not seem to be in the picture."""
    scores: Mapping[Region, Scores] = field(default_factory=dict)
    dt_ssd: float | None = None
    """Flicker to the frame before, in groups that are videos."""
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
        """What tells it from every other of the run."""
        return self.round, self.name or self.source

    def as_row(self) -> dict[str, Any]:
        """Flat, as a line of a table: ``whole_mse``, ``unknown_grad``, ``category_class``."""
        flat = {column.name: getattr(self, column.name) for column in dataclasses.fields(self)}
        scores, categories = flat.pop("scores"), flat.pop("categories")
        for region, metrics in scores.items():
            flat |= {f"{region}_{name}": value for name, value in dataclasses.asdict(metrics).items()}
        return flat | {f"category_{name}": value for name, value in categories.items()}


@dataclass(frozen=True)
class Album:
    """Where the page finds the pictures that it shows."""

    references: Mapping[tuple[int, str], Sequence[tuple[Path | Composite, Path | None]]] = field(default_factory=dict)
    """By round and group: images with their masks, None for an RGBA cut-out."""
    composites: Mapping[str, Composite] = field(default_factory=dict)
    """Sources that are not files, by the name of their result."""


@dataclass(repr=False)
class Report:
    """The whole run: settings, a result for every image in the order of their names, and totals."""

    settings: dict[str, Any]
    results: list[ImageResult] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    """What is wrong with the data; see ``icm_cli.datasets.samples.PROBLEM_KINDS``."""
    allowed: frozenset[str] = frozenset()
    """Kinds of problems that do not count in the exit code."""
    references: list[dict[str, list[str]]] = field(default_factory=list)
    """Of an evaluation: for every round, the names of each group's references."""
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
        return summarise(self.results)

    @property
    def means_unseen(self) -> dict[Region, Means] | None:
        """The same without images that the model was trained on; None where there are no such images."""
        if not any(result.is_seen for result in self.results):
            return None
        return summarise([result for result in self.results if not result.is_seen])

    def write(self, path: Path) -> None:
        """Write as .csv (a line an image), .json (everything), or .html (a page to read). Raises OutputError."""
        if path.suffix.lower() == ".json":
            write_json(path, self.as_dict())
        elif path.suffix.lower() == ".html":
            from icm_cli.evaluation.page import write_page

            write_page(path, self)
        else:
            self._write_csv(path)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        statuses: tuple[Status, ...] = ("done", "skipped", "unscored", "failed", "not reached")
        return {
            "settings": self.settings,
            "references": self.references,
            "summary": {
                "complete": self.is_complete,
                **{status.replace(" ", "_"): self.count(status) for status in statuses},
                "seconds": self.seconds,
                "matting_seconds": self.matting_seconds,
                "images_per_second": self.images_per_second,
                "peak_memory_bytes": self.peak_memory_bytes,
                "means": _plain(self.means),
                "means_without_images_trained_on": _plain(self.means_unseen),
                "problems": dict(Counter(each.kind for each in self.problems)),
                "allowed_problems": sorted(self.allowed),
            },
            "problems": [dataclasses.asdict(each) for each in self.problems],
            "images": [_plain(result) for result in self.results],
        }

    def _write_csv(self, path: Path) -> None:
        columns = [each.name for each in dataclasses.fields(ImageResult) if each.name not in ("scores", "categories")]
        at = columns.index("was_resized")
        columns[at:at] = [f"{region}_{metric}" for region in REGIONS for metric in METRICS]
        protocol = self.settings.get("protocol", {})
        stated = {f"scored_{key}": protocol[key] for key in ("size", "lineage") if key in protocol}
        rows = [result.as_row() | stated for result in self.results]
        columns += sorted({column for row in rows for column in row} - set(columns))
        text = io.StringIO()
        table = csv.DictWriter(text, columns)
        table.writeheader()
        table.writerows(rows)
        with atomic_write(path) as file:
            file.write(text.getvalue().encode(errors="surrogateescape"))  # names need not be UTF-8


def check_report_paths(paths: list[Path]) -> None:
    """Raises UsageError for a report of no known kind."""
    for path in paths:
        if path.suffix.lower() not in REPORT_SUFFIXES:
            raise UsageError(f"report {path} is none of {', '.join(REPORT_SUFFIXES)}; give the file one of these names")


def _plain(value: Any) -> Any:
    """Dataclasses and mappings as dictionaries, all the way down."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value
