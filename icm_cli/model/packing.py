"""A trained checkpoint with its backbone, in few bytes: what ``icm train --pack`` writes, and ships inside the package.

Kernels become float16, the backbone's matrices 8-bit integers with a scale for every row; vectors (biases, BatchNorm
statistics) stay float32.
"""

from __future__ import annotations

from pathlib import Path

from icm_cli.errors import ConfigError
from icm_cli.model.checkpoint import read_checkpoint, read_config, save_checkpoint
from icm_cli.model.loading import load_model


def pack(checkpoint: Path, out: Path) -> None:
    """Write ``out`` whole or not at all. Raises ConfigError where there is no such checkpoint of ours."""
    config = read_config(checkpoint)
    if config is None:
        raise ConfigError(f"checkpoint {checkpoint} holds no configuration; expected one that icm trained")
    model = load_model(config, checkpoint=checkpoint, weights=None, offline=True, seed=0)
    metadata = read_checkpoint(checkpoint).metadata
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, model, config, with_backbone=True, small=True, metadata=metadata)
