"""Existing alphas: which are kept, which are recomputed, and what reports say about them."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import Icm, alphas, read

import icm_cli
from icm_cli.device import Device
from icm_cli.environment import __version__
from icm_cli.images.image_file import ImageFile
from icm_cli.images.writing import read_provenance
from icm_cli.matting import digest, jobs, resume
from icm_cli.matting import provenance as provenance_module
from icm_cli.matting.digest import code_fingerprint
from icm_cli.matting.provenance import CODE_KEY, DIGEST_KEY, RESULT_KEY, VERSION_KEY

SetVersion = Callable[..., None]


@pytest.fixture
def set_icm(monkeypatch: pytest.MonkeyPatch) -> SetVersion:
    """Return a function that changes the version or the code fingerprint of icm."""

    def change(version: str = __version__, code: str = "") -> None:
        for module in (resume, provenance_module, digest):
            monkeypatch.setattr(module, "__version__", version)
            monkeypatch.setattr(module, "code_fingerprint", (lambda: code) if code else code_fingerprint)

    return change


def notices(text: str) -> list[str]:
    return [line for line in text.splitlines() if "another version of icm" in line]


def statuses(report: Path) -> dict[str, tuple[str, str]]:
    """Return status and version of every image of a report by name."""
    images = json.loads(report.read_text())["images"]
    return {Path(image["name"]).name: (image["status"], image["made_by"]) for image in images}


@pytest.mark.parametrize(
    ("version", "code", "text"), [("0.1.9", "", "0.1.9"), (__version__, "other", f"{__version__} with other code")]
)
def test_alphas_of_another_version_are_recomputed_with_one_notice(
    icm: Icm, scene: Path, set_icm: SetVersion, version: str, code: str, text: str
) -> None:
    set_icm(version, code)
    assert not notices(icm().stderr)
    before = alphas(scene / "out")
    set_icm()
    result = icm(report=scene / "r.json")
    assert notices(result.stderr) == [
        f"icm: recomputing 3 alphas made by another version of icm ({text}: 3); --keep-existing prevents this"
    ]
    assert set(statuses(scene / "r.json").values()) == {("done", __version__)}
    assert alphas(scene / "out") != before
    assert not notices(icm().stderr)


def test_keep_existing_keeps_alphas_of_any_version_and_reports_it(icm: Icm, scene: Path, set_icm: SetVersion) -> None:
    set_icm("0.1.9")
    icm()
    before = alphas(scene / "out")
    set_icm()
    shutil.copy(scene / "imgs" / "wall.jpg", scene / "imgs" / "new.jpg")
    result = icm("--keep-existing", report=[scene / "r.json", scene / "r.csv"], seed=7)
    assert result.exit_code == 0
    assert notices(result.stderr) == ["icm: kept 3 alphas made by another version of icm (0.1.9: 3)"]
    after = alphas(scene / "out")
    assert after.pop("new.png")
    assert after == before
    expected = {name: ("kept", "0.1.9") for name in ("wall.jpg", "pad.0101.png", "deep.png")}
    assert statuses(scene / "r.json") == {**expected, "new.jpg": ("done", __version__)}
    rows = {Path(row["source"]).name: row for row in csv.DictReader((scene / "r.csv").read_text().splitlines())}
    assert rows["wall.jpg"]["made_by"] == "0.1.9"
    assert float(rows["wall.jpg"]["foreground"]) > 0
    assert "kept, made by icm 0.1.9" in result.stdout


def test_keep_existing_keeps_alphas_without_trimap_of_other_settings(icm: Icm, scene: Path) -> None:
    assert icm().exit_code == 0
    before = alphas(scene / "out")
    (scene / "out" / "wall.png").unlink()
    flags = ("--keep-existing", "--trimap", "also")
    assert "1 new, 0 to be recomputed, 2 kept" in icm(*flags, "--dry-run").stderr
    assert icm(*flags).exit_code == 0
    after = alphas(scene / "out")
    assert {name: after[name] for name in before if name != "wall.png"} == {
        name: content for name, content in before.items() if name != "wall.png"
    }
    assert sorted(set(after) - set(before)) == ["wall.trimap.png"]
    for settings in ((), ("--seed", "5")):  # it was made with a trimap, also if other settings have changed
        (scene / "out" / "wall.trimap.png").unlink()
        assert icm(*flags, *settings).exit_code == 0
        assert sorted(alphas(scene / "out")) == sorted(after)


def test_keep_existing_recomputes_alphas_of_changed_sources_only(icm: Icm, scene: Path) -> None:
    icm()
    before = alphas(scene / "out")
    os.utime(scene / "imgs" / "wall.jpg", ns=(1, 1))
    changed = scene / "imgs" / "sub" / "deep.png"
    cv2.imwrite(str(changed), 255 - read(changed))
    assert icm("--keep-existing", report=scene / "r.json", seed=7).exit_code == 0
    assert {name: status for name, (status, _) in statuses(scene / "r.json").items()} == {
        "wall.jpg": "kept",  # its content is the same
        "pad.0101.png": "kept",
        "deep.png": "done",
    }
    assert alphas(scene / "out")["wall.png"] == before["wall.png"]


def test_touched_source_is_read_only_once(icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its new time is recorded next to the alphas, which do not change."""
    read_files: list[str] = []
    real = ImageFile.content_digest

    def content_digest(file: ImageFile) -> str:
        read_files.append(file.path.name)
        return real(file)

    def kept_by_reading(*flags: str) -> list[str]:
        """Run again as a new process would, and return the sources that were read completely."""
        jobs._digests.clear()
        read_files.clear()
        assert icm(*flags, report=scene / "r.json").exit_code == 0
        assert "--dry-run" in flags or {status for status, _ in statuses(scene / "r.json").values()} == {"kept"}
        return sorted(read_files)

    monkeypatch.setattr(ImageFile, "content_digest", content_digest)
    assert icm().exit_code == 0
    before = alphas(scene / "out")
    os.utime(scene / "imgs" / "wall.jpg", ns=(1, 1))
    assert kept_by_reading("--dry-run") == ["wall.jpg"]
    assert kept_by_reading() == ["wall.jpg"]
    assert kept_by_reading() == kept_by_reading("--dry-run") == []
    os.utime(scene / "imgs" / "sub" / "deep.png", ns=(1, 1))
    assert kept_by_reading("--shard", "1/1") == ["deep.png"]
    assert kept_by_reading() == []
    assert alphas(scene / "out") == before
    states = scene / "out" / ".icm" / "source-states.json"
    states.write_text("[")
    assert kept_by_reading() == ["deep.png", "wall.jpg"]
    changed = scene / "imgs" / "wall.jpg"
    cv2.imwrite(str(changed), 255 - read(changed))
    os.utime(changed, ns=(1, 1))
    assert icm(report=scene / "r.json").exit_code == 0
    assert statuses(scene / "r.json")["wall.jpg"][0] == "done"


