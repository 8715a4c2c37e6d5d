"""``icm matte`` with a small model: its outputs, and which alphas are kept."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import COMPOSITES, Icm, alphas, arguments, copy_many, read, shrink
from PIL import Image

import icm_cli
from icm_cli.reports import contact_sheet

NAMES = ["pad.0101.png", "sub/deep.png", "wall.png"]


def test_every_image_has_an_alpha_of_its_size(icm: Icm, scene: Path) -> None:
    result = icm()
    assert result.exit_code == 0, result.output
    assert sorted(alphas(scene / "out")) == NAMES
    for name in ("wall", "sub/deep", "pad.0101"):
        source = read(next((scene / "imgs").glob(f"{name}.*")))
        with Image.open(scene / "out" / f"{name}.png") as alpha:
            assert alpha.mode == "L"
            assert alpha.size == source.shape[1::-1]
    assert "done" in result.stdout


def test_alpha_contains_the_object(icm: Icm, scene: Path) -> None:
    """The alpha of small images covers the object and not the background."""
    assert icm().exit_code == 0
    for name, truth_name in (("wall", "brickwall"), ("sub/deep", "deepfield")):
        alpha = read(scene / "out" / f"{name}.png") > 127
        truth = cv2.resize(read(COMPOSITES / "alphas" / f"{truth_name}.png"), alpha.shape[::-1]) > 127
        assert (alpha & truth).sum() / (alpha | truth).sum() > 0.6, name


def test_second_run_keeps_all_alphas(icm: Icm, scene: Path) -> None:
    icm()
    before = {path: path.stat().st_mtime_ns for path in (scene / "out").rglob("*.png")}
    result = icm()
    assert result.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in (scene / "out").rglob("*.png")} == before
    icm("--overwrite")
    assert all(path.stat().st_mtime_ns > time for path, time in before.items())


def test_completed_run_loads_no_model(icm: Icm, monkeypatch: pytest.MonkeyPatch) -> None:
    icm()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("icm_cli.matting.model_choice.load_model", refuse)
    assert icm().exit_code == 0
    with pytest.raises(AssertionError, match="was loaded"):
        icm("--overwrite")


@pytest.mark.parametrize("change", ["source", "mask", "seed", "torn"])
def test_changed_settings_recompute_alphas(icm: Icm, scene: Path, change: str) -> None:
    icm()
    first = alphas(scene / "out")
    wall = scene / "out" / "wall.png"
    made = wall.stat().st_mtime_ns
    options: dict[str, object] = {}
    if change == "source":
        cv2.imwrite(str(scene / "imgs" / "wall.jpg"), 255 - read(scene / "imgs" / "wall.jpg"))
    elif change == "mask":
        mask = read(scene / "mask.png")
        mask[:, :60] = 0
        cv2.imwrite(str(scene / "mask.png"), mask)
    elif change == "seed":
        options = {"seed": 1}
    else:
        wall.write_bytes(first["wall.png"][:-20])
    assert icm(**options).exit_code == 0
    assert wall.stat().st_mtime_ns > made
    if change in ("torn", "foreign"):
        assert alphas(scene / "out") == first


def test_alphas_of_copied_sources_are_kept(icm: Icm, scene: Path) -> None:
    """A copy of the sources, or a checkout, changes only their times."""
    icm()
    made = {path: path.stat().st_mtime_ns for path in (scene / "out").rglob("*.png")}
    for path in (scene / "imgs").rglob("*.*"):
        os.utime(path, ns=(1, 1))
    assert icm(report=scene / "r.json").exit_code == 0
    assert {each["status"] for each in json.loads((scene / "r.json").read_text())["images"]} == {"kept"}
    assert {path: path.stat().st_mtime_ns for path in (scene / "out").rglob("*.png")} == made


def test_alpha_does_not_depend_on_other_images_of_the_batch(icm: Icm, scene: Path) -> None:
    icm()
    together = alphas(scene / "out")
    icm(src=scene / "imgs" / "wall.jpg", out=scene / "alone")
    assert (scene / "alone" / "wall.png").read_bytes() == together["wall.png"]
    copy_many(scene / "imgs" / "wall.jpg", scene / "many", 5)
    icm(src=scene / "many", out=scene / "batched", batch_size=3)
    for alpha in (scene / "batched").glob("*.png"):
        assert np.abs(read(alpha).astype(int) - read(scene / "out" / "wall.png")).max() <= 1


def test_csv_report_escapes_formulas(icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that a spreadsheet would run starts with an apostrophe. JSON keeps the names."""
    (scene / "names").mkdir()
    names = ["=1+1.jpg", "+1.jpg", "-1.jpg", "@SUM(A1).jpg", "\tx.jpg", "\rx.jpg", " =2.jpg", "＝1.jpg", "a=1.jpg"]
    for name in names:
        shutil.copy(scene / "imgs" / "wall.jpg", scene / "names" / name)
    monkeypatch.chdir(scene / "names")
    result = icm(src=".", report=[scene / "r.csv", scene / "r.json"])
    assert result.exit_code == 0, result.stderr
    with (scene / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["source"] for row in rows} == {"a=1.jpg", *(f"'{name}" for name in names[:-1])}
    assert all(0 <= float(row["foreground"]) <= 1 for row in rows)
    images = json.loads((scene / "r.json").read_text())["images"]
    assert {image["source"] for image in images} == set(names)


