"""Corrections of ``icm review``: answers and accepted files are those of ``icm matte --hints``, and nothing is lost."""

from __future__ import annotations

import base64
import functools
import io
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import Icm, alphas, read
from PIL import Image
from test_formats import linear
from test_objects import small_objects
from test_windows import write_cropped_exr

from icm_cli.errors import IcmError, OutputError, UsageError
from icm_cli.files import atomic_writes
from icm_cli.images.writing import read_provenance, set_provenance_entry
from icm_cli.matting.provenance import REVIEWED_KEY
from icm_cli.review.corrections import Corrections
from icm_cli.review.images import DisplayImages
from icm_cli.review.run import ReviewRun
from icm_cli.review.state import ModelNotReadyError, ReviewState, StaleAnswerError, StaleRevisionError

pytestmark = pytest.mark.usefixtures("small_decoder")
Review = tuple[ReviewRun, ReviewState, Corrections]
OpenReview = Callable[[], Review]


@pytest.fixture
def small_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the decoder that hints prompt, if the model has none, by a small one with random weights."""
    monkeypatch.setattr("icm_cli.matting.prompting.load_objects_and_edges", lambda _: (small_objects(), None))


@pytest.fixture
def open_review(scene: Path) -> Iterator[OpenReview]:
    """A function that opens the review of the run in the folder out of the scene, and waits for its model."""
    opened: list[Corrections] = []

    def open_again() -> Review:
        run = ReviewRun(scene / "out", None, lambda _: None)
        run.scan_alphas()
        state = ReviewState(run.record_folder)
        corrections = Corrections(run, state, None, lambda _: None)
        opened.append(corrections)
        corrections.load_model()
        wait_for_model(corrections)
        return run, state, corrections

    yield open_again
    for each in opened:
        each.close()


def wait_for_model(corrections: Corrections) -> None:
    while corrections.model_state == "loading":
        time.sleep(0.02)
    assert corrections.model_state == "ready", corrections.model_error


def point(label: str, x: float, y: float) -> dict[str, Any]:
    return {"label": label, "shape_type": "point", "points": [[x, y]]}


def brush(label: str, left: int, top: int, inside: np.ndarray) -> dict[str, Any]:
    """Return the shape of a stroke as the browser sends it: a canvas whose alpha is above 0 inside."""
    rgba = np.zeros((*inside.shape, 4), np.uint8)
    rgba[inside] = (255, 0, 0, 40)
    encoded = io.BytesIO()
    Image.fromarray(rgba).save(encoded, format="PNG")
    corners = [[left, top], [left + inside.shape[1], top + inside.shape[0]]]
    mask = base64.b64encode(encoded.getvalue()).decode()
    return {"label": label, "shape_type": "mask", "points": corners, "mask": mask}


def revision(state: ReviewState, run: ReviewRun, id: int) -> int:
    return state.read(run.names[id]).revision


def all_files(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files in a folder by relative path, hidden ones included."""
    found = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def without_stamp(path: Path) -> bytes:
    """Return the content of a file without the stamp of the review."""
    copy = path.with_name(f"copy-of-{path.name}")
    shutil.copy(path, copy)
    set_provenance_entry(copy, REVIEWED_KEY, None)
    content = copy.read_bytes()
    copy.unlink()
    return content


def strokes(x: int = 0) -> list[dict[str, Any]]:
    """Return hints of all kinds about an image of at least 160x100 pixels, whose points are at x and below."""
    stroke = np.zeros((9, 12), np.bool_)
    stroke[3:6, 2:11] = True
    box = {"label": "fg", "shape_type": "rectangle", "points": [[x + 20, 15], [x + 70, 70]]}
    line = {"label": "bg", "shape_type": "linestrip", "points": [[90, 80], [120.5, 85.25]]}
    single = [point("fg", x + 30, 30), point("bg", x + 85, 65)]
    return [*single, box, line, brush("keep", 100, 40, stroke), brush("drop", 40, 50, stroke)]


