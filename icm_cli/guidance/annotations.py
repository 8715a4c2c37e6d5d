"""Read hints from files: annotations in the JSON of labelme or COCO, and painted images.

The label of a shape in an annotation says what the shape marks:

- ``fg``, ``foreground`` or ``object``: the object. If the file has none of these labels, its only unknown label marks
  the object. But in hints, a misspelling of a known label is refused;
- ``bg`` or ``background``: what is not the object;
- ``keep``, ``drop``: areas whose final alpha is 1 or 0.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import NoneType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from icm_cli.errors import UsageError
from icm_cli.files.json_files import check_schema, format_json, read_json
from icm_cli.geometry import format_size
from icm_cli.guidance.hints import Area, Box, Hints, Point
from icm_cli.guidance.scribbles import read_scribble

AREA_NAMES = {"fg": "object_area", "bg": "background_area", "keep": "keep", "drop": "drop"}
"""Meaning of a shape -> field of :class:`Hints` that its area is added to."""
LABELS = {"foreground": "fg", "object": "fg", "background": "bg", **{meaning: meaning for meaning in AREA_NAMES}}
"""Label in a file, in lower case -> meaning, a key of :data:`AREA_NAMES`."""
POINT_COUNTS: dict[str, tuple[int, float]] = {
    "point": (1, 1),
    "points": (1, math.inf),
    "line": (2, 2),
    "linestrip": (2, math.inf),
    "rectangle": (2, 2),
    "polygon": (3, math.inf),
    "circle": (2, 2),
    "mask": (2, 2),
}
"""Type of a shape -> smallest and largest number of its points."""
STROKE_THICKNESS = 2
"""Thickness argument of OpenCV for lines. With fractional coordinates it draws them 3 px wide."""
CIRCLE_CORNERS = 720
"""Number of corners of the polygon that approximates a circle."""
BORDER_TOLERANCE_PX = 1.0
"""Points up to this far outside the image are moved to its border, because tools round coordinates there."""
MAX_COUNT_BITS = 40
"""Largest number of bits of a count in a compressed run-length encoding."""
LONG_LABEL, MIN_SIMILARITY = 8, 0.85
"""A label is a misspelling of a known one of at least this length if ``SequenceMatcher.ratio`` is at least this."""
ABBREVIATIONS = {"bg": re.compile("b[cdgknr]*g[cdgknr]*")}
"""Other abbreviations of labels, such as bkg and bckgrnd."""
SUBPIXEL_BITS = 4
"""Fractional bits of the coordinates that OpenCV draws."""
MAX_LISTED = 8
"""Largest number of names or labels that a message lists."""
NUMBER = int, float
EXPECTED = "expected the JSON of labelme or COCO"
OTHER_IMAGE = (
    "annotation {path} says that it is about {name}, and is used for {image}; check that it was drawn on this image"
)
"""Notice about a file for which :func:`find_other_image` returns a name."""
LABELME_SCHEMA = {
    "shapes": [{"label": str, "points": [[NUMBER]], "shape_type?": (str, NoneType), "mask?": (str, NoneType)}],
    "imageHeight?": (int, NoneType),
    "imageWidth?": (int, NoneType),
}
COCO_SCHEMA = {
    "images": [{"id": (int, str), "file_name": str, "height?": int, "width?": int}],
    "annotations": [
        {
            "image_id": (int, str),
            "category_id?": (int, str),
            "segmentation?": (list, dict, NoneType),
            "bbox?": (list, NoneType),
        }
    ],
    "categories?": [{"id": (int, str), "name": str}],
}


@dataclass(frozen=True)
class _Shape:
    """One shape of an annotation: its points, or the pixels of a mask."""

    name: str
    """Its position in the file, for messages: "shapes[0]"."""
    kind: str
    """A key of :data:`POINT_COUNTS`."""
    label: str
    points: Sequence[Point]
    mask: Area | None = None
    label_id: str = ""
    """Id of the category in a COCO file; users may give it instead of the label."""


def read_hints(
    path: Path, size: tuple[int, int], *, image: Path | None = None, label: str | None = None, can_select: bool = False
) -> Hints:
    """Read the hints in a file about an image of ``size`` (height, width). Raises UsageError.

    A .json file is an annotation of labelme or COCO; others are painted images, see
    :func:`~icm_cli.guidance.scribbles.read_scribble`.

    Args:
        image: Path of the image, by which a COCO file with several images finds it.
        label: Label of the object, instead of ``fg``.
        can_select: Whether the caller has the option ``--mask-label``, which messages then suggest.
    """
    try:
        if not is_annotation(path):
            return read_scribble(path, size)
        content = read_annotation(path)
        if "shapes" in content:
            check_schema(content, LABELME_SCHEMA, "")
            shapes = list(_labelme_shapes(content, size))
        else:
            check_schema(content, COCO_SCHEMA, "")
            shapes = list(_coco_shapes(content, size, image))
        return _combine_shapes(_select_shapes(shapes, label, can_select=can_select), size)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"annotation {path} cannot be used: {error}") from error


def read_annotation(path: Path) -> dict[str, Any]:
    """Read the JSON of labelme or COCO in a file, without checking its schema. Raises UsageError for other JSON."""
    content: dict[str, Any] = read_json(path, "annotation", {}, EXPECTED)
    if not content.keys() & {"shapes", "annotations"}:
        raise UsageError(f"annotation {path} cannot be used: it has neither shapes nor annotations; {EXPECTED}")
    return content


def hints_from_shapes(shapes: Sequence[dict[str, Any]], size: tuple[int, int]) -> Hints:
    """Return shapes of labelme as hints about an image of ``size`` (height, width). Raises UsageError."""
    try:
        check_schema(shapes, LABELME_SCHEMA["shapes"], "shapes")
        checked = list(_labelme_shapes({"shapes": shapes}, size))
        return _combine_shapes(_select_shapes(checked, None, can_select=False), size)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"the hints cannot be used: {error}") from error


def is_annotation(path: Path) -> bool:
    """Return whether a file is an annotation, by its suffix."""
    return path.suffix.lower() == ".json"


def find_other_image(path: Path, image: Path) -> str:
    """Return the name of the image in an annotation of labelme, if it is another image than ``image``; else "".

    Folders, suffixes and page numbers may differ. Raises UsageError.
    """
    content = read_annotation(path)
    stated = str(content.get("imagePath") or "")
    if not stated or "shapes" not in content:
        return ""
    paths = PurePosixPath(stated), PureWindowsPath(stated)  # a backslash may be a part of a name, or separate names
    stated_names = {name.casefold() for path in paths for name in (path.name, path.stem)}
    own_names = {name.casefold() for name in (image.name, image.stem, image.stem.rpartition(".")[0])}
    return "" if stated_names & own_names else paths[1].name


def find_other_label(path: Path) -> str:
    """Return the label of a valid annotation of labelme that is not in :data:`LABELS`; "" if there is none."""
    labels = (shape["label"].strip() for shape in read_annotation(path).get("shapes", []))
    return next((label for label in labels if label.lower() not in LABELS), "")


def fill_polygon(points: Sequence[Point], size: tuple[int, int]) -> Area:
    """Return the pixels whose centres are inside a polygon, bool [H,W] of ``size``, by the even-odd rule.

    Every edge toggles, in each row that it crosses, the first pixel right of it. Then a pixel is inside if an odd
    number of toggles is at or left of it in its row.
    """
    height, width = size
    toggles = np.zeros((height, width + 1), np.bool_)  # the last column is right of the image
    for start, end in zip(points, [*points[1:], points[0]], strict=True):
        (x0, y0), (x1, y1) = sorted((start, end), key=lambda point: point[1])
        first_row, end_row = (math.ceil(min(max(y - 0.5, 0), height)) for y in (y0, y1))
        if first_row == end_row:  # the edge crosses the centre line of no row
            continue
        rows = np.arange(first_row, end_row)
        crossings = x0 + (x1 - x0) * ((rows + 0.5 - y0) / (y1 - y0))
        columns = np.clip(np.ceil(crossings - 0.5), 0, width).astype(int)
        toggles[rows, columns] ^= True
    inside: Area = np.logical_xor.accumulate(toggles[:, :width], axis=1)
    return inside


def _labelme_shapes(content: dict[str, Any], size: tuple[int, int]) -> Iterator[_Shape]:
    """Yield the shapes of a file of labelme. Raises ValueError for a shape that is not valid."""
    _check_size(content.get("imageHeight"), content.get("imageWidth"), size)
    for number, shape in enumerate(content["shapes"]):
        name, points = f"shapes[{number}]", shape["points"]
        kind = shape.get("shape_type") or "polygon"
        if kind not in POINT_COUNTS:
            raise ValueError(f"{name} is of type {format_json(kind)}; expected one of {', '.join(POINT_COUNTS)}")
        least, most = POINT_COUNTS[kind]
        if not least <= len(points) <= most:
            expected = f"{least} or more" if most == math.inf else f"{least}"
            raise ValueError(f"{name} is a {kind} with {len(points)} points; expected {expected}")
        points = [_clip_point(point, size, name) for point in points]
        mask = _decode_mask(shape.get("mask"), points, size, name) if kind == "mask" else None
        yield _Shape(name, kind, shape["label"].strip(), points, mask)


def _coco_shapes(content: dict[str, Any], size: tuple[int, int], image: Path | None) -> Iterator[_Shape]:
    """Yield the shapes for an image in a COCO file. Raises ValueError for a shape that is not valid."""
    entry = _find_coco_image(content["images"], image)
    _check_size(entry.get("height"), entry.get("width"), size)
    label_by_id = {category["id"]: category["name"] for category in content.get("categories", [])}
    for number, annotation in enumerate(content["annotations"]):
        if annotation["image_id"] == entry["id"]:
            category_id = annotation.get("category_id", "")
            label = label_by_id.get(category_id, str(category_id)).strip()
            for kind, points, mask in _coco_outlines(annotation, size, f"annotations[{number}]"):
                yield _Shape(f"annotations[{number}]", kind, label, points, mask, str(category_id))


def _coco_outlines(
    annotation: dict[str, Any], size: tuple[int, int], name: str
) -> Iterator[tuple[str, list[Point], Area | None]]:
    """Yield kind, points and mask of each shape in an annotation of COCO. Raises ValueError for one that is not valid.

    ``name``: what messages call the annotation.
    """
    segmentation, box = annotation.get("segmentation"), annotation.get("bbox")
    if isinstance(segmentation, dict):  # a run-length encoding
        yield "mask", [], _decode_runs(segmentation, size, name)
    elif segmentation:  # polygons
        check_schema(segmentation, [[NUMBER]], f"{name}.segmentation")
        for values in segmentation:
            if len(values) < 6 or len(values) % 2:
                raise ValueError(f"{name} has a polygon of {len(values)} numbers; expected x and y of 3 or more points")
            yield "polygon", [_clip_point(xy, size, name) for xy in zip(values[::2], values[1::2], strict=True)], None
    elif box:
        check_schema(box, [NUMBER], f"{name}.bbox")
        if len(box) != 4:
            raise ValueError(f"{name} has a bbox of {len(box)} numbers; expected x, y, width and height")
        corners = [box[:2], [box[0] + box[2], box[1] + box[3]]]
        yield "rectangle", [_clip_point(corner, size, name) for corner in corners], None
    else:
        raise ValueError(f"{name} has neither a segmentation nor a bbox; expected one of them")


def _find_coco_image(entries: Sequence[dict[str, Any]], image: Path | None) -> dict[str, Any]:
    """Return the entry of an image: the one with its file name, else the one with its name without suffix.

    Without ``image``, return the only entry. Raises ValueError unless there is exactly one.
    """
    matches = list(entries)
    if image is not None:
        matches = [entry for entry in entries if Path(entry["file_name"]).name == image.name]
        if len(matches) > 1:  # images of the same name in several folders
            matches = [entry for entry in matches if _is_end_of(Path(entry["file_name"]), image)]
        if not matches:
            matches = [entry for entry in entries if Path(entry["file_name"]).stem == image.stem]
    if len(matches) != 1:
        listed = ", ".join(format_json(entry["file_name"]) for entry in entries[:MAX_LISTED])
        more = ", ..." if len(entries) > MAX_LISTED else ""
        name = "" if image is None else f" of the name {image.name}"
        raise ValueError(f"it has {len(matches)} images{name}; expected one; it lists {listed or 'none'}{more}")
    return matches[0]


def _is_end_of(end: Path, path: Path) -> bool:
    """Return whether the last parts of a path are those of ``end``."""
    return path.parts[-len(end.parts) :] == end.parts


def _check_size(height: int | None, width: int | None, size: tuple[int, int]) -> None:
    """Raise ValueError if the size that a file states (None if it states none) is not that of the image."""
    stated_size = height or size[0], width or size[1]
    if stated_size != size:
        raise ValueError(
            f"it is of an image of {format_size(stated_size)}, and the image is {format_size(size)}; give the "
            "annotation of this image, in the orientation in which it is displayed"
        )


def _clip_point(values: Sequence[Any], size: tuple[int, int], name: str) -> Point:
    """Return a point moved into the image. Raises ValueError if it is more than ``BORDER_TOLERANCE_PX`` outside."""
    if len(values) != 2:
        raise ValueError(f"{name} has the point {format_json(values)}; expected x and y")
    x, y = values
    height, width = size
    has_valid_x = -BORDER_TOLERANCE_PX <= x <= width + BORDER_TOLERANCE_PX
    has_valid_y = -BORDER_TOLERANCE_PX <= y <= height + BORDER_TOLERANCE_PX
    if not (has_valid_x and has_valid_y):
        raise ValueError(
            f"{name} has the point {format_json(values)}, which is outside the image, {format_size(size)}; give the "
            "annotation of this image"
        )
    return min(max(float(x), 0.0), float(width)), min(max(float(y), 0.0), float(height))


def _decode_mask(text: str | None, corners: Sequence[Point], size: tuple[int, int], name: str) -> Area:
    """Decode the mask of a labelme shape, bool [H,W] of ``size``.

    ``text`` is a PNG in base64, and ``corners`` are two opposite corners of the box that it fills. Raises ValueError.
    """
    (x0, y0), (x1, y1) = corners
    left, top = int(min(x0, x1)), int(min(y0, y1))
    box_width, box_height = int(max(x0, x1)) - left + 1, int(max(y0, y1)) - top + 1
    try:
        with Image.open(io.BytesIO(base64.b64decode(text or "", validate=True)), formats=["PNG"]) as image:
            width, height = image.size
            # Tools disagree on whether the last row and column belong to the box.
            if width not in (box_width - 1, box_width) or height not in (box_height - 1, box_height):
                raise ValueError(f"it is {width}x{height}")
            values = np.asarray(image.convert("L"))
    except Exception as error:  # decoders raise anything
        raise ValueError(
            f"the mask of {name} is no PNG of {box_width}x{box_height} in base64 ({error}); write the file again"
        ) from error
    mask = np.zeros(size, np.bool_)
    mask[top : top + height, left : left + width] = values[: size[0] - top, : size[1] - left] > 0
    return mask


def _decode_runs(encoded: dict[str, Any], size: tuple[int, int], name: str) -> Area:
    """Decode a run-length encoding of COCO, bool [H,W] of ``size``. Raises ValueError.

    Its counts are the lengths of runs of 0 and 1 in turn, column by column.
    """
    check_schema(encoded, {"size": [int], "counts": (list, str)}, f"{name}.segmentation")
    if encoded["size"] != list(size):
        raise ValueError(
            f"{name} has a mask of size {format_json(encoded['size'])}; expected {list(size)}, height and width"
        )
    counts = encoded["counts"]
    if isinstance(counts, str):
        counts = _decompress_counts(counts, name)
    check_schema(counts, [int], f"{name}.segmentation.counts")
    pixels = size[0] * size[1]
    if min(counts, default=0) < 0 or sum(counts) != pixels:
        raise ValueError(f"the counts of {name} are negative or do not add up to {pixels} pixels; write the file again")
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return np.ascontiguousarray(flat.reshape(size[::-1]).T)


def _decompress_counts(text: str, name: str) -> list[int]:
    """Decompress the counts of a run-length encoding, as the code published with COCO does (maskApi.c).

    Every character holds five bits of a count, lowest bits first, and a sixth bit that is 1 if more bits follow. The
    highest of all bits is the sign.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > MAX_COUNT_BITS:
            raise ValueError(f"the counts of {name} have the character {format_json(character)}; write the file again")
        value |= (code & 31) << shift
        shift += 5
        is_last_of_count = not code & 32
        if is_last_of_count:
            if code & 16:  # negative
                value -= 1 << shift
            if len(counts) > 2:  # from the fourth count on, the difference to the last but one is stored
                value += counts[-2]
            counts.append(value)
            value = shift = 0
    if shift:
        raise ValueError(f"the counts of {name} are cut short; write the file again")
    return counts


