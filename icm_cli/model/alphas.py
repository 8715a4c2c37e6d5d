"""Alphas as tensors: resizing with the pixel rules of :func:`icm_cli.geometry.resize`, and batches of equal sizes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from icm_cli.geometry import resize

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def apply_in_batches(
    function: Callable[[Sequence[ItemT]], Sequence[ResultT]],
    items: Sequence[ItemT],
    size_of: Callable[[ItemT], Hashable],
    max_batch: int | None = None,
) -> list[ResultT]:
    """Apply a function of a batch to items of any sizes: those of equal size in one batch.

    Args:
        function: Returns one result for each item of a batch.
        items: Items in any order.
        size_of: Size of an item; items of one batch have equal sizes.
        max_batch: Largest batch; None for no limit.

    Returns:
        Results in the order of the items.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[size_of(item)].append(index)
    results: dict[int, ResultT] = {}
    for indices in groups.values():
        step = max_batch or len(indices)
        for start in range(0, len(indices), step):
            batch = indices[start : start + step]
            results.update(zip(batch, function([items[index] for index in batch]), strict=True))
    return [results[index] for index in range(len(items))]


def max_batch_size(device: torch.device) -> int | None:
    """Largest batch of images for a network on this device; None for no limit.

    On the CPU it is 1: larger batches are not faster there, and an alpha would depend, in its last bits, on the other
    images of its batch.
    """
    return 1 if device.type == "cpu" else None


def resize_alpha(alpha: Tensor, size: Sequence[int]) -> Tensor:
    """Resize an alpha: by area averaging to fewer pixels, bilinearly to more pixels.

    On the CPU this is done by OpenCV, which is several times faster there.

    Args:
        alpha: float32 [h,w].
        size: Height and width of the result.
    """
    height, width = alpha.shape
    if (height, width) == tuple(size):
        return alpha
    if alpha.device.type == "cpu":
        return torch.from_numpy(resize(np.ascontiguousarray(alpha.numpy()), (size[0], size[1])))
    return resize_on_device(alpha, size)


def resize_on_device(alpha: Tensor, size: Sequence[int]) -> Tensor:
    """Resize an alpha as :func:`resize_alpha` does, by operations of its device."""
    if size[0] * size[1] >= alpha.numel():
        return F.interpolate(alpha[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]
    return _average_rows(_average_rows(alpha, size[0]).mT, size[1]).mT.contiguous()


def _average_rows(alpha: Tensor, count: int) -> Tensor:
    """Resize an alpha [h,w] to ``count`` rows, which average those that they overlap."""
    rows, columns = alpha.shape
    if count >= rows:
        return F.interpolate(alpha[None, None], size=(count, columns), mode="bilinear", align_corners=False)[0, 0]
    edges = torch.arange(count + 1, dtype=torch.float64) * (rows / count)
    starts, ends = edges[:-1], edges[1:]
    averaged = torch.zeros((count, columns), device=alpha.device)
    for step in range(math.ceil(rows / count) + 1):
        row = starts.floor() + step
        overlap = (torch.minimum(ends, row + 1) - torch.maximum(starts, row)).clamp(min=0.0) / (ends - starts)
        index = row.clamp(max=rows - 1).long().to(alpha.device)
        averaged += alpha.index_select(0, index) * overlap.to(alpha)[:, None]
    return averaged
