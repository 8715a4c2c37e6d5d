"""Scoring of files: sizes, trimaps, and worker processes that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icm_cli.scoring.metrics import compute_scores
from icm_cli.scoring.pool import ScoringPool
from icm_cli.scoring.task import ScoreTask, ScoringRule, make_trimap, resize_for_scoring


def soft_square(height: int, width: int, shift: int = 0) -> np.ndarray:
    alpha = np.zeros((height, width), np.uint8)
    alpha[height // 4 + shift : 3 * height // 4, width // 4 : 3 * width // 4 + shift] = 255
    return cv2.GaussianBlur(alpha, (0, 0), 3)


@pytest.fixture
def task(tmp_path: Path) -> ScoreTask:
    for name, shift in (("alpha", 5), ("truth", 0)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), soft_square(90, 150, shift))
    return ScoreTask("x", tmp_path / "alpha.png", tmp_path / "truth.png", ScoringRule())


@pytest.mark.parametrize(
    ("size", "shape"), [("original", (90, 150)), ("long1024", (614, 1024)), ("square768", (768, 768))]
)
def test_alphas_are_scored_at_the_given_size(task: ScoreTask, size: str, shape: tuple[int, int]) -> None:
    alpha, truth = (resize_for_scoring(soft_square(90, 150, shift) / 255.0, (90, 150), size) for shift in (5, 0))  # type: ignore[arg-type]
    assert alpha.shape == shape
    scored = replace(task, rule=ScoringRule(scored_size=size)).run()  # type: ignore[arg-type]
    assert scored.problems == ()
    assert scored.evaluation.scores["whole"] == compute_scores(alpha, truth)["whole"]


@given(st.integers(0, 255), st.integers(1, 40), st.integers(1, 40))
def test_resized_alphas_are_not_rounded_and_constant_regions_keep_their_value(
    value: int, height: int, width: int
) -> None:
    constant = np.full((height, width), value / 255.0)
    for size in ("original", "long1024", "square768"):
        assert np.abs(resize_for_scoring(constant, (50, 60), size) - value / 255.0).max() <= 5e-7  # type: ignore[arg-type]
    for value in (0.0, 1.0):
        assert (resize_for_scoring(np.full((height, width), value), (50, 60), "original") == value).all()
    ramp = np.linspace(0, 1, 2)[None]
    assert len(np.unique(resize_for_scoring(ramp, (1, 1000), "original"))) > 400  # more than 8 bits


def test_square768_crops_the_centre() -> None:
    image = np.zeros((100, 300), np.uint8)
    image[:, 100:200] = 255
    assert (resize_for_scoring(image, image.shape, "square768") == 255).all()


def test_generated_trimap_is_the_dilated_soft_pixels(task: ScoreTask) -> None:
    truth = np.zeros((40, 40), np.uint8)
    truth[20, 20] = 77
    trimap = make_trimap(truth, 7)
    expected = np.zeros_like(truth)
    expected[17:24, 17:24] = 128
    assert (trimap == expected).all()
    scored = replace(task, rule=ScoringRule(regions=("unknown",), trimap_kernel_px=7)).run()
    truth, alpha = soft_square(90, 150), soft_square(90, 150, 5)
    assert scored.evaluation.scores == {
        "unknown": compute_scores(alpha, truth, trimap=make_trimap(truth, 7))["unknown"]
    }


def test_published_trimaps_and_detail_maps_define_the_unknown_region(task: ScoreTask, tmp_path: Path) -> None:
    trimap = np.zeros((90, 150), np.uint8)
    trimap[10:60, 20:70] = 128
    trimap[60:, :] = 255
    cv2.imwrite(str(tmp_path / "t.png"), trimap)
    both = ("whole", "unknown")
    with_trimap = replace(task, trimap_path=tmp_path / "t.png", rule=ScoringRule(regions=both))
    alpha, truth = soft_square(90, 150, 5), soft_square(90, 150)
    assert with_trimap.run().evaluation.scores == compute_scores(alpha, truth, trimap=trimap)
    detail = np.where(trimap > 0, 128, 0).astype(np.uint8)
    with_detail = replace(with_trimap, rule=ScoringRule(regions=both, has_detail_maps=True))
    assert with_detail.run().evaluation.scores == compute_scores(alpha, truth, trimap=detail)


@pytest.mark.parametrize(
    ("trimap", "kind"),
    [
        (np.zeros((90, 100), np.uint8), "size-mismatch"),
        (np.zeros((90, 150), np.uint8), "no-unknown"),
        (soft_square(90, 150), "bad-trimap"),
        (np.full((45, 75), 128, np.uint8), "size-mismatch"),
    ],
)
def test_unusable_trimap_is_reported_and_the_whole_image_is_scored(
    task: ScoreTask, tmp_path: Path, trimap: np.ndarray, kind: str
) -> None:
    cv2.imwrite(str(tmp_path / "t.png"), trimap)
    scored = replace(task, trimap_path=tmp_path / "t.png", rule=ScoringRule(regions=("whole", "unknown"))).run()
    assert set(scored.evaluation.scores) == {"whole"}
    assert [problem.kind for problem in scored.problems] == [kind]


def test_nearly_empty_alpha_of_icm_is_scored_but_not_that_of_another_tool(task: ScoreTask) -> None:
    cv2.imwrite(str(task.alpha_path), np.eye(90, 150, dtype=np.uint8))  # values of 1 out of 255
    assert task.run().evaluation.scores
    foreign = replace(task, is_external=True)
    assert [problem.kind for problem in foreign.run().problems] == ["unscaled-alpha"]
    assert (
        replace(foreign, allowed=frozenset({"unscaled-alpha"})).run().evaluation.scores == task.run().evaluation.scores
    )


def test_missing_image_is_reported(task: ScoreTask, tmp_path: Path) -> None:
    (problem,) = replace(task, image_path=tmp_path / "gone.jpg", needs_sha256=True).run().problems
    assert problem.kind == "unreadable"
    assert "gone.jpg does not exist" in problem.reason


def test_size_of_an_image_respects_exif_orientation(task: ScoreTask, tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 150)).save(tmp_path / "turned.jpg", exif=exif)  # stored 90 wide, shown 150 wide
    assert replace(task, image_path=tmp_path / "turned.jpg").run().problems == ()


@dataclass(frozen=True)
class Signalled:
    """A task that sends a signal to its own process."""

    number: int

    def run(self) -> str:
        os.kill(os.getpid(), self.number)
        return "alive"


def test_worker_processes_ignore_signals_to_the_process_group(task: ScoreTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    answers: list[object] = []
    pool = ScoringPool(1)
    try:
        for each in (Signalled(signal.SIGTERM), Signalled(signal.SIGINT), task):
            pool.submit(each, answers.append)
        pool.drain()
    finally:
        pool.close()
    assert answers == ["alive", "alive", task.run()]


def test_killed_worker_process_only_loses_its_own_task(task: ScoreTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # so that the worker processes can import Signalled
    answers: list[object] = []
    pool = ScoringPool(2)
    try:
        for each in (task, Signalled(signal.SIGKILL), task, task, task):
            pool.submit(each, answers.append)
        pool.drain()
    finally:
        pool.close()
    assert answers[1] is None
    assert all(answer == task.run() for answer in [answers[0], *answers[2:]])


def test_worker_processes_exit_when_the_run_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time, os\n"
        "from icm_cli.scoring.pool import ScoringPool\n"
        "from icm_cli.scoring.task import ScoreTask, ScoringRule\n"
        "from pathlib import Path\n"
        "pool = ScoringPool(1)\n"
        f"task = ScoreTask('x', Path({str(tmp_path)!r}), Path({str(tmp_path)!r}), ScoringRule())\n"
        "pool.submit(task, lambda _: None); pool.drain()\n"
        "print(pool._idle.queue[-1]._popen.pid, flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        worker = int(run.stdout.readline())
        os.kill(worker, 0)
        run.kill()
    for _ in range(100):
        if not is_running(worker):
            return
        time.sleep(0.05)
    pytest.fail(f"process {worker} is still running")


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
