"""Helpers for tests of ``icm eval``: predictions, bad ground truth, and access to reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from conftest import EVAL_NAMES as NAMES
from conftest import Icm as Evaluate
from conftest import read

__all__ = ["NAMES", "Evaluate", "damage_alpha", "images_by_name", "read_report", "write_predictions"]


def read_report(path: Path) -> dict[str, Any]:
    """Read a JSON report."""
    return dict(json.loads(path.read_text()))


def images_by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the images of a report by name."""
    return {image["name"]: image for image in report["images"]}


def write_predictions(data: Path, folder: Path) -> Path:
    """Write the blurred ground truth of a dataset as predictions, and return their folder."""
    for path in (data / "alphas").rglob("*.png"):
        target = folder / path.relative_to(data / "alphas")
        target.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(target), cv2.GaussianBlur(read(path), (0, 0), 2))
    return folder


def damage_alpha(kind: str, path: Path) -> None:
    """Change an alpha file so that it has the problem ``kind``, such as "empty-alpha"."""
    alpha = read(path)
    if kind == "size-mismatch":
        alpha = alpha[:, :-20]
    elif kind == "colour-alpha":
        alpha = np.dstack([alpha, alpha // 2, alpha])
    elif kind == "16-bit-alpha":
        alpha = alpha.astype(np.uint16) * 257
    elif kind == "16-bit-alpha_in_RGB":
        alpha = np.dstack([alpha.astype(np.uint16) * 257] * 3)
    elif kind == "unscaled-alpha":
        alpha = (alpha > 127).astype(np.uint8)
    elif kind == "empty-alpha":
        alpha = np.zeros_like(alpha)
    cv2.imwrite(str(path), alpha)
    if kind == "unreadable":
        path.write_bytes(path.read_bytes()[:90])
