"""Files are never overwritten by accident: equal names, runs at the same time, and retouched alphas."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import OpenImageIO as oiio
import pytest
from conftest import Icm, alphas, arguments, copy_many, output_files, read
from PIL import Image, PngImagePlugin

from icm_cli.files.paths import RECORD_FOLDER, SkippedPaths
from icm_cli.images.image_file import ReopeningFile
from icm_cli.images.writing import read_provenance
from icm_cli.matting import resume
from icm_cli.matting.predictor import Predictor
from icm_cli.matting.provenance import ROOT_KEY
from icm_cli.matting.run_record import RECORD_NAME


def fold_names(monkeypatch: pytest.MonkeyPatch, folder: Path, fold: Callable[[str], str]) -> None:
    """Let the drive of a folder take names as one that ``fold`` makes equal."""

    def folded(path: Any) -> Any:
        text = os.fspath(path)
        start = f"{folder}{os.sep}"
        return start + fold(text.removeprefix(start)) if text.startswith(start) else path

    def patch(name: str) -> None:
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path, *given, **named: real(folded(path), *given, **named))

    for name in ("open", "stat", "lstat", "unlink", "mkdir", "rmdir"):
        patch(name)


@pytest.mark.parametrize(
    ("names", "fold"),
    [
        (("Wall.jpg", "wall.jpg"), str.lower),
        (("Up/wall.jpg", "up/wall.jpg"), str.lower),
        (("é.jpg", "e\u0301.jpg"), lambda name: unicodedata.normalize("NFD", name)),
    ],
)
@pytest.mark.parametrize("is_existing", [False, True])
def test_names_that_the_drive_does_not_distinguish_are_refused(
    icm: Icm,
    scene: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, str],
    fold: Callable[[str], str],
    is_existing: bool,
) -> None:
    for name in names:
        (scene / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scene / "imgs" / "wall.jpg", scene / "src" / name)
    if is_existing:
        (scene / "out").mkdir()
    with monkeypatch.context() as patch:
        fold_names(patch, scene / "out", fold)
        for flags in ((), ("--shard", "1/2"), ("--dry-run",)):
            result = icm(*flags, src=scene / "src")
            assert result.exit_code == 2
            assert all(str(scene / "src" / name) in result.stderr for name in names)
            assert "does not distinguish" in result.stderr
    assert (scene / "out").exists() == is_existing
    assert not list((scene / "out").glob("*"))
    assert icm(src=scene / "src").exit_code == 0  # this drive distinguishes them
    assert len(alphas(scene / "out")) == 2


def test_output_that_is_also_an_output_folder_is_refused(icm: Icm, scene: Path) -> None:
    (scene / "imgs" / "b.png").mkdir()
    shutil.copy(scene / "imgs" / "pad.0101.png", scene / "imgs" / "b.png" / "x.png")
    shutil.copy(scene / "imgs" / "wall.jpg", scene / "imgs" / "b.jpg")
    result = icm()
    assert result.exit_code == 2
    assert f"{scene}/out/b.png would be the alpha of {scene}/imgs/b.jpg and also the folder" in result.stderr
    assert not (scene / "out").exists()
    assert icm("--keep-suffix").exit_code == 0


def during_the_run(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Call ``action`` once, after the first image was read and before its alpha is written."""
    real, calls = Predictor.matte_frames, []

    def matte(self: Predictor, *given: Any) -> Any:
        if not calls:
            calls.append(given)
            action()
        return real(self, *given)

    monkeypatch.setattr(Predictor, "matte_frames", matte)


@pytest.mark.parametrize("lacking", [(), ((fcntl, "flock"),), ((fcntl, "flock"), (os, "link"))])
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_run_does_not_replace_the_alphas_of_a_run_at_the_same_time(
    icm: Icm,
    scene: Path,
    monkeypatch: pytest.MonkeyPatch,
    lacking: tuple[tuple[Any, str], ...],
    flags: tuple[str, ...],
) -> None:
    """On drives with and without locks and hard links."""
    for module, name in lacking:
        monkeypatch.setattr(module, name, Mock(side_effect=OSError(errno.ENOTSUP, "not supported")))
    for folder, source in (("a", "wall.jpg"), ("b", "sub/deep.png")):
        copy_many(scene / "imgs" / source, scene / folder, 2)
    results = []
    during_the_run(monkeypatch, lambda: results.append(icm(src=scene / "b")))
    first = icm(*flags, src=scene / "a", report=scene / "r.json")
    assert [each.exit_code for each in results] == [0]
    assert first.exit_code == 1
    assert f"{scene}/out/0000.png is the alpha of {scene}/b/0000.png and would be overwritten" in first.stderr
    provenances = [read_provenance(path) for path in output_files(scene / "out")]
    assert [provenance and provenance[ROOT_KEY] for provenance in provenances] == [str(scene / "b")] * 2
    assert recorded_source(scene / "out") == str(scene / "b")


