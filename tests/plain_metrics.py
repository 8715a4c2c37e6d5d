"""Reference implementation of the metrics with SciPy and scikit-image.

It covers both variants, composition and AIM. Alphas are float64 [H,W] in 0..1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import label, regionprops

Map = NDArray[np.float64]
STEP = 0.1
SIGMA = 1.4


def plain_metrics(pred: NDArray[np.uint8], truth: NDArray[np.uint8], variant: str, inside: NDArray[np.bool_]) -> Map:
    """Return [MSE, SAD, GRAD, CONN] over the pixels ``inside``."""
    a, b = pred / 255.0, truth / 255.0
    gradient, connectivity = {
        "composition": (composition_gradient, composition_connectivity),
        "aim": (aim_gradient, aim_connectivity),
    }[variant]
    return np.array(
        [
            np.square(a - b)[inside].mean(),
            np.abs(a - b)[inside].sum() / 1000,
            gradient(a, b, inside),
            connectivity(a, b)[inside].sum() / 1000,
        ]
    )


def composition_gradient(a: Map, b: Map, inside: NDArray[np.bool_]) -> float:
    half = math.ceil(SIGMA * math.sqrt(-2 * math.log(math.sqrt(2 * math.pi) * SIGMA * 1e-2)))
    u = np.arange(-half, half + 1)
    gauss = np.exp(-(u**2) / (2 * SIGMA**2)) / (SIGMA * math.sqrt(2 * math.pi))
    kernel = np.outer(gauss, -u * gauss / SIGMA**2)
    kernel /= np.sqrt((kernel**2).sum())

    def magnitude(x: Map) -> Map:
        return np.hypot(ndimage.convolve(x, kernel, mode="nearest"), ndimage.convolve(x, kernel.T, mode="nearest"))

    return float(np.square(magnitude(a) - magnitude(b))[inside].sum() / 1000)


def aim_gradient(a: Map, b: Map, inside: NDArray[np.bool_]) -> float:
    def magnitude(x: Map) -> NDArray[np.float32]:
        dy = ndimage.gaussian_filter(x, SIGMA, order=[1, 0], output=np.float32)
        dx = ndimage.gaussian_filter(x, SIGMA, order=[0, 1], output=np.float32)
        return np.sqrt(dy**2 + dx**2)

    error = np.square(magnitude(a) - magnitude(b))
    return float(np.sum(error if inside.all() else error[inside]) / 10)


def composition_connectivity(a: Map, b: Map) -> Map:
    levels = np.full(a.shape, -1.0)
    steps = np.arange(0, 1 + STEP, STEP)
    for i in range(1, len(steps)):
        labels = label((a >= steps[i]) & (b >= steps[i]), connectivity=1)
        omega = labels == np.argmax(np.bincount(labels.flat))
        levels[(levels == -1) & ~omega] = steps[i - 1]
    levels[levels == -1] = 1
    return np.abs(pixel_connectivity(a, levels) - pixel_connectivity(b, levels))


def aim_connectivity(a: Map, b: Map) -> Map:
    levels = np.full(a.shape, -1, np.float32)
    steps = np.arange(0, 1.1, STEP)
    for i in range(1, len(steps)):
        regions = regionprops(label((a >= steps[i]) & (b >= steps[i]), connectivity=1))
        if not regions:
            continue
        coords = regions[int(np.argmax([region.area for region in regions]))].coords
        omega = np.zeros(a.shape, bool)
        omega[coords[:, 0], coords[:, 1]] = True
        levels[(levels == -1) & ~omega] = steps[i - 1]
    levels[levels == -1] = 1
    return np.abs(pixel_connectivity(a, levels) - pixel_connectivity(b, levels))


def pixel_connectivity(x: Map, levels: NDArray[np.floating]) -> Map:
    """Return 1 - d, where d is the distance of a pixel from its connected level, or 0 if that is below 0.15."""
    d = x - levels
    return 1 - d * (d >= 0.15)
