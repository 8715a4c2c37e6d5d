"""The scores of one image, and the names of metrics and regions."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

Lineage = Literal["composition", "aim"]
Region = Literal["whole", "unknown"]
LINEAGES: tuple[Lineage, ...] = ("composition", "aim")
REGIONS: tuple[Region, ...] = ("whole", "unknown")


@dataclass(frozen=True)
class Scores:
    """The metrics of one image over one region; smaller is better, 0 is identity."""

    mse: float
    """Mean squared difference."""
    sad: float
    """Sum of absolute differences, in thousands."""
    grad: float
    """Sum of squared differences of gradient magnitude, divided as its lineage does."""
    conn: float
    """Sum of differences in connectivity, in thousands."""
    mad: float
    """Mean absolute difference."""


METRICS: tuple[str, ...] = tuple(field.name for field in fields(Scores))
TITLES = {"mse": "MSE", "sad": "SAD", "grad": "GRAD", "conn": "CONN", "mad": "MAD", "dt_ssd": "dtSSD"}
"""Printed names of the metrics."""
