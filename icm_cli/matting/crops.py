"""Crops of frames around an object, in which the object gets the full token grid of the backbone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icm_cli.config import CropSettings
from icm_cli.images.pixels import ImageWindows

CropResult = TypeVar("CropResult")
Pixels = TypeVar("Pixels", bound=NDArray[np.generic])


@dataclass(frozen=True)
class CropBox:
    """The rectangle of a frame that a crop contains."""

    rows: slice
    columns: slice

    @property
    def slices(self) -> tuple[slice, slice]:
        """The crop as an index of an array [H,W,...] of the frame."""
        return self.rows, self.columns

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def area(self) -> int:
        """Number of pixels."""
        return self.size[0] * self.size[1]

    def crop(self, pixels: Pixels) -> Pixels:
        """Copy the crop out of an array [H,W,...] of the frame."""
        return np.ascontiguousarray(pixels[self.slices])  # type: ignore[return-value]


def crop_box(
    mask: NDArray[np.bool_], size: tuple[int, int], settings: CropSettings, windows: ImageWindows | None = None
) -> CropBox | None:
    """Return the box around an object in a frame of ``size``; None without an object, or if it is outside the frame.

    ``mask``: the object, bool [h,w] of any size. It shows the whole frame, or its display window if ``windows`` are
    given.
    """
    if not mask.any():
        return None
    display, offset = (size, (0, 0)) if windows is None else (windows.display, windows.offset)
    # Start and end of the object, first its rows and then its columns. The end is exclusive.
    extents = [np.flatnonzero(mask.any(axis=axis))[[0, -1]] + (0, 1) for axis in (1, 0)]
    margin = settings.margin * max(end - start for start, end in extents)
    sides = []
    for n, (start, end) in enumerate(extents):
        centre = (start + end) / 2
        half_side = max((end - start) / 2 + margin, settings.min_side * mask.shape[n] / 2)
        scale = display[n] / mask.shape[n]
        low = max(0, math.floor((centre - half_side) * scale) - offset[n])
        high = min(size[n], math.ceil((centre + half_side) * scale) - offset[n])
        if low >= high:
            return None
        sides.append(slice(low, high))
    return CropBox(*sides)


def align_box(box: CropBox, size: tuple[int, int], cells: int) -> CropBox:
    """Return a box enlarged to whole cells of a grid, which has ``cells`` cells along the longer side of the frame."""
    cell = max(size) / cells
    spans = []
    for span, length in zip(box.slices, size, strict=True):
        start = math.floor(math.floor(span.start / cell) * cell)
        stop = min(length, math.ceil(math.ceil(span.stop / cell) * cell))
        spans.append(slice(start, stop))
    return CropBox(*spans)


def enlarge_box(box: CropBox, mask: NDArray[np.bool_], size: tuple[int, int], settings: CropSettings) -> CropBox:
    """Return a box enlarged at each side that cuts the object. ``mask``: the object in the crop, bool [h,w]."""
    spans = []
    for span, lines, length in zip(box.slices, (mask, mask.T), size, strict=True):
        growth = math.ceil(settings.growth * (span.stop - span.start))
        start, stop = span.start, span.stop
        if lines[0].mean() >= settings.cut_fraction:  # the first row or column of the crop cuts the object
            start = max(0, start - growth)
        if lines[-1].mean() >= settings.cut_fraction:
            stop = min(length, stop + growth)
        spans.append(slice(start, stop))
    return CropBox(*spans)


def matte_in_crops(
    box: CropBox,
    size: tuple[int, int],
    matte_crop: Callable[[CropBox], tuple[CropResult, Tensor] | None],
    settings: CropSettings,
) -> tuple[CropResult, Tensor, CropBox] | None:
    """Matte a crop of a frame of ``size``. While the border of the crop cuts the object, repeat with a larger crop.

    ``matte_crop`` returns a result and the alpha [h,w] of a crop, or None to stop. Returns result, alpha and box of the
    last crop; None if ``matte_crop`` returned None.
    """
    for number in range(1, settings.max_crops + 1):
        matted = matte_crop(box)
        if matted is None:
            return None
        result, alpha = matted
        larger = enlarge_box(box, (alpha > 0.5).numpy(force=True), size, settings)
        if larger == box or number == settings.max_crops:
            break
        box = larger
    return result, alpha, box


def paste_crop(alpha: Tensor, box: CropBox, size: tuple[int, int], fade: float = 0.0) -> Tensor:
    """Return a frame of ``size``, float32 [H,W], with the alpha of a crop, float32 [h,w], and 0 elsewhere.

    The alpha fades to 0 over the fraction ``fade`` of the crop's side, except at the borders of the frame.
    """
    frame = torch.zeros(size, dtype=torch.float32, device=alpha.device)
    if fade:
        rows, columns = (
            _fade_weights(side, length, fade).to(alpha.device) for side, length in zip(box.slices, size, strict=True)
        )
        alpha = alpha * rows[:, None] * columns
    frame[box.slices] = alpha
    return frame


def _fade_weights(side: slice, frame_length: int, fade: float) -> Tensor:
    """Return weights of the pixels along a side of a crop: 1, falling to 0 at ends that are inside the frame."""
    length = side.stop - side.start
    ramp = torch.clamp(torch.arange(length, dtype=torch.float32) / max(1.0, fade * length), max=1.0)
    weights = torch.ones(length)
    if side.start > 0:
        weights = torch.minimum(weights, ramp)
    if side.stop < frame_length:
        weights = torch.minimum(weights, ramp.flip(0))
    return weights