def check_reproducible(icm: Icm, scene: Path, written: Path, hints: Path, **options: Any) -> None:
    """Check that a run without the page makes the accepted file, and keeps it as up to date."""
    fresh = icm(out=scene / "fresh", hints=hints, **options)
    assert fresh.exit_code == 0, fresh.output
    assert (scene / "fresh" / written.name).read_bytes() == without_stamp(written)
    again = icm(hints=hints, report=scene / "r.json", **options)
    assert again.exit_code == 0, again.output
    assert "reviewed alpha" not in again.stderr  # it is up to date
    images = {image["output"]: image for image in json.loads((scene / "r.json").read_text())["images"]}
    assert images[str(written)]["status"] == "kept"
    assert images[str(written)]["reviewed"].startswith("corrected")
    assert images[str(written)]["has_hints"]


def check_answers(icm: Icm, scene: Path, open_review: OpenReview) -> None:
    assert icm().exit_code == 0
    run, state, corrections = open_review()
    id, written = run.find_id("wall.jpg"), scene / "out" / "wall.png"
    assert id is not None
    shapes, before = strokes(), read(written)
    refined = corrections.answer(id, shapes, refined=True)
    coarse = corrections.answer(id, shapes, refined=False)
    assert (corrections.answer(id, [], refined=True) == before).all()
    assert refined.shape == coarse.shape == before.shape
    assert (refined != before).any()
    for alpha in (coarse, refined):
        assert alpha[30, 30] > 127 > alpha[65, 85]
        assert (alpha[43:46, 102:111] == 255).all()
        assert (alpha[53:56, 42:51] == 0).all()
    assert (read(written) == before).all()
    corrections.accept(id, 0, shapes)
    assert (read(written) == refined).all()
    run.refresh(id)
    item = run.item(id, state.read("wall.jpg"))
    assert (item["status"], item["has_hints"]) == ("accepted", True)
    annotation = json.loads((run.hints_folder / "wall.json").read_text())
    assert annotation["imagePath"].endswith("imgs/wall.jpg")
    assert run.read_shapes(id, refined.shape) == annotation["shapes"]
    assert (corrections.answer(id, annotation["shapes"], refined=True) == refined).all()
    check_reproducible(icm, scene, written, run.hints_folder)


def test_answers_and_accepted_files_are_those_of_icm_matte(icm: Icm, scene: Path, open_review: OpenReview) -> None:
    check_answers(icm, scene, open_review)


@pytest.mark.slow
def test_answers_of_the_default_model(icm: Icm, scene: Path, open_review: OpenReview) -> None:
    check_answers(functools.partial(icm, model="lite"), scene, open_review)


@pytest.mark.parametrize(
    "options", [{}, {"format": "exr"}, {"format": "exr", "foreground": "auto"}, {"trimap": "also"}]
)
def test_exr_with_mattes_whose_windows_differ(
    icm: Icm, scene: Path, open_review: OpenReview, options: dict[str, Any]
) -> None:
    """The data window begins at x 20, y 10 of the display window, in whose coordinates all corrections are."""
    rgb = linear(read(scene / "imgs" / "wall.jpg")[..., ::-1])
    write_cropped_exr(scene / "plates" / "a.exr", rgb, (20, 10, 150, 105), (16, -8))
    garbage = np.zeros(rgb.shape[:2], np.uint8)
    garbage[70:, 90:] = 255
    cv2.imwrite(str(scene / "garbage.png"), garbage)
    options |= {"src": scene / "plates", "garbage": scene / "garbage.png"}
    assert icm(**options).exit_code == 0
    run, state, corrections = open_review()
    (id,) = range(len(run.jobs))
    alpha = corrections.answer(id, strokes(5), refined=True)
    assert alpha.shape == rgb.shape[:2]
    assert not alpha[:10].any()
    with pytest.raises(UsageError, match="outside the data window"):
        corrections.answer(id, [point("fg", 2, 2)], refined=True)
    with pytest.raises(IcmError, match="outside the data window"):
        corrections.accept(id, 0, [point("fg", 2, 2)])
    assert revision(state, run, id) == 0
    corrections.accept(id, 0, strokes(5))
    written = run.jobs[id].output
    rounding = 1 if options.get("format") == "exr" else 0
    assert cv2.absdiff(DisplayImages(run).read_alpha(id), alpha).max() <= rounding
    if "trimap" in options:
        assert REVIEWED_KEY in (read_provenance(run.jobs[id].trimap) or {})
    check_reproducible(icm, scene, written, run.hints_folder, **options)


