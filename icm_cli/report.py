"""What became of every image, and the files that say so."""

from __future__ import annotations

import csv
import dataclasses
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from icm_cli.files import atomic_write, write_json

Status = Literal["done", "skipped", "failed", "planned", "not reached"]


@dataclass(frozen=True)
class ImageResult:
    """What became of one image. Numbers are None where there is no alpha to measure."""

    source: str
    output: str
    status: Status
    """"skipped": a whole alpha made with the same settings from the same source was already there."""
    seconds: float | None = None
    """From the start of reading to the written file, waiting between stages left out."""
    foreground: float | None = None
    """Share of foreground: the mean of the alpha, 0..1."""
    confidence: float | None = None
    """How sure the model is, 0..1; what it measures is said by the model's head."""
    not_found: bool | None = None
    """True where the reference's thing does not seem to be in the picture."""
    mse: float | None = None
    """Mean squared difference to the ground truth, alphas in 0..1."""
    sad: float | None = None
    """Sum of absolute differences to the ground truth over the whole image, in thousands."""
    reason: str = ""
    """Why it failed."""


@dataclass
class MatteReport:
    """The whole run: settings, a result for every image in the order of their names, and totals."""

    settings: dict[str, Any]
    results: list[ImageResult] = field(default_factory=list)
    seconds: float = 0.0
    """Wall time of the run, loading included."""
    matting_seconds: float = 0.0
    """Wall time of the images alone."""
    peak_memory_bytes: int = 0

    def count(self, status: Status) -> int:
        return sum(result.status == status for result in self.results)

    @property
    def failures(self) -> list[ImageResult]:
        return [result for result in self.results if result.status == "failed"]

    @property
    def images_per_second(self) -> float:
        return self.count("done") / self.matting_seconds if self.matting_seconds else 0.0

    @property
    def exit_code(self) -> int:
        """0 when every image has its alpha, else 1."""
        return 1 if self.failures else 0

    def mean(self, column: Literal["mse", "sad"]) -> float | None:
        """Mean of a column over the images that have it."""
        values = [value for result in self.results if (value := getattr(result, column)) is not None]
        return sum(values) / len(values) if values else None

    def write(self, path: Path) -> None:
        """Write as .csv (a line an image) or .json (settings and summary too). Raises OutputError."""
        if path.suffix.lower() == ".json":
            write_json(path, self.as_dict())
            return
        text = io.StringIO()
        table = csv.DictWriter(text, [column.name for column in dataclasses.fields(ImageResult)])
        table.writeheader()
        table.writerows(dataclasses.asdict(result) for result in self.results)
        with atomic_write(path) as file:
            file.write(text.getvalue().encode(errors="surrogateescape"))  # names need not be UTF-8

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        statuses = ("done", "skipped", "failed", "not reached")
        return {
            "settings": self.settings,
            "summary": {
                **{status: sum(result.status == status for result in self.results) for status in statuses},
                "seconds": self.seconds,
                "images_per_second": self.images_per_second,
                "peak_memory_bytes": self.peak_memory_bytes,
                "mse": self.mean("mse"),
                "sad": self.mean("sad"),
            },
            "images": [dataclasses.asdict(result) for result in self.results],
        }
