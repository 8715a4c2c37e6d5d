"""Scores published in papers, and differences in protocol that affect a comparison with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from icm_cli.options import Region
from icm_cli.reports.means import Means


@dataclass(frozen=True)
class PublishedScores:
    """Published scores of a method on a dataset, None if the paper does not report them."""

    method: str
    mse: float
    sad: float
    grad: float | None = None
    conn: float | None = None
    note: str = ""


PUBLISHED_SCORES: dict[str, tuple[PublishedScores, ...]] = {
    "ICM-57": (
        PublishedScores("ICM", 0.0081, 19.12, 18.65, 11.21, "one mask per group"),
        PublishedScores("ICM, 1 reference", 0.0085, 19.58, note="study of the number of references"),
        PublishedScores("ICM, 2 references", 0.0075, 16.57, note="study of the number of references"),
        PublishedScores("ICM, 3 references", 0.0070, 15.48, note="study of the number of references"),
        PublishedScores("ICM, 4 references", 0.0068, 15.23, note="study of the number of references"),
        PublishedScores(
            "ICM, released checkpoint", 0.0082, 10.64, 11.95, 6.40, "768 crops, whole image; measured by others"
        ),
        PublishedScores("ICM without intra-similarity", 0.0099, 24.15, note="ablation"),
        PublishedScores("ICM without both similarities", 0.0315, 40.32, note="ablation"),
        PublishedScores("SegGPT", 0.0198, 38.81, 28.61, 18.61, "one mask per group"),
        PublishedScores("SEEM", 0.0292, 64.28, 37.54, 23.64, "one mask per group"),
        PublishedScores("ViTMatte", 0.0030, 16.16, 14.28, 11.14, "a trimap per image"),
    ),
    "AIM-500": (
        PublishedScores("ICM", 0.0062, 18.65, 15.51, 10.98, "one mask per group"),
        PublishedScores("SegGPT", 0.0391, 42.65, 41.95, 26.69, "one mask per group"),
        PublishedScores("SEEM", 0.0425, 114.23, 74.51, 74.32, "one mask per group"),
        PublishedScores("ViTMatte", 0.0038, 18.79, 14.22, 12.47, "a trimap per image"),
        PublishedScores("SDMatte", 0.0027, 14.53, 16.94, 10.95, "a mask per image (ICCV 2025)"),
    ),
}
"""Published scores by dataset title, from the papers In-Context Matting (CVPR 2024) and SDMatte (ICCV 2025)."""

FULL_SIZE = {"ICM-57": 232, "AIM-500": 500}
"""Number of images of the datasets."""
PAPER_VARIANT = "composition"
"""Variant of GRAD and CONN in the paper In-Context Matting."""


def published_scores(protocol: Mapping[str, Any]) -> tuple[PublishedScores, ...]:
    """Return the published scores of the dataset of a protocol, if there are any."""
    return PUBLISHED_SCORES.get(protocol.get("title", ""), ())


def comparison_caveats(protocol: Mapping[str, Any], means: Mapping[Region, Means]) -> list[str]:
    """Return sentences about differences between published scores and the first region of ``means``.

    The result is empty if the dataset has no published scores.
    """
    if not published_scores(protocol) or not means:
        return []
    region, first_means = next(iter(means.items()))
    notes = ["The papers do not publish their references; those of this run are listed in the report."]
    variant, size = protocol["metric_variant"], protocol["size"]
    if variant != PAPER_VARIANT:
        notes.append(
            f"GRAD and CONN are of the {variant} variant, but In-Context Matting uses the {PAPER_VARIANT} variant: do "
            f"not compare these two columns, or give --metric-variant {PAPER_VARIANT}."
        )
    if size == "square768":
        notes.append(
            "Scores are computed on 768 px centre crops, like in the released code of In-Context Matting; that code "
            "mattes the crop, icm mattes the whole image."
        )
    else:
        notes.append(
            f"Scores are computed at size {size}, but the released code of In-Context Matting scores 768 px centre "
            "crops. SAD, GRAD and CONN increase with the area, MSE does not."
        )
    if region != "whole":
        notes.append(
            "The scores of icm are over the unknown region, but the published scores are over the whole image."
        )
    images_per_round = first_means.images // first_means.rounds
    full_size = FULL_SIZE[protocol["title"]]
    if images_per_round < full_size // 2:
        notes.append(f"Only {images_per_round} of the {full_size} images were scored.")
    return notes
