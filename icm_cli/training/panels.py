"""The picture that TensorBoard shows: what the model was given, what it should have said, and what it says."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from icm_cli.geometry import ImageU8, to_u8
from icm_cli.model.contracts import TrainedHead
from icm_cli.model.in_context_matting import InContextMatting
from icm_cli.training.preview import masked
from icm_cli.training.samples import Batch

MOST_ROWS = 4
CELL_PX = 256


@torch.no_grad()
def panel(model: InContextMatting, batch: Batch, *, fixed_noise: bool) -> ImageU8:
    """A row a sample, uint8 [H,W,3]: source, masked reference, alpha, prediction, inter- and intra-similarity.

    The model must be in evaluation mode and its head trained.
    """
    head = model.head
    assert isinstance(head, TrainedHead)
    few = batch.first(MOST_ROWS)
    pairs = few.pairs(fixed_noise=fixed_noise)
    features = model.features(pairs)
    prepared = model.prepared(pairs, features)
    predicted = head(features.target, prepared, pairs.image, pairs.valid).alpha
    inter, intra = head.similarity_maps(features.target, prepared)
    rows = []
    for i in range(len(few.names)):
        cells = (
            few.rgb[i].cpu().numpy(),
            masked(few.reference_rgb[i].cpu().numpy(), few.guidance[i].cpu().numpy()),
            _grey(few.alpha[i].cpu().numpy()),
            _grey(to_u8(predicted[i, 0].float().cpu().numpy())),
            _heat(inter[i, 0]),
            _heat(intra[i, 0]),
        )
        resized = [cv2.resize(each, (CELL_PX, CELL_PX), interpolation=cv2.INTER_AREA) for each in cells]
        rows.append(np.concatenate(resized, axis=1))
    return np.concatenate(rows)


def _grey(values: ImageU8) -> ImageU8:
    return np.repeat(values[..., None], 3, axis=-1)


def _heat(values: Tensor) -> ImageU8:
    """A map [h,w] of any range, from its least (dark) to its most (bright)."""
    spread = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
    coloured = cv2.applyColorMap(to_u8(spread.float().cpu().numpy()), cv2.COLORMAP_INFERNO)
    return np.asarray(coloured[..., ::-1], np.uint8)
