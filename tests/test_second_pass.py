"""Second pass over a crop, for images in which the presence of the object is uncertain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COMPOSITES

import icm_cli
from icm_cli.config import MatchConfig, SecondPassConfig
from icm_cli.geometry import CanvasRule
from icm_cli.images.reading import read_alpha, read_image
from icm_cli.matting.predictor import CoarseAlpha, Frame, FrameAlpha, Predictor
from icm_cli.model.alphas import resize_alpha

SIZE = (240, 320)
UNCERTAIN_BELOW = 3.0
"""Presence logits closer to 0 are uncertain."""


@dataclass
class ColourPredictor(Predictor):
    """A predictor whose object is red in a full frame and green in a crop, with given presence logits.

    Its objects and edges change nothing.
    """

    full_logit: float
    crop_logit: float
    has_edges: bool = True

    def __post_init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []
        objects = SimpleNamespace(complete_alphas=lambda _, coarse: list(coarse))
        edges = SimpleNamespace(
            refine_alphas=lambda images, alphas: [
                resize_alpha(alpha, rgb.shape[:2]) for rgb, alpha in zip(images, alphas, strict=True)
            ]
        )
        self.model: Any = SimpleNamespace(
            objects=objects,
            edges=edges if self.has_edges else None,
            backbone=SimpleNamespace(canvas=CanvasRule(160, 32, square=False)),
            second_pass=SecondPassConfig(),
            match=MatchConfig(),
        )

    def coarse_alphas(self, frames: Sequence[Frame], reference: Any) -> list[CoarseAlpha]:  # noqa: ARG002
        self.sizes += [frame.size for frame in frames]
        return [self.coarse_alpha(frame) for frame in frames]

    def coarse_alpha(self, frame: Frame) -> CoarseAlpha:
        is_full = frame.size == SIZE
        logit = self.full_logit if is_full else self.crop_logit
        height, width = frame.placement.content
        alpha = torch.from_numpy((frame.canvas[:height, :width, 0 if is_full else 1] > 127).astype(np.float32))
        return CoarseAlpha(
            alpha / (1 + np.exp(-logit)),
            logit > 0,
            presence_logit=logit,
            alpha_if_present=alpha if abs(logit) < UNCERTAIN_BELOW else None,
        )

    def matte_rgb(self, rgb: np.ndarray) -> FrameAlpha:
        return self.matte_frames([self.prepare_frame(rgb)], None)[0]  # type: ignore[arg-type]


def draw_scene(side: int = 60) -> np.ndarray:
    """A red square with a green one in its middle."""
    rgb = np.zeros((*SIZE, 3), np.uint8)
    rgb[80 : 80 + side, 160 : 160 + side, 0] = 255
    rgb[80 + side // 3 : 80 + 2 * side // 3, 160 + side // 3 : 160 + 2 * side // 3, 1] = 255
    return rgb


@pytest.mark.parametrize(
    ("full", "crop", "channel"),
    [(-1.0, 4.0, 1), (1.0, 2.0, 1), (2.0, 1.0, 0), (2.5, -1.0, 0), (1.0, -4.0, None), (-1.0, 0.5, None)],
)
def test_logits_are_averaged_and_the_more_confident_pass_wins(full: float, crop: float, channel: int | None) -> None:
    rgb = draw_scene()
    predictor = ColourPredictor(full, crop)
    result = predictor.matte_rgb(rgb)
    assert [predictor.sizes[0], len(predictor.sizes)] == [SIZE, 2]
    assert max(predictor.sizes[1]) < 120
    assert result.alpha.shape == SIZE
    assert result.found == (channel is not None)
    expected = rgb[..., channel or 0] / 255.0 / (1 + np.exp(-(full + crop) / 2))
    outside = rgb.max(axis=2) == 0
    assert result.alpha[outside].mean() < 0.01
    if channel is not None:
        assert np.abs(result.alpha - expected).mean() < 0.01
    else:
        assert result.alpha.max() < 0.5


@pytest.mark.parametrize("logit", [UNCERTAIN_BELOW, -UNCERTAIN_BELOW, 9.0])
def test_a_certain_presence_needs_one_pass(logit: float) -> None:
    predictor = ColourPredictor(logit, 9.0)
    result = predictor.matte_rgb(draw_scene())
    assert predictor.sizes == [SIZE]
    assert result.found == (logit > 0)


def test_an_object_that_fills_the_frame_or_is_absent_needs_one_pass() -> None:
    for rgb in (np.full((*SIZE, 3), 255, np.uint8), np.zeros((*SIZE, 3), np.uint8)):
        predictor = ColourPredictor(1.0, 9.0)
        predictor.matte_rgb(rgb)
        assert predictor.sizes == [SIZE]
    predictor = ColourPredictor(1.0, 9.0, has_edges=False)
    assert predictor.matte_rgb(draw_scene()).alpha.shape == (120, 160)
    assert predictor.sizes == [SIZE]


def test_frames_of_a_batch_are_decided_one_by_one() -> None:
    predictor = ColourPredictor(1.0, 4.0)
    images = [draw_scene(), np.zeros((*SIZE, 3), np.uint8), draw_scene(side=30)]
    results = predictor.matte_frames([predictor.prepare_frame(rgb) for rgb in images], None)  # type: ignore[arg-type]
    for rgb, result in zip(images, results, strict=True):
        alone = ColourPredictor(1.0, 4.0).matte_rgb(rgb)
        np.testing.assert_array_equal(result.alpha, alone.alpha)
        assert result.found == alone.found


def test_a_crop_that_cuts_the_object_is_enlarged() -> None:
    rgb = np.zeros((*SIZE, 3), np.uint8)
    rgb[100:130, 150:180, 0] = 255
    rgb[100:130, 150:200, 1] = 255
    predictor = ColourPredictor(1.0, 9.0)
    result = predictor.matte_rgb(rgb)
    assert len(predictor.sizes) == 3
    assert predictor.sizes[1] < predictor.sizes[2]
    assert np.abs(result.alpha - rgb[..., 1] / 255.0 / (1 + np.exp(-5.0))).mean() < 0.01


def test_a_crop_without_an_object_only_changes_the_presence() -> None:
    rgb = draw_scene()
    rgb[..., 1] = 0
    result = ColourPredictor(1.0, 2.0).matte_rgb(rgb)
    assert np.abs(result.alpha - rgb[..., 0] / 255.0 / (1 + np.exp(-1.5))).mean() < 0.01


@pytest.mark.slow
def test_lite_makes_a_second_pass_if_it_is_uncertain(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = icm_cli.load(device="cpu")
    reference = predictor.reference([(read_image(COMPOSITES / "ref.jpg").rgb, read_alpha(COMPOSITES / "mask.png"))])
    sizes: list[tuple[int, ...]] = []
    coarse_alphas = Predictor.coarse_alphas

    def counted(self: Predictor, frames: Sequence[Frame], reference: Any) -> list[CoarseAlpha]:
        sizes.extend(frame.size for frame in frames)
        return coarse_alphas(self, frames, reference)

    monkeypatch.setattr(Predictor, "coarse_alphas", counted)
    rgb = read_image(sorted((COMPOSITES / "imgs").glob("*.jpg"))[0]).rgb
    certain = predictor.matte(rgb, reference)
    assert len(sizes) == 1
    head: Any = predictor.model.head
    monkeypatch.setattr(head, "config", type(head.config)(**{**vars(head.config), "presence_margin": 19.0}))
    uncertain = predictor.matte(rgb, reference)
    assert len(sizes) == 3
    assert sizes[2] < sizes[1]
    either = (certain > 127) | (uncertain > 127)
    assert ((certain > 127) & (uncertain > 127)).sum() > 0.9 * either.sum()
