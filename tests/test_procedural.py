"""Procedural foregrounds: exact coverage, same seed same picture, views of one thing, as a source of training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icm_cli.training.data.pool import read_pool
from icm_cli.training.data.procedural import DRAW_FUNCTIONS, ObjectStyle, _average_down, draw_view, main
from icm_cli.training.settings import DataConfig, PairConfig, SourceConfig


def a_look(kind: str, seed: int) -> ObjectStyle:
    return dataclasses.replace(ObjectStyle.draw_random(np.random.default_rng(seed)), kind=kind, count=80)


@given(kind=st.sampled_from(sorted(DRAW_FUNCTIONS)), seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_colours_are_premultiplied_and_the_seed_decides(kind: str, seed: int) -> None:
    look = a_look(kind, seed)
    thing, again = (draw_view(look, 64, np.random.default_rng(seed)) for _ in range(2))
    assert np.array_equal(thing.colour, again.colour)
    assert np.array_equal(thing.alpha, again.alpha)
    assert thing.alpha.min() >= 0
    assert 0.05 < thing.alpha.max() <= 1.0 + 1e-6
    assert (thing.colour <= thing.alpha[..., None] + 0.01).all()
    rgba = thing.to_straight_u8().astype(np.float32) / 255.0
    over_white = rgba[..., :3] * rgba[..., 3:] + (1 - rgba[..., 3:])
    expected = thing.colour + 1 - thing.alpha[..., None]
    assert np.abs(over_white - expected)[thing.alpha > 0.05].max() < 0.02


def test_coverage_is_the_mean_of_the_cell() -> None:
    """A line one quarter of a pixel wide covers a quarter of each pixel it crosses."""
    canvas, mask = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    mask[:, 21] = 255
    canvas[:, 21] = (200, 100, 0)
    thing = _average_down(canvas, mask, 16)
    assert np.allclose(thing.alpha[:, 5], 0.25, atol=0.003)
    assert np.allclose(thing.colour[:, 5] * 255, (50, 25, 0), atol=0.6)
    assert thing.alpha.sum() == pytest.approx(16 * 0.25, abs=0.05)


def test_hair_is_fine() -> None:
    thing = draw_view(
        dataclasses.replace(a_look("hair", 3), count=400, thickness_px=0.5), 128, np.random.default_rng(0)
    )
    partial = (thing.alpha > 0.02) & (thing.alpha < 0.98)
    assert partial.sum() > 300


def test_a_folder_of_them_is_a_source(tmp_path: Path) -> None:
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
        PairConfig(),
    )
    assert len({item.group for item in pool}) == 3
