"""Export of reduced copies of the training data."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from icm_cli.files.digests import cached_file_digest
from icm_cli.training.data.export import export_shards
from icm_cli.training.data.pool import read_pool
from icm_cli.training.data.scenes import read_photograph
from icm_cli.training.settings import read_data


def disc(height: int, width: int, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return a soft disc on a gradient, and its alpha."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    alpha = np.clip((0.3 * min(height, width) - np.hypot(x - 0.55 * width, y - 0.5 * height)) / 6 + 0.5, 0, 1)
    ramp = np.stack([60 + 100 * x / width, 90 + 60 * y / height, np.full_like(x, 70)], axis=-1)
    rgb = ramp * (1 - alpha[..., None]) + np.array(colour, np.float32) * alpha[..., None]
    return rgb.round().astype(np.uint8), (alpha * 255).round().astype(np.uint8)


def test_exported_copies_equal_their_originals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images with classes and softened masks, and cut-outs, are exported as shards and unpacked elsewhere."""
    for number in range(6):
        rgb, alpha = disc(90 + 10 * number, 100, (220, 40, 30 * number))
        folder = tmp_path / "photographs" / f"group{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{number}.jpg"), rgb[..., ::-1])
        cv2.imwrite(str(folder / f"{number}.png"), alpha)
        (tmp_path / "things").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "things" / f"{number}.png"), np.dstack([rgb[..., ::-1], alpha]))
    (tmp_path / "classes.json").write_text(json.dumps({"group0": "cup", "group1": ["dog", "pug"]}))
    photographs = {
        "images": str(tmp_path / "photographs" / "*" / "*.jpg"),
        "alphas": str(tmp_path / "photographs" / "*" / "*.png"),
        "classes": str(tmp_path / "classes.json"),
        "soften_px": 0.8,
        "weight": 2.0,
    }
    cutouts = {"dataset": "cutouts", "root": str(tmp_path / "things"), "licence": "CC0"}
    backgrounds = [str(tmp_path / "photographs" / "group0")]
    data = tmp_path / "data.yaml"
    data.write_text(json.dumps({"sources": [photographs, cutouts], "backgrounds": backgrounds}))
    done = subprocess.run(
        [sys.executable, "-m", "icm_cli.training.data.export", tmp_path / "pack", "--data", data, "--px", "64"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    whole = [Path(line.split()[0]) for line in done.stdout.splitlines()]
    pieces = export_shards(data, tmp_path / "small", long_side_px=64, shard_bytes=20_000)
    assert len(whole) == 1
    assert len(pieces) > 1
    assert all(path.stat().st_size < 20_000 + 2 * 10_240 for path in pieces)
    for path in pieces:
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path / "there", filter="data")
    monkeypatch.chdir(tmp_path / "there")
    config = read_data("data.yaml")
    copies, originals = read_pool(config), read_pool(read_data(data))
    assert len(copies) == len(originals) == 12
    assert copies.weights == originals.weights
    assert [len(each) for each in copies.groups.values()] == [len(each) for each in originals.groups.values()]
    for copy, original in zip(copies, originals, strict=True):
        assert (copy.classes, copy.is_foreground) == (original.classes, original.is_foreground)
        layers = read_photograph(copy), read_photograph(original, 64)
        np.testing.assert_array_equal(layers[0].alpha, layers[1].alpha)
        shown = (layers[1].alpha > 0) | (not original.is_foreground)  # outside cut-outs there is no colour
        assert np.abs(layers[0].rgb[shown].astype(int) - layers[1].rgb[shown]).mean() < 6
    assert json.loads(Path(config.copies_of or "").read_text()) == sorted(
        {cached_file_digest(path) for path in originals.image_paths}
    )
