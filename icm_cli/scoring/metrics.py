"""Metrics that compare an alpha with its ground truth, numerically equal to the published code.

Two published implementations of GRAD and CONN (Rhemann et al., "A Perceptually Motivated Online Benchmark for Image
Matting", CVPR 2009) give different numbers. Do not compare numbers of one variant with numbers of the other:

``composition``
    The code of Deep Image Matting, GCA and In-Context Matting. GRAD uses a derivative-of-Gaussian filter of unit energy
    and divides by 1000. CONN takes the most frequent label as the largest component, including the label of the
    background.
``aim``
    The code of AIM-500, AM-2k and P3M. GRAD uses Gaussian derivatives without normalisation, rounds intermediate
    results to float32 and divides by 10. CONN excludes the background, and its levels are float32.

J and F compare binary masks of video frames as DAVIS does (Perazzi et al., "A Benchmark Dataset and Evaluation
Methodology for Video Object Segmentation", CVPR 2016, section 5.1).

Alphas are [H,W]: uint8, where 255 is foreground, or floating point in 0..1. All metrics are computed in float64 on the
scale 0..1.
"""

from __future__ import annotations

import math
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.geometry import UNKNOWN, ImageU8
from icm_cli.options import MetricVariant, Region
from icm_cli.reports.result import Scores

UNKNOWN_RANGE = (85, 170)
"""Trimap values that count as unknown: the first included, the second excluded. Some files use values near 128."""
SIGMA = 1.4
"""Standard deviation of the Gaussian of GRAD, in pixels."""
SMALLEST_TAP = 1e-2
"""The filter of the composition variant is truncated where the Gaussian falls below this value."""
AIM_RADIUS_PX = int(4 * SIGMA + 0.5)
"""Filter radius of the aim variant: four standard deviations, the default of SciPy."""
SMALLEST_DROP = 0.15
"""CONN: a pixel counts as fully connected if it is less than this above its level."""
BOUNDARY_TOLERANCE = 0.008
"""F: maximum distance between matching boundary pixels, as a fraction of the image diagonal."""

FloatMap = NDArray[np.float64]
AnyAlpha = ImageU8 | FloatMap
BoolMask = NDArray[np.bool_]


def compute_scores(
    alpha: AnyAlpha, truth: AnyAlpha, variant: MetricVariant = "composition", trimap: ImageU8 | None = None
) -> dict[Region, Scores]:
    """Compute all metrics over the whole image and over the pixels of value 128 in a trimap, if there are any.

    The error maps of GRAD and CONN always come from the whole image. Raises ValueError if the sizes differ.
    """
    has_one_size = alpha.shape == truth.shape and (trimap is None or trimap.shape == truth.shape)
    if not has_one_size:
        raise ValueError(
            f"alpha is {alpha.shape} and ground truth {truth.shape}; expected alpha, truth and trimap of one size"
        )
    maps = _ErrorMaps(as_unit_range(alpha), as_unit_range(truth), variant)
    scores: dict[Region, Scores] = {"whole": maps.scores()}
    if trimap is not None and (unknown := trimap == UNKNOWN).any():
        scores["unknown"] = maps.scores(unknown)
    return scores


def compute_dt_ssd(alpha: AnyAlpha, before: AnyAlpha, truth: AnyAlpha, truth_before: AnyAlpha) -> float:
    """Compute dtSSD, the flicker between a frame and the frame before it, all of one size.

    It is the root mean square of the difference between the change of the alpha and that of the ground truth, times 100
    (Erofeev et al., "Perceptually Motivated Benchmark for Video Matting", BMVC 2015, scaled as in the code of Robust
    Video Matting).
    """
    change = as_unit_range(alpha) - as_unit_range(before)
    true_change = as_unit_range(truth) - as_unit_range(truth_before)
    return 100 * math.sqrt(np.square(change - true_change).mean())


def as_unit_range(alpha: AnyAlpha) -> FloatMap:
    """Return an alpha as float64 in 0..1."""
    return alpha / 255.0 if alpha.dtype == np.uint8 else alpha.astype(np.float64)