def recorded_source(folder: Path) -> object:
    return json.loads((folder / RECORD_FOLDER / RECORD_NAME).read_text())["options"]["src"]


def test_refused_run_does_not_replace_the_run_record(icm: Icm, scene: Path) -> None:
    for folder, source in (("a", "wall.jpg"), ("b", "sub/deep.png")):
        copy_many(scene / "imgs" / source, scene / folder, 1)
    assert icm(src=scene / "a").exit_code == 0
    assert icm(src=scene / "b").exit_code == 2
    assert recorded_source(scene / "out") == str(scene / "a")
    assert icm("--overwrite", src=scene / "b").exit_code == 0
    assert recorded_source(scene / "out") == str(scene / "b")


def test_an_equal_run_record_is_not_written_again(icm: Icm, scene: Path) -> None:
    """Another user, whose shard comes later, may have no permission to replace it."""
    record = scene / "out" / RECORD_FOLDER / RECORD_NAME
    assert icm().exit_code == 0
    first = record.stat().st_mtime_ns
    (scene / "out" / "wall.png").unlink()
    assert icm().exit_code == 0
    assert record.stat().st_mtime_ns == first
    assert icm(seed=3).exit_code == 0
    assert record.stat().st_mtime_ns > first


@pytest.mark.parametrize(("seed", "code"), [(0, 0), (3, 1)])
def test_run_with_other_settings_at_the_same_time_fails(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch, seed: int, code: int
) -> None:
    """A run with the same settings writes the same alphas."""
    during_the_run(monkeypatch, lambda: icm(src=scene / "imgs" / "wall.jpg"))
    result = icm(src=scene / "imgs" / "wall.jpg", seed=seed)
    assert result.exit_code == code
    assert ("written by another run with other settings" in result.stderr) == bool(code)
    monkeypatch.undo()
    before = alphas(scene / "out")
    assert icm(src=scene / "imgs" / "wall.jpg").exit_code == 0
    assert alphas(scene / "out") == before


