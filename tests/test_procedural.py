"""Procedural foregrounds: exact coverage, reproducible images, views of an object, and use as a source."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icm_cli.training.data.pool import read_pool
from icm_cli.training.data.procedural import DRAW_FUNCTIONS, ObjectStyle, _average_down, draw_view, main, to_straight_u8
from icm_cli.training.settings import DataConfig, SourceConfig


def make_style(kind: str, seed: int) -> ObjectStyle:
    return dataclasses.replace(ObjectStyle.draw_random(np.random.default_rng(seed)), kind=kind, count=80)


@given(kind=st.sampled_from(sorted(DRAW_FUNCTIONS)), seed=st.integers(0, 10_000))
@settings(max_examples=25)
def test_colours_are_premultiplied_and_depend_on_the_seed_only(kind: str, seed: int) -> None:
    style = make_style(kind, seed)
    view, again = (draw_view(style, 64, np.random.default_rng(seed)) for _ in range(2))
    assert np.array_equal(view, again)
    colour, alpha = view[..., :3], view[..., 3]
    assert alpha.min() >= 0
    assert 0.05 < alpha.max() <= 1.0 + 1e-6
    assert (colour <= alpha[..., None] + 0.01).all()
    rgba = to_straight_u8(view).astype(np.float32) / 255.0
    over_white = rgba[..., :3] * rgba[..., 3:] + (1 - rgba[..., 3:])
    expected = colour + 1 - alpha[..., None]
    assert np.abs(over_white - expected)[alpha > 0.05].max() < 0.02


def test_coverage_is_the_mean_over_a_pixel() -> None:
    """A line of a quarter of a pixel's width covers a quarter of each pixel."""
    canvas = np.zeros((64, 64, 4), np.uint8)
    canvas[:, 21] = (200, 100, 0, 255)
    view = _average_down(canvas, 16)
    assert np.allclose(view[:, 5, 3], 0.25, atol=0.003)
    assert np.allclose(view[:, 5, :3] * 255, (50, 25, 0), atol=0.6)
    assert view[..., 3].sum() == pytest.approx(16 * 0.25, abs=0.05)


def test_hair_is_thin() -> None:
    style = dataclasses.replace(make_style("hair", 3), count=400, thickness_px=0.5)
    alpha = draw_view(style, 128, np.random.default_rng(0))[..., 3]
    partial = (alpha > 0.02) & (alpha < 0.98)
    assert partial.sum() > 300


def test_generated_folder_is_a_source(tmp_path: Path) -> None:
    main(tmp_path, groups=3, size=64, seed=7)
    files = sorted(tmp_path.rglob("*.png"))
    assert len(files) == 6
    first, second = (cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in files[:2])
    assert first.shape == (64, 64, 4)
    assert not np.array_equal(first, second)
    backgrounds = tmp_path / "behind"
    backgrounds.mkdir()
    cv2.imwrite(str(backgrounds / "grey.png"), np.full((64, 64, 3), 90, np.uint8))
    pool = read_pool(
        DataConfig((SourceConfig(dataset="cutouts", root=str(tmp_path), exclude=("behind/*",)),), (str(backgrounds),)),
    )
    assert len({item.group for item in pool}) == 3
