"""Estimate the quality of one alpha from its signals, which :mod:`icm_cli.matting.quality_signals` measures.

``tests/benchmarks/calibrate_quality.py`` fits the weights in ``weights.json`` to alphas of ``lite``. For other models
the estimate is not calibrated, but can still be used to sort alphas.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS_PATH = Path(__file__).with_name("weights.json")
DIGITS = 4
NOTHING_FOUND = "nothing found"
MARKED_BUT_EMPTY = "marked object missing"
"""Reason: a hint marks the object, and the alpha is empty."""
NOT_THE_SAME = "not the same instance"
"""Reason: ``--match same`` removed all objects."""
MAYBE_ANOTHER = "maybe another instance"
"""Reason: the most similar object that ``--match same`` kept has a similarity below SURELY_SAME."""
SURELY_SAME = 0.85
SAME_OFFSET, SAME_SLOPE = -10.19, 14.64
"""Logistic regression of ``tests/benchmarks/calibrate_match.py``."""


@dataclass(frozen=True)
class Estimate:
    """Estimate of the quality of an alpha.

    Attributes:
        quality: Expected IoU with the true alpha, 0..1. For an empty alpha, the probability that the object is absent.
        reasons: Why the alpha may be wrong, such as "low presence"; the most reliable reason first.
    """

    quality: float
    reasons: tuple[str, ...] = ()


def estimate_quality(signals: Mapping[str, float], *, shows_object: bool = False) -> Estimate:
    """Estimate the quality of an alpha from its signals. ``shows_object``: whether a hint marks the object.

    A missing signal counts as its mean over the alphas of the calibration. Signals are missing if the model does not
    have the part that measures them, or if a hint overrides it. Signals are clipped to the range of the calibration.
    """
    weights = _read_weights()
    if "largest_component" not in signals:
        return Estimate(0.0, (MARKED_BUT_EMPTY,)) if shows_object else _estimate_empty(signals)
    similarity = signals.get("object_similarity")  # only with --match same
    quality = _predict(weights["shown"], signals)
    reasons = [reason for reason, threshold in weights["reasons"].items() if _is_beyond(threshold, signals)]
    if similarity is not None:
        quality = round(quality * _same_probability(similarity), DIGITS)
        if similarity < SURELY_SAME:
            reasons.insert(0, MAYBE_ANOTHER)
    return Estimate(quality, tuple(reasons))


def _estimate_empty(signals: Mapping[str, float]) -> Estimate:
    """Estimate the quality of an empty alpha: the probability that the image does not show the object."""
    similarity = signals.get("object_similarity")
    # The edges, or a matte, can also make an alpha empty from which --match same removed nothing.
    if similarity is None or signals.get("completed_confidence", 0) > 0:
        return Estimate(_predict(_read_weights()["empty"], signals), (NOTHING_FOUND,))
    return Estimate(round(1 - _same_probability(similarity), DIGITS), (NOTHING_FOUND, NOT_THE_SAME))


def _same_probability(similarity: float) -> float:
    """Return the probability that an object of this similarity is the same instance as that of the reference."""
    return 1 / (1 + math.exp(-(SAME_OFFSET + SAME_SLOPE * similarity)))


def _predict(model: Mapping[str, Any], signals: Mapping[str, float]) -> float:
    """Return the prediction, 0..1, of a logistic regression on standardised signals. ``model``: its weights."""
    logit = model["offset"]
    for name, scale in model["signals"].items():
        if name in signals:
            value = min(max(signals[name], scale["min"]), scale["max"])
            logit += scale["weight"] * (value - scale["mean"]) / scale["std"]
    return round(1 / (1 + math.exp(-logit)), DIGITS)


def _is_beyond(threshold: Mapping[str, Any], signals: Mapping[str, float]) -> bool:
    """Return whether a signal is suspicious: beyond the value ``below`` or ``above`` of its threshold in the weights.

    A missing signal is not suspicious.
    """
    value = signals.get(threshold["signal"])
    if value is None:
        return False
    return value < threshold.get("below", -math.inf) or value > threshold.get("above", math.inf)


@functools.cache
def _read_weights() -> Any:
    return json.loads(WEIGHTS_PATH.read_text(encoding="utf-8"))
