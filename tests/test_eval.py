"""``icm eval`` through its command: in context and with alphas of other tools, its reports, and bad data."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import Result
from conftest import DEMO, arguments, read, shrink
from typer.testing import CliRunner

from icm_cli.evaluation.metrics import score

NAMES = [f"{group}/{name}" for group in ("a", "b") for name in ("brickwall", "launchpad", "lawn")]
Evaluate = Callable[..., Result]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder dataset: groups a and b of three pictures of the demo's rocket each, with their exact alphas."""
    for name in NAMES:
        for kind, source, suffix in (("images", "imgs", ".jpg"), ("alphas", "alphas", ".png")):
            target = tmp_path / "data" / kind / f"{name}{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shrink(DEMO / source / f"{Path(name).name}{suffix}", target, 160 if name < "b" else 120)
    return tmp_path / "data"


@pytest.fixture
def evaluate(data: Path, small_model: Path) -> Evaluate:
    """Runs ``icm eval`` on the folder dataset; keyword arguments replace or add options, None leaves one out."""

    def run(*flags: str, **options: str | int | Path | Sequence[str | Path] | None) -> Result:
        from icm_cli.cli import app

        given: dict[str, object] = {"dataset": "folder", "data_root": data, **options}
        if "pred" not in options and "compare" not in options:
            given = {"model": small_model, "device": "cpu", **given}
        return CliRunner().invoke(app, ["eval", *arguments(given), *flags], catch_exceptions=False)

    return run


def report_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {image["name"]: image for image in report["images"]}


def copy_alphas(data: Path, folder: Path) -> Path:
    """Predictions that are the ground truth, blurred."""
    for path in (data / "alphas").rglob("*.png"):
        target = folder / path.relative_to(data / "alphas")
        target.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(target), cv2.GaussianBlur(read(path), (0, 0), 2))
    return folder


# --- in context ---


