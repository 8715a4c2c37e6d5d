"""Report files of ``icm eval`` and ``icm matte --gt``: HTML page, CSV and JSON."""

from __future__ import annotations

import csv
import os
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import COMPOSITES, Icm, arguments, read, shrink
from eval_data import Evaluate, read_report
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import icm_cli
from icm_cli.config import load_model_config
from icm_cli.errors import OutputError, Problem
from icm_cli.reports.contact_sheet import write_contact_sheet
from icm_cli.reports.report import Report
from icm_cli.reports.result import ImageEvaluation, ImageResult, MattingDetails, Scores
from icm_cli.reports.write import ReportFiles, _escape_formula, write_report
from icm_cli.scoring.metrics import compute_scores


class Page(HTMLParser):
    """Collects the references, links, headings and open tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self._tag = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "srcset", "data")]
        self.links += [value or "" for name, value in attrs if name == "href"]
        if tag not in ("meta", "img", "input", "link"):
            self.open.append(tag)
        self._tag = tag

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._tag in ("h1", "h2", "h3") and data.strip():
            self.headings.append(data.strip())


def test_page_is_well_formed_and_self_contained(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(report=tmp_path / "r.html", region=["whole", "unknown"])
    text = (tmp_path / "r.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.references
    assert all(reference.startswith("data:image/webp;base64,") for reference in page.references)
    assert page.links
    assert all((tmp_path / link).is_file() for link in page.links)
    assert not re.search(r"url\(|@import|https?://", text)
    for heading in ("Summary", "Protocol", "Worst images", "By group", "Distributions", "Settings", "References"):
        assert heading in page.headings
    for caption in ("source", "reference with mask", "ground truth", "error"):
        assert f'alt="{caption}' in text
    before_scripts = text[: text.index("<script>")]
    assert "MSE" in before_scripts  # readable without them


def test_page_and_terminal_show_published_scores_with_caveats(tmp_path: Path, small_model: Path) -> None:
    from icm_cli.cli import app

    names = ["dog3_00", "dog3_02"]
    for name in names:
        for kind, source in (("image", "imgs/lawn.jpg"), ("alpha", "alphas/lawn.png")):
            (tmp_path / kind).mkdir(exist_ok=True)
            shrink(COMPOSITES / source, tmp_path / kind / f"{name}.png", 120)
    line = ["eval", *arguments({"dataset": "icm57", "data-root": tmp_path, "report": tmp_path / "r.html"})]
    result = CliRunner().invoke(app, [*line, "--model", str(small_model)])
    assert result.exit_code == 1  # 230 of the published images are not here
    assert "230 (the exit code is 1; --allow absent-file accepts them)" in result.stdout
    assert "0.00810" in result.stdout
    text = (tmp_path / "r.html").read_text()
    assert "SegGPT" in text
    assert "Only 1 of the 232 images" in text
    assert "square768" in text


def test_csv_has_a_row_for_every_image(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(report=tmp_path / "r.csv", region=["whole", "unknown"])
    lines = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert len(lines) == 4
    for metric in ("mse", "sad", "grad", "conn", "mad"):
        assert all(float(line[f"{region}_{metric}"]) >= 0 for line in lines for region in ("whole", "unknown"))
    assert {line["group"] for line in lines} == {"a", "b"}
    assert {(line["scored_size"], line["scored_metric_variant"]) for line in lines} == {("original", "composition")}


def test_json_contains_versions_hardware_and_timing(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(report=tmp_path / "r.json")
    report = read_report(tmp_path / "r.json")
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
    assert "metric variant" in text
    for image in read_report(tmp_path / "r.json")["images"]:
        alpha, truth = read(Path(image["output"])), read(data / "alphas" / "a" / Path(image["output"]).name)
        assert image["scores"]["whole"]["grad"] == compute_scores(alpha, truth)["whole"].grad


def test_page_shows_failures_first_and_counts_them(icm: Icm, scene: Path) -> None:
    (scene / "imgs" / "torn<b>.jpg").write_bytes((scene / "imgs" / "wall.jpg").read_bytes()[:300])
    shutil.copytree(scene / "imgs", scene / "gt")
    (scene / "gt" / "sub" / "deep.png").unlink()
    for options in ({}, {"gt": scene / "gt"}):
        assert icm("--overwrite", report=scene / "r.html", **options).exit_code == 1
        text = (scene / "r.html").read_text()
        page = Page(text)
        assert page.open == []
        assert page.headings[1:3] == ["Summary", "Failed images"]
        assert '<b class="mark">1 failed</b>' in text
        before_fold = text[: text.index("<details")]
        assert "<li><b>torn&lt;b&gt;.jpg</b>: " in before_fold
        assert "is damaged" in before_fold
        assert "torn&lt;b&gt;.jpg" in text[text.index("All images") :]
        assert "(s)" not in text
    assert "missing-alpha" in before_fold
    assert page.headings[3] == "Problems with the data"


def test_report_names_all_components_of_the_model(data: Path, tmp_path: Path, small_model: Path) -> None:
    predictor = icm_cli.load(model=str(small_model), edges="closed-form", device="cpu")
    icm_cli.evaluate("folder", data, predictor=predictor, report=[tmp_path / "r.html", tmp_path / "r.json"])
    assert read_report(tmp_path / "r.json")["settings"]["model_name"].count(" + ") == 2
    assert "<dt>model name</dt>" in (tmp_path / "r.html").read_text()
    config = load_model_config("lite")
    assert config.title == "dinov2-lite + token-match + mobile-sam + refine"


def test_sources_are_opened_at_most_three_times(icm: Icm, scene: Path) -> None:
    opened: Counter[str] = Counter()
    is_listening = True

    def count_open(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and is_listening and isinstance(arguments[0], (str, os.PathLike)):
            opened[os.fspath(arguments[0])] += 1

    sys.addaudithook(count_open)
    try:
        assert icm(report=[scene / "r.html", scene / "r.json"], contact_sheet=scene / "s.png").exit_code == 0
    finally:
        is_listening = False
    counts = {name: count for name, count in opened.items() if name.startswith(str(scene / "imgs"))}
    assert len(counts) == 3
    assert max(counts.values()) <= 3, counts


def test_contact_sheet_leaves_unreadable_files_blank(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((300, 600), 200, np.uint8))
    paths = {"alpha": str(tmp_path / "a.png"), "gone": str(tmp_path / "gone.png")}
    results = [ImageResult(source, output, "done") for source in paths.values() for output in paths.values()]
    write_contact_sheet(tmp_path / "s.png", Report({}, results))
    sheet = read(tmp_path / "s.png")
    assert sheet.shape == (3 * 140 + 23, 3 * 240, 3)  # the last row has no image
    cells = sheet[[60, 200, 340, 422]].reshape(4, 3, 240, 3)[:, :, 118:122].mean(axis=(2, 3))
    assert (cells.round() == [[200, 200, 188], [200, 24, 24], [24, 200, 24], [24, 24, 24]]).all(), cells


@given(st.text(st.sampled_from("=+-@＝＠;,\"'\t\r\n a1\u200b")))
def test_no_csv_cell_starts_as_a_formula(text: str) -> None:
    escaped = str(_escape_formula(text))
    for cell in escaped.split(";"):
        assert not cell.lstrip(" \n\r\t\u200b").startswith(tuple("=+-@＝＠"))
        assert not cell.startswith(("\t", "\r", "\n"))
    assert escaped.replace("'", "") == text.replace("'", "")


@pytest.mark.parametrize("is_scored", [True, False])
def test_page_escapes_text_wherever_it_appears(tmp_path: Path, is_scored: bool) -> None:
    text = "\"><img src=x onerror=alert(1)>'{{ 7 * 7 }}</script>\u202e"
    result = ImageResult(
        *(f"{text}{number}" for number in (1, 2)),
        "failed",
        name=text,
        group=text,
        categories={text: text},
        truth=text,
        matting=MattingDetails(quality=0.5, reasons=(text, text)),
        evaluation=ImageEvaluation({"whole": Scores(0.1, 1, 1, 1, 0.1)} if is_scored else {}),
        reason=text,
    )
    others = [replace(result, name=f"{text} {number}", status="done", reason="") for number in range(4)]
    names = ("title", "note", "predictions", "model_name", "device", "checkpoint", "weights", "icm")
    settings = {name: text for name in names} | {
        "hardware": {text: text},
        "versions": {text: text},
        "protocol": {"title": text, "notes": [text], "size": text, "metric_variant": text},
    }
    problems, references = [Problem("unreadable", text, text)], [{text: [text]}] * 2
    report = Report(settings, [result, *others], problems, references=references, review_list=Path(text))
    write_report(tmp_path / "r.html", report)
    html = (tmp_path / "r.html").read_text()
    assert html.count("onerror") > 30
    assert "&#39;49" not in html
    page = Page(html)
    assert page.open == []
    assert page.references == page.links == []
    assert html.count("<script>") == html.count("</script>") == 1


def test_report_that_cannot_be_written_does_not_affect_the_others(tmp_path: Path) -> None:
    (tmp_path / "r.csv").mkdir()
    report = Report({"title": "x", "icm": "0", "hardware": {}, "versions": {}}, [ImageResult("a.png", "", "failed")])
    paths = [tmp_path / f"r.{suffix}" for suffix in ("csv", "json", "html")]
    with pytest.raises(OutputError, match=r"r\.csv cannot be written"):
        ReportFiles(tuple(paths), tmp_path / "s.png").write_all(report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.csv", "r.html", "r.json", "s.png"]
