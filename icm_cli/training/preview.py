"""A contact sheet of training samples: what the model is about to be shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from icm_cli.files import atomic_write
from icm_cli.reports.contact_sheet import make_captioned_row, make_thumbnail
from icm_cli.training.stages.contract import AnyStage


def write_preview(path: Path, stage: AnyStage, count: int) -> None:
    """Write the first samples of a stage, one row each. Raises OutputError, TrainingError or ImageError."""
    rows = []
    for counter in range(count):
        name, cells = stage.preview(counter)
        rows.append(make_captioned_row([make_thumbnail(cell) for cell in cells], f"{counter}: {name}"))
    with atomic_write(path) as file:
        Image.fromarray(np.concatenate(rows)).save(file, format="PNG")
