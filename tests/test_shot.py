"""``--shot``: the order of frames, propagation along the flow, and runs that stop, fail or are split into shards."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import Icm, alphas, output_files, read, shrink
from hypothesis import given, settings
from hypothesis import strategies as st

from icm_cli.errors import ImageError, UsageError
from icm_cli.evaluation.evaluate import evaluate
from icm_cli.geometry import CanvasRule, Float, alpha_to_u8
from icm_cli.guidance.hints import Hints
from icm_cli.images.image_file import ReopeningFile
from icm_cli.images.pixels import ImageWindows
from icm_cli.images.writing import read_provenance, set_provenance_entry, write_alpha
from icm_cli.matting.hint_files import ImageHints
from icm_cli.matting.hinting import apply_hints_to_alpha
from icm_cli.matting.jobs import Job
from icm_cli.matting.optical_flow import FlowField, FrameMemory, PropagationConfig
from icm_cli.matting.predictor import CoarseAlpha, Frame, FrameAlpha, Predictor
from icm_cli.matting.propagation import PROPAGATED_KEY, PROPAGATED_KEY_0_1, FlowPropagator, encode_alpha
from icm_cli.matting.provenance import REVIEWED_KEY
from icm_cli.matting.references import Reference
from icm_cli.matting.shot import Keyframe, Shot, split_shots
from icm_cli.reports.result import ImageResult

CONFIG = PropagationConfig()
FRAMES = range(1001, 1009)
KEY = 1004
BLACK = np.zeros((200, 200), np.uint8)
"""A garbage matte that changes nothing."""
PROPAGATED = "(recomputed: a frame that is propagated to it changed)"
Shoot = Callable[..., Result]


@pytest.fixture
def frames(scene: Path) -> Path:
    """Frames 1001 to 1008 of a shot in which all moves by a few pixels a frame; 1004 is the reference."""
    folder = scene / "plates"
    folder.mkdir()
    image, mask = cv2.imread(str(scene / "ref.png")), cv2.imread(str(scene / "mask.png"), 0)
    for number in FRAMES:
        step = 3 * (number - KEY)
        cv2.imwrite(str(folder / f"sh.{number}.png"), np.roll(image, (step // 2, step), (0, 1)))
    cv2.imwrite(str(scene / "key.png"), mask)
    return folder


@pytest.fixture
def shot(icm: Icm, scene: Path, frames: Path) -> Shoot:
    def run(*flags: str, **options: Any) -> Result:
        given = {"ref": frames / f"sh.{KEY}.png", "mask": scene / "key.png", "src": frames / "sh.####.png", **options}
        return icm("--shot", *flags, **given)

    return run


@contextlib.contextmanager
def stopped_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> Iterator[None]:
    """Context in which every run is interrupted after some batches."""
    matte, calls = FlowPropagator.matte, iter(range(100))

    def stop(self: FlowPropagator, jobs: Sequence[Job], frames: Sequence[Frame]) -> list[FrameAlpha]:
        if next(calls) == batches:
            raise KeyboardInterrupt
        return matte(self, jobs, frames)

    with monkeypatch.context() as patch:
        patch.setattr(FlowPropagator, "matte", stop)
        yield


def job(name: str, example: int = 0) -> Job:
    output = Path("out") / name
    return Job(Path("src") / name, Path(name), output, ImageResult(f"src/{name}", str(output), "planned"), example)


def reference() -> Reference:
    raise AssertionError("is not read")


def number_of(each: Job | Keyframe | None) -> int | None:
    return None if each is None else int(each.name.suffixes[0][1:])


@given(
    count=st.integers(0, 12),
    keys=st.sets(st.integers(0, 14), max_size=3),
    hinted=st.sets(st.integers(0, 11), max_size=3),
)
@settings(max_examples=80)
def test_every_frame_is_propagated_from_the_nearest_start(count: int, keys: set[int], hinted: set[int]) -> None:
    """A start is a keyframe or a frame with hints. It may be the earlier one of two at the same distance."""
    hints = ImageHints(Path("f.png"), (), "digest")
    jobs = [replace(job(f"f.{2 * n}.png"), hints=hints if n in hinted else None) for n in range(count)]
    shot = Shot.from_examples([(jobs, [Keyframe(Path(f"f.{2 * key + 1}.png"), reference) for key in keys])])
    assert sorted(each.output for each in shot.order) == sorted(each.output for each in jobs)
    marked = {2 * key + 1 for key in keys}
    line = sorted([*(2 * n for n in range(count)), *marked])
    starts = [at for at, n in enumerate(line) if n in marked or n // 2 in hinted] or [0]
    order = [number_of(each) for each in shot.order]
    for each in shot.order:
        at = line.index(number_of(each))
        nearest = min(starts, key=lambda start: (abs(start - at), start))
        before = None if nearest == at else line[at - 1 if nearest < at else at + 1]
        key, previous = number_of(shot.keyframes.get(each.output)), number_of(shot.previous.get(each.output))
        assert (key, previous) == ((before, None) if before in marked else (None, before))
        assert previous is None or order.index(previous) < order.index(number_of(each))


@given(count=st.integers(0, 12), key=st.integers(-1, 14))
@settings(max_examples=40)
def test_frames_after_a_keyframe_come_before_those_that_precede_it(count: int, key: int) -> None:
    jobs = [job(f"f.{2 * number}.png") for number in range(count)]
    shot = Shot.from_examples([(jobs, [Keyframe(Path(f"f.{2 * key + 1}.png"), reference)] if key >= 0 else [])])
    numbers = [2 * number for number in range(count)]
    after = [number for number in numbers if number > 2 * key + 1]
    assert [number_of(each) for each in shot.order] == after + [n for n in numbers[::-1] if n not in after]


@given(count=st.integers(1, 12), shards=st.integers(1, 5))
@settings(max_examples=40)
def test_shards_are_consecutive_and_independent(count: int, shards: int) -> None:
    shot = Shot.from_examples(
        [([job(f"f.{number}.png") for number in range(count)], [Keyframe(Path("f.3a.png"), reference)])]
    )
    parts = [shot.shard(number, shards) for number in range(1, shards + 1)]
    assert sorted(each.name for part in parts for each in part.order) == sorted(each.name for each in shot.order)
    by_name = [each.name for each in Shot.from_examples([(shot.order, [])]).order]
    assert [each for part in parts for each in by_name if each in {job.name for job in part.order}] == by_name
    for part in parts:
        own = {each.output for each in part.order}
        assert all(before.output in own for before in part.previous.values())
        assert {*part.previous, *part.keyframes} <= own


@given(count=st.integers(2, 12), shards=st.integers(1, 4), keys=st.lists(st.integers(0, 11), min_size=4, max_size=4))
@settings(max_examples=40)
def test_shards_with_different_keyframes_cover_every_frame(count: int, shards: int, keys: list[int]) -> None:
    """Every frame is made by one shard, but for the reference that this very shard was given."""
    names = [f"f.{number:02}.png" for number in range(count)]
    made: list[str] = []
    for number in range(1, shards + 1):
        key = names[keys[number - 1] % count]
        given = Shot.from_examples([([job(name) for name in names if name != key], [Keyframe(Path(key), reference)])])
        own = [str(each) for each in given.shard(number, shards).names]
        order = [str(each.name) for each in given.shard(number, shards).order]
        assert sorted(order) == [name for name in own if name != key]
        made += own
    assert made == names


@given(missing=st.sets(st.integers(1, 8), max_size=8), shards=st.integers(1, 4))
@settings(max_examples=40)
def test_missing_frames_do_not_move_the_borders_of_shards_and_shots(missing: set[int], shards: int) -> None:
    """They are reported by the last shard."""
    jobs = [replace(job(f"a.{number}.png"), is_missing=number in missing) for number in range(1, 9)]
    existing = [each for each in jobs if not each.is_missing]
    reported, skipped = Shot.from_examples([(jobs, [])]), Shot.from_examples([(existing, [])])
    for number in range(1, shards + 1):
        order = reported.shard(number, shards).order
        assert [each for each in order if not each.is_missing] == skipped.shard(number, shards).order
        assert {number_of(each) for each in order if each.is_missing} == (missing if number == shards else set())
    others = [job(f"b.{number}.png") for number in range(1, 5)]
    shots = [[each for each in frames if not each.is_missing] for frames, _ in split_shots([*jobs, *others], [])]
    assert [frames for frames in shots if frames] == [frames for frames, _ in split_shots([*existing, *others], [])]


def test_each_folder_and_each_numbered_name_is_a_shot() -> None:
    def shots(*names: str, key: str = "a/sh.1.png") -> list[list[str]]:
        found = split_shots([job(name) for name in names], [Keyframe(Path(key), reference)])
        return [[str(each.name) for each in (*jobs, *keys)] for jobs, keys in found]

    assert shots("a/sh.2.png", "b/sh.1.png", "b/sh.2.png") == [
        ["a/sh.2.png", "a/sh.1.png"],
        ["b/sh.1.png", "b/sh.2.png"],
    ]
    assert shots("a/sh.2.png", "a/sx.1.png", "a/sx.2.png") == [
        ["a/sh.2.png", "a/sh.1.png"],
        ["a/sx.1.png", "a/sx.2.png"],
    ]
    assert len(shots("a/sh.2.png", "a/sh.3.png", "a/sx.1.png", "a/sx.2.png", key="a/ref.png")) == 3
    assert shots("a/sh.2.png", "a/sh.2.mask.png", "a/10.31.png", "a/10.32.png", "a/sx.1.png") == [
        ["a/sh.2.png", "a/sh.1.png"],
        ["a/sh.2.mask.png"],
        ["a/10.31.png", "a/10.32.png"],
        ["a/sx.1.png"],
    ]
    loose = ("a/one.png", "a/two.png", "a/3.png")  # no name has several frames
    assert shots(*loose, key="a/four.png") == [[*loose, "a/four.png"]]


def test_a_chunk_of_one_frame_of_each_shot_propagates_nothing_between_them(
    shot: Shoot, scene: Path, frames: Path
) -> None:
    shutil.copy(frames / "sh.1001.png", frames / "take.1006.png")
    assert shot("--frames", "1006", src=frames).exit_code == 0
    copy = shutil.copy(frames / f"sh.{KEY}.png", scene / "no keyframe.png")
    assert shot(ref=copy, src=frames / "take.1006.png", out=scene / "alone").exit_code == 0
    assert (read(scene / "out" / "take.1006.png") == read(scene / "alone" / "take.1006.png")).all()


def test_a_chunk_of_files_whose_names_have_single_numbers_is_one_shot(shot: Shoot, scene: Path, frames: Path) -> None:
    """As in a run without --frames, whose alphas are then all kept."""
    rooms = scene / "rooms"
    rooms.mkdir()
    for number, name in enumerate(("hall", "kitchen", "garden"), 1):
        shutil.copy(frames / f"sh.{1000 + number}.png", rooms / f"{name}{number}.png")
    assert shot(src=rooms).exit_code == 0
    planned = shot("--dry-run", "--frames", "1-3", src=rooms)
    assert planned.stdout.count("(kept)") == 3


def test_a_file_with_another_name_changes_no_frame(shot: Shoot, scene: Path, frames: Path) -> None:
    assert shot(src=frames).exit_code == 0
    before = alphas(scene / "out")
    shutil.copy(frames / "sh.1001.png", frames / "sh.1006.mask.png")
    assert shot(src=frames, report=scene / "r.json").exit_code == 0
    images = json.loads((scene / "r.json").read_text())["images"]
    assert [image["name"] for image in images if image["status"] == "done"] == ["sh.1006.mask.png"]
    assert shot(src=frames, out=scene / "whole").exit_code == 0
    assert {name: content for name, content in alphas(scene / "whole").items() if "mask" not in name} == before


@given(
    seed=st.integers(0, 2**31),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
@settings(max_examples=40)
def test_a_propagated_alpha_is_valid(seed: int, height: int, width: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    rgb = rng.integers(0, 256, (2, height, width, 3), np.uint8)
    coarse = torch.from_numpy(rng.random(size, np.float32).round(1))
    earlier = FrameMemory.from_frame(rgb[0], rng.random((5, 5), np.float32), CONFIG)
    alpha = FlowField.estimate(earlier, rgb[1], CONFIG).combine_with_earlier(coarse)
    assert alpha.shape == size
    assert alpha.dtype == torch.float32
    assert alpha.min() >= 0
    assert alpha.max() <= 1
    undecided = FrameMemory(rgb[0], np.full((height, width), 127, np.uint8))
    unchanged = FlowField.estimate(undecided, rgb[1], CONFIG).combine_with_earlier(coarse)
    torch.testing.assert_close(unchanged, coarse, atol=0.01, rtol=1e-7)


def disc(at: int, size: tuple[int, int] = (120, 160)) -> Float:
    alpha = np.zeros(size, np.float32)
    cv2.circle(alpha, (at, 60), 30, 1.0, -1)
    return alpha


def draw_frame(at: int) -> np.ndarray:
    """A disc with a texture that moves with it, in front of a wall that does not move."""
    rng = np.random.default_rng(0)
    wall, skin = (cv2.GaussianBlur(rng.integers(0, 256, (120, 160, 3), np.uint8), (0, 0), 2) for _ in range(2))
    return np.where(disc(at)[..., None] > 0.5, np.roll(skin, at, axis=1), wall)


def flow_of(
    first: np.ndarray,
    alpha: Float,
    second: np.ndarray,
    windows: tuple[ImageWindows | None, ImageWindows | None] = (None, None),
) -> FlowField:
    """Flow from the second image to the first one, which has this alpha."""
    earlier = FrameMemory.from_frame(first, alpha, CONFIG, windows[0])
    return FlowField.estimate(earlier, second, CONFIG, windows[1])


def propagate(flow: FlowField, coarse: Float) -> Float:
    return flow.combine_with_earlier(torch.from_numpy(np.ascontiguousarray(coarse))).numpy()


def test_a_part_that_the_model_misses_is_propagated() -> None:
    coarse = disc(74)
    coarse[60:] = 0.1  # the model is uncertain about the lower half
    alpha = propagate(flow_of(draw_frame(70), disc(70), draw_frame(74)), coarse)
    assert alpha[65:85, 60:88].min() > 0.5
    assert alpha[:, 115:].max() < 0.01
    other = np.random.default_rng(1).integers(0, 256, (120, 160, 3), np.uint8)
    after_cut = propagate(flow_of(draw_frame(70), disc(70), 255 - other), coarse)
    assert (np.abs(after_cut - coarse) > 0.1).mean() < 0.01


def test_flicker_is_stabilised_and_edges_stay_fine() -> None:
    missed = disc(74)
    missed[60:80, 66:82] = 0.0  # a hole that the frame before does not have
    alpha = flow_of(draw_frame(70), disc(70), draw_frame(74)).stabilise(draw_frame(74), missed)
    np.testing.assert_allclose(alpha[64:76, 70:78].mean(), CONFIG.stabilisation, atol=0.1)
    assert alpha[:, 115:].max() == 0
    size = (1600, 1200)
    large, now, earlier = cv2.resize(disc(74), size, interpolation=cv2.INTER_NEAREST), draw_frame(74), draw_frame(70)
    flow = flow_of(cv2.resize(earlier, size), disc(70), cv2.resize(now, size))
    stable = flow.stabilise(cv2.resize(now, size), large)
    assert stable.shape == large.shape
    assert np.abs(np.diff(stable[600])).max() > 0.7  # the edge is still one pixel wide
    other = np.random.default_rng(1).integers(0, 256, (120, 160, 3), np.uint8)
    after_cut = flow_of(draw_frame(70), disc(70), 255 - other).stabilise(255 - other, missed)
    assert (np.abs(after_cut - missed) > 0.1).mean() < 0.01


class GivenAlphas:
    """Replaces a predictor: its coarse alphas are given, one per frame, and it refines nothing."""

    def __init__(self, *alphas: Float, found: Sequence[bool] = ()) -> None:
        self.alphas = list(alphas)
        self.found = list(found) or [True] * len(alphas)

    def coarse_alphas(self, frames: Sequence[Frame], _: Any) -> list[CoarseAlpha]:
        return [CoarseAlpha(torch.from_numpy(self.alphas.pop(0)), self.found.pop(0)) for _ in frames]

    def refine_alphas(
        self, _: Sequence[Frame], coarse: Sequence[CoarseAlpha], stabilise: Callable[[Float], Float] | None = None
    ) -> list[FrameAlpha]:
        stabilise = stabilise or (lambda alpha: alpha)
        return [FrameAlpha(stabilise(each.alpha.numpy()), each.found) for each in coarse]


def propagator_of(
    predictor: GivenAlphas, count: int, keys: Sequence[Keyframe] = (), notice: Callable[[str], None] = print
) -> tuple[FlowPropagator, list[Job], list[Frame]]:
    """A propagator for a shot of so many frames, with its jobs and frames."""
    jobs = [job(f"f.{number}.png") for number in range(count)]
    placement = CanvasRule(160, 32, square=False).placement(120, 160)
    images = [draw_frame(70 + 2 * number) for number in range(count)]
    frames = [Frame(rgb, placement.fit_to_canvas(rgb), placement) for rgb in images]
    shot = Shot.from_examples([(jobs, keys)])
    propagator = FlowPropagator(predictor, lambda _: None, shot, notice)  # type: ignore[arg-type,return-value]
    assert list(propagator.begin_run(jobs)) == jobs
    return propagator, jobs, frames


def test_mask_of_a_keyframe_does_not_harden_edges() -> None:
    soft = np.full((120, 160), 0.5, np.float32)

    class SoftEdges(GivenAlphas):
        def refine_alphas(self, frames: Sequence[Frame], coarse: Sequence[CoarseAlpha], *more: Any) -> list[FrameAlpha]:
            uniform = [replace(each, alpha=torch.from_numpy(soft)) for each in coarse]
            return super().refine_alphas(frames, uniform, *more)

    alphas, notices = [], list[str]()
    for mask in (disc(70) > 0.5, np.zeros((120, 160), np.bool_)):
        key = Keyframe(Path("e.png"), lambda mask=mask: Reference(draw_frame(70), mask))
        propagator, jobs, frames = propagator_of(SoftEdges(soft), 1, [key], notices.append)
        alphas.append(propagator.matte(jobs, frames)[0].alpha)
    np.testing.assert_array_equal(alphas[0], alphas[1])
    assert not notices


def test_a_frame_of_another_size_is_reported_once_and_skipped_by_the_propagation(shot: Shoot, scene: Path) -> None:
    shrink(scene / "plates" / "sh.1006.png", scene / "plates" / "sh.1006.png", 50)
    done = shot()
    assert done.exit_code == 0, done.output
    messages = [line for line in done.stderr.splitlines() if "another size or aspect ratio" in line]
    assert len(messages) == 1
    assert "sh.1006.png has another size or aspect ratio than sh.1005.png" in messages[0]


def test_a_correction_replaces_what_the_refinement_adds_again() -> None:
    """A hole that a hint made stays a hole, frame after frame, although the model fills it in every frame."""
    hole = np.zeros((120, 160), np.uint8)
    hole[55:70, 66:82] = 255
    start = 70
    memory = FrameMemory.from_frame(draw_frame(start), disc(start) * (1 - hole / 255), CONFIG)
    memory = replace(memory, correction=hole)
    for now in (74, 78, 82):
        flow = FlowField.estimate(memory, draw_frame(now), CONFIG)
        alpha = flow.stabilise(draw_frame(now), disc(now))
        memory = replace(FrameMemory.from_frame(draw_frame(now), alpha, CONFIG), correction=flow.moved_correction())
        shift = now - start
        assert alpha[59:66, 70 + shift : 78 + shift].mean() < 0.15
        assert np.abs(alpha - disc(now))[75:].mean() < 0.01  # the rest is as before


@pytest.mark.parametrize("hinted", [True, False])
def test_a_correction_is_propagated_against_a_model_that_is_certain(hinted: bool) -> None:
    """In every frame, the model takes a corner of the wall for a part of the object; one frame has a hint."""
    wrong = [
        np.maximum(disc(70 + 2 * number), np.pad(np.ones((20, 30), np.float32), ((0, 100), (130, 0))))
        for number in range(4)
    ]
    drop = np.zeros((120, 160), np.bool_)
    drop[:22, 128:] = True

    class FollowsHints(GivenAlphas):
        def refine_alphas(
            self,
            frames: Sequence[Frame],
            coarse: Sequence[CoarseAlpha],
            stabilise: Callable[[Float], Float] | None = None,
        ) -> list[FrameAlpha]:
            (frame,), (result,) = frames, super().refine_alphas(frames, coarse, stabilise)
            return [replace(result, alpha=apply_hints_to_alpha(result.alpha, frame.hints)) if frame.hints else result]

    propagator, jobs, frames = propagator_of(FollowsHints(*wrong), 4)
    if hinted:
        jobs[0] = replace(jobs[0], hints=ImageHints(jobs[0].name, (), "digest"))
        frames[0] = replace(frames[0], hints=Hints(size=(120, 160), drop=drop))
    found = [propagator.matte([each], [frame])[0].alpha for each, frame in zip(jobs, frames, strict=True)]
    for alpha, model in zip(found[1:], wrong[1:], strict=True):
        assert (float(alpha[4:16, 140:156].mean()) < 0.1) == hinted
        assert np.abs(alpha - model)[30:].mean() < 0.01  # the object is as before


def test_frames_are_registered_by_their_display_windows() -> None:
    """Data windows that are cropped around the object, differently in each frame, do not change the propagation."""
    coarse = disc(74)
    coarse[60:] = 0.1
    full = propagate(flow_of(draw_frame(70), disc(70), draw_frame(74)), coarse)
    crops = []
    for top, left, bottom, right, at in ((10, 20, 110, 130, 70), (20, 30, 116, 150, 74)):
        windows = ImageWindows((bottom - top, right - left), (top, left), (120, 160))
        crop = (slice(top, bottom), slice(left, right))
        crops.append((windows, draw_frame(at)[crop], disc(at)[crop], crop))
    (first, rgb, alpha, _), (second, now, _, crop) = crops
    found = propagate(flow_of(rgb, alpha, now, (first, second)), coarse[crop])
    inside = (slice(25, 75), slice(15, 75))  # away from the borders of both
    assert np.abs(found[inside] - full[crop][inside]).mean() < 0.02
    assert found[45:65, 30:58].min() > 0.5


@pytest.mark.parametrize(("found", "filled"), [(True, True), (False, False)])
def test_a_frame_without_the_object_is_skipped(found: bool, filled: bool) -> None:
    hole = disc(72)
    hole[60:] = 0.1
    predictor = GivenAlphas(disc(70), np.zeros((120, 160), np.float32), hole, found=[found, False, True])
    propagator, jobs, frames = propagator_of(predictor, 3)
    (first,) = propagator.matte(jobs[:1], frames[:1])
    assert (PROPAGATED_KEY in first.provenance) == found
    without, last = propagator.matte(jobs[1:], frames[1:])
    assert without.alpha.max() == 0
    assert (float(last.alpha[65:85, 60:88].min()) > 0.5) == filled


@pytest.mark.parametrize("key", [PROPAGATED_KEY, PROPAGATED_KEY_0_1])
def test_existing_alphas_are_propagated_whatever_version_wrote_them(tmp_path: Path, key: str) -> None:
    cv2.imwrite(str(tmp_path / "f.0.png"), draw_frame(70)[..., ::-1])
    alpha = alpha_to_u8(disc(70))
    output = tmp_path / "alpha.png"
    planned = ImageResult("f.0.png", str(output), "planned")
    propagator, *_ = propagator_of(GivenAlphas(), 0)
    existing = Job(tmp_path / "f.0.png", Path("f.0.png"), output, planned)
    assert propagator._read_existing(existing) == (None, False)
    write_alpha(output, disc(70), {key: encode_alpha(alpha)})
    memory, _ = propagator._read_existing(existing)
    assert memory is not None
    assert (memory.alpha == alpha).all()
    assert (memory.rgb == draw_frame(70)).all()


def test_propagation_starts_at_a_keyframe_in_both_directions(shot: Shoot, scene: Path) -> None:
    planned = shot("--dry-run")
    assert planned.exit_code == 0
    done = shot("--progress", "plain", report=scene / "r.json")
    assert done.exit_code == 0, done.output
    messages = [line for line in done.stderr.splitlines() if "done" in line and "plates" in line]
    assert [line.split("sh.")[1][:4] for line in messages] == ["1005", "1006", "1007", "1008", "1003", "1002", "1001"]
    report = json.loads((scene / "r.json").read_text())
    assert (report["settings"]["shot"], report["settings"]["learn_steps"]) == (True, 0)
    assert [Path(image["source"]).name[3:7] for image in report["images"]] == [
        *("1001", "1002", "1003", "1005", "1006", "1007", "1008")
    ]
    assert all(PROPAGATED_KEY in (read_provenance(path) or {}) for path in output_files(scene / "out"))


def write_hint(path: Path, label: str = "keep") -> Path:
    """Write an annotation of labelme: the upper left corner is to be kept, or to be dropped."""
    corner = {"label": label, "points": [[0, 0], [40, 0], [40, 30], [0, 30]], "shape_type": "polygon"}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"shapes": [corner]}))
    return path


class TestHints:
    """A hint of frame 1007; the reference is 1004. Of the frames between them, 1005 is nearer to the reference."""

    def test_only_frames_that_start_at_the_hint_are_recomputed(self, shot: Shoot, scene: Path) -> None:
        folder, report = scene / "hints", scene / "r.json"

        def recomputed(*flags: str, **options: Any) -> list[str]:
            done = shot(*flags, hints=folder, report=report, **options)
            assert done.exit_code == 0, done.output
            images = json.loads(report.read_text())["images"]
            return [image["name"][3:7] for image in images if image["status"] == "done"]

        folder.mkdir()
        assert len(recomputed()) == 7
        first = alphas(scene / "out")
        hint = write_hint(folder / "sh.1007.json")
        planned = shot("--dry-run", hints=folder).stdout
        assert planned.count("(recomputed: its hints are new)") == 1
        assert planned.count(PROPAGATED) == 2
        assert recomputed() == ["1006", "1007", "1008"]
        corrected = alphas(scene / "out")
        assert {name[3:7] for name in first if first[name] != corrected[name]} == {"1006", "1007", "1008"}
        assert (read(scene / "out" / "sh.1007.png")[:30, :40] == 255).all()
        assert recomputed() == []
        (scene / "out" / "sh.1007.png").unlink()
        assert shot("--dry-run", hints=folder).stdout.count(PROPAGATED) == 2
        (scene / "out" / "sh.1007.png").write_bytes(corrected["sh.1007.png"])
        assert len(recomputed(out=scene / "whole")) == 7
        assert alphas(scene / "whole") == corrected
        write_hint(folder / "sh.1002.json", "drop")
        assert recomputed() == ["1001", "1002", "1003"]  # 1003 is as near to the reference, and belongs to the earlier
        assert alphas(scene / "out")["sh.1007.png"] == corrected["sh.1007.png"]
        (folder / "sh.1002.json").unlink()
        hint.unlink()
        planned = shot("--dry-run", hints=folder).stdout
        assert planned.count("(recomputed: its hints were removed)") == 2
        assert planned.count(PROPAGATED) == 4
        assert recomputed() == ["1001", "1002", "1003", "1006", "1007", "1008"]
        assert alphas(scene / "out") == first

    @pytest.mark.parametrize("finished", [2, 3, 5])
    def test_a_stopped_run_is_resumed_with_the_same_bytes(
        self, shot: Shoot, scene: Path, monkeypatch: pytest.MonkeyPatch, finished: int
    ) -> None:
        """The run stops after some frames; a run without hints was finished before."""
        folder = scene / "hints"
        write_hint(folder / "sh.1007.json")
        assert shot(hints=folder, out=scene / "whole").exit_code == 0
        assert shot().exit_code == 0
        with stopped_after(monkeypatch, finished):
            shot("--batch-size", "1", hints=folder, out=scene / "fresh")
        if finished < 3:
            with stopped_after(monkeypatch, finished):
                shot("--batch-size", "1", hints=folder)
        for out in ("fresh", "out"):
            assert alphas(scene / out) != alphas(scene / "whole")
            assert shot("--batch-size", "1", hints=folder, out=scene / out).exit_code == 0
            assert alphas(scene / out) == alphas(scene / "whole")

    def test_a_frame_with_hints_needs_no_reference_in_the_shot(self, shot: Shoot, scene: Path) -> None:
        """All frames start at it; its alpha does not depend on the others."""
        folder = scene / "hints"
        write_hint(folder / "sh.1004.json")
        outside = {"ref": scene / "ref.png", "mask": scene / "mask.png", "hints": folder}
        done = shot("--progress", "plain", **outside)
        assert done.exit_code == 0, done.output
        messages = [line for line in done.stderr.splitlines() if "done" in line and "plates" in line]
        order = [line.split("sh.")[1][:4] for line in messages]
        assert order == ["1004", "1005", "1006", "1007", "1008", "1003", "1002", "1001"]
        assert shot("--frames", "1004", out=scene / "alone", **outside).exit_code == 0
        assert read(scene / "alone" / "sh.1004.png").tolist() == read(scene / "out" / "sh.1004.png").tolist()


def test_propagation_changes_alphas_and_the_digest(shot: Shoot, icm: Icm, scene: Path) -> None:
    assert shot().exit_code == 0
    propagated = alphas(scene / "out")
    options = {"ref": scene / "plates" / f"sh.{KEY}.png", "mask": scene / "key.png", "src": scene / "plates"}
    alone = icm(report=scene / "r.json", **options)
    assert alone.exit_code == 0
    assert json.loads((scene / "r.json").read_text())["summary"]["done"] == 7  # none is taken for the same
    single = alphas(scene / "out")
    assert sorted(single) == sorted(propagated)
    assert sum(single[name] != propagated[name] for name in single) > 4


@pytest.mark.parametrize("form", ["png", "exr"])
@pytest.mark.parametrize("lost", [[1005], [1003], [1007, 1001], [*range(1001, 1009)]])
def test_a_resumed_run_writes_the_same_bytes(shot: Shoot, scene: Path, lost: list[int], form: str) -> None:
    assert shot("--format", form, out=scene / "whole").exit_code == 0
    assert shot("--format", form).exit_code == 0
    for number in lost:
        (scene / "out" / f"sh.{number}.{form}").unlink(missing_ok=True)
    again = shot("--format", form, report=scene / "r.json")
    assert again.exit_code == 0, again.output
    made = {image["name"]: image["status"] for image in json.loads((scene / "r.json").read_text())["images"]}
    assert made["sh.1006.png"] == ("done" if 1005 in lost or len(lost) > 3 else "kept")
    for path in filter(Path.is_file, (scene / "whole").iterdir()):
        assert path.read_bytes() == (scene / "out" / path.name).read_bytes(), path.name


def test_missing_frames_do_not_change_alphas(shot: Shoot, scene: Path, frames: Path) -> None:
    """Nothing is propagated to or from a reported missing frame, so all alphas are kept by the next run."""
    (frames / "sh.1006.png").unlink()
    (frames / "sh.1002.png").unlink()
    assert shot("--missing", "report").exit_code == 1
    before = alphas(scene / "out")
    for missing, code in (("report", 1), ("skip", 0)):
        assert shot("--missing", missing, report=scene / "r.json").exit_code == code
        summary = json.loads((scene / "r.json").read_text())["summary"]
        assert (summary["kept"], summary["done"]) == (5, 0)
    assert alphas(scene / "out") == before
    assert shot(out=scene / "skipped").exit_code == 0
    assert alphas(scene / "skipped") == before


def test_a_frame_that_fails_is_skipped(shot: Shoot, scene: Path, frames: Path) -> None:
    assert shot(out=scene / "whole").exit_code == 0
    whole = frames / "sh.1006.png"
    kept, state = whole.read_bytes(), whole.stat()
    whole.write_bytes(kept[:500])
    failed = shot()
    assert failed.exit_code == 1
    assert "sh.1006.png" in failed.stderr
    broken = alphas(scene / "out")
    assert sorted(broken) == [f"sh.{number}.png" for number in (1001, 1002, 1003, 1005, 1007, 1008)]
    assert shot().exit_code == 1
    assert alphas(scene / "out") == broken
    whole.write_bytes(kept)
    os.utime(whole, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert shot().exit_code == 0
    assert alphas(scene / "out") == alphas(scene / "whole")


@pytest.mark.parametrize("broken", [1002, 1006])
@pytest.mark.parametrize("hinted", [None, 1004, 1006])
@pytest.mark.parametrize("stopped", [False, True])
def test_frames_after_a_damaged_frame_are_recomputed_when_it_is_restored(
    shot: Shoot,
    scene: Path,
    frames: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: int,
    hinted: int | None,
    stopped: bool,
) -> None:
    """The damaged frame keeps the alpha of the first run. The run with the damaged frame may also be stopped."""
    options: dict[str, Any] = {}
    if hinted is not None:
        write_hint(scene / "hints" / f"sh.{hinted}.json")
        reference = {"ref": scene / "ref.png", "mask": scene / "mask.png"}  # no other keyframe
        options = {"hints": scene / "hints", **(reference if hinted == KEY else {})}
    assert shot("--batch-size", "1", **options).exit_code == 0
    first = alphas(scene / "out")
    plate = frames / f"sh.{broken}.png"
    content, state = plate.read_bytes(), plate.stat()
    plate.write_bytes(content[:500])
    with stopped_after(monkeypatch, 1 if stopped else 100):
        assert shot("--batch-size", "1", **options).exit_code != 0
    assert alphas(scene / "out") != first or hinted == broken
    plate.write_bytes(content)
    os.utime(plate, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert shot("--batch-size", "1", **options).exit_code == 0
    assert alphas(scene / "out") == first
    again = shot("--batch-size", "1", report=scene / "r.json", **options)
    assert again.exit_code == 0
    assert json.loads((scene / "r.json").read_text())["summary"]["done"] == 0  # all are kept


def assert_equal_to_a_fresh_run(shot: Shoot, scene: Path) -> None:
    """A run over the existing alphas, and one into an empty folder, succeed and write the same bytes."""
    assert shot().exit_code == 0
    assert shot(out=scene / "whole").exit_code == 0
    assert alphas(scene / "out") == alphas(scene / "whole")


@pytest.mark.parametrize("remaining_bytes", [500, 0])
@pytest.mark.parametrize("has_alpha", [True, False])
def test_frames_after_a_plate_that_stays_broken_are_recomputed_once(
    shot: Shoot, scene: Path, frames: Path, remaining_bytes: int, has_alpha: bool
) -> None:
    """They are recomputed again only if the broken plate changes."""

    def recomputed() -> list[str]:
        assert shot(report=scene / "r.json").exit_code == 1
        images = json.loads((scene / "r.json").read_text())["images"]
        return [image["name"][3:7] for image in images if image["status"] == "done"]

    plate = frames / "sh.1006.png"
    content, state = plate.read_bytes(), plate.stat()
    if has_alpha:
        assert shot().exit_code == 0
    plate.write_bytes(content[:remaining_bytes])
    assert recomputed() == (["1007", "1008"] if has_alpha else ["1001", "1002", "1003", "1005", "1007", "1008"])
    broken = alphas(scene / "out")
    assert recomputed() == []
    (scene / "out" / "sh.1001.png").unlink()
    assert recomputed() == ["1001"]
    assert alphas(scene / "out") == broken
    plate.write_bytes(content[:600])
    assert recomputed() == ["1007", "1008"]
    plate.write_bytes(content)
    os.utime(plate, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert_equal_to_a_fresh_run(shot, scene)


def test_frames_after_a_broken_plate_are_recomputed_if_more_frames_are_before_it(
    shot: Shoot, scene: Path, frames: Path
) -> None:
    """The first run has no frame before the broken one, so nothing is propagated to the frames after it."""
    plate = frames / "sh.1006.png"
    plate.write_bytes(plate.read_bytes()[:500])
    assert shot("--frames", "1006-1008").exit_code == 1
    assert shot("--frames", "1006-1008", report=scene / "r.json").exit_code == 1
    assert json.loads((scene / "r.json").read_text())["summary"]["kept"] == 2
    assert shot().exit_code == 1
    assert shot(out=scene / "whole").exit_code == 1
    assert alphas(scene / "out") == alphas(scene / "whole")


def test_frames_after_a_frame_that_cannot_be_matted_are_recomputed_once(shot: Shoot, scene: Path) -> None:
    """Its hints are made for another size, or its garbage matte is missing."""
    annotation = json.loads(write_hint(scene / "hints" / "sh.1006.json").read_text())
    (scene / "hints" / "sh.1006.json").write_text(json.dumps({**annotation, "imageHeight": 77, "imageWidth": 77}))
    for number in (n for n in FRAMES if n != 1002):
        cv2.imwrite(str(scene / f"garbage.{number}.png"), BLACK)
    options = {"hints": scene / "hints", "garbage": scene / "garbage.####.png", "report": scene / "r.json"}
    for done in (5, 0):
        failed = shot(**options)
        assert failed.exit_code == 1, failed.output
        summary = json.loads((scene / "r.json").read_text())["summary"]
        assert (summary["done"], summary["failed"]) == (done, 2)
    write_hint(scene / "hints" / "sh.1006.json")
    cv2.imwrite(str(scene / "garbage.1002.png"), BLACK)
    assert shot(**options).exit_code == 0
    assert shot(**{**options, "out": scene / "whole"}).exit_code == 0
    assert alphas(scene / "out") == alphas(scene / "whole")


def test_frames_after_a_frame_whose_matte_cannot_be_read_are_recomputed_once(
    shot: Shoot, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in FRAMES:
        cv2.imwrite(str(scene / f"garbage.{number}.png"), BLACK)
    options = {"garbage": scene / "garbage.####.png", "report": scene / "r.json"}
    open_file = ReopeningFile.__init__

    def refuse(self: ReopeningFile, path: Path) -> None:
        if path == scene / "garbage.1006.png":
            raise PermissionError(errno.EACCES, "Permission denied")
        open_file(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(ReopeningFile, "__init__", refuse)
        for done in (6, 0):
            assert shot(**options).exit_code == 1
            summary = json.loads((scene / "r.json").read_text())["summary"]
            assert (summary["done"], summary["failed"]) == (done, 1)
    assert shot(**options).exit_code == 0
    assert shot(**{**options, "out": scene / "whole"}).exit_code == 0
    assert alphas(scene / "out") == alphas(scene / "whole")


def test_frames_after_a_reviewed_frame_with_a_broken_plate_are_recomputed_once(
    shot: Shoot, scene: Path, frames: Path
) -> None:
    assert shot().exit_code == 0
    set_provenance_entry(scene / "out" / "sh.1006.png", REVIEWED_KEY, "2026-01-01 by hand")
    plate = frames / "sh.1006.png"
    content, state = plate.read_bytes(), plate.stat()
    first = alphas(scene / "out")
    plate.write_bytes(content[:500])
    (scene / "out" / "sh.1007.png").unlink()
    for done in (2, 0):
        assert shot(report=scene / "r.json").exit_code == 0
        assert json.loads((scene / "r.json").read_text())["summary"]["done"] == done
    plate.write_bytes(content)
    os.utime(plate, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert shot().exit_code == 0
    assert alphas(scene / "out") == first


def test_a_plate_that_is_still_being_written_is_not_taken_for_one_that_stays_broken(
    shot: Shoot, scene: Path, frames: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is incomplete when it is read, and complete, with the same time, when the next run begins."""
    plate = frames / "sh.1006.png"
    content, state = plate.read_bytes(), plate.stat()
    read_with_digest = Job.read_with_digest

    def read_incomplete(self: Job) -> Any:
        if self.source != plate:
            return read_with_digest(self)
        plate.rename(scene / "away.png")
        try:
            return read_with_digest(self)
        finally:
            (scene / "away.png").rename(plate)
            os.utime(plate, ns=(state.st_atime_ns, state.st_mtime_ns + 1))

    with monkeypatch.context() as patch:
        patch.setattr(Job, "read_with_digest", read_incomplete)
        assert shot().exit_code == 1
    plate.write_bytes(content)
    os.utime(plate, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert_equal_to_a_fresh_run(shot, scene)


def test_frames_after_a_plate_that_a_new_decoder_can_read_are_recomputed(
    shot: Shoot, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is the same: such as a HEIC file before and after pillow-heif is installed."""
    read_with_digest = Job.read_with_digest

    def read_without_decoder(self: Job) -> Any:
        if self.name.name == "sh.1006.png":
            raise ImageError(f"{self.source} needs a decoder")
        return read_with_digest(self)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "read_with_digest", read_without_decoder)
        assert shot().exit_code == 1
    for done in (1, 2, 0):  # the next run finds the alpha of the plate
        assert shot(report=scene / "r.json").exit_code == 0
        assert json.loads((scene / "r.json").read_text())["summary"]["done"] == done
    assert shot(out=scene / "whole").exit_code == 0
    assert alphas(scene / "out") == alphas(scene / "whole")


def test_frames_after_a_frame_whose_output_path_was_in_use_are_recomputed(
    shot: Shoot, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program writes a file there during the run. The plate itself can be read."""
    begin_run, other = FlowPropagator.begin_run, scene / "out" / "sh.1006.png"

    def write_other_file(self: FlowPropagator, jobs: Iterable[Job]) -> Iterable[Job]:
        other.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(other), BLACK)
        return begin_run(self, jobs)

    with monkeypatch.context() as patch:
        patch.setattr(FlowPropagator, "begin_run", write_other_file)
        assert shot().exit_code == 1
    other.unlink()
    assert shot().exit_code == 0
    assert shot(out=scene / "whole").exit_code == 0
    assert alphas(scene / "out") == alphas(scene / "whole")


def test_dry_run_says_which_frame_has_changed_mattes(shot: Shoot, scene: Path) -> None:
    """Frames after it are recomputed because it is propagated to them, not because their mattes changed."""
    for number in FRAMES:
        cv2.imwrite(str(scene / f"garbage.{number}.png"), BLACK)
    options = {"garbage": scene / "garbage.####.png"}
    assert shot(**options).exit_code == 0
    cv2.imwrite(str(scene / "garbage.1006.png"), 255 - BLACK)
    planned = shot("--dry-run", **options).stdout.splitlines()
    reasons = {line.rpartition("sh.")[2][:4]: line.partition("(")[2] for line in planned if "recomputed" in line}
    assert reasons == {
        "1006": "recomputed: garbage matte changed)",
        "1007": PROPAGATED[1:],
        "1008": PROPAGATED[1:],
    }
    planned = shot("--dry-run", "--seed", "7", **options).stdout
    assert planned.count("(recomputed: --seed changed)") == 6
    assert planned.count("(recomputed: --seed and garbage matte changed)") == 1


def test_a_run_that_is_stopped_after_a_replaced_frame_recomputes_the_next_frames(
    shot: Shoot, scene: Path, frames: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shot("--batch-size", "1").exit_code == 0
    shutil.copyfile(frames / "sh.1008.png", frames / "sh.1005.png")
    with stopped_after(monkeypatch, 1):
        shot("--batch-size", "1")
    assert shot("--batch-size", "1").exit_code == 0
    assert shot("--batch-size", "1", out=scene / "whole").exit_code == 0
    assert alphas(scene / "out") == alphas(scene / "whole")


def test_out_of_memory_in_a_batch_changes_nothing(shot: Shoot, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shot("--batch-size", "4", out=scene / "whole").exit_code == 0
    refine_alphas, calls = Predictor.refine_alphas, iter(range(100))

    def failing(self: Predictor, *arguments: Any) -> list[FrameAlpha]:
        if next(calls) == 2:
            raise torch.OutOfMemoryError
        return refine_alphas(self, *arguments)

    monkeypatch.setattr(Predictor, "refine_alphas", failing)
    assert "out of memory" in shot("--batch-size", "4").stderr
    assert next(calls) > 7  # some were done twice
    assert alphas(scene / "out") == alphas(scene / "whole")


def test_a_shard_depends_on_no_other_shard(shot: Shoot, scene: Path) -> None:
    for number in (2, 1, 2):
        assert shot("--shard", f"{number}/2").exit_code == 0
    together = alphas(scene / "out")
    assert len(together) == 7
    assert shot("--shard", "2/2", out=scene / "alone").exit_code == 0
    alone = alphas(scene / "alone")
    assert alone == {name: together[name] for name in alone}
    assert len(alone) == 4


@pytest.mark.slow
def test_alphas_of_another_order_are_recomputed(shot: Shoot, scene: Path) -> None:
    """Of every second frame, or of shards: they are propagated from other frames, so their bytes differ."""
    assert shot(out=scene / "whole").exit_code == 0
    for runs in (
        (("--frames", "1001-1008x2"), ("--frames", "1001-1008y2")),
        [("--shard", f"{n}/3") for n in (1, 2, 3)],
    ):
        for flags in runs:
            assert shot(*flags).exit_code == 0
        assert alphas(scene / "out") != alphas(scene / "whole")
        assert shot().exit_code == 0
        assert alphas(scene / "out") == alphas(scene / "whole")


def test_reference_by_a_symbolic_link_is_the_frame(shot: Shoot, scene: Path, frames: Path) -> None:
    assert shot(out=scene / "whole").exit_code == 0
    (scene / "link.png").symlink_to(frames / f"sh.{KEY}.png")
    (scene / "linked").symlink_to(frames)
    ways = ({"ref": scene / "link.png"}, {"ref": scene / "linked" / f"sh.{KEY}.png"}, {"src": scene / "linked"})
    for number, options in enumerate(ways):
        out = scene / f"way{number}"
        assert shot(out=out, **options).exit_code == 0
        assert len(alphas(out)) == 7
        for name in alphas(out):
            assert (read(out / name) == read(scene / "whole" / name)).all()


def test_shot_needs_a_single_device(shot: Shoot, scene: Path) -> None:
    for flags in (("--device", "cpu,cpu"), ("--ray", "auto")):
        refused = shot(*flags)
        assert refused.exit_code == 2
        assert "--shot works on one device" in refused.stderr
    assert not (scene / "out").exists()


def test_frames_of_other_sizes_are_matted_without_propagation(shot: Shoot, frames: Path) -> None:
    small = cv2.imread(str(frames / "sh.1006.png"))
    cv2.imwrite(str(frames / "sh.1006.png"), cv2.resize(small, (90, 150)))
    assert shot("--batch-size", "4").exit_code == 0


def test_a_frame_of_another_size_is_skipped_like_a_damaged_one(shot: Shoot, scene: Path, frames: Path) -> None:
    whole = frames / "sh.1006.png"
    content = cv2.imread(str(whole))
    whole.write_bytes(whole.read_bytes()[:500])
    assert shot("--batch-size", "1", out=scene / "torn").exit_code == 1
    cv2.imwrite(str(whole), cv2.resize(content, (90, 150)))
    assert shot("--batch-size", "1").exit_code == 0
    for name in alphas(scene / "torn"):
        assert (read(scene / "torn" / name) == read(scene / "out" / name)).all(), name


def test_shots_of_a_dataset_are_propagated_and_reported(data: Path, small_model: Path) -> None:
    given = {"dataset": "folder", "images": data / "images", "alphas": data / "alphas", "model": str(small_model)}
    with pytest.raises(UsageError, match="shot= requires frames of shots"):
        evaluate(**given, shot=True)
    alone, together = (evaluate(**given, video=True, shot=shot) for shot in (False, True))
    assert (alone.settings["shot"], together.settings["shot"]) == (False, True)
    assert [row.evaluation.scores for row in alone.results] != [row.evaluation.scores for row in together.results]


def test_a_remembered_frame_is_small() -> None:
    memory = FrameMemory.from_frame(np.zeros((1080, 1920, 3), np.uint8), np.ones((200, 100), np.float32), CONFIG)
    assert memory.rgb.shape == (243, 432, 3)
    assert memory.alpha.shape == (243, 432)
    assert (memory.alpha == alpha_to_u8(np.ones(1, np.float32))[0]).all()
