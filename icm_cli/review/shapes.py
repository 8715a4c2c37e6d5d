"""Hints as shapes of labelme. The browser sends and shows hints in this form, and hint files contain it."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from icm_cli.errors import UsageError
from icm_cli.files.json_files import check_schema, read_json
from icm_cli.guidance.annotations import LABELME_SCHEMA, LABELS, hints_from_shapes, is_annotation, read_hints
from icm_cli.guidance.hints import Area, Hints, Point

Shapes: TypeAlias = list[dict[str, Any]]
"""Shapes with the keys of labelme. The pixels of a mask are a grey PNG in base64."""
Annotation: TypeAlias = dict[str, Any]
"""Content of a JSON file of labelme."""
LABELME_VERSION = "5.5.0"
"""Version of labelme in whose format files are written."""


def clean_shapes(shapes: Sequence[dict[str, Any]], size: tuple[int, int]) -> Shapes:
    """Return shapes from a browser or a file with exactly the keys that labelme writes. Raises UsageError.

    ``size``: height and width of the image. A mask with transparency covers the pixels that are not transparent; one
    without covers those that are not black. Empty masks are dropped.
    """
    try:
        check_schema(shapes, LABELME_SCHEMA["shapes"], "shapes")
        cleaned = [_clean_mask(shape, size) if shape.get("shape_type") == "mask" else shape for shape in shapes]
    except ValueError as error:
        raise UsageError(f"the hints cannot be used: {error}") from error
    return [_as_shape(**shape) for shape in cleaned if shape is not None]


def parse_shapes(shapes: Shapes, size: tuple[int, int]) -> Hints | None:
    """Return shapes as hints about an image of ``size`` (height, width); None without shapes. Raises UsageError."""
    return hints_from_shapes(shapes, size) if shapes else None


def read_shapes(paths: Sequence[Path], image: Path, size: tuple[int, int]) -> Shapes:
    """Read the hint files of an image as shapes. Raises UsageError.

    Files of labelme keep their shapes. COCO files and painted strokes become points, boxes and masks. ``image``: path
    of the image below the root. ``size``: its height and width.
    """
    shapes: Shapes = []
    for path in paths:
        content = read_json(path, "annotation", {}, "expected an annotation") if is_annotation(path) else {}
        hints = read_hints(path, size, image=image)  # also of labelme, to check the file
        if "shapes" in content:
            for shape in clean_shapes(content["shapes"], size):
                shapes.append({**shape, "label": LABELS.get(shape["label"].strip().lower(), "fg")})
        else:
            shapes += shapes_of_hints(hints)
    return shapes


def make_annotation(shapes: Shapes, path: Path, source: Path, size: tuple[int, int]) -> Annotation:
    """Return the content of a hint file at ``path`` in the format of labelme, about the image ``source``."""
    return {
        "version": LABELME_VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": os.path.relpath(source, path.parent),
        "imageData": None,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }


def _as_shape(label: str, points: list[list[float]], shape_type: str | None, mask: str | None = None, **_: Any) -> Any:
    """Return a shape with exactly the keys of labelme. Further arguments, other keys of a shape, are ignored."""
    others: dict[str, Any] = {"group_id": None, "description": "", "flags": {}, "mask": mask}
    return {"label": label, "points": points, "shape_type": shape_type or "polygon", **others}


def _clean_mask(shape: dict[str, Any], size: tuple[int, int]) -> dict[str, Any] | None:
    """Return a shape of type mask with its pixels as a grey PNG; None if it covers no pixel.

    ``size``: height and width of the image. Raises ValueError if the corners or the pixels are not valid.
    """
    corners = shape["points"]
    if len(corners) != 2 or any(len(corner) != 2 for corner in corners):
        raise ValueError(f"a mask has the points {corners}; expected two corners")
    left, top = int(min(x for x, _ in corners)), int(min(y for _, y in corners))
    try:
        data = base64.b64decode(shape.get("mask") or "", validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.height > size[0] or image.width > size[1]:
                raise ValueError(f"it has {image.width}x{image.height} pixels, the image only {size[1]}x{size[0]}")
            grey = image.getchannel("A") if "A" in image.getbands() else image.convert("L")
            inside = np.asarray(grey) > 0
    except Exception as error:  # decoders raise anything
        raise ValueError(
            f"the pixels of a mask are not a PNG in base64 that fits into the image ({error}); paint it again"
        ) from error
    return {**shape, **_mask_at(inside, left, top)} if inside.any() else None


def _mask_at(inside: Area, left: int, top: int) -> dict[str, Any]:
    """Return a mask, bool [H,W], as keys of a shape. Its top left pixel is at ``left``, ``top`` of the image."""
    encoded = io.BytesIO()
    Image.fromarray(inside.astype(np.uint8) * 255).save(encoded, format="PNG")
    height, width = inside.shape
    corners = [[left, top], [left + width - 1, top + height - 1]]
    return {"points": corners, "shape_type": "mask", "mask": base64.b64encode(encoded.getvalue()).decode()}


def shapes_of_hints(hints: Hints) -> Iterator[dict[str, Any]]:
    """Yield hints as shapes: points, rectangles and masks."""
    points_by_label: dict[str, Sequence[Point]] = {"fg": hints.points, "bg": hints.not_points}
    for label, points in points_by_label.items():
        for point in points:
            yield _as_shape(label, [list(point)], "point")
    for x0, y0, x1, y1 in hints.boxes:
        yield _as_shape("fg", [[x0, y0], [x1, y1]], "rectangle")
    areas = {"fg": hints.object_area, "bg": hints.background_area, "keep": hints.keep, "drop": hints.drop}
    for label, area in areas.items():
        if area is not None and area.any():
            rows, columns = np.flatnonzero(area.any(axis=1)), np.flatnonzero(area.any(axis=0))
            top, left = int(rows[0]), int(columns[0])
            cropped = area[top : rows[-1] + 1, left : columns[-1] + 1]
            yield _as_shape(label=label, **_mask_at(cropped, left, top))
