"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icm_cli.training.learner import MovingAverage


@given(values=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8), decay=st.floats(0.5, 0.99))
def test_moving_average_of_the_weights(values: list[float], decay: float) -> None:
    weight, counter = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    ema = MovingAverage({"weight": weight, "counter": counter}, decay)
    expected = 0.0
    for step, value in enumerate(values):
        weight.fill_(value)
        counter += 1
        ema.update(step)
        now = min(decay, (1 + step) / (10 + step))
        expected = now * expected + (1 - now) * value
    assert ema.average["weight"].item() == pytest.approx(expected, abs=1e-4)
    assert ema.average["counter"].item() == len(values)
    with ema.swap_into_model():
        assert weight.item() == pytest.approx(expected, abs=1e-4)
    assert weight.item() == values[-1]


def test_without_decay_the_average_equals_the_weights() -> None:
    weight = torch.zeros(1)
    ema = MovingAverage({"weight": weight}, None)
    weight.fill_(3)
    ema.update(0)
    with ema.swap_into_model():
        assert weight.item() == 3