def test_a_single_frame_next_to_a_shot_is_a_shot_of_its_own(icm: Icm, scene: Path, open_review: OpenReview) -> None:
    """Also if the reference is a keyframe of the other shot."""
    frames, image = scene / "frames", read(scene / "ref.png")
    frames.mkdir()
    for name in ("a.1", "a.2", "a.3", "take.2"):
        cv2.imwrite(str(frames / f"{name}.png"), image)
    assert icm("--shot", src=frames, ref=frames / "a.1.png").exit_code == 0
    _, _, corrections = open_review()
    assert list(map(corrections.outdated_reason, range(3))) == ["", "", ""]


def test_frame_of_a_shot_is_a_keyframe(icm: Icm, scene: Path, open_review: OpenReview) -> None:
    image = read(scene / "imgs" / "wall.jpg")
    frames = scene / "frames"
    frames.mkdir()
    for number in range(1, 5):
        cv2.imwrite(str(frames / f"a.{number:04d}.png"), np.roll(image, 3 * number, axis=1))
    shot = functools.partial(icm, "--shot", src=frames)
    assert shot().exit_code == 0
    run, state, corrections = open_review()
    id, written = 2, scene / "out" / "a.0003.png"
    before = alphas(scene / "out")
    assert (corrections.answer(id, [], refined=True) == read(written)).all()
    alpha = corrections.answer(id, strokes(), refined=True)
    assert not any(map(corrections.outdated_reason, range(4)))
    corrections.accept(id, 0, strokes())
    propagated = "a frame that is propagated to it changed"
    assert list(map(corrections.outdated_reason, range(4))) == [propagated, propagated, "", propagated]
    assert (read(written) == alpha).all()
    kept = written.read_bytes()
    fresh = shot(out=scene / "fresh", hints=run.hints_folder)
    assert fresh.exit_code == 0, fresh.output
    assert (scene / "fresh" / written.name).read_bytes() == without_stamp(written)
    assert shot(hints=run.hints_folder, report=scene / "r.json").exit_code == 0
    images = json.loads((scene / "r.json").read_text())["images"]
    assert [image["status"] for image in images] == ["done", "done", "kept", "done"]
    assert written.read_bytes() == kept
    for name in ("a.0001.png", "a.0002.png", "a.0004.png"):  # propagated from the accepted frame
        assert (scene / "out" / name).read_bytes() == (scene / "fresh" / name).read_bytes()
    corrections.undo(id, revision(state, run, id))
    assert alphas(scene / "out")["a.0003.png"] == before["a.0003.png"]


def test_undo_brings_back_every_file_and_status(icm: Icm, scene: Path, open_review: OpenReview) -> None:
    """Hints of other programs are replaced by one file of labelme, and come back too."""
    hints = scene / "hints"
    (hints / "sub").mkdir(parents=True)
    painted = np.full((*read(scene / "imgs" / "wall.jpg").shape[:2], 1), 128, np.uint8)
    painted[:20, :30] = 255
    cv2.imwrite(str(hints / "wall.png"), painted)
    assert icm(hints=hints).exit_code == 0
    run, state, corrections = open_review()
    id, root = run.find_id("wall.jpg"), scene / "out"
    assert id is not None
    before, hinted = (root / "wall.png").read_bytes(), read(root / "wall.png")
    shapes = run.read_shapes(id, (painted.shape[0], painted.shape[1]))
    assert shapes
    assert [(shape["label"], shape["shape_type"]) for shape in shapes] == [("fg", "mask")]
    assert (corrections.answer(id, shapes, refined=True) == hinted).all()
    corrections.accept(id, 0, None)
    accepted = (root / "wall.png").read_bytes()
    assert without_stamp(root / "wall.png") == before
    corrections.accept(id, revision(state, run, id), [*shapes, point("bg", 85, 65)])
    assert sorted(path.name for path in hints.glob("*.*")) == ["wall.json"]
    corrected = (root / "wall.png").read_bytes()
    corrections.reject(id, revision(state, run, id))
    assert b"icm-reviewed" not in (root / "wall.png").read_bytes()
    assert run.item(id, state.read("wall.jpg"))["status"] == "rejected"
    expected = [
        (corrected, "accepted", ["wall.json"]),
        (accepted, "accepted", ["wall.png"]),
        (before, "open", ["wall.png"]),
    ]
    for content, status, names in expected:
        assert state.read("wall.jpg").undo
        corrections.undo(id, revision(state, run, id))
        run.refresh(id)
        assert (root / "wall.png").read_bytes() == content
        assert run.item(id, state.read("wall.jpg"))["status"] == status
        assert sorted(path.name for path in hints.glob("*.*")) == names
    assert not state.read("wall.jpg").undo
    assert not list((run.record_folder / "undo").iterdir())
    with pytest.raises(UsageError, match="no change that can be undone"):
        corrections.undo(id, revision(state, run, id))


