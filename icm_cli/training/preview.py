"""A contact sheet of training samples: what the model is about to be shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from icm_cli.contact_sheet import cut_out
from icm_cli.files import atomic_write
from icm_cli.geometry import ImageU8
from icm_cli.training.samples import Sample

CELL_PX = 224
CAPTION_PX = 16
UNSEEN = 0.35
"""Brightness of a reference outside its guidance."""


def write_preview(path: Path, samples: Sequence[Sample]) -> None:
    """A row a sample: masked reference, target, alpha, trimap, cut-out on grey. Raises OutputError."""
    with atomic_write(path) as file:
        Image.fromarray(np.concatenate([_row(sample) for sample in samples])).save(file, format="PNG")


def masked(rgb: ImageU8, guidance: np.ndarray) -> ImageU8:
    """A reference, uint8 [H,W,3], darkened outside its guidance, bool [H,W]."""
    return np.where(guidance[..., None], rgb, (rgb * UNSEEN).astype(np.uint8)).astype(np.uint8)


def _row(sample: Sample) -> ImageU8:
    cells = (
        masked(sample.reference_rgb, sample.guidance),
        sample.rgb,
        np.repeat(sample.alpha[..., None], 3, -1),
        np.repeat(sample.trimap[..., None], 3, -1),
        cut_out(sample.rgb, sample.alpha),
    )
    row = Image.new("RGB", (len(cells) * CELL_PX, CELL_PX + CAPTION_PX), (24, 24, 24))
    for column, cell in enumerate(cells):
        row.paste(Image.fromarray(cell).resize((CELL_PX - 4, CELL_PX - 4), Image.Resampling.BOX), (column * CELL_PX, 0))
    ImageDraw.Draw(row).text((4, CELL_PX - 2), f"{sample.counter}: {sample.name}", fill=(220, 220, 220))
    return np.asarray(row)
