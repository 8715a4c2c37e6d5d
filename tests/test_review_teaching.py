"""Teaching of ``icm review``: references and negatives from reviewed images, and the recompute."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import Icm, alphas, read, shrink
from test_review_corrections import OpenReview, open_review, point, revision, small_decoder, wait_for_model
from typer.testing import CliRunner

from icm_cli.errors import UsageError
from icm_cli.files.atomic_writes import locked_file
from icm_cli.files.json_files import write_json
from icm_cli.matting.matte import read_all_references
from icm_cli.matting.run_record import command_line
from icm_cli.options import MatteOptions
from icm_cli.review import undo
from icm_cli.review.run import ReviewRun
from icm_cli.review.state import ReviewState
from icm_cli.review.teaching import Teaching, measure_change

__all__ = ["open_review", "small_decoder"]
pytestmark = pytest.mark.usefixtures("small_decoder")


def open_teaching(open_review: OpenReview) -> tuple[ReviewRun, ReviewState, Teaching]:
    run, state, corrections = open_review()
    return run, state, Teaching(run, state, corrections, lambda _: None)


def image_id(run: ReviewRun, name: str) -> int:
    id = run.find_id(name)
    assert id is not None
    return id


def accept(run: ReviewRun, state: ReviewState, teaching: Teaching, name: str) -> int:
    id = image_id(run, name)
    teaching._corrections.accept(id, revision(state, run, id), None)
    return id


def wait_until(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + 400
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.05)


def recompute(teaching: Teaching) -> dict[str, Any]:
    teaching.start_recompute()
    wait_until(lambda: teaching.recompute_progress()["state"] != "running")
    return teaching.recompute_progress()


def replace_recompute(
    monkeypatch: pytest.MonkeyPatch, name: str, outputs: Sequence[Path], greys: Sequence[int]
) -> None:
    """Replace ``icm matte``: each recompute writes the outputs of one image, filled with the next grey."""
    event = json.dumps({"event": "image", "name": name, "status": "done", "ended": 1, "total": 1})
    remaining = iter(greys)

    def start_writing(*_: str, **streams: Any) -> subprocess.Popen[bytes]:
        grey = next(remaining)
        for output in outputs:
            write_grey(output, grey)
        return subprocess.Popen(["echo", event], **streams)

    monkeypatch.setattr("icm_cli.review.teaching.start_module", start_writing)


def write_grey(path: Path, grey: int, height: int = 133, width: int = 200) -> None:
    """Replace an alpha as icm does, by another file: the saved alpha is a hard link of the old one."""
    cv2.imwrite(str(path.with_suffix(".new.png")), np.full((height, width), grey, np.uint8))
    path.with_suffix(".new.png").replace(path)


def run_command(line: str) -> Any:
    from icm_cli.cli import app

    return CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)


@pytest.mark.slow
def test_references_negatives_and_recompute(icm: Icm, scene: Path, open_review: OpenReview) -> None:
    assert icm().exit_code == 0
    before = alphas(scene / "out")
    run, state, teaching = open_teaching(open_review)
    plain = command_line(teaching.options())
    wall, pad, deep = (run.find_id(name) for name in ("wall.jpg", "pad.0101.png", "sub/deep.png"))
    assert wall is not None
    assert pad is not None
    assert deep is not None
    with pytest.raises(UsageError, match="accept it first"):
        teaching.teach(wall, "reference", "alpha")
    accept(run, state, teaching, "wall.jpg")
    with pytest.raises(UsageError, match="a reference needs the alpha"):
        teaching.teach(wall, "reference", "image")
    teaching.teach(wall, "reference", "alpha")
    teaching.teach(deep, "negative", "image")
    wait_for_model(teaching._corrections)
    command = command_line(teaching.options())
    assert f"--ref {scene}/imgs/wall.jpg" in command
    assert f"--not-ref {scene}/imgs/sub/deep.png" in command
    kept = (scene / "out" / "wall.png").read_bytes()
    progress = recompute(teaching)
    assert (progress["state"], progress["message"]) == ("done", "")
    after = alphas(scene / "out")
    assert after["wall.png"] == kept
    differences = {
        id: measure_change(read_bytes(before[name]), read_bytes(after[name]))
        for id, name in ((pad, "pad.0101.png"), (deep, "sub/deep.png"))
    }
    found = {each["id"]: each["difference"] for each in progress["changed"]}
    assert found == pytest.approx({id: value for id, value in differences.items() if value}, abs=5e-4)
    assert found[deep] > 0.001
    values = [each["difference"] for each in progress["changed"]]
    assert values == sorted(values, reverse=True)
    assert state.read("sub/deep.png").change == pytest.approx(found[deep])
    assert not (run.record_folder / "before").exists()
    # The command reproduces everything, and the review that is opened again knows what was taught.
    fresh = command.replace(f"--out {scene}/out", f"--out {scene}/fresh")
    outcome = run_command(fresh)
    assert outcome.exit_code == 0
    assert f"{scene}/imgs/wall.jpg skipped: a reference or its mask" in outcome.stderr
    made = alphas(scene / "fresh")
    assert {name: after[name] for name in made if name != "wall.png"} == {n: d for n, d in made.items()}
    again, _, other = open_teaching(open_review)
    assert again.names == run.names
    assert again.item(wall, state.read("wall.jpg"))["taught"] == "reference"
    assert command_line(other.options()) == command
    other.forget(wall)
    other.forget(deep)
    assert command_line(other.options()) == plain
    assert not any([*(run.record_folder / name).iterdir()] for name in ("references", "negatives"))


def read_bytes(content: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)


@pytest.mark.parametrize("form", ["cut-out", "label", "trimap"])
def test_references_of_the_run_stay_the_same_when_others_are_added(
    icm: Icm, scene: Path, open_review: OpenReview, form: str
) -> None:
    rgb, mask = read(scene / "ref.png"), read(scene / "mask.png")
    mask = mask if mask.ndim == 2 else mask[..., 0]
    options: dict[str, Any] = {}
    if form == "cut-out":
        cv2.imwrite(str(scene / "ref.png"), np.dstack([rgb, mask]))
        options["mask"] = None
    elif form == "label":
        cv2.imwrite(str(scene / "mask.png"), np.where(mask > 127, 7, np.where(np.indices(mask.shape)[0] < 9, 3, 0)))
        options["mask_label"] = "7"
    else:
        unknown = cv2.dilate(mask, np.ones((5, 5), np.uint8)) > 127
        cv2.imwrite(str(scene / "mask.png"), np.where(mask > 127, 255, np.where(unknown, 128, 0)))
        options["mask_orientation"] = "upright"
    assert icm(**options).exit_code == 0
    run, state, teaching = open_teaching(open_review)
    wall = accept(run, state, teaching, "wall.jpg")
    teaching.teach(wall, "reference", "alpha")
    (before,) = read_all_references(run.options, lambda _: None)
    first, second = read_all_references(teaching.options(), lambda _: None)
    assert first.digest == before.digest
    assert (second.guidance == (read(scene / "out" / "wall.png") > 128)).all()
    assert "None" not in command_line(teaching.options())
    preview = run_command(f"{command_line(teaching.options())} --dry-run")
    assert preview.exit_code == 0, preview.output
    reopened = ReviewRun(scene / "out", None, lambda _: None)
    assert reopened.names == run.names
    assert run_command(command_line(teaching.options())).exit_code == 0  # the recompute records masks below .icm
    (scene / "out").rename(scene / "moved")
    moved = ReviewRun(scene / "moved", None, lambda _: None)
    (after,) = read_all_references(moved.options, lambda _: None)
    assert after.digest == before.digest


@pytest.mark.parametrize("decision", ["undo", "reject", "correct"])
def test_an_image_whose_decision_changes_is_no_reference(icm: Icm, open_review: OpenReview, decision: str) -> None:
    assert icm().exit_code == 0
    run, state, teaching = open_teaching(open_review)
    plain = command_line(teaching.options())
    wall = accept(run, state, teaching, "wall.jpg")
    pad = accept(run, state, teaching, "pad.0101.png")
    teaching.teach(wall, "reference", "alpha")
    teaching.teach(pad, "negative", "alpha")
    for id in (wall, pad):
        if decision == "correct":
            teaching._corrections.accept(id, revision(state, run, id), [point("fg", 40, 40)])
        else:
            getattr(teaching._corrections, decision)(id, revision(state, run, id))
    assert (state.read("wall.jpg").taught, (state.read("pad.0101.png").taught or {})["kind"]) == (None, "negative")
    teaching.forget(pad)
    assert command_line(teaching.options()) == plain
    assert not any([*(run.record_folder / name).iterdir()] for name in ("references", "negatives"))


def test_other_references_make_an_alpha_outdated(icm: Icm, open_review: OpenReview) -> None:
    assert icm().exit_code == 0
    run, state, teaching = open_teaching(open_review)
    wall, pad = (accept(run, state, teaching, name) for name in ("wall.jpg", "pad.0101.png"))
    teaching._corrections.accept(pad, revision(state, run, pad), [point("fg", 40, 40)])
    _, _, corrections_of_another_server = open_review()
    servers = teaching._corrections, corrections_of_another_server
    for server in servers:
        assert [server.outdated_reason(id) for id in (wall, pad)] == ["", ""]
    teaching.teach(wall, "reference", "alpha")
    for server in servers:
        assert "references" in server.outdated_reason(pad)
    teaching.forget(wall)
    for server in servers:
        assert server.outdated_reason(pad) == ""


def test_a_reference_that_is_removed_while_the_model_is_loaded(
    icm: Icm, open_review: OpenReview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server removes it, with its mask, after the options of this one were read."""
    assert icm().exit_code == 0
    run, state, teaching = open_teaching(open_review)
    wall = accept(run, state, teaching, "wall.jpg")
    teaching.teach(wall, "reference", "alpha")
    wait_for_model(teaching._corrections)
    counts = list[int]()

    def read_late(options: MatteOptions, notice: Callable[[str], None]) -> Any:
        counts.append(len(options.references.ref))
        if state.read("wall.jpg").taught is not None:
            teaching.forget(wall)
        return read_all_references(options, notice)

    monkeypatch.setattr("icm_cli.review.model.read_all_references", read_late)
    _, _, other = open_review()  # waits until its model is ready
    assert max(counts) == 2
    assert len(other.base_references()) == 1