def _select_shapes(shapes: Sequence[_Shape], label: str | None, *, can_select: bool) -> list[tuple[str, _Shape]]:
    """Return the shapes that are used, each with its meaning, a key of :data:`AREA_NAMES`. Raises ValueError.

    ``label``: the one that marks the object. Without it, the object is marked by ``fg`` or by the only other label.
    """
    meanings = {shape.label: LABELS[shape.label.lower()] for shape in shapes if shape.label.lower() in LABELS}
    if label is None:
        other_label = _find_object_label(shapes, meanings, can_select=can_select)
        object_labels = set() if other_label is None else {other_label}
    else:
        object_labels = {shape.label for shape in shapes if label.strip() in (shape.label, shape.label_id)}
        if not object_labels:
            listed = _list_labels(shapes) or "the labels in the file"
            raise ValueError(f"no shape has the label {label}; expected one of {listed}")
        meanings = {name: meaning for name, meaning in meanings.items() if meaning != "fg"}
    meanings |= dict.fromkeys(object_labels, "fg")
    return [(meanings[shape.label], shape) for shape in shapes if shape.label in meanings]


def _find_object_label(shapes: Sequence[_Shape], meanings: Mapping[str, str], *, can_select: bool) -> str | None:
    """Return the label that marks the object although it is not in :data:`LABELS`; None if there is no such label.

    ``meanings``: the other labels, with their meanings. Raises ValueError if several labels may mark the object.
    """
    other_labels = list(dict.fromkeys(shape.label for shape in shapes if shape.label not in meanings))
    object_count = len(other_labels) + ("fg" in meanings.values())
    if other_labels and object_count > 1:
        remedy = f"; select one, as in --mask-label {other_labels[0]}" if can_select else ""
        raise ValueError(
            f"it has several labels: {_list_labels(shapes)}; expected {', '.join(AREA_NAMES)}, or one label{remedy}"
        )
    if other_labels and not can_select:
        _check_spelling(other_labels[0])
    return other_labels[0] if other_labels else None


