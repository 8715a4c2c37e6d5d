"""Bad input and failures: exit code, one message, no lost and no truncated file."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from conftest import Icm, alphas, arguments, copy_many, output_files, read
from test_formats import written

from icm_cli.errors import OutputError
from icm_cli.files.atomic_writes import temporary_name
from icm_cli.images.writing import OutputFormat, write_alpha
from icm_cli.matting.predictor import Predictor
from icm_cli.model.contracts import Features
from icm_cli.model.lite.efficientnet import EfficientNetLite


def sentence(stderr: str) -> str:
    """Return the only line of the error message."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("icm: ")
    return lines[0]


LONG = 16
"""Number of images of a run that is interrupted."""
Damage = Callable[[Path], dict[str, object]]


def wrong_shape(scene: Path) -> dict[str, object]:
    cv2.imwrite(str(scene / "m.png"), np.pad(read(scene / "mask.png"), ((0, 0), (0, 90))))
    return {"mask": scene / "m.png"}


def flat_mask(value: int) -> Damage:
    def damage(scene: Path) -> dict[str, object]:
        cv2.imwrite(str(scene / "m.png"), np.full_like(read(scene / "mask.png"), value))
        return {"mask": scene / "m.png"}

    return damage


def collision(scene: Path) -> dict[str, object]:
    shutil.copy(scene / "imgs" / "wall.jpg", scene / "imgs" / "wall.jpeg")
    return {}


def trimap_collision(scene: Path) -> dict[str, object]:
    shutil.copy(scene / "imgs" / "wall.jpg", scene / "imgs" / "wall.trimap.jpg")
    return {"trimap": "also"}


def over_the_mask(scene: Path) -> dict[str, object]:
    shutil.copy(scene / "imgs" / "wall.jpg", scene / "imgs" / "mask.jpg")
    return {"out": scene}


def over_a_truth(scene: Path) -> dict[str, object]:
    (scene / "gt").mkdir()
    shutil.copy(scene / "mask.png", scene / "gt" / "wall.png")
    return {"gt": scene / "gt", "out": scene / "gt"}


def nothing_there(scene: Path) -> dict[str, object]:
    (scene / "empty").mkdir()
    return {"src": scene / "empty"}


def file_at(name: str, content: bytes, option: str) -> Damage:
    def damage(scene: Path) -> dict[str, object]:
        (scene / name).parent.mkdir(exist_ok=True)
        (scene / name).write_bytes(content)
        return {option: scene / name.split("/")[0]}

    return damage


def option(**options: object) -> Damage:
    return lambda scene: {
        name: [scene / one[1:] if str(one).startswith("@") else one for one in value]
        if isinstance(value, list)
        else scene / value[1:]
        if isinstance(value, str) and value.startswith("@")
        else value
        for name, value in options.items()
    }


