"""Alphas that a person should look at: quality in reports and stamps, review lists, and outliers of a run."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import Icm, alphas, copy_many, read
from hypothesis import given
from hypothesis import strategies as st
from test_eval_reports import Page

import icm_cli
from icm_cli.errors import UsageError
from icm_cli.matting.sources import SkippedFiles, find_sources
from icm_cli.quality.batch import JUMP, add_batch_reasons
from icm_cli.reports.report import Report
from icm_cli.reports.result import ImageResult, MattingDetails
from icm_cli.reports.write import ReportFiles, write_report, write_review_list


def images_of(report: Path) -> dict[str, dict[str, Any]]:
    """Return the images of a JSON report by the names of their sources."""
    return {Path(image["source"]).name: image for image in json.loads(report.read_text())["images"]}


def run_and_split(icm: Icm, scene: Path, **options: Any) -> tuple[float, list[str]]:
    """Matte the scene; return a quality that divides it, and the names of the images below it, lowest first."""
    assert icm(report=scene / "r.json", **options).exit_code == 0
    images = images_of(scene / "r.json")
    names = sorted(images, key=lambda name: images[name]["quality"])
    qualities = [images[name]["quality"] for name in names]
    assert qualities == sorted(set(qualities)), "the scene needs images of different quality"
    return (qualities[-2] + qualities[-1]) / 2, names[:-1]


def test_quality_is_in_every_report_and_kept_with_the_alpha(icm: Icm, scene: Path) -> None:
    outputs = [scene / f"r.{suffix}" for suffix in ("json", "csv", "html")]
    events = icm("--progress", "json", report=outputs)
    images = images_of(scene / "r.json")
    for image in images.values():
        assert 0 <= image["quality"] <= 1
        assert image["signals"]
        assert "confidence" not in image
    rows = {Path(row["source"]).name: row for row in csv.DictReader(io.StringIO((scene / "r.csv").read_text()))}
    assert {name: float(row["quality"]) for name, row in rows.items()} == {
        name: image["quality"] for name, image in images.items()
    }
    assert {name: row["reasons"] for name, row in rows.items()} == {
        name: ", ".join(image["reasons"]) for name, image in images.items()
    }
    ended = [event for event in map(json.loads, events.stdout.splitlines()) if event["event"] == "image"]
    assert {event["quality"] for event in ended} == {image["quality"] for image in images.values()}
    assert not any("signals" in event for event in ended)
    assert icm(report=scene / "again.json").exit_code == 0
    for name, image in images_of(scene / "again.json").items():
        assert image["status"] == "kept"
        assert {key: image[key] for key in ("quality", "reasons", "signals")} == {
            key: images[name][key] for key in ("quality", "reasons", "signals")
        }


@pytest.mark.parametrize("value", ["NaN", "1.5", "-1", "[]", '"high"'])
def test_damaged_quality_of_a_stamp_is_ignored(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    from icm_cli.matting import provenance

    make = provenance.make_provenance

    def damage(*given: Any) -> dict[str, str]:
        return {**make(*given), provenance.RESULT_KEY: f'{{"quality": {value}, "foreground": 0.5}}'}

    monkeypatch.setattr("icm_cli.matting.engine.make_provenance", damage)
    assert icm().exit_code == 0
    report = [scene / "r.json", scene / "r.html"]
    assert icm(report=report, review_list=scene / "review.txt", contact_sheet=scene / "s.png").exit_code == 0
    assert {(image["status"], image["quality"]) for image in images_of(scene / "r.json").values()} == {("kept", None)}
    assert (scene / "review.txt").read_text() == ""


def test_list_gives_the_same_outputs_from_any_folder(icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.move(scene / "imgs" / "wall.jpg", scene / "imgs" / "wall #1 é.jpg")
    monkeypatch.chdir(scene)
    below, names = run_and_split(icm, scene, src="imgs")
    result = icm(src="imgs", review_list="review.txt", review_below=below)
    assert f"quality below {below:g}" in result.stdout
    assert "2 of 3 alphas; listed in review.txt" in result.stdout
    lines = (scene / "review.txt").read_text().splitlines()
    assert [Path(line).name for line in lines] == names
    assert all(line.startswith(f"{scene}/imgs/./") for line in lines)
    before = alphas(scene / "out")
    monkeypatch.chdir(scene.parent)
    report = scene / "second.json"
    assert icm(src=scene / "review.txt", report=report).exit_code == 0
    assert {image["status"] for image in images_of(report).values()} == {"kept"}
    assert json.loads((scene / "out" / ".icm" / "run.json").read_text())["options"]["src"] == str(scene / "imgs")
    assert icm(src=scene / "review.txt", report=report, seed=7).exit_code == 0
    assert {Path(image["source"]).name for image in images_of(report).values() if image["status"] == "done"} == set(
        names
    )
    after = alphas(scene / "out")
    assert after.keys() == before.keys()
    assert sum(after[name] != before[name] for name in after) == 2


def recorded_options(scene: Path) -> dict[str, Any]:
    options = json.loads((scene / "out" / ".icm" / "run.json").read_text())["options"]
    assert isinstance(options, dict)
    return options


def test_a_repair_of_some_images_does_not_change_the_record(icm: Icm, scene: Path) -> None:
    imgs = scene / "imgs"
    assert icm("--exclude", "pad*", src=imgs).exit_code == 0
    first = recorded_options(scene)
    for flags, src in ((["--include", "wall.jpg"], imgs), (["--exclude", "[dp]*"], imgs), ([], imgs / "wall.jpg")):
        assert icm(*flags, src=src, seed=7).exit_code == 0
        assert recorded_options(scene) == first
    assert icm("--exclude", "pad*", src=imgs, seed=7).exit_code == 0
    assert recorded_options(scene) == {**first, "seed": 7}


@pytest.mark.parametrize(("out", "copied_out"), [("out", "copy"), ("out/m.####.png", "copy/m.####.png")])
def test_a_repair_in_a_copied_folder_does_not_change_the_record(
    icm: Icm, scene: Path, out: str, copied_out: str
) -> None:
    (scene / "imgs" / "wall.jpg").rename(scene / "imgs" / "wall.0102.jpg")
    src = scene / "imgs" / "*.*g"
    assert icm(src=src, out=scene / out).exit_code == 0
    first = recorded_options(scene)
    shutil.copytree(scene / "out", scene / "copy")
    shutil.rmtree(scene / "out")
    assert icm("--include", "wall*", src=src, out=scene / copied_out, seed=7).exit_code == 0
    shutil.move(scene / "copy", scene / "out")
    assert recorded_options(scene) == first


def test_a_run_with_other_images_replaces_the_record(icm: Icm, scene: Path) -> None:
    imgs, sub = scene / "imgs", scene / "imgs" / "sub"
    assert icm(src=sub, root=imgs).exit_code == 0
    assert icm("--include", "wall*", src=imgs, root=imgs).exit_code == 0  # not in the recorded folder
    assert recorded_options(scene)["include"] == ["wall*"]
    assert icm("--include", "pad*", src=imgs, root=imgs).exit_code == 0  # not included before
    assert recorded_options(scene)["include"] == ["pad*"]
    assert icm(src=imgs, root=imgs).exit_code == 0
    assert "include" not in recorded_options(scene)
    assert icm("--keep-suffix", "--include", "pad*", src=imgs, root=imgs).exit_code == 0  # other output paths
    assert recorded_options(scene)["include"] == ["pad*"]


def test_pages_of_a_file_are_listed_once(tmp_path: Path) -> None:
    details = MattingDetails(quality=0.1)
    results = [
        ImageResult("/a/b/x.tif", "o", "done", name=f"b/x.{page:04d}.tif", page=page, matting=details)
        for page in (1, 2)
    ]
    others = [ImageResult("/x.png", "o", "done", name="x.png"), ImageResult("/y\n.png", "o", "done", name="y\n.png")]
    notices = write_review_list(tmp_path / "r.txt", [*results, *others])
    assert (tmp_path / "r.txt").read_text().splitlines() == ["/a/./b/x.tif", "/./x.png"]
    assert notices == [
        f"1 image is not in {tmp_path}/r.txt, because a name has a line break or ends in a space, such as /./y\n.png"
    ]


NAMES = st.text("a #./é\r\u3000", min_size=1, max_size=6).filter(lambda name: name.strip("/") not in ("", ".", ".."))


@given(st.lists(NAMES, min_size=1), st.sampled_from(["/", "/no folder", "/no/./folder"]))
def test_src_reads_what_a_review_list_contains(names: list[str], root: str) -> None:
    files = [Path(os.path.normpath(f"{root}/x{name}")) for name in names]
    files = [file for file in files if Path(os.path.normpath(root)) in file.parents]
    results = [
        ImageResult(str(file), "o", "done", name=str(file.relative_to(os.path.normpath(root)))) for file in files
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "review.txt"
        has_notice = bool(write_review_list(path, results))
        ReportFiles(review_list=path).check_no_overwrite([])  # a list that icm wrote may be replaced
        listed = {file for file in files if str(file) == str(file).strip()}
        assert has_notice == (listed != set(files))
        if listed:
            found = find_sources(path, None, SkippedFiles(lambda _: None))
            assert (found.root, set(found.files)) == (Path(os.path.normpath(root)), listed)


def sources_of(text: str, tmp_path: Path, root: Path | None = None) -> tuple[Path, list[Path]]:
    (tmp_path / "list.txt").write_text(text)
    found = find_sources(tmp_path / "list.txt", root, SkippedFiles(lambda _: None))
    return found.root, list(found.files)


def test_root_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/b/1.png", "a/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.zeros((4, 4), np.uint8))
    marked, other = f"{tmp_path}/a/./b/1.png", f"{tmp_path}/a/2.png"
    assert sources_of(f"{marked}\n{other}", tmp_path) == (
        tmp_path / "a",
        [tmp_path / "a/2.png", tmp_path / "a/b/1.png"],
    )
    assert sources_of(marked, tmp_path, root=tmp_path)[0] == tmp_path
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{marked}\n"))
    assert find_sources("-", None, SkippedFiles(lambda _: None)).root == tmp_path / "a"
    with pytest.raises(UsageError, match=r"lines of 2 roots, such as .*/a and .*/a/b, and output paths"):
        sources_of(f"{marked}\n{tmp_path}/a/b/./1.png", tmp_path)
    with pytest.raises(UsageError, match=r"1 of the images are outside .*/a/b, .*give --root"):
        sources_of(f"{tmp_path}/a/b/./1.png\n{other}", tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"review_list": "review.csv"}, "review list review.csv has an unknown suffix"),
        ({"review_list": "notes.txt"}, "notes.txt exists and is no review list that icm wrote"),
        ({"review_list": "src.txt", "src": "src.txt"}, "src.txt is an input or an alpha of this run"),
        ({"review_list": "imgs/extra.txt"}, "imgs/extra.txt is an input or an alpha of this run"),
        ({"review_list": "folder.txt"}, "folder.txt is a folder"),
        ({"review_below": 1.5}, "--review-below is 1.5; expected a number from 0 to 1"),
    ],
)
def test_refused_review_lists(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch, option: Mapping[str, Any], message: str
) -> None:
    monkeypatch.chdir(scene)
    (scene / "notes.txt").write_text("my notes\n")
    (scene / "src.txt").write_text("./imgs/./wall.jpg\n")
    shutil.copy(scene / "imgs" / "wall.jpg", scene / "imgs" / "extra.txt")
    (scene / "folder.txt").mkdir()
    result = icm(**option)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (scene / "out").exists()
    assert (scene / "notes.txt").read_text() == "my notes\n"


def test_own_list_is_replaced_and_an_empty_one_has_no_lines(icm: Icm, scene: Path) -> None:
    path = scene / "review.txt"
    assert icm(review_list=path, review_below=1).exit_code == 0
    assert path.read_text()
    result = icm(review_list=path, review_below=0)
    assert result.exit_code == 0
    assert path.read_bytes() == b""
    assert "quality below" not in result.stdout
    path.write_text("my notes\n")
    assert icm("--overwrite", review_list=path, review_below=1).exit_code == 0
    assert len(path.read_text().splitlines()) == 3


def test_report_of_the_api_gives_the_images_to_review(scene: Path, small_model: Path) -> None:
    options = {"src": str(scene / "imgs"), "out": str(scene / "out"), "model": str(small_model), "device": "cpu"}
    report = icm_cli.matte(scene / "ref.png", scene / "mask.png", review_below=1, **options)  # type: ignore[arg-type]
    qualities = [result.matting.quality for result in report.to_review]
    assert qualities == sorted(qualities)  # type: ignore[type-var]
    assert report.as_dict()["summary"]["to_review"] == len(qualities) > 0


def test_page_begins_with_the_lowest_quality_and_links_every_row(tmp_path: Path) -> None:
    count = 70
    copy_many(Path(__file__).parent / "composites" / "imgs" / "lawn.jpg", tmp_path / "imgs & more", 2)
    source = tmp_path / "imgs & more" / "0000.jpg"
    alpha = tmp_path / "r" / "javascript:a#b.png"
    alpha.parent.mkdir()
    cv2.imwrite(str(alpha), np.full((32, 48), 200, np.uint8))
    results = [
        ImageResult(
            str(source), str(alpha), "done", name=f"{n:03d}.jpg",
            matting=MattingDetails(quality=None if n == 0 else 1 - n / 100, reasons=("split",) if n > 20 else ()),
        )
        for n in range(count)
    ]  # fmt: skip
    settings = {"title": "x", "icm": "0", "hardware": {}, "versions": {}}
    write_report(tmp_path / "r" / "page.html", Report(settings, results))
    text = (tmp_path / "r" / "page.html").read_text()
    page = Page(text)
    assert page.open == []
    assert re.findall(r"<h3>\s*<a[^>]*>([0-9]{3}\.jpg)</a>", text) == [f"{n:03d}.jpg" for n in range(69, 9, -1)]
    assert "49 of 70 alphas have a quality below 0.8; the 60 lowest are shown" in text
    table = text[text.index("All images") :]
    for address in ("../imgs%20%26%20more/0000.jpg", "javascript%3Aa%23b.png"):
        assert table.count(f'href="{address}"') == count
    assert table.index(">069.jpg") < table.index(">001.jpg") < table.index(">000.jpg")


def test_contact_sheet_begins_with_the_lowest_quality(tmp_path: Path) -> None:
    for number, name in enumerate(["good", "bad"]):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((100, 100), 100 * number, np.uint8))
    results = [
        ImageResult(
            "gone.png", str(tmp_path / f"{name}.png"), "done", name=name, matting=MattingDetails(quality=quality)
        )
        for name, quality in (("good", 0.9), ("bad", 0.2))
    ]
    write_report(tmp_path / "s.png", Report({}, results))
    sheet = read(tmp_path / "s.png")
    assert sheet.shape[0] == 2 * 122
    assert (sheet[60, 360] == 100).all()
    assert (sheet[122 + 60, 360] == 0).all()


USUAL = {
    "foreground": 0.2, "left": 0.3, "top": 0.2, "right": 0.6, "bottom": 0.8, "aspect_ratio": 1.5,
    "lightness": 50.0, "green_red": 20.0, "blue_yellow": 10.0,
}  # fmt: skip


def results_of(signals: Sequence[Mapping[str, float]], name: str = "{:04d}.jpg") -> list[ImageResult]:
    details = [MattingDetails(quality=0.9, reasons=("split",), signals=each) for each in signals]
    return [ImageResult("s", "o", "done", name=name.format(n), matting=each) for n, each in enumerate(details)]


def added(results: Sequence[ImageResult], **options: Any) -> dict[int, list[str]]:
    """Return the reasons that the batch adds, by the number of the image."""
    completed = add_batch_reasons(results, **options)
    assert [result.matting.quality for result in completed] == [result.matting.quality for result in results]
    assert all(result.matting.reasons[0] == "split" for result in completed if result.matting.signals)
    found = {n: list(result.matting.reasons[1:]) for n, result in enumerate(completed)}
    return {n: reasons for n, reasons in found.items() if reasons}


def vary(count: int, seed: int = 0) -> list[dict[str, float]]:
    """Return signals of images of one object: sizes vary by a factor of 2, colours by 5."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        change = {"foreground": 0.2 * float(np.exp(rng.uniform(-0.7, 0.7)))}
        change |= {name: USUAL[name] + float(rng.uniform(-5, 5)) for name in ("lightness", "green_red", "blue_yellow")}
        images.append({**USUAL, **change})
    return images


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"foreground": 0.005}, "size unlike the others"),
        ({"left": 0.0, "right": 1.0, "top": 0.45, "bottom": 0.55}, "shape unlike the others"),
        ({"green_red": -40.0, "blue_yellow": -30.0}, "colour unlike the others"),
    ],
)
@pytest.mark.parametrize("count", [8, 300])
def test_outlier_of_a_folder_is_found(change: Mapping[str, float], reason: str, count: int) -> None:
    images = vary(count)
    assert added(results_of(images)) == {}
    images[3] |= change
    assert added(results_of(images)) == {3: [reason]}
    assert added(results_of(images), is_shot=True).get(3, []) in ([], [JUMP])


