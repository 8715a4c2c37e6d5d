"""Edges by closed-form matting: the coarse alpha's trimap, solved (Levin, Lischinski & Weiss, TPAMI 2008)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from icm_cli.errors import ConfigError
from icm_cli.geometry import Float, ImageU8, resize, within
from icm_cli.guided_filter import guided_upsample
from icm_cli.model.closed_form import solve_alpha
from icm_cli.model.contracts import Edges
from icm_cli.model.trimaps import trimap_of_coarse


@dataclass(frozen=True)
class ClosedFormConfig:
    """Settings of the closed-form edges."""

    band: float = 0.015
    """Width of the unknown on either side of the coarse edge, as a share of the picture's long side; 0 to 0.5."""
    solve_long_side_px: int = 1024
    """Long side at which it is solved, at most; a guided filter takes the alpha from there to the source's size."""

    def __post_init__(self) -> None:
        if not 0 < self.band < 0.5:
            raise ConfigError(f"edges band is {self.band}; expected above 0 and below 0.5")
        if self.solve_long_side_px < 64:
            raise ConfigError(f"edges solve_long_side_px is {self.solve_long_side_px}; expected at least 64")


class ClosedForm(Edges):
    """No weights: a sparse linear system a picture, on the CPU."""

    Config = ClosedFormConfig
    is_trained = False

    def __init__(self, config: ClosedFormConfig) -> None:
        super().__init__()
        self.config = config

    def refined(self, rgb: ImageU8, coarse: Float) -> Float:
        height, width = rgb.shape[:2]
        size = within((height, width), self.config.solve_long_side_px)
        small, trimap = resize(rgb, size), trimap_of_coarse(coarse, size, self.config.band)
        alpha = np.clip(solve_alpha(small / 255.0, trimap.astype(np.float64)), 0.0, 1.0).astype(np.float32)
        return alpha if size == (height, width) else guided_upsample(alpha, rgb)


REGISTERED = ClosedForm