def test_notices_and_dry_run_name_the_options_that_changed(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    garbage, checkpoint = scene / "garbage.png", Path(icm_cli.__file__).parent / "weights" / "lite.safetensors"
    cv2.imwrite(str(garbage), np.zeros((133, 200), np.uint8))
    assert icm("--include", "pad*").exit_code == 0
    for changed, flags in {
        "--invert": ["--invert"],
        "references": ["--not-ref", str(scene / "imgs" / "wall.jpg")],
        "--edges": ["--edges", "closed-form"],
        "--checkpoint and --model and --shot": ["--model", "lite", "--checkpoint", str(checkpoint), "--shot"],
        "--dtype and --exposure": ["--dtype", "bfloat16", "--exposure", "1"],
        "--seed and references": ["--seed", "7", "--mask-label", "255"],
    }.items():
        planned = icm("--dry-run", "--include", "pad*", *flags)
        assert planned.exit_code == 0, planned.output
        assert f"pad.0101.png (recomputed: {changed} changed)" in planned.stdout
    with monkeypatch.context() as other_device:
        other_device.setattr(Device, "dtype_name", "float16")
        assert "recomputed: --device changed" in icm("--dry-run", "--include", "pad*").stdout
    pad = scene / "out" / "pad.0101.png"
    made = f"1 alpha made with other settings (--seed, keep matte), such as {pad}"
    options = {"seed": 7, "keep": garbage}
    assert f"kept {made}" in icm("--keep-existing", "--include", "pad*", **options).stderr.replace("\n", " ")
    done = icm("--include", "pad*", **options)
    assert f"recomputing {made}; --keep-existing prevents this" in done.stderr.replace("\n", " ")
    assert "other settings" not in icm("--dry-run", "--include", "pad*", **options).stderr


def test_keep_existing_still_refuses_files_of_others(icm: Icm, scene: Path) -> None:
    icm()
    shutil.copy(scene / "imgs" / "wall.jpg", scene / "foreign.jpg")
    cv2.imwrite(str(scene / "out" / "wall.png"), read(scene / "out" / "wall.png"))
    result = icm("--keep-existing")
    assert result.exit_code == 2
    assert "is not an alpha of icm, or another program removed its metadata" in result.stderr


def test_keep_existing_and_overwrite_exclude_each_other(icm: Icm) -> None:
    result = icm("--keep-existing", "--overwrite")
    assert result.exit_code == 2
    assert "--overwrite recomputes existing alphas and --keep-existing keeps them" in result.stderr


def test_alphas_without_a_version_are_of_icm_0_1(icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = provenance_module.make_provenance

    def without_version(*arguments: object) -> dict[str, str]:
        provenance = made(*arguments)  # type: ignore[arg-type]
        return {key: value for key, value in provenance.items() if key not in (VERSION_KEY, CODE_KEY)}

    monkeypatch.setattr("icm_cli.matting.engine.make_provenance", without_version)
    icm()
    monkeypatch.undo()
    icm("--keep-existing", report=scene / "r.json")
    assert {made_by for _, made_by in statuses(scene / "r.json").values()} == {"0.1"}
    assert "(0.1: 3)" in notices(icm(seed=1).stderr)[0]


@pytest.mark.parametrize("details", ['{"sharpness": 0.5}', "{", "[1]", '{"quality": "x"}', "[" * 100_000])
def test_details_that_are_damaged_or_of_another_version_are_ignored(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch, details: str
) -> None:
    made = provenance_module.make_provenance

    def with_other(*arguments: object) -> dict[str, str]:
        return {**made(*arguments), RESULT_KEY: details}  # type: ignore[arg-type]

    monkeypatch.setattr("icm_cli.matting.engine.make_provenance", with_other)
    icm()
    monkeypatch.undo()
    assert icm("--keep-existing", report=[scene / "r.json", scene / "r.html"]).exit_code == 0
    assert {status for status, _ in statuses(scene / "r.json").values()} == {"kept"}


@pytest.mark.parametrize("format_", ["png", "tiff", "exr"])
def test_every_format_records_version_code_and_digest(icm: Icm, scene: Path, format_: str) -> None:
    assert icm(format=format_, report=scene / "r.json").exit_code == 0
    (path,) = (scene / "out").glob("wall.*")
    provenance = read_provenance(path)
    assert provenance is not None
    assert provenance[VERSION_KEY] == __version__
    assert provenance[CODE_KEY] == code_fingerprint()
    assert provenance[DIGEST_KEY] == json.loads((scene / "r.json").read_text())["settings"]["digest"]


def test_a_frame_can_be_added_in_the_middle_of_a_shot(icm: Icm, scene: Path, set_icm: SetVersion) -> None:
    """The kept frames do not change, and the new one continues from them."""
    frames = scene / "frames"
    frames.mkdir()
    image = read(scene / "imgs" / "wall.jpg")
    for number in (1, 2, 4):
        cv2.imwrite(str(frames / f"a.{number:04d}.png"), image)
    set_icm("0.1.9")
    assert icm("--shot", src=frames).exit_code == 0
    before = alphas(scene / "out")
    set_icm()
    cv2.imwrite(str(frames / "a.0003.png"), image)
    assert icm("--shot", "--keep-existing", src=frames, report=scene / "r.json").exit_code == 0
    after = alphas(scene / "out")
    assert {name: data for name, data in after.items() if name != "a.0003.png"} == before
    assert statuses(scene / "r.json")["a.0003.png"] == ("done", __version__)
    assert statuses(scene / "r.json")["a.0004.png"] == ("kept", "0.1.9")
    assert icm("--shot", src=frames, report=scene / "r.json").exit_code == 0  # without it all are recomputed
    assert {status for status, _ in statuses(scene / "r.json").values()} == {"done"}
