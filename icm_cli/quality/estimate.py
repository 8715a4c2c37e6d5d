"""Estimate of the quality of one alpha from its signals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """Estimate of the quality of an alpha.

    Attributes:
        quality: Expected IoU with the truth, 0..1. Of an empty alpha, the probability that the object is absent.
        reasons: What makes the alpha suspicious, from the most to the least important one.
    """

    quality: float
    reasons: tuple[str, ...] = ()


def estimate_quality(signals: Mapping[str, float]) -> Estimate:
    """Estimate the quality of an alpha from its signals; see :mod:`icm_cli.matting.quality_signals`."""
    absent = 1 / (1 + math.exp(min(50.0, signals.get("presence", 50.0))))
    if "largest_component" not in signals:
        return Estimate(round(absent, 4), ("absent?",))
    sum_of_two = signals.get("confidence", 1.0) + signals["largest_component"]
    quality = min(1.0, max(0.0, sum_of_two - 0.9))
    reasons = {
        "low presence": absent > 0.1,
        "passes disagree": signals["coarse_agreement"] < 0.6,
        "split": signals["largest_component"] < 0.8,
        "touches border": signals["border"] > 0.5,
        "soft interior": signals["soft_interior"] > 0.1,
    }
    return Estimate(round(quality, 4), tuple(reason for reason, applies in reasons.items() if applies))