def _list_labels(shapes: Sequence[_Shape]) -> str:
    """Return the labels of shapes for a message, each with the number of its shapes."""
    counts = Counter(shape.label for shape in shapes)
    return ", ".join(f"{format_json(label)} ({count})" for label, count in counts.most_common(MAX_LISTED))


def _check_spelling(label: str) -> None:
    """Raise ValueError for a misspelling of a label other than ``fg``, which would be used as ``fg``."""
    for known, meaning in LABELS.items():
        if meaning != "fg" and _is_misspelling(label.lower(), known):
            raise ValueError(
                f"it has the label {format_json(label)}; expected {', '.join(AREA_NAMES)}. Did you mean {known!r}? "
                "If it marks the object, change it to fg"
            )


def _is_misspelling(label: str, known: str) -> bool:
    """Return whether a label can only be a misspelling of a known one, and not a word that names an object.

    These are misspellings: the known label with an "s" at the end, with a doubled, missing or swapped letter, or with
    other words after it; another abbreviation of it; and any label that closely resembles a long known one.
    """
    words = re.findall(r"[^\W\d_]+", label)
    letters = "".join(words)
    positions = range(len(known))
    misspellings = {f"{known}s"}
    misspellings |= {known[: n + 1] + known[n:] for n in positions}
    misspellings |= {known[:n] + known[n + 1 :] for n in positions[1:] if len(known) > 2}
    misspellings |= {known[:n] + known[n : n + 2][::-1] + known[n + 2 :] for n in positions}
    is_similar = len(known) >= LONG_LABEL and SequenceMatcher(None, known, letters).ratio() >= MIN_SIMILARITY
    is_abbreviation = known in ABBREVIATIONS and ABBREVIATIONS[known].fullmatch(letters) is not None
    return known in words[:1] or letters in misspellings or is_similar or is_abbreviation


