"""Closed-form matting: from a trimap to an alpha (Levin, Lischinski & Weiss, TPAMI 2008), solved by pymatting."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray

from icm_cli.errors import ConfigError
from icm_cli.files import cache_folder
from icm_cli.geometry import Float, ImageU8, downscaled_size, resize, trimap_of_coarse
from icm_cli.guided_filter import guided_upsample
from icm_cli.model.contracts import Edges

RELATIVE_TOLERANCE = 1e-4
"""Residual at which the conjugate gradient stops; a hundredth of a step of an 8-bit alpha needs no more."""


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
        size = downscaled_size((height, width), self.config.solve_long_side_px)
        small, trimap = resize(rgb, size), trimap_of_coarse(coarse, size, self.config.band)
        alpha = np.clip(solve_alpha(small / 255.0, trimap.astype(np.float64)), 0.0, 1.0).astype(np.float32)
        return alpha if size == (height, width) else guided_upsample(alpha, rgb)


def solve_alpha(rgb: NDArray[np.float64], trimap: NDArray[np.float64]) -> NDArray[np.float64]:
    """Alpha [h,w] 0..1 of an sRGB image [h,w,3] 0..1 under a trimap [h,w]: 0 background, 1 foreground, else unknown.

    Where one side is missing there is nothing to solve: everything unknown belongs to the side there is. Without
    unknown pixels the trimap is the alpha.
    """
    if not (trimap == 1).any():
        return np.zeros_like(trimap)
    if not (trimap == 0).any():
        return np.ones_like(trimap)
    if not ((trimap > 0) & (trimap < 1)).any():
        return trimap
    estimate_alpha_cf = load_solver()
    with contextlib.redirect_stdout(io.StringIO()):
        alpha: NDArray[np.float64] = estimate_alpha_cf(rgb, trimap, cg_kwargs={"rtol": RELATIVE_TOLERANCE})
    return alpha


def load_solver() -> Callable[..., NDArray[np.float64]]:
    """Import pymatting: two seconds, and 40 in the first run on a machine, which compiles.

    What it compiles is kept where the user can write; numba reads the place at its import.
    """
    solver: Callable[..., NDArray[np.float64]] = _pymatting().estimate_alpha_cf
    return solver


def load_foreground_estimator() -> Callable[..., NDArray[np.float64]]:
    """As :func:`load_solver`: from an image [h,w,3] and its alpha [h,w], both 0..1, to colours [h,w,3] 0..1."""
    estimator: Callable[..., NDArray[np.float64]] = _pymatting().estimate_foreground_ml
    return estimator


def _pymatting() -> ModuleType:
    """Import the estimator, which would set the threads of all that use OpenMP, torch too, to the number of cores."""
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_folder() / "numba"))
    threads = torch.get_num_threads()
    with contextlib.redirect_stdout(io.StringIO()):
        import pymatting
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    module: ModuleType = pymatting
    return module
