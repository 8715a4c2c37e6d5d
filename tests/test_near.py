"""Frames of a shot that are looked at from near by (icm_cli.matting.near)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import Icm, alphas, shrink
from hypothesis import given, settings
from hypothesis import strategies as st

from icm_cli.geometry import CanvasRule
from icm_cli.images.pixels import ImageWindows
from icm_cli.matting.crops import FADE, LEAST_SIDE, MARGIN, MOST_LOOKS, place_of, put, wider
from icm_cli.matting.near import NearBy, cropped, shown
from icm_cli.matting.predictor import CanvasMatte, Frame, Predictor
from icm_cli.matting.references import Reference

sides = st.integers(8, 300)


@given(height=sides, width=sides, data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_place_holds_the_thing_and_its_margin(height: int, width: int, data: st.DataObject) -> None:
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    thing = np.zeros((height, width), bool)
    thing[top:bottom, left:right] = True
    place = place_of(thing, (height, width))
    assert place is not None
    margin = int(MARGIN * max(bottom - top, right - left))
    for part, start, end, size in ((place[0], top, bottom, height), (place[1], left, right, width)):
        assert 0 <= part.start <= max(0, start - margin)
        assert min(size, end + margin) <= part.stop <= size
        assert part.stop - part.start >= min(end - start, LEAST_SIDE * size / 2)  # at a border half of it is outside
    twice = place_of(thing.repeat(2, 0).repeat(2, 1), (height, width))
    assert twice is not None
    assert all(abs(one.start - other.start) <= 1 for one, other in zip(place, twice, strict=True))


def test_a_place_is_that_of_the_data_window() -> None:
    thing = np.zeros((100, 200), bool)
    thing[40:60, 100:120] = True
    shifted = place_of(thing, (80, 150), ImageWindows((80, 150), (10, 30), (100, 200)))
    whole = place_of(thing, (100, 200))
    assert whole is not None
    assert shifted == (
        slice(whole[0].start - 10, whole[0].stop - 10),
        slice(whole[1].start - 30, whole[1].stop - 30),
    )
    assert place_of(thing, (20, 20), ImageWindows((20, 20), (0, 0), (100, 200))) is None
    assert place_of(np.zeros((9, 9), bool), (9, 9)) is None


@given(top=st.integers(0, 60), left=st.integers(0, 60), down=st.integers(0, 60), right=st.integers(0, 60))
def test_a_crop_put_in_its_place_has_no_edge_but_the_pictures(top: int, left: int, down: int, right: int) -> None:
    size = (100 + top + down, 120 + left + right)
    place = slice(top, top + 100), slice(left, left + 120)
    whole = put(np.ones((100, 120), np.float32), place, size)
    assert whole.shape == size
    assert (whole[place][6:-6, 7:-7] == 1).all()
    steps = max(np.abs(np.diff(whole, axis=axis)).max() for axis in (0, 1))
    assert steps <= 1 / (FADE * 100) + 1e-6
    for border, is_inside in ((whole[0], top), (whole[-1], down), (whole[:, 0], left), (whole[:, -1], right)):
        assert border.max() == (0 if is_inside else 1)


def test_a_reference_is_cropped_about_its_thing() -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (100, 200, 3), dtype=np.uint8)
    guidance, unknown = np.zeros((2, 100, 200), bool)
    guidance[40:60, 100:120], unknown[60:62, 100:120] = True, True
    near = cropped(Reference(rgb, guidance, unknown))
    assert near.unknown is not None
    assert near.rgb.shape[:2] == near.guidance.shape == near.unknown.shape
    assert near.guidance.sum() == guidance.sum()
    assert near.unknown.sum() == unknown.sum()
    assert near.guidance.mean() > 4 * guidance.mean()
    rows, columns = np.nonzero(near.guidance)
    assert (near.rgb[rows, columns] == rgb[np.nonzero(guidance)]).all()
    assert cropped(Reference(rgb, guidance)).unknown is None


class Eyes:
    """In place of a predictor: finds what is red. ``whole`` and ``near`` say which references it knows the thing by."""

    rule = CanvasRule(160, 32, square=False)

    def __init__(self, *knows: str) -> None:
        self.knows = knows
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def prepare(self, rgb: np.ndarray) -> Frame:
        placement = self.rule.placement(*rgb.shape[:2])
        return Frame(rgb, placement.to_canvas(rgb), placement)

    def coarse(self, frames: Sequence[Frame], reference: Any) -> list[CanvasMatte]:
        self.seen += [(reference, frame.rgb.shape[:2]) for frame in frames]
        found = reference in self.knows
        red = [(frame.canvas[..., 0] > 127).astype(np.float32) * found for frame in frames]
        return [CanvasMatte(alpha, 0.9, found) for alpha in red]


def scene_of(top: int = 100, left: int = 260) -> tuple[np.ndarray, np.ndarray]:
    rgb = np.zeros((240, 320, 3), np.uint8)
    rgb[top : top + 40, left : left + 30, 0] = 255
    rgb[10:30, 10:30, 0] = 255  # alike, and far away
    thing = np.zeros((240, 320), bool)
    thing[top : top + 40, left : left + 30] = True
    return rgb, thing


def look(eyes: Eyes, rgb: np.ndarray, before: np.ndarray | None) -> CanvasMatte:
    near = NearBy("whole", "near")  # type: ignore[arg-type]
    return near.coarse(eyes, eyes.prepare(rgb), before)  # type: ignore[arg-type]


def test_a_frame_is_looked_at_where_the_thing_was() -> None:
    eyes = Eyes("near", "whole")
    rgb, thing = scene_of()
    _, before = scene_of(top=96, left=256)
    matte = look(eyes, rgb, before.astype(np.uint8)[::2, ::2] * 255)
    ((reference, size),) = eyes.seen
    assert reference == "near"
    assert size < (80, 80)
    frame = eyes.prepare(rgb)
    alpha = cv2.resize(frame.placement.crop_to_content(matte.alpha), (320, 240)) > 0.5
    assert matte.alpha.shape == frame.placement.canvas
    assert (alpha & thing).sum() / (alpha | thing).sum() > 0.85  # and not what is alike


def test_the_whole_frame_tells_where_the_thing_is_at_first() -> None:
    eyes = Eyes("near", "whole")
    rgb, _ = scene_of()
    assert look(eyes, rgb, None).found
    assert [reference for reference, _ in eyes.seen] == ["whole", "near"]
    nothing = Eyes("near")
    assert not look(nothing, rgb, None).found
    assert [reference for reference, _ in nothing.seen] == ["whole"]


def test_what_is_not_found_near_by_is_looked_for_in_the_whole_frame() -> None:
    eyes = Eyes("whole")
    rgb, thing = scene_of()
    assert look(eyes, rgb, thing.astype(np.uint8) * 255).found
    assert [reference for reference, _ in eyes.seen] == ["near", "whole", "near"]


def test_a_thing_that_jumps_is_looked_for_again() -> None:
    """A sliver of red in the crop is no whole thing."""
    eyes = Eyes("near", "whole")
    _, before = scene_of(top=180, left=20)
    rgb, thing = scene_of()
    rgb[:40, :40] = 0
    rgb[190:194, 20:40, 0] = 255
    matte = look(eyes, rgb, before.astype(np.uint8) * 255)
    assert [reference for reference, _ in eyes.seen] == ["near", "whole", "near"]
    alpha = cv2.resize(eyes.prepare(rgb).placement.crop_to_content(matte.alpha), (320, 240)) > 0.5
    assert (alpha & thing).sum() / thing.sum() > 0.9
    still = Eyes("near")  # and where the whole frame tells nothing, the sliver stays
    assert _area(look(still, rgb, before.astype(np.uint8) * 255)) > 0
    assert [reference for reference, _ in still.seen] == ["near", "whole"]


def test_a_crop_that_cuts_the_thing_gets_wider() -> None:
    """Where the thing went on faster than the margin allows for, or only a part of it was known."""
    eyes = Eyes("near", "whole")
    rgb = np.zeros((240, 320, 3), np.uint8)
    rgb[40:200, 120:180, 0] = 255
    before = np.zeros((240, 320), np.uint8)
    before[40:80, 130:170] = 255
    alpha = cv2.resize(eyes.prepare(rgb).placement.crop_to_content(look(eyes, rgb, before).alpha), (320, 240)) > 0.5
    assert {reference for reference, _ in eyes.seen} == {"near"}
    assert 2 <= len(eyes.seen) <= MOST_LOOKS
    thing = rgb[..., 0] > 0
    assert (alpha & thing).sum() / (alpha | thing).sum() > 0.9


def test_at_the_frames_own_border_nothing_is_cut() -> None:
    eyes = Eyes("near", "whole")
    rgb, thing = scene_of(top=200, left=290)
    look(eyes, rgb, thing.astype(np.uint8) * 255)
    assert len(eyes.seen) == 1


@given(sides, sides, st.data())
@settings(max_examples=100, deadline=None)
def test_a_wider_crop_holds_the_crop_and_lies_in_the_frame(height: int, width: int, data: st.DataObject) -> None:
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    place = slice(top, data.draw(st.integers(top + 1, height))), slice(left, data.draw(st.integers(left + 1, width)))
    thing = np.zeros((place[0].stop - top, place[1].stop - left), bool)
    assert wider(place, thing, (height, width)) == place
    thing[:] = True
    for part, before, size in zip(wider(place, thing, (height, width)), place, (height, width), strict=True):
        assert 0 <= part.start <= before.start
        assert before.stop <= part.stop <= size
        assert part != before or (before.start, before.stop) == (0, size)


def _area(matte: CanvasMatte) -> int:
    return int((matte.alpha > 0.5).sum())


@pytest.mark.parametrize(("steps", "is_shot", "both"), [(2, True, True), (0, True, False), (2, False, False)])
def test_shots_that_are_learned_are_looked_at_from_near_by(steps: int, is_shot: bool, both: bool) -> None:
    calls = []

    class Recorder:
        def reference(self, references: Sequence[Reference], *, learn_steps: int = 0) -> str:
            calls.append((references[0].rgb.shape[:2], learn_steps))
            return "prepared"

    predictor: Predictor = Recorder()  # type: ignore[assignment]
    found = shown(predictor, [Reference(*scene_of())], steps, is_shot=is_shot)
    assert isinstance(found, NearBy) == both
    assert [count for _, count in calls] == ([steps, 0] if both else [steps])
    assert (240, 320) in [size for size, _ in calls]
    assert len({size for size, _ in calls}) == len(calls)


@pytest.mark.slow
def test_a_run_that_goes_on_makes_the_same_bytes(icm: Icm, scene: Path) -> None:
    """With the model of the package, whose head learns."""
    frames = scene / "plates"
    frames.mkdir()
    picture, mask = cv2.imread(str(scene / "ref.png")), cv2.imread(str(scene / "mask.png"), 0)
    for number in range(4):
        cv2.imwrite(str(frames / f"sh.{number}.png"), np.roll(picture, 3 * number, 1))
    cv2.imwrite(str(scene / "key.png"), mask)
    given = {"ref": frames / "sh.0.png", "mask": scene / "key.png", "src": frames / "sh.#.png", "model": "lite"}
    assert icm("--shot", **given, learn_steps=3).exit_code == 0
    whole = alphas(scene / "out")
    assert len(whole) == 3
    for name in list(whole)[1:]:
        (scene / "out" / name).unlink()
    assert icm("--shot", **given, learn_steps=3).exit_code == 0
    assert alphas(scene / "out") == whole
    shrink(frames / "sh.3.png", frames / "sh.4.png", 100)  # of another size: nothing is carried into it
    assert icm("--shot", **given, learn_steps=3).exit_code == 0
    assert len(alphas(scene / "out")) == 4
