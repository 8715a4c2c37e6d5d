"""References without a mask: points, a box, strokes or a JSON file say which object is meant."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import OpenImageIO as oiio
import pytest
from conftest import Icm, alphas, read, shrink
from PIL import Image

import icm_cli
from icm_cli.matting import prompting

ON, OFF = (90, 138), (16, 24)
HEAD = 94, 32
"""Another point on the object."""
AT = f"{ON[0]},{ON[1]}"


@pytest.fixture(autouse=True, scope="module")
def _load_parts_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompting, "load_objects_and_edges", functools.cache(prompting.load_objects_and_edges))
        yield


@pytest.fixture
def truth(scene: Path) -> np.ndarray:
    """Mask of the robot, which becomes the reference of the scene, [192,192]."""
    for name in ("ref.jpg", "mask.png"):
        shrink(Path(__file__).parent / "demo" / name, scene / f"{name[:-4]}.png", 192)
    mask = read(scene / "mask.png") > 127
    assert mask[ON[::-1]]
    assert mask[HEAD[::-1]]
    assert not mask[OFF[::-1]]
    return mask


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    return float((found & truth).sum() / (found | truth).sum())


def labelme(folder: Path, size: tuple[int, int], *shapes: dict[str, Any], name: str = "note.json") -> Path:
    content = {"shapes": list(shapes), "imageHeight": size[0], "imageWidth": size[1]}
    (folder / name).write_text(json.dumps(content))
    return folder / name


def point(x: float, y: float, label: str = "fg") -> dict[str, Any]:
    return {"label": label, "shape_type": "point", "points": [[x, y]]}


def box_of(mask: np.ndarray) -> list[int]:
    (top, left), (bottom, right) = (each(np.argwhere(mask), axis=0).tolist() for each in (np.min, np.max))
    return [left, top, right + 1, bottom + 1]


@pytest.mark.parametrize("kind", ["points", "box", "scribble", "labelme", "coco"])
def test_prompts_make_the_mask_of_the_reference(icm: Icm, scene: Path, truth: np.ndarray, kind: str) -> None:
    options: dict[str, Any] = {
        "points": {"point": [AT, f"{HEAD[0]},{HEAD[1]}"], "not_point": f"{OFF[0]},{OFF[1]}"},
        "box": {"box": ",".join(map(str, box_of(truth)))},
        "scribble": {"scribble": scene / "strokes.png"},
        "labelme": {"mask": labelme(scene, truth.shape, point(*ON, "cat"), point(*HEAD, "cat"), point(*OFF, "bg"))},
        "coco": {"mask": scene / "coco.json"},
    }[kind]
    strokes = np.zeros((*truth.shape, 4), np.uint8)
    cv2.line(strokes, ON, HEAD, (0, 255, 0, 255), 3)
    cv2.line(strokes, (50, 110), (130, 110), (0, 255, 0, 255), 3)
    cv2.line(strokes, OFF, (OFF[0], 100), (255, 0, 0, 255), 3)
    Image.fromarray(strokes).save(scene / "strokes.png")
    left, top, right, bottom = box_of(truth)
    annotation = {"image_id": 1, "bbox": [left, top, right - left, bottom - top]}
    coco = {"images": [{"id": 1, "file_name": "ref.png"}], "annotations": [annotation]}
    (scene / "coco.json").write_text(json.dumps(coco))
    ended = icm("--dry-run", save_mask=scene / "made.png", **{"mask": None, **options})
    assert ended.exit_code == 0, ended.stderr
    assert not (scene / "out").exists()
    assert f"wrote the mask of the reference to {scene / 'made.png'}" in ended.stderr
    made = read(scene / "made.png")
    assert set(np.unique(made)) == {0, 255}
    assert overlap(made > 127, truth) > 0.85
    if kind != "box":
        assert made[ON[::-1]] == 255
        assert made[OFF[::-1]] == 0


@pytest.mark.usefixtures("truth")
def test_saved_mask_gives_the_same_alphas_as_the_prompts(icm: Icm, scene: Path) -> None:
    prompted = icm(mask=None, point=AT, save_mask=scene / "made.png", out=scene / "a", report=scene / "a.json")
    assert prompted.exit_code == 0, prompted.stderr
    assert icm(mask=scene / "made.png", out=scene / "b").exit_code == 0
    assert len(alphas(scene / "a")) == 3
    assert alphas(scene / "a") == alphas(scene / "b")
    report = json.loads((scene / "a.json").read_text())
    assert report["settings"]["point"] == [list(ON)]
    again = icm("--dry-run", mask=scene / "made.png", out=scene / "a")
    assert "0 new, 0 to be recomputed, 3 kept" in again.stderr


def test_reference_with_a_display_window_is_marked_in_it(icm: Icm, scene: Path, truth: np.ndarray) -> None:
    """The data window begins at x 30 and y 10 of the display window, and everything around it is black."""
    rgb = cv2.cvtColor(read(scene / "ref.png"), cv2.COLOR_BGR2RGB).astype(np.float32) / 255
    height, width = truth.shape
    spec = oiio.ImageSpec(width, height, 3, "half")
    spec.x, spec.y, spec.full_width, spec.full_height = 30, 10, width + 50, height + 20
    spec.attribute("oiio:ColorSpace", "sRGB")
    writer = oiio.ImageOutput.create(str(scene / "ref.exr"))
    assert writer.open(str(scene / "ref.exr"), spec)
    assert writer.write_image(rgb)
    assert writer.close()
    options = {"ref": scene / "ref.exr", "ref_colorspace": "sRGB - Texture"}
    at = f"{ON[0] + 30},{ON[1] + 10}"
    ended = icm("--dry-run", mask=None, point=at, save_mask=scene / "made.png", **options)
    assert ended.exit_code == 0, ended.stderr
    made = read(scene / "made.png") > 127
    assert made.shape == (height + 20, width + 50)
    assert overlap(made, np.pad(truth, ((10, 10), (30, 20)))) > 0.85
    prompted = icm(mask=None, point=at, out=scene / "a", **options)
    assert prompted.exit_code == icm(mask=scene / "made.png", out=scene / "b", **options).exit_code == 0
    assert alphas(scene / "a") == alphas(scene / "b")
    outside = icm("--dry-run", mask=None, point=f"{width + 51},5", **options)
    assert outside.exit_code == 2
    assert f"outside the image, which is {width + 50}x{height + 20}" in outside.stderr


@pytest.mark.parametrize("prompt", [{"point": "0.5,0.5"}, {"box": "0.1,0.2,0.9,1"}])
def test_fractions_of_the_image_are_refused(icm: Icm, prompt: dict[str, str]) -> None:
    ended = icm("--dry-run", mask=None, **prompt)
    assert ended.exit_code == 2
    assert "have only values from 0 to 1; expected pixels of the image as it is displayed" in ended.stderr


def test_coordinates_are_those_of_the_displayed_image(icm: Icm, scene: Path, truth: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    with Image.open(scene / "ref.png") as image:
        image.transpose(Image.Transpose.ROTATE_90).save(scene / "ref.jpg", quality=98, exif=exif)
    ended = icm("--dry-run", ref=scene / "ref.jpg", mask=None, point=AT, save_mask=scene / "made.png")
    assert ended.exit_code == 0, ended.stderr
    assert overlap(read(scene / "made.png") > 127, truth) > 0.85


def test_outlines_are_the_mask_without_a_model(
    icm: Icm, scene: Path, truth: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(prompting, "load_objects_and_edges")
    left, top, right, bottom = box_of(truth)
    square = [[left, top], [right, top], [right, bottom], [left, bottom]]
    path = labelme(scene, truth.shape, {"label": "fg", "shape_type": "polygon", "points": square}, point(*ON))
    ended = icm("--dry-run", mask=path, save_mask=scene / "made.png")
    assert ended.exit_code == 0, ended.stderr
    assert f"mask {path} has outlines, which are used; its points and boxes are ignored" in ended.stderr
    expected = np.zeros(truth.shape, np.uint8)
    expected[top:bottom, left:right] = 255
    np.testing.assert_array_equal(read(scene / "made.png"), expected)


@pytest.mark.slow
def test_several_references_may_have_annotations(icm: Icm, scene: Path, truth: np.ndarray) -> None:
    path = labelme(scene, truth.shape, point(*ON, "cat"), point(*OFF, "dog"))
    ended = icm(ref=[scene / "ref.png"] * 2, mask=[path, scene / "mask.png"], mask_label="cat")
    assert ended.exit_code == 2  # the mask has no label cat
    path = labelme(scene, truth.shape, point(*ON, "cat"))
    ended = icm(ref=[scene / "ref.png"] * 2, mask=[path, scene / "mask.png"])
    assert ended.exit_code == 0, ended.stderr


def test_one_point_selects_the_whole_object(icm: Icm, scene: Path, truth: np.ndarray) -> None:
    """The first result for this point misses parts of the robot."""
    ended = icm("--dry-run", point="110,143", mask=None, save_mask=scene / "made.png")
    assert ended.exit_code == 0, ended.stderr
    assert overlap(read(scene / "made.png") > 127, truth) > 0.9


@pytest.mark.slow
@pytest.mark.usefixtures("truth")
def test_prompts_in_python(scene: Path, small_model: Path) -> None:
    options: dict[str, Any] = {"src": scene / "imgs", "out": scene / "out", "model": small_model, "device": "cpu"}
    report = icm_cli.matte(scene / "ref.png", point=ON, save_mask=scene / "made.png", dry_run=True, **options)
    made = (scene / "made.png").read_bytes()
    assert report.exit_code == 0
    again = icm_cli.matte(scene / "ref.png", point=[ON], save_mask=scene / "made.png", dry_run=True, **options)
    assert again.exit_code == 0
    assert (scene / "made.png").read_bytes() == made
    predictor = icm_cli.load(str(small_model), device="cpu")
    rgb = read(scene / "ref.png")[..., ::-1]
    hints = icm_cli.Hints(size=rgb.shape[:2], points=[ON])
    by_hints, by_mask = (predictor.reference((rgb, each)) for each in (hints, read(scene / "made.png")))
    assert (predictor.matte(rgb, by_hints) == predictor.matte(rgb, by_mask)).all()
    with pytest.raises(icm_cli.errors.UsageError, match="point= is '90,138'; expected the tuple"):
        icm_cli.matte(scene / "ref.png", point="90,138", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"point": "10,10", "mask": "mask.png"}, "--point makes the mask of the reference, and --mask gives it"),
        ({"box": "0,0,9,9", "mask": "mask.png"}, "--box makes the mask"),
        ({"point": "10,10", "ref": ["ref.png", "ref.png"]}, "--point is for a single reference, and 2 were given"),
        ({"not_point": "10,10"}, "--not-point excludes parts of an object, and nothing marks the object"),
        ({"point": "10;10"}, "--point is '10;10'; expected x and y in pixels, such as 640,360"),
        ({"point": "10,10,10"}, "--point is '10,10,10'; expected x and y"),
        ({"point": "5"}, "--point is '5'; expected x and y"),
        ({"box": "1,2,3"}, "--box is '1,2,3'; expected two corners"),
        ({"point": "500,10"}, "ref.png: point 500,10 is outside the image, which is 200x200"),
        ({"point": "-1,10"}, "ref.png: point -1,10 is outside the image"),
        ({"box": "10,10,10,50"}, "ref.png: box 10,10,10,50 is empty; give two opposite corners"),
        (
            {"box": "-5,-5,900,900"},
            "box -5,-5,900,900 is outside the image, which is 200x200; give two corners inside it",
        ),
        ({"point": "5.2,5", "not_point": "5.7,5"}, "is given both on the object and off it"),
        ({"scribble": "ref.png"}, "ref.png"),
        ({"scribble": "empty.png"}, "empty.png has no stroke; expected white or green"),
        ({"scribble": "red.png"}, "--scribble red.png has no stroke on the object; expected strokes in white or green"),
        (
            {"scribble": "red.png", "point": "12,12"},
            "ref.png: point 12,12 is on the object and in a stroke",
        ),
        (
            {"box": "10,10,50,50", "point": "9,12"},
            "ref.png: point 9,12 is on the object and outside its box",
        ),
        ({"scribble": "mask.png"}, "mask.png marks nearly every pixel; expected strokes"),
        ({"scribble": "small.png"}, "small.png is 100x75, and the image is 200x200"),
        ({"point": "10,10", "mask_label": "1"}, "--mask-label 1 selects a label of a mask, and there is no --mask"),
        ({"mask": "other.json"}, "it is of an image of 300x200, and the image is 200x200"),
        (
            {"mask": "note.json", "mask_label": "cow"},
            'no shape has the label cow; expected one of "cat" (1), "dog" (1)',
        ),
        (
            {"mask": "note.json"},
            'it has several labels: "cat" (1), "dog" (1); expected fg, bg, keep, drop, or one label; ',
        ),
        ({"mask": "note.json", "mask_label": "cat", "mask_orientation": "stored"}, "omit --mask-orientation"),
        ({"mask": "bg.json"}, "bg.json has no mark on the object"),
        ({"mask": "broken.json"}, "annotation "),
        ({"point": "90,138", "save_mask": "made.jpg"}, "made.jpg is not a .png file; give it the suffix .png"),
        ({"point": "90,138", "save_mask": "ref.png"}, "ref.png is an input or an alpha of this run"),
        ({"point": "90,138", "save_mask": "mask.png"}, "mask.png exists and is no mask that icm wrote"),
        (
            {"ref": ["ref.png", "ref.png"], "mask": ["mask.png"] * 2, "save_mask": "m.png"},
            "--save-mask writes one mask",
        ),
    ],
)
def test_contradictory_or_wrong_prompts_are_refused(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(scene)
    monkeypatch.delattr(prompting, "load_objects_and_edges")
    size = 200, 200
    labelme(scene, size, point(*ON, "cat"), point(*OFF, "dog"))
    labelme(scene, size, point(*OFF, "bg"), name="bg.json")
    labelme(scene, (200, 300), point(*ON), name="other.json")
    (scene / "broken.json").write_text('{"shapes": [')
    Image.new("RGBA", size[::-1]).save("empty.png")
    red = Image.new("RGBA", size[::-1])
    red.paste((255, 0, 0, 255), (10, 10, 30, 14))
    red.save("red.png")
    Image.new("RGBA", (100, 75)).save("small.png")
    before = alphas(scene)
    ended = icm(**{"mask": None, "ref": "ref.png", **options})
    assert ended.exit_code == 2, ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert message in ended.stderr
    assert alphas(scene) == before


@pytest.mark.usefixtures("truth")
def test_saved_mask_replaces_only_a_mask_of_icm_and_is_no_source(icm: Icm, scene: Path) -> None:
    path = scene / "imgs" / "made.png"
    for position in (ON, (ON[0] + 5, ON[1])):
        ended = icm("--dry-run", mask=None, point=f"{position[0]},{position[1]}", save_mask=path)
        assert ended.exit_code == 0, ended.stderr
    assert "made.png" not in ended.stdout
    cv2.imwrite(str(path), read(path))  # retouched in another program
    ended = icm("--dry-run", mask=None, point="90,138", save_mask=path)
    assert ended.exit_code == 2
