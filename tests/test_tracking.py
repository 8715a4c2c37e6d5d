"""Crops around objects, and tracking of the object of a shot by crops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import Icm, alphas, shrink
from hypothesis import given, settings
from hypothesis import strategies as st

from icm_cli.config import CropSettings
from icm_cli.geometry import CanvasRule
from icm_cli.images.pixels import ImageWindows
from icm_cli.matting import tracking
from icm_cli.matting.crops import CropBox, crop_box, enlarge_box, paste_crop
from icm_cli.matting.predictor import CoarseAlpha, Frame, Predictor
from icm_cli.matting.references import Reference
from icm_cli.matting.tracking import TrackingConfig, TrackingReferences, crop_reference, prepare_references
from icm_cli.model.alphas import resize_alpha, resize_on_device

SETTINGS = CropSettings()
FADE = 0.05
sides = st.integers(8, 300)


@given(height=sides, width=sides, data=st.data())
@settings(max_examples=200)
def test_a_box_contains_the_object_and_its_margin(height: int, width: int, data: st.DataObject) -> None:
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    box = crop_box(mask, (height, width), SETTINGS)
    assert box is not None
    margin = int(SETTINGS.margin * max(bottom - top, right - left))
    for side, start, end, size in ((box.rows, top, bottom, height), (box.columns, left, right, width)):
        assert 0 <= side.start <= max(0, start - margin)
        assert min(size, end + margin) <= side.stop <= size
        assert side.stop - side.start >= min(end - start, SETTINGS.min_side * size / 2)  # half may be outside the frame
    assert box.area == box.crop(mask).size
    from_larger_mask = crop_box(mask.repeat(2, 0).repeat(2, 1), (height, width), SETTINGS)
    assert from_larger_mask is not None
    assert all(
        abs(one.start - other.start) <= 1 for one, other in zip(box.slices, from_larger_mask.slices, strict=True)
    )


def test_a_box_is_relative_to_the_data_window() -> None:
    mask = np.zeros((100, 200), bool)
    mask[40:60, 100:120] = True
    in_data_window = crop_box(mask, (80, 150), SETTINGS, ImageWindows((80, 150), (10, 30), (100, 200)))
    in_display_window = crop_box(mask, (100, 200), SETTINGS)
    assert in_display_window is not None
    rows, columns = in_display_window.slices
    assert in_data_window == CropBox(
        slice(rows.start - 10, rows.stop - 10), slice(columns.start - 30, columns.stop - 30)
    )
    assert crop_box(mask, (20, 20), SETTINGS, ImageWindows((20, 20), (0, 0), (100, 200))) is None
    assert crop_box(np.zeros((9, 9), bool), (9, 9), SETTINGS) is None


@given(top=st.integers(0, 60), left=st.integers(0, 60), down=st.integers(0, 60), right=st.integers(0, 60))
def test_a_pasted_crop_fades_inside_the_frame_only(top: int, left: int, down: int, right: int) -> None:
    size = (100 + top + down, 120 + left + right)
    box = CropBox(slice(top, top + 100), slice(left, left + 120))
    frame = paste_crop(torch.ones(100, 120), box, size, FADE).numpy()
    assert frame.shape == size
    assert (frame[box.slices][6:-6, 7:-7] == 1).all()
    steps = max(np.abs(np.diff(frame, axis=axis)).max() for axis in (0, 1))
    assert steps <= 1 / (FADE * 100) + 1e-6
    for border, is_inside in ((frame[0], top), (frame[-1], down), (frame[:, 0], left), (frame[:, -1], right)):
        assert border.max() == (0 if is_inside else 1)
    assert (paste_crop(torch.ones(100, 120), box, size)[box.slices] == 1).all()


@given(st.tuples(sides, sides), st.tuples(sides, sides), st.integers(0, 2**31))
@settings(max_examples=60)
def test_alphas_are_resized_alike_on_every_device(before: tuple[int, int], after: tuple[int, int], seed: int) -> None:
    """By OpenCV on the CPU, by torch elsewhere. Their rules differ if one side grows and the other shrinks."""
    alpha = torch.rand(before, generator=torch.Generator().manual_seed(seed))
    by_opencv, by_torch = resize_alpha(alpha, after), resize_on_device(alpha, after)
    assert by_opencv.shape == by_torch.shape == after
    if (before[0] - after[0]) * (before[1] - after[1]) >= 0:
        torch.testing.assert_close(by_torch, by_opencv, atol=1e-4, rtol=0)


def test_a_reference_is_cropped_around_its_object() -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (100, 200, 3), dtype=np.uint8)
    guidance, unknown = np.zeros((2, 100, 200), bool)
    guidance[40:60, 100:120], unknown[60:62, 100:120] = True, True
    cropped = crop_reference(Reference(rgb, guidance, unknown), SETTINGS)
    assert cropped.unknown is not None
    assert cropped.rgb.shape[:2] == cropped.guidance.shape == cropped.unknown.shape
    assert cropped.guidance.sum() == guidance.sum()
    assert cropped.unknown.sum() == unknown.sum()
    assert cropped.guidance.mean() > 4 * guidance.mean()
    rows, columns = np.nonzero(cropped.guidance)
    assert (cropped.rgb[rows, columns] == rgb[np.nonzero(guidance)]).all()
    assert crop_reference(Reference(rgb, guidance), SETTINGS).unknown is None


class RedPredictor:
    """Replaces a predictor: its object is what is red. ``known``: references with which it finds the object."""

    rule = CanvasRule(160, 32, square=False)

    def __init__(self, *known: str) -> None:
        self.known = known
        self.passes: list[tuple[str, tuple[int, ...]]] = []

    def prepare_frame(self, rgb: np.ndarray) -> Frame:
        placement = self.rule.placement(*rgb.shape[:2])
        return Frame(rgb, placement.fit_to_canvas(rgb), placement)

    def prepare_crop(self, frame: Frame, box: CropBox) -> Frame:
        return self.prepare_frame(box.crop(frame.rgb))

    def coarse_alphas(self, frames: Sequence[Frame], reference: Any) -> list[CoarseAlpha]:
        self.passes += [(reference, frame.size) for frame in frames]
        found = reference in self.known
        red = []
        for frame in frames:
            height, width = frame.placement.content
            red.append((frame.canvas[:height, :width, 0] > 127) * np.float32(found))
        return [CoarseAlpha(torch.from_numpy(alpha), found) for alpha in red]

    @property
    def references(self) -> list[str]:
        """References of all passes."""
        return [reference for reference, _ in self.passes]


def draw_scene(top: int = 100, left: int = 260) -> tuple[np.ndarray, np.ndarray]:
    rgb = np.zeros((240, 320, 3), np.uint8)
    rgb[top : top + 40, left : left + 30, 0] = 255
    rgb[10:30, 10:30, 0] = 255  # a similar object, far away
    mask = np.zeros((240, 320), bool)
    mask[top : top + 40, left : left + 30] = True
    return rgb, mask


def track(predictor: RedPredictor, rgb: np.ndarray, previous_alpha: np.ndarray | None) -> CoarseAlpha:
    references = TrackingReferences("full", "cropped")  # type: ignore[arg-type]
    frame = predictor.prepare_frame(rgb)
    coarse = references.coarse_alpha(predictor, frame, previous_alpha, TrackingConfig())  # type: ignore[arg-type]
    assert coarse.alpha.shape == frame.placement.content
    return coarse


def foreground(coarse: CoarseAlpha) -> np.ndarray:
    return cv2.resize(coarse.alpha.numpy(), (320, 240)) > 0.5


def test_a_frame_is_cropped_around_the_last_position() -> None:
    predictor = RedPredictor("cropped", "full")
    rgb, mask = draw_scene()
    _, previous = draw_scene(top=96, left=256)
    found = foreground(track(predictor, rgb, previous.astype(np.uint8)[::2, ::2] * 255))
    ((reference, size),) = predictor.passes
    assert reference == "cropped"
    assert size < (80, 80)
    assert (found & mask).sum() / (found | mask).sum() > 0.85  # without the similar object


def test_a_speck_of_the_last_alpha_does_not_widen_the_crop() -> None:
    predictor = RedPredictor("cropped", "full")
    rgb, mask = draw_scene()
    _, previous = draw_scene(top=96, left=256)
    previous[14:16, 14:16] = True  # in the similar object
    found = foreground(track(predictor, rgb, previous.astype(np.uint8) * 255))
    assert (found & mask).sum() / (found | mask).sum() > 0.85


def test_without_a_position_the_full_frame_is_matted_first() -> None:
    predictor = RedPredictor("cropped", "full")
    rgb, _ = draw_scene()
    assert track(predictor, rgb, None).found
    assert predictor.references == ["full", "cropped"]
    unsuccessful = RedPredictor("cropped")
    assert not track(unsuccessful, rgb, None).found
    assert unsuccessful.references == ["full"]


def test_an_object_that_the_crop_does_not_show_is_found_in_the_full_frame() -> None:
    predictor = RedPredictor("full")
    rgb, mask = draw_scene()
    assert track(predictor, rgb, mask.astype(np.uint8) * 255).found
    assert predictor.references == ["cropped", "full", "cropped"]


def test_an_object_that_moves_far_is_found_again() -> None:
    """A small red part in the crop is not the object."""
    predictor = RedPredictor("cropped", "full")
    _, previous = draw_scene(top=180, left=20)
    rgb, mask = draw_scene()
    rgb[:40, :40] = 0
    rgb[190:194, 20:40, 0] = 255
    found = foreground(track(predictor, rgb, previous.astype(np.uint8) * 255))
    assert predictor.references == ["cropped", "full", "cropped"]
    assert (found & mask).sum() / mask.sum() > 0.9
    unsuccessful = RedPredictor("cropped")  # if the full frame does not show the object, the small part is kept
    assert foreground(track(unsuccessful, rgb, previous.astype(np.uint8) * 255)).any()
    assert unsuccessful.references == ["cropped", "full"]


def test_a_crop_that_cuts_the_object_is_enlarged() -> None:
    """Because the object moved faster than the margin allows, or only a part of it was known."""
    predictor = RedPredictor("cropped", "full")
    rgb = np.zeros((240, 320, 3), np.uint8)
    rgb[40:200, 120:180, 0] = 255
    previous = np.zeros((240, 320), np.uint8)
    previous[40:80, 130:170] = 255
    found = foreground(track(predictor, rgb, previous))
    assert set(predictor.references) == {"cropped"}
    assert 2 <= len(predictor.passes) <= SETTINGS.max_crops
    mask = rgb[..., 0] > 0
    assert (found & mask).sum() / (found | mask).sum() > 0.9


def test_the_border_of_the_frame_cuts_no_object() -> None:
    predictor = RedPredictor("cropped", "full")
    rgb, mask = draw_scene(top=200, left=290)
    track(predictor, rgb, mask.astype(np.uint8) * 255)
    assert len(predictor.passes) == 1


@given(sides, sides, st.data())
@settings(max_examples=100)
def test_an_enlarged_box_contains_the_box_and_is_inside_the_frame(height: int, width: int, data: st.DataObject) -> None:
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = CropBox(
        slice(top, data.draw(st.integers(top + 1, height))), slice(left, data.draw(st.integers(left + 1, width)))
    )
    mask = np.zeros((box.rows.stop - top, box.columns.stop - left), bool)
    assert enlarge_box(box, mask, (height, width), SETTINGS) == box
    mask[:] = True
    enlarged = enlarge_box(box, mask, (height, width), SETTINGS)
    for side, before, size in zip(enlarged.slices, box.slices, (height, width), strict=True):
        assert 0 <= side.start <= before.start
        assert before.stop <= side.stop <= size
        assert side != before or (before.start, before.stop) == (0, size)


@pytest.mark.parametrize(("steps", "is_shot", "both"), [(2, True, True), (0, True, False), (2, False, False)])
def test_references_are_learned_in_crops_for_shots(
    steps: int, is_shot: bool, both: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, notices = [], list[str]()
    monkeypatch.setattr(tracking, "PROGRESS_INTERVAL_S", 0.0)

    class Recorder:
        def reference(self, references: Sequence[Reference], *, learn_steps: int = 0, on_progress: Any = None) -> str:
            calls.append((references[0].rgb.shape[:2], learn_steps))
            if learn_steps:
                on_progress(0.5)
            return "prepared"

    predictor: Predictor = Recorder()  # type: ignore[assignment]
    prepared = prepare_references(predictor, [Reference(*draw_scene())], steps, notices.append, is_shot=is_shot)
    assert isinstance(prepared, TrackingReferences) == both
    assert [count for _, count in calls] == ([steps, 0] if both else [steps])
    assert (240, 320) in [size for size, _ in calls]
    assert len({size for size, _ in calls}) == len(calls)
    assert [each.split(",")[0] for each in notices[1:]] == (["learning the references: 50%"] if steps else [])


@pytest.mark.slow
def test_a_resumed_run_writes_the_same_bytes(icm: Icm, scene: Path) -> None:
    """With the model of the package, whose head learns the references."""
    frames = scene / "plates"
    frames.mkdir()
    image, mask = cv2.imread(str(scene / "ref.png")), cv2.imread(str(scene / "mask.png"), 0)
    for number in range(4):
        cv2.imwrite(str(frames / f"sh.{number}.png"), np.roll(image, 3 * number, 1))
    cv2.imwrite(str(scene / "key.png"), mask)
    given = {"ref": frames / "sh.0.png", "mask": scene / "key.png", "src": frames / "sh.#.png", "model": "lite"}
    assert icm("--shot", **given, learn_steps=3).exit_code == 0
    whole = alphas(scene / "out")
    assert len(whole) == 3
    for name in list(whole)[1:]:
        (scene / "out" / name).unlink()
    assert icm("--shot", **given, learn_steps=3).exit_code == 0
    assert alphas(scene / "out") == whole
    shrink(frames / "sh.3.png", frames / "sh.4.png", 100)  # another size: no alpha is propagated to it
    assert icm("--shot", **given, learn_steps=3).exit_code == 0
    assert len(alphas(scene / "out")) == 4
