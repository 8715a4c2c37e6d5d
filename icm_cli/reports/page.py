"""HTML page of a report: a single file without external resources, readable without scripts."""

from __future__ import annotations

import base64
import datetime
import io
import os
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from icm_cli.errors import format_count
from icm_cli.files.atomic_writes import atomic_write
from icm_cli.files.paths import is_file
from icm_cli.geometry import ImageU8, resize
from icm_cli.options import Region
from icm_cli.reports.contact_sheet import composite_on_backdrop, read_alpha_or_none
from icm_cli.reports.means import SHOT_SCORE_TITLES, Means, compute_means_by, format_mean, format_metric
from icm_cli.reports.published import comparison_caveats, published_scores
from icm_cli.reports.report import PREVIEW_PX, REFERENCE_CAPTION, shrink_image
from icm_cli.reports.result import METRIC_TITLES, METRICS

if TYPE_CHECKING:
    from icm_cli.reports.report import Report
    from icm_cli.reports.result import ImageResult

MAX_WORST = 8
MAX_BEST = 4
"""Numbers of images shown for a run with ground truth: the worst and the best by MSE."""
MAX_UNSCORED = 60
"""Number of images shown for a run without ground truth: those with the lowest quality."""
CARD_PX = 320
"""Long side of the images of a run without ground truth."""
MAX_TABLE_ROWS = 10_000
"""Maximum number of rows in the table of all images. The CSV report has no limit."""
MAX_LISTED = 500
"""Maximum number of failures and of problems on the page."""
MAX_OPEN = 20
"""A longer list of problems is folded."""
HISTOGRAM_BINS = 24
HISTOGRAM_DECADES = 5
"""Scores below the largest one divided by 10 ** HISTOGRAM_DECADES are counted in the first bin."""
MASK_TINT = (255, 64, 96)


