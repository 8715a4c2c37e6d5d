"""A session about one image gives the alphas of ``Predictor.matte``, and computes once what no hint changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import model_choice

import icm_cli
from icm_cli.geometry import ImageU8
from icm_cli.matting import prompting
from icm_cli.matting.crops import CropBox
from icm_cli.matting.prompting import find_zoom_box
from icm_cli.model.contracts import Matte

SIZE = (96, 128)
CENTRE = (40.0, 48.0)
"""Centre of the object, x and y."""


def make_image() -> ImageU8:
    """A disc on a flat background, and a smaller one of a similar colour."""
    rgb = np.full((*SIZE, 3), 60, np.uint8)
    cv2.circle(rgb, (40, 48), 24, (230, 90, 40), -1)
    cv2.circle(rgb, (100, 60), 14, (200, 110, 60), -1)
    return rgb


def hints_of_a_person() -> list[icm_cli.Hints | None]:
    left = np.zeros(SIZE, np.bool_)
    left[:, :20] = True
    return [
        None,
        icm_cli.Hints(size=SIZE),
        icm_cli.Hints(size=SIZE, not_points=[CENTRE]),
        icm_cli.Hints(size=SIZE, points=[(100, 60)], not_points=[CENTRE]),
        icm_cli.Hints(size=SIZE, boxes=[(84, 44, 116, 76)]),
        icm_cli.Hints(size=SIZE, background_area=left),
        icm_cli.Hints(size=SIZE, keep=left),
        None,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lite", "lite-training-free"])
@pytest.mark.parametrize("is_uncertain", [False, True])
def test_alphas_are_those_of_the_predictor(model: str, is_uncertain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = model_choice(model).load_predictor()
    image, calls = make_image(), Counter[str]()
    reference = predictor.reference([(image, image[..., 0] > 210)])
    infer, embed = predictor.model.infer, predictor.prompted_objects.embed_images

    def count_infer(batch: object, *others: object) -> Matte:
        calls["infer"] += 1
        matte = infer(batch, *others)  # type: ignore[arg-type]
        if matte.presence is None:
            return matte
        everywhere = matte.presence.logit < np.inf
        return replace(matte, presence=replace(matte.presence, is_uncertain=everywhere & is_uncertain))

    def count_embed(images: list[ImageU8]) -> object:
        calls["embed"] += len(images)
        return embed(images)

    boxes: list[CropBox] = []

    def find_box(*arguments: Any) -> CropBox | None:
        box = find_zoom_box(*arguments)
        boxes.extend([box] if box else [])
        return box

    monkeypatch.setattr(prompting, "find_zoom_box", find_box)
    monkeypatch.setattr(predictor.model, "infer", count_infer)
    monkeypatch.setattr(predictor.prompted_objects, "embed_images", count_embed)
    session = predictor.session(image, reference)
    answers = [(session.coarse(hints), session.matte(hints)) for hints in hints_of_a_person()]
    if not is_uncertain or model != "lite":
        assert calls["infer"] == 1
        assert calls["embed"] == 1 + len({repr(box) for box in boxes})  # the image, and each crop once
        assert boxes
    for hints, (coarse, alpha) in zip(hints_of_a_person(), answers, strict=True):
        assert (alpha == predictor.matte(image, reference, hints)).all()
        assert (coarse.shape, coarse.dtype) == (SIZE, np.uint8)
        assert np.abs(coarse / 255.0 - alpha / 255.0).mean() < 0.1
        for name, is_on in (("points", True), ("not_points", False)):
            for x, y in getattr(hints, name, ()):
                assert (coarse[int(y), int(x)] > 127) == (alpha[int(y), int(x)] > 127) == is_on
        if hints is not None and hints.keep is not None:
            assert (coarse[hints.keep] == 255).all()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lite", "lite-training-free"])
def test_a_session_follows_mattes(model: str) -> None:
    """The garbage matte hides the larger disc, so that the model does not see it."""
    predictor = model_choice(model).load_predictor()
    image = make_image()
    reference = predictor.reference([(image, image[..., 0] > 210)])
    garbage, keep = np.zeros(SIZE, np.float32), np.zeros(SIZE, np.uint8)
    garbage[:, :70], keep[:10, 100:] = 1, 255
    session = predictor.session(image, reference, garbage=garbage, keep=keep)
    for hints in (None, icm_cli.Hints(size=SIZE, points=[(100, 60)], keep=keep > 0)):
        alpha, coarse = session.matte(hints), session.coarse(hints)
        assert (alpha == predictor.matte(image, reference, hints, garbage=garbage > 0, keep=keep)).all()
        for answer in (alpha, coarse):
            assert not answer[10:, :70].any()
            assert (answer[keep > 0] == 255).all()
