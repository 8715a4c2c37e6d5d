"""A point off the object removes what it marks as a whole: another object, or a false part of the same region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import model_choice

from icm_cli.geometry import Float
from icm_cli.guidance.hints import Hints
from icm_cli.matting.false_objects import FalseObjects, find_false_objects
from icm_cli.matting.hinting import make_prompts
from icm_cli.matting.predictor import Predictor
from icm_cli.matting.prompting import ImageEmbedder, complete_by_prompts
from icm_cli.model.alphas import resize_alpha

SIZE = (40, 80)


@dataclass
class Selector:
    """A decoder that selects the same everywhere."""

    selection: Float

    def complete_embedded_alphas(self, *_: Any) -> list[torch.Tensor]:
        return [torch.from_numpy(self.selection)]


def rectangle(top: int, left: int, bottom: int, right: int) -> Float:
    alpha = np.zeros(SIZE, np.float32)
    alpha[top:bottom, left:right] = 1
    return alpha


LEFT, RIGHT = rectangle(10, 5, 30, 35), rectangle(10, 50, 30, 75)


def find(alpha: Float, selection: Float, not_point: tuple[float, float], *points: tuple[float, float]) -> Any:
    hints = Hints(size=(2 * SIZE[0], 2 * SIZE[1]), not_points=[not_point], points=points)
    objects: Any = Selector(selection)
    return find_false_objects(objects, None, torch.from_numpy(alpha), hints)  # type: ignore[arg-type]


def test_a_region_next_to_another_one_is_false_as_a_whole() -> None:
    found: FalseObjects = find(LEFT + RIGHT, rectangle(10, 50, 30, 70), (125, 40))
    assert (found.regions[RIGHT > 0] == 1).all()
    assert not found.regions[LEFT > 0].any()
    assert not found.parts.any()
    assert np.array_equal(found.remove_from(torch.from_numpy(LEFT + RIGHT)).numpy(), LEFT)


@pytest.mark.parametrize(
    ("alpha", "selection", "points"),
    [
        pytest.param(RIGHT, RIGHT, [(125, 40)], id="nothing would remain"),
        pytest.param(RIGHT, RIGHT, [(125, 40), (15, 15)], id="nothing would remain, with a point on the object"),
        pytest.param(LEFT + RIGHT, RIGHT, [(125, 40), (110, 30)], id="it has a point on the object"),
        pytest.param(LEFT + RIGHT, RIGHT, [(102, 40)], id="the point is at its border"),
        pytest.param(LEFT + RIGHT, RIGHT, [(85, 40)], id="the point is outside of the alpha"),
        pytest.param(LEFT + RIGHT, LEFT, [(125, 40)], id="the selection is something else"),
    ],
)
def test_what_is_not_false(alpha: Float, selection: Float, points: list[tuple[float, float]]) -> None:
    assert find(alpha, selection, *points) is None


def test_a_selected_part_of_a_region_is_false() -> None:
    whole = rectangle(10, 5, 30, 75)
    found: FalseObjects = find(whole, 0.75 * RIGHT, (125, 40), (40, 40))
    assert not found.regions.any()
    np.testing.assert_allclose(found.remove_from(torch.from_numpy(whole)).numpy(), whole - 0.75 * RIGHT)


@pytest.mark.parametrize("left", [5, 45], ids=["the larger piece", "the smaller piece"])
def test_only_the_connected_piece_of_a_selection_at_the_point_is_false(left: int) -> None:
    whole, pieces = rectangle(10, 5, 30, 75), {5: rectangle(10, 5, 30, 35), 45: rectangle(12, 45, 17, 50)}
    points = {5: (40, 40), 45: (95, 29)}
    selection = np.maximum(0.4 * whole, sum(pieces.values()))
    found: FalseObjects = find(whole, selection, points[left], (140, 40))
    assert not found.regions.any()
    remaining = found.remove_from(torch.from_numpy(whole)).numpy()
    assert (remaining[pieces[left] > 0] == 0).all()
    margin = cv2.dilate(pieces[left], np.ones((5, 5), np.uint8)) > 0
    assert np.array_equal(remaining[~margin], whole[~margin])


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return model_choice("lite").load_predictor()


@pytest.mark.slow
@pytest.mark.parametrize("centre", [(190, 100), (145, 100)], ids=["separate", "connected"])
def test_lite_removes_the_second_object(predictor: Predictor, centre: tuple[int, int]) -> None:
    rgb = np.full((200, 260, 3), 60, np.uint8)
    first, second = np.zeros((2, *rgb.shape[:2]), np.uint8)
    cv2.circle(second, centre, 34, 1, -1)
    cv2.circle(first, (80, 100), 40, 1, -1)
    second[first > 0] = 0
    rgb[first > 0], rgb[second > 0] = (230, 90, 40), (50, 160, 220)
    coarse = torch.from_numpy(cv2.GaussianBlur(((first | second) * 255).astype(np.uint8), (0, 0), 3) / np.float32(255))
    objects = predictor.prompted_objects
    embedder = ImageEmbedder(objects, rgb)
    (before,) = objects.complete_embedded_alphas([embedder.image], [coarse])
    assert resize_alpha(before, rgb.shape[:2]).numpy()[second > 0].mean() > 0.9
    hints = Hints(size=rgb.shape[:2], not_points=[(centre[0] + 4, centre[1])])
    prompts = make_prompts(hints)
    assert prompts is not None
    alpha = resize_alpha(complete_by_prompts(embedder, coarse, hints, prompts), rgb.shape[:2]).numpy()
    inside = cv2.erode(second, np.ones((9, 9), np.uint8)) > 0
    assert alpha[inside].mean() < 0.02
    assert alpha[first > 0].mean() > 0.95
