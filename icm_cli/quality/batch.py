"""Find the outliers of a run after all its alphas are computed, from their signals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icm_cli.reports.result import ImageResult

MIN_IMAGES = 8
"""Images of a folder are compared with each other only if at least this many show an object."""
MAX_DISTANCE_STD = 3.5
"""Distance from the median, in robust standard deviations, beyond which an image is an outlier."""
MIN_STD = {"size": 0.4, "shape": 0.2, "colour": 8.0}
"""Lower limits of the robust standard deviations of log(size), log(width / height) and colour in CIELAB.

Without them, small differences would be outliers in a folder of nearly equal images.
"""
MAX_AREA_RATIO = 1.5
"""Ratio of the areas of the object in consecutive frames above which its area jumps."""
MIN_BOX_IOU = 0.5
"""IoU of the bounding boxes of the object in consecutive frames below which its position jumps."""
JUMP_FACTOR = 4.0
"""A jump is also at least this many times the median change between consecutive frames of the shot."""
SMALL_AREA = 0.005
"""Fraction of the frame that is added to both areas before their ratio is taken, so that tiny areas do not jump."""
BOX = ("left", "top", "right", "bottom")
JUMP = "jump from previous frame"

Signals = Mapping[str, float]


def add_batch_reasons(results: Sequence[ImageResult], *, is_shot: bool = False) -> list[ImageResult]:
    """Return results with further reasons why an alpha may be wrong, such as "size unlike the others".

    The object of each alpha is compared with the other objects of the folder in size, colour and aspect ratio. With
    ``is_shot``, alphas must be sorted by frame, and each is compared with the previous one instead. The quality stays.
    """
    groups: dict[tuple[Path, str], list[int]] = {}
    for index, result in enumerate(results):
        if result.has_alpha and result.matting.signals:
            name = Path(result.name)
            shot = re.sub("[0-9]+$", "", name.stem) if is_shot else ""
            groups.setdefault((name.parent, shot), []).append(index)
    completed = list(results)
    find_reasons = _find_jumps if is_shot else _find_outliers
    for indices in groups.values():
        reasons_of_images = find_reasons([results[index].matting.signals for index in indices])
        for index, reasons in zip(indices, reasons_of_images, strict=True):
            matting = results[index].matting
            matting = replace(matting, reasons=(*matting.reasons, *reasons))
            completed[index] = replace(results[index], matting=matting)
    return completed


def _find_outliers(images: Sequence[Signals]) -> list[list[str]]:
    """Return the reasons for each image of a folder: those of its measurements that are far from the median."""
    reasons: list[list[str]] = [[] for _ in images]
    for name, measure in _MEASURES.items():
        measured = [measure(signals) for signals in images]
        values = {index: value for index, value in enumerate(measured) if value is not None}
        distances = _distances_from_median(list(values.values()), MIN_STD[name])
        for index, distance in zip(values, distances, strict=True):
            if distance > MAX_DISTANCE_STD:
                reasons[index].append(f"{name} unlike the others")
    return reasons


def _distances_from_median(values: Sequence[Sequence[float]], min_std: float) -> NDArray[Any]:
    """Return the distances of N vectors from their median, in robust standard deviations, [N].

    They are 0 if there are fewer than MIN_IMAGES vectors.
    """
    if len(values) < MIN_IMAGES:
        return np.zeros(len(values))
    distances = np.linalg.norm(np.subtract(values, np.median(values, axis=0)), axis=1)
    robust_std = 1.4826 * float(np.median(distances))  # median absolute deviation -> standard deviation
    return distances / max(min_std, robust_std)


def _object_size(signals: Signals) -> list[float] | None:
    """Return the logarithm of the object's fraction of the image; None for an empty alpha."""
    is_empty = "left" not in signals or signals.get("foreground", 0) <= 0
    return None if is_empty else [math.log(signals["foreground"])]


def _object_shape(signals: Signals) -> list[float] | None:
    """Return the logarithm of width / height of the object's bounding box, in pixels; None for an empty alpha."""
    if not {*BOX, "aspect_ratio"} <= signals.keys():
        return None
    width, height = signals["right"] - signals["left"], signals["bottom"] - signals["top"]
    aspect_ratio = signals["aspect_ratio"]  # of the image, because the box is given in fractions of its sides
    if min(width, height, aspect_ratio) <= 0:
        return None
    return [math.log(width * aspect_ratio / height)]


def _object_colour(signals: Signals) -> list[float] | None:
    """Return the mean colour of the object in CIELAB; None for an empty alpha.

    The lightness is halved, because it also changes with the light.
    """
    if not {"lightness", "green_red", "blue_yellow"} <= signals.keys():
        return None
    return [signals["lightness"] / 2, signals["green_red"], signals["blue_yellow"]]


_MEASURES: dict[str, Callable[[Signals], list[float] | None]] = {
    "size": _object_size,
    "shape": _object_shape,
    "colour": _object_colour,
}


def _find_jumps(frames: Sequence[Signals]) -> list[list[str]]:
    """Return the reasons for each frame of a shot.

    A frame is a jump if it differs from the previous frame and from the last frame that was not a jump. So if one frame
    is wrong, the frame after it is not a jump too.
    """
    reasons: list[list[str]] = [[] for _ in frames]
    if len(frames) < 2:
        return reasons
    changes = [_measure_change(previous, frame) for previous, frame in pairwise(frames)]
    max_area = JUMP_FACTOR * float(np.median([change.area for change in changes]))
    max_distance = max(1 - MIN_BOX_IOU, JUMP_FACTOR * float(np.median([change.box_distance for change in changes])))

    def is_jump(change: _Change) -> bool:
        is_area_jump = change.area > max_area and change.area_ratio > MAX_AREA_RATIO
        return is_area_jump or change.box_distance > max_distance

    last_steady = frames[0]
    for index, change in enumerate(changes, 1):
        if is_jump(change) and is_jump(_measure_change(last_steady, frames[index])):
            reasons[index].append(JUMP)
        else:
            last_steady = frames[index]
    return reasons


@dataclass(frozen=True)
class _Change:
    """How much the object differs between two frames."""

    area: float
    """Difference of its areas, as a fraction of the frame."""
    area_ratio: float
    """Ratio of the larger area to the smaller one; SMALL_AREA is added to both."""
    box_distance: float
    """1 - IoU of its bounding boxes; 0 if a frame has no box."""


def _measure_change(first: Signals, second: Signals) -> _Change:
    small, large = sorted(max(0.0, signals.get("foreground", 0.0)) for signals in (first, second))
    box_distance = 0.0
    if set(BOX) <= first.keys() and set(BOX) <= second.keys():
        box_distance = 1 - _box_iou([first[name] for name in BOX], [second[name] for name in BOX])
    return _Change(large - small, (large + SMALL_AREA) / (small + SMALL_AREA), box_distance)


def _box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the IoU of two boxes (left, top, right, bottom); 1 if both are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    intersection = max(0.0, width) * max(0.0, height)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - intersection
    return intersection / union if union > 0 else 1.0
