"""``--match same``: of the objects in an alpha, only those that look like the object of the references are kept."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from icm_cli.config import MatchConfig
from icm_cli.geometry import Float, resize
from icm_cli.guidance.hints import Area, Hints
from icm_cli.matting.hinting import find_cell
from icm_cli.model.contracts import ObjectTokens


def keep_same_objects(
    alpha: Tensor, tokens: ObjectTokens, content: tuple[int, int], config: MatchConfig, hints: Hints | None = None
) -> tuple[Tensor, float | None]:
    """Set an alpha, float32 [h,w] in 0..1, to 0 where it shows other objects than that of the references.

    An object is a connected region of foreground. Regions smaller than a token belong to the nearest larger one. An
    object is kept if hints mark it, or if all of these conditions are met:

    - It is a candidate: more similar to a reference than to every negative reference.
    - Its similarity to the references is at least ``min_similarity``.
    - Its similarity is at most ``max_difference`` below the largest similarity of a candidate.

    ``content``: height and width of the frame on the canvas, in px.

    Returns the alpha and the largest similarity of a candidate; without candidates, that of any object; None without
    foreground.
    """
    values: Float = alpha.numpy(force=True)
    foreground = values > 0.5
    owners = _nearest_objects(foreground, values.size * tokens.cell_px**2 / (content[0] * content[1]))
    if owners is None:
        return alpha, None
    similarities = {  # of each object: to the references, and to the negative references
        int(number): tokens.compare_object(alpha * torch.from_numpy(owners == number).to(alpha), content)
        for number in np.unique(owners[foreground])
    }
    of_candidates = [similarity for similarity, to_negatives in similarities.values() if similarity > to_negatives]
    largest = max(of_candidates or [similarity for similarity, _ in similarities.values()])
    smallest_kept = max(config.min_similarity, largest - config.max_difference)

    def is_kept(number: int) -> bool:
        similarity, to_negatives = similarities[number]
        if similarity > to_negatives and similarity >= smallest_kept:
            return True
        return hints is not None and _has_mark(foreground & (owners == number), hints)

    kept = list(filter(is_kept, similarities))
    return alpha * torch.from_numpy(np.isin(owners, kept)).to(alpha), largest


def _has_mark(mask: Area, hints: Hints) -> bool:
    """Return whether hints mark the object in ``mask``, bool [h,w], by a point or area on it, or a box around it."""
    if any(mask[find_cell(point, hints.size, mask.shape)] for point in hints.points):
        return True
    for marked in (hints.object_area, hints.keep):
        if marked is not None and (mask & (resize(marked.astype(np.float32), mask.shape) > 0)).any():
            return True
    rows, columns = np.nonzero(mask)
    y, x = rows * hints.size[0] / mask.shape[0], columns * hints.size[1] / mask.shape[1]
    return any(np.mean((x >= x0) & (x < x1) & (y >= y0) & (y < y1)) > 0.5 for x0, y0, x1, y1 in hints.boxes)


def _nearest_objects(foreground: np.ndarray, min_area: float) -> np.ndarray | None:
    """Return the number of the object that is nearest to each pixel, int32 [h,w]; None without foreground.

    Objects are the connected regions of ``foreground``, bool [h,w], with at least ``min_area`` pixels; if there are
    none, the largest region.
    """
    count, labels, statistics, _ = cv2.connectedComponentsWithStats(foreground.astype(np.uint8))
    if count == 1:
        return None
    areas = statistics[1:, cv2.CC_STAT_AREA]
    large = 1 + np.flatnonzero(areas >= min(min_area, areas.max()))
    outside = (~np.isin(labels, large)).astype(np.uint8)
    _, owners = cv2.distanceTransformWithLabels(outside, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_CCOMP)
    return np.asarray(owners)
