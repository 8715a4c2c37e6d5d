"""Hints about an image: its alpha follows them, whatever the model computes."""

from __future__ import annotations

import functools
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from conftest import model_choice
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from icm_cli.errors import UsageError
from icm_cli.geometry import Float, alpha_to_u8
from icm_cli.guidance.hints import Area, Hints, area_points
from icm_cli.images.pixels import ImageWindows
from icm_cli.matting.hinting import (
    BORDER_PX,
    apply_hints_to_alpha,
    apply_hints_to_trimap,
    clip_to_boxes,
    edit_coarse_alpha,
    make_prompts,
    move_hints,
    says_present,
)
from icm_cli.matting.predictor import Frame, Predictor
from icm_cli.matting.prompting import MAX_CROP_FRACTION, find_zoom_box
from icm_cli.model.alphas import resize_alpha
from icm_cli.model.contracts import Matte, Presence

SIZES = st.tuples(st.integers(1, 24), st.integers(1, 24))


@st.composite
def hints_and_alphas(draw: st.DrawFn) -> tuple[Hints, Float]:
    """Hints that do not contradict each other, and an alpha with many values near one half."""
    height, width = size = draw(SIZES)
    pixels = st.tuples(st.integers(0, height - 1), st.integers(0, width - 1))
    drawn = draw(st.lists(pixels, unique=True, max_size=6))
    side = draw(st.lists(st.booleans(), min_size=len(drawn), max_size=len(drawn)))
    keep, drop, on, off = (draw(arrays.arrays(np.bool_, size, fill=st.just(False))) for _ in range(4))
    keep &= ~drop
    off &= ~on
    for pixel, is_on in zip(drawn, side, strict=True):
        (drop if is_on else keep)[pixel] = False
        (off if is_on else on)[pixel] = False
    centres = [(column + 0.5, row + 0.5) for row, column in drawn]
    hints = Hints(
        size=size,
        points=[point for point, is_on in zip(centres, side, strict=True) if is_on],
        not_points=[point for point, is_on in zip(centres, side, strict=True) if not is_on],
        **{name: area for name, area in (("keep", keep), ("drop", drop)) if area.any()},
        object_area=on,
        background_area=off,
    )
    values = st.sampled_from([0.0, 0.3, 127 / 255, 0.499999, 0.5, 0.500001, 128 / 255, 0.7, 1.0])
    return hints, draw(arrays.arrays(np.float32, size, elements=values.map(np.float32).map(float), fill=values))


def pixels_that_hold(hints: Hints) -> tuple[Area, Area]:
    """Return the pixels on and off the object by the areas of hints: all of them, or the points of a rough mask."""
    on, off = hints.object_area, hints.background_area
    assert on is not None
    assert off is not None
    if hints.is_rough_mask:
        sampled = np.zeros((2, *hints.size), np.bool_)
        for side, area in zip(sampled, (on, off), strict=True):
            for x, y in area_points(area):
                side[int(y), int(x)] = True
        on, off = sampled
    single = np.zeros(hints.size, np.bool_)
    for x, y in (*hints.points, *hints.not_points):
        single[int(y), int(x)] = True
    for area in (hints.keep, hints.drop):
        single |= False if area is None else area
    return on & ~single, off & ~single


