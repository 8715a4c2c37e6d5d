"""Alphas of a run that are unlike the others, found from their recorded signals after the run."""

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
"""Smallest number of images with an object in a folder that are compared with each other."""
MAX_DEVIATION = 3.5
"""Largest distance from the median that is usual, in robust standard deviations."""
MIN_STD = {"size": 0.4, "shape": 0.2, "colour": 8.0}
"""Smallest robust standard deviation: of the logarithms of size and aspect ratio, and of colours in CIELAB."""
MAX_AREA_RATIO = 1.5
"""Largest usual ratio of the areas of the object in consecutive frames."""
MIN_BOX_IOU = 0.5
"""Smallest usual IoU of the boxes of the object in consecutive frames."""
JUMP_FACTOR = 4.0
"""A jump is also larger than the median change from frame to frame in the shot, by this factor."""
SMALL_AREA = 0.005
"""Fraction of the frame that is added to areas before their ratio is taken."""
BOX = ("left", "top", "right", "bottom")
JUMP = "jump from previous frame"

Signals = Mapping[str, float]


def add_batch_reasons(results: Sequence[ImageResult], *, is_shot: bool = False) -> list[ImageResult]:
    """Return the results of a run with further reasons why an alpha may be wrong.

    Alphas are compared with those of the same folder: in size, colour and aspect ratio of the object. Alphas of a shot
    (``is_shot``), sorted by frame, are compared with that of the previous frame instead. The quality does not change.
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
    """Return the reasons of each image of a folder."""
    reasons: list[list[str]] = [[] for _ in images]
    for name, measure in _MEASURES.items():
        values = {index: value for index, signals in enumerate(images) if (value := measure(signals)) is not None}
        for index, distance in zip(values, _distances(list(values.values()), MIN_STD[name]), strict=True):
            if distance > MAX_DEVIATION:
                reasons[index].append(f"{name} unlike the others")
    return reasons


def _distances(values: Sequence[Sequence[float]], min_std: float) -> NDArray[Any]:
    """Return the distances of vectors from their median, in robust standard deviations."""
    if len(values) < MIN_IMAGES:
        return np.zeros(len(values))
    distances = np.linalg.norm(np.subtract(values, np.median(values, axis=0)), axis=1)
    return distances / max(min_std, 1.4826 * float(np.median(distances)))


def _object_size(signals: Signals) -> list[float] | None:
    return [math.log(signals["foreground"])] if "left" in signals and signals.get("foreground", 0) > 0 else None


def _object_shape(signals: Signals) -> list[float] | None:
    if not {*BOX, "aspect_ratio"} <= signals.keys():
        return None
    width, height = signals["right"] - signals["left"], signals["bottom"] - signals["top"]
    return (
        [math.log(width * signals["aspect_ratio"] / height)]
        if min(width, height, signals["aspect_ratio"]) > 0
        else None
    )


def _object_colour(signals: Signals) -> list[float] | None:
    """Return the mean colour of the object, with half of the lightness, which depends on the light."""
    if not {"lightness", "green_red", "blue_yellow"} <= signals.keys():
        return None
    return [signals["lightness"] / 2, signals["green_red"], signals["blue_yellow"]]


_MEASURES: dict[str, Callable[[Signals], list[float] | None]] = {
    "size": _object_size,
    "shape": _object_shape,
    "colour": _object_colour,
}


def _find_jumps(frames: Sequence[Signals]) -> list[list[str]]:
    """Return the reasons of each frame of a shot.

    A frame that continues from the last one without a jump has none, although the frame between them is a jump.
    """
    changes = np.array([_frame_change(one, other) for one, other in pairwise(frames)] or [np.zeros(3)])
    limits = np.maximum(
        (0, MAX_AREA_RATIO - 1, 1 - MIN_BOX_IOU), np.median(changes, axis=0) * (JUMP_FACTOR, 0, JUMP_FACTOR)
    )
    reasons: list[list[str]] = [[] for _ in frames]
    usual = frames[0]

    def is_jump(one: Signals, other: Signals) -> bool:
        is_large, is_large_ratio, is_far = _frame_change(one, other) > limits
        return bool((is_large and is_large_ratio) or is_far)

    for index, (previous, frame) in enumerate(pairwise(frames), 1):
        if is_jump(previous, frame) and is_jump(usual, frame):
            reasons[index].append(JUMP)
        else:
            usual = frame
    return reasons


def _frame_change(one: Signals, other: Signals) -> NDArray[Any]:
    """Return the change of the area, the ratio of the larger area to the smaller one minus 1, and 1 - IoU of the boxes
    of the object in two frames."""
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
