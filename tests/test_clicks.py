"""Simulated clicks of the stage "objects": where they are, which object they select, and what they change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from icm_cli.errors import ConfigError
from icm_cli.training.settings import ClickConfig
from icm_cli.training.stages.clicks import (
    Click,
    click_on_largest_error,
    corrupt_alpha,
    draw_box,
    draw_click,
    select_truth,
)

EXACT = ClickConfig(redundant_probability=0, jitter=0)
sizes = st.tuples(st.integers(1, 24), st.integers(1, 24))
seeds = st.integers(0, 2**32 - 1)


def random_masks(size: tuple[int, int], seed: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_], np.random.Generator]:
    rng = np.random.default_rng(seed)
    chance = rng.random(2)
    return rng.random(size) < chance[0], rng.random(size) < chance[1], rng


class TestLargestError:
    def test_click_is_at_the_centre_of_the_largest_error(self) -> None:
        truth, found = np.zeros((40, 60), bool), np.zeros((40, 60), bool)
        truth[10:31, 20:41] = True
        found[2:6, 2:6] = True
        assert click_on_largest_error(found, truth) == Click(20, 30, 1)
        assert click_on_largest_error(truth | found, truth) in {
            Click(row, column, 0) for row in (3, 4) for column in (3, 4)
        }
        assert click_on_largest_error(truth, truth) is None

    @given(sizes, seeds)
    def test_click_is_in_an_error(self, size: tuple[int, int], seed: int) -> None:
        found, truth, _ = random_masks(size, seed)
        click = click_on_largest_error(found, truth)
        if click is None:
            assert np.array_equal(found, truth)
        else:
            assert found[click.row, click.column] != truth[click.row, click.column] == bool(click.label)


class TestDrawnClicks:
    @given(sizes, seeds)
    def test_click_without_displacement_corrects_an_error(self, size: tuple[int, int], seed: int) -> None:
        found, truth, rng = random_masks(size, seed)
        click = draw_click(found, truth, EXACT, rng)
        assert truth[click.row, click.column] == bool(click.label)
        assert found[click.row, click.column] != truth[click.row, click.column] or np.array_equal(found, truth)

    @given(sizes, seeds)
    def test_displaced_click_stays_in_the_image(self, size: tuple[int, int], seed: int) -> None:
        found, truth, rng = random_masks(size, seed)
        click = draw_click(found, truth, replace(EXACT, jitter=0.5, miss_probability=1), rng)
        assert 0 <= click.row < size[0]
        assert 0 <= click.column < size[1]
        if not np.array_equal(found, truth):  # the label is that of the error, wherever the click is
            assert (found != truth)[truth == bool(click.label)].any()

    @given(sizes, seeds)
    def test_displaced_click_does_not_cross_an_edge_unless_it_may(self, size: tuple[int, int], seed: int) -> None:
        found, truth, rng = random_masks(size, seed)
        click = draw_click(found, truth, replace(EXACT, jitter=0.2, miss_probability=0), rng)
        assert truth[click.row, click.column] == bool(click.label)

    def test_some_clicks_are_on_the_wrong_side_of_an_edge(self) -> None:
        truth = np.zeros((30, 30), bool)
        truth[10:13] = True
        config = replace(EXACT, jitter=0.1, miss_probability=0.5)
        rng = np.random.default_rng(0)
        clicks = [draw_click(np.zeros_like(truth), truth, config, rng) for _ in range(200)]
        assert {click.label for click in clicks} == {1}
        assert 0.1 < np.mean([not truth[click.row, click.column] for click in clicks]) < 0.5

    @given(sizes, seeds)
    def test_redundant_click_confirms_what_is_right(self, size: tuple[int, int], seed: int) -> None:
        found, truth, rng = random_masks(size, seed)
        click = draw_click(found, truth, replace(EXACT, redundant_probability=1), rng)
        assert truth[click.row, click.column] == bool(click.label)

    @given(sizes, seeds)
    def test_box_is_in_the_image_and_near_the_object(self, size: tuple[int, int], seed: int) -> None:
        _, truth, rng = random_masks(size, seed)
        left, top, right, bottom = draw_box(truth, rng)
        assert 0 <= left <= right <= 1
        assert 0 <= top <= bottom <= 1


class TestSelection:
    def test_object_of_another_tile_is_selected(self) -> None:
        every = torch.zeros(4, 12)
        every[1:3, 1:3], every[1:3, 5:7] = 1, 1
        truth = every.clone()
        truth[:, 4:] = 0
        rng = np.random.default_rng(0)
        never, always = (replace(EXACT, other_object_probability=chance) for chance in (0, 1))
        assert select_truth(truth, every, (1, 3), never, rng) == (truth, False)
        selected, is_other = select_truth(truth, every, (1, 3), always, rng)
        assert is_other
        assert torch.equal(selected, every - truth)
        absent, is_other = select_truth(torch.zeros_like(truth), every, (1, 3), never, rng)
        assert is_other
        assert absent.sum() == 4

    def test_corruption_adds_and_removes_regions(self) -> None:
        alpha = torch.zeros(48, 48)
        alpha[:, 24:] = 1
        changed = [
            (corrupt_alpha(alpha, EXACT, np.random.default_rng(seed)) > 0.5) != (alpha > 0.5) for seed in range(30)
        ]
        share = torch.stack(changed).float().mean(dim=(0, 1))
        assert share[:24].mean() > 0.01
        assert share[24:].mean() > 0.01
        assert torch.allclose(
            corrupt_alpha(alpha, replace(EXACT, corruption_logit=0), np.random.default_rng(0)), alpha, atol=0.02
        )

    def test_weights_that_are_all_zero_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="train: clicks: count_weights is"):
            ClickConfig(count_weights=(0.0, 0.0))