@given(hints_and_alphas())
@settings(max_examples=150)
def test_points_and_areas_hold_in_the_bound_alpha(case: tuple[Hints, Float]) -> None:
    hints, alpha = case
    before = alpha.copy()
    bound = apply_hints_to_alpha(alpha, hints)
    on, off = pixels_that_hold(hints)
    assert np.array_equal(alpha, before)
    assert bound.dtype == np.float32
    assert 0 <= bound.min() <= bound.max() <= 1
    for written in (bound, alpha_to_u8(bound) / 255, bound.astype(np.float16), np.round(bound * 65535) / 65535):
        for x, y in hints.points:
            assert written[int(y), int(x)] > 0.5
        for x, y in hints.not_points:
            assert written[int(y), int(x)] < 0.5
        assert (written[on] > 0.5).all()
        assert (written[off] < 0.5).all()
    none = np.zeros(hints.size, np.bool_)
    keep, drop = (none if area is None else area for area in (hints.keep, hints.drop))
    assert (bound[keep] == 1).all()
    assert (bound[drop] == 0).all()
    touched = keep | drop | on | off
    for x, y in (*hints.points, *hints.not_points):
        touched[int(y), int(x)] = True
    distance = cv2.distanceTransform((~touched).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    far = distance >= BORDER_PX if touched.any() else np.ones(hints.size, np.bool_)
    assert np.array_equal(bound[far], alpha[far])
    assert np.array_equal(apply_hints_to_alpha(bound, hints), bound), "what is bound stays as it is"


def test_a_point_that_holds_changes_nothing() -> None:
    alpha = np.full((9, 9), 0.8, np.float32)
    assert np.array_equal(apply_hints_to_alpha(alpha, Hints(size=(9, 9), points=[(4.5, 4.5)])), alpha)


def test_a_correction_is_small_and_soft() -> None:
    bound = apply_hints_to_alpha(np.zeros((20, 20), np.float32), Hints(size=(20, 20), points=[(10.2, 10.9)]))
    assert bound[10, 10] == 1
    assert (bound > 0).sum() < 30
    assert np.abs(np.diff(bound[10])).max() < 0.4


def test_a_line_holds_as_a_whole_with_a_soft_border() -> None:
    line = np.zeros((20, 40), np.bool_)
    line[9:12, 5:35] = True
    for name, value in (("object_area", 1.0), ("background_area", 0.0)):
        hints = Hints(size=(20, 40), **{name: line}, is_outlined=True)
        bound = apply_hints_to_alpha(np.full((20, 40), 1 - value, np.float32), hints)
        assert (bound[line] == value).all()
        np.testing.assert_allclose(np.abs(bound[6:10, 20] - (1 - value)), [0, 1 / 3, 2 / 3, 1], atol=1e-6)
        holds = np.full((20, 40), 0.6 if value else 0.4, np.float32)
        assert np.array_equal(apply_hints_to_alpha(holds, hints), holds)


def test_the_edge_of_a_rough_mask_does_not_bind() -> None:
    left = np.zeros((40, 40), np.bool_)
    left[:, :20] = True
    alpha = np.zeros((40, 40), np.float32)
    alpha[:, :15] = 1
    for unmarked in (0, 1):
        hints = Hints(size=(40, 40), object_area=left, background_area=~left & (np.arange(40) >= 20 + unmarked))
        bound = apply_hints_to_alpha(alpha, hints)
        assert np.array_equal(bound, alpha)
    strokes = Hints(size=(40, 40), object_area=left, background_area=~left & (np.arange(40) >= 30))
    assert (apply_hints_to_alpha(alpha, strokes)[left] > 0.5).all()


def test_border_of_an_area_is_soft() -> None:
    area = np.zeros((20, 20), np.bool_)
    area[5:15, 5:15] = True
    for name, value in (("keep", 1.0), ("drop", 0.0)):
        bound = apply_hints_to_alpha(np.full((20, 20), 1 - value, np.float32), Hints(size=(20, 20), **{name: area}))
        assert (bound[area] == value).all()
        np.testing.assert_allclose(np.abs(bound[10, :6] - (1 - value)), [0, 0, 0, 1 / 3, 2 / 3, 1], atol=1e-6)


def test_areas_edit_the_coarse_alpha() -> None:
    left, right = np.zeros((40, 40), np.bool_), np.zeros((40, 40), np.bool_)
    left[:, :10], right[:, 30:] = True, True
    edited = edit_coarse_alpha(torch.full((4, 4), 0.5), Hints(size=(40, 40), object_area=left, background_area=right))
    assert edited.tolist() == [[1.0, 0.5, 0.5, 0.0]] * 4


def test_prompts_are_fractions_of_the_frame() -> None:
    hints = Hints(
        size=(50, 100), points=[(30, 10)], not_points=[(100 - 1, 25)], boxes=[(60, 40, 20, 5), (0, 30, 9, 50)]
    )
    prompts = make_prompts(hints)
    assert prompts is not None
    assert prompts.labels.tolist() == [1, 0, 2, 3]
    expected = [[0.3, 0.2], [0.99, 0.5], [0, 0.1], [0.6, 1]]
    torch.testing.assert_close(prompts.coordinates, torch.tensor(expected))
    assert make_prompts(Hints(size=(5, 5), keep=np.ones((5, 5), np.bool_))) is None


def test_a_box_clips_what_it_selects() -> None:
    hints = Hints(size=(100, 200), boxes=[(100, 40, 60, 20), (140, 60, 120, 50)])  # together 60,20 to 140,60
    clipped = clip_to_boxes(torch.ones(50, 100), hints)
    assert (clipped[8:32, 28:72] == 1).all()
    assert clipped[17, 26:29].tolist() == pytest.approx([0.25, 0.75, 1], abs=1e-6)
    outside = torch.ones(50, 100, dtype=torch.bool)
    outside[6:34, 26:74] = False
    assert (clipped[outside] == 0).all()
    assert clip_to_boxes(clipped, Hints(size=(100, 200), points=[(1, 1)])) is clipped


def test_a_point_wins_over_a_rough_mask() -> None:
    left = np.zeros((40, 40), np.bool_)
    left[:, :20] = True
    hints = Hints(size=(40, 40), object_area=left, background_area=~left, points=[(30, 9)], not_points=[(10, 30)])
    bound = apply_hints_to_alpha(left.astype(np.float32), hints)
    assert (bound[9, 30], bound[30, 10]) == (1, 0)
    with pytest.raises(UsageError, match="point 10,30 is off the object and in a stroke or an area on it"):
        replace(hints, background_area=None)


def test_points_hold_in_the_trimap() -> None:
    keep = np.zeros((40, 40), np.bool_)
    keep[30:] = True
    hints = Hints(size=(40, 40), points=[(10.5, 3)], not_points=[(20, 3)], keep=keep)
    bound = apply_hints_to_trimap(np.full((40, 40), 128, np.uint8), hints)
    assert (bound[3, 10], bound[3, 20], bound[3, 15]) == (255, 0, 128)
    assert (bound[30:] == 255).all()


@given(hints_and_alphas(), st.floats(0.0, 0.3))
@settings(max_examples=60)
def test_a_crop_contains_what_is_on_the_object(case: tuple[Hints, Float], threshold: float) -> None:
    """So its hints can be moved into it. Hints of 16 times the size have crops that are smaller than the image."""
    small, alpha = case
    large = replace(
        small,
        size=(16 * small.size[0], 16 * small.size[1]),
        points=[(16 * x, 16 * y) for x, y in small.points],
        not_points=[(16 * x, 16 * y) for x, y in small.not_points],
        **{
            name: area if area is None else area.repeat(16, 0).repeat(16, 1)
            for name in ("object_area", "background_area", "keep", "drop")
            for area in [getattr(small, name)]
        },
    )
    found = torch.from_numpy(alpha * threshold) + (0.5 if threshold > 0.2 else 0.0)
    box = find_zoom_box(found, large)
    if box is None:
        return
    assert max(box.size) <= MAX_CROP_FRACTION * max(large.size)
    moved = move_hints(large, ImageWindows(box.size, (box.rows.start, box.columns.start), large.size))
    assert len(moved.points) == len(large.points)
    inside = np.zeros(large.size, np.bool_)
    inside[box.slices] = True
    for area in (large.object_area, large.keep):
        assert area is None or not (area & ~inside).any()
    assert not (resize_alpha(found, large.size).numpy() > 0.5)[~inside].any()


def test_a_crop_changes_rarely() -> None:
    alpha = torch.zeros(64, 64)
    alpha[20:24, 30:36] = 1
    boxes = {repr(find_zoom_box(alpha, Hints(size=(640, 640), points=[(310 + n, 215)]))) for n in range(20)}
    assert len(boxes) == 1
    alpha[:, 10:50] = 1
    assert find_zoom_box(alpha, Hints(size=(640, 640), points=[(310, 215)])) is None


def test_what_says_that_the_object_is_present() -> None:
    area, none = np.ones((5, 5), np.bool_), np.zeros((5, 5), np.bool_)
    for positive in ({"points": [(1, 1)]}, {"boxes": [(1, 1, 3, 3)]}, {"object_area": area}, {"keep": area}):
        assert says_present(Hints(size=(5, 5), **positive))
    for negative in ({"not_points": [(1, 1)]}, {"background_area": area}, {"drop": area}, {"object_area": none}):
        assert not says_present(Hints(size=(5, 5), **negative))


def test_hints_are_moved_to_the_data_window() -> None:
    windows = ImageWindows((10, 20), (5, -3), (30, 40))
    area = np.zeros((30, 40), np.bool_)
    area[4:7, 0:2] = True
    hints = Hints(size=(30, 40), points=[(2, 6)], not_points=[(1, 5), (30, 20)], boxes=[(10, 8, 0, 0)], drop=area)
    moved = move_hints(hints, windows)
    assert moved.size == (10, 20)
    assert (moved.points, moved.not_points, moved.boxes) == (((5, 1),), ((4, 0),), ((3, 0, 13, 3),))
    assert moved.drop is not None
    assert np.argwhere(moved.drop).tolist() == [[0, 3], [0, 4], [1, 3], [1, 4]]
    assert move_hints(hints, ImageWindows.full((30, 40))) is hints
    with pytest.raises(UsageError, match="point 30,20 on the object is outside the data window"):
        move_hints(replace(hints, not_points=[], boxes=[], points=[(30, 20)]), windows)
    with pytest.raises(UsageError, match="box 30,20,35,25 is outside the data window"):
        move_hints(replace(hints, points=[], boxes=[(30, 20, 35, 25)]), windows)


def test_areas_on_the_object_must_not_vanish_at_the_data_window() -> None:
    windows = ImageWindows((10, 20), (5, -3), (30, 40))
    outside = np.zeros((30, 40), np.bool_)
    outside[20:, 25:] = True
    inside = np.zeros((30, 40), np.bool_)
    inside[5, 2] = True
    for name, what in (("keep", "area to keep at 25,20"), ("object_area", "area on the object at 25,20")):
        with pytest.raises(UsageError, match=f"{what} is outside the data window: .*; .* move it inside or remove it"):
            move_hints(Hints(size=(30, 40), **{name: outside}), windows)
        moved = move_hints(Hints(size=(30, 40), **{name: outside | inside}), windows)
        assert getattr(moved, name).sum() == 1
    for name in ("drop", "background_area"):
        assert move_hints(Hints(size=(30, 40), **{name: outside}), windows).is_empty


SIZE = (96, 128)
DISC = (40, 48)
"""Centre of the only object, x and y; its radius is 24."""


def image() -> np.ndarray:
    rgb = np.full((*SIZE, 3), 60, np.uint8)
    cv2.circle(rgb, DISC, 24, (230, 90, 40), -1)
    return rgb


@functools.cache
def predictor() -> Predictor:
    return model_choice("lite").load_predictor()


@functools.cache
def prepared() -> object:
    return predictor().reference([(image(), image()[..., 0] > 100)])


def iou(alpha: np.ndarray, area: Area) -> float:
    inside = alpha > 127
    return float((inside & area).sum() / max(1, (inside | area).sum()))


@pytest.mark.slow
class TestPredictor:
    def test_points_hold_wherever_they_are(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(4):
            points = [(float(x), float(y)) for x, y in rng.uniform(0, 1, (4, 2)) * SIZE[::-1]]
            hints = Hints(size=SIZE, points=points[:2], not_points=points[2:])
            alpha = predictor().matte(image(), prepared(), hints)
            assert all(alpha[int(y), int(x)] > 127 for x, y in hints.points)
            assert all(alpha[int(y), int(x)] < 128 for x, y in hints.not_points)

    def test_a_click_selects_an_object_that_the_head_takes_for_absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The head says that the object is not there at all; so does the image without a positive hint."""

        def infer(batch: torch.Tensor, *_: object) -> Matte:
            nothing = torch.zeros((len(batch), 1, *batch.shape[-2:]))
            certainly = torch.tensor([-9.0] * len(batch))
            absent = Presence(certainly, nothing + 0.05, certainly > 0)
            return Matte(nothing, nothing[:, 0, 0, 0], certainly > 0, absent)

        monkeypatch.setattr(predictor().model, "infer", infer)
        x, y = DISC
        click, no_click = Hints(size=SIZE, points=[(x, y)]), Hints(size=SIZE, not_points=[(5, 5)])
        found, absent = (
            predictor().matte_frames([predictor().prepare_frame(image(), hints=hints)], prepared())[0]  # type: ignore[arg-type]
            for hints in (click, no_click)
        )
        assert (found.found, absent.found) == (True, False)
        assert iou(alpha_to_u8(found.alpha), image()[..., 0] > 100) > 0.9
        assert absent.alpha.max() < 0.1

    def test_a_frame_without_hints_has_the_same_bytes_in_a_batch_with_hints(self) -> None:
        plain: Frame = predictor().prepare_frame(image())
        hinted = replace(plain, hints=Hints(size=SIZE, not_points=[DISC]))
        alone = predictor().matte_frames([plain], prepared())[0]  # type: ignore[arg-type]
        first, second = predictor().matte_frames([hinted, plain], prepared())  # type: ignore[arg-type]
        assert second.alpha.tobytes() == alone.alpha.tobytes()
        assert first.alpha[DISC[1], DISC[0]] < 0.5

    def test_hints_must_be_of_this_image(self) -> None:
        with pytest.raises(UsageError, match="hints are for an image of 9x5 and the image is 128x96"):
            predictor().matte(image(), prepared(), Hints(size=(5, 9)))
        with pytest.raises(UsageError, match=r"hints are of type builtins\.dict; expected"):
            predictor().matte(image(), prepared(), {})  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_model_without_decoder_uses_that_of_lite() -> None:
    other = model_choice("lite-training-free").load_predictor()
    assert other.model.objects is None
    reference = other.reference([(image(), image()[..., 0] > 100)])
    drop = np.zeros(SIZE, np.bool_)
    drop[:, :30] = True
    before = other.matte(image(), reference)
    assert before[48, 20] > 127
    assert "_parts" not in vars(other._mask_maker)
    alpha = other.matte(image(), reference, Hints(size=SIZE, points=[(40, 48)], not_points=[(50, 48)], drop=drop))
    assert not alpha[drop].any()
    assert alpha[48, 40] > 127 > alpha[48, 50]
    assert vars(other._mask_maker)["_parts"][0] is other.prompted_objects