BAD_CALLS: dict[str, tuple[int, str, Damage]] = {
    "missing ref": (2, "none.png does not exist", option(ref="@none.png")),
    "missing mask": (2, "none.png does not exist", option(mask="@none.png")),
    "missing src": (2, "does not exist", option(src="@none")),
    "torn ref": (2, "empty", file_at("torn.png", b"", "ref")),
    "mask is text": (2, "not an image", file_at("m.png", b"hello", "mask")),
    "counts differ": (2, "2 references but 1 mask", option(ref=["@ref.png", "@ref.png"])),
    "no mask, no cut-out": (2, "not an RGBA cut-out", option(mask=None)),
    "empty mask": (2, "is empty", flat_mask(0)),
    "full mask": (2, "is full", flat_mask(255)),
    "mask of another shape": (2, "expected the same aspect ratio", wrong_shape),
    "output is source": (2, "also the output folder", option(out="@imgs")),
    "collision": (2, "be written by several images", collision),
    "no images": (2, "no images were found", nothing_there),
    "include matches none": (2, "--include 'x*' matches no image in", option(include="x*")),
    "a picture as the output": (2, "is named like an image", option(out="@pm/foo.exr")),
    "output over the mask": (2, "mask.png would be written over a reference", over_the_mask),
    "output over a truth": (2, "wall.png would be written over a ground truth", over_a_truth),
    "trimap over an alpha": (2, "each: the trimap of ", trimap_collision),
    "report suffix": (2, "expected one of .csv, .json, .html", option(report="@r.txt")),
    "contact sheet suffix": (2, "is not a .png file", option(contact_sheet="@c.jpg")),
    "report over a source": (2, "is an input or an alpha of this run", option(contact_sheet="@imgs/pad.0101.png")),
    "sheet over the mask": (2, "is an input or an alpha of this run", option(contact_sheet="@mask.png")),
    "sheet over an alpha": (2, "is an input or an alpha of this run", option(contact_sheet="@out/wall.png")),
    "empty source": (2, "--src is ''; expected a path", option(src="")),
    "empty output": (2, "--out is ''; expected a path", option(out="")),
    "batch size": (2, "--batch-size is 'many'", option(batch_size="many")),
    "batch size 0": (2, "--batch-size is 0", option(batch_size=0)),
    "gt missing": (2, "ground truth folder", option(gt="@none")),
    "gt matches nothing": (2, "no alpha with the name of an image", file_at("gt/other.png", b"", "gt")),
    "unknown model": (2, "Did you mean 'lite'", option(model="light")),
    "config missing": (3, "cannot be read", option(model="@none.yaml")),
    "config not yaml": (3, "is not YAML", file_at("m.yaml", b"a: [", "model")),
    "config bad date": (3, "is not YAML", file_at("m.yaml", b"a: 2026-13-45", "model")),
    "config duplicate section": (
        3,
        "the key 'head' twice, in line 1 and in line 2",
        file_at("m.yaml", b"head: {name: training-free}\nhead: {name: token-match}\n", "model"),
    ),
    "config duplicate nested key": (
        3,
        "the key 'name' twice, in line 2 and in line 4",
        file_at("m.yaml", b'head:\n  name: a\n  other: 1\n  "name": b\n', "model"),
    ),
    "unknown key": (3, "Did you mean 'backbone'", file_at("m.yaml", b"backbon: {name: x}", "model")),
    "unknown nested key": (
        3,
        "Did you mean 'long_side_px'",
        file_at("m.yaml", b"backbone: {name: efficientnet-lite, long_side: 224}\nhead: {name: training-free}", "model"),
    ),
    "wrong type": (
        3,
        "long_side_px is 'big'; expected an integer",
        file_at(
            "m.yaml", b"backbone: {name: efficientnet-lite, long_side_px: big}\nhead: {name: training-free}", "model"
        ),
    ),
    "impossible pair": (
        3,
        "needs",
        file_at("m.yaml", b"backbone: {name: efficientnet-lite}\nhead: {name: detail}", "model"),
    ),
    "wrong checkpoint": (3, "c.safetensors", file_at("c.safetensors", b"<html>not found</html>", "checkpoint")),
    "missing checkpoint": (3, "none.safetensors", option(checkpoint="@none.safetensors", model=None)),
    "no trained head": (3, "--checkpoint", option(model="icm-sd21")),
    "absent weights": (3, "none", option(model="sd21-training-free", weights="@none")),
    "weights that do not apply": (3, "--weights", option(weights="@imgs")),
    "absent device": (3, "this machine has no device", option(device="cuda:77")),
    "unknown device": (2, "--device is 'gpu'; expected auto, cpu, cuda", option(device="gpu")),
    "unknown edges": (2, "--edges is 'sharp'; expected model, closed-form or vitmatte", option(edges="sharp")),
    "unknown dtype": (2, "--dtype is 'flaot16'; expected auto, float32, float16 or bfloat16", option(dtype="flaot16")),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_invalid_call_prints_one_message_and_writes_nothing(icm: Icm, scene: Path, name: str) -> None:
    code, message, damage = BAD_CALLS[name]
    result = icm(**damage(scene))  # type: ignore[arg-type]
    assert message in sentence(result.stderr)
    assert result.exit_code == code
    assert not any(path.is_file() for path in (scene / "out").rglob("*"))


@pytest.mark.parametrize("line", [["--bogus"], ["--workers", "0"], ["--seed", "x"]])
def test_invalid_option_exits_with_code_2(icm: Icm, line: list[str]) -> None:
    assert icm(*line).exit_code == 2


def spoil(scene: Path) -> set[str]:
    """Write three images that cannot be read."""
    wall = (scene / "imgs" / "wall.jpg").read_bytes()
    (scene / "imgs" / "cut.jpg").write_bytes(wall[: len(wall) // 2])
    (scene / "imgs" / "zero.jpg").write_bytes(b"")
    (scene / "imgs" / "text.png").write_text("not an image")
    return {"cut.jpg", "zero.jpg", "text.png"}


def test_bad_images_are_reported_and_others_are_matted(icm: Icm, scene: Path) -> None:
    spoil(scene)
    result = icm()
    assert result.exit_code == 1
    assert sorted(alphas(scene / "out")) == ["pad.0101.png", "sub/deep.png", "wall.png"]
    for name, reason in {"cut.jpg": "cut short", "zero.jpg": "0 bytes", "text.png": "not an image"}.items():
        assert any(name in line and reason in line for line in result.stderr.splitlines()), result.stderr


def test_pipes_link_loops_and_unusual_names_affect_no_other_image(icm: Icm, scene: Path) -> None:
    os.mkfifo(scene / "imgs" / "pipe.png")
    (scene / "imgs" / "loop.png").symlink_to(scene / "imgs" / "loop.png")
    shutil.copy(scene / "imgs" / "wall.jpg", os.fsdecode(os.fsencode(scene / "imgs") + b"/odd\xff.jpg"))
    result = icm("--quiet", report=scene / "r.csv")
    assert result.exit_code == 1
    report = (scene / "r.csv").read_bytes()
    assert report.count(b",done,") == 4
    assert report.count(b",failed,") == 2
    assert b"is a pipe; expected an image file" in report


def test_fail_fast_stops_at_the_first_failure(icm: Icm, scene: Path) -> None:
    copy_many(scene / "imgs" / "wall.jpg", scene / "many", 12)
    (scene / "many" / "0000.jpg").write_bytes(b"")
    result = icm("--fail-fast", src=scene / "many", report=scene / "r.csv")
    assert result.exit_code == 1
    report = (scene / "r.csv").read_text()
    assert report.count("not reached") > 0
    assert report.count("\n") == 13


def test_missing_listed_file_fails_alone(icm: Icm, scene: Path) -> None:
    (scene / "list.txt").write_text(f"{scene}/imgs/wall.jpg\n{scene}/imgs/gone.jpg\n")
    result = icm(src=scene / "list.txt", root=scene / "imgs")
    assert result.exit_code == 1
    assert list(alphas(scene / "out")) == ["wall.png"]


def test_invalid_output_folder_is_an_error(icm: Icm, scene: Path) -> None:
    (scene / "file").write_text("in the way")
    result = icm(out=scene / "file" / "out")
    assert result.exit_code == 3
    assert "cannot be written" in sentence(result.stderr)


def test_full_disk_keeps_complete_alphas(icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_many(scene / "imgs" / "wall.jpg", scene / "many", 6)
    synced = []
    real = os.fsync

    def full_after_three(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 3:  # the record of the run, and two alphas
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_three)
    result = icm(src=scene / "many", workers=1)
    assert result.exit_code == 3
    assert "no space left" in result.stderr
    made = alphas(scene / "out")
    assert len(made) == 2
    monkeypatch.undo()
    assert icm(src=scene / "many").exit_code == 0
    completed = alphas(scene / "out")
    assert len(completed) == 6
    assert {name: completed[name] for name in made} == made


@pytest.mark.parametrize("is_from_the_start", [True, False])
def test_read_only_output_folder_is_an_error(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch, is_from_the_start: bool
) -> None:
    read_only = OSError(errno.EROFS, "Read-only file system")
    if is_from_the_start:
        monkeypatch.setattr(Path, "touch", Mock(side_effect=read_only))
    else:  # from the second image on

        def fail(_: int) -> None:
            if list((scene / "out").rglob("*.png")):
                monkeypatch.setattr(Path, "touch", Mock(side_effect=read_only))
                raise read_only

        monkeypatch.setattr(os, "fsync", fail)
    result = icm("--quiet", workers=1)
    assert result.exit_code == 3
    assert "cannot be written: Read-only file system; give an output location" in result.stderr.splitlines()[-1]
    assert len(alphas(scene / "out")) == (0 if is_from_the_start else 1)


def test_source_deleted_during_the_run_fails_alone(icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_many(scene / "imgs" / "wall.jpg", scene / "many", 9)
    real = Predictor.matte_frames

    def removing(self: Predictor, frames: list[object], reference: object) -> object:
        (scene / "many" / "0008.jpg").unlink(missing_ok=True)
        return real(self, frames, reference)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "matte_frames", removing)
    result = icm(src=scene / "many", workers=1)
    assert result.exit_code == 1
    assert f"failed: {scene}/many/0008.jpg: does not exist; check the path" in result.stderr
    assert len(alphas(scene / "out")) == 8


def test_lost_device_keeps_complete_alphas(icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_many(scene / "imgs" / "wall.jpg", scene / "many", 6)
    real, seen = Predictor.matte_frames, []

    def lost_at_the_third(self: Predictor, frames: list[object], reference: object) -> object:
        seen.append(frames)
        if len(seen) > 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")
        return real(self, frames, reference)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "matte_frames", lost_at_the_third)
    result = icm("--quiet", src=scene / "many", report=scene / "r.csv")
    assert result.exit_code == 3
    message = sentence(result.stderr)
    assert "device cpu was lost: CUDA error: an illegal memory access was encountered; all alphas" in message
    assert len(alphas(scene / "out")) == 2
    assert (scene / "r.csv").read_text().count(",not reached,") == 4
    monkeypatch.undo()
    assert icm(src=scene / "many").exit_code == 0
    assert len(alphas(scene / "out")) == 6


def test_out_of_memory_halves_the_batch_size(icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_many(scene / "imgs" / "wall.jpg", scene / "many", 9)
    sizes = []
    real = Predictor.matte_frames

    def little_memory(self: Predictor, frames: list[object], reference: object) -> object:
        sizes.append(len(frames))
        if len(frames) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, frames, reference)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "matte_frames", little_memory)
    result = icm(src=scene / "many", batch_size=8)
    assert result.exit_code == 0, result.output
    assert sizes[:3] == [8, 4, 2]
    assert max(sizes[2:]) == 2
    assert len(alphas(scene / "out")) == 9


def test_image_that_does_not_fit_in_memory_fails_alone(icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Predictor.matte_frames

    def tight(self: Predictor, frames: list[object], reference: object) -> object:
        if frames[0].rgb.shape[0] > frames[0].rgb.shape[1]:  # type: ignore[attr-defined]
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(self, frames, reference)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "matte_frames", tight)
    result = icm()
    assert result.exit_code == 1
    assert "ran out of memory" in result.stderr
    assert sorted(alphas(scene / "out")) == ["pad.0101.png", "sub/deep.png"]


def test_other_model_errors_are_raised(icm: Icm, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Predictor, "matte_frames", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        icm()


@pytest.fixture
def long_run(scene: Path, small_model: Path) -> tuple[list[str], Path]:
    """Return a command that mattes LONG images, and its output folder."""
    copy_many(scene / "imgs" / "wall.jpg", scene / "many", LONG)
    options = {
        "ref": scene / "ref.png",
        "mask": scene / "mask.png",
        "src": scene / "many",
        "out": scene / "out",
        "model": small_model,
        "report": scene / "r.csv",
    }
    return [sys.executable, "-m", "icm_cli.cli", "matte", *arguments(options)], scene / "out"


def start_and_stop(line: list[str], out: Path, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Send the signal when the third alpha exists."""
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(list(out.glob("*.png"))) < 3 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    output, errors = process.communicate(timeout=100)
    return subprocess.CompletedProcess(line, process.returncode, output, errors)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_lets_current_writes_finish(
    long_run: tuple[list[str], Path], scene: Path, number: signal.Signals, code: int
) -> None:
    line, out = long_run
    ended = start_and_stop(line, out, number)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "interrupted" in ended.stderr
    files = output_files(out)
    assert 3 <= len(files) < LONG
    assert all(path.suffix == ".png" and read(path) is not None for path in files)
    report = (scene / "r.csv").read_text()
    assert report.count(",done,") == len(files)
    assert report.count(",not reached,") == LONG - len(files)


@pytest.mark.slow
def test_killed_run_is_completed_with_equal_bytes(long_run: tuple[list[str], Path]) -> None:
    line, out = long_run
    assert start_and_stop(line, out, signal.SIGKILL).returncode == -signal.SIGKILL
    early = alphas(out)
    name = temporary_name().replace(f"-{os.getpid()}-", "-999999999-")
    (out / name).write_bytes(b"left behind")
    again = subprocess.run(line, capture_output=True, text=True, timeout=100, check=False)
    assert again.returncode == 0, again.stderr
    completed = alphas(out)
    assert sorted(completed) == [f"{number:04d}.png" for number in range(LONG)]
    assert {name: completed[name] for name in early if name.endswith(".png")}.items() <= completed.items()
    shutil.rmtree(out)
    subprocess.run(line, capture_output=True, timeout=100, check=True)
    assert alphas(out) == completed


@pytest.mark.slow
def test_two_runs_can_share_an_output_folder(long_run: tuple[list[str], Path]) -> None:
    line, out = long_run
    runs = [subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    assert [run.wait(100) for run in runs] == [0, 0], [run.stderr.read() for run in runs if run.stderr]
    assert sorted(alphas(out)) == [f"{number:04d}.png" for number in range(LONG)]
    for run in runs:
        assert run.stderr
        run.stderr.close()


def test_openexr_write_error_names_the_output(icm: Icm, scene: Path) -> None:
    """The file size limit is 500 bytes, so that the writes of OpenEXR fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        result = icm("--quiet", src=scene / "imgs" / "wall.jpg", format="exr")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(
        f"icm: failed: {scene}/imgs/wall.jpg: {scene}/out/wall.exr cannot be written: Failed OpenEXR"
    )
    assert last.endswith("failed; give an output location that you can write to")
    assert last.count("OpenEXR") == 1
    assert ".icm-" not in result.output


@pytest.mark.parametrize("text", ["Cannot write: No space left on device.", "write error"])
def test_full_disk_is_reported_for_exr_and_tiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    broken = Mock(open=Mock(return_value=False), geterror=Mock(return_value=f"{text}\n" * 7))
    monkeypatch.setattr("OpenImageIO.ImageOutput", Mock(create=Mock(return_value=broken)))
    monkeypatch.setattr(shutil, "disk_usage", Mock(return_value=Mock(free=0)))
    with pytest.raises(
        OutputError, match=r"^\S*/a.exr cannot be written: no space left on the device; free some space and"
    ):
        write_alpha(tmp_path / "a.exr", np.zeros((9, 9), np.float32), {}, OutputFormat(format="exr"))


def test_name_with_newline_is_printed_on_one_line(icm: Icm, scene: Path) -> None:
    shutil.copy(scene / "imgs" / "wall.jpg", scene / "imgs" / "two\nlines.jpg")
    (scene / "imgs" / "bad\nname.jpg").write_bytes(b"")
    result = icm()
    assert result.exit_code == 1
    assert sum("two\\nlines.jpg" in line for line in result.stderr.splitlines()) == 1
    assert not any(line.startswith(("lines", "name")) for line in result.output.splitlines())
    dry = icm("--dry-run")
    assert "bad\\nname.jpg: is empty (0 bytes)" in dry.stderr
    plan = dry.stdout.splitlines()
    assert len(plan) == 4
    assert all(" -> " in line for line in plan)


def test_list_may_name_missing_files(icm: Icm, scene: Path) -> None:
    (scene / "list.txt").write_text(f"{scene}/imgs/wall.jpg\n{scene}/imgs/none.jpg\n")
    result = icm(src=scene / "list.txt", root=scene)
    assert result.exit_code == 1
    assert f"failed: {scene}/imgs/none.jpg: does not exist; check the path" in result.stderr


def test_folder_at_the_output_path_is_an_error(icm: Icm, scene: Path) -> None:
    (scene / "out" / "wall.png").mkdir(parents=True)
    refused = icm()
    assert refused.exit_code == 2
    assert "wall.png" in refused.stderr
    assert list((scene / "out").rglob("*")) == [scene / "out" / "wall.png"], "nothing may be written"


def test_name_collisions_of_a_template_are_reported(icm: Icm) -> None:
    refused = icm("--name", "matte")
    assert refused.exit_code == 2
    assert "use more of {stem}, {frame} and {suffix} in --name" in refused.stderr
    assert "--keep-suffix" not in refused.stderr


def test_empty_model_file_is_reported_as_empty(icm: Icm, scene: Path) -> None:
    (scene / "empty.yaml").write_text("")
    refused = icm(model=scene / "empty.yaml")
    assert refused.exit_code == 3
    assert "empty.yaml is empty; expected keys with values" in refused.stderr


@pytest.mark.parametrize("form", ["png", "exr", "tiff"])
def test_image_not_made_by_icm_is_not_overwritten(icm: Icm, scene: Path, form: str) -> None:
    out = scene / "out" / f"wall.{'tif' if form == 'tiff' else form}"
    assert icm("--format", form, src=scene / "imgs" / "wall.jpg").exit_code == 0
    made = out.read_bytes()
    written(out, np.full((20, 30, 1), 0.5, np.float32), "uint8" if form == "png" else "float")
    retouched = out.read_bytes()
    refused = icm("--format", form)
    assert refused.exit_code == 2
    assert f"{out} is not an alpha of icm" in refused.stderr
    assert out.read_bytes() == retouched
    assert icm("--format", form, "--overwrite", src=scene / "imgs" / "wall.jpg").exit_code == 0
    assert out.read_bytes() == made
    out.write_bytes(made[: len(made) // 2])  # damaged alphas are recomputed
    assert icm("--format", form, src=scene / "imgs" / "wall.jpg").exit_code == 0
    assert out.read_bytes() == made


@pytest.mark.parametrize(("side", "code"), [("target", 1), ("reference", 3)])
def test_features_that_are_not_finite_are_reported(
    icm: Icm, scene: Path, side: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = f"{side}_features"
    seen = getattr(EfficientNetLite, side)

    def broken(self: EfficientNetLite, *given: object) -> Features:
        features = seen(self, *given)
        return replace(features, correspondence_features=features.correspondence_features * float("nan"))

    monkeypatch.setattr(EfficientNetLite, side, broken)
    ended = icm(src=scene / "imgs" / "wall.jpg")
    assert ended.exit_code == code
    assert "finite" in ended.stderr
    assert "--dtype float32" in ended.stderr
