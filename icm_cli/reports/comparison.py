"""Compare two JSON reports image by image (``icm eval --compare``)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from icm_cli.errors import UsageError
from icm_cli.files import read_json
from icm_cli.options import Region
from icm_cli.reports.report import SCHEMA_VERSION, parse_references
from icm_cli.reports.result import METRICS, REGIONS

ImageKey = tuple[int, str]
Scores = dict[Region, dict[ImageKey, dict[str, float]]]
PROTOCOL_KEYS = ("dataset", "split", "regions", "size", "metric_variant", "unknown_region", "rounds", "refs_per_group")
EXPECTED_REPORT = "expected a JSON report of icm eval; write it again with icm eval ... --report FILE.json"
MAX_SCORE = 1e15
MAX_ROUND = 10**6
MAX_VALUE_CHARACTERS = 200
"""Longer values are truncated in messages."""


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


@dataclass(frozen=True)
class _ScoredReport:
    """The values of a report that a comparison needs, all of which were checked."""

    protocol: Mapping[str, Any]
    settings: Mapping[str, Any]
    references: list[dict[str, list[str]]]
    is_complete: bool
    scores: Scores

    @property
    def command(self) -> str:
        return "icm matte" if self.protocol["dataset"] is None else "icm eval"


def compare_reports(before: str | Path, after: str | Path) -> Comparison:
    """Compare two reports. Differences in protocol or settings result in warnings, not errors.

    Raises UsageError for a file that is not a JSON report with scores, and for reports of different
    commands.
    """
    first, second = _read_report(Path(before)), _read_report(Path(after))
    if first.command != second.command:
        raise UsageError(
            f"{before} is a report of {first.command} and {after} one of {second.command}, whose scores cannot be "
            "compared; give two reports of the same command"
        )
    warnings = _differences("protocols", first.protocol, second.protocol)
    warnings += _differences("settings", first.settings, second.settings)
    if first.references != second.references:
        warnings.append("the references differ; give both runs the same --references FILE to compare models")
    for path, report in ((before, first), (after, second)):
        if not report.is_complete:
            warnings.append(f"{path} is the report of an interrupted run")
    images: dict[Region, list[ImageDifference]] = {}
    unmatched: tuple[set[ImageKey], set[ImageKey]] = (set(), set())
    for region in REGIONS:
        a, b = first.scores[region], second.scores[region]
        unmatched[0].update(a.keys() - b.keys())
        unmatched[1].update(b.keys() - a.keys())
        rows = [ImageDifference(*key, a[key], b[key]) for key in a.keys() & b.keys()]
        if rows:
            images[region] = sorted(rows, key=lambda row: (-row.change("mse"), row.round, row.name))
    for path, keys in zip((before, after), unmatched, strict=True):
        if keys:
            number, name = min(keys)
            example = f"{name} in round {number}" if number else name
            count = "1 image has" if len(keys) == 1 else f"{len(keys)} images have"
            warnings.append(f"{count} scores only in {path}, such as {example}; not compared")
    if not images:
        warnings.append("no image has scores in both reports")
    return Comparison(warnings, images)


def _differences(kind: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    return [
        f"the {kind} differ: {key} is {_format_value(first[key])} in the first and {_format_value(second[key])} in "
        "the second"
        for key in first
        if first[key] != second[key]
    ]


def _format_value(value: Any) -> str:
    return _truncate(", ".join(value) if isinstance(value, list) else str(value))


def _format_json(value: Any) -> str:
    return _truncate(json.dumps(value))


def _truncate(text: str) -> str:
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[:MAX_VALUE_CHARACTERS]}..."


def _read_report(path: Path) -> _ScoredReport:
    """Read and check a report. Raises UsageError that names the first wrong value."""
    content = read_json(path, "report", EXPECTED_REPORT)
    try:
        return _parse_report(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"report {path} cannot be compared: {error}; {EXPECTED_REPORT}") from error


def _parse_report(content: Any) -> _ScoredReport:
    _check_type(content, "its content", dict)
    if not 1 <= (version := _take(content, "schema_version", int, default=1)) <= SCHEMA_VERSION:
        raise ValueError(
            f"schema_version is {_format_json(version)}, but this version of icm reads 1..{SCHEMA_VERSION}; use the "
            "version of icm that wrote it"
        )
    settings = _take(content, "settings", dict)
    if "protocol" not in settings:
        raise ValueError("it has no scores, like a report of icm matte without --gt")
    protocol = _take(settings, "protocol", dict, where="settings.")
    if "lineage" in protocol:  # its name in version 1
        protocol = {"metric_variant": protocol["lineage"], **protocol}
    protocol = {
        key: _take(protocol, key, str, int, list, type(None), default=None, where="settings.protocol.")
        for key in PROTOCOL_KEYS
    }
    for key, value in protocol.items():
        for item in value if isinstance(value, list) else ():
            _check_type(item, f"settings.protocol.{key}", str)
    return _ScoredReport(
        protocol,
        {
            "shot": bool(_take(settings, "shot", bool, type(None), default=None, where="settings.")),
            "learn_steps": _take(settings, "learn_steps", int, type(None), default=None, where="settings.") or 0,
        },
        parse_references(content.get("references", [])),
        _take(_take(content, "summary", dict, default={}), "complete", bool, default=True, where="summary."),
        _parse_scores(_take(content, "images", list)),
    )


def _parse_scores(images: list[Any]) -> Scores:
    scores: Scores = {region: {} for region in REGIONS}
    for number, image in enumerate(images):
        where = f"images[{number}]"
        _check_type(image, where, dict)
        round_number = _take(image, "round", int, default=0, where=f"{where}.")
        if not 0 <= round_number <= MAX_ROUND:
            raise ValueError(f"{where}.round is {_format_json(round_number)}; expected 0..{MAX_ROUND}")
        name = _take(image, "name", str, default="", where=f"{where}.") or _take(
            image, "source", str, where=f"{where}."
        )
        for region, metrics in _take(image, "scores", dict, default={}, where=f"{where}.").items():
            if region not in REGIONS:
                raise ValueError(
                    f"{where}.scores has the region {_format_json(region)}; expected {' or '.join(REGIONS)}"
                )
            by_image = scores[cast(Region, region)]
            if (round_number, name) in by_image:
                raise ValueError(f"{where} repeats image {_format_json(name)} of round {round_number}")
            by_image[round_number, name] = _parse_metrics(metrics, f"{where}.scores.{region}")
    return scores


def _parse_metrics(metrics: Any, where: str) -> dict[str, float]:
    _check_type(metrics, where, dict)
    values = {metric: _take(metrics, metric, int, float, where=f"{where}.") for metric in METRICS}
    for metric, value in values.items():
        if not 0 <= value <= MAX_SCORE:  # also false for NaN
            raise ValueError(f"{where}.{metric} is {_format_json(value)}; expected a number of 0 or more")
    return values


_REQUIRED: Any = object()


def _take(parent: Mapping[str, Any], key: str, *types: type, default: Any = _REQUIRED, where: str = "") -> Any:
    """Return a value, which must be of one of the JSON types. Raises ValueError."""
    value = parent.get(key, default)
    if value is _REQUIRED:
        raise ValueError(f"{where}{key} is missing")
    _check_type(value, f"{where}{key}", *types)
    return value


TYPE_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _check_type(value: Any, name: str, *types: type) -> None:
    """Raise ValueError if a value is of none of the types. A boolean is not an integer."""
    if type(value) not in types:
        expected = " or ".join(TYPE_NAMES[each] for each in types)
        raise ValueError(f"{name} is {_format_json(value)} instead of {expected}")