def test_file_that_appears_during_the_run_is_not_replaced(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = (scene / "imgs" / "pad.0101.png").read_bytes()
    during_the_run(monkeypatch, lambda: (scene / "out" / "wall.png").write_bytes(foreign))
    result = icm("--overwrite", src=scene / "imgs" / "wall.jpg")
    assert result.exit_code == 1
    assert "wall.png is not an alpha of icm" in result.stderr
    assert (scene / "out" / "wall.png").read_bytes() == foreign


TEXT = b"notes of an artist\n"


@pytest.mark.parametrize("flags", [("--exclude", "pad*"), ("--frames", "7"), ("--shard", "{shard}")])
def test_contact_sheet_does_not_replace_images_that_the_run_excludes(
    icm: Icm, scene: Path, flags: tuple[str, ...]
) -> None:
    assert icm().exit_code == 0
    copy_many(scene / "imgs" / "wall.jpg", scene / "imgs" / "more", 7)
    (scene / "imgs" / "more" / "0006.jpg").rename(scene / "imgs" / "more" / "x.0007.jpg")
    shutil.copy(scene / "mask.png", scene / "photo.png")
    for shard in ("1/2", "2/2"):
        given = [flag.format(shard=shard) for flag in flags]
        for path in (scene / "imgs" / "pad.0101.png", scene / "out" / "pad.0101.png", scene / "photo.png"):
            before = alphas(scene)
            result = icm(*given, contact_sheet=path)
            assert result.exit_code == 2, result.output
            assert str(path) in result.stderr
            assert alphas(scene) == before
    result = icm(*given, contact_sheet=scene / "photo.png")
    assert f"{scene}/photo.png exists and is no contact sheet that icm wrote; give another name" in result.stderr


def test_reports_replace_only_files_of_icm(icm: Icm, scene: Path) -> None:
    reports = [scene / f"r.{suffix}" for suffix in ("json", "csv", "html")]
    files = [*reports, scene / "sheet.png"]
    for path in files:
        path.write_bytes(TEXT)
        result = icm(report=reports, contact_sheet=scene / "sheet.png")
        assert result.exit_code == 2
        assert f"{path} exists and is no {'contact sheet' if path.suffix == '.png' else 'report'}" in result.stderr
        assert path.read_bytes() == TEXT
        assert not (scene / "out").exists()
        path.write_bytes(b"")
    for _ in range(2):  # over empty files, and over its own
        result = icm(report=reports, contact_sheet=scene / "sheet.png")
        assert result.exit_code == 0, result.stderr
        assert all(path.stat().st_size for path in files)
    for path in files:
        path.write_bytes(TEXT)
    assert icm("--overwrite", report=reports, contact_sheet=scene / "sheet.png").exit_code == 0
    assert TEXT not in [path.read_bytes() for path in files]


def test_eval_replaces_only_its_own_files(evaluate: Icm, tmp_path: Path) -> None:
    report, references = tmp_path / "r.json", tmp_path / "refs.json"
    for path in (report, references):
        path.write_bytes(TEXT)
        result = evaluate(report=report, write_references=references)
        assert result.exit_code == 2
        assert f"{path} exists and is no report that icm wrote; give another name, or remove the file" in result.stderr
        assert path.read_bytes() == TEXT
        path.unlink()
    for _ in range(2):
        assert evaluate(report=report, write_references=references).exit_code == 0


@pytest.mark.parametrize("kind", ["text", "torn image", "torn alpha", "empty"])
def test_only_damaged_files_of_icm_are_replaced(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    wall, source = scene / "out" / "wall.png", scene / "imgs" / "wall.jpg"
    assert icm(src=source).exit_code == 0
    made, image = wall.read_bytes(), (scene / "imgs" / "pad.0101.png").read_bytes()
    left = {"text": TEXT, "torn image": image[:-40], "torn alpha": made[: len(made) // 2], "empty": b""}[kind]
    wall.write_bytes(left)
    is_kept = kind in ("text", "torn image")
    result = icm(src=source)
    assert result.exit_code == (2 if is_kept else 0)
    assert ("wall.png is not an alpha of icm" in result.stderr) == is_kept
    assert wall.read_bytes() == (left if is_kept else made)
    assert icm("--overwrite", src=source).exit_code == 0
    wall.unlink()
    during_the_run(monkeypatch, lambda: wall.write_bytes(left))
    assert icm(src=source).exit_code == is_kept
    assert wall.read_bytes() == (left if is_kept else made)


OBSTACLES: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to a file that does not exist": lambda path: path.symlink_to("none"),
}


@pytest.mark.parametrize("what", OBSTACLES)
def test_what_is_no_file_is_not_replaced(icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    path = scene / "out" / "wall.png"
    path.parent.mkdir()
    OBSTACLES[what](path)
    before = path.lstat()
    for flags in ((), ("--overwrite",), ("--dry-run",)):
        result = icm(*flags)
        assert result.exit_code == 2
        assert f"{path} is {what}" in result.stderr
        assert [each.name for each in path.parent.iterdir()] == ["wall.png"]
    assert path.lstat().st_ino == before.st_ino
    sheet = icm(out=scene / "other", contact_sheet=path)
    assert sheet.exit_code == 2
    assert f"{path} is {what}" in sheet.stderr
    during_the_run(monkeypatch, lambda: OBSTACLES[what](scene / "new" / "wall.png"))
    result = icm(src=scene / "imgs" / "wall.jpg", out=scene / "new")
    assert result.exit_code == 1
    assert f"wall.png is {what}" in result.stderr


@pytest.mark.slow
def test_two_processes_with_different_sources_share_an_output_folder(scene: Path, small_model: Path) -> None:
    runs = []
    for number, source in enumerate(("wall.jpg", "sub/deep.png")):
        copy_many(scene / "imgs" / source, scene / f"{number}", 8)
        options = {"ref": scene / "ref.png", "mask": scene / "mask.png", "model": small_model, "out": scene / "out"}
        options |= {"src": scene / f"{number}", "report": scene / f"{number}.json"}
        line = [sys.executable, "-m", "icm_cli.cli", "matte", *arguments(options)]
        runs.append(subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    codes = [run.wait(200) for run in runs]
    assert set(codes) <= {0, 1, 2}
    assert codes != [0, 0]
    done = {}
    for number in (0, 1):
        if (scene / f"{number}.json").exists():  # one that starts late is refused and writes no report
            images = json.loads((scene / f"{number}.json").read_text())["images"]
            done.update(
                {Path(image["output"]): str(scene / f"{number}") for image in images if image["status"] == "done"}
            )
            assert len(images) == 8
    found = {path: (read_provenance(path) or {})[ROOT_KEY] for path in output_files(scene / "out")}
    assert found == done
    assert len(found) == 8


def retouch(path: Path) -> None:
    """Change pixels, and keep the metadata as ImageMagick does."""
    if path.suffix == ".png":
        image = Image.open(path)
        info = PngImagePlugin.PngInfo()
        for key, value in image.text.items():  # type: ignore[attr-defined]
            info.add_text(key, value)
        Image.fromarray(np.full_like(np.asarray(image), 77)).save(path, pnginfo=info)
        return
    buffer = oiio.ImageBuf(str(path))
    pixels = buffer.get_pixels("float")
    changed = oiio.ImageBuf(buffer.spec())
    changed.set_pixels(oiio.ROI(), np.full_like(pixels, 0.25))
    assert changed.write(str(path))


@pytest.mark.parametrize("options", [{}, {"format": "tiff"}, {"format": "exr"}, {"foreground": "auto"}])
def test_retouched_alpha_is_replaced_only_on_request(icm: Icm, scene: Path, options: dict[str, str]) -> None:
    icm(**options)
    (path,) = (scene / "out").glob("wall.*")
    retouch(path)
    before = path.read_bytes()
    kept = icm(**options, report=scene / "r.json")
    assert kept.exit_code == 0
    assert f"kept 1 alpha with pixels changed by another program, such as {path}" in kept.stderr
    assert json.loads((scene / "r.json").read_text())["summary"]["kept"] == 3
    refused = icm(**options, seed=3)
    assert refused.exit_code == 2
    assert f"{path} was changed after icm wrote it and would be overwritten" in refused.stderr
    assert "--exclude wall.jpg" in refused.stderr
    kept = icm("--keep-existing", **options, seed=3)
    assert kept.exit_code == 0
    assert "kept 1 alpha with pixels changed" in kept.stderr
    assert "kept 3 alphas made with other settings" in kept.stderr
    assert path.read_bytes() == before
    assert icm("--exclude", "wall.jpg", **options, seed=3).exit_code == 0
    assert path.read_bytes() == before
    assert icm("--overwrite", **options).exit_code == 0
    assert path.read_bytes() != before


def test_retouched_trimap_is_not_replaced(icm: Icm, scene: Path) -> None:
    icm(trimap="also")
    path = scene / "out" / "wall.trimap.png"
    retouch(path)
    (scene / "out" / "wall.png").unlink()
    refused = icm(trimap="also")
    assert refused.exit_code == 2
    assert f"{path} was changed after icm wrote it" in refused.stderr
    assert (read(path) == 77).all()


def test_alpha_retouched_during_the_run_is_not_replaced(icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    icm(src=scene / "imgs" / "wall.jpg")
    during_the_run(monkeypatch, lambda: retouch(scene / "out" / "wall.png"))
    result = icm(src=scene / "imgs" / "wall.jpg", seed=3)
    assert result.exit_code == 1
    assert "wall.png was changed after icm wrote it" in result.stderr
    assert (read(scene / "out" / "wall.png") == 77).all()


def test_output_that_cannot_be_read_is_not_replaced(icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    icm()
    before, real = alphas(scene / "out"), ReopeningFile.__init__

    def open_file(self: ReopeningFile, path: Path) -> None:
        if path == scene / "out" / "wall.png":
            raise PermissionError(errno.EACCES, "Permission denied")
        real(self, path)

    monkeypatch.setattr(ReopeningFile, "__init__", open_file)
    planned = icm("--dry-run", seed=3)
    assert planned.exit_code == 1
    assert f"would fail: {scene}/imgs/wall.jpg: {scene}/out/wall.png cannot be read: Permission" in planned.stderr
    assert icm("--dry-run", "--overwrite", seed=3).exit_code == 0
    result = icm(seed=3)
    monkeypatch.undo()
    assert result.exit_code == 1, result.stderr
    assert f"{scene}/out/wall.png cannot be read: Permission denied" in result.stderr
    after = alphas(scene / "out")
    assert [name for name in before if after[name] == before[name]] == ["wall.png"]


STOPS: dict[str, tuple[int, str, Callable[[Path], dict[str, object]]]] = {
    "foreign file": (2, "is not an alpha of icm", lambda scene: put(scene / "out" / "wall.png", scene / "mask.png")),
    "weights": (3, "--weights is", lambda scene: {"model": None, "weights": scene / "imgs"}),
    "edges": (3, "are not on this machine", lambda _: {"edges": "vitmatte", "offline": ""}),
    "report folder": (3, "a file has the name of its folder", lambda scene: {"report": scene / "ref.png" / "r.csv"}),
    "output folder": (3, "a file has the name of its folder", lambda scene: {"out": scene / "ref.png" / "out"}),
    "truth": (2, "ground truth folder", lambda scene: {"gt": scene / "none"}),
    "device": (2, "--device is 'gpu'", lambda _: {"device": "gpu"}),
    "learning": (2, "--learn-steps", lambda _: {"learn_steps": 9}),
}


def put(path: Path, source: Path) -> dict[str, object]:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, path)
    return {}


@pytest.mark.parametrize("name", STOPS)
def test_dry_run_stops_where_the_run_stops(icm: Icm, scene: Path, name: str) -> None:
    code, message, prepare = STOPS[name]
    options = prepare(scene)
    flags = ["--offline"] if options.pop("offline", None) == "" else []
    before = alphas(scene)
    results = [icm(*flags, *extra, **options) for extra in (["--dry-run"], [])]  # type: ignore[arg-type]
    for result in results:
        assert result.exit_code == code, result.output
        assert message in result.stderr
    assert results[0].stderr == results[1].stderr
    assert alphas(scene) == before


def test_dry_run_finds_outputs_that_cannot_be_written(icm: Icm, scene: Path) -> None:
    shutil.copy(scene / "imgs" / "wall.jpg", scene / "imgs" / f"{'x' * 250}.jpg")
    put(scene / "out" / "sub", scene / "mask.png")  # a file instead of the folder
    for flags in (["--dry-run"], []):
        result = icm("--keep-suffix", *flags)
        assert result.exit_code == 1
        assert "deep.png: " in result.stderr
        assert "cannot be written: a file has the name of its folder" in result.stderr
        assert "cannot be written: File name too long; the file system does not accept this name" in result.stderr


def test_dry_run_counts_alphas(icm: Icm, scene: Path) -> None:
    assert "icm: 3 images: 3 new, 0 to be recomputed, 0 kept" in icm("--dry-run").stderr
    assert not (scene / "out").exists()
    icm(src=scene / "imgs" / "wall.jpg")
    icm("--overwrite", src=scene / "imgs" / "pad.0101.png", seed=5)
    before = alphas(scene / "out")
    result = icm("--dry-run")
    assert "icm: 3 images: 1 new, 1 to be recomputed, 1 kept, 0 that would fail" in result.stderr
    assert "icm: 3 images: 1 new, 2 to be recomputed, 0 kept" in icm("--dry-run", "--overwrite").stderr
    assert "icm: 3 images: 1 new, 0 to be recomputed, 2 kept" in icm("--dry-run", "--keep-existing").stderr
    assert alphas(scene / "out") == before


def test_alphas_without_source_are_counted(icm: Icm, scene: Path) -> None:
    """Every run with all sources gives a notice. Runs with a part of them, and other sources, do not count."""
    shutil.copy(scene / "imgs" / "sub" / "deep.png", scene / "imgs" / "café.png")
    assert icm(trimap="also").exit_code == 0
    copy_many(scene / "imgs" / "wall.jpg", scene / "more", 1)
    assert icm(src=scene / "more").exit_code == 0
    (scene / "out" / "notes.txt").write_text("")
    before = alphas(scene / "out")
    assert "without source" not in icm(trimap="also").stderr
    for name in ("sub/deep.png", "café.png"):
        (scene / "imgs" / name).unlink()
    expected = (
        f"icm: without source: 4 files of icm in {scene}/out, such as {scene}/out/café.png, whose images were removed "
        "or renamed; delete the files that you do not need"
    )
    assert expected in icm(trimap="also").stderr.splitlines()
    assert expected in icm("--dry-run").stderr.splitlines()
    for flags in (("--shard", "1/2"), ("--exclude", "wall*")):
        assert "without source" not in icm(*flags, trimap="also").stderr
    assert "without source" not in icm(src=scene / "imgs" / "wall.jpg", trimap="also").stderr
    assert alphas(scene / "out") == before


@pytest.mark.parametrize(("limit", "fails", "is_counted"), [(60, False, True), (60, True, False), (4, False, False)])
def test_other_files_in_the_output_folder_do_not_stop_a_run(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch, limit: int, fails: bool, is_counted: bool
) -> None:
    """If the drive does not answer, or after too many files, alphas without source are not counted."""
    assert icm().exit_code == 0
    (scene / "imgs" / "wall.jpg").unlink()
    copy_many(scene / "ref.png", scene / "out", 40)
    visited: list[Path] = []
    walk_files = resume.walk_files

    def walk(folder: Path, skipped: SkippedPaths) -> Iterator[Path]:
        for path in walk_files(folder, skipped):
            visited.append(path)
            yield path
        if fails:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(resume, "walk_files", walk)
    monkeypatch.setattr(resume, "MAX_OTHER_FILES", limit)
    result = icm()
    assert result.exit_code == 0
    assert ("without source: 1 file" in result.stderr) == is_counted
    assert (len(visited) > 40) == (limit > 40)


def test_sources_that_a_glob_does_not_match_exist(icm: Icm, scene: Path) -> None:
    """Also the pages of a file, and names that are not UTF-8. Pages that were removed from a file do not exist."""
    pages = [Image.fromarray(read(scene / "imgs" / "wall.jpg")[..., ::-1])] * 3
    pages[0].save(scene / "imgs" / "book.tif", save_all=True, append_images=pages[1:])
    shutil.copy(scene / "imgs" / "wall.jpg", scene / "imgs" / os.fsdecode(b"latin-\xe9.jpg"))
    assert icm().exit_code == 0
    for source in ("imgs", "imgs/*.tif", "imgs/**/*.png"):
        assert "without source" not in icm(src=scene / source).stderr
    pages[0].save(scene / "imgs" / "book.tif", save_all=True, append_images=pages[2:])
    assert "without source: 1 file of icm in" in icm().stderr


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EPERM, errno.EBUSY, errno.ENAMETOOLONG, errno.EROFS, errno.EIO, errno.ESTALE]
)
@pytest.mark.parametrize("step", ["mkdir", "open", "replace"])
def test_output_that_cannot_be_written_fails_alone(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: str
) -> None:
    """Whether its folder, its temporary file or its final name is refused."""
    monkeypatch.setattr("icm_cli.files.system_errors.RETRY_DELAYS_S", (0.01, 0.01))
    real = getattr(Path, step)
    folder = scene / "out" / "sub"

    def call(self: Path, *given: Any, **named: Any) -> Any:
        if (self == folder or folder in self.parents) and (step != "open" or "x" in given[0]):
            raise OSError(number, os.strerror(number))
        return real(self, *given, **named)

    monkeypatch.setattr(Path, step, call)
    result = icm(report=scene / "r.csv")
    assert result.exit_code == 1
    assert f"failed: {scene}/imgs/sub/deep.png: {scene}/out/sub/deep.png cannot be written: " in result.stderr
    assert os.strerror(number) in result.stderr
    assert sorted(alphas(scene / "out")) == ["pad.0101.png", "wall.png"]
    assert (scene / "r.csv").read_text().count(",done,") == 2


def test_transient_errors_of_writing_are_retried(icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icm_cli.files.system_errors.RETRY_DELAYS_S", (0.01, 0.01))
    real, failures = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        if target.name == "wall.png" and len(failures) < 2:
            failures.append(target)
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    assert icm().exit_code == 0
    assert len(failures) == 2
    assert len(alphas(scene / "out")) == 3


def test_source_that_disappears_after_its_alpha_fails_nothing(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_many(scene / "imgs" / "wall.jpg", scene / "many", 4)
    real = Predictor.matte_frames

    def matte(self: Predictor, *given: Any) -> Any:
        for path in (scene / "many").iterdir():
            if (scene / "out" / path.name).with_suffix(".png").exists():
                path.unlink()
        return real(self, *given)

    monkeypatch.setattr(Predictor, "matte_frames", matte)
    reports = [scene / f"r.{suffix}" for suffix in ("csv", "json", "html")]
    result = icm(src=scene / "many", report=reports, contact_sheet=scene / "c.png", workers=1)
    assert result.exit_code == 0, result.stderr
    assert len(alphas(scene / "out")) == 4
    assert len(list((scene / "many").iterdir())) < 4
    assert all(path.stat().st_size for path in (*reports, scene / "c.png"))