def test_a_stale_revision_changes_nothing(icm: Icm, scene: Path, open_review: OpenReview) -> None:
    assert icm().exit_code == 0
    run, state, corrections = open_review()
    _, _, other = open_review()
    corrections.accept(0, 0, None)
    before = alphas(scene / "out")
    for change in (
        lambda: other.accept(0, 0, None),
        lambda: other.accept(0, 0, strokes()),
        lambda: other.reject(0, 0),
        lambda: other.undo(0, 0),
    ):
        with pytest.raises(StaleRevisionError):
            change()
    assert alphas(scene / "out") == before
    other.undo(0, revision(state, run, 0))
    assert not state.read(run.names[0]).undo


def test_undo_does_not_replace_an_alpha_that_was_written_again(icm: Icm, open_review: OpenReview, scene: Path) -> None:
    assert icm().exit_code == 0
    run, state, corrections = open_review()
    corrections.accept(0, 0, None)
    assert icm("--overwrite").exit_code == 0
    after = alphas(scene / "out")
    with pytest.raises(IcmError, match="was written again since"):
        corrections.undo(0, revision(state, run, 0))
    assert alphas(scene / "out") == after


def test_hints_that_are_removed_are_removed_from_the_alpha(icm: Icm, open_review: OpenReview) -> None:
    assert icm().exit_code == 0
    run, state, corrections = open_review()
    before = run.jobs[0].output.read_bytes()
    corrections.accept(0, 0, strokes())
    empty = brush("keep", 3, 3, np.zeros((4, 4), np.bool_))
    corrections.accept(0, revision(state, run, 0), [empty])
    assert without_stamp(run.jobs[0].output) == before
    assert not run.hint_paths(0)


def test_hints_that_cannot_be_used_change_nothing(icm: Icm, open_review: OpenReview, scene: Path) -> None:
    assert icm().exit_code == 0
    run, state, corrections = open_review()
    before = all_files(scene / "out")
    mask = {"label": "fg", "shape_type": "mask"}
    wrong: list[Any] = [
        [point("fg", 3, 3), point("bg", 3.5, 3.5)],
        [point("fg", 5000, 3)],
        [{**mask, "points": [[0, 0], [3, 3]], "mask": "@"}],
        [{**mask, "points": [[0, 0]], "mask": ""}],
        [{"label": "fg", "shape_type": "star", "points": [[0, 0]]}],
        [{"label": "fg", "points": [["x", 0]]}],
        [{"label": 3}],
        "shapes",
    ]
    for shapes in wrong:
        for change in (corrections.answer, corrections.accept):
            with pytest.raises(UsageError, match="the hints cannot be used"):
                change(0, *([shapes, True] if change == corrections.answer else [0, shapes]))
    assert {name: data for name, data in all_files(scene / "out").items() if "lock" not in name} == before
    assert revision(state, run, 0) == 0


def test_a_disk_that_is_full_changes_nothing(
    icm: Icm, open_review: OpenReview, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert icm().exit_code == 0
    run, state, corrections = open_review()
    corrections.accept(0, 0, strokes())
    before = all_files(scene / "out")

    def fail(*_: Any) -> None:
        raise OutputError("no space left on the device")

    monkeypatch.setattr("icm_cli.matting.engine.write_alpha", fail)
    with pytest.raises(IcmError, match="no space left"):
        corrections.accept(0, revision(state, run, 0), [point("fg", 30, 30)])
    after = all_files(scene / "out")
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} == {".icm/review.json"}  # two newer revisions
    assert len(state.read(run.names[0]).undo) == 1


