"""A report as one self-contained HTML page: no external resource, readable without scripts."""

from __future__ import annotations

import base64
import datetime
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from icm_cli.errors import ImageError
from icm_cli.files import atomic_write
from icm_cli.geometry import ImageU8
from icm_cli.images.colour import DEFAULT_COLOUR, ColourSettings
from icm_cli.images.reading import CompositeSource, read_alpha, read_source_image
from icm_cli.reports.contact_sheet import evenly
from icm_cli.reports.means import SHOT_SCORE_TITLES, Means, compute_means_by, format_mean, format_metric
from icm_cli.reports.published import PUBLISHED, comparability
from icm_cli.reports.result import METRIC_TITLES, METRICS, Region

if TYPE_CHECKING:
    from icm_cli.reports.report import Report
    from icm_cli.reports.result import ImageResult

WORST_SHOWN = 8
BEST_SHOWN = 4
UNSCORED_SHOWN = 12
"""Images shown of a run without ground truth, evenly taken."""
MOST_ROWS = 500
"""Images in the table of all; a page of more is no longer read, the .csv has them all."""
PICTURE_PX = 420
"""Longest side of a picture on the page."""
BINS = 24
DECADES = 5
"""A histogram's first bin holds everything this many powers of ten below the largest score, and zero."""
MASK_TINT = (255, 64, 96)


@dataclass(frozen=True)
class Figure:
    """One image on the page; pictures are data URIs, None where there is nothing to show."""

    result: ImageResult
    source: str | None
    references: list[str]
    alpha: str | None
    truth: str | None
    heat: str | None


@dataclass(frozen=True)
class Histogram:
    """Spread of a metric over the images, in bins of equal width on a logarithmic axis."""

    title: str
    counts: list[int]
    lowest: float
    highest: float

    @property
    def tallest(self) -> int:
        return max(self.counts)


