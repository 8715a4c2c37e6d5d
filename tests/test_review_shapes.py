"""Hints as shapes of labelme: nothing that they say is lost."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from test_hinting import hints_and_alphas

from icm_cli.geometry import Float
from icm_cli.guidance.annotations import read_hints
from icm_cli.guidance.hints import Area, Hints
from icm_cli.review.shapes import clean_shapes, make_annotation, parse_shapes, read_shapes, shapes_of_hints


def said_by(hints: Hints | None, size: tuple[int, int]) -> dict[str, object]:
    """Return everything that hints say, in a form that can be compared."""
    hints = hints or Hints(size=size)
    values = {each.name: getattr(hints, each.name) for each in fields(hints) if each.name != "is_outlined"}
    areas = ("object_area", "background_area", "keep", "drop")
    none: Area = np.zeros(size, np.bool_)
    return values | {name: (none if values[name] is None else values[name]).tolist() for name in areas}


@given(hints_and_alphas())
@settings(max_examples=60)
def test_hints_become_shapes_that_say_the_same(case: tuple[Hints, Float]) -> None:
    hints, _ = case
    shapes = list(shapes_of_hints(hints))
    cleaned = clean_shapes(shapes, hints.size)
    assert cleaned == shapes
    assert clean_shapes(cleaned, hints.size) == cleaned
    assert said_by(parse_shapes(cleaned, hints.size), hints.size) == said_by(hints, hints.size)


@pytest.mark.parametrize("label", ["cat", "object", " Foreground "])
def test_files_of_labelme_are_read_as_they_are(tmp_path: Path, label: str) -> None:
    size, path = (30, 40), tmp_path / "hints" / "a.json"
    shapes = [
        {"label": label, "points": [[10, 10], [20, 10], [20, 20.5]], "shape_type": "polygon"},
        {"label": label, "points": [[5, 5], [9, 9]], "shape_type": "circle"},
        {"label": "background", "points": [[30, 3], [35, 3]], "shape_type": "line", "group_id": 7},
    ]
    path.parent.mkdir()
    path.write_text(json.dumps({"shapes": shapes}))
    found = read_shapes([path], Path("a.jpg"), size)
    assert [shape["label"] for shape in found] == ["fg", "fg", "bg"]
    assert [shape["shape_type"] for shape in found] == ["polygon", "circle", "line"]
    written = tmp_path / "other" / "a.json"
    written.parent.mkdir()
    written.write_text(json.dumps(make_annotation(found, written, tmp_path / "a.jpg", size)))
    before, after = (read_hints(each, size, image=Path("a.jpg")) for each in (path, written))
    assert said_by(before, size) == said_by(after, size)
    assert json.loads(written.read_text())["imagePath"] == "../a.jpg"
