"""Helpers for the tests of training: a small dataset, a small model, and the command ``icm train``."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from click.testing import Result
from conftest import arguments
from safetensors import safe_open
from safetensors.numpy import load_file
from typer.testing import CliRunner

from icm_cli.cli import app

MODEL = {
    "backbone": {
        "name": "efficientnet-lite",
        "long_side_px": 96,
        "correspondence_blocks": [10, 12],
        "correspondence_reductions": [1],
        "scale_blocks": [6, 3],
    },
    "head": {
        "name": "token-match",
        "feature_channels": [88, 120],
        "width": 8,
        "context_width": 16,
        "context_layers": 1,
        "fused_channels": 16,
        "skip_channels": [48, 24],
        "decoder_channels": [8, 8],
    },
    "edges": {"name": "refine", "widths": [4, 6], "frame_px": 64, "tile_px": 64, "overlap_px": 8},
}
"""The first half of the small backbone, and a narrow head."""
RECIPE = {
    "steps": 4,
    "batch_size": 2,
    "canvas_px": 96,
    "optimiser": "adamw",
    "learning_rate": 1e-3,
    "backbone_learning_rate": 1e-4,
    "warmup_steps": 2,
    "ema_decay": 0.9,
    "log_every": 1,
    "validate_every": 1000,
    "image_every": 1000,
    "save_every": 1000,
    "loss": {"cross_entropy": 1.0, "l1": 1.0},
}
PLAIN = {
    "augment": {name: 0 for name in ("flip", "rotate_degrees", "stretch", "colour", "jpeg", "blur", "noise")}
    | {"zoom": 1},
    "pairs": dict.fromkeys(
        (
            "composite_probability",
            "same_image_probability",
            "distractor_probability",
            "negative_probability",
            "mask_jitter_probability",
        ),
        0,
    ),
}
"""Settings of a recipe that change no pixels."""


def write_config(path: Path, data: Path, model: dict[str, Any] | None = None, **recipe: Any) -> Path:
    """Write a configuration that trains on the folder dataset of conftest; ``recipe`` replaces parts of RECIPE."""
    source = {
        "images": str(data / "images"),
        "alphas": str(data / "alphas"),
        "licence": "CC0",
    }
    sources = {"sources": [source], "backgrounds": [str(data / "images")]}
    path.write_text(json.dumps({**(model or MODEL), "train": {**RECIPE, **recipe}, "data": sources}))
    return path


def change(config: Path, **data: Any) -> Path:
    """Replace settings in the data section of a configuration file."""
    content = yaml.safe_load(config.read_text())
    content["data"] |= data
    config.write_text(json.dumps(content))
    return config


def train(config: Path, out: Path, *flags: str, **options: object) -> Result:
    """Run the command ``icm train`` in this process, without workers."""
    given = {"config": config, "out": out, "device": "cpu", "workers": 0, **options}
    return CliRunner().invoke(app, ["train", *arguments(given), *flags], catch_exceptions=False)


def command(config: Path, out: Path, *flags: str, workers: int = 0) -> list[str]:
    """Return the command line of ``icm train`` for another process."""
    options = {"config": config, "out": out, "device": "cpu", "workers": workers}
    return [sys.executable, "-m", "icm_cli.cli", "train", *arguments(options), *flags]


def weights(path: Path) -> dict[str, np.ndarray]:
    return dict(load_file(path))


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata())


def log(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same_weights(one: Path, other: Path) -> bool:
    """Whether two checkpoints contain equal weights."""
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