def test_hints_and_decisions_wait_while_the_model_loads(icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert icm().exit_code == 0
    released, load = threading.Event(), Corrections._load
    monkeypatch.setattr(Corrections, "_load", lambda corrections: released.wait(60) and load(corrections))
    run = ReviewRun(scene / "out", None, lambda _: None)
    state = ReviewState(run.record_folder)
    corrections = Corrections(run, state, None, lambda _: None)
    with ThreadPoolExecutor(2) as executor:
        accepting = executor.submit(corrections.accept, 0, 0, [point("bg", 20, 20)])
        answering = executor.submit(corrections.answer, 1, [point("bg", 20, 20)], refined=False)
        while corrections._loading is None:
            time.sleep(0.01)
        assert corrections.model_state == "loading"
        assert state.read(run.names[0]).status == "open"
        assert not answering.done()
        released.set()
        accepting.result()
        assert answering.result().dtype == np.uint8
    assert state.read(run.names[0]).status == "accepted"
    assert run.refresh(0).is_reviewed
    corrections.close()


def test_a_device_that_does_not_exist_is_reported_in_the_terminal(icm: Icm, scene: Path) -> None:
    assert icm().exit_code == 0
    run, notices = ReviewRun(scene / "out", None, lambda _: None), list[str]()
    corrections = Corrections(run, ReviewState(run.record_folder), "cuda:99", notices.append)
    corrections.load_model()
    while corrections.model_state == "loading":
        time.sleep(0.02)
    corrections.close()
    assert corrections.model_state == "failed"
    (notice,) = notices
    assert notice == f"the model cannot be loaded: {corrections.model_error}"
    assert "cuda:99" in notice


def test_a_model_that_cannot_be_loaded_is_loaded_again_on_demand(icm: Icm, scene: Path) -> None:
    """Hints do not load it again, and only the first attempt is a notice."""
    assert icm().exit_code == 0
    (scene / "mask.png").rename(scene / "moved.png")
    run, notices = ReviewRun(scene / "out", None, lambda _: None), list[str]()
    corrections = Corrections(run, ReviewState(run.record_folder), None, notices.append)
    for change in (corrections.answer, corrections.accept):
        with pytest.raises(ModelNotReadyError, match=r"the model cannot be loaded: .*mask\.png does not exist"):
            change(0, *([[point("fg", 30, 30)], False] if change == corrections.answer else [0, [point("fg", 30, 30)]]))
    (scene / "moved.png").rename(scene / "mask.png")
    with pytest.raises(ModelNotReadyError):
        corrections.answer(0, [point("fg", 30, 30)], refined=False)
    assert len(notices) == 1
    corrections.reload_model()
    assert corrections.answer(0, [point("fg", 30, 30)], refined=False)[30, 30] > 127
    assert corrections.model_state == "ready"
    network = corrections._model and corrections._model._predictor
    corrections.reload_model()  # does nothing
    assert (corrections.model_state, corrections._model and corrections._model._predictor) == ("ready", network)
    corrections.close()


def test_two_tabs_with_hints_while_the_model_fails_to_load_get_the_reason(icm: Icm, scene: Path) -> None:
    """A third tab starts to load it again as soon as it has failed, before the hints of the two are answered."""
    assert icm().exit_code == 0
    (scene / "mask.png").rename(scene / "moved.png")
    run = ReviewRun(scene / "out", None, lambda _: None)

    def handle_failure(_: str) -> None:  # in the thread of the model, which answers nothing meanwhile
        while corrections._executor._work_queue.qsize() < 2:
            time.sleep(0.01)
        (scene / "moved.png").rename(scene / "mask.png")
        corrections.reload_model()

    corrections = Corrections(run, ReviewState(run.record_folder), None, handle_failure)
    with ThreadPoolExecutor(2) as tabs:
        answering = tabs.submit(corrections.answer, 0, [point("fg", 30, 30)], refined=False, tab="one")
        accepting = tabs.submit(corrections.accept, 1, 0, [point("fg", 30, 30)])
        for request in (answering, accepting):
            with pytest.raises(ModelNotReadyError, match=r"mask\.png does not exist"):
                request.result(60)
    assert corrections.answer(0, [point("fg", 30, 30)], refined=False)[30, 30] > 127
    corrections.close()


def test_newer_requests_of_a_tab_replace_those_that_wait(
    icm: Icm, open_review: OpenReview, monkeypatch: pytest.MonkeyPatch
) -> None:
    from icm_cli.review.model import RunModel

    assert icm().exit_code == 0
    _, _, corrections = open_review()
    gate, begun = threading.Event(), threading.Event()
    answer = RunModel.answer

    def slow_answer(*arguments: Any, **options: Any) -> Any:
        begun.set()
        gate.wait(30)
        return answer(*arguments, **options)

    monkeypatch.setattr(RunModel, "answer", slow_answer)
    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(corrections.answer, 0, [], refined=False, tab="one")
        begun.wait(30)
        waiting = threads.submit(corrections.answer, 0, [], refined=False, tab="one")
        time.sleep(0.2)  # until it waits
        other = threads.submit(corrections.answer, 0, [], refined=False, tab="two")
        newest = threads.submit(corrections.answer, 0, [], refined=False, tab="one")
        with pytest.raises(StaleAnswerError):
            waiting.result(30)
        gate.set()
        assert first.result(30).shape == other.result(30).shape == newest.result(30).shape


@pytest.fixture
def snapshots(icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Copies of the scene before and after every file that is put in place or removed: what a killed process leaves.

    The run under review, whose threads would write files while others are copied, is made before.
    """
    assert icm(trimap="also").exit_code == 0
    taken: list[Path] = []
    copy_file, numbers = shutil.copy2, itertools.count()

    def take() -> None:
        taken.append(scene.parent / f"snapshot-{next(numbers)}")
        shutil.copytree(scene, taken[-1], copy_function=copy_file)

    def take_around(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            take()
            result = change(*arguments, **options)
            take()
            return result

        return changed

    monkeypatch.setattr("icm_cli.files.atomic_writes._rename", take_around(atomic_writes._rename))
    monkeypatch.setattr("icm_cli.review.undo.shutil.copy2", take_around(copy_file))
    monkeypatch.setattr(Path, "unlink", take_around(Path.unlink))
    return taken


@pytest.mark.slow
def test_a_killed_process_loses_nothing(
    open_review: OpenReview, scene: Path, snapshots: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state, corrections = open_review()
    alpha = run.jobs[0].output
    outputs = [alpha, run.jobs[0].trimap]
    old = [path.read_bytes() for path in outputs]
    snapshots.clear()
    corrections.accept(0, 0, strokes())
    new, hints = [path.read_bytes() for path in outputs], run.hint_target(0).read_bytes()
    corrections.undo(0, revision(state, run, 0))
    assert [path.read_bytes() for path in outputs] == old
    monkeypatch.undo()
    assert len(snapshots) > 20
    seen = set()
    for number, snapshot in enumerate(snapshots):
        shutil.rmtree(scene)
        shutil.copytree(snapshot, scene)
        run = ReviewRun(scene / "out", None, lambda _: None)
        run.scan_alphas()
        state = ReviewState(run.record_folder)
        corrections._run, corrections._state = run, state
        content = [path.read_bytes() for path in outputs]
        assert all(each in pair for each, pair in zip(content, zip(old, new, strict=True), strict=True))
        saved = [path.read_bytes() for path in run.hint_paths(0)]
        assert saved in ([], [hints])
        item = run.item(0, state.read(run.names[0]))
        assert (item["status"] == "accepted") == (content[0] == new[0])
        seen.add((content[0] == new[0], content[1] == new[1], bool(saved)))
        if content[0] == new[0]:
            assert state.read(run.names[0]).undo, number  # the earlier alpha is not lost
        if state.read(run.names[0]).undo:
            corrections.undo(0, revision(state, run, 0))
            assert [path.read_bytes() for path in outputs] == old
            assert not run.hint_paths(0)
    assert {(False, False, False), (False, False, True), (False, True, True), (True, True, True)} <= seen