def test_few_images_folders_and_images_without_object_are_not_compared() -> None:
    images = vary(7)
    images[3]["foreground"] = 0.001
    assert added(results_of(images)) == {}
    other_folder = [{**each, "foreground": 0.004} for each in vary(12)]
    assert added(results_of(vary(12)) + results_of(other_folder, "far/{:04d}.jpg")) == {}
    empty = {"foreground": 0.0}
    assert added(results_of([*vary(12), empty, empty, {}])) == {}


def moving(count: int) -> list[dict[str, float]]:
    """Return the signals of an object that moves to the right and comes closer."""
    return [
        {**USUAL, "foreground": 0.1 * 1.02**n, "left": 0.1 + 0.01 * n, "right": 0.3 + 0.01 * n} for n in range(count)
    ]


def test_jump_in_a_shot_is_found_at_its_frame_only() -> None:
    frames = moving(30)
    assert added(results_of(frames), is_shot=True) == {}
    frames[10] |= {"left": 0.7, "right": 0.9}
    frames[20] |= {"foreground": 0.01}
    assert added(results_of(frames), is_shot=True) == {10: [JUMP], 20: [JUMP]}
    assert added(results_of(frames[:2]), is_shot=True) == {}
    frames[5] |= {"foreground": -0.005, "left": 0.6, "right": 0.3}  # a damaged stamp
    assert added(results_of(frames), is_shot=True)[5] == [JUMP]
    assert added(results_of(frames))


def test_object_that_leaves_the_frame_and_other_shots_are_no_jumps() -> None:
    leaving = [{**USUAL, "foreground": 0.1 * (1 - n / 20)} for n in range(20)] + [{"foreground": 0.0}] * 5
    other = [{**frame, "foreground": 0.9} for frame in moving(25)]
    assert added(results_of(leaving, "a.{:04d}.exr") + results_of(other, "b.{:04d}.exr"), is_shot=True) == {}