def _combine_shapes(shapes: Sequence[tuple[str, _Shape]], size: tuple[int, int]) -> Hints:
    """Return shapes with their meanings as hints. Lines become areas, and so do boxes that do not mark the object."""
    points: list[Point] = []
    not_points: list[Point] = []
    boxes: list[Box] = []
    painted: dict[str, NDArray[np.uint8]] = {}
    for meaning, shape in shapes:
        if shape.kind in ("point", "points"):
            is_on_object = meaning in ("fg", "keep")
            (points if is_on_object else not_points).extend(shape.points)
        elif shape.kind == "rectangle" and meaning == "fg":
            boxes.append((*shape.points[0], *shape.points[1]))
        else:
            _add_area(shape, painted.setdefault(AREA_NAMES[meaning], np.zeros(size, np.uint8)))
    areas = {name: area.astype(np.bool_) for name, area in painted.items()}
    is_outlined = any(meaning == "fg" and shape.kind in ("polygon", "circle", "mask") for meaning, shape in shapes)
    if is_outlined and "background_area" in areas:
        areas["object_area"] &= ~areas["background_area"]  # bg shapes cut holes into an outlined object
    try:
        hints = Hints(size=size, points=points, not_points=not_points, boxes=boxes, is_outlined=is_outlined, **areas)
    except UsageError as error:
        raise ValueError(str(error)) from error
    if hints.is_empty:
        raise ValueError("it marks no pixel; expected a point, a box, a stroke or an area with the label fg")
    return hints


def _add_area(shape: _Shape, area: NDArray[np.uint8]) -> None:
    """Add the pixels of a shape to an area, uint8 [H,W]."""
    outline = shape.points
    if shape.kind in ("line", "linestrip"):
        # OpenCV has the centre of the first pixel at 0, and takes integers in units of 2**-shift pixels.
        line = np.round((np.array(shape.points) - 0.5) * 2**SUBPIXEL_BITS).astype(np.int32)
        cv2.polylines(area, [line], isClosed=False, color=1, thickness=STROKE_THICKNESS, shift=SUBPIXEL_BITS)
        return
    if shape.kind == "circle":
        centre, rim = shape.points
        radius = math.dist(centre, rim)
        angles = np.linspace(0, 2 * math.pi, CIRCLE_CORNERS, endpoint=False)
        outline = [(centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)) for angle in angles]
    elif shape.kind == "rectangle":
        (x0, y0), (x1, y1) = shape.points
        outline = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    area |= fill_polygon(outline, (area.shape[0], area.shape[1])) if shape.mask is None else shape.mask
