"""Farm use: shards, alphas of other sources, frame sequences, progress output and scripts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import OpenImageIO as oiio
import pytest
from conftest import Icm, alphas, copy_many
from PIL import Image

from icm_cli.matting.engine import Engine

ROOT = Path(__file__).parent.parent
JOB = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "farms.md").read_text(), re.DOTALL)


@pytest.fixture
def plates(scene: Path) -> Path:
    """Write frames 1001 to 1005 of a shot without 1003."""
    folder = scene / "plates"
    folder.mkdir()
    for number in (1001, 1002, 1004, 1005):
        shutil.copy(scene / "imgs" / "wall.jpg", folder / f"sh.{number}.jpg")
    return folder


def test_shards_together_equal_a_single_run(icm: Icm, scene: Path) -> None:
    copy_many(scene / "imgs" / "wall.jpg", scene / "many", 7)
    assert icm(src=scene / "many", out=scene / "whole").exit_code == 0
    counts = []
    for number in range(1, 5):
        result = icm("--shard", f"{number}/4", src=scene / "many", report=scene / f"{number}.json")
        assert result.exit_code == 0, result.output
        counts.append(len(json.loads((scene / f"{number}.json").read_text())["images"]))
    assert sum(counts) == 7
    assert alphas(scene / "out") == alphas(scene / "whole")


def test_shards_with_the_same_report(icm: Icm, scene: Path) -> None:
    copy_many(scene / "imgs" / "wall.jpg", scene / "many", 2)
    report, listed = scene / "r.json", scene / "review.txt"
    files = {"src": scene / "many", "report": report, "review_list": listed}
    for _ in range(2):  # the same shard may replace its report
        assert icm("--shard", "1/2", **files).exit_code == 0
    before = report.read_bytes()
    for given in ("report", "review_list"):
        for flags in ([], ["--dry-run"], ["--shot"]):
            result = icm(*flags, "--shard", "2/2", src=scene / "many", **{given: files[given]})
            assert result.exit_code == 2, result.output
            refusal = (
                f"{files[given]} is given for shard 2/2, and shard 1/2 writes it too; give each shard its own path"
            )
            assert refusal in result.stderr.replace("\n", " ")
    assert report.read_bytes() == before
    assert icm("--shard", "2/3", **files).exit_code == 0  # a new division
    report.rename(scene / "1.json")  # a script that runs one shard after the other
    assert icm("--shard", "2/2", src=scene / "many", report=report).exit_code == 0
    assert icm(src=scene / "many", report=report).exit_code == 0


def test_shards_with_the_same_report_at_once(icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = []

    def run_other_shard(*_: object) -> None:
        others.append(icm("--shard", "2/2", "--dry-run", report=scene / "r.csv"))
        raise KeyboardInterrupt

    with monkeypatch.context() as during_run:
        during_run.setattr(Engine, "run", run_other_shard)
        assert icm("--shard", "1/2", report=scene / "r.csv").exit_code == 130
    assert "shard 1/2 writes it too" in others[0].stderr
    (scene / "r.csv").unlink(missing_ok=True)
    assert icm("--shard", "2/2", report=scene / "r.csv").exit_code == 0


def test_empty_shard_succeeds(icm: Icm, scene: Path) -> None:
    results = [icm("--shard", f"{number}/40", src=scene / "imgs" / "wall.jpg") for number in range(1, 41)]
    assert [result.exit_code for result in results] == [0] * 40
    assert sorted(alphas(scene / "out")) == ["wall.png"]
    reason = "there is nothing to matte, as shard"
    assert sum(reason in result.stderr for result in results) == 39
    shot = [icm("--shot", "--shard", f"{number}/4", "--dry-run", src=scene / "imgs" / "wall.jpg") for number in (1, 4)]
    assert [reason in result.stderr for result in shot] == [True, False]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--frames", "1001"), "a reference or its mask (1), not in --frames (3)"),
        (("--frames", "1003"), "has no frame 1003; no alpha is written"),
        (("--frames", "2000-2010"), "has no frame 2000-2010; no alpha is written"),
        (("--exclude", "*"), "a reference or its mask (1), excluded by --include or --exclude (3)"),
        (("--include", "sh.1001.*"), "a reference or its mask (1), excluded by --include or --exclude (3)"),
    ],
)
def test_empty_chunk_succeeds(icm: Icm, scene: Path, plates: Path, flags: tuple[str, str], why: str) -> None:
    shutil.copy(scene / "ref.png", plates / "sh.1001.jpg")
    result = icm(*flags, ref=plates / "sh.1001.jpg", src=plates / "sh.####.jpg", report=scene / "r.json")
    assert result.exit_code == 0, result.output
    assert why in result.stderr
    assert "there is nothing to matte, as every image in" in result.stderr
    assert json.loads((scene / "r.json").read_text())["images"] == []
    assert not list((scene / "out").iterdir())


def test_empty_chunk_reads_no_ground_truth(icm: Icm, scene: Path, plates: Path) -> None:
    shutil.copytree(plates, scene / "gt")
    assert icm("--exclude", "*", src=plates, gt=scene / "gt").exit_code == 0


def test_alpha_of_another_source_is_not_overwritten(icm: Icm, scene: Path) -> None:
    other = scene / "other"
    other.mkdir()
    shutil.copy(scene / "imgs" / "pad.0101.png", other / "wall.jpg")
    shutil.copy(scene / "imgs" / "wall.jpg", scene / "wall.png")
    assert icm(src=scene / "imgs" / "wall.jpg").exit_code == 0
    before = alphas(scene / "out")
    for src in (other, scene / "wall.png"):
        result = icm(src=src, report=scene / "report.csv")
        assert result.exit_code == 2
        assert f"is the alpha of {scene}/imgs/wall.jpg" in result.stderr
        assert str(src) in result.stderr
        assert alphas(scene / "out") == before
        assert not (scene / "report.csv").exists()
    assert icm("--overwrite", src=other).exit_code == 0
    assert alphas(scene / "out") != before


def test_moved_folder_is_the_same_source(icm: Icm, scene: Path) -> None:
    assert icm().exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in (scene / "out").rglob("*.png")}
    (scene / "imgs").rename(scene / "moved")
    for path in (scene / "moved").rglob("*.png"):
        path.touch()
    result = icm(src=scene / "moved")
    assert result.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in (scene / "out").rglob("*.png")} == before


def test_changed_orientation_is_detected_despite_equal_size_and_time(icm: Icm, scene: Path) -> None:
    source = scene / "imgs" / "wall.jpg"
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        with Image.open(scene / "imgs" / "pad.0101.png") as image:
            image.convert("RGB").save(scene / f"{orientation}.jpg", exif=exif)
    first, second = (scene / f"{orientation}.jpg" for orientation in (1, 6))
    assert first.stat().st_size == second.stat().st_size
    shutil.copy(first, source)
    times = (source.stat().st_atime_ns, source.stat().st_mtime_ns)
    assert icm(src=source).exit_code == 0
    before = alphas(scene / "out")
    shutil.copy(second, source)
    os.utime(source, ns=times)
    assert icm(src=source).exit_code == 0
    assert alphas(scene / "out") != before


def test_output_frames_keep_their_numbers(icm: Icm, scene: Path, plates: Path) -> None:
    result = icm(src=plates / "sh.####.jpg", out=scene / "mattes" / "sh_matte.####.exr")
    assert result.exit_code == 0, result.output
    assert "no frame 1003" in result.stderr
    assert sorted(alphas(scene / "mattes")) == [f"sh_matte.{number}.exr" for number in (1001, 1002, 1004, 1005)]
    file = oiio.ImageInput.open(str(scene / "mattes" / "sh_matte.1004.exr"))
    assert file.spec().channelnames == ("A",)
    assert icm(src=plates / "sh.%04d.jpg", out=scene / "mattes" / "x.####.png", format="exr").exit_code == 2


@pytest.mark.parametrize(("missing", "code"), [("skip", 0), ("report", 1), ("error", 2)])
def test_missing_frames(icm: Icm, scene: Path, plates: Path, missing: str, code: int) -> None:
    result = icm("--frames", "1002-1004", "--missing", missing, src=plates / "sh.@@@@.jpg", report=scene / "r.json")
    assert result.exit_code == code, result.output
    assert "1003" in result.stderr
    assert sorted(alphas(scene / "out") if code < 2 else []) == (["sh.1002.png", "sh.1004.png"] if code < 2 else [])
    if missing == "report":
        images = json.loads((scene / "r.json").read_text())["images"]
        assert {Path(row["source"]).name: row["status"] for row in images} == {
            "sh.1002.jpg": "done",
            "sh.1003.jpg": "failed",
            "sh.1004.jpg": "done",
        }
        assert "sh.1003.jpg: is missing: the sequence has no such frame" in result.stderr


@pytest.mark.parametrize(
    ("numbers", "gaps"),
    [
        (("1", "2000000"), "2-1999999"),
        (
            ("1403636579763555584", "1403636579813555456", "1403636579863555584"),
            "1403636579763555585-1403636579813555455,1403636579813555457-1403636579863555583",
        ),
        (("1", "9" * 40), f"2-{'9' * 39}8"),
    ],
)
@pytest.mark.parametrize("missing", ["skip", "report", "error"])
def test_large_gaps_cost_nothing(
    icm: Icm, scene: Path, plates: Path, numbers: tuple[str, ...], gaps: str, missing: str
) -> None:
    digits = len(numbers[-1])
    for number in numbers:
        shutil.copy(plates / "sh.1001.jpg", plates / f"big_{number.zfill(digits)}.jpg")
    earlier = scene / "out" / f"big_{'3'.zfill(digits)}.png"
    earlier.parent.mkdir(exist_ok=True)
    shutil.copy(scene / "imgs" / "wall.jpg", earlier)
    tracemalloc.start()
    started = time.process_time()
    result = icm("--dry-run", "--missing", missing, src=plates / "big_%d.jpg")
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.exit_code == (0 if missing == "skip" else 2), result.output
    assert f"big_{'#' * digits}.jpg has no frame {gaps}" in result.stderr
    if missing == "report":
        assert "--missing report lists at most 10000 missing frames" in result.stderr
    if missing == "skip":
        kept = f"its earlier alpha {earlier} is kept" if digits != 19 else "no alpha is written"
        assert f"{gaps}; {kept}" in result.stderr
    assert seconds < 10
    assert peak < 100e6


@pytest.mark.parametrize(
    "frames", ["1-9999999", "1001-9000000x2,1002-9000000x3", "1404000000000000000-1404000000009000000,1001"]
)
def test_large_frame_ranges_cost_nothing(icm: Icm, plates: Path, frames: str) -> None:
    result = icm("--dry-run", "--frames", frames, src=plates / "sh.####.jpg")
    assert result.exit_code == 0, result.output
    assert "sh.1001.jpg" in result.stdout
    assert "has no frame" in result.stderr


@pytest.mark.parametrize("missing", ["report", "error"])
def test_excluded_frame_is_not_missing(icm: Icm, scene: Path, plates: Path, missing: str) -> None:
    shutil.copy(plates / "sh.1002.jpg", plates / "sh.1003.jpg")
    result = icm("--missing", missing, "--exclude", "*1004*", src=plates / "sh.####.jpg")
    assert result.exit_code == 0, result.output
    assert "no frame" not in result.stderr
    assert "sh.1004.png" not in alphas(scene / "out")
    (plates / "sh.1002.jpg").unlink()
    assert icm("--missing", missing, "--exclude", "*1004*", src=plates / "sh.####.jpg").exit_code > 0


def test_brackets_in_frame_names_are_literal_if_no_glob_matches(icm: Icm, scene: Path, plates: Path) -> None:
    for path in list(plates.iterdir()):
        path.rename(path.with_name(path.name.replace("sh", "sh [a]")))
    assert icm(src=plates / "sh [a].####.jpg").exit_code == 0
    assert len(alphas(scene / "out")) == 4


@pytest.mark.parametrize("name", ["sh.998.jpg", "sh.-0001.jpg", "sh.00998.jpg"])
def test_frames_with_other_numbers_are_reported(icm: Icm, plates: Path, name: str) -> None:
    shutil.copy(plates / "sh.1002.jpg", plates / name)
    result = icm("--dry-run", src=plates / "sh.####.jpg")
    assert result.exit_code == 0, result.output
    assert f"{plates / name} skipped: its number does not match sh.####.jpg" in result.stderr
    assert name not in result.stdout
    folder = icm("--dry-run", src=plates)
    assert ("negative frame numbers are not supported" in folder.stderr) == ("-" in name)


def test_several_shots_into_one_pattern_are_refused(icm: Icm, scene: Path, plates: Path) -> None:
    shutil.copy(plates / "sh.1002.jpg", plates / "other.1002.jpg")
    result = icm(src=plates, out=scene / "mattes" / "m.####.png")
    assert result.exit_code == 2
    assert "give --out a folder instead of a frame pattern" in result.stderr


def test_failed_frame_reports_that_its_earlier_alpha_is_kept(icm: Icm, scene: Path, plates: Path) -> None:
    assert icm(src=plates / "sh.####.jpg").exit_code == 0
    before = alphas(scene / "out")
    (plates / "sh.1004.jpg").write_bytes(b"")
    (plates / "sh.1002.jpg").unlink()
    result = icm(src=plates / "sh.####.jpg", report=scene / "r.json")
    assert result.exit_code == 1
    stays = f"; the earlier alpha {scene}/out/sh.1004.png is kept, although its source or settings have changed"
    assert stays in result.stderr
    rows = {Path(row["source"]).name: row for row in json.loads((scene / "r.json").read_text())["images"]}
    assert rows["sh.1004.jpg"]["reason"].endswith(stays)
    assert f"has no frame 1002-1003; its earlier alpha {scene}/out/sh.1002.png is kept" in result.stderr
    assert alphas(scene / "out") == before
    missing = icm("--missing", "report", src=plates / "sh.####.jpg").stderr
    assert "no such frame; add it and run again; the earlier alpha" in missing


def test_ground_truth_may_be_a_frame_pattern(icm: Icm, scene: Path, plates: Path) -> None:
    (scene / "gt").mkdir()
    assert icm(src=plates).exit_code == 0
    for number in (1001, 1004):
        shutil.copy(scene / "out" / f"sh.{number}.png", scene / "gt" / f"true_{number}.png")
    result = icm(src=plates, gt=scene / "gt" / "true_####.png", report=scene / "r.json")
    assert result.exit_code == 0, result.output
    images = json.loads((scene / "r.json").read_text())["images"]
    scored = {Path(row["source"]).name: row["scores"]["whole"]["mse"] for row in images if row["scores"]}
    assert scored == {"sh.1001.jpg": 0.0, "sh.1004.jpg": 0.0}
    for number in (1002, 1005):
        assert (
            f"icm: missing-alpha: {plates}/sh.{number}.jpg has no ground truth in {scene}/gt/true_####" in result.stderr
        )
    assert json.loads((scene / "r.json").read_text())["summary"]["problems"] == {"missing-alpha": 2}
    assert "2 (allowed)" in result.stdout


def test_a_chunk_may_have_no_ground_truth(icm: Icm, scene: Path, plates: Path) -> None:
    (scene / "gt").mkdir()
    shutil.copy(scene / "mask.png", scene / "gt" / "sh.1001.png")
    chunks = [("--frames", "1002"), ("--include", "*.1004.*"), ("--shard", "1/2"), ("--shard", "2/2")]
    chunks += [("--shot", "--learn-steps", "0", *shard) for shard in chunks[2:]]
    for flags in chunks:
        for pattern in (scene / "gt", scene / "gt" / "sh.####.png"):
            result = icm(*flags, "--dry-run", src=plates, gt=pattern)
            assert result.exit_code == 0, (flags, result.output)
    assert icm(*chunks[0], src=plates, gt=scene / "gt", report=scene / "r.json").exit_code == 0
    assert json.loads((scene / "r.json").read_text())["summary"]["problems"] == {"missing-alpha": 1}


def test_openjd_progress(icm: Icm, scene: Path) -> None:
    (scene / "imgs" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    lines = icm("--progress", "openjd").stdout.splitlines()
    said = [line for line in lines if line.startswith("openjd_progress: ")]
    assert [float(line.split()[1]) for line in said] == [25.0, 50.0, 75.0, 100.0]
    assert "openjd_fail: 1 of 4 images failed" in lines
    refused = icm("--progress", "openjd", src=scene / "nowhere")
    assert refused.exit_code == 2
    assert any(line.startswith("openjd_fail: source") for line in refused.stdout.splitlines())


@pytest.mark.parametrize("way", [("--progress", "openjd"), ("--progress=json",)])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--bogus",), "no such option: --bogus"),
        (("--workers", "0"), "--workers is 0; expected a whole number from 1 to 256"),
        (("a.jpg", "b.jpg"), 'quote globs and patterns, such as --src "imgs/*.jpg"'),
        (("--shard", "1/0"), "--shard is '1/0'; expected the number of a shard"),
        (("--frames", "1-999999999"), "has too many frames; expected at most 10000000"),
    ],
)
def test_usage_errors_are_printed_for_farms(
    icm: Icm, way: tuple[str, ...], flags: tuple[str, ...], message: str
) -> None:
    result = icm(*way, *flags)
    assert result.exit_code == 2
    (line,) = result.stdout.splitlines()
    if "json" in way[0]:
        event = json.loads(line)
        assert event["event"] == "error"
        assert event["exit_code"] == 2
        assert message in event["message"]
    else:
        assert line.startswith("openjd_fail: ")
        assert message in line
    assert not icm(*flags).stdout


def test_json_progress(icm: Icm, scene: Path) -> None:
    events = [json.loads(line) for line in icm("--progress", "json").stdout.splitlines()]
    assert [event["event"] for event in events] == ["started", "image", "image", "image", "finished"]
    assert events[-1]["exit_code"] == 0
    assert events[-1]["done"] == 3
    refused = icm("--progress", "json", src=scene / "nowhere")
    assert json.loads(refused.stdout)["event"] == "error"
    assert json.loads(refused.stdout)["exit_code"] == refused.exit_code == 2
    assert icm("--progress", "jsn").exit_code == 2


def test_interrupted_run_reports_the_exit_code_of_the_error(icm: Icm, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "_write", interrupted)
    result = icm("--progress", "json", "--workers", "1")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    finished, error = events[-2:]
    assert (finished["event"], finished["exit_code"], finished["complete"]) == ("finished", None, False)
    assert (error["event"], error["exit_code"]) == ("error", result.exit_code)
    assert result.exit_code == 130


def test_progress_none_prints_no_images(icm: Icm) -> None:
    assert "wall" in icm("--progress", "plain").stderr
    assert "wall" not in icm("--overwrite", "--progress", "none").stderr


@pytest.mark.slow
def test_openjd_template_of_the_docs_runs(scene: Path, small_model: Path) -> None:
    """The checker and runner of Open Job Description accept it and run every shard."""
    assert JOB is not None
    template = scene / "icm.yaml"
    template.write_text(JOB[1])
    openjd = Path(sys.executable).with_name("openjd")
    checked = subprocess.run([openjd, "check", template], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    wrapper = scene / "icm"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -m icm_cli.cli "$@" --model {small_model} --device cpu\n')
    wrapper.chmod(0o755)
    given = {"Icm": wrapper, "Ref": scene / "ref.png", "Mask": scene / "mask.png", "Plates": scene / "imgs"}
    given |= {"Mattes": scene / "out", "Shards": "2"}
    parameters = [part for name, value in given.items() for part in ("-p", f"{name}={value}")]
    done = subprocess.run(
        [openjd, "run", template, "--step", "Matte", *parameters], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(alphas(scene / "out")) == ["pad.0101.png", "sub/deep.png", "wall.png"]


def test_slurm_script_of_the_docs_is_valid() -> None:
    script = re.search(r"```sh\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs" / "farms.md").read_text(), re.DOTALL)
    assert script is not None
    assert subprocess.run(["bash", "-n"], input=script[1], text=True, check=False).returncode == 0
    assert "--shard" in script[1]
