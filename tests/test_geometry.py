"""Geometry: canvas placement and the return to the size of the source."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icm_cli.config import GuidedFilterConfig
from icm_cli.geometry import CanvasRule, Float, ImageU8, Placement, alpha_to_u8, distance_inside, resize
from icm_cli.guided_filter import alpha_at_source, guided_upsample

SIDES = st.integers(1, 6000)
RULES = st.sampled_from([CanvasRule(768, 768, square=True), CanvasRule(896, 32, square=False)])


def at_source(placement: Placement, alpha: Float, image: ImageU8) -> ImageU8:
    height, width = placement.content
    return alpha_to_u8(alpha_at_source(alpha[:height, :width], image, GuidedFilterConfig()))


def upsampled(alpha: Float, image: ImageU8) -> ImageU8:
    return alpha_to_u8(guided_upsample(alpha, image, GuidedFilterConfig()))


@given(RULES, SIDES, SIDES)
def test_frame_fits_on_the_canvas_with_its_aspect_ratio(rule: CanvasRule, height: int, width: int) -> None:
    placement = rule.placement(height, width)
    assert max(placement.content) == rule.long_side_px
    assert placement.content[0] <= placement.canvas[0]
    assert placement.content[1] <= placement.canvas[1]
    assert all(side % 32 == 0 for side in placement.canvas)
    scale = rule.long_side_px / max(height, width)
    assert abs(placement.content[0] - height * scale) <= 1
    assert abs(placement.content[1] - width * scale) <= 1


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.booleans())
def test_alpha_has_the_size_of_the_source(height: int, width: int, square: bool) -> None:
    placement = CanvasRule(96, 32, square=square).placement(height, width)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    alpha = at_source(placement, np.full(placement.canvas, 0.5, np.float32), image)
    assert alpha.shape == (height, width)
    assert alpha.dtype == np.uint8
    assert abs(alpha.astype(int) - 128).max() <= 1  # a constant alpha is unchanged for any image


@pytest.mark.parametrize(("height", "width"), [(50, 20000), (20000, 50), (1, 1)])
def test_extreme_shapes_have_a_placement(height: int, width: int) -> None:
    placement = CanvasRule(896, 32, square=False).placement(height, width)
    image = np.zeros((height, width, 3), np.uint8)
    assert placement.fit_to_canvas(image).shape == (*placement.canvas, 3)
    assert at_source(placement, np.ones(placement.canvas, np.float32), image).min() == 255


def test_padding_replicates_the_edge_and_is_not_valid() -> None:
    placement = CanvasRule(64, 64, square=True).placement(64, 40)
    image = np.random.default_rng(1).integers(0, 256, (64, 40, 3), np.uint8)
    canvas = placement.fit_to_canvas(image)
    assert (canvas[:, :40] == image).all()
    assert (canvas[:, 40:] == image[:, 39:40]).all()
    assert placement.content_mask().sum() == 64 * 40


def test_source_of_the_canvas_size_is_not_refined() -> None:
    placement = CanvasRule(64, 32, square=False).placement(64, 64)
    rng = np.random.default_rng(2)
    alpha = rng.random((64, 64), np.float32)
    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
    assert (at_source(placement, alpha, image) == np.floor(alpha * 255 + 0.5)).all()


def test_guided_upsampling_follows_edges_that_bilinear_blurs() -> None:
    """For a disc eight times larger than its alpha, the error is less than half that of bilinear
    scaling."""
    truth = np.zeros((800, 800), np.uint8)
    cv2.circle(truth, (410, 395), 230, 255, -1, cv2.LINE_AA)
    image = np.where(truth[..., None] > 127, np.uint8([200, 120, 40]), np.uint8([30, 60, 110]))
    image = cv2.GaussianBlur(image, (3, 3), 0.7)
    small = resize(truth.astype(np.float32) / 255, (100, 100))
    bilinear = cv2.resize(small, (800, 800), interpolation=cv2.INTER_LINEAR) * 255
    error = np.abs(upsampled(small, image).astype(float) - truth).mean()
    assert error < 0.5 * np.abs(bilinear - truth).mean()


def test_processing_in_strips_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (150, 130, 3), np.uint8)
    alpha = rng.random((30, 26), np.float32)
    complete = upsampled(alpha, image)
    monkeypatch.setattr("icm_cli.guided_filter.STRIP_PIXELS", 7 * 130)
    assert (upsampled(alpha, image) == complete).all()


def test_placement_equals_the_published_code() -> None:
    assert CanvasRule(768, 768, square=True).placement(1080, 1920) == Placement((1080, 1920), (432, 768), (768, 768))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [(100, 120), (400, 300)])
def test_distances_are_exact(size: tuple[int, int], threads: int) -> None:
    outside = np.random.default_rng(0).integers(0, size, (9, 2))
    inside = np.ones(size, np.bool_)
    inside[tuple(outside.T)] = False
    offsets = np.indices(size) - outside[:, :, None, None]
    exact = np.sqrt((offsets**2).sum(axis=1).min(axis=0)).astype(np.float32)
    opencv_threads, uses_ipp = cv2.getNumThreads(), cv2.ipp.useIPP()
    cv2.setNumThreads(threads)
    try:
        assert np.array_equal(distance_inside(inside), exact)
    finally:
        cv2.setNumThreads(opencv_threads)
    assert cv2.ipp.useIPP() == uses_ipp
