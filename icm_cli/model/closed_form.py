"""Closed-form matting: from a trimap to an alpha (Levin, Lischinski & Weiss, TPAMI 2008), solved by pymatting."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray

from icm_cli.files import cache_folder

RELATIVE_TOLERANCE = 1e-4
"""Residual at which the conjugate gradient stops; a hundredth of a step of an 8-bit alpha needs no more."""


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
