"""The field's metrics of alphas against ground truth, exact to their published code.

GRAD and CONN (Rhemann et al., "A Perceptually Motivated Online Benchmark for Image Matting", CVPR 2009) exist in two
lineages whose numbers must not be mixed:

``composition``
    The code of Deep Image Matting, GCA and In-Context Matting. GRAD: derivative-of-Gaussian filter of unit energy,
    divided by 1000. CONN: the largest component is the most frequent label, the background's own included.
``aim``
    The code of AIM-500, AM-2k and P3M. GRAD: plain Gaussian derivatives with float32 in between, divided by 10.
    CONN: the largest component is a true region; its levels are float32.

Alphas are uint8 [H,W], 255 fully foreground; every metric is on the scale 0..1.
"""

from __future__ import annotations

import math
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.geometry import UNKNOWN, ImageU8
from icm_cli.reports.scores import Lineage, Region, Scores

BOUNDS_OF_UNKNOWN = (85, 170)
"""Values of a trimap from the first to below the second are unknown, as some files hold other ones than 128."""
SIGMA = 1.4
"""Sigma of the Gaussian whose derivatives GRAD compares, in pixels."""
SMALLEST_TAP = 1e-2
"""composition: the filter ends where the Gaussian falls under this."""
AIM_RADIUS_PX = int(4 * SIGMA + 0.5)
"""aim: SciPy's default truncation, four sigma."""
SMALLEST_DROP = 0.15
"""CONN: a pixel this near to its level counts as fully connected."""

Map = NDArray[np.float64]
Mask = NDArray[np.bool_]


def score(
    alpha: ImageU8, truth: ImageU8, lineage: Lineage = "composition", trimap: ImageU8 | None = None
) -> dict[Region, Scores]:
    """All metrics over the whole image and, where a ``trimap`` is given, over its unknown pixels (value 128).

    All three are uint8 [H,W] of one size. "unknown" is left out where the trimap has no unknown pixel. The maps of
    GRAD and CONN are those of the whole image in either case. Raises ValueError for unequal sizes.
    """
    if not alpha.shape == truth.shape == (truth if trimap is None else trimap).shape:
        raise ValueError(f"alpha is {alpha.shape} and ground truth {truth.shape}; expected one size, the trimap's too")
    maps = _ErrorMaps(alpha, truth, lineage)
    scores: dict[Region, Scores] = {"whole": maps.over(None)}
    if trimap is not None and (unknown := trimap == UNKNOWN).any():
        scores["unknown"] = maps.over(unknown)
    return scores


def dt_ssd(alpha: ImageU8, before: ImageU8, truth: ImageU8, truth_before: ImageU8) -> float:
    """Flicker between two frames: the root mean square of (alpha's change - ground truth's change), times 100.

    dtSSD of Erofeev et al., "Perceptually Motivated Benchmark for Video Matting", BMVC 2015, as the code of Robust
    Video Matting prints it. All are uint8 [H,W] of one size.
    """
    change = (alpha.astype(np.int16) - before) - (truth.astype(np.int16) - truth_before)
    return 100 * math.sqrt(np.square(change.astype(np.int64)).mean()) / 255


class _ErrorMaps:
    """Maps [H,W] that GRAD and CONN sum up, made once for every region."""

    def __init__(self, alpha: ImageU8, truth: ImageU8, lineage: Lineage) -> None:
        self.difference = cv2.absdiff(alpha, truth)
        composition = lineage == "composition"
        magnitude = _composition_gradient if composition else _aim_gradient
        self.gradient = np.square(magnitude(alpha) - magnitude(truth))
        self.gradient_divisor = 1000 if composition else 10
        self.connectivity = _connectivity_error(alpha, truth, lineage)

    def over(self, region: Mask | None) -> Scores:
        """Sums over the pixels of ``region`` [H,W], None for all."""
        difference, gradient, connectivity = (
            each if region is None else each[region] for each in (self.difference, self.gradient, self.connectivity)
        )
        absolute = int(difference.sum(dtype=np.int64)) / 255
        squared = int(np.square(difference, dtype=np.uint16).sum(dtype=np.int64)) / 255**2
        return Scores(
            mse=squared / difference.size,
            sad=absolute / 1000,
            grad=float(gradient.sum() / self.gradient_divisor),  # float32 to the end in the aim lineage
            conn=float(connectivity.sum()) / 1000,
            mad=absolute / difference.size,
        )


