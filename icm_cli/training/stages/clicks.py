"""Simulated clicks: where a person would click to correct an alpha.

As in interactive segmentation (Sofiiuk et al., "Reviving Iterative Training with Mask Guidance for Interactive
Segmentation", ICIP 2022), the next click is in the largest error of the current alpha.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from icm_cli.geometry import distance_inside
from icm_cli.training.settings import ClickConfig

Mask: TypeAlias = NDArray[np.bool_]
CORRUPTION_CELLS = (2, 12)
"""Smallest and largest number of independent regions of a corruption, along a side."""
BOX_JITTER = 0.05
"""Standard deviation of a box's corner, as a fraction of its sides."""


@dataclass(frozen=True)
class Click:
    """A click on a mask [H,W]."""

    row: int
    column: int
    label: int
    """1 on the object, 0 off it; see :class:`~icm_cli.model.contracts.PointPrompts`."""


def click_on_largest_error(predicted: Mask, truth: Mask) -> Click | None:
    """Return a click at the centre of the largest connected error; None if there is no error.

    An error is a missing part of the object, or background that is in the mask. Its centre is the point farthest from
    its border.
    """
    missing, excess = _largest_region(truth & ~predicted), _largest_region(predicted & ~truth)
    label = 1 if missing.sum() >= excess.sum() else 0
    largest = missing if label else excess
    if not largest.any():
        return None
    row, column = np.unravel_index(int(_distance_to_border(largest).argmax()), largest.shape)
    return Click(int(row), int(column), label)


def _largest_region(mask: Mask) -> Mask:
    """Return the largest connected region of a mask; empty if the mask is."""
    _, regions, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = statistics[1:, cv2.CC_STAT_AREA]  # region 0 is outside the mask
    return regions == 1 + int(areas.argmax()) if len(areas) else np.zeros_like(mask)


def draw_click(predicted: Mask, truth: Mask, config: ClickConfig, rng: np.random.Generator) -> Click:
    """Draw a click that corrects an error of a mask, or, less often, one anywhere on the object or the background."""
    errors = predicted != truth
    if not errors.any() or rng.random() < config.redundant_probability:
        is_on_object = bool(truth.all()) or (bool(truth.any()) and rng.random() < 0.5)
        return _draw_in_area(truth == is_on_object, truth, rng)
    click = click_on_largest_error(predicted, truth) if rng.random() < config.centre_probability else None
    if click is None:
        click = _draw_in_area(errors, truth, rng)
    row_offset, column_offset = rng.normal(0.0, config.jitter * max(truth.shape), 2)
    row = int(np.clip(round(click.row + row_offset), 0, truth.shape[0] - 1))
    column = int(np.clip(round(click.column + column_offset), 0, truth.shape[1] - 1))
    stays_in_error = bool(errors[row, column]) and bool(truth[row, column]) == bool(click.label)
    if stays_in_error or rng.random() < config.miss_probability:  # people miss errors that are close to an edge
        return Click(row, column, click.label)
    return click


def draw_box(truth: Mask, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Draw a box around an object: left, top, right and bottom, as fractions of the mask's sides."""
    left, right = _draw_box_side(np.asarray(truth.any(axis=0)), rng)
    top, bottom = _draw_box_side(np.asarray(truth.any(axis=1)), rng)
    return left, top, right, bottom


def _draw_box_side(is_covered: NDArray[np.bool_], rng: np.random.Generator) -> tuple[float, float]:
    """Draw start and end of a box along an axis, as fractions. ``is_covered``, [N]: where the object is.

    Without an object, the box extends over the whole axis.
    """
    length, indices = len(is_covered), np.flatnonzero(is_covered)
    start, end = (int(indices[0]), int(indices[-1]) + 1) if len(indices) else (0, length)
    jitter = rng.normal(0.0, BOX_JITTER * (end - start), 2)
    low, high = sorted(np.clip((start + jitter[0], end + jitter[1]), 0, length) / length)
    return float(low), float(high)


def corrupt_alpha(alpha: Tensor, config: ClickConfig, rng: np.random.Generator) -> Tensor:
    """Return an alpha [H,W] in 0..1 to which smooth random regions were added, and from which others were removed."""
    cells = int(rng.integers(CORRUPTION_CELLS[0], CORRUPTION_CELLS[1] + 1))
    noise = torch.from_numpy(rng.standard_normal((1, 1, cells, cells), np.float32)).to(alpha.device)
    noise = F.interpolate(noise, alpha.shape, mode="bicubic", align_corners=False)[0, 0]
    strength = rng.uniform(0.0, config.corruption_logit)
    return torch.sigmoid(torch.logit(alpha.float(), eps=0.01) + strength * noise)


def select_truth(
    truth: Tensor, every_alpha: Tensor, layout: tuple[int, int], config: ClickConfig, rng: np.random.Generator
) -> tuple[Tensor, bool]:
    """Return the alpha of the object that the clicks select in a mosaic, and whether it is not the reference's object.

    ``truth`` [H,W] is that of the reference's object; ``every_alpha`` shows the objects of all tiles. ``layout``: rows
    and columns of the mosaic. An object in another tile is drawn sometimes, and always if the mosaic does not show the
    reference's object.
    """
    rows, columns = layout
    height, width = truth.shape[0] // rows, truth.shape[1] // columns
    tiles = [
        (slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
        for row in range(rows)
        for column in range(columns)
    ]
    others = [tile for tile in tiles if every_alpha[tile].max() > 0.5 and truth[tile].max() <= 0.5]
    if not others:
        return truth, False
    shows_reference = bool(truth.max() > 0.5)
    if shows_reference and rng.random() >= config.other_object_probability:
        return truth, False
    tile = others[int(rng.integers(len(others)))]
    selected = torch.zeros_like(truth)
    selected[tile] = every_alpha[tile]
    return selected, True


def _draw_in_area(area: Mask, truth: Mask, rng: np.random.Generator) -> Click:
    """Draw a click in an area, more probably far from its border."""
    distance = _distance_to_border(area).ravel().astype(np.float64)
    index = int(rng.choice(len(distance), p=distance / distance.sum()))
    row, column = np.unravel_index(index, area.shape)
    return Click(int(row), int(column), int(truth[row, column]))


def _distance_to_border(area: Mask) -> NDArray[np.float32]:
    """Return the distance of each pixel of an area to the nearest pixel outside it or outside the image."""
    return distance_inside(np.pad(area, 1))[1:-1, 1:-1]