class _ErrorMaps:
    """Error maps [H,W] of one image, from which the scores of every region are summed."""

    def __init__(self, alpha: FloatMap, truth: FloatMap, variant: MetricVariant) -> None:
        self.difference = np.abs(alpha - truth)
        is_composition = variant == "composition"
        gradient_magnitude = _composition_gradient if is_composition else _aim_gradient
        self.gradient = np.square(gradient_magnitude(alpha) - gradient_magnitude(truth))
        self.gradient_divisor = 1000 if is_composition else 10
        self.connectivity = _connectivity_error(alpha, truth, variant)

    def scores(self, region: BoolMask | None = None) -> Scores:
        """Return the metrics over the pixels of ``region`` [H,W], or over all pixels."""
        selection = ... if region is None else region
        difference, gradient = self.difference[selection], self.gradient[selection]
        connectivity = self.connectivity[selection]
        absolute = float(difference.sum())
        return Scores(
            mse=float(np.square(difference).mean()),
            sad=absolute / 1000,
            grad=float(gradient.sum() / self.gradient_divisor),  # the sum of the aim variant is float32
            conn=float(connectivity.sum()) / 1000,
            mad=absolute / difference.size,
        )


def _composition_gradient(alpha: FloatMap) -> FloatMap:
    """Return the gradient magnitude, float64 [H,W]. Normalising both factors gives the filter unit energy."""
    # At this distance, a Gaussian of unit area falls to SMALLEST_TAP.
    halfsize = math.ceil(SIGMA * math.sqrt(-2 * math.log(math.sqrt(2 * math.pi) * SIGMA * SMALLEST_TAP)))
    gauss, derivative = _gaussian_taps(halfsize)
    gauss = gauss / np.linalg.norm(gauss)
    derivative = derivative / np.linalg.norm(derivative)
    across = cv2.sepFilter2D(alpha, cv2.CV_64F, derivative, gauss, borderType=cv2.BORDER_REPLICATE)
    down = cv2.sepFilter2D(alpha, cv2.CV_64F, gauss, derivative, borderType=cv2.BORDER_REPLICATE)
    return cast(FloatMap, np.sqrt(across * across + down * down))  # cv2.magnitude depends on alignment


def _aim_gradient(alpha: FloatMap) -> NDArray[np.float32]:
    """Return the gradient magnitude, float32 [H,W]. Like SciPy, filter along axis 0 first and round after each pass."""
    gauss, derivative = _gaussian_taps(AIM_RADIUS_PX)
    area = gauss.sum()
    gauss, derivative = gauss / area, derivative / area
    identity = np.ones(1)

    def filter_twice(image: FloatMap, taps_down: FloatMap, taps_across: FloatMap) -> NDArray[np.float32]:
        down = cv2.sepFilter2D(image, cv2.CV_64F, identity, taps_down, borderType=cv2.BORDER_REFLECT)
        rounded = down.astype(np.float32)
        both = cv2.sepFilter2D(rounded, cv2.CV_64F, taps_across, identity, borderType=cv2.BORDER_REFLECT)
        return both.astype(np.float32)

    down = filter_twice(alpha, taps_down=derivative, taps_across=gauss)
    across = filter_twice(alpha, taps_down=gauss, taps_across=derivative)
    return cast(NDArray[np.float32], np.sqrt(across**2 + down**2))


def _gaussian_taps(halfsize: int) -> tuple[FloatMap, FloatMap]:
    """Sample a Gaussian and its derivative at -halfsize..halfsize, without normalisation."""
    offsets = np.arange(-halfsize, halfsize + 1, dtype=np.float64)
    gauss = np.exp(-(offsets**2) / (2 * SIGMA**2))
    return gauss, -offsets / SIGMA**2 * gauss


_THRESHOLDS = np.arange(0, 1.1, 0.1)
"""The published thresholds. Their rounding matters: the seventh is above 153/255."""