def _composition_gradient(alpha: ImageU8) -> Map:
    """Gradient magnitude float64 [H,W]; the filter is an outer product, so its unit energy splits into two."""
    halfsize = math.ceil(SIGMA * math.sqrt(-2 * math.log(math.sqrt(2 * math.pi) * SIGMA * SMALLEST_TAP)))
    gauss, derivative = _gaussian_taps(halfsize)
    gauss, derivative = (taps / np.linalg.norm(taps) for taps in (gauss, derivative))
    unit = alpha / 255.0
    across = cv2.sepFilter2D(unit, cv2.CV_64F, derivative, gauss, borderType=cv2.BORDER_REPLICATE)
    down = cv2.sepFilter2D(unit, cv2.CV_64F, gauss, derivative, borderType=cv2.BORDER_REPLICATE)
    return cast(Map, np.sqrt(across * across + down * down))  # cv2.magnitude rounds by where in memory its input lies


def _aim_gradient(alpha: ImageU8) -> NDArray[np.float32]:
    """Gradient magnitude float32 [H,W]; each pass is rounded to float32, rows first, as SciPy does it."""
    gauss, derivative = _gaussian_taps(AIM_RADIUS_PX)
    gauss, derivative = gauss / gauss.sum(), derivative / gauss.sum()
    one = np.ones(1)

    def passed(image: NDArray[np.floating], rows: Map, columns: Map) -> NDArray[np.float32]:
        for across, down in ((one, rows), (columns, one)):
            filtered = cv2.sepFilter2D(image, cv2.CV_64F, across, down, borderType=cv2.BORDER_REFLECT)
            image = filtered.astype(np.float32)
        return cast(NDArray[np.float32], image)

    unit = alpha / 255.0
    return cast(
        NDArray[np.float32], np.sqrt(passed(unit, derivative, gauss) ** 2 + passed(unit, gauss, derivative) ** 2)
    )


def _gaussian_taps(halfsize: int) -> tuple[Map, Map]:
    """A Gaussian and its derivative at -halfsize..halfsize, neither normalised."""
    at = np.arange(-halfsize, halfsize + 1, dtype=np.float64)
    gauss = np.exp(-(at**2) / (2 * SIGMA**2))
    return gauss, -at / SIGMA**2 * gauss


_STEPS = np.arange(0, 1.1, 0.1)
"""The published thresholds with their rounding: the seventh is above 153/255."""
_STEPS_PASSED = np.searchsorted(_STEPS[1:], np.arange(256) / 255.0, side="right").astype(np.uint8)
"""Number of thresholds above 0 that an alpha of 0..255 reaches."""


def _connectivity_error(alpha: ImageU8, truth: ImageU8, lineage: Lineage) -> Map:
    """|phi(alpha) - phi(truth)|, float64 [H,W].

    A pixel's level is the last threshold at which it belongs to the largest component of those that reach it in
    both alphas. phi is 1 where the alpha is near its level, and falls as it rises above.
    """
    levels = _connectivity_levels(_STEPS_PASSED[np.minimum(alpha, truth)], lineage)
    steps = _STEPS if lineage == "composition" else _STEPS.astype(np.float32)
    above = np.arange(256) / 255.0 - steps[:, None]
    phi = (1 - above * (above >= SMALLEST_DROP)).ravel()
    row = levels.astype(np.uint16) << 8
    return np.abs(phi[row | alpha] - phi[row | truth])


def _connectivity_levels(passed: ImageU8, lineage: Lineage) -> ImageU8:
    """Index into the thresholds, uint8 [H,W] 0..10, from the number of thresholds that a pixel passes."""
    highest = len(_STEPS) - 1
    levels = np.full(passed.shape, highest, np.uint8)
    is_open = np.ones(passed.shape, bool)
    counts = np.bincount(passed.ravel(), minlength=highest + 1)
    for step in range(1, highest + 1):
        if counts[step - 1] == 0 and step > 1:
            continue  # the same pixels as at the step before
        if not counts[step:].any():
            break  # none is left: the published codes set no level then
        in_largest = _in_largest_component(passed >= step, with_background=lineage == "composition")
        levels[is_open & ~in_largest] = step - 1
        is_open &= in_largest
    return levels


def _in_largest_component(mask: Mask, *, with_background: bool) -> Mask:
    """The largest 4-connected component of a mask that is not empty, [H,W]; of equal ones the first in reading order.

    ``with_background``: all pixels outside the mask count as one more component, before the others.
    """
    _, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=4)
    areas = np.bincount(labels.ravel())  # half the time of connectedComponentsWithStats
    if not with_background:
        areas[0] = 0
    best = np.flatnonzero(areas == areas.max())
    if len(best) > 1 and best[0] != 0:
        first = np.isin(labels, best).argmax()
        return cast(Mask, labels == labels.flat[first])
    return cast(Mask, labels == best[0])
