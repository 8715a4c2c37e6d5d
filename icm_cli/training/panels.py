"""The picture that TensorBoard shows: what the model was given, what it should have said, and what it says."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from icm_cli.geometry import ImageU8, alpha_to_u8
from icm_cli.model.contracts import TrainedHead
from icm_cli.model.core import InContextMatting
from icm_cli.training.data.samples import PairBatch

MOST_ROWS = 4
CELL_PX = 256
UNSEEN = 0.35
"""Brightness of a reference outside its guidance."""


@torch.no_grad()
def panel(model: InContextMatting, batch: PairBatch, *, fixed_noise: bool) -> ImageU8:
    """One row per sample, uint8 [H,W,3]: source, masked reference, alpha, prediction, inter- and intra-similarity.

    The model must be in evaluation mode and its head trained.
    """
    head = model.head
    assert isinstance(head, TrainedHead)
    few = batch.first(MOST_ROWS)
    pairs = few.pairs(fixed_noise=fixed_noise)
    features = model.extract_features(pairs)
    prepared = model.prepare_pairs(pairs, features)
    predicted = head(features.target, prepared, pairs.image, pairs.valid).alpha
    inter, intra = head.similarity_maps(features.target, prepared)
    rows = []
    for i in range(len(few.names)):
        cells = (
            few.rgb[i].cpu().numpy(),
            masked(few.reference_rgb[i].cpu().numpy(), few.guidance[i].cpu().numpy()),
            grey(few.alpha[i].cpu().numpy()),
            grey(alpha_to_u8(predicted[i, 0].float().cpu().numpy())),
            _heat(inter[i, 0]),
            _heat(intra[i, 0]),
        )
        rows.append(cells)
    return table(rows)


def table(rows: Sequence[Sequence[ImageU8]]) -> ImageU8:
    """Pictures uint8 [h,w,3] side by side, each brought to one size."""
    return np.concatenate(
        [
            np.concatenate(
                [cv2.resize(cell, (CELL_PX, CELL_PX), interpolation=cv2.INTER_AREA) for cell in cells], axis=1
            )
            for cells in rows
        ]
    )


def masked(rgb: ImageU8, guidance: np.ndarray) -> ImageU8:
    """A reference, uint8 [H,W,3], darkened outside its guidance, bool [H,W]."""
    return np.where(guidance[..., None], rgb, (rgb * UNSEEN).astype(np.uint8)).astype(np.uint8)


def grey(values: ImageU8) -> ImageU8:
    """A layer uint8 [h,w] as a picture uint8 [h,w,3]."""
    return np.repeat(values[..., None], 3, axis=-1)


def _heat(values: Tensor) -> ImageU8:
    """A map [h,w] of any range, from its least (dark) to its most (bright)."""
    spread = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
    coloured = cv2.applyColorMap(alpha_to_u8(spread.float().cpu().numpy()), cv2.COLORMAP_INFERNO)
    return np.asarray(coloured[..., ::-1], np.uint8)
