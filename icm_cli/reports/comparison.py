"""Compare two JSON reports image by image (``icm eval --compare``)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_cli.errors import UsageError
from icm_cli.options import Region
from icm_cli.reports.result import METRICS, REGIONS

ImageKey = tuple[int, str]
PROTOCOL_KEYS = ("dataset", "split", "regions", "size", "metric_variant", "unknown_region", "rounds", "refs_per_group")


@dataclass(frozen=True)
class ImageDifference:
    """Metrics of an image over one region in both reports."""

    round: int
    name: str
    before: Mapping[str, float]
    after: Mapping[str, float]

    def change(self, metric: str) -> float:
        """Return after minus before. A positive value is a change for the worse."""
        return self.after[metric] - self.before[metric]


@dataclass(frozen=True)
class Comparison:
    """Differences between two reports. Images are sorted by change in MSE, worst first."""

    warnings: list[str]
    images: dict[Region, list[ImageDifference]]

    def means(self, region: Region) -> dict[str, tuple[float, float]]:
        """Return the means of every metric before and after, over the images in both reports."""
        rows = self.images[region]
        return {
            metric: (
                math.fsum(row.before[metric] for row in rows) / len(rows),
                math.fsum(row.after[metric] for row in rows) / len(rows),
            )
            for metric in METRICS
        }


def compare_reports(before: str | Path, after: str | Path) -> Comparison:
    """Compare two reports. Differences in protocol or settings result in warnings, not errors.

    Raises UsageError for a file that is not a JSON report of icm.
    """
    first, second = _read_report(Path(before)), _read_report(Path(after))
    warnings = _protocol_warnings(first, second)
    for path, report in ((before, first), (after, second)):
        if not report.get("summary", {}).get("complete", True):
            warnings.append(f"{path} is the report of an interrupted run")
    images: dict[Region, list[ImageDifference]] = {}
    unmatched: tuple[set[ImageKey], set[ImageKey]] = (set(), set())
    for region in REGIONS:
        a, b = _scores_by_image(first, region), _scores_by_image(second, region)
        unmatched[0].update(a.keys() - b.keys())
        unmatched[1].update(b.keys() - a.keys())
        rows = [ImageDifference(*key, a[key], b[key]) for key in a.keys() & b.keys()]
        if rows:
            images[region] = sorted(rows, key=lambda row: (-row.change("mse"), row.round, row.name))
    for path, keys in zip((before, after), unmatched, strict=True):
        if keys:
            number, name = min(keys)
            example = f"{name} in round {number}" if number else name
            warnings.append(f"{len(keys)} image(s) have scores only in {path}, such as {example}; they are excluded")
    if not images:
        warnings.append("no image has scores in both reports")
    return Comparison(warnings, images)


def _read_report(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"report {path} does not exist; expected a JSON report of icm")
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        scores = [score for region in REGIONS for score in _scores_by_image(content, region).values()]
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for score in scores for x in score.values()):
            raise TypeError("a score is not a finite number")
        content["settings"].get("protocol")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"report {path} cannot be compared ({error}); expected a JSON report of icm") from error
    return dict(content)


def _scores_by_image(report: Mapping[str, Any], region: Region) -> dict[ImageKey, dict[str, float]]:
    return {
        (image.get("round", 0), image.get("name") or image["source"]): {
            metric: image["scores"][region][metric] for metric in METRICS
        }
        for image in report["images"]
        if region in image.get("scores", {})
    }


def _protocol_warnings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    a, b = (report["settings"].get("protocol", {}) for report in (first, second))
    warnings = _differences("protocols", {key: (a.get(key), b.get(key)) for key in PROTOCOL_KEYS})
    a, b = (report["settings"] for report in (first, second))
    is_shot = bool(a.get("shot")), bool(b.get("shot"))
    learn_steps = int(a.get("learn_steps") or 0), int(b.get("learn_steps") or 0)
    warnings += _differences("settings", {"shot": is_shot, "learn_steps": learn_steps})
    if first.get("references") != second.get("references"):
        warnings.append("the references differ; give both runs the same --references FILE to compare models")
    return warnings


def _differences(kind: str, values: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [
        f"the {kind} differ: {key} is {_format_value(first)} in the first and {_format_value(second)} in the second"
        for key, (first, second) in values.items()
        if first != second
    ]


def _format_value(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
