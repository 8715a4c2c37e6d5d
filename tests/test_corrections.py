"""Hints, garbage and keep mattes and negative examples in one run, through the real command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import COMPOSITES, Icm, alphas, read
from test_formats import linear
from test_windows import write_cropped_exr
from typer.testing import CliRunner

import icm_cli
from icm_cli.guidance.annotations import read_hints

GARBAGE = np.s_[20:60, 20:80]
KEEP = np.s_[50:70, 60:90]
"""Both mattes contain rows 50 to 59 and columns 60 to 79."""


def write_shapes(path: Path, **points: Any) -> Path:
    """Write an annotation of labelme: by label, one point or the corners of a polygon."""
    shapes = [
        {"label": label, "points": corners, "shape_type": "point" if len(corners) == 1 else "polygon"}
        for label, corners in points.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"shapes": shapes}))
    return path


def paint(path: Path, size: tuple[int, int], area: Any) -> Path:
    image = np.zeros(size, np.uint8)
    image[area] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)
    return path


@pytest.mark.slow
def test_exr_frames_with_all_corrections(icm: Icm, scene: Path) -> None:
    """The data window begins at x 20, y 10 of the display window, in whose coordinates all corrections are."""
    rgb = linear(read(scene / "imgs" / "wall.jpg")[..., ::-1])
    size = rgb.shape[:2]
    for number in (1001, 1002):
        write_cropped_exr(scene / "plates" / f"a.{number}.exr", rgb, (20, 10, 100, 140), (16, -8))
        paint(scene / "mattes" / f"garbage.{number}.png", size, GARBAGE)
    shutil.copy(scene / "imgs" / "pad.0101.png", scene / "other.png")
    write_shapes(scene / "hints" / "a.1002.json", fg=[[30, 30]], bg=[[85, 65]], drop=[[100, 90], [110, 90], [110, 95]])
    options: dict[str, Any] = {
        "src": scene / "plates" / "a.####.exr",
        "garbage": scene / "mattes" / "garbage.####.png",
        "keep": paint(scene / "keep.png", size, KEEP),
        "not_ref": scene / "other.png",
        "report": scene / "r.json",
    }

    def matte(out: str) -> dict[str, str]:
        ended = icm(**options, hints=scene / "hints", out=scene / out)
        assert ended.exit_code == 0, ended.output
        return {each["name"]: each["status"] for each in json.loads((scene / "r.json").read_text())["images"]}

    assert set(matte("out").values()) == {"done"}
    plain, hinted = (read(scene / "out" / f"a.{number}.png") for number in (1001, 1002))
    assert plain.shape == hinted.shape == size
    assert (plain[KEEP] == 255).all()  # also where the garbage matte is white
    assert not plain[20:50, 20:80].any()
    assert hinted[30, 30] > 127 > hinted[65, 85]  # a hint wins over both mattes
    assert hinted[91, 107] == 0
    (scene / "hints" / "a.1002.json").unlink()
    assert matte("out") == {"a.1001.exr": "kept", "a.1002.exr": "done"}
    assert (read(scene / "out" / "a.1002.png") == plain).all()
    options["not_ref"] = None
    assert set(matte("out").values()) == {"done"}


@pytest.mark.slow
def test_command_predictor_and_session_give_the_same_bytes_for_the_demo(tmp_path: Path) -> None:
    from icm_cli.cli import app

    ref, mask, image = COMPOSITES / "ref.jpg", COMPOSITES / "mask.png", COMPOSITES / "imgs" / "cat.jpg"
    path = write_shapes(
        tmp_path / "hints" / "cat.json", fg=[[700, 500]], bg=[[300, 250]], keep=[[0, 0], [60, 0], [60, 40], [0, 40]]
    )
    line = ["matte", "--ref", ref, "--mask", mask, "--src", image, "--out", tmp_path / "out", "--device", "cpu"]
    line += ["--hints", path.parent]
    ended = CliRunner().invoke(app, list(map(str, line)), catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    ((name, _),) = alphas(tmp_path / "out").items()
    written = read(tmp_path / "out" / name)
    assert written[500, 700] > 127 > written[250, 300]
    assert (written[:40, :60] == 255).all()
    predictor = icm_cli.load(device="cpu", offline=True)
    rgb, reference_rgb = (read(each)[..., ::-1] for each in (image, ref))
    reference = predictor.reference([(reference_rgb, read(mask))])
    hints = read_hints(path, rgb.shape[:2], image=image)
    assert (predictor.matte(rgb, reference, hints) == written).all()
    assert (predictor.session(rgb, reference).matte(hints) == written).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray raises deprecation warnings of its own
@pytest.mark.timeout(480)
@pytest.mark.parametrize("processes", [{"device": "cpu,cpu"}, {"device": None, "ray": "auto", "ray_cpus": 2}])
def test_several_processes_apply_the_same_corrections(icm: Icm, scene: Path, processes: dict[str, Any]) -> None:
    """Points prompt a decoder, which each process loads."""
    write_shapes(scene / "hints" / "wall.json", fg=[[30, 30]], bg=[[100, 65]])
    write_shapes(scene / "hints" / "sub" / "deep.json", drop=[[0, 0], [20, 0], [20, 40], [0, 40]])
    flags = ("--exclude", "pad*")
    assert icm(*flags, hints=scene / "hints", out=scene / "alone").exit_code == 0
    done = icm(*flags, hints=scene / "hints", **processes)
    assert done.exit_code == 0, done.output
    assert alphas(scene / "out") == alphas(scene / "alone")
    wall, deep = (read(scene / "out" / name) for name in ("wall.png", "sub/deep.png"))
    assert wall[30, 30] > 127 > wall[65, 100]
    assert not deep[:40, :20].any()