def test_csv_report_has_a_row_for_every_image(icm: Icm, scene: Path) -> None:
    (scene / "imgs" / "bad.jpg").write_bytes(b"")
    assert icm(report=scene / "r.csv").exit_code == 1
    assert icm(report=scene / "r.csv").exit_code == 1
    lines = {Path(line["source"]).name: line for line in csv.DictReader((scene / "r.csv").read_text().splitlines())}
    assert {name: line["status"] for name, line in lines.items()} == {
        "bad.jpg": "failed",
        "wall.jpg": "kept",
        "deep.png": "kept",
        "pad.0101.png": "kept",
    }
    assert "empty" in lines["bad.jpg"]["reason"]
    share = read(scene / "out" / "wall.png").mean() / 255
    assert float(lines["wall.jpg"]["foreground"]) == pytest.approx(share, abs=1e-4)
    assert 0 <= float(lines["wall.jpg"]["quality"]) <= 1
    assert lines["wall.jpg"]["not_found"] == "False"


def test_json_report_with_ground_truth(icm: Icm, scene: Path) -> None:
    (scene / "gt").mkdir()
    truth = cv2.resize(read(COMPOSITES / "alphas" / "brickwall.png"), read(scene / "imgs" / "wall.jpg").shape[1::-1])
    cv2.imwrite(str(scene / "gt" / "wall.png"), truth)
    for _ in range(2):  # the alphas are scored whether they are new or kept
        assert icm(report=scene / "r.json", gt=scene / "gt").exit_code == 0
        report = json.loads((scene / "r.json").read_text())
        lines = {Path(line["source"]).name: line for line in report["images"]}
        difference = (read(scene / "out" / "wall.png").astype(float) - truth) / 255
        scores = lines["wall.jpg"]["scores"]["whole"]
        assert scores["mse"] == pytest.approx((difference**2).mean())
        assert scores["sad"] == pytest.approx(np.abs(difference).sum() / 1000)
        assert lines["deep.png"]["scores"] == {}
        assert report["summary"]["means"]["whole"]["metrics"]["mse"]["mean"] == scores["mse"]
    assert report["settings"]["device"] == "cpu, float32"
    assert report["summary"]["kept"] == 3


def test_ground_truth_of_another_size_fails_only_its_image(icm: Icm, scene: Path) -> None:
    (scene / "gt").mkdir()
    cv2.imwrite(str(scene / "gt" / "wall.png"), np.zeros((7, 9), np.uint8))
    result = icm(gt=scene / "gt")
    assert result.exit_code == 1
    assert "9x7" in result.stderr
    assert sorted(alphas(scene / "out")) == NAMES