def test_every_group_is_matted_by_its_reference_and_scored(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    result = evaluate(report=tmp_path / "r.json", save_alphas=tmp_path / "out")
    assert result.exit_code == 0
    report = report_of(tmp_path / "r.json")
    (references,) = report["references"]
    assert set(references) == {"a", "b"}
    shown = {name for names in references.values() for name in names}
    assert set(by_name(report)) == set(NAMES) - shown
    for name, image in by_name(report).items():
        alpha, truth = read(tmp_path / "out" / f"{name}.png"), read(data / "alphas" / f"{name}.png")
        assert alpha.shape == truth.shape
        assert image["scores"]["whole"]["mse"] == score(alpha, truth)["whole"].mse
        assert image["scores"]["whole"]["conn"] == score(alpha, truth)["whole"].conn
    assert "whole" in result.stdout


def test_the_reference_is_the_first_name_by_sha256(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(report=tmp_path / "r.json", rounds=2)
    for number, references in enumerate(report_of(tmp_path / "r.json")["references"]):
        for group, names in references.items():
            ordered = sorted(
                (name for name in NAMES if name.startswith(group)),
                key=lambda name: hashlib.sha256(name.encode()).hexdigest(),
            )
            assert names == [ordered[number]]


def test_rounds_give_mean_and_spread_and_no_reference_is_scored_in_its_round(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    result = evaluate(report=tmp_path / "r.json", rounds=3, save_alphas=tmp_path / "out")
    assert "±" in result.stdout
    report = report_of(tmp_path / "r.json")
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
    assert mse["spread"] == pytest.approx(np.std(per_round, ddof=1))


def test_references_of_an_earlier_run_are_used_again(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(report=tmp_path / "r.json", write_references=tmp_path / "refs.json", refs_per_group=2)
    first = report_of(tmp_path / "r.json")
    assert all(len(names) == 2 for names in first["references"][0].values())
    for file in ("r.json", "refs.json"):
        evaluate(report=tmp_path / "again.json", references=tmp_path / file)
        again = report_of(tmp_path / "again.json")
        assert again["references"] == first["references"]
        assert [each["scores"] for each in again["images"]] == [each["scores"] for each in first["images"]]


def test_a_second_run_makes_nothing_again_and_says_the_same(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(report=tmp_path / "r.json", save_alphas=tmp_path / "out")
    monkeypatch.setattr("icm_cli.model_choice.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    evaluate(report=tmp_path / "again.json", save_alphas=tmp_path / "out")
    first, again = report_of(tmp_path / "r.json"), report_of(tmp_path / "again.json")
    assert again["summary"]["skipped"] == 4
    assert [each["scores"] for each in again["images"]] == [each["scores"] for each in first["images"]]


def test_without_save_alphas_a_crash_still_resumes_and_nothing_stays_after_the_end(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from icm_cli import files
    from icm_cli.engine import Engine

    monkeypatch.setattr("icm_cli.evaluation.in_context.cache_folder", lambda: tmp_path / "cache")
    assert files.cache_folder  # the digests' own cache stays where it is
    real, made = Engine._write, []

    def dies_at_the_third(self: Engine, *args: Any) -> Any:
        if len(made) == 2:
            raise RuntimeError("power cut")
        made.append(args[0].job.name)
        return real(self, *args)

    monkeypatch.setattr(Engine, "_write", dies_at_the_third)
    with pytest.raises(RuntimeError, match="power cut"):
        evaluate()
    monkeypatch.setattr(Engine, "_write", real)
    result = evaluate(report=tmp_path / "r.json")
    assert result.exit_code == 0
    assert report_of(tmp_path / "r.json")["summary"]["skipped"] == 2
    assert list((tmp_path / "cache" / "eval").iterdir()) == []


def test_alphas_that_another_run_still_scores_stay(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from icm_cli.engine import Engine

    monkeypatch.setattr("icm_cli.evaluation.in_context.cache_folder", lambda: tmp_path / "cache")
    others, run = [], Engine.run

    def while_another_runs(self: Engine, *args: Any) -> None:
        (lock,) = (tmp_path / "cache" / "eval").glob("*.lock")
        others.append(lock.open("w"))
        fcntl.flock(others[0], fcntl.LOCK_SH)
        run(self, *args)

    monkeypatch.setattr(Engine, "run", while_another_runs)
    assert evaluate().exit_code == 0
    assert len(list((tmp_path / "cache" / "eval").rglob("*.png"))) == 4
    others[0].close()
    assert evaluate().exit_code == 0
    assert not list((tmp_path / "cache" / "eval").iterdir())


def test_a_group_of_one_is_named_and_the_others_are_scored(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    for path in [*data.rglob("b/launchpad.*"), *data.rglob("b/lawn.*")]:
        path.unlink()
    result = evaluate(report=tmp_path / "r.json")
    assert result.exit_code == 1
    report = report_of(tmp_path / "r.json")
    assert report["summary"]["problems"] == {"lone-image": 1}
    assert len(report["images"]) == 2
    assert evaluate(allow="lone-image").exit_code == 0


def test_a_reference_that_cannot_serve_is_named_and_the_next_one_does(
    evaluate: Evaluate, data: Path, tmp_path: Path
) -> None:
    evaluate(report=tmp_path / "r.json")
    (first,) = report_of(tmp_path / "r.json")["references"][0]["a"]
    (data / "images" / f"{first}.jpg").write_bytes(b"torn")
    result = evaluate(report=tmp_path / "r.json")
    assert result.exit_code == 1
    report = report_of(tmp_path / "r.json")
    assert report["references"][0]["a"] != [first]
    assert {"kind": "bad-reference", "name": first} in [
        {key: problem[key] for key in ("kind", "name")} for problem in report["problems"]
    ]
    assert by_name(report)[first]["status"] == "failed"
    assert sum(bool(image["scores"]) for image in report["images"]) == 3


def test_images_the_model_was_trained_on_are_marked_and_left_out_of_a_second_mean(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    from tiny_sd import tiny_detail_yaml, write_tiny_sd

    from icm_cli.config import load_model_config
    from icm_cli.model.backbones.stable_diffusion import StableDiffusion
    from icm_cli.model.checkpoint import TRAINED_ON_KEY, save_checkpoint
    from icm_cli.model.heads.detail import DetailHead
    from icm_cli.model.in_context_matting import InContextMatting

    evaluate(report=tmp_path / "r.json")
    target = report_of(tmp_path / "r.json")["images"][0]
    digest = hashlib.sha256(Path(target["source"]).read_bytes()).hexdigest()
    folder = write_tiny_sd(tmp_path / "sd")
    config = load_model_config(str(tiny_detail_yaml(tmp_path / "m.yaml", folder)))
    backbone = StableDiffusion.load(config.backbone.settings, str(folder), offline=True, seed=0)
    model = InContextMatting(backbone, DetailHead(config.head.settings))
    metadata = {TRAINED_ON_KEY: json.dumps([digest])}
    save_checkpoint(tmp_path / "c.safetensors", model, config, with_backbone=False, metadata=metadata)
    pages = [tmp_path / "r.json", tmp_path / "r.html"]
    result = evaluate(report=pages, checkpoint=tmp_path / "c.safetensors", model=None)
    assert result.exit_code == 0, result.stderr
    assert "not trained on" in result.stdout
    report = report_of(tmp_path / "r.json")
    assert [image["name"] for image in report["images"] if image["is_seen"]] == [target["name"]]
    unseen = [each["scores"]["whole"]["mse"] for each in report["images"] if not each["is_seen"]]
    mean = report["summary"]["means_without_images_trained_on"]["whole"]["metrics"]["mse"]["mean"]
    assert mean == pytest.approx(np.mean(unseen))
    assert "trained on</b>" in (tmp_path / "r.html").read_text()
    assert report["settings"]["protocol"]["notes"] == []
    save_checkpoint(tmp_path / "c.safetensors", model, config, with_backbone=False)
    evaluate(report=tmp_path / "r.json", checkpoint=tmp_path / "c.safetensors", model=None)
    (note,) = report_of(tmp_path / "r.json")["settings"]["protocol"]["notes"]
    assert "does not say which images it was trained on" in note


# --- alphas of any tool ---


def test_predictions_are_scored_without_torch(data: Path, tmp_path: Path) -> None:
    copy_alphas(data, tmp_path / "pred")
    code = (
        "import sys; from icm_cli import evaluate\n"
        f"report = evaluate('folder', {str(data)!r}, pred={str(tmp_path / 'pred')!r})\n"
        "assert report.exit_code == 0 and report.means['whole'].images == 6, report\n"
        "sys.exit('torch' in sys.modules)"
    )  # unguarded, as in a user's script
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_alphas_that_were_kept_score_the_same_as_when_they_were_made(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(report=tmp_path / "made.json", save_alphas=tmp_path / "out", rounds=2)
    result = evaluate(report=tmp_path / "pred.json", pred=tmp_path / "out", references=tmp_path / "made.json")
    assert result.exit_code == 0
    made, scored = report_of(tmp_path / "made.json"), report_of(tmp_path / "pred.json")
    assert [each["scores"] for each in made["images"]] == [each["scores"] for each in scored["images"]]
    assert made["summary"]["means"] == scored["summary"]["means"]
    assert [each["foreground"] for each in made["images"]] == [each["foreground"] for each in scored["images"]]


def test_a_missing_prediction_is_named_and_the_rest_scored(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    copy_alphas(data, tmp_path / "pred")
    (tmp_path / "pred" / "a" / "lawn.png").unlink()
    result = evaluate(pred=tmp_path / "pred", report=tmp_path / "r.json")
    assert result.exit_code == 1
    assert "missing-prediction" in result.stderr
    assert report_of(tmp_path / "r.json")["summary"]["means"]["whole"]["images"] == 5


def test_predictions_of_another_size_are_brought_to_the_truths_and_counted(
    evaluate: Evaluate, data: Path, tmp_path: Path
) -> None:
    copy_alphas(data, tmp_path / "pred")
    path = tmp_path / "pred" / "a" / "lawn.png"
    half = cv2.resize(read(path), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(path), half)
    result = evaluate(pred=tmp_path / "pred", report=tmp_path / "r.json")
    assert result.exit_code == 0
    assert "resized to score" in result.stdout
    image = by_name(report_of(tmp_path / "r.json"))["a/lawn"]
    truth = read(data / "alphas" / "a" / "lawn.png")
    expected = score(cv2.resize(half, truth.shape[::-1], interpolation=cv2.INTER_LINEAR), truth)["whole"]
    assert image["was_resized"]
    assert image["scores"]["whole"]["mse"] == expected.mse


def test_a_folder_without_any_of_the_alphas(evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "pred").mkdir()
    result = evaluate(pred=tmp_path / "pred")
    assert result.exit_code == 2
    assert "a/brickwall.png" in result.stderr


def test_allowed_bad_data_is_no_failure_but_a_run_without_any_score_is(
    evaluate: Evaluate, data: Path, tmp_path: Path
) -> None:
    copy_alphas(data, tmp_path / "pred")
    (tmp_path / "pred" / "a" / "lawn.png").unlink()
    assert evaluate(pred=tmp_path / "pred", allow="missing-prediction").exit_code == 0
    for path in (tmp_path / "pred").rglob("*.png"):
        path.write_bytes(b"torn")
    result = evaluate(pred=tmp_path / "pred", allow=["missing-prediction", "unreadable"], report=tmp_path / "r.json")
    assert result.exit_code == 1
    assert report_of(tmp_path / "r.json")["summary"]["unscored"] == 6


@pytest.mark.parametrize("kind", ["colour-alpha", "unscaled-alpha"])
def test_predictions_that_are_no_alphas_are_named(evaluate: Evaluate, data: Path, tmp_path: Path, kind: str) -> None:
    copy_alphas(data, tmp_path / "pred")
    bad_truth(kind, tmp_path / "pred" / "a" / "lawn.png")
    result = evaluate(pred=tmp_path / "pred", report=tmp_path / "r.json")
    assert result.exit_code == 1
    assert report_of(tmp_path / "r.json")["summary"]["problems"] == {kind: 1}
    assert by_name(report_of(tmp_path / "r.json"))["a/lawn"]["status"] == "unscored"


def test_two_alphas_of_one_file_name_are_not_guessed_at(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    for folder in ("x", "y"):
        copy_alphas(data, tmp_path / "pred" / folder)
    result = evaluate(pred=tmp_path / "pred")
    assert result.exit_code == 2
    assert "several of each name" in result.stderr


def bad_truth(kind: str, path: Path) -> None:
    alpha = read(path)
    if kind == "size-mismatch":
        alpha = alpha[:, :-20]
    elif kind == "colour-alpha":
        alpha = np.dstack([alpha, alpha // 2, alpha])
    elif kind == "16-bit-alpha":
        alpha = alpha.astype(np.uint16) * 257
    elif kind == "16-bit-alpha_in_RGB":
        alpha = np.dstack([alpha.astype(np.uint16) * 257] * 3)
    elif kind == "unscaled-alpha":
        alpha = (alpha > 127).astype(np.uint8)
    elif kind == "empty-alpha":
        alpha = np.zeros_like(alpha)
    cv2.imwrite(str(path), alpha)
    if kind == "unreadable":
        path.write_bytes(path.read_bytes()[:90])


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
def test_bad_truths_are_named_counted_and_the_rest_scored(
    evaluate: Evaluate, data: Path, tmp_path: Path, kind: str
) -> None:
    copy_alphas(data, tmp_path / "pred")
    bad_truth(kind, data / "alphas" / "a" / "lawn.png")
    kind = kind.split("_")[0]
    pages = [tmp_path / "r.json", tmp_path / "r.html", tmp_path / "r.csv"]
    result = evaluate(pred=tmp_path / "pred", report=pages)
    assert result.exit_code == 1
    assert "a/lawn.png" in result.stderr
    report = report_of(tmp_path / "r.json")
    assert report["summary"]["problems"] == {kind: 1}
    assert [problem["name"] for problem in report["problems"]] == ["a/lawn"]
    scored = {name for name, image in by_name(report).items() if image["scores"]}
    assert scored == set(NAMES) - (set() if kind == "16-bit-alpha" else {"a/lawn"})
    assert kind in (tmp_path / "r.html").read_text()
    assert evaluate(pred=tmp_path / "pred", allow=kind).exit_code == 0


def test_16_bits_are_scored_as_8(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    copy_alphas(data, tmp_path / "pred")
    evaluate(pred=tmp_path / "pred", report=tmp_path / "8.json")
    bad_truth("16-bit-alpha", data / "alphas" / "a" / "lawn.png")
    evaluate(pred=tmp_path / "pred", report=tmp_path / "16.json")
    eight, sixteen = (by_name(report_of(tmp_path / f"{bits}.json"))["a/lawn"]["scores"] for bits in (8, 16))
    assert eight == sixteen


def test_videos_have_dt_ssd_between_frames_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    from icm_cli import evaluate
    from icm_cli.evaluation.metrics import dt_ssd

    rng = np.random.default_rng(0)
    numbers = [8, 9, 10, 11, 20]
    frames = {f"shot/f.{number}": rng.integers(0, 256, (2, 9, 12), np.uint8) for number in numbers}
    for name, (alpha, truth) in frames.items():
        for kind, image in (("images", truth), ("alphas", truth), ("pred", alpha)):
            path = tmp_path / kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), image)
    report = evaluate("folder", tmp_path, pred=tmp_path / "pred", video=True)
    flicker = {result.name: result.dt_ssd for result in report.results}
    assert flicker["shot/f.8"] is flicker["shot/f.20"] is None
    for before, name in (("shot/f.8", "shot/f.9"), ("shot/f.9", "shot/f.10"), ("shot/f.10", "shot/f.11")):
        (alpha, truth), (alpha_before, truth_before) = frames[name], frames[before]
        assert flicker[name] == dt_ssd(alpha, alpha_before, truth, truth_before)
    assert report.means["whole"].metrics["dt_ssd"].mean == pytest.approx(
        np.mean([value for value in flicker.values() if value is not None])
    )
    assert evaluate("folder", tmp_path, pred=tmp_path / "pred").results[1].dt_ssd is None


# --- protocol ---


def test_every_report_states_the_protocol(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    copy_alphas(data, tmp_path / "pred")
    options = {"region": ["unknown", "whole"], "size": "long1024", "lineage": "aim", "trimap_kernel": 9}
    pages = [tmp_path / "r.json", tmp_path / "r.html"]
    result = evaluate(pred=tmp_path / "pred", report=pages, note="alphas are pseudo", **options)
    protocol = report_of(tmp_path / "r.json")["settings"]["protocol"]
    assert protocol["regions"] == ["whole", "unknown"]
    assert (protocol["size"], protocol["lineage"]) == ("long1024", "aim")
    assert "9 px" in protocol["unknown_region"]
    for text in (result.stdout, (tmp_path / "r.html").read_text()):
        assert "long1024" in text
        assert "aim" in text
        assert "alphas are pseudo" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "aim-500"}, "Did you mean 'aim500'"),
        ({"dataset": None}, "--dataset"),
        ({"region": "hole"}, "Did you mean 'whole'"),
        ({"size": "long2048"}, "Did you mean 'long1024'"),
        ({"lineage": "dim"}, "aim"),
        ({"allow": "empty"}, "empty-alpha"),
        ({"rounds": 0}, "1 or more"),
        ({"refs_per_group": 0}, "1 or more"),
        ({"trimap_kernel": 0}, "1 or more"),
        ({"split": "val"}, "test"),
        ({"report": "r.txt"}, ".html"),
        ({"references": "nowhere.json"}, "nowhere.json"),
        ({"references": "nowhere.json", "rounds": 2}, "leave --rounds"),
        ({"model": "icm-sd22"}, "icm-sd21"),
    ],
)
def test_a_wrong_option_is_one_sentence(evaluate: Evaluate, options: dict[str, Any], message: str) -> None:
    result = evaluate(**options)
    assert result.exit_code in (2, 3)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("icm: ")
    assert message in line


def test_with_predictions_options_of_a_model_are_refused(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    copy_alphas(data, tmp_path / "pred")
    result = evaluate(pred=tmp_path / "pred", save_alphas=tmp_path / "out")
    assert result.exit_code == 2
    assert "--save-alphas has nothing to do" in result.stderr


def test_compare_prints_every_image_and_warns_where_protocols_differ(
    evaluate: Evaluate, data: Path, tmp_path: Path
) -> None:
    copy_alphas(data, tmp_path / "pred")
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
    nothing = report_of(tmp_path / "c.json") | {"images": []}
    (tmp_path / "c.json").write_text(json.dumps(nothing))
    assert CliRunner().invoke(app, [*line[:-1], str(tmp_path / "c.json")]).exit_code == 1
    rows = [row for row in differs.stdout.splitlines() if re.search(r"[ab]/\w+", row)]
    assert len(rows) == 5
    assert "b/lawn" in rows[0]  # what became worse comes first


# --- reports ---


class Page(HTMLParser):
    """Gathers what a page refers to, and its headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.headings: list[str] = []
        self._tag = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "input", "link"):
            self.open.append(tag)
        self._tag = tag

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._tag in ("h1", "h2", "h3") and data.strip():
            self.headings.append(data.strip())


def test_the_page_is_whole_and_needs_nothing_from_outside(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(report=tmp_path / "r.html", region=["whole", "unknown"])
    text = (tmp_path / "r.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.references
    assert all(reference.startswith("data:image/webp;base64,") for reference in page.references)
    assert not re.search(r"url\(|@import|https?://", text)
    for heading in ("Summary", "Protocol", "Worst images", "By group", "Distributions", "Made with", "References"):
        assert heading in page.headings
    for caption in ("source", "reference with mask", "ground truth", "error"):
        assert f'alt="{caption}' in text
    before_scripts = text[: text.index("<script>")]
    assert "MSE" in before_scripts  # readable without them


def test_published_rows_stand_beside_ours_with_a_note(tmp_path: Path, small_model: Path) -> None:
    from icm_cli.cli import app

    names = ["dog3_00", "dog3_02"]
    for name in names:
        for kind, source in (("image", "imgs/lawn.jpg"), ("alpha", "alphas/lawn.png")):
            (tmp_path / kind).mkdir(exist_ok=True)
            shrink(DEMO / source, tmp_path / kind / f"{name}.png", 120)
    line = ["eval", *arguments({"dataset": "icm57", "data-root": tmp_path, "report": tmp_path / "r.html"})]
    result = CliRunner().invoke(app, [*line, "--model", str(small_model)])
    assert result.exit_code == 1  # 230 of the published images are not here
    assert "absent-file" in result.stdout
    assert "0.0081" in result.stdout
    text = (tmp_path / "r.html").read_text()
    assert "SegGPT" in text
    assert "Only 1 of the 232 images" in text
    assert "square768" in text


def test_csv_has_a_line_for_every_image(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(report=tmp_path / "r.csv", region=["whole", "unknown"])
    lines = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert len(lines) == 4
    for metric in ("mse", "sad", "grad", "conn", "mad"):
        assert all(float(line[f"{region}_{metric}"]) >= 0 for line in lines for region in ("whole", "unknown"))
    assert {line["group"] for line in lines} == {"a", "b"}
    assert {(line["scored_size"], line["scored_lineage"]) for line in lines} == {("original", "composition")}


def test_json_tells_versions_hardware_and_timing(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(report=tmp_path / "r.json")
    report = report_of(tmp_path / "r.json")
    assert {"python", "torch", "numpy", "icm-cli"} <= set(report["settings"]["versions"])
    assert report["settings"]["hardware"]["cores"] >= 1
    assert report["settings"]["model"]["backbone"]["name"] == "efficientnet-lite"
    assert report["summary"]["seconds"] > 0
    assert all(image["seconds"] > 0 for image in report["images"])


def test_matte_writes_the_same_page(data: Path, tmp_path: Path, small_model: Path) -> None:
    from icm_cli.cli import app

    shutil.copytree(data / "images" / "a", tmp_path / "src")
    (tmp_path / "src" / "brickwall.jpg").unlink()
    line = arguments(
        {
            "ref": data / "images" / "a" / "brickwall.jpg",
            "mask": data / "alphas" / "a" / "brickwall.png",
            "src": tmp_path / "src",
            "out": tmp_path / "out",
            "model": small_model,
            "report": [tmp_path / "r.html", tmp_path / "r.json"],
        }
    )
    without = CliRunner().invoke(app, ["matte", *line], catch_exceptions=False)
    assert without.exit_code == 0
    text = (tmp_path / "r.html").read_text()
    assert "there was no ground truth" in text
    assert 'alt="source"' in text
    result = CliRunner().invoke(app, ["matte", *line, "--gt", str(data / "alphas" / "a")], catch_exceptions=False)
    assert result.exit_code == 0
    text = (tmp_path / "r.html").read_text()
    assert "Worst images" in text
    assert "lineage" in text
    for image in report_of(tmp_path / "r.json")["images"]:
        alpha, truth = read(Path(image["output"])), read(data / "alphas" / "a" / Path(image["output"]).name)
        assert image["scores"]["whole"]["grad"] == score(alpha, truth)["whole"].grad


# --- nothing is lost ---


def test_ground_truth_is_never_written_over(evaluate: Evaluate, data: Path) -> None:
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


def test_killed_and_run_again_ends_as_if_never_stopped(data: Path, small_model: Path, tmp_path: Path) -> None:
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
    summary = report_of(tmp_path / "r.json")["summary"]
    assert summary["skipped"] >= 2
    assert summary["skipped"] + summary["done"] == summary["means"]["whole"]["images"] == 12
    assert not list((tmp_path / "out").rglob(".icm-*"))


def test_sigterm_scores_and_reports_what_is_done(data: Path, small_model: Path, tmp_path: Path) -> None:
    line = [
        *(sys.executable, "-m", "icm_cli.cli", "eval"),
        *arguments({"dataset": "folder", "data-root": data, "model": small_model, "report": tmp_path / "r.json"}),
        *("--rounds", "3", "--save-alphas", str(tmp_path / "out"), "--report", str(tmp_path / "r.html")),
    ]
    (tmp_path / "r.html").write_text("an earlier page")
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        assert run.stderr
        assert next(text for text in run.stderr if text.startswith("[2/"))
        run.terminate()
        rest = run.stderr.read()
    assert run.returncode in (143, 0)  # 0 where it was done before the signal came
    report = report_of(tmp_path / "r.json")
    assert report["summary"]["complete"] == (run.returncode == 0)
    if run.returncode:
        assert "earlier" in (tmp_path / "r.html").read_text()  # a run cut short replaces no report
        assert "left as it was" in rest
    for image in report["images"]:
        assert bool(image["scores"]) == (image["status"] == "done")
        assert Path(image["output"]).exists() == (image["status"] == "done")


def test_alphas_of_another_tool_are_never_written_over(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    copy_alphas(data, tmp_path / "theirs")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    for folder in (tmp_path / "theirs", data / "images"):
        result = evaluate(save_alphas=folder)
        assert result.exit_code == 2
    assert {path: path.read_bytes() for path in before} == before


def test_files_that_say_what_to_do_are_never_written_over(evaluate: Evaluate, data: Path, tmp_path: Path) -> None:
    copy_alphas(data, tmp_path / "pred")
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
def test_references_of_another_kind(evaluate: Evaluate, tmp_path: Path, content: str) -> None:
    (tmp_path / "refs.json").write_text(content)
    result = evaluate(references=tmp_path / "refs.json")
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "refs.json" in line
    assert "expected" in line


@pytest.mark.parametrize(
    "content",
    [
        '{"images": [3], "settings": {}}',
        '{"images": [{"name": "a", "scores": {"whole": {"mse": "0"}}}], "settings": {}}',
        '{"images": [{"name": "a", "scores": {"whole": {"mse": NaN, "sad": 0, "grad": 0, "conn": 0, "mad": 0}}}],'
        ' "settings": {}}',
        '{"images": []}',
        "[]",
        "",
    ],
)
def test_compare_refuses_what_is_no_report(tmp_path: Path, content: str) -> None:
    from icm_cli.cli import app

    (tmp_path / "r.json").write_text(content)
    result = CliRunner().invoke(app, ["eval", "--compare", str(tmp_path / "r.json"), str(tmp_path / "r.json")])
    assert result.exit_code == 2
    assert "expected a .json that icm wrote" in result.stderr


def test_more_rounds_or_references_than_images_are_said_to_repeat(evaluate: Evaluate, tmp_path: Path) -> None:
    result = evaluate(rounds=5, report=tmp_path / "r.json")
    (note,) = report_of(tmp_path / "r.json")["settings"]["protocol"]["notes"]
    assert "come again" in note
    assert note in result.stderr
    evaluate(refs_per_group=7, report=tmp_path / "r.json")
    (note,) = report_of(tmp_path / "r.json")["settings"]["protocol"]["notes"]
    assert "too few images for 7 references" in note


def test_foregrounds_are_matted_in_context_on_their_backgrounds(tmp_path: Path, small_model: Path) -> None:
    from icm_cli import evaluate

    for folder, source in (("FG", "imgs/lawn.jpg"), ("GT", "alphas/lawn.png")):
        (tmp_path / "Test" / folder).mkdir(parents=True)
        shrink(DEMO / source, tmp_path / "Test" / folder / "rocket.png", 80)
    (tmp_path / "bg").mkdir()
    for name in ("brickwall", "cat", "deepfield"):
        shrink(DEMO / "imgs" / f"{name}.jpg", tmp_path / "bg" / f"{name}.png", 70)
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
    others = {f"rocket_{n}" for n in range(20) if n % 3 != behind}  # the very same picture is no target
    assert {result.name for result in report.results} == others
    assert {result.group for result in report.results} == {"rocket"}
    assert report.means["unknown"].images == len(others)
    assert len({result.foreground for result in report.results}) > 1
    (note,) = report.settings["protocol"]["notes"]
    assert "3 backgrounds stand behind 20 composites" in note
