"""Pictures of which it is in doubt whether they show the thing: a look from near by has a vote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import DEMO

import icm_cli
from icm_cli.geometry import CanvasRule, resize
from icm_cli.images.reading import read_alpha, read_image
from icm_cli.matting.predictor import CanvasMatte, Frame, Predictor

SIZE = (240, 320)
REACH = 3.0
"""Logits nearer to 0 are in doubt."""


@dataclass
class Eyes(Predictor):
    """A predictor that takes what is red for the thing in a whole picture, and what is green in a crop of one, is as
    sure of its being there as it is told, and has objects and edges that change nothing."""

    whole: float
    crop: float
    has_edges: bool = True

    def __post_init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []
        objects = SimpleNamespace(completed=lambda _, coarse: coarse)
        edges = SimpleNamespace(refined=lambda rgb, alpha: resize(alpha, rgb.shape[:2]))
        canvas = CanvasRule(160, 32, square=False)
        self.model: Any = SimpleNamespace(
            objects=objects, edges=edges if self.has_edges else None, backbone=SimpleNamespace(canvas=canvas)
        )

    def coarse(self, frames: Sequence[Frame], reference: Any) -> list[CanvasMatte]:  # noqa: ARG002
        self.seen += [frame.rgb.shape[:2] for frame in frames]
        return [self.looked(frame) for frame in frames]

    def looked(self, frame: Frame) -> CanvasMatte:
        is_whole = frame.rgb.shape[:2] == SIZE
        presence = self.whole if is_whole else self.crop
        alpha = (frame.canvas[..., 0 if is_whole else 1] > 127).astype(np.float32)
        shown = alpha / np.float32(1 + np.exp(-presence))
        return CanvasMatte(
            shown, 0.9, presence > 0, presence=presence, if_there=alpha if abs(presence) < REACH else None
        )

    def found(self, rgb: np.ndarray) -> CanvasMatte:
        return self.infer([self.prepare(rgb)], None)[0]  # type: ignore[arg-type]


def scene_of(side: int = 60) -> np.ndarray:
    """A red square, and in the middle of it a green one."""
    rgb = np.zeros((*SIZE, 3), np.uint8)
    rgb[80 : 80 + side, 160 : 160 + side, 0] = 255
    rgb[80 + side // 3 : 80 + 2 * side // 3, 160 + side // 3 : 160 + 2 * side // 3, 1] = 255
    return rgb


@pytest.mark.parametrize(
    ("whole", "crop", "channel"),
    [(-1.0, 4.0, 1), (1.0, 2.0, 1), (2.0, 1.0, 0), (2.5, -1.0, 0), (1.0, -4.0, None), (-1.0, 0.5, None)],
)
def test_both_looks_vote_and_the_surer_one_says_what_it_is(whole: float, crop: float, channel: int | None) -> None:
    rgb = scene_of()
    eyes = Eyes(whole, crop)
    matte = eyes.found(rgb)
    assert [eyes.seen[0], len(eyes.seen)] == [SIZE, 2]
    assert max(eyes.seen[1]) < 120
    assert matte.is_refined
    assert matte.found == (channel is not None)
    expected = rgb[..., channel or 0] / 255.0 / (1 + np.exp(-(whole + crop) / 2))
    outside = rgb.max(axis=2) == 0
    assert matte.alpha[outside].mean() < 0.01
    if channel is not None:
        assert np.abs(matte.alpha - expected).mean() < 0.01
    else:
        assert matte.alpha.max() < 0.5


@pytest.mark.parametrize("whole", [REACH, -REACH, 9.0])
def test_where_there_is_no_doubt_one_look_is_enough(whole: float) -> None:
    eyes = Eyes(whole, 9.0)
    matte = eyes.found(scene_of())
    assert eyes.seen == [SIZE]
    assert matte.found == (whole > 0)


def test_what_fills_the_picture_or_is_nowhere_is_looked_at_once() -> None:
    for rgb in (np.full((*SIZE, 3), 255, np.uint8), np.zeros((*SIZE, 3), np.uint8)):
        eyes = Eyes(1.0, 9.0)
        eyes.found(rgb)
        assert eyes.seen == [SIZE]
    eyes = Eyes(1.0, 9.0, has_edges=False)
    assert not eyes.found(scene_of()).is_refined
    assert eyes.seen == [SIZE]


def test_a_crop_that_cuts_the_thing_is_made_wider() -> None:
    rgb = np.zeros((*SIZE, 3), np.uint8)
    rgb[100:130, 150:180, 0] = 255
    rgb[100:130, 150:200, 1] = 255
    eyes = Eyes(1.0, 9.0)
    matte = eyes.found(rgb)
    assert len(eyes.seen) == 3
    assert eyes.seen[1] < eyes.seen[2]
    assert np.abs(matte.alpha - rgb[..., 1] / 255.0 / (1 + np.exp(-5.0))).mean() < 0.01


def test_a_crop_that_shows_nothing_only_votes() -> None:
    rgb = scene_of()
    rgb[..., 1] = 0
    matte = Eyes(1.0, 2.0).found(rgb)
    assert np.abs(matte.alpha - rgb[..., 0] / 255.0 / (1 + np.exp(-1.5))).mean() < 0.01


@pytest.mark.slow
def test_lite_looks_again_where_it_doubts(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = icm_cli.load(device="cpu")
    thing = predictor.reference([(read_image(DEMO / "ref.jpg").rgb, read_alpha(DEMO / "mask.png"))])
    looks: list[tuple[int, ...]] = []
    coarse = Predictor.coarse

    def counted(self: Predictor, frames: Sequence[Frame], reference: Any) -> list[CanvasMatte]:
        looks.extend(frame.rgb.shape[:2] for frame in frames)
        return coarse(self, frames, reference)

    monkeypatch.setattr(Predictor, "coarse", counted)
    rgb = read_image(sorted((DEMO / "imgs").glob("*.jpg"))[0]).rgb
    sure = predictor.matte(rgb, thing)
    assert len(looks) == 1
    head: Any = predictor.model.head
    monkeypatch.setattr(head, "config", type(head.config)(**{**vars(head.config), "doubt": 19.0}))
    again = predictor.matte(rgb, thing)
    assert len(looks) == 3
    assert looks[2] < looks[1]
    either = (sure > 127) | (again > 127)
    assert ((sure > 127) & (again > 127)).sum() > 0.9 * either.sum()
