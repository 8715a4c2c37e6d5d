"""``icm eval`` with a model: references, rounds, resume, images used for training."""

from __future__ import annotations

import fcntl
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COMPOSITES, arguments, read, shrink
from eval_data import NAMES, Evaluate, damage_alpha, images_by_name, read_report, write_predictions
from PIL import Image

from icm_cli.matting.engine import Engine
from icm_cli.scoring.metrics import compute_scores


def test_groups_are_matted_with_their_reference_and_scored(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    result = evaluate(report=tmp_path / "r.json", save_alphas=tmp_path / "out")
    assert result.exit_code == 0
    report = read_report(tmp_path / "r.json")
    (references,) = report["references"]
    assert set(references) == {"a", "b"}
    shown = {name for names in references.values() for name in names}
    assert set(images_by_name(report)) == set(NAMES) - shown
    for name, image in images_by_name(report).items():
        alpha, truth = read(tmp_path / "out" / f"{name}.png"), read(data / "alphas" / f"{name}.png")
        assert alpha.shape == truth.shape
        assert image["scores"]["whole"]["mse"] == compute_scores(alpha, truth)["whole"].mse
        assert image["scores"]["whole"]["conn"] == compute_scores(alpha, truth)["whole"].conn
    assert "whole" in result.stdout


def test_references_are_chosen_by_sha256_of_the_name(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(report=tmp_path / "r.json", rounds=2)
    for number, references in enumerate(read_report(tmp_path / "r.json")["references"]):
        for group, names in references.items():
            ordered = sorted(
                (name for name in NAMES if name.startswith(group)),
                key=lambda name: hashlib.sha256(name.encode()).hexdigest(),
            )
            assert names == [ordered[number]]


def test_rounds_report_mean_and_std_and_exclude_references(evaluate: Evaluate, tmp_path: Path) -> None:
    result = evaluate(report=tmp_path / "r.json", rounds=3, save_alphas=tmp_path / "out")
    assert "±" in result.stdout
    report = read_report(tmp_path / "r.json")
    assert len(report["images"]) == 12
    per_round = []
    for number, references in enumerate(report["references"], 1):
        names = {image["name"] for image in report["images"] if image["round"] == number}
        shown = {name for group in references.values() for name in group}
        assert names == set(NAMES) - shown
        assert {path.stem for path in (tmp_path / "out" / f"round-{number}" / "a").iterdir()} == {
            Path(name).name for name in names if name.startswith("a")
        }
        scores = [each["scores"]["whole"]["mse"] for each in report["images"] if each["round"] == number]
        per_round.append(np.mean(scores))
    mse = report["summary"]["means"]["whole"]["metrics"]["mse"]
    assert mse["mean"] == pytest.approx(np.mean(per_round))
    assert mse["std"] == pytest.approx(np.std(per_round, ddof=1))


def test_references_of_an_earlier_run_can_be_reused(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(report=tmp_path / "r.json", write_references=tmp_path / "refs.json", refs_per_group=2)
    first = read_report(tmp_path / "r.json")
    assert all(len(names) == 2 for names in first["references"][0].values())
    for file in ("r.json", "refs.json"):
        evaluate(report=tmp_path / "again.json", references=tmp_path / file)
        again = read_report(tmp_path / "again.json")
        assert again["references"] == first["references"]
        assert [each["scores"] for each in again["images"]] == [each["scores"] for each in first["images"]]


def test_second_run_keeps_all_alphas_and_reports_the_same_scores(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(report=tmp_path / "r.json", save_alphas=tmp_path / "out")
    monkeypatch.setattr("icm_cli.matting.model_choice.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    evaluate(report=tmp_path / "again.json", save_alphas=tmp_path / "out")
    first, again = read_report(tmp_path / "r.json"), read_report(tmp_path / "again.json")
    assert again["summary"]["kept"] == 4
    assert [each["scores"] for each in again["images"]] == [each["scores"] for each in first["images"]]


def test_run_without_save_alphas_resumes_after_a_crash_and_cleans_the_cache(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from icm_cli.matting.engine import Engine

    monkeypatch.setattr("icm_cli.evaluation.in_context.cache_folder", lambda: tmp_path / "cache")
    real, made = Engine._write, []

    def fail_at_third_image(self: Engine, *args: Any) -> Any:
        if len(made) == 2:
            raise RuntimeError("power cut")
        made.append(args[0].job.name)
        return real(self, *args)

    monkeypatch.setattr(Engine, "_write", fail_at_third_image)
    with pytest.raises(RuntimeError, match="power cut"):
        evaluate()
    monkeypatch.setattr(Engine, "_write", real)
    result = evaluate(report=tmp_path / "r.json")
    assert result.exit_code == 0
    assert read_report(tmp_path / "r.json")["summary"]["kept"] == 2
    assert list((tmp_path / "cache" / "eval").iterdir()) == []


def test_cached_alphas_in_use_by_another_run_are_not_removed(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from icm_cli.matting.engine import Engine

    monkeypatch.setattr("icm_cli.evaluation.in_context.cache_folder", lambda: tmp_path / "cache")
    others, run = [], Engine.run

    def run_while_locked(self: Engine, *args: Any) -> None:
        (lock,) = (tmp_path / "cache" / "eval").glob("*.lock")
        others.append(lock.open("w"))
        fcntl.flock(others[0], fcntl.LOCK_SH)
        run(self, *args)

    monkeypatch.setattr(Engine, "run", run_while_locked)
    assert evaluate().exit_code == 0
    assert len(list((tmp_path / "cache" / "eval").rglob("*.png"))) == 4
    others[0].close()
    assert evaluate().exit_code == 0
    assert not list((tmp_path / "cache" / "eval").iterdir())


def test_group_with_one_image_is_reported_and_others_are_scored(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    for path in [*data.rglob("b/launchpad.*"), *data.rglob("b/lawn.*")]:
        path.unlink()
    result = evaluate(report=tmp_path / "r.json")
    assert result.exit_code == 1
    report = read_report(tmp_path / "r.json")
    assert report["summary"]["problems"] == {"lone-image": 1}
    assert len(report["images"]) == 2
    assert evaluate(allow="lone-image").exit_code == 0


def test_unusable_reference_is_reported_and_replaced_by_the_next(
    evaluate: Evaluate, data: Path, tmp_path: Path
) -> None:
    evaluate(report=tmp_path / "r.json")
    (first,) = read_report(tmp_path / "r.json")["references"][0]["a"]
    (data / "images" / f"{first}.jpg").write_bytes(b"torn")
    result = evaluate(report=tmp_path / "r.json")
    assert result.exit_code == 1
    report = read_report(tmp_path / "r.json")
    assert report["references"][0]["a"] != [first]
    assert {"kind": "bad-reference", "name": first} in [
        {key: problem[key] for key in ("kind", "name")} for problem in report["problems"]
    ]
    assert images_by_name(report)[first]["status"] == "failed"
    assert sum(bool(image["scores"]) for image in report["images"]) == 3


def test_alpha_with_colour_is_no_reference(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    evaluate(report=tmp_path / "r.json")
    (first,) = read_report(tmp_path / "r.json")["references"][0]["a"]
    alpha = data / "alphas" / f"{first}.png"
    Image.open(data / "images" / f"{first}.jpg").save(alpha)
    result = evaluate(report=tmp_path / "r.json")
    assert result.exit_code == 1
    assert f"bad-reference: alpha {alpha} has colour" in result.stderr
    assert read_report(tmp_path / "r.json")["references"][0]["a"] != [first]


def test_images_of_alphas_with_colour_are_not_matted(
    evaluate: Evaluate, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(report=tmp_path / "r.json")
    (first,) = read_report(tmp_path / "r.json")["references"][0]["a"]
    targets = [name for name in NAMES if name.startswith("a/") and name != first]
    for name in targets:
        damage_alpha("colour-alpha", data / "alphas" / f"{name}.png")
    matted: list[str] = []
    run = Engine.run
    monkeypatch.setattr(Engine, "run", lambda engine, jobs: [matted.extend(map(str, jobs)), run(engine, jobs)])
    result = evaluate(report=tmp_path / "r.json")
    assert result.exit_code == 1
    report = read_report(tmp_path / "r.json")
    assert report["summary"]["problems"] == {"colour-alpha": len(targets)}
    assert {images_by_name(report)[name]["status"] for name in targets} == {"unscored"}
    assert len(matted) == len(report["images"]) - len(targets)
    assert sum(bool(image["scores"]) for image in report["images"]) == len(matted)


@pytest.mark.slow
def test_images_used_for_training_are_marked_and_excluded_from_a_second_mean(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    from tiny_sd import write_tiny_detail_config, write_tiny_sd

    from icm_cli.config import load_model_config
    from icm_cli.model.checkpoint import TRAINED_ON_KEY, save_checkpoint
    from icm_cli.model.core import InContextMatting
    from icm_cli.model.stable_diffusion.backbone import StableDiffusion
    from icm_cli.model.stable_diffusion.detail_head import DetailHead

    evaluate(report=tmp_path / "r.json")
    target = read_report(tmp_path / "r.json")["images"][0]
    digest = hashlib.sha256(Path(target["source"]).read_bytes()).hexdigest()
    folder = write_tiny_sd(tmp_path / "sd")
    config = load_model_config(str(write_tiny_detail_config(tmp_path / "m.yaml", folder)))
    backbone = StableDiffusion.load(config.backbone.settings, str(folder), offline=True, seed=0)
    model = InContextMatting(backbone, DetailHead(config.head.settings))
    metadata = {TRAINED_ON_KEY: json.dumps([digest])}
    save_checkpoint(tmp_path / "c.safetensors", model, config, with_backbone=False, metadata=metadata)
    pages = [tmp_path / "r.json", tmp_path / "r.html"]
    result = evaluate(report=pages, checkpoint=tmp_path / "c.safetensors", model=None)
    assert result.exit_code == 0, result.stderr
    assert "not trained on" in result.stdout
    report = read_report(tmp_path / "r.json")
    assert [image["name"] for image in report["images"] if image["is_seen"]] == [target["name"]]
    unseen = [each["scores"]["whole"]["mse"] for each in report["images"] if not each["is_seen"]]
    mean = report["summary"]["means_without_images_trained_on"]["whole"]["metrics"]["mse"]["mean"]
    assert mean == pytest.approx(np.mean(unseen))
    assert "trained on</b>" in (tmp_path / "r.html").read_text()
    assert report["settings"]["protocol"]["notes"] == []
    save_checkpoint(tmp_path / "c.safetensors", model, config, with_backbone=False)
    evaluate(report=tmp_path / "r.json", checkpoint=tmp_path / "c.safetensors", model=None)
    (note,) = read_report(tmp_path / "r.json")["settings"]["protocol"]["notes"]
    assert "does not list its training images" in note


def test_ground_truth_is_never_overwritten(evaluate: Evaluate, data: Path) -> None:
    before = {path: path.read_bytes() for path in data.rglob("*.*")}
    for options in (
        {"save_alphas": data / "alphas"},
        {"report": data / "images" / "a" / "lawn.jpg"},
        {"write_references": data / "alphas" / "a" / "lawn.png"},
    ):
        result = evaluate(**options)
        assert result.exit_code == 2
        assert len(result.stderr.strip().splitlines()) == 1
    assert {path: path.read_bytes() for path in data.rglob("*.*")} == before


@pytest.mark.slow
def test_run_resumes_after_being_killed(data: Path, small_model: Path, tmp_path: Path) -> None:
    line = [
        *(sys.executable, "-m", "icm_cli.cli", "eval"),
        *arguments({"dataset": "folder", "data-root": data, "model": small_model, "save-alphas": tmp_path / "out"}),
        *("--rounds", "3", "--report", str(tmp_path / "r.json")),
    ]
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        assert run.stderr
        assert next(text for text in run.stderr if text.startswith("[2/"))
        run.kill()
    assert not (tmp_path / "r.json").exists()
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    summary = read_report(tmp_path / "r.json")["summary"]
    assert summary["kept"] >= 2
    assert summary["kept"] + summary["done"] == summary["means"]["whole"]["images"] == 12
    assert not list((tmp_path / "out").rglob(".icm-*"))


@pytest.mark.slow
def test_sigterm_scores_and_reports_finished_images(data: Path, small_model: Path, tmp_path: Path) -> None:
    line = [
        *(sys.executable, "-m", "icm_cli.cli", "eval"),
        *arguments({"dataset": "folder", "data-root": data, "model": small_model, "report": tmp_path / "r.json"}),
        *("--rounds", "100", "--save-alphas", str(tmp_path / "out"), "--report", str(tmp_path / "r.html")),
    ]
    (tmp_path / "r.html").write_text("<title>an earlier page – icm</title>")
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stderr
        assert run.stdout
        assert next(text for text in run.stderr if text.startswith("[2/"))
        run.terminate()
        rest = run.stderr.read()
        summary = run.stdout.read()
    assert run.returncode == 143
    report = read_report(tmp_path / "r.json")
    assert not report["summary"]["complete"]
    missing = report["summary"]["not_reached"]
    assert f"(incomplete, {missing} of {len(report['images'])} images not reached)" in summary
    assert "earlier" in (tmp_path / "r.html").read_text()  # an interrupted run does not replace a report
    assert "is unchanged" in rest
    for image in report["images"]:
        assert bool(image["scores"]) == (image["status"] == "done")
        assert Path(image["output"]).exists() == (image["status"] == "done")


def test_alphas_of_other_tools_are_never_overwritten(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    write_predictions(data, tmp_path / "theirs")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    for folder in (tmp_path / "theirs", data / "images"):
        result = evaluate(save_alphas=folder)
        assert result.exit_code == 2
    assert {path: path.read_bytes() for path in before} == before


def test_input_files_are_never_overwritten(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    write_predictions(data, tmp_path / "pred")
    groups = tmp_path / "groups.json"
    groups.write_text(json.dumps({name: {"class": "x"} for name in NAMES}))
    references = tmp_path / "refs.json"
    references.write_text(json.dumps({"references": [{"a": ["a/lawn"]}]}))
    for options in (
        {"groups": groups, "report": groups},
        {"references": references, "report": references},
        {"report": [tmp_path / "r.json", tmp_path / "r.json"]},
    ):
        result = evaluate(pred=tmp_path / "pred", **options)
        assert result.exit_code == 2
    assert "class" in groups.read_text()
    assert "lawn" in references.read_text()
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        '{"references": [{"a": ["b/lawn"]}]}',
        '{"references": [{"a": "a/lawn"}]}',
        '{"references": {"a": ["a/lawn"]}}',
        '{"references": [3]}',
        "[]",
        "3",
        "",
    ],
)
def test_invalid_references_file_is_refused(evaluate: Evaluate, tmp_path: Path, content: str) -> None:
    (tmp_path / "refs.json").write_text(content)
    result = evaluate(references=tmp_path / "refs.json")
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "refs.json" in line
    assert "expected" in line


@pytest.mark.slow
def test_notes_report_too_many_rounds_or_references(evaluate: Evaluate, tmp_path: Path) -> None:
    result = evaluate(rounds=5, report=tmp_path / "r.json")
    (note,) = read_report(tmp_path / "r.json")["settings"]["protocol"]["notes"]
    assert "repeat in later rounds" in note
    assert note in result.stderr
    evaluate(refs_per_group=7, report=tmp_path / "r.json")
    (note,) = read_report(tmp_path / "r.json")["settings"]["protocol"]["notes"]
    assert "too few images for 7 references" in note


def test_composites_of_foregrounds_are_matted(tmp_path: Path, small_model: Path) -> None:
    from icm_cli import evaluate

    for folder, source in (("FG", "imgs/lawn.jpg"), ("GT", "alphas/lawn.png")):
        (tmp_path / "Test" / folder).mkdir(parents=True)
        shrink(COMPOSITES / source, tmp_path / "Test" / folder / "rocket.png", 80)
    (tmp_path / "bg").mkdir()
    for name in ("brickwall", "cat", "deepfield"):
        shrink(COMPOSITES / "imgs" / f"{name}.jpg", tmp_path / "bg" / f"{name}.png", 70)
    report = evaluate(
        "d646",
        tmp_path,
        backgrounds=tmp_path / "bg",
        model=str(small_model),
        device="cpu",
        report=[tmp_path / "r.html", tmp_path / "r.json"],
    )
    assert report.exit_code == 0
    (reference,) = report.references[0]["rocket"]
    behind = int(reference.removeprefix("rocket_")) % 3
    others = {f"rocket_{n}" for n in range(20) if n % 3 != behind}
    assert {result.name for result in report.results} == others
    assert {result.group for result in report.results} == {"rocket"}
    assert report.means["unknown"].images == len(others)
    assert len({result.matting.foreground for result in report.results}) > 1
    (note,) = report.settings["protocol"]["notes"]
    assert "3 backgrounds are reused for 20 composites" in note
