"""Annotations in the JSON of labelme and COCO, and scribbles: what they mean, and the messages about malformed ones."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from icm_cli.errors import UsageError
from icm_cli.guidance.annotations import fill_polygon, find_other_image, read_hints
from icm_cli.guidance.hints import Hints, area_points

SIZE = 60, 80
"""Height and width of the image that the files are about."""
SQUARE = [[10, 10], [30, 10], [30, 30], [10, 30]]


OBJECTS = """
    bag badge bagel bed beg bib big bldg bog bug buggy bugle dog egg fig flag fog frog gum gun jug leg peg pig
    backboard backdrop backhand backpack backyard battleground foreground groundhog playground underground
    rag rug tv barkeeper beep beeper creeper deep goalkeeper housekeeper jeep keel keeper keepsake keg kelp kepi
    kettle knee peek
    peep sheep steep sweeper cord crop dewdrop door drape dripper drone droplet droplets dropper drum drupe eyedropper
    gumdrop pod prop propeller raindrop rod snowdrop teardrop trap troop
"""
"""Words that resemble the labels bg, background, keep and drop."""


def png_text(mask: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def shape(kind: str, *points: list[float], label: str = "fg", **others: Any) -> dict[str, Any]:
    return {"label": label, "shape_type": kind, "points": list(points), **others}


def labelme(*shapes: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"version": "5.5.0", "shapes": list(shapes), "imageHeight": SIZE[0], "imageWidth": SIZE[1], **others}


def coco(*annotations: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "a/ref.png", "height": SIZE[0], "width": SIZE[1]}],
        "annotations": [{"image_id": 7, "category_id": 3, **each} for each in annotations],
        "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}],
        **others,
    }


def read(folder: Path, content: Any, label: str | None = None) -> Hints:
    path = folder / "note.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_hints(path, SIZE, image=Path("/data/a/ref.png"), label=label)


def test_words_that_resemble_a_label_name_the_object(tmp_path: Path) -> None:
    for label in OBJECTS.split():
        assert read(tmp_path, labelme(shape("point", [20, 20], label=label.title()))).points == ((20.0, 20.0),)


def box_area(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    area = np.zeros(SIZE, np.bool_)
    area[y0:y1, x0:x1] = True
    return area


MASK = np.arange(12).reshape(3, 4) % 2 == 0


def test_points_and_boxes_of_labelme(tmp_path: Path) -> None:
    hints = read(
        tmp_path,
        labelme(
            shape("point", [20, 10.5]),
            shape("points", [1, 2], [3, 4], label="BG"),
            shape("rectangle", [40, 30], [20, 10]),
        ),
    )
    assert hints.points == ((20, 10.5),)
    assert hints.not_points == ((1, 2), (3, 4))
    assert hints.boxes == ((40, 30, 20, 10),)
    assert not hints.is_outlined


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (shape("polygon", *SQUARE), box_area(10, 10, 30, 30)),
        ({"label": "fg", "points": SQUARE}, box_area(10, 10, 30, 30)),
        (shape("mask", [5, 6], [8, 8], mask=png_text(MASK)), np.pad(MASK, ((6, 51), (5, 71)))),
        (shape("circle", [20, 20], [20, 27]), np.hypot(*(np.indices(SIZE) - 19.5)) <= 7),
    ],
    ids=["polygon", "default type", "mask", "circle"],
)
def test_outlines_of_labelme_are_exact(tmp_path: Path, given: dict[str, Any], expected: np.ndarray) -> None:
    hints = read(tmp_path, labelme(given))
    assert hints.object_area is not None
    np.testing.assert_array_equal(hints.object_area, expected)
    assert hints.is_outlined


def test_lines_of_labelme_are_strokes(tmp_path: Path) -> None:
    hints = read(
        tmp_path, labelme(shape("linestrip", [5, 20], [70, 20], [70, 50]), shape("line", [3, 5], [70, 5], label="bg"))
    )
    assert hints.object_area is not None
    assert hints.background_area is not None
    assert not hints.is_outlined
    assert hints.object_area[19:21, 5:70].all()
    assert not hints.object_area[23:, :67].any()
    assert hints.background_area[4:6, 5:68].all()
    assert hints.background_area.sum() <= 3 * 71


def test_labels_say_on_which_side_an_area_is(tmp_path: Path) -> None:
    rectangles = [
        shape("rectangle", [x, 10], [x + 10, 20], label=label) for x, label in ((0, "keep"), (20, "drop"), (40, "bg"))
    ]
    hints = read(tmp_path, labelme(*rectangles))
    for x, area in ((0, hints.keep), (20, hints.drop), (40, hints.background_area)):
        assert area is not None
        np.testing.assert_array_equal(area, box_area(x, 10, x + 10, 20))
    assert hints.object_area is None
    assert not hints.boxes


def test_background_cuts_a_hole_into_an_outline(tmp_path: Path) -> None:
    hole = [[15, 15], [20, 15], [20, 20], [15, 20]]
    hints = read(tmp_path, labelme(shape("polygon", *SQUARE), shape("polygon", *hole, label="bg")))
    assert hints.object_area is not None
    np.testing.assert_array_equal(hints.object_area, box_area(10, 10, 30, 30) & ~box_area(15, 15, 20, 20))


def test_one_label_is_the_object_and_others_are_selected(tmp_path: Path) -> None:
    cat, dog = shape("point", [1, 1], label="cat"), shape("point", [2, 2], label="dog")
    assert read(tmp_path, labelme(cat)).points == ((1, 1),)
    assert read(tmp_path, labelme(cat, dog), "dog").points == ((2, 2),)
    assert read(tmp_path, labelme(cat, shape("point", [3, 3], label="bg"))).points == ((1, 1),)
    with pytest.raises(UsageError, match="several labels"):
        read(tmp_path, labelme(cat, shape("point", [3, 3])))
    with_background = labelme(cat, dog, shape("point", [3, 3], label="bg"))
    assert read(tmp_path, with_background, "cat").not_points == ((3, 3),)
    with pytest.raises(UsageError, match=r'several labels: "cat" \(1\), "dog" \(1\); expected fg, bg, keep, drop'):
        read(tmp_path, labelme(cat, dog))
    with pytest.raises(UsageError, match="no shape has the label cow"):
        read(tmp_path, labelme(cat, dog), "cow")


def test_words_for_the_sides_are_labels(tmp_path: Path) -> None:
    for word in ("bg ", "background", " Background"):
        hints = read(tmp_path, labelme(shape("point", [3, 3], label=word)))
        assert (hints.points, hints.not_points) == ((), ((3, 3),))
    for word in ("fg\t", "Foreground", "object", "cat "):
        assert read(tmp_path, labelme(shape("point", [3, 3], label=word))).points == ((3, 3),)
    both = labelme(shape("point", [1, 1], label="foreground"), shape("point", [3, 3], label="background"))
    assert read(tmp_path, both).points == ((1, 1),)
    assert read(tmp_path, both).not_points == ((3, 3),)


def compress(counts: list[int]) -> str:
    """The compressed run-length encoding of COCO, from its definition in maskApi.c."""
    text = ""
    for index, count in enumerate(counts):
        value, has_more = count - (counts[index - 2] if index > 2 else 0), True
        while has_more:
            code = value & 31
            value >>= 5
            has_more = value != (-1 if code & 16 else 0)
            text += chr(code + (32 if has_more else 0) + 48)
    return text


@given(runs=st.lists(st.integers(0, 900), min_size=1, max_size=12), is_compressed=st.booleans())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_run_lengths_of_coco_are_columns(tmp_path: Path, runs: list[int], is_compressed: bool) -> None:
    pixels = SIZE[0] * SIZE[1]
    runs = [min(count, pixels - sum(runs[:at])) if sum(runs[:at]) < pixels else 0 for at, count in enumerate(runs)]
    counts = [*runs, pixels - sum(runs)]
    expected = np.concatenate([np.full(count, at % 2, np.bool_) for at, count in enumerate(counts)]).reshape(80, 60).T
    encoded = {"size": list(SIZE), "counts": compress(counts) if is_compressed else counts}
    if not expected.any():
        with pytest.raises(UsageError, match="marks no pixel"):
            read(tmp_path, coco({"segmentation": encoded}))
        return
    hints = read(tmp_path, coco({"segmentation": encoded}))
    assert hints.object_area is not None
    np.testing.assert_array_equal(hints.object_area, expected)


def test_worked_example_of_a_compressed_encoding(tmp_path: Path) -> None:
    """Worked by hand, to find an error that is in both directions: the last two counts are differences."""
    encoded = {"size": [4, 5], "counts": "52207"}  # [5, 2, 2, 2, 9]
    path = tmp_path / "note.json"
    images = [{"id": 7, "file_name": "ref.png"}]
    path.write_text(json.dumps(coco({"segmentation": encoded}, images=images)))
    hints = read_hints(path, (4, 5), image=Path("ref.png"))
    expected = np.zeros((4, 5), np.bool_)
    expected[1:3, 1:3] = True
    assert hints.object_area is not None
    np.testing.assert_array_equal(hints.object_area, expected)


def test_coco_annotations_of_the_image_are_joined(tmp_path: Path) -> None:
    square = [float(each) for point in SQUARE for each in point]
    other = [x + 40 if at % 2 == 0 else x for at, x in enumerate(square)]
    hints = read(
        tmp_path,
        coco({"segmentation": [square]}, {"segmentation": [other]}, {"image_id": 8, "segmentation": None}),
    )
    assert hints.object_area is not None
    np.testing.assert_array_equal(hints.object_area, box_area(10, 10, 30, 30) | box_area(50, 10, 70, 30))


def test_coco_category_is_selected_by_name_or_id(tmp_path: Path) -> None:
    boxes = coco({"bbox": [1, 2, 3, 4]}, {"category_id": 4, "bbox": [10, 10, 20, 20.5]})
    assert read(tmp_path, boxes, "dog").boxes == ((10, 10, 30, 30.5),)
    assert read(tmp_path, boxes, "4").boxes == ((10, 10, 30, 30.5),)
    with pytest.raises(UsageError, match='several labels: "cat"'):
        read(tmp_path, boxes)


@pytest.mark.parametrize(
    ("names", "found"),
    [(["ref.png"], 0), (["b/ref.png", "a/ref.png"], 1), (["ref.jpg", "x.png"], 0), (["ref.jpg", "ref.png"], 1)],
)
def test_coco_image_is_found_by_its_name(tmp_path: Path, names: list[str], found: int) -> None:
    images = [{"id": at, "file_name": name} for at, name in enumerate(names)]
    annotations = [{"image_id": at, "bbox": [at, 2, 3, 4]} for at in range(len(names))]
    assert read(tmp_path, {"images": images, "annotations": annotations}).boxes == ((found, 2, found + 3, 6),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read: it is not valid JSON; expected"),
        (b"\xff\xfe{", "cannot be read"),
        (b"[" * 100_000, "nested too deeply"),
        ([], "is \\[\\] instead of an object"),
        ({"a": 1}, "neither shapes nor annotations"),
        ({"shapes": {}}, "shapes is {} instead of a list"),
        (labelme({"points": []}), "label is missing"),
        (labelme(shape("point", [True, 1])), "instead of an integer or a number"),
        (labelme(shape("point", [1])), "has the point \\[1\\]; expected x and y"),
        (labelme(shape("point", [1, 10**400])), "outside the image, 80x60"),
        (labelme(shape("point", [1, math.nan])), "outside the image"),
        (labelme(shape("polygon", [1, -500], [5, 5], [9, 5])), "\\[1, -500\\], which is outside the image"),
        (labelme(shape("point", [80, 5])), "point 80,5 is outside the image"),
        (labelme(shape("polygon", [1, 1], [2, 2])), "polygon with 2 points; expected 3 or more"),
        (labelme(shape("rectangle", [1, 1], [1, 20])), "box 1,1,1,20 is empty"),
        (labelme(shape("spline", [1, 1])), 'type "spline"; expected one of point'),
        (labelme(shape("point", [1, 1]), imageHeight=40), "of an image of 80x40, and the image is 80x60"),
        (labelme(shape("point", [5, 5]), shape("point", [5.2, 5.3], label="bg")), "both on the object and off it"),
        (labelme(shape("point", [5, 5]), shape("rectangle", [0, 0], [9, 9], label="drop")), "in an area to drop"),
        (labelme(shape("line", [5, 5], [30, 5]), shape("line", [9, 2], [9, 9], label="bg")), "and in one off it"),
        (labelme(shape("polygon", *SQUARE), shape("point", [20, 20], label="bg")), "in a stroke or an area on it"),
        (labelme(shape("point", [20, 20]), shape("polygon", *SQUARE, label="bg")), "in a stroke or an area off it"),
        (labelme(shape("point", [5, 5]), shape("rectangle", [10, 10], [30, 30])), "5,5 is on the object and outside"),
        (labelme(), "marks no pixel"),
        (labelme(shape("mask", [5, 6], [8, 8], mask="####")), "no PNG of 4x3 in base64"),
        (labelme(shape("mask", [5, 6], [8, 8], mask=png_text(MASK)[:40])), "no PNG of 4x3 in base64"),
        (labelme(shape("mask", [5, 6], [8, 8], mask=png_text(np.ones((90, 90), np.bool_)))), "it is 90x90"),
        (labelme(shape("mask", [5, 6], [8, 8])), "no PNG of 4x3"),
        (coco(images=[]), "it has 0 images of the name ref.png"),
        (coco({"bbox": [1, 2, 3]}), "bbox of 3 numbers"),
        (coco({"bbox": [1, 2, 10**400, 4.5]}), "outside the image"),
        (coco({"bbox": [1.5, 2, 10**400, 4.5]}), "int too large to convert to float"),
        (coco({"segmentation": [[1, 2, 3, 4]]}), "polygon of 4 numbers"),
        (coco({"segmentation": [[1, 2, 3, 4, 5, "6"]]}), "instead of an integer or a number"),
        (coco({}), "neither a segmentation nor a bbox"),
        (coco({"segmentation": {"size": [80, 60], "counts": []}}), "size \\[80, 60\\]; expected \\[60, 80\\]"),
        (coco({"segmentation": {"size": [60, 80], "counts": [1, 2]}}), "do not add up to 4800 pixels"),
        (coco({"segmentation": {"size": [60, 80], "counts": [-1, 4801]}}), "are negative or do not add up"),
        (coco({"segmentation": {"size": [60, 80], "counts": "PPPPPPPPPPPPPPPPPP"}}), "have the character"),
        (coco({"segmentation": {"size": [60, 80], "counts": "P"}}), "are cut short"),
        (coco(images=[{"id": 7, "file_name": "ref.png", "width": 81}]), "of an image of 81x60"),
    ],
)
def test_malformed_annotation_gives_one_sentence(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        read(tmp_path, content)
    assert str(tmp_path / "note.json") in str(error.value)
    assert "\n" not in str(error.value)


VALID = [
    labelme(
        *[
            shape(kind, [5, 6], [8, 8], mask=png_text(MASK))
            for kind in ("mask", "rectangle", "line", "circle", "points")
        ]
    ),
    labelme(shape("polygon", *SQUARE), shape("point", [3, 3], label="bg")),
    coco({"bbox": [1, 2, 3, 4]}, {"segmentation": [[1, 2, 30, 4, 5, 60]]}),
    coco({"segmentation": {"size": [60, 80], "counts": compress([100, 50, 4650])}}),
]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


def replace_value(content: Any, data: st.DataObject) -> Any:
    """Return the content with one value, anywhere in it, replaced or removed."""
    if isinstance(content, (dict, list)) and content and data.draw(st.integers(0, 5)):
        key = data.draw(st.sampled_from(list(content) if isinstance(content, dict) else list(range(len(content)))))
        copied = content.copy()
        if data.draw(st.integers(0, 9)) == 0:
            del copied[key]
        else:
            copied[key] = replace_value(content[key], data)
        return copied
    return data.draw(JSON_VALUES)


@given(data=st.data())
@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_annotation_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content = replace_value(data.draw(st.sampled_from(VALID)), data)
    try:
        hints = read(tmp_path, content)
    except UsageError as error:
        assert re.fullmatch("[^\n]*note\\.json[^\n]*", str(error))  # noqa: PT017
    else:
        assert not hints.is_empty


@given(content=st.binary(max_size=200) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
@example(b'{"shapes": ' + b"[" * 5000)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UsageError, match=r"note\.json"):
        read(tmp_path, content)


@given(points=st.lists(st.tuples(st.integers(-8, 48), st.integers(-8, 48)), min_size=3, max_size=9))
@settings(max_examples=150)
def test_polygon_contains_the_pixel_centres_by_the_even_odd_rule(points: list[tuple[int, int]]) -> None:
    """Pixels whose centre is on an edge, up to rounding, may be on either side."""
    corners = [(x / 2 + 0.25, y / 2 + 0.125) for x, y in points]
    filled = fill_polygon(corners, (20, 22))
    for row in range(20):
        for column in range(22):
            x, y = column + 0.5, row + 0.5
            crossings = [
                x0 + (y - y0) * (x1 - x0) / (y1 - y0)
                for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True)
                if (y0 <= y) != (y1 <= y)
            ]
            if all(abs(crossing - x) > 1e-9 for crossing in crossings):
                assert filled[row, column] == sum(crossing < x for crossing in crossings) % 2, (row, column)


def test_adjacent_polygons_share_no_pixel() -> None:
    left = fill_polygon([(0, 0), (33.3, 0), (47.7, 60), (0, 60)], SIZE)
    right = fill_polygon([(33.3, 0), (80, 0), (80, 60), (47.7, 60)], SIZE)
    assert (left ^ right).all()


@given(seed=st.integers(0, 10**6), size=st.sampled_from([(40, 50), (700, 30), (30, 1500), (1, 1)]))
@settings(max_examples=60)
def test_points_of_an_area_are_inside_it(seed: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    area = np.zeros(size, np.uint8)
    for _ in range(rng.integers(1, 4)):
        line = rng.integers(0, size[::-1], (rng.integers(1, 5), 2), np.int32)
        cv2.polylines(area, [line], isClosed=False, color=1, thickness=int(rng.integers(1, 9)))
        area[line[:, 1], line[:, 0]] = 1
    points = area_points(area > 0)
    assert 1 <= len(points) <= 8
    assert len(set(points)) == len(points)
    assert all(area[int(y), int(x)] for x, y in points)


def test_points_are_spread_over_a_long_stroke() -> None:
    area = np.zeros((3000, 4000), np.uint8)
    stroke = np.array([[100, 200], [2000, 2800], [3900, 150]])
    cv2.polylines(area, [stroke], isClosed=False, color=1, thickness=3)
    points = np.array(area_points(area > 0))
    assert len(points) == 8
    for x, y in ((100, 200), (2000, 2800), (3900, 150), (1050, 1500), (2950, 1475)):
        assert np.hypot(*(points - (x, y)).T).min() < 450
    wide = cv2.distanceTransform(area, cv2.DIST_L2, 5)
    assert all(wide[int(y), int(x)] >= 1.9 for x, y in points)  # on the centre line


@pytest.mark.parametrize("seed", [137, 150, 240])
def test_points_of_an_area_do_not_depend_on_memory_addresses(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    transform = cv2.distanceTransform
    area = np.zeros((150, 200), np.uint8)
    line = np.random.default_rng(seed).integers(0, (200, 150), (4, 2), np.int32)
    cv2.polylines(area, [line], isClosed=False, color=1, thickness=9)

    def points(offset: int) -> list[tuple[float, float]]:
        """Return the points if the output of the transform is ``offset`` bytes after a multiple of 64."""

        def transform_to_offset(mask: np.ndarray, *options: int) -> np.ndarray:
            memory = np.zeros(4 * mask.size + 128, np.uint8)
            start = -memory.ctypes.data % 64 + offset
            output = memory[start:][: 4 * mask.size].view(np.float32).reshape(mask.shape)
            return transform(mask, *options, dst=output)

        monkeypatch.setattr(cv2, "distanceTransform", transform_to_offset)
        return area_points(area > 0)

    assert points(0) == points(16) == points(32) == points(48)


GREY, CLEAR = (128, 128, 128, 255), (0, 0, 0, 0)
COLOURS = {"white": (255, 255, 255, 255), "green": (0, 255, 0, 255), "black": (0, 0, 0, 255), "red": (255, 0, 0, 255)}


def save_scribble(
    folder: Path, *strokes: tuple[int, ...], background: tuple[int, ...] = CLEAR, mode: str = "RGBA"
) -> Path:
    pixels = np.full((*SIZE, 4), background, np.uint8)
    for number, colour in enumerate(strokes):
        pixels[10 + 10 * number : 14 + 10 * number, 10:40] = colour
    Image.fromarray(pixels).convert(mode).save(folder / "s.png")
    return folder / "s.png"


@pytest.mark.parametrize(("inside", "outside"), [("white", "black"), ("green", "red"), ("white", "red")])
@pytest.mark.parametrize(("background", "mode"), [(CLEAR, "RGBA"), (GREY, "RGB")])
def test_scribbles(tmp_path: Path, inside: str, outside: str, background: tuple[int, ...], mode: str) -> None:
    path = save_scribble(tmp_path, COLOURS[inside], COLOURS[outside], background=background, mode=mode)
    hints = read_hints(path, SIZE)
    assert hints.object_area is not None
    assert hints.background_area is not None
    np.testing.assert_array_equal(hints.object_area, box_area(10, 10, 40, 14))
    np.testing.assert_array_equal(hints.background_area, box_area(10, 20, 40, 24))
    assert not hints.is_outlined


def test_rough_mask_marks_every_pixel(tmp_path: Path) -> None:
    path = save_scribble(tmp_path, COLOURS["white"], background=COLOURS["black"], mode="L")
    hints = read_hints(path, SIZE)
    assert hints.is_outlined
    assert hints.object_area is not None
    np.testing.assert_array_equal(hints.object_area, box_area(10, 10, 40, 14))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_soft_borders_of_a_rough_mask_are_no_contradiction(tmp_path: Path, mode: str) -> None:
    soft = cv2.GaussianBlur(255 * box_area(20, 20, 50, 40).astype(np.uint8), (0, 0), 1.5)
    Image.fromarray(soft).convert(mode).save(tmp_path / "soft.png")
    hints = read_hints(tmp_path / "soft.png", SIZE)
    assert hints.object_area is not None
    assert hints.object_area[23:37, 23:47].all()
    assert hints.background_area is not None
    assert hints.background_area[box_area(16, 16, 54, 44) == 0].all()
    assert not (hints.object_area | hints.background_area).all()


@pytest.mark.parametrize(
    ("strokes", "background", "message"),
    [
        ([], CLEAR, "has no stroke; expected white or green"),
        ([], GREY, "has no stroke"),
        ([(0, 0, 255, 255)], CLEAR, "has the colour #0000ff at 11,11; expected white or green"),
        ([COLOURS["green"]], COLOURS["white"], "has red or green strokes, and is white elsewhere"),
        ([COLOURS["red"]], COLOURS["black"], "has red or green strokes, and is black elsewhere"),
    ],
)
def test_unusable_scribbles_are_refused(
    tmp_path: Path, strokes: list[tuple[int, ...]], background: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read_hints(save_scribble(tmp_path, *strokes, background=background), SIZE)


def test_scribble_of_another_size_or_damaged_is_refused(tmp_path: Path) -> None:
    path = save_scribble(tmp_path, COLOURS["white"])
    with pytest.raises(UsageError, match=r"s\.png is 80x60, and the image is 90x60"):
        read_hints(path, (60, 90))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UsageError, match=r"scribble cannot be used: .*s\.png"):
        read_hints(path, SIZE)


@pytest.mark.parametrize(
    ("stated", "image", "other"),
    [
        ("wall.jpg", "wall.jpg", ""),
        ("..\\imgs\\Wall.JPG", "sub/wall.tif", ""),
        ("../scan.tif", "scan.0002.tif", ""),
        ("pad.0101.png", "pad.0101.exr", ""),
        ("pad.0102.png", "pad.0101.png", "pad.0102.png"),
        ("/data/imgs/floor.jpg", "wall.jpg", "floor.jpg"),
        ("../back\\slash.jpg", "back\\slash.jpg", ""),
        ("../back\\slash.jpg", "back.jpg", "slash.jpg"),
        (None, "wall.jpg", ""),
        ("", "wall.jpg", ""),
    ],
)
def test_name_of_the_image_of_an_annotation(tmp_path: Path, stated: str | None, image: str, other: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"shapes": [], "imagePath": stated}))
    assert find_other_image(path, Path(image)) == other
