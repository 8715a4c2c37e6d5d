"""Compare two JSON reports image by image (``icm eval --compare``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from icm_cli.errors import UsageError
from icm_cli.files.json_files import format_json, read_json
from icm_cli.options import Region
from icm_cli.reports.report import REFERENCES_SCHEMA, SCHEMA_VERSION
from icm_cli.reports.result import METRICS, REGIONS

ImageKey = tuple[int, str]
ScoresByRegion = dict[Region, dict[ImageKey, Mapping[str, float]]]
PROTOCOL_KEYS = ("dataset", "split", "regions", "size", "metric_variant", "unknown_region", "rounds", "refs_per_group")
EXPECTED_REPORT = "expected a JSON report of icm eval; write it again with icm eval ... --report FILE.json"
NONE = type(None)
REPORT_SCHEMA = {
    "schema_version?": int,
    "settings": {
        "protocol?": {
            "regions?": [str],
            **{f"{key}?": (str, int, NONE) for key in (*PROTOCOL_KEYS, "lineage") if key != "regions"},
        },
        "shot?": (bool, NONE),
        "learn_steps?": (int, NONE),
    },
    "references?": REFERENCES_SCHEMA,
    "summary?": {"complete?": bool},
    "images": [{"round?": int, "name?": str, "source?": str, "scores?": {"*": dict.fromkeys(METRICS, (int, float))}}],
}
"""Schema of the values that a comparison reads. Keys that end in "?" are optional, and "*" is any key."""
MAX_SCORE = 1e15
MAX_ROUND = 10**6


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
            metric: (fmean(row.before[metric] for row in rows), fmean(row.after[metric] for row in rows))
            for metric in METRICS
        }


@dataclass(frozen=True)
class _ScoredReport:
    """The values of a report that a comparison needs, all of which were checked."""

    protocol: Mapping[str, Any]
    settings: Mapping[str, Any]
    references: list[dict[str, list[str]]]
    is_complete: bool
    scores: ScoresByRegion

    @property
    def command(self) -> str:
        return "icm matte" if self.protocol["dataset"] is None else "icm eval"


def compare_reports(before: str | Path, after: str | Path) -> Comparison:
    """Compare two reports. Differences in protocol or settings result in warnings, not errors.

    Raises UsageError for a file that is not a JSON report with scores, and for reports of different commands.
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
    warnings += _unmatched_images(first, second, before)
    warnings += _unmatched_images(second, first, after)
    images = _image_differences(first.scores, second.scores)
    if not images:
        warnings.append("no image has scores in both reports")
    return Comparison(warnings, images)


def _image_differences(before: ScoresByRegion, after: ScoresByRegion) -> dict[Region, list[ImageDifference]]:
    """Return the differences of the images with scores in both reports, worst first; no region without images."""
    images: dict[Region, list[ImageDifference]] = {}
    for region in REGIONS:
        old, new = before[region], after[region]
        rows = [ImageDifference(*key, old[key], new[key]) for key in old.keys() & new.keys()]
        if rows:
            images[region] = sorted(rows, key=lambda row: (-row.change("mse"), row.round, row.name))
    return images


def _unmatched_images(report: _ScoredReport, other: _ScoredReport, path: str | Path) -> list[str]:
    """Return a warning if images have scores only in ``report``, which is the file ``path``."""
    keys: set[ImageKey] = set()
    for region in REGIONS:
        keys |= report.scores[region].keys() - other.scores[region].keys()
    if not keys:
        return []
    round_number, name = min(keys)
    example = f"{name} in round {round_number}" if round_number else name
    count = "1 image has" if len(keys) == 1 else f"{len(keys)} images have"
    return [f"{count} scores only in {path}, such as {example}; not compared"]


def _differences(kind: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return a warning for each key whose value differs. ``kind``: what is compared, for the message."""
    return [
        f"the {kind} differ: {key} is {_format_value(first[key])} in the first and {_format_value(second[key])} in "
        "the second"
        for key in first
        if first[key] != second[key]
    ]


def _format_value(value: Any) -> str:
    return format_json(", ".join(value) if isinstance(value, list) else str(value)).strip('"')


def _read_report(path: Path) -> _ScoredReport:
    """Read and check a report. Raises UsageError."""
    content = read_json(path, "report", REPORT_SCHEMA, EXPECTED_REPORT, use="compared")
    settings = content["settings"]
    version = content.get("schema_version", 1)
    protocol = settings.get("protocol")
    expected = EXPECTED_REPORT
    try:
        if not 1 <= version <= SCHEMA_VERSION:
            raise ValueError(
                f"schema_version is {format_json(version)}, but this version of icm reads 1..{SCHEMA_VERSION}; use "
                "the version of icm that wrote it"
            )
        if protocol is None:
            expected = "expected scores; write it again with icm matte ... --gt DIR --report FILE.json"
            raise ValueError("it is a report of icm matte without --gt, and has no scores")
        scores = _collect_scores(content["images"])
    except ValueError as error:
        raise UsageError(f"report {path} cannot be compared: {error}; {expected}") from error
    if "metric_variant" not in protocol:
        protocol["metric_variant"] = protocol.get("lineage")  # its name in version 1
    return _ScoredReport(
        {key: protocol.get(key) for key in PROTOCOL_KEYS},
        {"shot": bool(settings.get("shot")), "learn_steps": settings.get("learn_steps") or 0},
        content.get("references", []),
        content.get("summary", {}).get("complete", True),
        scores,
    )


def _collect_scores(images: Sequence[Mapping[str, Any]]) -> ScoresByRegion:
    """Return the scores of all images. Raises ValueError for a wrong round, name, region or score."""
    scores: ScoresByRegion = {region: {} for region in REGIONS}
    for number, image in enumerate(images):
        where = f"images[{number}]"
        round_number, name = image.get("round", 0), image.get("name") or image.get("source", "")
        if not 0 <= round_number <= MAX_ROUND:
            raise ValueError(f"{where}.round is {format_json(round_number)}; expected 0..{MAX_ROUND}")
        for region, metrics in image.get("scores", {}).items():
            if region not in REGIONS:
                raise ValueError(
                    f"{where}.scores has the region {format_json(region)}; expected {' or '.join(REGIONS)}"
                )
            if (round_number, name) in scores[region]:
                raise ValueError(f"{where} repeats image {format_json(name)} of round {round_number}")
            _check_metrics(metrics, f"{where}.scores.{region}")
            scores[region][round_number, name] = metrics
    return scores


def _check_metrics(metrics: Mapping[str, float], where: str) -> None:
    """Raise ValueError if a metric is negative, NaN or too large."""
    for metric in METRICS:
        if not 0 <= metrics[metric] <= MAX_SCORE:  # also true for NaN
            score = format_json(metrics[metric])
            raise ValueError(f"{where}.{metric} is {score}; expected a number of 0 or more")
