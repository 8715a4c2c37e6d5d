"""A contact sheet of training samples: what the model is about to be shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from icm_cli.files import atomic_write
from icm_cli.geometry import ImageU8
from icm_cli.training.stages.contract import AnyStage

CELL_PX = 224
CAPTION_PX = 16


def write_preview(path: Path, stage: AnyStage, count: int) -> None:
    """Write the first samples of a stage, one row each. Raises OutputError, TrainingError or ImageError."""
    rows = [_row(counter, *stage.preview(counter)) for counter in range(count)]
    with atomic_write(path) as file:
        Image.fromarray(np.concatenate(rows)).save(file, format="PNG")


def _row(counter: int, name: str, cells: list[ImageU8]) -> ImageU8:
    row = Image.new("RGB", (len(cells) * CELL_PX, CELL_PX + CAPTION_PX), (24, 24, 24))
    for column, cell in enumerate(cells):
        row.paste(Image.fromarray(cell).resize((CELL_PX - 4, CELL_PX - 4), Image.Resampling.BOX), (column * CELL_PX, 0))
    ImageDraw.Draw(row).text((4, CELL_PX - 2), f"{counter}: {name}", fill=(220, 220, 220))
    return np.asarray(row)
