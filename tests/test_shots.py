"""Shots in the layout of DAVIS: known values of J and F, and ``icm eval --dataset davis16``."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import Icm, read
from eval_data import images_by_name, read_report
from PIL import Image

from icm_cli.reports.means import MEAN_OF_SHOTS, compute_shot_scores
from icm_cli.reports.result import ImageEvaluation, ImageResult
from icm_cli.scoring.metrics import compute_boundary_f, compute_jaccard

SHOTS = ("cow", "dog")
FRAMES = 4


def mask(height: int, width: int, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    """Return a rectangle of 255 on 0; bottom and right are exclusive."""
    image = np.zeros((height, width), np.uint8)
    image[top:bottom, left:right] = 255
    return image


def test_j_is_intersection_over_union() -> None:
    one, other = mask(8, 8, 0, 0, 4, 4), mask(8, 8, 2, 2, 6, 6)
    assert compute_jaccard(one, other) == 4 / 28  # 16 + 16 - 4
    assert compute_jaccard(one, np.zeros_like(one)) == 0
    assert compute_jaccard(np.zeros_like(one), np.zeros_like(one)) == 1
    assert compute_jaccard(np.full((2, 2), 128, np.uint8), np.full((2, 2), 255, np.uint8)) == 1
    assert compute_jaccard(np.full((2, 2), 127, np.uint8), np.full((2, 2), 255, np.uint8)) == 0


def test_known_f_of_two_squares() -> None:
    """Compare squares with known boundaries.

    The diagonal of 30 x 40 is 50, so boundaries match up to a distance of 1.

    The boundary of a square of n px has 4n pixels and begins one pixel above and to the left of it.
    If the square moves by 1, all boundary pixels match. If it moves by 4, the old right side and
    the new left side are both in column 13, rows 9..13, and 5 + 1 + 1 pixels match.
    """
    truth = mask(30, 40, 10, 10, 14, 14)
    assert compute_boundary_f(truth, truth) == 1
    assert compute_boundary_f(mask(30, 40, 10, 11, 14, 15), truth) == 1
    assert compute_boundary_f(mask(30, 40, 10, 14, 14, 18), truth) == pytest.approx(7 / 16)
    assert compute_boundary_f(mask(30, 40, 20, 30, 24, 34), truth) == 0


def test_f_is_the_harmonic_mean_of_precision_and_recall() -> None:
    """A second square adds 8 boundary pixels to the 16 true ones: precision 16/24, recall 1."""
    truth = mask(30, 40, 10, 10, 14, 14)
    predicted = truth | mask(30, 40, 22, 30, 24, 32)
    assert compute_boundary_f(predicted, truth) == pytest.approx(2 * (16 / 24) / (16 / 24 + 1))


def test_f_ignores_the_image_border_and_is_1_without_boundaries() -> None:
    """Half of an image of 30 x 40 pixels has a boundary of 30 pixels."""
    empty, full = np.zeros((30, 40), np.uint8), np.full((30, 40), 255, np.uint8)
    assert compute_boundary_f(empty, empty) == compute_boundary_f(full, empty) == 1
    assert compute_boundary_f(mask(30, 40, 10, 10, 14, 14), empty) == 0
    assert compute_boundary_f(empty, mask(30, 40, 10, 10, 14, 14)) == 0
    half = mask(30, 40, 0, 0, 30, 20)
    assert compute_boundary_f(half | mask(30, 40, 20, 30, 24, 34), half) == pytest.approx(2 * (30 / 46) / (30 / 46 + 1))


def frames_of(shot: str, values: list[float]) -> list[ImageResult]:
    return [
        ImageResult(
            "",
            "",
            "done",
            name=f"{shot}/{number}",
            group=shot,
            evaluation=ImageEvaluation(jaccard=value, boundary_f=1 - value),
        )
        for number, value in enumerate(values)
    ]


def test_known_mean_recall_and_decay() -> None:
    """The bounds 1, 2.75, 4.5, 6.25 and 8 are rounded to 1, 3, 5, 6, 8: parts 1-3 and 6-8."""
    scores = compute_shot_scores(frames_of("a", [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]))["a"]
    assert scores.frames == 8
    assert scores.j_mean == pytest.approx(0.55)
    assert scores.j_recall == 0.5  # 0.5 itself is not above
    assert scores.j_decay == pytest.approx(0.8 - 0.3)
    assert scores.f_decay == pytest.approx(-0.5)


def test_every_shot_has_the_same_weight_in_the_mean() -> None:
    scores = compute_shot_scores([*frames_of("a", [1.0] * 9), *frames_of("b", [0.0])])
    assert list(scores) == ["a", "b", MEAN_OF_SHOTS]
    assert scores[MEAN_OF_SHOTS].j_mean == 0.5
    assert scores[MEAN_OF_SHOTS].frames == 10
    assert compute_shot_scores([ImageResult("", "", "done")]) == {}


@pytest.fixture
def davis(tmp_path: Path, scene: Path) -> Path:
    """Two shots of four frames, a third that the list does not name, and the list of DAVIS 2016."""
    root = tmp_path / "DAVIS"
    image = cv2.imread(str(scene / "ref.png"))
    truth = read(scene / "mask.png")
    truth = np.where((truth if truth.ndim == 2 else truth[..., 0]) > 127, 255, 0).astype(np.uint8)
    lines = []
    for shot in (*SHOTS, "unlisted"):
        for kind, suffix, content in (("JPEGImages", "jpg", image), ("Annotations", "png", truth)):
            (root / kind / "480p" / shot).mkdir(parents=True)
            for number in range(FRAMES):
                moved = np.roll(content, 3 * number, axis=1)
                cv2.imwrite(str(root / kind / "480p" / shot / f"{number:05d}.{suffix}"), moved)
        pairs = [f"/JPEGImages/480p/{shot}/{n:05d}.jpg /Annotations/480p/{shot}/{n:05d}.png" for n in range(FRAMES)]
        lines += pairs if shot in SHOTS else []
    (root / "ImageSets" / "480p").mkdir(parents=True)
    (root / "ImageSets" / "480p" / "val.txt").write_text("\n".join(lines) + "\n")
    return root


def middle(shot: str) -> list[str]:
    return [f"{shot}/{number:05d}" for number in range(1, FRAMES - 1)]


def test_first_frame_is_the_reference_and_last_frame_is_excluded(evaluate: Icm, davis: Path, tmp_path: Path) -> None:
    reports = [tmp_path / "r.json", tmp_path / "r.html", tmp_path / "r.csv"]
    result = evaluate(dataset="davis16", data_root=davis, report=reports, save_alphas=tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "the last one is excluded" in result.stderr
    report = read_report(tmp_path / "r.json")
    assert report["references"] == [{shot: [f"{shot}/00000"] for shot in SHOTS}]
    assert list(images_by_name(report)) == [name for shot in SHOTS for name in middle(shot)]
    for name, image in images_by_name(report).items():
        alpha, truth = read(tmp_path / "out" / f"{name}.png"), read(davis / "Annotations" / "480p" / f"{name}.png")
        assert image["jaccard"] == compute_jaccard(alpha, truth)
        assert image["boundary_f"] == compute_boundary_f(alpha, truth)
        assert image["jaccard"] > 0.5
        assert (image["dt_ssd"] is not None) == name.endswith("2")
    shots = report["summary"]["shots"]
    assert list(shots) == [*SHOTS, MEAN_OF_SHOTS]
    for text in (result.stdout, (tmp_path / "r.html").read_text()):
        assert "J decay" in text
        assert f"{shots['cow']['f_mean']:.3f}" in text
    assert "boundary_f" in (tmp_path / "r.csv").read_text().splitlines()[0]


def test_predictions_are_scored_over_the_same_frames(evaluate: Icm, davis: Path, tmp_path: Path) -> None:
    """Masks move by 3 px per frame, so that the true masks of the next frame have a known J."""
    for shot in SHOTS:
        (tmp_path / "pred" / shot).mkdir(parents=True)
        for number in range(1, FRAMES - 1):
            truth = read(davis / "Annotations" / "480p" / shot / f"{number + 1:05d}.png")
            cv2.imwrite(str(tmp_path / "pred" / shot / f"{number:05d}.png"), truth)
    result = evaluate(dataset="davis16", data_root=davis, pred=tmp_path / "pred", report=tmp_path / "r.json")
    assert result.exit_code == 0, result.stderr
    report = read_report(tmp_path / "r.json")
    assert list(images_by_name(report)) == [name for shot in SHOTS for name in middle(shot)]
    first, second = (read(davis / "Annotations" / "480p" / "cow" / f"0000{n}.png") for n in (1, 2))
    assert images_by_name(report)["cow/00001"]["jaccard"] == compute_jaccard(second, first) < 1


def test_davis_2017_with_the_2016_list_and_palettes(evaluate: Icm, davis: Path, tmp_path: Path) -> None:
    """All objects of an image count as one, whatever their palette index. A frame may have none."""
    (davis / "ImageSets" / "480p").rename(davis / "ImageSets" / "2016")
    (davis / "ImageSets" / "2016" / "val.txt").write_text("cow\nsheep\n")
    for path in (davis / "Annotations" / "480p" / "cow").iterdir():
        indices = (read(path) > 0).astype(np.uint8) * 8
        indices[:, : indices.shape[1] // 2] //= 8
        image = Image.fromarray(indices if path.stem != "00002" else indices * 0, mode="P")
        image.putpalette([0, 0, 0, 128, 0, 0, *[9, 9, 9] * 6, 64, 0, 0])
        image.save(path)
    for number, name in enumerate(middle("cow"), 1):
        target = tmp_path / "pred" / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        truth = read(davis / "Annotations" / "480p" / "dog" / f"0000{number}.png")
        cv2.imwrite(str(target), truth if number == 1 else truth * 0)
    result = evaluate(dataset="davis16", data_root=davis, pred=tmp_path / "pred", report=tmp_path / "r.json")
    report = read_report(tmp_path / "r.json")
    assert {name: image["jaccard"] for name, image in images_by_name(report).items()} == dict.fromkeys(
        middle("cow"), 1.0
    )
    assert result.exit_code == 1
    assert report["summary"]["problems"] == {"absent-file": 1}
    assert "val.txt lists sheep, but there is no image or folder of this name" in result.stderr
    evaluate(dataset="davis16", data_root=davis, report=tmp_path / "r.json", allow="absent-file")
    assert all(image["jaccard"] is not None for image in read_report(tmp_path / "r.json")["images"])


def test_missing_list_is_an_error(evaluate: Icm, davis: Path) -> None:
    (davis / "ImageSets" / "480p" / "val.txt").unlink()
    result = evaluate(dataset="davis16", data_root=davis)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert str(davis / "ImageSets" / "2016" / "val.txt") in result.stderr


def test_short_shot_is_reported_and_others_are_scored(evaluate: Icm, davis: Path, tmp_path: Path) -> None:
    (davis / "ImageSets" / "480p" / "val.txt").write_text("cow\ndog\n")
    for path in davis.rglob("dog/0000[123].*"):
        path.unlink()
    result = evaluate(dataset="davis16", data_root=davis, report=tmp_path / "r.json")
    assert result.exit_code == 1
    assert "lone-image: shot dog has 1 frame; no frame is scored, because the first and last never are" in result.stderr
    report = read_report(tmp_path / "r.json")
    assert report["summary"]["problems"] == {"lone-image": 1}
    assert list(images_by_name(report)) == middle("cow")


def test_shots_of_two_frames_are_refused(evaluate: Icm, davis: Path) -> None:
    for path in davis.rglob("0000[23].*"):
        path.unlink()
    (davis / "ImageSets" / "480p" / "val.txt").write_text("cow\ndog\n")
    result = evaluate(dataset="davis16", data_root=davis)
    assert result.exit_code == 2
    assert "no shot of three frames" in result.stderr


@pytest.mark.parametrize("option", ["--rounds=2", "--refs-per-group=2", "--video", "--groups=g.json"])
def test_reference_options_are_refused_for_shots(evaluate: Icm, davis: Path, tmp_path: Path, option: str) -> None:
    groups = tmp_path / "g.json"
    groups.write_text('{"cow/00000": {"class": "cow"}}')
    given = f"--groups={groups}" if option.startswith("--groups") else option
    result = evaluate(given, dataset="davis16", data_root=davis)
    assert result.exit_code == 2
    assert f"so {option.split('=')[0]} has no effect; remove it" in result.stderr
