"""Alphas that a person has accepted: their stamp, and that ``icm matte`` keeps them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import OpenImageIO as oiio
import pytest
from conftest import Icm, alphas, output_files, read
from test_windows import write_cropped_exr

from icm_cli.images.writing import has_changed_pixels, read_provenance, set_provenance_entry
from icm_cli.matting.provenance import REVIEWED_KEY

STAMP = "accepted 2026-11-30T09:15:00Z"


def review(path: Path, stamp: str | None = STAMP) -> bytes:
    """Stamp a file, and return its new content."""
    set_provenance_entry(path, REVIEWED_KEY, stamp)
    return path.read_bytes()


def statuses(report: Path) -> dict[str, tuple[str, str]]:
    images = json.loads(report.read_text())["images"]
    return {Path(image["name"]).name: (image["status"], image["reviewed"]) for image in images}


def notices_about_reviews(text: str) -> list[str]:
    return [line for line in text.splitlines() if "reviewed alpha" in line]


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("png", {}),
        ("png", {"depth": "16"}),
        ("png", {"foreground": "straight"}),
        ("png", {"foreground": "straight", "depth": "16"}),
        ("tiff", {}),
        ("tiff", {"depth": "float"}),
        ("tiff", {"foreground": "premultiplied"}),
        ("exr", {}),
        ("exr", {"foreground": "auto"}),
    ],
)
def test_a_stamp_changes_nothing_else_and_its_removal_restores_the_file(
    icm: Icm, scene: Path, form: str, options: dict[str, Any]
) -> None:
    rgb = read(scene / "imgs" / "wall.jpg")[..., ::-1].astype(np.float32) / 255
    write_cropped_exr(scene / "plates" / "a.exr", rgb, (20, 10, 100, 140), (16, -8))
    assert icm(src=scene / "plates", format=form, **options).exit_code == 0
    (path,) = output_files(scene / "out")
    before, provenance = path.read_bytes(), read_provenance(path)
    image = oiio.ImageBuf(str(path))
    pixels, window = image.get_pixels(), image.roi_full
    assert review(path, None) == before
    review(path)
    assert read_provenance(path) == {**(provenance or {}), REVIEWED_KEY: STAMP}
    assert not has_changed_pixels(path, provenance or {})
    image = oiio.ImageBuf(str(path))
    assert (image.get_pixels() == pixels).all()
    assert image.roi_full == window
    review(path, "corrected 2026-11-30T10:00:00Z")
    assert (read_provenance(path) or {})[REVIEWED_KEY].startswith("corrected")
    assert review(path, None) == before


@pytest.mark.parametrize("change", ["settings", "mask", "source", "hints"])
@pytest.mark.parametrize("flags", [[], ["--keep-existing"]])
def test_only_overwrite_recomputes_a_reviewed_alpha(icm: Icm, scene: Path, change: str, flags: list[str]) -> None:
    assert icm().exit_code == 0
    kept = review(scene / "out" / "wall.png")
    assert not notices_about_reviews(icm(*flags).stderr)
    options: dict[str, Any] = {"report": [scene / "r.json", scene / "r.csv"]}
    if change == "settings":
        options["seed"] = 7
    elif change == "mask":
        cv2.imwrite(str(scene / "mask.png"), cv2.dilate(read(scene / "mask.png"), np.ones((5, 5), np.uint8)))
    elif change == "source":
        cv2.imwrite(str(scene / "imgs" / "wall.jpg"), 255 - read(scene / "imgs" / "wall.jpg"))
    else:
        (scene / "hints").mkdir()
        shape = {"label": "bg", "points": [[5, 5]], "shape_type": "point"}
        (scene / "hints" / "wall.json").write_text(json.dumps({"shapes": [shape]}))
        options["hints"] = scene / "hints"
    result = icm(*flags, **options)
    assert result.exit_code == 0
    (notice,) = notices_about_reviews(result.stderr)
    assert notice.startswith("icm: kept 1 reviewed alpha although ")
    assert str(scene / "out" / "wall.png") in notice
    assert (scene / "out" / "wall.png").read_bytes() == kept
    found = statuses(scene / "r.json")
    assert found["wall.jpg"] == ("kept", STAMP)
    assert found["pad.0101.png"][1] == ""
    rows = {Path(row["source"]).name: row for row in csv.DictReader((scene / "r.csv").read_text().splitlines())}
    assert rows["wall.jpg"]["reviewed"] == STAMP
    assert any(line.split() == ["reviewed", "1"] for line in result.stdout.splitlines())
    if not flags:
        assert icm("--overwrite", **options).exit_code == 0
        assert statuses(scene / "r.json")["wall.jpg"] == ("done", "")


def test_a_reviewed_alpha_needs_no_trimap_and_may_be_retouched(icm: Icm, scene: Path) -> None:
    assert icm().exit_code == 0
    path = scene / "out" / "wall.png"
    kept = review(path)
    result = icm("--dry-run", trimap="also")
    assert "2 to be recomputed, 1 kept" in result.stderr
    assert icm(trimap="also").exit_code == 0
    assert path.read_bytes() == kept
    assert not path.with_name("wall.trimap.png").exists()


def test_frames_after_a_reviewed_one_continue_from_it(icm: Icm, scene: Path) -> None:
    image = read(scene / "imgs" / "wall.jpg")
    frames = scene / "frames"
    frames.mkdir()
    for number in range(1, 5):
        cv2.imwrite(str(frames / f"a.{number:04d}.png"), np.roll(image, number, axis=1))
    assert icm("--shot", src=frames).exit_code == 0
    kept = review(scene / "out" / "a.0003.png")
    before = alphas(scene / "out")
    (scene / "out" / "a.0002.png").unlink()
    assert icm("--shot", src=frames, report=scene / "r.json").exit_code == 0
    assert {name: status for name, (status, _) in statuses(scene / "r.json").items()} == {
        "a.0001.png": "kept",
        "a.0002.png": "done",
        "a.0003.png": "kept",
        "a.0004.png": "kept",
    }
    assert alphas(scene / "out") == before
    assert icm("--shot", src=frames, seed=7, report=scene / "r.json").exit_code == 0
    assert [status for status, _ in statuses(scene / "r.json").values()] == ["done", "done", "kept", "done"]
    assert (scene / "out" / "a.0003.png").read_bytes() == kept


def test_an_alpha_that_is_reviewed_during_a_run_is_not_replaced(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from icm_cli.matting import engine

    assert icm().exit_code == 0
    path, write = scene / "out" / "wall.png", engine.write_alpha
    shutil.rmtree(scene / "imgs" / "sub")

    def review_and_write(target: Path, *others: Any) -> None:
        if target == path and REVIEWED_KEY not in (read_provenance(path) or {}):
            review(path)
        write(target, *others)

    monkeypatch.setattr(engine, "write_alpha", review_and_write)
    result = icm("--overwrite")
    assert result.exit_code == 1
    assert f"{path} was reviewed during this run, and is not overwritten" in result.stderr
    assert (read_provenance(path) or {})[REVIEWED_KEY] == STAMP


def test_a_stamp_needs_a_file_of_icm(scene: Path) -> None:
    from icm_cli.errors import ImageError

    path = scene / "other.exr"
    write_cropped_exr(path, np.zeros((8, 8, 3), np.float32), (0, 0, 8, 8), (0, 0))
    with pytest.raises(ImageError, match="is not an alpha of icm, or another program removed its metadata"):
        set_provenance_entry(path, REVIEWED_KEY, STAMP)