def test_contact_sheet(icm: Icm, scene: Path) -> None:
    """The sheet has the reference with its mask, then source, alpha and object of each image, worst quality first."""
    assert icm(contact_sheet=scene / "sheet.png", report=scene / "r.json").exit_code == 0
    sheet, bottom = read(scene / "sheet.png"), 0
    images = json.loads((scene / "r.json").read_text())["images"]
    files = [(scene / "ref.png", scene / "mask.png")]
    for image in sorted(images, key=lambda image: (image["quality"], image["source"])):
        files.append((Path(image["source"]), Path(image["output"])))
    for path, alpha_path in files:
        alpha, source = read(alpha_path), read(path)[..., :3]
        weight = alpha[..., None] / 255
        on_magenta = source * weight + np.array((220, 0, 220)) * (1 - weight)
        scale = min(1.0, 236 / max(alpha.shape))
        height, width = (round(side * scale) for side in alpha.shape)
        top, bottom = bottom + 2, bottom + height + 22  # margins and caption
        for column, pixels in enumerate((source, np.repeat(alpha[..., None], 3, -1), on_magenta)):
            expected = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
            left = column * 240 + (240 - width) // 2
            shown = sheet[top : top + height, left : left + width]
            assert np.abs(shown.astype(int) - expected).mean() < 4, (path.name, column)
    assert sheet.shape == (bottom, 3 * 240, 3)


def test_dry_run_lists_and_writes_nothing(icm: Icm, scene: Path) -> None:
    result = icm("--dry-run")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert f"{scene}/imgs/sub/deep.png -> {scene}/out/sub/deep.png" in lines
    assert len(lines) == 3
    assert not (scene / "out").exists()


def test_quiet_prints_nothing_on_success(icm: Icm) -> None:
    result = icm("--quiet")
    assert result.output == ""


def test_output_without_terminal_is_plain_lines(icm: Icm, scene: Path) -> None:
    result = icm("--verbose")
    assert "\x1b" not in result.output
    assert "\r" not in result.output
    assert f"[3/3] done {scene}/imgs/wall.jpg" in result.stderr
    assert "efficientnet-lite + training-free on cpu, float32" in result.stderr


