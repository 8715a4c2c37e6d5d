"""Two JSON reports of ``icm eval`` or ``icm matte``, image by image. The body of ``icm eval --compare``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_cli.errors import UsageError
from icm_cli.reports.result import METRICS, REGIONS, Region

Key = tuple[int, str]
PROTOCOL_KEYS = ("dataset", "split", "regions", "size", "lineage", "unknown_region", "rounds", "refs_per_group")


@dataclass(frozen=True)
class ImageDifference:
    """One image of both reports: its metrics over one region, before and after."""

    round: int
    name: str
    before: Mapping[str, float]
    after: Mapping[str, float]

    def change(self, metric: str) -> float:
        """After minus before; above 0 is worse."""
        return self.after[metric] - self.before[metric]


@dataclass(frozen=True)
class Comparison:
    """Differences of two reports, the images that became worse first."""

    warnings: list[str]
    images: dict[Region, list[ImageDifference]]

    def means(self, region: Region) -> dict[str, tuple[float, float]]:
        """The means of every metric over the images that are in both, before and after."""
        rows = self.images[region]
        return {
            metric: (
                math.fsum(row.before[metric] for row in rows) / len(rows),
                math.fsum(row.after[metric] for row in rows) / len(rows),
            )
            for metric in METRICS
        }


def compare(before: str | Path, after: str | Path) -> Comparison:
    """Compare two reports. Whatever makes them unequal in kind is a warning, never an error.

    Raises UsageError for a file that is no JSON report of icm.
    """
    first, second = _read(Path(before)), _read(Path(after))
    warnings = _protocol_warnings(first, second)
    for path, report in ((before, first), (after, second)):
        if not report.get("summary", {}).get("complete", True):
            warnings.append(f"{path} is of a run that was cut short")
    images: dict[Region, list[ImageDifference]] = {}
    only: tuple[set[Key], set[Key]] = (set(), set())
    for region in REGIONS:
        a, b = _scores(first, region), _scores(second, region)
        only[0].update(a.keys() - b.keys())
        only[1].update(b.keys() - a.keys())
        rows = [ImageDifference(*key, a[key], b[key]) for key in a.keys() & b.keys()]
        if rows:
            images[region] = sorted(rows, key=lambda row: (-row.change("mse"), row.round, row.name))
    for path, keys in zip((before, after), only, strict=True):
        if keys:
            number, name = min(keys)
            example = f"{name} in round {number}" if number else name
            warnings.append(f"{len(keys)} image(s) have scores only in {path}, such as {example}; they are left out")
    if not images:
        warnings.append("no image has scores in both reports")
    return Comparison(warnings, images)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"report {path} does not exist; expected a .json that icm wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        values = [value for region in REGIONS for each in _scores(content, region).values() for value in each.values()]
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            raise TypeError("a score is not a finite number")
        content["settings"].get("protocol")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"report {path} cannot be compared ({error}); expected a .json that icm wrote") from error
    return dict(content)


def _scores(report: Mapping[str, Any], region: Region) -> dict[Key, dict[str, float]]:
    return {
        (image.get("round", 0), image.get("name") or image["source"]): {
            metric: image["scores"][region][metric] for metric in METRICS
        }
        for image in report["images"]
        if region in image.get("scores", {})
    }


def _protocol_warnings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    a, b = (report["settings"].get("protocol", {}) for report in (first, second))
    warnings = [
        f"the protocols differ: {key} is {_text(a.get(key))} in the first and {_text(b.get(key))} in the second"
        for key in PROTOCOL_KEYS
        if a.get(key) != b.get(key)
    ]
    asked = (report["settings"] for report in (first, second))
    ours, theirs = (
        {"shot": bool(each.get("shot")), "learn_steps": int(each.get("learn_steps") or 0)} for each in asked
    )
    warnings += [
        f"the ways differ: {key} is {ours[key]} in the first and {theirs[key]} in the second"
        for key in ours
        if ours[key] != theirs[key]
    ]
    if first.get("references") != second.get("references"):
        warnings.append(
            "the references differ, so the models were shown different things (--references FILE fixes them)"
        )
    return warnings


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
