"""``--match same``: objects are compared with those of the references, and others are removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import Icm
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import icm_cli
from icm_cli.config import MatchConfig
from icm_cli.errors import ConfigError, UsageError
from icm_cli.guidance.hints import Hints
from icm_cli.images.reading import read_alpha, read_image
from icm_cli.matting.object_match import keep_same_objects
from icm_cli.model.contracts import ObjectTokens
from icm_cli.quality.estimate import MAYBE_ANOTHER, NOT_THE_SAME, NOTHING_FOUND, estimate_quality

DEMO = Path(__file__).parent / "demo"
CELL_PX = 4
SAME = MatchConfig("same", min_similarity=0.7, max_difference=0.1)


def unit(degrees: float) -> torch.Tensor:
    """One layer of a token, [1,2]: its cosine to ``unit(0)`` is that of the angle."""
    angle = np.radians(degrees)
    return torch.tensor([[np.cos(angle), np.sin(angle)]], dtype=torch.float32)


def make_tokens(*degrees: float, negatives: tuple[float, ...] = ()) -> ObjectTokens:
    """Tokens of a canvas that is one cell high, at these angles from the reference."""
    row = torch.cat([unit(each) for each in degrees]).T  # [2,w]
    return ObjectTokens(row[None, :, None], [unit(0)], [unit(each) for each in negatives], CELL_PX)


def alpha_of(*cells: float) -> torch.Tensor:
    """An alpha with a square in each cell whose value is not 0, separated by background."""
    alpha = torch.zeros(CELL_PX, CELL_PX * len(cells))
    for index, value in enumerate(cells):
        alpha[:, CELL_PX * index : CELL_PX * (index + 1) - 1] = value
    return alpha


def keep(alpha: torch.Tensor, tokens: ObjectTokens, config: MatchConfig = SAME) -> tuple[torch.Tensor, float | None]:
    return keep_same_objects(alpha, tokens, (alpha.shape[0], alpha.shape[1]), config)


def test_similarity_is_the_mean_cosine_of_the_layers() -> None:
    tokens = torch.stack([unit(0)[0], unit(60)[0]])[:, :, None, None]
    references = [torch.cat([unit(90), unit(60)]), torch.cat([unit(0), unit(120)])]
    compared = ObjectTokens(tokens, references, [torch.cat([unit(90), unit(150)])], CELL_PX)
    similarity = compared.compare_object(torch.ones(2, 2), (CELL_PX, CELL_PX))
    assert similarity == pytest.approx((0.75, 0.0), abs=1e-6)


def test_padding_of_the_canvas_does_not_count() -> None:
    tokens = make_tokens(0, 90)
    left, _ = tokens.compare_object(torch.ones(5, 5), (CELL_PX, CELL_PX))
    both, none = tokens.compare_object(torch.ones(5, 5), (CELL_PX, 2 * CELL_PX))
    assert left == pytest.approx(1)
    assert both == pytest.approx(np.sqrt(0.5))
    assert none == -1


def test_other_objects_are_removed_with_their_soft_edges() -> None:
    alpha = alpha_of(1, 1)
    alpha[:, CELL_PX - 1] = 0.4  # the edge of the left object
    alpha[:, -1] = 0.3
    result, similarity = keep(alpha, make_tokens(0, 80))
    assert similarity == pytest.approx(1, abs=0.02)
    assert torch.equal(result[:, : CELL_PX - 1], alpha[:, : CELL_PX - 1])
    assert not result[:, CELL_PX:].any()


def test_similar_objects_are_all_kept() -> None:
    alpha = alpha_of(1, 0, 1)
    result, _ = keep(alpha, make_tokens(10, 80, 20))
    assert torch.equal(result, alpha)


def test_an_object_that_is_much_less_similar_than_another_one_is_removed() -> None:
    alpha, tokens = alpha_of(1, 0, 1), make_tokens(0, 80, 40)  # the cosine of 40 degrees is 0.77
    result, _ = keep(alpha, tokens)
    assert not result[:, 2 * CELL_PX :].any()
    result, _ = keep(alpha, tokens, MatchConfig("same", 0.7, max_difference=0.3))
    assert torch.equal(result, alpha)


def test_nothing_is_kept_if_no_object_is_similar_enough() -> None:
    result, similarity = keep(alpha_of(1, 0, 1), make_tokens(60, 0, 50))
    assert not result.any()
    assert similarity == pytest.approx(np.cos(np.radians(50)))


def test_an_object_that_is_more_similar_to_a_negative_reference_is_removed() -> None:
    alpha = alpha_of(1, 0, 1)
    result, _ = keep(alpha, make_tokens(5, 0, 15, negatives=(20,)))
    assert torch.equal(result[:, :CELL_PX], alpha[:, :CELL_PX])
    assert not result[:, CELL_PX:].any()


def test_an_object_like_a_negative_reference_does_not_raise_the_limit_for_others() -> None:
    alpha, tokens = alpha_of(1, 0, 1), make_tokens(-15, 90, 40, negatives=(-20,))
    result, similarity = keep(alpha, tokens)
    assert torch.equal(result[:, 2 * CELL_PX :], alpha[:, 2 * CELL_PX :])
    assert not result[:, :CELL_PX].any()
    assert similarity == pytest.approx(np.cos(np.radians(40)), abs=0.01)


def test_the_similarity_of_an_object_like_a_negative_reference_is_returned_if_nothing_is_kept() -> None:
    result, similarity = keep(alpha_of(1), make_tokens(20, negatives=(20,)))
    assert not result.any()
    assert similarity == pytest.approx(np.cos(np.radians(20)), abs=0.01)


def test_small_regions_belong_to_the_nearest_object() -> None:
    alpha = alpha_of(1, 0, 0, 0, 1)
    alpha[0, CELL_PX + 1] = 1  # next to the left object, on tokens that are not similar
    alpha[0, 4 * CELL_PX - 2] = 1
    result, _ = keep(alpha, make_tokens(0, 90, 90, 90, 60))
    assert result[0, CELL_PX + 1] == 1
    assert not result[:, 2 * CELL_PX :].any()


def test_objects_that_hints_mark_are_kept_and_others_are_compared() -> None:
    alpha, tokens = alpha_of(1, 0, 1, 0, 1), make_tokens(0, 90, 60, 90, 70)
    size = (10 * CELL_PX, 50 * CELL_PX)  # of the image, ten times as large

    def kept_cells(**marks: Any) -> list[int]:
        result, _ = keep_same_objects(alpha, tokens, (CELL_PX, 5 * CELL_PX), SAME, Hints(size=size, **marks))
        return [cell for cell in (0, 2, 4) if result[0, CELL_PX * cell] > 0]

    area = np.zeros(size, bool)
    area[5:10, 170:175] = True
    assert kept_cells() == [0]
    assert kept_cells(points=[(15, 20)]) == [0]  # on the first object, which is similar anyway
    assert kept_cells(points=[(85, 20)]) == [0, 2]
    assert kept_cells(not_points=[(85, 20)]) == [0]
    assert kept_cells(boxes=[(70, 0, 130, 40)]) == [0, 2]
    assert kept_cells(boxes=[(100, 0, 130, 40)]) == [0]  # less than half of the second object
    assert kept_cells(object_area=area) == [0, 4]
    assert kept_cells(keep=area) == [0, 4]


def test_the_quality_says_that_objects_were_removed_or_may_be_others() -> None:
    removed = estimate_quality({"presence": 90.0, "object_similarity": 0.6})
    assert removed.reasons == (NOTHING_FOUND, NOT_THE_SAME)
    assert removed.quality > 0.75
    assert estimate_quality({"presence": 90.0}).reasons == (NOTHING_FOUND,)
    kept_but_empty = {"presence": 90.0, "object_similarity": 0.9, "completed_confidence": 0.4}
    assert estimate_quality(kept_but_empty).reasons == (NOTHING_FOUND,)
    shown = {"largest_component": 1.0, "presence": 90.0}
    assert estimate_quality(shown).quality > 1.8 * estimate_quality({**shown, "object_similarity": 0.7}).quality
    assert MAYBE_ANOTHER in estimate_quality({**shown, "object_similarity": 0.84}).reasons
    assert MAYBE_ANOTHER not in estimate_quality({**shown, "object_similarity": 0.86}).reasons


@pytest.mark.parametrize("settings", [{"min_similarity": 9.0}, {"max_difference": -3.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"match (min_similarity|max_difference) is"):
        MatchConfig(**settings)


def test_an_alpha_without_foreground_is_not_changed() -> None:
    alpha = alpha_of(0.4, 0.2)
    result, similarity = keep(alpha, make_tokens(0, 0))
    assert torch.equal(result, alpha)
    assert similarity is None


@given(
    arrays(np.float32, (6, 20), elements=st.sampled_from([0.0, 0.3, 0.6, 1.0])),
    st.lists(st.integers(0, 180), min_size=5, max_size=5),
)
def test_values_are_kept_or_become_zero(values: np.ndarray, degrees: list[int]) -> None:
    alpha = torch.from_numpy(values)
    result, _ = keep_same_objects(alpha, make_tokens(*degrees), (CELL_PX, 5 * CELL_PX), SAME)
    assert ((result == alpha) | (result == 0)).all()


@pytest.mark.parametrize(
    ("options", "flags", "message"),
    [
        ({"match": "same"}, [], "the head 'training-free' cannot do; omit it"),
        ({"match": "same", "model": "lite"}, ["--shot"], "--match same decides about the objects in single images"),
        ({"model": "lite", "min_similarity": "0.5"}, [], "has no effect without --match same; add it"),
        ({"match": "species"}, [], "--match is 'species'; expected kind or same"),
    ],
)
def test_conflicts_are_refused(icm: Icm, options: dict[str, str], flags: list[str], message: str) -> None:
    ended = icm(*flags, **options)
    assert ended.exit_code == 2
    assert message in " ".join(ended.stderr.split())


def test_load_refuses_a_head_that_cannot_compare_objects() -> None:
    with pytest.raises(UsageError, match="cannot do"):
        icm_cli.load("lite-training-free", match="same")


@pytest.mark.slow
def test_an_object_of_another_colour_is_left_out(icm: Icm, tmp_path: Path) -> None:
    """The robot of the demo next to another robot, which is red. The default mattes both."""
    white, other = (cv2.resize(cv2.imread(str(DEMO / "imgs" / name)), (384, 384)) for name in ("01.jpg", "03.jpg"))
    red = (other * np.array([0.3, 0.35, 1.0])).astype(np.uint8)  # BGR
    (tmp_path / "src").mkdir()
    cv2.imwrite(str(tmp_path / "src" / "robots.png"), np.hstack([white, red]))
    means, similarities = {}, {}
    for rule in ("kind", "same"):
        out, report = tmp_path / rule, tmp_path / f"{rule}.json"
        given = {"ref": DEMO / "ref.jpg", "mask": DEMO / "mask.png", "src": tmp_path / "src", "model": "lite"}
        assert icm(**given, match=rule, out=out, report=report).exit_code == 0
        alpha = cv2.imread(str(out / "robots.png"), cv2.IMREAD_UNCHANGED) / 255
        means[rule] = alpha[:, :384].mean(), alpha[:, 384:].mean()
        similarities[rule] = json.loads(report.read_text())["images"][0]["signals"].get("object_similarity")
    assert means["kind"][1] > 0.15
    assert means["same"][1] == 0
    assert means["same"][0] == pytest.approx(means["kind"][0], abs=0.005)
    assert means["same"][0] > 0.2
    assert similarities["kind"] is None
    assert 0.7 < similarities["same"] <= 1


@pytest.mark.slow
def test_a_hint_on_the_object_does_not_bring_others_back() -> None:
    white, other = (cv2.resize(read_image(DEMO / "imgs" / name).rgb, (384, 384)) for name in ("01.jpg", "03.jpg"))
    image = np.hstack([white, (other * np.array([1.0, 0.35, 0.3])).astype(np.uint8)])
    predictor = icm_cli.load(device="cpu", match="same")
    reference = predictor.reference([(read_image(DEMO / "ref.jpg").rgb, read_alpha(DEMO / "mask.png"))])
    session = predictor.session(image, reference)
    for point, is_red_shown in (((190, 200), False), ((384 + 190, 230), True)):
        hints = Hints(size=image.shape[:2], points=[point])
        alpha = session.matte(hints)
        assert np.array_equal(alpha, predictor.matte(image, reference, hints))
        for each in (alpha, session.coarse(hints)):
            assert (each[:, :384] > 127).mean() > 0.2
            assert ((each[:, 384:] > 127).mean() > 0.1) == is_red_shown
