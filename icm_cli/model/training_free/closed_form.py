"""Closed-form matting of a trimap (Levin, Lischinski & Weiss, TPAMI 2008) with pymatting."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icm_cli.config import GuidedFilterConfig, Section
from icm_cli.files.digests import cache_folder
from icm_cli.geometry import Float, ImageU8, downscaled_size, resize, trimap_from_coarse
from icm_cli.guided_filter import guided_upsample
from icm_cli.images.pixels import DecodedImage
from icm_cli.model.contracts import Edges

RELATIVE_TOLERANCE = 1e-4
"""Relative residual at which the conjugate gradient method stops. It is exact to a hundredth of an 8-bit level."""


@dataclass(frozen=True)
class ClosedFormConfig(Section, title="edges"):
    """Settings of the closed-form edges."""

    band: float = 0.015
    """Width of the unknown region on either side of the coarse edge, as a fraction (0..0.5) of the long side."""
    solve_long_side_px: int = 1024
    """Largest long side at which the alpha is solved, in px. A guided filter enlarges it to the size of the source."""
    guided_filter: GuidedFilterConfig = field(default_factory=GuidedFilterConfig)
    """Settings of that guided filter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("band", 0 < self.band < 0.5, "above 0 and below 0.5")
        self.check("solve_long_side_px", self.solve_long_side_px >= 64, "at least 64")


class ClosedForm(Edges):
    """Edges by closed-form matting: a sparse linear system per image, on the CPU. It has no weights."""

    Config = ClosedFormConfig

    def __init__(self, config: ClosedFormConfig) -> None:
        super().__init__()
        self.config = config

    def refine_alphas(self, images: Sequence[ImageU8], coarse: Sequence[Tensor]) -> list[Tensor]:
        return [
            torch.from_numpy(self._refine_alpha(rgb, alpha.numpy(force=True))).to(alpha.device)
            for rgb, alpha in zip(images, coarse, strict=True)
        ]

    def _refine_alpha(self, rgb: ImageU8, coarse: Float) -> Float:
        """Solve one alpha on the CPU."""
        height, width = rgb.shape[:2]
        size = downscaled_size((height, width), self.config.solve_long_side_px)
        trimap = trimap_from_coarse(coarse, size, self.config.band)
        solved = solve_alpha(resize(rgb, size) / 255.0, trimap.astype(np.float64))
        alpha = np.clip(solved, 0.0, 1.0).astype(np.float32)
        return alpha if size == (height, width) else guided_upsample(alpha, rgb, self.config.guided_filter)


def solve_alpha(rgb: NDArray[np.float64], trimap: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the alpha, float64 [h,w], of an image and its trimap.

    ``rgb``: sRGB float64 [h,w,3] in 0..1. ``trimap``: [h,w], 0 background, 1 foreground, other values unknown. Without
    any foreground, all pixels become background; without any background, all become foreground.
    """
    if not (trimap == 1).any():
        return np.zeros_like(trimap)
    if not (trimap == 0).any():
        return np.ones_like(trimap)
    if not ((trimap > 0) & (trimap < 1)).any():
        return trimap
    solver = load_solver()
    with contextlib.redirect_stdout(io.StringIO()):  # pymatting prints warnings
        return solver(rgb, trimap, cg_kwargs={"rtol": RELATIVE_TOLERANCE})


def load_solver() -> Callable[..., NDArray[np.float64]]:
    """Import pymatting and return its solver.

    This takes 2 s, and 40 s when it is compiled on a machine for the first time. The compiled code is stored in the
    user's cache folder.
    """
    return _import_pymatting().estimate_alpha_cf


def load_foreground_estimator() -> Callable[..., NDArray[np.float64]]:
    """Import pymatting and return its foreground estimator, see :func:`load_solver`.

    It computes colours [h,w,3] from an image [h,w,3] and its alpha [h,w], all in 0..1.
    """
    return _import_pymatting().estimate_foreground_ml


def estimate_foreground(source: DecodedImage, alpha: Float) -> Float:
    """Estimate the foreground colours of a source, given its alpha [H,W] in 0..1.

    The method is multi-level estimation (Germer et al., "Fast Multi-Level Foreground Estimation", ICPR 2020). Where
    alpha is 0, the colours are those of the nearest foreground, so that no compositing operation shows a halo.

    Returns:
        float32 [H,W,3] on the source's scale of 0..1, with HDR values beyond.
    """
    pixels = source.pixels.astype(np.float32) / np.float32(source.scale)
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, axis=-1)
    if alpha.size == 1:  # the estimator divides by the logarithm of the size
        return pixels
    # The estimator clips to 0..1, so values beyond are scaled into this range and back.
    least, largest = min(0.0, float(pixels.min())), max(1.0, float(pixels.max()))
    scaled = (pixels.astype(np.float64) - least) / (largest - least)
    colours = load_foreground_estimator()(scaled, alpha.astype(np.float64))
    return np.asarray(colours * (largest - least) + least, np.float32)


def _import_pymatting() -> ModuleType:
    """Import pymatting, which caches compiled functions, without changing global settings."""
    import numba

    config: Any = numba.config
    threads, previous_folder = torch.get_num_threads(), config.CACHE_DIR
    config.CACHE_DIR = previous_folder or str(cache_folder() / "numba")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import pymatting
    finally:
        config.CACHE_DIR = previous_folder
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
    return pymatting
