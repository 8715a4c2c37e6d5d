"""The numbers that papers print, to stand beside ours, and what one must know to compare them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from icm_cli.reports.means import Means
from icm_cli.reports.result import Region


@dataclass(frozen=True)
class PublishedRow:
    """One method on one dataset; a metric the paper does not give is None. SAD, GRAD and CONN as printed."""

    method: str
    mse: float
    sad: float
    grad: float | None = None
    conn: float | None = None
    note: str = ""


PUBLISHED: dict[str, tuple[PublishedRow, ...]] = {
    "ICM-57": (
        PublishedRow("ICM", 0.0081, 19.12, 18.65, 11.21, "one mask per group"),
        PublishedRow("ICM, 1 reference", 0.0085, 19.58, note="study of the number of references"),
        PublishedRow("ICM, 2 references", 0.0075, 16.57, note="study of the number of references"),
        PublishedRow("ICM, 3 references", 0.0070, 15.48, note="study of the number of references"),
        PublishedRow("ICM, 4 references", 0.0068, 15.23, note="study of the number of references"),
        PublishedRow(
            "ICM, released checkpoint", 0.0082, 10.64, 11.95, 6.40, "768 crops, whole image; measured by others"
        ),
        PublishedRow("ICM without intra-similarity", 0.0099, 24.15, note="ablation"),
        PublishedRow("ICM without both similarities", 0.0315, 40.32, note="ablation"),
        PublishedRow("SegGPT", 0.0198, 38.81, 28.61, 18.61, "one mask per group"),
        PublishedRow("SEEM", 0.0292, 64.28, 37.54, 23.64, "one mask per group"),
        PublishedRow("ViTMatte", 0.0030, 16.16, 14.28, 11.14, "a trimap per image"),
    ),
    "AIM-500": (
        PublishedRow("ICM", 0.0062, 18.65, 15.51, 10.98, "one mask per group"),
        PublishedRow("SegGPT", 0.0391, 42.65, 41.95, 26.69, "one mask per group"),
        PublishedRow("SEEM", 0.0425, 114.23, 74.51, 74.32, "one mask per group"),
        PublishedRow("ViTMatte", 0.0038, 18.79, 14.22, 12.47, "a trimap per image"),
        PublishedRow("SDMatte", 0.0027, 14.53, 16.94, 10.95, "a mask per image (ICCV 2025)"),
    ),
}
"""Published rows by the title of the dataset; from the papers of In-Context Matting (CVPR 2024) and SDMatte."""

FULL_SIZE = {"ICM-57": 232, "AIM-500": 500}
"""Images of these datasets."""
PAPER_LINEAGE = "composition"
"""The lineage of GRAD and CONN that In-Context Matting prints."""


def comparability(protocol: Mapping[str, Any], means: Mapping[Region, Means]) -> list[str]:
    """Sentences on what keeps our numbers from being compared with the published rows; none without such rows.

    ``protocol`` is the report's; of ``means`` the region that comes first is our row.
    """
    title, size, lineage = (str(protocol.get(key, "")) for key in ("title", "size", "lineage"))
    if title not in PUBLISHED or not means:
        return []
    region, ours = next(iter(means.items()))
    notes = ["The papers do not publish which references they drew; ours are fixed and embedded in this report."]
    if lineage != PAPER_LINEAGE:
        notes.append(
            f"Ours has GRAD and CONN of the {lineage} lineage, In-Context Matting prints the {PAPER_LINEAGE} lineage: "
            f"do not compare these two columns (--lineage {PAPER_LINEAGE} makes them comparable)."
        )
    if size == "square768":
        notes.append(
            "Scored on 768 px centre crops as the released code of In-Context Matting; that code mattes the crop, "
            "icm the whole picture."
        )
    else:
        notes.append(
            f"Scored at size {size}; the released code of In-Context Matting scores 768 px centre crops. SAD, GRAD and "
            "CONN grow with the area, MSE does not."
        )
    if region != "whole":
        notes.append("Our row is over the unknown region; the published rows are of the whole image.")
    scored, full = ours.images // ours.rounds, FULL_SIZE[title]
    if scored < full // 2:
        notes.append(f"Only {scored} of the {full} images were scored.")
    return notes
