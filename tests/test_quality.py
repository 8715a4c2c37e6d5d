"""The signals of the quality of an alpha, the estimate from them, and its benchmark."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import Icm
from hypothesis import given
from hypothesis import strategies as st

import icm_cli
from icm_cli.images.reading import read_alpha, read_image
from icm_cli.matting.quality_signals import LONG_SIDE_PX, measure_signals
from icm_cli.quality.estimate import NOTHING_FOUND, WEIGHTS_PATH, Estimate, estimate_quality

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from bench_quality import auroc, calibration_error, found_in_lowest
from calibrate_quality import MIN_WRONG, find_threshold, fit_logistic

DEMO = Path(__file__).parent / "demo"

SIZE = (120, 160)
WEIGHTS = json.loads(WEIGHTS_PATH.read_text())


def draw_disc(x: int = 80, y: int = 60, radius: int = 30, blur: float = 0.0) -> np.ndarray:
    alpha = np.zeros(SIZE, np.float32)
    cv2.circle(alpha, (x, y), radius, 1.0, -1)
    return cv2.GaussianBlur(alpha, None, blur) if blur else alpha  # type: ignore[call-overload]


def draw_image() -> np.ndarray:
    """A red disc on blue."""
    return np.where(draw_disc()[..., None] > 0.5, (200, 30, 20), (10, 20, 120)).astype(np.uint8)


def signals_of(alpha: np.ndarray, coarse: np.ndarray | None = None, **of_head: float) -> dict[str, float]:
    earlier = {"coarse_agreement": alpha if coarse is None else coarse, "completed_agreement": alpha}
    return measure_signals(draw_image(), alpha, alpha, earlier, of_head)


def good_signals() -> dict[str, float]:
    """Signals of an alpha whose every signal is at the better end of its range."""
    ends = {name: scale["max" if scale["weight"] > 0 else "min"] for name, scale in WEIGHTS["shown"]["signals"].items()}
    return {**signals_of(draw_disc(), presence=100.0, similarity=0.9, confidence=1.0), **ends}


class TestSignals:
    def test_clean_disc(self) -> None:
        signals = signals_of(draw_disc(), confidence=0.9, presence=55.5)
        expected = {"coarse_agreement": 1, "completed_agreement": 1, "completed_confidence": 1}
        expected |= {"soft_interior": 0, "largest_component": 1, "border": 0}
        expected |= {"confidence": 0.9, "presence": 55.5}
        assert {name: signals[name] for name in expected} == expected
        assert signals["foreground"] == pytest.approx(np.pi * 30**2 / 120 / 160, rel=0.05)
        box = [signals[name] * SIZE[n % 2 == 0] for n, name in enumerate(("left", "top", "right", "bottom"))]
        assert box == pytest.approx([50, 30, 111, 91], abs=1)
        red = cv2.cvtColor(np.float32([[[200, 30, 20]]]) / 255, cv2.COLOR_RGB2LAB)[0, 0]
        assert [signals[name] for name in ("lightness", "green_red", "blue_yellow")] == pytest.approx(red, abs=3)

    def test_faults_are_seen(self) -> None:
        clean = signals_of(draw_disc())
        soft = np.where(draw_disc(radius=15) > 0, np.float32(0.6), draw_disc())
        assert signals_of(soft)["soft_interior"] > 0.1 + clean["soft_interior"]
        assert signals_of(soft)["completed_confidence"] < clean["completed_confidence"]
        split = np.maximum(draw_disc(40, 60, 20), draw_disc(120, 60, 20))
        assert signals_of(split)["largest_component"] == pytest.approx(0.5, abs=0.01)
        assert signals_of(draw_disc(0))["border"] > 1
        assert signals_of(draw_disc(), coarse=draw_disc(radius=15))["coarse_agreement"] == pytest.approx(0.25, abs=0.02)

    @pytest.mark.parametrize("value", [0.0, 0.3])
    def test_alpha_without_an_object_has_no_object_signals(self, value: float) -> None:
        signals = signals_of(np.full(SIZE, value, np.float32))
        assert not {"left", "largest_component"} & signals.keys()
        assert signals["foreground"] == pytest.approx(value, abs=1e-4)

    @pytest.mark.parametrize(
        "alpha", [np.ones(SIZE, np.float32), np.pad(np.ones((1, 1), np.float32), ((0, 119), (0, 159)))]
    )
    def test_full_alpha_and_single_pixel(self, alpha: np.ndarray) -> None:
        assert all(np.isfinite(value) for value in signals_of(alpha).values())

    def test_size_hardly_matters(self) -> None:
        small, rgb, alpha = signals_of(draw_disc()), draw_image(), draw_disc()
        rgb, alpha = (cv2.resize(each, None, fx=8, fy=8, interpolation=cv2.INTER_LINEAR) for each in (rgb, alpha))
        assert max(alpha.shape) > LONG_SIDE_PX
        large = measure_signals(rgb, alpha, draw_disc(), {"coarse_agreement": draw_disc()}, {})
        for name in ("foreground", "coarse_agreement", "largest_component", "left", "border", "lightness"):
            assert large[name] == pytest.approx(small[name], abs=0.02 * max(1, abs(small[name])))

    def test_agreement(self) -> None:
        larger, empty = cv2.resize(draw_disc(), (320, 240)), np.zeros(SIZE, np.float32)
        assert signals_of(draw_disc(), coarse=larger)["coarse_agreement"] > 0.97
        assert signals_of(empty)["coarse_agreement"] == 1
        assert signals_of(draw_disc(30), coarse=draw_disc(130))["coarse_agreement"] == 0


class TestEstimate:
    def test_good_and_bad(self) -> None:
        good = estimate_quality(good_signals())
        assert good.quality > 0.9
        assert not good.reasons
        bad = {"coarse_agreement": 0.3, "completed_agreement": 0.4, "completed_confidence": 0.4}
        estimate = estimate_quality(good_signals() | bad)
        assert estimate.quality < 0.6
        assert "passes disagree" in estimate.reasons

    @pytest.mark.parametrize("reason", WEIGHTS["reasons"])
    def test_every_reason_is_given_beyond_its_threshold(self, reason: str) -> None:
        threshold = WEIGHTS["reasons"][reason]
        sign, at = (-1, threshold["below"]) if "below" in threshold else (1, threshold["above"])
        for offset, expected in ((-0.01, False), (0.01, True)):
            reasons = estimate_quality({**good_signals(), threshold["signal"]: at + sign * offset}).reasons
            assert (reason in reasons) is expected

    @given(st.dictionaries(st.sampled_from(sorted(good_signals())), st.floats(-1e6, 1e6)))
    def test_any_signals_have_a_quality(self, signals: dict[str, float]) -> None:
        estimate = estimate_quality(signals)
        assert 0 <= estimate.quality <= 1
        assert estimate == estimate_quality(json.loads(json.dumps(signals)))

    @given(st.sampled_from(sorted(WEIGHTS["shown"]["signals"])), st.lists(st.floats(-2, 2), min_size=2, max_size=5))
    def test_quality_is_monotonic_in_each_signal(self, name: str, values: list[float]) -> None:
        sign = 1 if WEIGHTS["shown"]["signals"][name]["weight"] > 0 else -1
        ordered = sorted(values, key=lambda value: sign * value)
        qualities = [estimate_quality({**good_signals(), name: value}).quality for value in ordered]
        assert all(one <= other for one, other in itertools.pairwise(qualities))

    def test_empty_alpha(self) -> None:
        empty = signals_of(np.zeros(SIZE, np.float32))
        absent, missed = (estimate_quality(empty | {"presence": logit, "similarity": 0.3}) for logit in (-80, -2))
        assert absent.quality > 0.85 > missed.quality
        assert absent.reasons == missed.reasons == (NOTHING_FOUND,)

    def test_missing_signals_count_as_their_mean(self) -> None:
        means = {name: scale["mean"] for name, scale in WEIGHTS["shown"]["signals"].items()}
        signals = {"largest_component": 1.0}
        assert estimate_quality(signals) == Estimate(estimate_quality(signals | means).quality)


@pytest.mark.slow
def test_lite_measures_all_signals_of_the_estimate() -> None:
    rgb, mask = read_image(DEMO / "ref.jpg").rgb, read_alpha(DEMO / "mask.png")
    predictor = icm_cli.load(device="cpu", offline=True)
    small, small_mask = cv2.resize(rgb, (192, 192)), cv2.resize(mask, (192, 192))
    reference, frame = predictor.reference([(small, small_mask)]), predictor.prepare_frame(small)
    (result,) = predictor.matte_frames([frame], reference)
    assert WEIGHTS["shown"]["signals"].keys() | WEIGHTS["empty"]["signals"].keys() <= result.signals.keys()
    assert all(value == round(value, 4) for value in result.signals.values())
    assert estimate_quality(result.signals).quality > 0.7


def test_kept_alphas_have_the_same_quality(icm: Icm, scene: Path) -> None:
    """Also with a small model of another head, which does not measure all signals."""
    reports = [scene / "computed.json", scene / "kept.json"]
    for report in reports:
        assert icm(report=report).exit_code == 0
    computed, kept = (json.loads(report.read_text())["images"] for report in reports)
    assert [image["status"] for image in kept] == ["kept"] * len(kept)
    for one, other in zip(computed, kept, strict=True):
        assert 0 <= one["quality"] <= 1
        assert (one["quality"], one["reasons"]) == (other["quality"], other["reasons"])


def test_benchmark_measures() -> None:
    quality, is_wrong = np.array([0.1, 0.9, 0.4, 0.8]), np.array([True, False, True, False])
    assert auroc(quality, is_wrong) == 1
    assert auroc(-quality, is_wrong) == 0
    assert auroc(np.ones(4), is_wrong) == 0.5
    assert found_in_lowest(np.arange(10.0), np.arange(10) % 5 == 0) == 0.5
    assert calibration_error(quality, quality) == 0
    assert calibration_error(np.full(20, 0.7), np.full(20, 0.9)) == pytest.approx(0.2)


def test_calibration_finds_weights_and_thresholds() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2000, 2))
    weights = fit_logistic(values, 1 / (1 + np.exp(-(0.5 + 2 * values[:, 0]))))
    assert weights == pytest.approx([0.5, 2, 0], abs=0.05)
    ordered = np.arange(100.0)
    assert find_threshold(ordered, ordered < 20) == pytest.approx(20 / MIN_WRONG - 1, abs=1)
    assert find_threshold(ordered, ordered > 50) is None