def write_page(path: Path, report: Report) -> None:
    """Write the page atomically. Raises OutputError."""
    environment = Environment(
        loader=PackageLoader("icm_cli.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_metric, "mean": format_mean, "count": format_count}
    environment.filters["link"] = partial(_make_link, path.parent)
    text = environment.get_template("page.html").render(_template_context(report))
    with atomic_write(path) as file:
        file.write(text.encode(errors="replace"))  # names need not be UTF-8


def _template_context(report: Report) -> dict[str, Any]:
    """Return the variables of the template."""
    means = report.means
    main_region = next(iter(means), None)
    return {
        "title": report.settings["title"],
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "settings": report.settings,
        "protocol": {key: value for key, value in report.protocol.items() if key != "title"},
        "means": means,
        "means_unseen": report.means_unseen or {},
        "metrics": report.measured_metrics,
        "metric_titles": METRIC_TITLES,
        "main": main_region,
        "published": published_scores(report.protocol),
        "comparison_caveats": comparison_caveats(report.protocol, means),
        "shot_score_titles": SHOT_SCORE_TITLES,
        "has_quality": any(result.matting.quality is not None for result in report.results),
        "card_references": list(map(_make_reference, report.page_images.references_with_masks)),
        "problem_kinds": Counter(problem.kind for problem in report.problems),
        "max_listed": MAX_LISTED,
        "max_open": MAX_OPEN,
        "report": report,
        **_image_variables(report, main_region),
    }


def _image_variables(report: Report, region: Region | None) -> dict[str, Any]:
    """Return the variables of the template about single images. They are ranked by their MSE over ``region``."""
    scored = [result for result in report.results if result.evaluation.scores]
    worst_first = sorted(scored, key=lambda result: -_region_mse(result, region)) if region else []
    best = worst_first[::-1][: min(MAX_BEST, len(scored) // 3)]
    worst = worst_first[: min(MAX_WORST, len(scored) - len(best))]
    others = [result for result in report.results if not result.evaluation.scores and result.status != "failed"]
    lowest_quality_first = sorted(others, key=lambda result: result.quality_key)
    return {
        "tables": _breakdown_tables(scored),
        "histograms": [_make_histogram(scored, region, metric) for metric in METRICS] if region else [],
        "worst": (_make_figure(report, result) for result in worst),
        "best": (_make_figure(report, result) for result in best),
        "cards": [] if scored else [_make_card(report, result) for result in report.by_quality[:MAX_UNSCORED]],
        "rows": [*report.failures, *worst_first, *lowest_quality_first][:MAX_TABLE_ROWS],
    }


def _region_mse(result: ImageResult, region: Region) -> float:
    """Return the MSE of a result over a region, 0 if it has none."""
    scores = result.evaluation.scores.get(region)
    return scores.mse if scores else 0.0


def _breakdown_tables(scored: Sequence[ImageResult]) -> dict[str, dict[str, dict[Region, Means]]]:
    """Return a table of means for each kind of category and for the groups, without tables of a single row."""

    def category_table(kind: str) -> dict[str, dict[Region, Means]]:
        return compute_means_by(scored, lambda result: result.categories.get(kind))

    kinds = sorted({kind for result in scored for kind in result.categories})
    tables = {kind: category_table(kind) for kind in kinds}
    tables["group"] = compute_means_by(scored, lambda result: result.group)
    return {name: rows for name, rows in tables.items() if len(rows) > 1}


def _make_histogram(scored: Sequence[ImageResult], region: Region, metric: str) -> dict[str, Any]:
    """Return the histogram of a metric over the images, on a logarithmic axis."""
    scores = [result.evaluation.scores[region] for result in scored if region in result.evaluation.scores]
    values = [getattr(image_scores, metric) for image_scores in scores]
    largest = max(values) or 1.0
    logarithms = np.log10(np.maximum(values, largest * 10.0**-HISTOGRAM_DECADES))
    lowest, highest = float(np.floor(logarithms.min())), float(np.ceil(logarithms.max() + 1e-9))
    highest = max(highest, lowest + 1)
    counts, _ = np.histogram(logarithms, HISTOGRAM_BINS, (lowest, highest))
    return {"metric": METRIC_TITLES[metric], "counts": counts.tolist(), "lowest": 10**lowest, "highest": 10**highest}


def _make_figure(report: Report, result: ImageResult) -> dict[str, Any]:
    """Return the images of a result as data URIs, None if there is nothing to show or a file cannot be read."""
    images = report.page_images
    alpha, truth = read_alpha_or_none(result.output), read_alpha_or_none(result.truth)
    if alpha is not None and truth is not None and alpha.shape != truth.shape:
        alpha = np.asarray(cv2.resize(alpha, truth.shape[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)
    references = list(map(_make_reference, images.references_with_masks))
    for reference, mask_path in images.references.get((result.round, result.group), ()):
        rgb, mask_u8 = images.read_preview(reference), read_alpha_or_none(str(mask_path))
        if rgb is not None and mask_u8 is not None:
            references.append((_encode_data_uri(_tint_object(rgb, mask_u8)), REFERENCE_CAPTION))
    return {
        "result": result,
        "source": _encode_data_uri(images.read_source(result)),
        "references": references,
        "alpha": _encode_data_uri(alpha),
        "truth": _encode_data_uri(truth),
        "error": _encode_data_uri(_error_map(alpha, truth)),
    }


def _make_reference(reference: tuple[ImageU8, NDArray[np.bool_], str]) -> tuple[str | None, str]:
    """Return an image with its mask as a data URI, and its caption."""
    rgb, mask, caption = reference
    return _encode_data_uri(_tint_object(rgb, np.asarray(mask * 255, np.uint8))), caption


def _make_card(report: Report, result: ImageResult) -> dict[str, Any]:
    """Return source, alpha and object on magenta as data URIs, None if a file cannot be read."""
    source, alpha = report.page_images.read_source(result), read_alpha_or_none(result.output)
    cut_out = None
    if source is not None and alpha is not None:
        cut_out = composite_on_backdrop(source, resize(alpha, source.shape[:2]))
    images = {"source": source, "alpha": alpha, "cut_out": cut_out}
    return {"result": result} | {name: _encode_data_uri(image, CARD_PX) for name, image in images.items()}


def _make_link(folder: Path, path: str) -> str:
    """Return the address of a file relative to the folder of the page, "" if it does not exist."""
    return urllib.parse.quote(os.fsencode(os.path.relpath(path, folder))) if is_file(path) else ""


def _error_map(alpha: ImageU8 | None, truth: ImageU8 | None) -> ImageU8 | None:
    """Return the absolute error as colours from black (0) to yellow (1), uint8 [H,W,3]."""
    if alpha is None or truth is None:
        return None
    error = shrink_image(np.asarray(cv2.absdiff(alpha, truth), np.uint8), PREVIEW_PX)
    return np.asarray(cv2.cvtColor(cv2.applyColorMap(error, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB), np.uint8)


def _tint_object(rgb: ImageU8, mask: ImageU8) -> ImageU8:
    """Tint the object of a reference, and darken the rest."""
    rgb = shrink_image(rgb, PREVIEW_PX)
    weight = resize(mask, rgb.shape[:2])[..., None] / 255.0
    inside, outside = 0.6 * rgb + 0.4 * np.array(MASK_TINT), 0.45 * rgb
    return np.asarray(inside * weight + outside * (1 - weight), np.uint8)


def _encode_data_uri(image: ImageU8 | None, long_side_px: int = PREVIEW_PX) -> str | None:
    if image is None:
        return None
    data = io.BytesIO()
    Image.fromarray(shrink_image(image, long_side_px)).save(data, format="WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
