"""Metrics: golden values of the published code, a reference implementation, and properties."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from plain_metrics import plain_metrics

from icm_cli.options import MetricVariant
from icm_cli.reports.result import Scores
from icm_cli.scoring.metrics import compute_boundary_f, compute_dt_ssd, compute_jaccard, compute_scores

GOLDEN = np.load(Path(__file__).parent / "golden" / "metrics.npz")
CASES = range(4)
EXACT = 1e-9
METRIC_VARIANTS: tuple[MetricVariant, ...] = get_args(MetricVariant)

alpha = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two alphas of the same size: noise, or few levels so that components are large."""
    shape = draw(array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24))
    values = draw(st.sampled_from([st.integers(0, 255), st.sampled_from([0, 51, 128, 153, 255])]))
    return draw(arrays(np.uint8, shape, elements=values)), draw(arrays(np.uint8, shape, elements=values))


def case(i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return GOLDEN[f"{i}_pred"], GOLDEN[f"{i}_alpha"], GOLDEN[f"{i}_trimap"]


def four_scores(scores: Scores) -> list[float]:
    return [scores.mse, scores.sad, scores.grad, scores.conn]


@pytest.mark.parametrize("i", CASES)
def test_golden_composition(i: int) -> None:
    pred, truth, trimap = case(i)
    scores = compute_scores(pred, truth, "composition", trimap)
    np.testing.assert_allclose(four_scores(scores["whole"]), GOLDEN[f"{i}_whole"], rtol=EXACT)
    np.testing.assert_allclose(four_scores(scores["unknown"]), GOLDEN[f"{i}_unknown"], rtol=EXACT)


@pytest.mark.parametrize("i", CASES)
def test_golden_aim(i: int) -> None:
    pred, truth, _ = case(i)
    np.testing.assert_allclose(
        four_scores(compute_scores(pred, truth, "aim")["whole"]), GOLDEN[f"{i}_aim_whole"], rtol=EXACT
    )


@pytest.mark.parametrize("i", CASES)
def test_aim_scores_over_the_unknown_region(i: int) -> None:
    pred, truth, trimap = case(i)
    expected = plain_metrics(pred, truth, "aim", trimap == 128)
    np.testing.assert_allclose(four_scores(compute_scores(pred, truth, "aim", trimap)["unknown"]), expected, rtol=EXACT)


@settings(max_examples=60)
@given(pairs(), st.sampled_from(METRIC_VARIANTS))
def test_equal_to_the_reference_implementation(two: tuple[np.ndarray, np.ndarray], variant: MetricVariant) -> None:
    pred, truth = two
    expected = plain_metrics(pred, truth, variant, np.ones(pred.shape, bool))
    np.testing.assert_allclose(
        four_scores(compute_scores(pred, truth, variant)["whole"]), expected, rtol=1e-6, atol=1e-12
    )


@settings(max_examples=60)
@given(pairs(), st.sampled_from(METRIC_VARIANTS))
def test_floating_point_alphas_have_the_scores_of_8_bit_alphas(
    two: tuple[np.ndarray, np.ndarray], variant: MetricVariant
) -> None:
    floats = [each / 255.0 for each in two]
    assert compute_scores(*floats, variant) == compute_scores(*two, variant)
    assert compute_jaccard(*floats) == compute_jaccard(*two)
    assert compute_boundary_f(*floats) == compute_boundary_f(*two)


@given(alpha, st.sampled_from(METRIC_VARIANTS))
def test_scores_of_the_ground_truth_are_zero(truth: np.ndarray, variant: MetricVariant) -> None:
    assert dataclasses.astuple(compute_scores(truth, truth, variant)["whole"]) == (0, 0, 0, 0, 0)


@given(pairs(), st.sampled_from(METRIC_VARIANTS))
def test_symmetric_in_alpha_and_truth(two: tuple[np.ndarray, np.ndarray], variant: MetricVariant) -> None:
    a, b = two
    assert compute_scores(a, b, variant) == compute_scores(b, a, variant)


@given(pairs(), st.sampled_from(METRIC_VARIANTS))
def test_scores_are_not_negative_and_means_at_most_one(
    two: tuple[np.ndarray, np.ndarray], variant: MetricVariant
) -> None:
    scores = compute_scores(*two, variant)["whole"]
    assert all(value >= 0 for value in dataclasses.astuple(scores))
    assert scores.mse <= scores.mad <= 1
    assert scores.sad * 1000 == pytest.approx(scores.mad * two[0].size)


@given(pairs(), st.integers(2, 4))
def test_scores_of_enlarged_images(two: tuple[np.ndarray, np.ndarray], factor: int) -> None:
    """If pixels become blocks, MSE and MAD stay equal, and SAD and CONN grow with the area."""
    enlarged = [np.kron(each, np.ones((factor, factor), np.uint8)) for each in two]
    small, large = compute_scores(*two)["whole"], compute_scores(*enlarged)["whole"]
    assert large.mse == pytest.approx(small.mse)
    assert large.mad == pytest.approx(small.mad)
    assert large.sad == pytest.approx(factor**2 * small.sad)
    assert large.conn == pytest.approx(factor**2 * small.conn)


@given(pairs())
def test_mirrored_alphas_have_the_same_differences(two: tuple[np.ndarray, np.ndarray]) -> None:
    """CONN is excluded, because it depends on the order of equal components."""
    here, there = (
        compute_scores(*two)["whole"],
        compute_scores(*(np.ascontiguousarray(each[:, ::-1]) for each in two))["whole"],
    )
    for metric in ("mse", "sad", "mad", "grad"):
        assert getattr(here, metric) == pytest.approx(getattr(there, metric), abs=1e-12), metric


def test_a_region_without_pixels_has_no_score() -> None:
    flat = np.zeros((4, 5), np.uint8)
    assert set(compute_scores(flat, flat, trimap=flat)) == {"whole"}


def test_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 5\)"):
        compute_scores(np.zeros((4, 5), np.uint8), np.zeros((5, 4), np.uint8))


def test_variants_differ_if_the_background_is_the_largest_component() -> None:
    truth = np.zeros((60, 60), np.uint8)
    cv2.circle(truth, (30, 30), 9, 255, -1)
    pred = cv2.GaussianBlur(truth, (0, 0), 3)
    composition, aim = (compute_scores(pred, truth, variant)["whole"] for variant in METRIC_VARIANTS)
    assert composition.mse == aim.mse
    assert composition.conn != aim.conn
    assert composition.grad != aim.grad


def test_dt_ssd_of_a_known_flicker() -> None:
    still = np.full((3, 4), 100, np.uint8)
    flicker = still.copy()
    flicker[0, 0] = 151  # one pixel of twelve changes by a fifth
    assert compute_dt_ssd(flicker, still, still, still) == pytest.approx(100 * (0.2**2 / 12) ** 0.5)


@given(pairs())
def test_dt_ssd_is_zero_if_the_ground_truth_changes_equally(two: tuple[np.ndarray, np.ndarray]) -> None:
    assert compute_dt_ssd(two[0], two[1], two[0], two[1]) == 0
