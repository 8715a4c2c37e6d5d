"""``icm matte --hints``: which file belongs to which image, and which alphas a hint changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import Icm, alphas, read
from PIL import Image
from test_formats import linear
from test_windows import write_cropped_exr

from icm_cli.matting.engine import Engine

CORNER = [[0, 0], [30, 0], [30, 20], [0, 20]]


def write_hint(path: Path, label: str = "keep", points: Sequence[Sequence[float]] = CORNER, **content: Any) -> Path:
    """Write an annotation of labelme: by default, the upper left corner is to be kept."""
    kind = "polygon" if len(points) > 1 else "point"
    shape = {"label": label, "points": points, "shape_type": kind}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"shapes": [shape], **content}))
    return path


def paint_hint(path: Path, size: tuple[int, int], value: int = 255) -> None:
    """Write a rough mask: the upper left corner is on the object, or off it."""
    image = np.full(size, 128, np.uint8)
    image[:20, :30] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def statuses(report: Path) -> dict[str, tuple[str, bool]]:
    """Status of each image of a report, and whether it had hints."""
    images = json.loads(report.read_text())["images"]
    return {image["name"]: (image["status"], image["has_hints"]) for image in images}


@pytest.fixture
def hints(scene: Path) -> Path:
    folder = scene / "hints"
    folder.mkdir()
    return folder


def size_of(path: Path) -> tuple[int, int]:
    height, width = read(path).shape[:2]
    return height, width


def test_a_hint_changes_the_alpha_of_its_image_only(icm: Icm, scene: Path, hints: Path) -> None:
    report = scene / "r.json"

    def matte(*flags: str) -> list[str]:
        """Return the images that were done."""
        done = icm(*flags, hints=hints, report=report)
        assert done.exit_code == 0, done.output
        return sorted(name for name, (status, _) in statuses(report).items() if status == "done")

    assert icm(out=scene / "plain").exit_code == 0
    plain = alphas(scene / "plain")
    assert len(matte()) == 3
    assert alphas(scene / "out") == plain
    write_hint(hints / "wall.json")
    assert matte() == ["wall.jpg"]
    kept = alphas(scene / "out")
    assert {name for name in plain if kept[name] != plain[name]} == {"wall.png"}
    assert (read(scene / "out" / "wall.png")[:20, :30] == 255).all()
    assert statuses(report) == {
        "pad.0101.png": ("kept", False),
        "sub/deep.png": ("kept", False),
        "wall.jpg": ("done", True),
    }
    assert matte() == []
    write_hint(hints / "wall.json", "drop")
    write_hint(hints / "sub" / "deep.json")
    assert matte() == ["sub/deep.png", "wall.jpg"]
    assert (read(scene / "out" / "wall.png")[:20, :30] == 0).all()
    assert (read(scene / "out" / "sub" / "deep.png")[:20, :30] == 255).all()
    shutil.rmtree(hints / "sub")
    (hints / "wall.json").unlink()
    assert matte() == ["sub/deep.png", "wall.jpg"]
    assert alphas(scene / "out") == plain


def test_dry_run_says_why_an_alpha_is_recomputed(icm: Icm, scene: Path, hints: Path) -> None:
    def plan(*flags: str, **options: Any) -> dict[str, str]:
        planned = icm("--dry-run", *flags, **{"hints": hints, **options})
        assert planned.exit_code == 0, planned.output
        lines = [line.rpartition(".png") for line in planned.stdout.splitlines()]
        return {Path(output).name: note.strip() for output, _, note in lines}

    assert plan() == {"deep": "", "pad.0101": "", "wall": ""}
    write_hint(hints / "wall.json")
    assert icm(hints=hints).exit_code == 0
    assert plan() == {"deep": "(kept)", "pad.0101": "(kept)", "wall": "(kept)"}
    write_hint(hints / "wall.json", "drop")
    write_hint(hints / "sub" / "deep.json")
    (scene / "out" / "pad.0101.png").write_bytes(b"")
    assert plan() == {
        "deep": "(recomputed: its hints are new)",
        "pad.0101": "(recomputed: its alpha is damaged or incomplete)",
        "wall": "(recomputed: its hints changed)",
    }
    assert plan(hints=None)["wall"] == "(recomputed: its hints were removed)"
    assert plan("--overwrite")["wall"] == "(recomputed: --overwrite)"
    assert plan(hints=None, not_ref=scene / "imgs" / "wall.jpg")["deep"] == "(recomputed: references changed)"


def test_a_run_without_the_option_says_that_it_undoes_corrections(icm: Icm, scene: Path, hints: Path) -> None:
    lost = "recomputing 2 alphas made with hints, such as"
    for path in (hints / "wall.json", hints / "sub" / "deep.json"):
        write_hint(path)
    assert icm(hints=hints).exit_code == 0
    planned = icm("--dry-run")
    assert planned.stderr.count(lost) == 1
    assert "to keep the corrections, give --hints DIR, or --keep-existing without --overwrite" in planned.stderr
    assert lost not in icm("--dry-run", hints=scene / "imgs").stderr
    assert icm("--dry-run", "--overwrite").stderr.count(lost) == 1
    assert lost not in icm("--dry-run", "--overwrite", hints=hints).stderr
    kept = icm("--keep-existing")
    assert (kept.exit_code, lost in kept.stderr) == (0, False)
    assert icm("--overwrite").stderr.count(lost) == 1
    assert lost not in icm("--overwrite").stderr
    assert icm(hints=hints).exit_code == 0
    assert icm().stderr.count(lost) == 1
    assert lost not in icm().stderr


def test_names_of_hints(icm: Icm, scene: Path, hints: Path) -> None:
    """The name of the image with or without its extension; the extension of the hint in any case."""
    write_hint(hints / "wall.jpg.JSON")
    write_hint(hints / "pad.0101.json", "drop")
    write_hint(hints / "pad.0101.png.json", "keep", [[40, 40], [60, 40], [60, 60], [40, 60]])
    write_hint(hints / "deep.json")  # not in the subfolder
    planned = icm("--dry-run", hints=hints)
    assert planned.exit_code == 0
    assert "2 images with hints" in planned.stderr
    done = icm(hints=hints, report=scene / "r.json")
    assert done.exit_code == 0, done.output
    reason = "a hint without an image of its name"
    assert f"{hints / 'deep.json'} skipped: {reason}" in done.stderr
    assert json.loads((scene / "r.json").read_text())["summary"]["skipped_files"][reason] == 1
    assert (read(scene / "out" / "wall.png")[:20, :30] == 255).all()
    pad = read(scene / "out" / "pad.0101.png")
    assert (pad[:20, :30] == 0).all()
    assert (pad[40:60, 40:60] == 255).all()
    assert not statuses(scene / "r.json")["sub/deep.png"][1]


@pytest.mark.parametrize("size", [(6000, 20), (20, 6000)])
def test_an_image_with_a_tiny_object_of_a_hint_is_not_empty(
    icm: Icm, scene: Path, hints: Path, size: tuple[int, int]
) -> None:
    """Its quality is not that of an empty alpha, although its object vanishes at the size of the measurements."""
    Image.new("RGB", size).save(scene / "imgs" / "long.png")
    x, y = (length // 2 for length in size)
    write_hint(hints / "long.json", "fg", [[x - 2, y - 2], [x + 2, y - 2], [x + 2, y + 2], [x - 2, y + 2]])
    done = icm("--include", "long.png", hints=hints, report=scene / "r.json")
    assert done.exit_code == 0, done.output
    (image,) = json.loads((scene / "r.json").read_text())["images"]
    assert (image["not_found"], image["quality"] < 0.8, "nothing found" in image["reasons"]) == (False, True, False)


def test_an_empty_alpha_of_an_image_with_a_hint_on_the_object_has_quality_0(icm: Icm, scene: Path, hints: Path) -> None:
    """The garbage matte removes all that the box marks."""
    box = [[10, 10], [60, 60]]
    write_hint(hints / "wall.json", shapes=[{"label": "fg", "points": box, "shape_type": "rectangle"}])
    garbage = scene / "garbage.png"
    cv2.imwrite(str(garbage), np.full(size_of(scene / "imgs" / "wall.jpg"), 255, np.uint8))
    done = icm("--include", "wall.jpg", hints=hints, garbage=garbage, report=scene / "r.json")
    assert done.exit_code == 0, done.output
    (image,) = json.loads((scene / "r.json").read_text())["images"]
    assert (image["not_found"], image["quality"], image["reasons"]) == (False, 0, ["marked object missing"])


@pytest.mark.slow
def test_annotation_and_painted_hint_of_one_image_are_merged(icm: Icm, scene: Path, hints: Path) -> None:
    size = size_of(scene / "imgs" / "wall.jpg")
    write_hint(hints / "wall.json", "drop", [[100, 50], [120, 50], [120, 70], [100, 70]])
    paint_hint(hints / "wall.png", size)
    assert icm("--include", "wall.jpg", hints=hints).exit_code == 0
    alpha = read(scene / "out" / "wall.png")
    assert (alpha[50:70, 100:120] == 0).all()
    assert alpha[10, 15] > 127  # the centre of the painted area
    rough = np.zeros(size, np.uint8)
    rough[:20, :30] = 255
    cv2.imwrite(str(hints / "wall.png"), rough)
    write_hint(hints / "wall.json", "fg", [[100, 60]])  # on the black side of the mask
    assert icm("--include", "wall.jpg", hints=hints).exit_code == 0
    alpha = read(scene / "out" / "wall.png")
    assert alpha[60, 100] > 127
    assert alpha[150, 60] < 128


def test_an_annotation_of_another_image_is_reported(icm: Icm, scene: Path, hints: Path) -> None:
    write_hint(hints / "wall.json", imagePath="../imgs/floor.jpg")
    write_hint(hints / "pad.0101.json", imagePath="pad.0101.png")
    done = icm("--dry-run", hints=hints)
    assert done.exit_code == 0
    about = f"{hints / 'wall.json'} says that it is about floor.jpg, and is used for wall.jpg; check"
    assert done.stderr.count("says that it is about") == done.stderr.replace("\n", " ").count(about) == 1
    mask = write_hint(scene / "mask.json", "fg", [[20, 20], [90, 20], [90, 90]], imagePath="other.png")
    assert "says that it is about other.png" in icm("--dry-run", mask=mask).stderr


def test_another_single_label_is_taken_for_the_object_with_a_notice(icm: Icm, hints: Path) -> None:
    for name in ("pad.0101.json", "wall.json"):
        write_hint(hints / name, "car")
    write_hint(hints / "sub" / "deep.json", "Object")
    done = icm("--dry-run", hints=hints)
    assert done.exit_code == 0
    notice = f"the label car of hints {hints / 'pad.0101.json'} and 1 more was taken for fg, on the object; expected"
    assert done.stderr.count("was taken for fg") == done.stderr.replace("\n", " ").count(notice) == 1


@pytest.mark.parametrize("label", ["bag", "Bug", "crop", "drone", "jeep", "prop", "keeper", "droplet", "tv"])
def test_a_word_that_resembles_a_label_names_the_object(icm: Icm, hints: Path, label: str) -> None:
    background = {"label": "bg", "points": [[60, 60]], "shape_type": "point"}
    path = write_hint(hints / "wall.json", label)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "shapes": [*content["shapes"], background]}))
    done = icm("--dry-run", hints=hints)
    assert done.exit_code == 0, done.output
    assert f"the label {label} of hints {path} was taken for fg" in done.stderr.replace("\n", " ")


def test_dry_run_finds_hints_for_another_size(icm: Icm, scene: Path, hints: Path) -> None:
    height, width = size_of(scene / "imgs" / "wall.jpg")
    write_hint(hints / "wall.json", imageHeight=height + 1, imageWidth=width)
    paint_hint(hints / "pad.0101.png", (height, width + 1))
    write_hint(hints / "sub" / "deep.json")
    for flags in (["--dry-run"], []):
        ended = icm(*flags, hints=hints)
        assert ended.exit_code == 1
        assert f"it is of an image of {width}x{height + 1}, and the image is {width}x{height}" in ended.stderr
        assert f"fail{'ed' if not flags else ''}: {scene / 'imgs' / 'wall.jpg'}: annotation" in ended.stderr
        assert f"pad.0101.png is {width + 1}x{height}, and the image is" in ended.stderr
    assert (
        "1 new, 0 to be recomputed, 0 kept, 2 that would fail"
        in icm("--dry-run", hints=hints, out=scene / "new").stderr
    )


def test_json_that_is_no_annotation_is_refused(icm: Icm, scene: Path, hints: Path) -> None:
    (hints / "wall.json").write_text('{"points": [[20, 20]]}')
    refused = icm(hints=hints)
    assert refused.exit_code == 2
    assert f"{hints / 'wall.json'} cannot be used: it has neither shapes nor annotations" in refused.stderr
    assert not (scene / "out").exists()


def test_points_hold_in_trimaps(icm: Icm, scene: Path, hints: Path) -> None:
    """At the edge of the object, where the trimap is unknown without hints."""
    assert icm(trimap="instead", trimap_band=6).exit_code == 0
    plain = read(scene / "out" / "wall.png")
    (row, column), (other_row, other_column) = np.argwhere(plain == 128)[[0, -1]].tolist()
    write_hint(hints / "wall.json", "fg", [[column + 0.5, row + 0.5]])
    write_hint(hints / "wall.jpg.json", "bg", [[other_column + 0.5, other_row + 0.5]])
    assert icm("--trimap", "also", hints=hints, trimap_band=6, out=scene / "also").exit_code == 0
    trimap = read(scene / "also" / "wall.trimap.png")
    assert (trimap[row, column], trimap[other_row, other_column]) == (255, 0)


def test_filtered_images_are_no_complaint(icm: Icm, hints: Path) -> None:
    for name in ("wall", "pad.0101", "sub/deep"):
        write_hint(hints / f"{name}.json")
    for flags in (("--include", "wall.jpg"), ("--frames", "101"), ("--exclude", "pad*"), ("--shard", "1/2")):
        done = icm(*flags, "--dry-run", hints=hints)
        assert done.exit_code == 0
        assert "without an image" not in done.stderr


def test_shards_apply_the_same_hints(icm: Icm, scene: Path, hints: Path) -> None:
    write_hint(hints / "wall.json")
    assert icm(hints=hints, out=scene / "whole").exit_code == 0
    for number in (1, 2):
        assert icm("--shard", f"{number}/2", hints=hints).exit_code == 0
    assert alphas(scene / "out") == alphas(scene / "whole")


def test_a_name_that_fits_two_images_is_refused(icm: Icm, scene: Path, hints: Path) -> None:
    cv2.imwrite(str(scene / "imgs" / "wall.tif"), read(scene / "imgs" / "wall.jpg"))
    write_hint(hints / "wall.json")
    refused = icm("--keep-suffix", hints=hints)
    assert refused.exit_code == 2
    assert "wall.json may belong to wall.jpg or to wall.tif; name it wall.jpg.json" in refused.stderr
    (hints / "wall.json").rename(hints / "wall.tif.json")
    done = icm("--keep-suffix", hints=hints, report=scene / "r.json")
    assert done.exit_code == 0, done.output
    assert {name for name, (_, has_hints) in statuses(scene / "r.json").items() if has_hints} == {"wall.tif"}


class TestRefused:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "cannot be read"),
            ('{"shapes": []}', "has no shape; delete the file to remove the hints of wall.jpg"),
            ('{"imageHeight": 9, "imageWidth": 9, "shapes": 3}', "shapes is 3 instead of a list"),
            (
                '{"imageHeight": 9, "imageWidth": 9, "shapes": [{"label": "fg", "shape_type": "point", '
                '"points": [[50, 1]]}]}',
                "outside the image",
            ),
            ('{"shapes": [{"label": "fg", "shape_type": "point", "points": [["a", 1]]}]}', 'is "a" instead of'),
            (
                '{"shapes": [{"label": "fg", "shape_type": "point", "points": [[1e9, 1]]}]}',
                "outside the image, 120x160",
            ),
            (
                '{"shapes": [{"label": "fg", "shape_type": "point", "points": [[9, 9]]}, '
                '{"label": "bg", "shape_type": "point", "points": [[9, 9]]}]}',
                "both on the object and off it",
            ),
        ],
    )
    def test_malformed_files_stop_the_run(self, icm: Icm, scene: Path, hints: Path, content: str, message: str) -> None:
        (hints / "wall.json").write_text(content)
        refused = icm(hints=hints)
        assert refused.exit_code == 2
        assert message in refused.stderr
        assert f"{hints / 'wall.json'}" in refused.stderr
        assert not (scene / "out").exists()

    @pytest.mark.parametrize(
        ("label", "similar"),
        [
            *(("dorp", "drop"), ("drops", "drop"), ("drop-2", "drop"), ("drp", "drop")),
            *(("kepe", "keep"), ("kep", "keep"), ("keepp", "keep"), ("keep area", "keep")),
            *(("BGG", "bg"), ("gb", "bg"), ("bg1", "bg"), ("bkg", "bg"), ("bg left", "bg"), ("bckgrnd", "bg")),
            *(("bakground", "background"), ("baclground", "background"), ("back ground", "background")),
        ],
    )
    def test_a_misspelt_label(self, icm: Icm, scene: Path, hints: Path, label: str, similar: str) -> None:
        path = write_hint(hints / "wall.json", label)
        refused = icm(hints=hints)
        assert refused.exit_code == 2
        message = (
            f'annotation {path} cannot be used: it has the label "{label}"; expected fg, bg, keep, drop. Did you mean '
            f"'{similar}'? If it marks the object, change it to fg"
        )
        assert message in refused.stderr.replace("\n", " ")
        assert not (scene / "out").exists()

    @pytest.mark.parametrize("label", ["bag", "drone"])
    def test_a_mask_may_have_a_label_that_resembles_another(self, icm: Icm, scene: Path, label: str) -> None:
        mask = write_hint(scene / "mask.json", label, [[20, 20], [90, 20], [90, 90]])
        assert icm("--dry-run", mask=mask).exit_code == 0

    def test_png_that_is_no_hint(self, icm: Icm, scene: Path, hints: Path) -> None:
        photo = cv2.imencode(".png", read(scene / "imgs" / "wall.jpg"))[1].tobytes()
        for content in (b"no image", photo):
            (hints / "wall.png").write_bytes(content)
            refused = icm(hints=hints)
            assert refused.exit_code == 2
            assert "wall.png" in refused.stderr
            assert (
                "it was taken as the hints of wall.jpg: if it is another image, give --hints another" in refused.stderr
            )
            assert not (scene / "out").exists()

    def test_files_that_contradict_each_other(self, icm: Icm, hints: Path) -> None:
        size = dict(imageHeight=120, imageWidth=160)
        write_hint(hints / "wall.json", "keep", **size)
        write_hint(hints / "wall.jpg.json", "drop", **size)
        refused = icm(hints=hints)
        assert refused.exit_code == 2
        assert "wall.jpg.json and" in refused.stderr
        assert "contradict each other" in refused.stderr

    def test_a_hint_of_another_size_fails_alone(self, icm: Icm, scene: Path, hints: Path) -> None:
        write_hint(hints / "wall.json", imageHeight=300, imageWidth=500)
        paint_hint(hints / "sub" / "deep.png", (40, 30))
        failed = icm(hints=hints, report=scene / "r.json")
        assert failed.exit_code == 1
        assert {name: status for name, (status, _) in statuses(scene / "r.json").items()} == {
            "pad.0101.png": "done",
            "sub/deep.png": "failed",
            "wall.jpg": "failed",
        }
        height, width = size_of(scene / "imgs" / "wall.jpg")
        assert f"of an image of 500x300, and the image is {width}x{height}" in failed.stderr.replace("\n", " ")

    def test_folder_or_pattern_must_exist(self, icm: Icm, scene: Path) -> None:
        for where, message in (
            ("none", "--hints none does not exist; expected a folder"),
            (scene / "ref.png", "is a file; expected a folder"),
            ("none/fix.####.json", "no file matches none/fix.####.json: the folder none does not exist"),
            (scene / "fix.####.tif", "fix.####.tif"),
        ):
            refused = icm("--dry-run", hints=where)
            assert refused.exit_code == 2
            assert message in refused.stderr
        shutil.copy(scene / "ref.png", scene / "fix.0101.tif")
        refused = icm("--dry-run", hints=scene / "fix.####.tif")
        assert refused.exit_code == 2
        assert "fix.0101.tif; expected a folder of .json and .png files" in refused.stderr

    def test_hints_are_never_overwritten(self, icm: Icm, scene: Path, hints: Path) -> None:
        paint_hint(hints / "wall.png", size_of(scene / "imgs" / "wall.jpg"))
        before = alphas(hints)
        refused = icm("--overwrite", hints=hints, out=hints)
        assert refused.exit_code == 2
        assert "also the output folder" in refused.stderr
        refused = icm("--overwrite", hints=hints, out=hints.parent, src=scene / "imgs", name="hints_{stem}{frame}")
        assert alphas(hints) == before
        report = icm("--overwrite", hints=hints, report=hints / "wall.png")
        assert report.exit_code == 2
        assert alphas(hints) == before

    def test_a_hint_that_changes_during_the_run_fails_its_image(
        self, icm: Icm, scene: Path, hints: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_hint(hints / "wall.json")
        run = Engine.run

        def change_first(self: Engine, jobs: Any) -> None:
            write_hint(hints / "wall.json", "drop")
            run(self, jobs)

        monkeypatch.setattr(Engine, "run", change_first)
        failed = icm(hints=hints)
        assert failed.exit_code == 1
        assert "wall.json changed during the run; run again" in failed.stderr
        assert len(alphas(scene / "out")) == 2


class TestPlaces:
    def test_hints_next_to_the_images(self, icm: Icm, scene: Path) -> None:
        """As labelme writes them. A PNG with the name of another image is its hint."""
        assert icm(out=scene / "plain").exit_code == 0
        write_hint(scene / "imgs" / "wall.json")
        write_hint(scene / "imgs" / "pad.0101.json", "drop")
        write_hint(scene / "imgs" / "sub" / "other.json")
        size = size_of(scene / "imgs" / "wall.jpg")
        write_hint(scene / "imgs" / "wall.jpg.json", "drop", [[50, 50], [60, 50], [60, 60]])
        done = icm(hints=scene / "imgs", report=scene / "r.json")
        assert done.exit_code == 0, done.output
        assert sorted(alphas(scene / "out")) == sorted(alphas(scene / "plain"))
        assert "not an image" not in done.stderr
        assert "other.json skipped: a hint without an image" in done.stderr
        assert (read(scene / "out" / "wall.png")[:20, :30] == 255).all()
        assert (read(scene / "out" / "pad.0101.png")[:20, :30] == 0).all()
        paint_hint(scene / "imgs" / "wall.png", size)
        planned = icm("--dry-run", hints=scene / "imgs")
        assert planned.exit_code == 0, planned.output
        assert "2 images with hints" in planned.stderr
        assert "3 images: 0 new, 1 to be recomputed, 2 kept" in planned.stderr

    def test_folder_of_hints_inside_the_source_folder(self, icm: Icm, scene: Path) -> None:
        folder = scene / "imgs" / "hints"
        write_hint(folder / "wall.json")
        shutil.copy(scene / "imgs" / "wall.jpg", folder / "wall.jpg")  # as labelme needs it
        done = icm(hints=folder)
        assert done.exit_code == 0, done.output
        assert f"{folder / 'wall.jpg'} skipped: not a hint; expected .json or .png" in done.stderr
        assert sorted(alphas(scene / "out")) == ["pad.0101.png", "sub/deep.png", "wall.png"]
        assert (read(scene / "out" / "wall.png")[:20, :30] == 255).all()

    def test_folder_above_the_sources_and_the_output(self, icm: Icm, scene: Path) -> None:
        write_hint(scene / "wall.json")
        for _ in range(2):
            done = icm(hints=scene, report=scene / "r.json")
            assert done.exit_code == 0, done.output
        assert statuses(scene / "r.json")["wall.jpg"] == ("kept", True)
        assert "pad.0101.png" not in icm("--dry-run", "--exclude", "pad*", hints=scene).stderr
        assert f"{scene / 'out'}" not in done.stderr

    def test_pages_have_hints_of_their_own(self, icm: Icm, scene: Path, hints: Path) -> None:
        pages = [Image.open(scene / "imgs" / "wall.jpg")] * 2
        folder = scene / "pages"
        folder.mkdir()
        pages[0].save(folder / "scan.tif", save_all=True, append_images=pages[1:])
        write_hint(hints / "scan.0002.json")
        assert icm(hints=hints, src=folder).exit_code == 0
        first, second = (read(scene / "out" / f"scan.000{page}.png") for page in (1, 2))
        assert (second[:20, :30] == 255).all()
        assert not (first[:20, :30] == 255).all()
        write_hint(hints / "scan.json")
        planned = icm("--dry-run", hints=hints, src=folder)
        assert f"{hints / 'scan.json'} skipped: a hint for a file with several pages; add the number" in planned.stderr

    @pytest.mark.parametrize("flags", [["--src", "imgs/wall.jpg"], ["--src", "imgs", "--exclude", "scan*"]])
    def test_a_hint_for_a_page_that_is_not_selected_is_not_reported(
        self, icm: Icm, scene: Path, hints: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(scene)
        page = Image.open(scene / "imgs" / "wall.jpg")
        page.save(scene / "imgs" / "scan.tif", save_all=True, append_images=[page])
        for name in ("scan.json", "scan.0002.json", "scan.tif.0001.json", "scan.0001.tif.json", "scan.0003.json"):
            write_hint(hints / name)
        planned = icm("--dry-run", *flags, src=None, hints=hints)
        assert planned.exit_code == 0, planned.output
        listed = f"{hints / 'scan.0003.json'} and 1 more skipped: a hint without an image of its name"
        assert listed in planned.stderr.replace("\n", " ")

    def test_coordinates_of_exr_files_are_of_the_display_window(self, icm: Icm, scene: Path, hints: Path) -> None:
        rgb = linear(read(scene / "imgs" / "wall.jpg")[..., ::-1])
        write_cropped_exr(scene / "exr" / "wall.exr", rgb, (20, 10, 100, 90), (16, -8))
        write_hint(hints / "wall.json", "keep", [[30, 20], [50, 20], [50, 40], [30, 40]])
        write_hint(hints / "wall.exr.json", "keep", [[0, 0], [10, 0], [10, 5], [0, 5]])  # outside the data window
        assert icm(hints=hints, src=scene / "exr").exit_code == 0
        alpha = read(scene / "out" / "wall.png")
        assert alpha.shape == rgb.shape[:2]
        assert (alpha[20:40, 30:50] == 255).all()
        assert not alpha[:10].any()
        write_hint(hints / "wall.json", "fg", [[5, 5]])
        failed = icm(hints=hints, src=scene / "exr")
        assert failed.exit_code == 1
        assert "point 5,5 on the object is outside the data window" in failed.stderr
        (hints / "wall.json").unlink()  # leaves an area to keep that is outside
        failed = icm(hints=hints, src=scene / "exr")
        assert failed.exit_code == 1
        assert "area to keep at 0,0 is outside the data window" in failed.stderr


@pytest.mark.parametrize("src", ["list.txt", "imgs/wall.jpg", "imgs/*.jpg"])
def test_a_hint_for_an_image_that_is_not_listed_is_not_reported(
    icm: Icm, scene: Path, hints: Path, src: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scene)
    (scene / "list.txt").write_text("imgs/./wall.jpg\n")
    for name in ("pad.0101.json", "sub/deep.png.json", "none.json"):
        write_hint(hints / name)
    planned = icm("--dry-run", src=src, hints=hints)
    assert planned.exit_code == 0, planned.output
    assert f"{hints / 'none.json'} skipped: a hint without an image of its name" in planned.stderr
    shutil.copy(hints / "none.json", hints / "fix.101.json")
    (hints / "none.json").unlink()
    planned = icm("--dry-run", src=src, hints=hints / "fix.###.json")
    assert planned.exit_code == 0, planned.output
    assert "without an image" not in planned.stderr


def test_a_hint_for_a_reference_is_reported(icm: Icm, scene: Path, hints: Path) -> None:
    shutil.copy(scene / "ref.png", scene / "imgs" / "key.png")
    write_hint(hints / "key.json")
    options = {"ref": scene / "imgs" / "key.png", "hints": hints}
    for run in (lambda: icm("--dry-run", **options), lambda: icm("--dry-run", "--shot", **options)):
        planned = run()
        assert planned.exit_code == 0, planned.output
        assert f"{hints / 'key.json'} skipped: a hint for a reference, which is not matted" in planned.stderr


def test_frame_pattern(icm: Icm, scene: Path, hints: Path) -> None:
    write_hint(hints / "fix.101.json")
    write_hint(hints / "fix.102.json")
    write_hint(hints / "fix.99.json")
    done = icm(hints=hints / "fix.###.json", report=scene / "r.json")
    assert done.exit_code == 0, done.output
    assert statuses(scene / "r.json")["pad.0101.png"] == ("done", True)
    assert f"{hints / 'fix.102.json'} skipped: a hint without an image" in done.stderr
    assert f"{hints / 'fix.99.json'} skipped: its number does not match fix.###.json" in done.stderr
    (hints / "fix.99.json").unlink()
    shutil.copy(scene / "imgs" / "pad.0101.png", scene / "imgs" / "sub" / "pad.0101.png")
    refused = icm(hints=hints / "fix.###.json")
    assert refused.exit_code == 2
    assert "fix.101.json may belong to pad.0101.png or to sub/pad.0101.png; give --hints a folder" in refused.stderr


def test_frame_pattern_without_files(icm: Icm, scene: Path, hints: Path) -> None:
    where = hints / "fix.####.json"
    options = dict(src=scene / "imgs" / "pad.####.png", hints=where)
    first = icm(**options)  # before the first hint exists
    assert first.exit_code == 0, first.output
    notice = f"no hints match {where}, so no image has hints; if there are such files, check the name and the number of"
    assert notice in first.stderr.replace("\n", " ")
    before = read(scene / "out" / "pad.0101.png")
    write_hint(hints / "fix.0101.json")
    assert icm(**options).exit_code == 0
    assert read(scene / "out" / "pad.0101.png")[:15, :25].min() == 255
    (hints / "fix.0101.json").unlink()
    removed = icm(**options)
    assert removed.exit_code == 0, removed.output
    np.testing.assert_array_equal(read(scene / "out" / "pad.0101.png"), before)
    refused = icm(garbage=hints / "fix.####.png", **options)
    assert refused.exit_code == 2
    assert f"no file matches {hints / 'fix.####.png'}" in refused.stderr.replace("\n", " ")


@pytest.mark.parametrize("option", ["hints", "garbage", "keep", "src"])
def test_a_mistyped_pattern_names_the_similar_files(icm: Icm, scene: Path, hints: Path, option: str) -> None:
    for name in ("fix.101.png", "fix.102.png", "fxi_0101.png", "wholly.png"):
        paint_hint(hints / name, size_of(scene / "imgs" / "pad.0101.png"))
    done = icm("--dry-run", **{"src": scene / "imgs" / "pad.####.png", option: hints / "fix.####.png"})
    assert done.exit_code == (0 if option == "hints" else 2)
    names = f"similar names in {hints}: fix.101.png and 1 more, fxi_0101.png"
    assert f"; {names}" in done.stderr.replace("\n", " ")
    assert "wholly" not in done.stderr