def test_the_change_of_an_alpha_is_relative_to_its_object() -> None:
    before, after, empty = (np.zeros((400, 400), np.uint8) for _ in range(3))
    before[:20, :20], after[20:40, :20] = 255, 255
    assert measure_change(before, after) == measure_change(before, empty) == measure_change(empty, before) == 1
    assert measure_change(before, before) == measure_change(empty, empty) == 0
    assert measure_change(before, before // 2) == pytest.approx(0.5, abs=0.01)
    noise = empty.copy()
    noise[0, :3] = 1
    assert measure_change(noise, empty) < 0.001
    tiny = np.zeros((2, 6, 6), np.uint8)
    tiny[0, :3], tiny[1, 3:] = 255, 255
    assert measure_change(*tiny) == 1
    small = np.zeros((2, 200, 300), np.uint8)
    small[0, 9:14, 9:14], small[1, 99:104, 9:14] = 255, 255
    assert measure_change(*small) == 1


def test_what_cannot_be_taught_is_refused(icm: Icm, open_review: OpenReview) -> None:
    assert icm(ref_colorspace="Linear Rec.709 (sRGB)").exit_code == 0
    run, state, teaching = open_teaching(open_review)
    wall = accept(run, state, teaching, "wall.jpg")
    with pytest.raises(UsageError, match="ref-colorspace"):
        teaching.teach(wall, "reference", "alpha")
    assert state.read("wall.jpg").taught is None


def accept_painted_pad(run: ReviewRun, teaching: Teaching, label: str) -> int:
    """Accept the alpha of the pad with one hint, the whole image to keep or to drop; return the id of the image."""
    pad = image_id(run, "pad.0101.png")
    shape = {"label": label, "shape_type": "rectangle", "points": [[0, 0], [200, 133]]}
    teaching._corrections.accept(pad, 0, [shape])
    return pad


def test_an_image_that_is_taught_again_keeps_its_mask(icm: Icm, open_review: OpenReview) -> None:
    """The masks of the whole image and of an alpha that is 255 everywhere have the same file."""
    assert icm().exit_code == 0
    run, _, teaching = open_teaching(open_review)
    pad = accept_painted_pad(run, teaching, "keep")
    assert (read(run.jobs[pad].output) == 255).all()
    masks = run.record_folder / "negatives"
    teaching.teach(pad, "negative", "image")
    (mask,) = masks.iterdir()
    teaching.teach(pad, "negative", "alpha")
    assert [*masks.iterdir()] == [mask]
    teaching.forget(pad)
    assert not [*masks.iterdir()]


def test_teaching_waits_for_a_decision_that_is_being_saved(
    icm: Icm, open_review: OpenReview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask is that of the new alpha, and the image is a reference afterwards."""
    assert icm().exit_code == 0
    run, state, teaching = open_teaching(open_review)
    pad = accept(run, state, teaching, "pad.0101.png")
    is_writing, may_write = threading.Event(), threading.Event()

    def write_late(*arguments: Any) -> None:
        is_writing.set()
        may_write.wait()
        write_json(*arguments)

    monkeypatch.setattr("icm_cli.review.corrections.write_json", write_late)
    shape = {"label": "keep", "shape_type": "rectangle", "points": [[0, 0], [99, 99]]}
    with ThreadPoolExecutor() as executor:
        accepted = executor.submit(teaching._corrections.accept, pad, revision(state, run, pad), [shape])
        is_writing.wait()
        taught = executor.submit(teaching.teach, pad, "reference", "alpha")
        with contextlib.suppress(TimeoutError):
            taught.result(0.3)
        may_write.set()
        accepted.result()
        taught.result()
    (mask,) = (run.record_folder / "references").iterdir()
    assert (read(mask) == 255 * (read(run.jobs[pad].output) > 128)).all()
    assert state.read("pad.0101.png").taught is not None


def test_an_empty_alpha_is_no_reference(icm: Icm, open_review: OpenReview) -> None:
    assert icm().exit_code == 0
    run, state, teaching = open_teaching(open_review)
    pad = accept_painted_pad(run, teaching, "drop")
    with pytest.raises(UsageError, match="the alpha is empty"):
        teaching.teach(pad, "reference", "alpha")
    assert state.read("pad.0101.png").taught is None
    assert not any((run.record_folder / "references").glob("*"))


@pytest.mark.slow
def test_a_stopped_recompute_continues_and_a_failed_one_says_why(
    icm: Icm, scene: Path, open_review: OpenReview
) -> None:
    for number in range(4):
        shrink(scene / "imgs" / "wall.jpg", scene / "imgs" / f"many{number:02d}.png", 160)
    assert icm().exit_code == 0
    before = alphas(scene / "out")
    run, _, teaching = open_teaching(open_review)
    deep = image_id(run, "sub/deep.png")
    teaching.teach(deep, "negative", "image")
    teaching.start_recompute()
    teaching.start_recompute()  # does nothing
    wait_until(lambda: teaching.recompute_progress()["done"] >= 1)
    teaching.stop_recompute()
    wait_until(lambda: teaching.recompute_progress()["state"] != "running")
    stopped = teaching.recompute_progress()
    assert stopped["state"] in ("stopped", "done")
    finished = recompute(teaching)
    assert finished["state"] == "done"
    after = alphas(scene / "out")
    changed = {run.names[each["id"]] for each in finished["changed"]} | {
        run.names[each["id"]] for each in stopped["changed"]
    }
    assert {Path(name).with_suffix(".png").as_posix() for name in changed} == {
        name
        for name in after
        if before[name] != after[name] and (read_bytes(before[name]) != read_bytes(after[name])).any()
    }
    (scene / "mask.png").unlink()
    failed = recompute(teaching)
    assert failed["state"] == "failed"
    assert f"{scene}/mask.png" in failed["message"]
    assert alphas(scene / "out") == after
    teaching.close()


@pytest.mark.slow
def test_a_rejected_alpha_that_is_recomputed_is_open_again(icm: Icm, scene: Path, open_review: OpenReview) -> None:
    assert icm().exit_code == 0
    run, state, teaching = open_teaching(open_review)
    pad, deep = run.find_id("pad.0101.png"), run.find_id("sub/deep.png")
    assert pad is not None
    assert deep is not None
    teaching._corrections.reject(pad, 0)
    hints = run.hint_target(pad)
    hints.parent.mkdir(exist_ok=True)
    hints.write_text(
        json.dumps({"shapes": [{"label": "drop", "shape_type": "rectangle", "points": [[0, 0], [50, 50]]}]})
    )
    assert recompute(teaching)["state"] == "done"
    run.refresh(pad)
    item = run.item(pad, state.read("pad.0101.png"))
    assert (item["status"], item["has_hints"]) == ("open", True)
    assert not read(scene / "out" / "pad.0101.png")[:50, :50].any()
    assert state.read("sub/deep.png").change is None


def test_the_last_recompute_of_an_image_can_be_undone(
    icm: Icm, open_review: OpenReview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Undo restores the alpha, the trimap and the status; then it takes back the decision before the recompute."""
    assert icm(trimap="also").exit_code == 0
    run, state, teaching = open_teaching(open_review)
    pad = image_id(run, "pad.0101.png")
    outputs = run.jobs[pad].outputs
    teaching._corrections.reject(pad, 0)
    replace_recompute(monkeypatch, "pad.0101.png", outputs, (100, 200, 250))
    was_free = []

    def copy_slowly(path: Path, target: Path) -> None:
        """Copy a file as on a drive without hard links."""
        with locked_file(state._lock_path, 0) as is_free:
            was_free.append(is_free)
        shutil.copy2(path, target)

    monkeypatch.setattr(undo, "link_or_copy", copy_slowly)
    for _ in range(2):
        before, status = [output.read_bytes() for output in outputs], state.read("pad.0101.png").status
        decision = run.item(pad, state.read("pad.0101.png"))["decision"]
        changed = recompute(teaching)["changed"]
        item = run.item(pad, state.read("pad.0101.png"))
        assert (item["status"], item["undo"], item["decision"]) == ("open", "recompute", decision)
        assert [each["id"] for each in changed] == [pad]
    teaching._corrections.undo(pad, revision(state, run, pad))
    assert [output.read_bytes() for output in outputs] == before
    item = run.item(pad, state.read("pad.0101.png"))
    assert (item["status"], item["change"], item["undo"]) == (status, None, "decision")
    assert teaching.recompute_progress()["changed"] == []
    assert recompute(teaching)["state"] == "done"
    assert len([*(run.record_folder / "undo").iterdir()]) == 1
    assert not (run.record_folder / "before").exists()
    assert was_free == [True] * 6  # other servers can use the state meanwhile


def test_undo_of_a_recompute_restores_the_alpha_of_another_run(
    icm: Icm, scene: Path, open_review: OpenReview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alpha was written shortly before the recompute. One written during it is not known, and not removed."""
    assert icm().exit_code == 0
    run, state, teaching = open_teaching(open_review)
    made, images = scene / "out" / "pad.0101.png", scene / "imgs"
    alpha = scene / "out" / "pad.0102.png"
    shutil.copy(images / made.name, images / alpha.name)
    shutil.copy(made, alpha)
    replace_recompute(monkeypatch, alpha.name, [alpha], [100])
    (changed,) = recompute(teaching)["changed"]
    teaching._corrections.undo(changed["id"], revision(state, run, changed["id"]))
    assert alpha.read_bytes() == made.read_bytes()
    before = run.record_folder / "before"
    teaching._save_alphas(before)
    shutil.copy(images / made.name, images / "pad.0103.png")
    shutil.copy(made, scene / "out" / "pad.0103.png")
    run.scan_alphas()
    id = image_id(run, "pad.0103.png")
    teaching._save_changes({id: 1.0}, before)
    item = run.item(id, state.read("pad.0103.png"))
    assert (item["change"], item["undo"]) == (1, "")


def test_undo_goes_back_beyond_a_recompute_with_the_same_pixels(
    icm: Icm, open_review: OpenReview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes nothing: undo takes back the recompute before it, and then the decisions."""
    assert icm().exit_code == 0
    run, state, teaching = open_teaching(open_review)
    pad = image_id(run, "pad.0101.png")
    before = run.jobs[pad].output.read_bytes()
    accept(run, state, teaching, "pad.0101.png")
    teaching._corrections.reject(pad, revision(state, run, pad))
    replace_recompute(monkeypatch, "pad.0101.png", run.jobs[pad].outputs, (100, 100))
    assert len(recompute(teaching)["changed"]) == 1
    assert recompute(teaching)["changed"] == []
    assert run.item(pad, state.read("pad.0101.png"))["undo"] == "recompute"
    for status in ("rejected", "accepted", "open"):
        teaching._corrections.undo(pad, revision(state, run, pad))
        assert state.read("pad.0101.png").status == status
    assert run.jobs[pad].output.read_bytes() == before


def test_a_recompute_after_a_rejection_without_an_alpha_can_be_undone(
    icm: Icm, open_review: OpenReview, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert icm().exit_code == 0
    run, state, teaching = open_teaching(open_review)
    pad = image_id(run, "pad.0101.png")
    alpha = run.jobs[pad].output
    alpha.unlink()
    teaching._corrections.reject(pad, 0)
    replace_recompute(monkeypatch, "pad.0101.png", [alpha], [100])
    recompute(teaching)
    item = run.item(pad, state.read("pad.0101.png"))
    assert (item["status"], item["undo"], item["change"]) == ("open", "recompute", 1)
    for status in ("rejected", "open"):
        teaching._corrections.undo(pad, revision(state, run, pad))
        assert (state.read("pad.0101.png").status, alpha.exists()) == (status, False)


def test_undo_of_a_decision_during_a_recompute_is_not_lost(icm: Icm, open_review: OpenReview) -> None:
    """A person has accepted the new alpha before the recompute has saved that it changed."""
    assert icm().exit_code == 0
    run, state, teaching = open_teaching(open_review)
    before = run.record_folder / "before"
    teaching._save_alphas(before)
    pad = accept(run, state, teaching, "pad.0101.png")
    teaching._save_changes({pad: 0.5}, before)
    item = run.item(pad, state.read("pad.0101.png"))
    assert (item["status"], item["undo"]) == ("accepted", "decision")
    teaching._corrections.undo(pad, revision(state, run, pad))
    assert not run.refresh(pad).is_reviewed


@pytest.mark.slow
def test_a_taught_frame_of_a_shot_is_a_keyframe_and_stays_listed(
    icm: Icm, scene: Path, open_review: OpenReview
) -> None:
    image = read(scene / "imgs" / "wall.jpg")
    (scene / "frames").mkdir()
    for number in range(1, 5):
        cv2.imwrite(str(scene / "frames" / f"a.{number:04d}.png"), np.roll(image, 3 * number, axis=1))
    assert icm("--shot", src=scene / "frames").exit_code == 0
    run, state, teaching = open_teaching(open_review)
    third = accept(run, state, teaching, "a.0003.png")
    kept = run.jobs[third].output.read_bytes()
    teaching.teach(third, "reference", "alpha")
    wait_for_model(teaching._corrections)
    corrected = teaching._corrections.answer(0, [point("bg", 85, 65)], refined=True)
    teaching._corrections.accept(0, 0, [point("bg", 85, 65)])
    assert (read(run.jobs[0].output) == corrected).all()
    assert recompute(teaching)["state"] == "done"
    assert run.jobs[third].output.read_bytes() == kept
    assert (read(run.jobs[0].output) == corrected).all()
    made = run_command(command_line(teaching.options()))
    assert made.exit_code == 0
    assert any(line.split() == ["kept", "3"] for line in made.stdout.splitlines())  # as the recompute made them
    reopened, _, _ = open_teaching(open_review)
    assert reopened.names == run.names == [f"a.{number:04d}.png" for number in range(1, 5)]


def test_a_recompute_that_learns_the_references_shows_its_last_message(
    icm: Icm, scene: Path, open_review: OpenReview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learning takes minutes, in which no image ends. A message of an earlier recompute is not shown."""
    assert icm().exit_code == 0
    _, _, teaching = open_teaching(open_review)
    log = scene / "out" / ".icm" / "recompute.log"
    log.write_text("icm: an earlier message\n")
    learning = "print('icm: learning the references: 40%', file=sys.stderr, flush=True); time.sleep(60)"

    def start_learning(*_: str, **streams: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", f"import sys, time; {learning}"], **streams)

    monkeypatch.setattr("icm_cli.review.teaching.start_module", start_learning)
    teaching.start_recompute()
    messages = set[str]()
    wait_until(lambda: messages.add(teaching.recompute_progress()["message"]) or len(messages - {""}) > 0)
    assert messages - {""} == {"learning the references: 40%"}
    teaching.stop_recompute()
    wait_until(lambda: teaching.recompute_progress()["state"] != "running")
    assert teaching.recompute_progress()["state"] == "stopped"
    teaching.close()


def test_kept_alphas_are_no_progress(icm: Icm, open_review: OpenReview, monkeypatch: pytest.MonkeyPatch) -> None:
    assert icm().exit_code == 0
    _, _, teaching = open_teaching(open_review)
    statuses = ["kept", "kept", "failed", "done"]
    events = [
        {"event": "image", "name": "other", "status": status, "ended": number, "total": 5}
        for number, status in enumerate(statuses, start=1)
    ]
    lines = "\n".join(json.dumps(event) for event in events)
    program = f"import time; print({lines!r}, flush=True); time.sleep(60)"

    def start_matting(*_: str, **streams: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", program], **streams)

    monkeypatch.setattr("icm_cli.review.teaching.start_module", start_matting)
    teaching.start_recompute()
    wait_until(lambda: teaching.recompute_progress()["done"] == 2)
    assert teaching.recompute_progress()["total"] == 3
    teaching.close()


def write_events(run: ReviewRun, names: Sequence[str]) -> None:
    """Write the events of a recompute that has made the alphas of some images."""
    events = [
        {"event": "image", "name": name, "status": "done", "ended": number, "total": 9}
        for number, name in enumerate(names, start=1)
    ]
    (run.record_folder / "recompute.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_the_next_server_compares_what_a_killed_one_has_not(icm: Icm, scene: Path, open_review: OpenReview) -> None:
    """A recompute of two images was stopped. The server had compared the first one, which was rejected then."""
    assert icm().exit_code == 0
    run, state, teaching = open_teaching(open_review)
    before = run.record_folder / "before"
    teaching._save_alphas(before)
    names = ["wall.jpg", "pad.0101.png"]
    for name in ("wall.png", "pad.0101.png"):
        write_grey(scene / "out" / name, 0, *read(scene / "out" / name).shape[:2])
    wall = image_id(run, names[0])
    teaching._save_changes({wall: 0.5}, before)
    teaching._corrections.reject(wall, revision(state, run, wall))
    write_events(run, names)
    _, _, other = open_teaching(open_review)
    wait_until(lambda: other.recompute_progress()["state"] == "stopped")
    ids = [run.find_id(name) for name in names]
    assert {each["id"]: each["difference"] for each in other.recompute_progress()["changed"]} == dict(
        zip(ids, (0.5, 1), strict=True)
    )
    assert state.read(names[0]).status == "rejected"
    assert (other.recompute_progress()["done"], other.recompute_progress()["total"]) == (2, 9)


def test_the_next_server_compares_images_of_a_continued_recompute(icm: Icm, open_review: OpenReview) -> None:
    """Both parts of the recompute wrote both alphas. The server was killed before it compared those of the second."""
    assert icm().exit_code == 0
    run, _, teaching = open_teaching(open_review)
    names, before = ["wall.jpg", "pad.0101.png"], run.record_folder / "before"
    ids = [run.names.index(name) for name in names]
    outputs = [run.jobs[id].output for id in ids]
    teaching._save_alphas(before)
    teaching._save_changes(dict(zip(ids, (0.5, 0), strict=True)), before)
    saved = [output.read_bytes() for output in outputs]
    teaching._save_alphas(before)
    for output in outputs:
        write_grey(output, 100, *read(output).shape[:2])
    write_events(run, names)
    reopened, other_state, other = open_teaching(open_review)
    wait_until(lambda: other.recompute_progress()["state"] == "stopped")
    assert {each["id"] for each in other.recompute_progress()["changed"]} == set(ids)
    for id in ids:
        other._corrections.undo(id, revision(other_state, reopened, id))
    assert [output.read_bytes() for output in outputs] == saved