def test_terminal_shows_a_progress_bar(scene: Path, small_model: Path) -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    options = {"ref": scene / "ref.png", "mask": scene / "mask.png", "src": scene / "imgs", "out": scene / "out"}
    line = [sys.executable, "-m", "icm_cli.cli", "matte", *arguments({**options, "model": small_model})]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal is closed when the process exits
        while part := os.read(master, 4096):
            shown += part
    os.close(master)
    stdout, _ = process.communicate(timeout=60)
    assert b"3/3" in shown
    assert b"image/s" in shown or b"s/image" in shown
    assert b"done" in stdout


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (500, 2)])
def test_extreme_shapes_are_matted(icm: Icm, scene: Path, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    cv2.imwrite(str(scene / "odd.png"), image)
    assert icm(src=scene / "odd.png").exit_code == 0
    assert read(scene / "out" / "odd.png").shape == size


def test_sources_of_all_formats_are_matted(icm: Icm, scene: Path) -> None:
    source = Image.open(scene / "imgs" / "wall.jpg")
    kinds = scene / "kinds"
    kinds.mkdir()
    source.convert("L").save(kinds / "grey.png")
    source.convert("CMYK").save(kinds / "cmyk.jpg")
    source.convert("RGBA").save(kinds / "rgba.png")
    opaque = icm(src=kinds / "rgba.png", out=scene / "opaque")
    assert "alpha of its own" not in opaque.stderr
    source.putalpha(Image.linear_gradient("L").resize(source.size))
    source.save(kinds / "transparent.png")
    source = source.convert("RGB")
    cv2.imwrite(str(kinds / "deep.png"), read(scene / "imgs" / "wall.jpg").astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    source.save(kinds / "größe 回転.jpg", exif=exif)
    result = icm(src=kinds)
    assert result.exit_code == 0, result.output
    assert read(scene / "out" / "größe 回転.png").shape == source.size
    assert all(
        read(scene / "out" / f"{name}.png").shape == source.size[::-1] for name in ("grey", "cmyk", "rgba", "deep")
    )
    assert "alpha of its own" in result.stderr


def test_several_references_and_rgba_references(icm: Icm, scene: Path) -> None:
    """Both references are used: the alphas differ from those with either one."""
    cut = np.dstack([read(scene / "ref.png")[..., :3], read(scene / "mask.png")])
    cv2.imwrite(str(scene / "cut.png"), cut)
    image, alpha = (read(next((COMPOSITES / kind).glob("brickwall.*"))) for kind in ("imgs", "alphas"))
    cv2.imwrite(str(scene / "whole.png"), np.dstack([image[..., :3], alpha]))
    shrink(scene / "whole.png", scene / "other.png", 160)
    made = []
    for number, references in enumerate((["cut.png"], ["other.png"], ["cut.png", "other.png"])):
        out = scene / f"out{number}"
        assert icm(ref=[scene / name for name in references], mask=None, out=out).exit_code == 0
        assert sorted(alphas(out)) == NAMES
        made.append(read(out / "sub" / "deep.png").astype(int))
    assert min(np.abs(made[2] - alone).max() for alone in made[:2]) > 8


def test_api_equals_the_command(icm: Icm, scene: Path, small_model: Path) -> None:
    icm()
    report = icm_cli.matte(
        scene / "ref.png",
        scene / "mask.png",
        src=scene / "imgs",
        out=scene / "api",
        model=str(small_model),
        device="cpu",
    )
    assert report.exit_code == 0
    assert alphas(scene / "api") == alphas(scene / "out")


def test_loaded_model_mattes_arrays(icm: Icm, scene: Path, small_model: Path) -> None:
    icm()
    predictor = icm_cli.load(str(small_model), device="cpu")
    thing = predictor.reference([(rgb(scene / "ref.png"), read(scene / "mask.png"))])
    alpha = predictor.matte(rgb(scene / "imgs" / "sub" / "deep.png"), thing)
    assert (alpha == read(scene / "out" / "sub" / "deep.png")).all()


def rgb(path: Path) -> np.ndarray:
    return np.ascontiguousarray(read(path)[..., 2::-1])


def test_absent_object_is_reported(icm: Icm, scene: Path) -> None:
    """The image shows grass without the object."""
    (scene / "grass").mkdir()
    shrink(COMPOSITES / "imgs" / "lawn.jpg", scene / "grass" / "a.png", 300)
    lawn = read(scene / "grass" / "a.png")
    cv2.imwrite(str(scene / "grass" / "a.png"), lawn[:100, :100])
    icm(src=scene / "grass", report=scene / "r.json")
    line = json.loads((scene / "r.json").read_text())["images"][0]
    assert line["not_found"] is True
    assert not read(scene / "out" / "a.png").any()


def test_references_in_the_source_folder_are_skipped(icm: Icm, scene: Path) -> None:
    for name in ("ref.png", "mask.png"):
        shutil.copy(scene / name, scene / "imgs" / name)
    result = icm(ref=scene / "imgs" / "ref.png", mask=scene / "imgs" / "mask.png")
    assert "skipped: a reference or its mask" in result.stderr
    assert sorted(alphas(scene / "out")) == NAMES


def test_captions_show_relative_paths_and_escape_missing_glyphs(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    drawn = contact_sheet.make_captioned_row
    monkeypatch.setattr(
        contact_sheet, "make_captioned_row", lambda cells, text: (shown.append(text), drawn(cells, text))[1]
    )
    (scene / "imgs" / "wall.jpg").rename(scene / "imgs" / "sub" / "größe.jpg")
    assert icm(contact_sheet=scene / "sheet.png").exit_code == 0
    assert any(text.startswith("sub/größe.jpg   quality 0.") for text in shown)
    assert contact_sheet._escape_missing_glyphs("größe") == "größe"
    assert "\uffff" not in contact_sheet._escape_missing_glyphs("\uffff\n")


def test_reports_are_utf8_for_any_file_name(icm: Icm, scene: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.jpg")
    (scene / "imgs" / "wall.jpg").rename(scene / "imgs" / odd)
    for name in ("r.json", "r.csv", "r.html"):
        assert icm("--report", str(scene / name)).exit_code == 0
        assert "caf" in (scene / name).read_text(encoding="utf-8")
    sources = [image["source"] for image in json.loads((scene / "r.json").read_text(encoding="utf-8"))["images"]]
    assert str(scene / "imgs" / odd) in sources  # the name is unchanged