def write_page(path: Path, report: Report) -> None:
    """Write the page whole or not at all. Raises OutputError."""
    environment = Environment(
        loader=PackageLoader("icm_cli.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_metric, "mean": format_mean}
    text = environment.get_template("page.html").render(_content(report))
    with atomic_write(path) as file:
        file.write(text.encode(errors="replace"))  # names need not be UTF-8


def _content(report: Report) -> dict[str, Any]:
    """All that the template shows."""
    protocol = report.settings.get("protocol", {})
    scored = [result for result in report.results if result.scores]
    means = report.means
    metrics = list(dict.fromkeys(name for each in means.values() for name in each.metrics))
    main: Region | None = next(iter(means), None)
    worst_first = sorted(scored, key=lambda result: -_mse(result, main)) if main else []
    best = worst_first[::-1][: min(BEST_SHOWN, len(scored) // 3)]
    worst = worst_first[: min(WORST_SHOWN, len(scored) - len(best))]
    unscored = [] if scored else evenly([each for each in report.results if each.has_alpha], UNSCORED_SHOWN)
    figure = partial(_figure, report)
    return {
        "title": report.settings["title"],
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "settings": report.settings,
        "protocol": {key: value for key, value in protocol.items() if key != "title"},
        "means": means,
        "means_unseen": report.means_unseen or {},
        "metrics": metrics,
        "metric_titles": METRIC_TITLES,
        "main": main,
        "published": PUBLISHED.get(protocol.get("title", ""), ()),
        "comparability": comparability(protocol, means),
        "shot_figures": SHOT_SCORE_TITLES,
        "tables": _tables(scored),
        "histograms": [_histogram(scored, main, metric) for metric in METRICS] if main else [],
        "worst": map(figure, worst),
        "best": map(figure, best),
        "unscored": map(figure, unscored),
        "rows": (worst_first or report.results)[:MOST_ROWS],
        "rows_in_all": len(worst_first or report.results),
        "report": report,
    }


def _mse(result: ImageResult, region: Region | None) -> float:
    scores = result.scores.get(region) if region else None
    return scores.mse if scores else 0.0


def _tables(scored: Sequence[ImageResult]) -> dict[str, dict[str, dict[Region, Means]]]:
    """Means by group and by every category, where there is more than one."""
    categories = sorted({name for result in scored for name in result.categories})
    tables = {name: compute_means_by(scored, partial(_category, name)) for name in categories}
    tables["group"] = compute_means_by(scored, lambda result: result.group)
    return {name: rows for name, rows in tables.items() if len(rows) > 1}


def _category(name: str, result: ImageResult) -> str | None:
    return result.categories.get(name)


def _histogram(scored: Sequence[ImageResult], region: Region, metric: str) -> Histogram:
    values = [getattr(result.scores[region], metric) for result in scored if region in result.scores]
    largest = max(values) or 1.0
    logarithms = np.log10(np.maximum(values, largest * 10.0**-DECADES))
    lowest, highest = float(np.floor(logarithms.min())), float(np.ceil(logarithms.max() + 1e-9))
    counts, _ = np.histogram(logarithms, BINS, (lowest, max(highest, lowest + 1)))
    return Histogram(METRIC_TITLES[metric], counts.tolist(), 10**lowest, 10 ** max(highest, lowest + 1))


def _figure(report: Report, result: ImageResult) -> Figure:
    """The pictures of one image; one that can no longer be read is left out."""
    alpha, truth = _matte(result.output), _matte(result.truth)
    heat = None
    if alpha is not None and truth is not None:
        if alpha.shape != truth.shape:
            alpha = np.asarray(cv2.resize(alpha, truth.shape[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)
        error = cv2.absdiff(alpha, truth)
        heat = cv2.cvtColor(
            cv2.applyColorMap(_small(np.asarray(error, np.uint8)), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB
        )
    shown = [_tinted(rgb, np.asarray(inside * 255, np.uint8)) for rgb, inside in report.album.marked]
    for files in report.album.references.get((result.round, result.group), ()):
        rgb, alpha_of = _picture(files[0]), _matte(str(files[1]))
        shown += [_tinted(rgb, alpha_of)] if rgb is not None and alpha_of is not None else []
    return Figure(
        result,
        _uri(
            _picture(
                report.album.composites.get(result.name, Path(result.source)),
                report.album.colour,
                max(0, result.page - 1),
            )
        ),
        [uri for each in shown if (uri := _uri(each))],
        _uri(alpha),
        _uri(truth),
        _uri(np.asarray(heat, np.uint8)) if heat is not None else None,
    )


def _picture(source: Path | CompositeSource, colour: ColourSettings = DEFAULT_COLOUR, frame: int = 0) -> ImageU8 | None:
    try:
        return read_source_image(source, colour, frame).to_display_window().rgb
    except ImageError:
        return None


def _matte(path: str) -> ImageU8 | None:
    try:
        return read_alpha(Path(path)) if path else None
    except ImageError:
        return None


def _tinted(rgb: ImageU8, marked: ImageU8) -> ImageU8:
    """A reference with what its mask marks tinted, the rest darkened."""
    rgb = _small(rgb)
    weight = cv2.resize(marked, rgb.shape[1::-1], interpolation=cv2.INTER_AREA)[..., None] / 255.0
    inside, outside = 0.6 * rgb + 0.4 * np.array(MASK_TINT), 0.45 * rgb
    return np.asarray(inside * weight + outside * (1 - weight), np.uint8)


def _small(image: ImageU8) -> ImageU8:
    scale = PICTURE_PX / max(image.shape[:2])
    if scale >= 1:
        return image
    size = [max(1, round(length * scale)) for length in image.shape[1::-1]]
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _uri(image: ImageU8 | None) -> str | None:
    if image is None:
        return None
    data = io.BytesIO()
    Image.fromarray(_small(image)).save(data, format="WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
