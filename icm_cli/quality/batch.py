"""Find the outliers of a run after all its alphas are computed, from their signals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
        found = find_reasons([results[index].matting.signals for index in indices])
        for index, reasons in zip(indices, found, strict=True):
            matting = completed[index].matting
            completed[index] = replace(results[index], matting=replace(matting, reasons=(*matting.reasons, *reasons)))
    return completed


def _find_outliers(images: Sequence[Signals]) -> list[list[str]]:
    """Return the reasons for each image of a folder: those of its measurements that are far from the median."""
    reasons: list[list[str]] = [[] for _ in images]
    for name, measure in _MEASURES.items():
        values = {index: value for index, signals in enumerate(images) if (value := measure(signals)) is not None}
        for index, distance in zip(values, _distances(list(values.values()), MIN_STD[name]), strict=True):
            if distance > MAX_DISTANCE_STD:
                reasons[index].append(f"{name} unlike the others")
    return reasons


def _distances(values: Sequence[Sequence[float]], min_std: float) -> NDArray[Any]:
    """Return the distances of vectors from their median, in robust standard deviations."""
    if len(values) < MIN_IMAGES:
        return np.zeros(len(values))
    distances = np.linalg.norm(np.subtract(values, np.median(values, axis=0)), axis=1)
    return distances / max(min_std, 1.4826 * float(np.median(distances)))  # MAD as a standard deviation


def _object_size(signals: Signals) -> list[float] | None:
    """Return the logarithm of the object's fraction of the image; None for an empty alpha."""
    return [math.log(signals["foreground"])] if "left" in signals and signals.get("foreground", 0) > 0 else None


def _object_shape(signals: Signals) -> list[float] | None:
    """Return the logarithm of width / height of the object's bounding box, in pixels; None for an empty alpha."""
    if not {*BOX, "aspect_ratio"} <= signals.keys():
        return None
    width, height = signals["right"] - signals["left"], signals["bottom"] - signals["top"]
    return (
        [math.log(width * signals["aspect_ratio"] / height)]
        if min(width, height, signals["aspect_ratio"]) > 0
        else None
    )


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
    changes = np.array([_frame_change(one, other) for one, other in pairwise(frames)] or [np.zeros(3)])
    limits = np.maximum(
        (0, MAX_AREA_RATIO - 1, 1 - MIN_BOX_IOU), np.median(changes, axis=0) * (JUMP_FACTOR, 0, JUMP_FACTOR)
    )
    reasons: list[list[str]] = [[] for _ in frames]
    last_steady = frames[0]

    def is_jump(one: Signals, other: Signals) -> bool:
        is_area_large, is_ratio_large, is_moved = _frame_change(one, other) > limits
        return bool((is_area_large and is_ratio_large) or is_moved)

    for index, (previous, frame) in enumerate(pairwise(frames), 1):
        if is_jump(previous, frame) and is_jump(last_steady, frame):
            reasons[index].append(JUMP)
        else:
            last_steady = frame
    return reasons


def _frame_change(one: Signals, other: Signals) -> NDArray[Any]:
    """Return three measures of how much the object differs between two frames, [3].

    They are the difference of its areas (fractions of the frame), the ratio of the larger area to the smaller one
    minus 1, and 1 - IoU of its bounding boxes. All are 0 for equal frames.
    """
    small, large = sorted(max(0.0, signals.get("foreground", 0.0)) for signals in (one, other))
    distance = 0.0
    if set(BOX) <= one.keys() and set(BOX) <= other.keys():
        distance = 1 - _box_iou([one[name] for name in BOX], [other[name] for name in BOX])
    return np.array([large - small, (large + SMALL_AREA) / (small + SMALL_AREA) - 1, distance])


def _box_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the IoU of two boxes (left, top, right, bottom)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    total = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    return shared / total if total > 0 else 1.0
