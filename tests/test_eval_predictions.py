"""``icm eval --pred``: alphas of any tool, problems with the data, and the reported protocol."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import read
from eval_data import NAMES, Evaluate, damage_alpha, images_by_name, read_report, write_predictions
from PIL import Image
from typer.testing import CliRunner

from icm_cli.scoring.metrics import compute_scores


def test_predictions_are_scored_without_torch(data: Path, tmp_path: Path) -> None:
    write_predictions(data, tmp_path / "pred")
    code = (
        "import sys; from icm_cli import evaluate\n"
        f"report = evaluate('folder', {str(data)!r}, pred={str(tmp_path / 'pred')!r})\n"
        "assert report.exit_code == 0 and report.means['whole'].images == 6, report\n"
        "sys.exit('torch' in sys.modules)"
    )  # unguarded, as in a user's script
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_saved_alphas_have_the_same_scores_as_in_the_run_that_made_them(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(report=tmp_path / "made.json", save_alphas=tmp_path / "out", rounds=2)
    result = evaluate(report=tmp_path / "pred.json", pred=tmp_path / "out", references=tmp_path / "made.json")
    assert result.exit_code == 0
    made, scored = read_report(tmp_path / "made.json"), read_report(tmp_path / "pred.json")
    assert [each["scores"] for each in made["images"]] == [each["scores"] for each in scored["images"]]
    assert made["summary"]["means"] == scored["summary"]["means"]
    assert {each["made_by"] for each in scored["images"]} == {""}
    without = evaluate(pred=tmp_path / "out", rounds=2).stderr
    assert "if it was a reference of icm eval --save-alphas, give --references with the report of that run" in without
    assert [each["foreground"] for each in made["images"]] == [each["foreground"] for each in scored["images"]]


def test_summary_names_the_folder_of_a_relative_data_root(
    evaluate: Evaluate, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_predictions(data, tmp_path / "pred")
    for folder, root in ((data, "."), (data / "alphas", "..")):
        monkeypatch.chdir(folder)
        summary = evaluate(data_root=root, pred=tmp_path / "pred")
        assert summary.exit_code == 0, summary.output
        assert f"{data.name}, size original" in " ".join(summary.output.split())


def test_damaged_prediction_prints_one_message_and_no_library_warning(data: Path, tmp_path: Path) -> None:
    """The worker process suppresses the warning that Pillow prints about a truncated TIFF."""
    write_predictions(data, tmp_path / "pred")
    (tmp_path / "pred" / "a" / "lawn.png").unlink()
    Image.fromarray(read(data / "alphas" / "a" / "lawn.png")).save(tmp_path / "whole.tif")
    (tmp_path / "pred" / "a" / "lawn.tif").write_bytes((tmp_path / "whole.tif").read_bytes()[:56])
    line = ["--dataset", "folder", "--data-root", data, "--pred", tmp_path / "pred", "--workers", "1"]
    command = [sys.executable, "-m", "icm_cli.cli", "eval", *map(str, line)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "lawn.tif begins as tiff and cannot be decoded; it is damaged" in ended.stderr
    assert all(line.startswith(("icm: ", "[")) for line in ended.stderr.splitlines()), ended.stderr


def test_missing_prediction_is_reported_and_others_are_scored(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    write_predictions(data, tmp_path / "pred")
    (tmp_path / "pred" / "a" / "lawn.png").unlink()
    result = evaluate(pred=tmp_path / "pred", report=tmp_path / "r.json")
    assert result.exit_code == 1
    assert "missing-prediction" in result.stderr
    assert read_report(tmp_path / "r.json")["summary"]["means"]["whole"]["images"] == 5


def test_of_predictions_with_the_same_name_the_png_is_scored(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    """Without a PNG, it is unknown which file is the alpha."""
    write_predictions(data, tmp_path / "pred")
    png = tmp_path / "pred" / "a" / "lawn.png"
    for suffix in (".bmp", ".tif"):
        cv2.imwrite(str(png.with_suffix(suffix)), 255 - read(png))
    result = evaluate(pred=tmp_path / "pred", report=tmp_path / "r.json")
    assert images_by_name(read_report(tmp_path / "r.json"))["a/lawn"]["output"] == str(png)
    assert result.exit_code == 0, result.output
    assert "of which matting" not in result.stdout  # the alphas are only scored
    png.unlink()
    result = evaluate(pred=tmp_path / "pred")
    assert result.exit_code == 1
    assert f"lawn.jpg has no alpha, or several; expected {png}, or one file of this name" in result.stderr


def test_predictions_are_resized_to_the_ground_truth_and_counted(
    evaluate: Evaluate, data: Path, tmp_path: Path
) -> None:
    write_predictions(data, tmp_path / "pred")
    path = tmp_path / "pred" / "a" / "lawn.png"
    half = cv2.resize(read(path), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(path), half)
    result = evaluate(pred=tmp_path / "pred", report=tmp_path / "r.json")
    assert result.exit_code == 0
    assert "resized for scoring" in result.stdout
    image = images_by_name(read_report(tmp_path / "r.json"))["a/lawn"]
    truth = read(data / "alphas" / "a" / "lawn.png")
    resized = cv2.resize(half / 255.0, truth.shape[::-1], interpolation=cv2.INTER_LINEAR)  # not rounded to 8 bits
    assert image["was_resized"]
    assert image["scores"]["whole"] == pytest.approx(vars(compute_scores(resized, truth)["whole"]), rel=1e-4)
    rounded = compute_scores(resized.round(2), truth)["whole"]
    assert image["scores"]["whole"]["mad"] != pytest.approx(rounded.mad, rel=1e-4)


def test_folder_without_matching_alphas_is_refused(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    result = evaluate(pred=data / "alphas" / "a" / "lawn.png")
    assert result.exit_code == 2
    assert "lawn.png is a file; expected a folder of alphas named like the images" in result.stderr
    (tmp_path / "pred").mkdir()
    result = evaluate(pred=tmp_path / "pred")
    assert result.exit_code == 2
    assert "a/brickwall.png" in result.stderr
    result = evaluate(pred=tmp_path / "pred", rounds=2)
    assert result.exit_code == 2
    assert "round-1/a/brickwall.png" in result.stderr


def test_allowed_problems_are_no_failure_but_a_run_without_scores_is(
    evaluate: Evaluate, data: Path, tmp_path: Path
) -> None:
    write_predictions(data, tmp_path / "pred")
    (tmp_path / "pred" / "a" / "lawn.png").unlink()
    assert evaluate(pred=tmp_path / "pred", allow="missing-prediction").exit_code == 0
    for path in (tmp_path / "pred").rglob("*.png"):
        path.write_bytes(b"torn")
    result = evaluate(pred=tmp_path / "pred", allow=["missing-prediction", "unreadable"], report=tmp_path / "r.json")
    assert result.exit_code == 1
    assert read_report(tmp_path / "r.json")["summary"]["unscored"] == 6


@pytest.mark.parametrize("kind", ["colour-alpha", "unscaled-alpha"])
def test_invalid_predictions_are_reported(evaluate: Evaluate, data: Path, tmp_path: Path, kind: str) -> None:
    write_predictions(data, tmp_path / "pred")
    damage_alpha(kind, tmp_path / "pred" / "a" / "lawn.png")
    result = evaluate(pred=tmp_path / "pred", report=tmp_path / "r.json")
    assert result.exit_code == 1
    assert read_report(tmp_path / "r.json")["summary"]["problems"] == {kind: 1}
    assert images_by_name(read_report(tmp_path / "r.json"))["a/lawn"]["status"] == "unscored"


def test_ambiguous_file_names_are_refused(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write_predictions(data, tmp_path / "pred" / folder)
    result = evaluate(pred=tmp_path / "pred")
    assert result.exit_code == 2
    assert "several of the same name" in result.stderr


@pytest.mark.parametrize(
    "kind",
    [
        "size-mismatch",
        "colour-alpha",
        "unscaled-alpha",
        "16-bit-alpha",
        "16-bit-alpha_in_RGB",
        "empty-alpha",
        "unreadable",
    ],
)
def test_bad_ground_truth_is_reported_and_others_are_scored(
    evaluate: Evaluate, data: Path, tmp_path: Path, kind: str
) -> None:
    write_predictions(data, tmp_path / "pred")
    damage_alpha(kind, data / "alphas" / "a" / "lawn.png")
    kind = kind.split("_")[0]
    pages = [tmp_path / "r.json", tmp_path / "r.html", tmp_path / "r.csv"]
    result = evaluate(pred=tmp_path / "pred", report=pages)
    assert result.exit_code == 1
    assert "a/lawn.png" in result.stderr
    assert kind != "size-mismatch" or ", the size of its image; replace it by a file of this size" in result.stderr
    report = read_report(tmp_path / "r.json")
    assert report["summary"]["problems"] == {kind: 1}
    assert [problem["name"] for problem in report["problems"]] == ["a/lawn"]
    scored = {name for name, image in images_by_name(report).items() if image["scores"]}
    assert scored == set(NAMES) - (set() if kind == "16-bit-alpha" else {"a/lawn"})
    assert kind in (tmp_path / "r.html").read_text()
    assert evaluate(pred=tmp_path / "pred", allow=kind).exit_code == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "pixels that are NaN or infinite; expected"), (255.0, "values up to 255; expected 0..1")],
)
def test_float_prediction_out_of_range_is_reported(
    evaluate: Evaluate, data: Path, tmp_path: Path, value: float, message: str
) -> None:
    write_predictions(data, tmp_path / "pred")
    alpha = read(tmp_path / "pred" / "a" / "lawn.png") / np.float32(255)
    alpha[3, 5] = 1.1
    (tmp_path / "pred" / "a" / "lawn.png").unlink()
    Image.fromarray(alpha).save(tmp_path / "pred" / "a" / "lawn.tif")
    assert evaluate(pred=tmp_path / "pred").exit_code == 0
    alpha[3, 5] = value
    Image.fromarray(alpha).save(tmp_path / "pred" / "a" / "lawn.tif")
    result = evaluate(pred=tmp_path / "pred")
    assert result.exit_code == 1
    assert f"lawn.tif has {message}" in result.stderr


def test_16_bit_ground_truth_is_rounded_to_8_bits(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    write_predictions(data, tmp_path / "pred")
    evaluate(pred=tmp_path / "pred", report=tmp_path / "8.json")
    damage_alpha("16-bit-alpha", data / "alphas" / "a" / "lawn.png")
    evaluate(pred=tmp_path / "pred", report=tmp_path / "16.json")
    eight, sixteen = (images_by_name(read_report(tmp_path / f"{bits}.json"))["a/lawn"]["scores"] for bits in (8, 16))
    assert eight == sixteen


def test_dt_ssd_is_computed_between_consecutive_frames(tmp_path: Path) -> None:
    from icm_cli import evaluate
    from icm_cli.scoring.metrics import compute_dt_ssd

    rng = np.random.default_rng(0)
    numbers = [8, 9, 10, 11, 20]
    frames = {f"shot/f.{number}": rng.integers(0, 256, (2, 9, 12), np.uint8) for number in numbers}
    for name, (alpha, truth) in frames.items():
        for kind, image in (("images", truth), ("alphas", truth), ("pred", alpha)):
            path = tmp_path / kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), image)
    report = evaluate("folder", tmp_path, pred=tmp_path / "pred", video=True)
    flicker = {result.name: result.evaluation.dt_ssd for result in report.results}
    assert flicker["shot/f.8"] is flicker["shot/f.20"] is None
    for before, name in (("shot/f.8", "shot/f.9"), ("shot/f.9", "shot/f.10"), ("shot/f.10", "shot/f.11")):
        (alpha, truth), (alpha_before, truth_before) = frames[name], frames[before]
        assert flicker[name] == compute_dt_ssd(alpha, alpha_before, truth, truth_before)
    assert report.means["whole"].metrics["dt_ssd"].mean == pytest.approx(
        np.mean([value for value in flicker.values() if value is not None])
    )
    assert evaluate("folder", tmp_path, pred=tmp_path / "pred").results[1].evaluation.dt_ssd is None


def test_reports_state_the_protocol(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    write_predictions(data, tmp_path / "pred")
    options = {"region": ["unknown", "whole"], "size": "long1024", "metric_variant": "aim", "trimap_kernel": 9}
    pages = [tmp_path / "r.json", tmp_path / "r.html"]
    result = evaluate(pred=tmp_path / "pred", report=pages, note="alphas are pseudo", **options)
    protocol = read_report(tmp_path / "r.json")["settings"]["protocol"]
    assert protocol["regions"] == ["whole", "unknown"]
    assert (protocol["size"], protocol["metric_variant"]) == ("long1024", "aim")
    assert "9 px" in protocol["unknown_region"]
    for text in (result.stdout, (tmp_path / "r.html").read_text()):
        assert "long1024" in text
        assert "aim" in text
        assert "alphas are pseudo" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "aim-500"}, "--dataset is 'aim-500'; expected aim500, icm57"),
        ({"dataset": None}, "--dataset"),
        ({"region": "hole"}, "--region is 'hole'; expected whole or unknown"),
        ({"size": "long2048"}, "--size is 'long2048'; expected original, long1024 or square768"),
        ({"metric_variant": "dim"}, "aim"),
        ({"allow": "empty"}, "empty-alpha"),
        ({"rounds": 0}, "from 1 to 1000"),
        ({"refs_per_group": 0}, "from 1 to 1000"),
        ({"trimap_kernel": 0}, "from 1 to 1000"),
        ({"split": "val"}, "test"),
        ({"report": "r.txt"}, ".html"),
        ({"references": "nowhere.json"}, "nowhere.json"),
        ({"references": "nowhere.json", "rounds": 2}, "remove --rounds"),
        ({"model": "icm-sd22"}, "icm-sd21"),
    ],
)
def test_invalid_option_prints_one_message(evaluate: Evaluate, options: dict[str, Any], message: str) -> None:
    result = evaluate(**options)
    assert result.exit_code in (2, 3)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("icm: ")
    assert message in line


def test_model_options_are_refused_with_predictions(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    write_predictions(data, tmp_path / "pred")
    result = evaluate(pred=tmp_path / "pred", save_alphas=tmp_path / "out")
    assert result.exit_code == 2
    assert "--save-alphas has no effect" in result.stderr


def test_trimap_kernel_is_refused_without_unknown_region(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    write_predictions(data, tmp_path / "pred")
    result = evaluate(pred=tmp_path / "pred", trimap_kernel=9)
    assert result.exit_code == 2
    assert "--region unknown" in result.stderr


def test_compare_prints_every_image_and_warns_about_different_protocols(
    evaluate: Evaluate, data: Path, tmp_path: Path
) -> None:
    write_predictions(data, tmp_path / "pred")
    evaluate(pred=tmp_path / "pred", report=tmp_path / "a.json")
    line = ["eval", "--compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]
    from icm_cli.cli import app

    same = CliRunner().invoke(app, line)
    assert same.exit_code == 0
    assert same.stderr == ""
    cv2.imwrite(str(tmp_path / "pred" / "b" / "lawn.png"), 255 - read(data / "alphas" / "b" / "lawn.png"))
    (tmp_path / "pred" / "a" / "lawn.png").unlink()
    evaluate(pred=tmp_path / "pred", report=tmp_path / "b.json", size="long1024")
    differs = CliRunner().invoke(app, [*line[:-1], str(tmp_path / "b.json")])
    assert differs.exit_code == 0
    assert "size is original in the first and long1024 in the second" in differs.stderr
    assert "only in" in differs.stderr
    evaluate(pred=tmp_path / "pred", report=tmp_path / "c.json")
    nothing = read_report(tmp_path / "c.json") | {"images": []}
    (tmp_path / "c.json").write_text(json.dumps(nothing))
    assert CliRunner().invoke(app, [*line[:-1], str(tmp_path / "c.json")]).exit_code == 1
    shot = read_report(tmp_path / "a.json")
    shot["settings"] |= {"shot": True, "learn_steps": 140}
    (tmp_path / "s.json").write_text(json.dumps(shot))
    warnings = CliRunner().invoke(app, [*line[:-1], str(tmp_path / "s.json")]).stderr
    assert "shot is False in the first and True in the second" in warnings
    assert "learn_steps is 0 in the first and 140 in the second" in warnings
    rounds = read_report(tmp_path / "a.json")
    rounds["images"] += [image | {"round": 2} for image in rounds["images"]]
    (tmp_path / "d.json").write_text(json.dumps(rounds))
    second = CliRunner().invoke(app, [*line[:-1], str(tmp_path / "d.json")]).stderr
    assert f"6 images have scores only in {tmp_path}/d.json, such as a/brickwall in round 2" in second
    rows = [row for row in differs.stdout.splitlines() if re.search(r"[ab]/\w+", row)]
    assert len(rows) == 5
    assert "b/lawn" in rows[0]  # sorted by change, worst first