def _connectivity_error(alpha: FloatMap, truth: FloatMap, variant: MetricVariant) -> FloatMap:
    """Return |phi(alpha) - phi(truth)|, float64 [H,W].

    At each threshold, the pixels that reach it in both alphas form components. The level of a pixel is the highest
    threshold at which it belongs to the largest component. phi decreases with the distance from this level.
    """
    reached = np.searchsorted(_THRESHOLDS[1:], np.minimum(alpha, truth), side="right").astype(np.uint8)
    steps = _THRESHOLDS if variant == "composition" else _THRESHOLDS.astype(np.float32)
    level = steps[_connectivity_levels(reached, variant)]

    def phi(image: FloatMap) -> FloatMap:
        drop = image - level
        return 1 - drop * (drop >= SMALLEST_DROP)

    return np.abs(phi(alpha) - phi(truth))


def _connectivity_levels(reached: ImageU8, variant: MetricVariant) -> ImageU8:
    """Return levels as indices of thresholds, from the number of thresholds that are ``reached``, uint8 [H,W] 0..10."""
    highest = len(_THRESHOLDS) - 1
    levels = np.full(reached.shape, highest, np.uint8)
    is_undecided = np.ones(reached.shape, bool)
    counts = np.bincount(reached.ravel(), minlength=highest + 1)
    for step in range(1, highest + 1):
        if counts[step - 1] == 0 and step > 1:
            continue  # the same pixels as for the previous threshold
        if not counts[step:].any():
            break  # no pixel is left: the published code sets no level
        in_largest = _largest_component(reached >= step, with_background=variant == "composition")
        levels[is_undecided & ~in_largest] = step - 1
        is_undecided &= in_largest
    return levels


def _largest_component(mask: BoolMask, *, with_background: bool) -> BoolMask:
    """Return the largest 4-connected component of a mask, the first in reading order if several are equal.

    ``with_background`` adds the pixels outside the mask as one more component, which is considered first.
    """
    _, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=4)  # 0 is the background
    areas = np.bincount(labels.ravel())  # twice as fast as connectedComponentsWithStats
    if not with_background:
        areas[0] = 0
    largest = np.flatnonzero(areas == areas.max())
    if len(largest) > 1 and largest[0] != 0:  # labels are not in reading order
        first_pixel = np.isin(labels, largest).argmax()
        return cast(BoolMask, labels == labels.flat[first_pixel])
    return cast(BoolMask, labels == largest[0])


def compute_jaccard(alpha: AnyAlpha, truth: AnyAlpha) -> float:
    """Return J, 0..1: the intersection over union of two alphas above one half; 1 if both masks are empty."""
    predicted, true = as_unit_range(alpha) > 0.5, as_unit_range(truth) > 0.5
    union = np.count_nonzero(predicted | true)
    return np.count_nonzero(predicted & true) / union if union else 1.0


def compute_boundary_f(alpha: AnyAlpha, truth: AnyAlpha) -> float:
    """Return F, 0..1: the harmonic mean of precision and recall of the boundary pixels of two alphas above one half.

    As in the tool of DAVIS, boundaries are one pixel wide, and match within 0.8 % of the image diagonal, rounded up. If
    neither mask has a boundary (each is empty or full), F is 1; if only one has a boundary, F is 0.
    """
    predicted = _boundary_pixels(as_unit_range(alpha) > 0.5)
    true = _boundary_pixels(as_unit_range(truth) > 0.5)
    if not (predicted.any() and true.any()):
        return 0.0 if predicted.any() or true.any() else 1.0
    radius = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*truth.shape))
    precision = np.count_nonzero(predicted & _dilate_by_disk(true, radius)) / np.count_nonzero(predicted)
    recall = np.count_nonzero(true & _dilate_by_disk(predicted, radius)) / np.count_nonzero(true)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _boundary_pixels(mask: BoolMask) -> BoolMask:
    """Return the pixels [H,W] that differ from a neighbour on the right, below, or diagonally."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def _dilate_by_disk(mask: BoolMask, radius: int) -> BoolMask:
    """Return all pixels [H,W] within ``radius`` of a pixel of the mask."""
    offsets = np.arange(-radius, radius + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.uint8)
    return cv2.dilate(mask.astype(np.uint8), disk) > 0
