"""How far an alpha is from the ground truth."""

from __future__ import annotations

import numpy as np

from icm_cli.geometry import ImageU8


def mse(alpha: ImageU8, truth: ImageU8) -> float:
    """Mean squared difference of two alphas, uint8 [H,W], over the whole image, on the scale 0..1."""
    return float(np.mean(np.square(_difference(alpha, truth))))


def sad(alpha: ImageU8, truth: ImageU8) -> float:
    """Sum of absolute differences over the whole image, on the scale 0..1, divided by 1000 as the field prints it."""
    return float(np.sum(np.abs(_difference(alpha, truth)))) / 1000.0


def _difference(alpha: ImageU8, truth: ImageU8) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    if alpha.shape != truth.shape:
        raise ValueError(f"alpha is {alpha.shape} and ground truth {truth.shape}; expected one size")
    return (alpha.astype(np.float64) - truth) / 255.0
