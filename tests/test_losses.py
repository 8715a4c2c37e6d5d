"""Losses and learning rate schedule: equality with the published code, and properties."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from icm_cli.errors import ConfigError
from icm_cli.training.learner import learning_rate_factor
from icm_cli.training.losses import LOSS_NAMES, compute_losses, quantise_trimap
from icm_cli.training.settings import LossConfig, TrainConfig

GOLDEN = Path(__file__).parent / "golden"
RELEASED = LossConfig(binary_rule="constant")
ONLY = {
    "unknown_l1": "unknown_l1_loss",
    "known_l1": "known_l1_loss",
    "known_smooth_l1": "known_smooth_l1_loss",
    "laplacian": "loss_pha_laplacian",
    "gradient_penalty": "loss_gradient_penalty",
}
"""Name of a loss -> its name in the published code."""


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.atleast_1d(value)) for name, value in np.load(GOLDEN / "losses.npz").items()}


@pytest.mark.parametrize("case", range(3))
def test_total_and_gradient_equal_the_published_code(golden: dict[str, Tensor], case: int) -> None:
    alpha = golden[f"{case}_pred"].clone().requires_grad_()
    terms = compute_losses(alpha, golden[f"{case}_alpha"], golden[f"{case}_trimap"], RELEASED)
    total = terms["total"].sum()
    total.backward()
    torch.testing.assert_close(total.detach().double(), golden[f"{case}_total"][0], atol=1e-4, rtol=0)
    assert alpha.grad is not None
    torch.testing.assert_close(alpha.grad, golden[f"{case}_grad"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", range(3))
def test_each_loss_equals_the_published_code(golden: dict[str, Tensor], case: int) -> None:
    terms = compute_losses(golden[f"{case}_pred"], golden[f"{case}_alpha"], golden[f"{case}_trimap"], RELEASED)
    sums = {name: float(term.sum()) for name, term in terms.items()}
    sums["known_l1"] += sums.pop("known_smooth_l1")  # the published code adds both under this name
    for name in ("unknown_l1", "known_l1", "laplacian", "gradient_penalty"):
        assert sums[name] == pytest.approx(float(golden[f"{case}_{ONLY[name]}"]), abs=1e-4)


@pytest.mark.parametrize("name", ONLY)
def test_losses_of_one_sample_equal_the_published_code(golden: dict[str, Tensor], name: str) -> None:
    """For one sample, the losses of the published code over the batch are the same."""
    from icm_cli.training import losses as module

    unknown = (golden["0_trimap"] == 0.5).float()
    value = module.LOSS_FUNCTIONS[name](golden["0_pred"], golden["0_alpha"], unknown)
    assert float(value.sum()) == pytest.approx(float(golden[f"0_only_{ONLY[name]}"]), abs=1e-4)


def test_schedule_equals_the_published_code() -> None:
    golden = np.load(GOLDEN / "schedule.npz")
    ours = [learning_rate_factor(int(step), TrainConfig()) for step in golden["steps"]]
    np.testing.assert_allclose(ours, golden["factor"], rtol=1e-9)


def test_cosine_schedule_ends_at_zero() -> None:
    config = TrainConfig(steps=1000, schedule="cosine", warmup_steps=100)
    factors = [learning_rate_factor(step, config) for step in range(1001)]
    assert factors[100] == 1.0
    assert factors[550] == pytest.approx(0.5)
    assert factors[1000] == pytest.approx(0.0)
    assert all(a > b for a, b in itertools.pairwise(factors[100:]))


def batch(seed: int, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Return random alpha, truth and trimap, [count,1,64,64]; the last truth is binary, the one before constant."""
    generator = torch.Generator().manual_seed(seed)
    alpha, truth = torch.rand(2, count, 1, 64, 64, generator=generator).unbind()
    truth[-1] = (truth[-1] > 0.5).float()
    truth[-2] = 0.0
    trimap = torch.randint(0, 3, (count, 1, 64, 64), generator=generator) / 2
    return alpha, truth, trimap


ALL = LossConfig(cross_entropy=0.7, dice=0.5, l1=0.3)


@given(seed=st.integers(0, 10_000), rule=st.sampled_from(["binary", "constant"]))
@settings(max_examples=15)
def test_loss_of_a_sample_does_not_depend_on_its_batch(seed: int, rule: str) -> None:
    config = replace(ALL, binary_rule=rule)  # type: ignore[arg-type]
    together = compute_losses(*batch(seed), config)
    alone = [compute_losses(*(each[i : i + 1] for each in batch(seed)), config) for i in range(3)]
    for name, values in together.items():
        torch.testing.assert_close(values, torch.cat([each[name] for each in alone]))


@given(seed=st.integers(0, 10_000))
@settings(max_examples=15)
def test_losses_of_the_truth_are_zero_except_for_smoothness(seed: int) -> None:
    _, truth, trimap = batch(seed)
    terms = compute_losses(truth, truth, trimap, ALL)
    for name in ("unknown_l1", "known_l1", "known_smooth_l1", "laplacian", "l1"):
        assert float(terms[name].abs().max()) == 0
    assert float(terms["dice"].abs().max()) < 1e-6
    without = compute_losses(truth, truth, torch.zeros_like(trimap), ALL)
    assert float(without["gradient_penalty"].abs().max()) == 0


def test_binary_rule_selects_the_binary_samples() -> None:
    """In the paper, any mask of zeros and ones is binary; in the released code, only a constant one."""
    alpha, truth, trimap = batch(1)
    by_intent = compute_losses(alpha, truth, trimap, LossConfig())
    released = compute_losses(alpha, truth, trimap, RELEASED)
    assert (by_intent["known_smooth_l1"] > 0).tolist() == [False, True, True]
    assert (released["known_smooth_l1"] > 0).tolist() == [False, True, False]
    assert (by_intent["laplacian"] > 0).tolist() == [True, False, False]
    assert (released["laplacian"] > 0).tolist() == [True, False, True]


def test_weights_scale_losses_and_zero_removes_them() -> None:
    alpha, truth, trimap = batch(2)
    plain, doubled = (compute_losses(alpha, truth, trimap, replace(ALL, dice=weight)) for weight in (0.5, 1.0))
    torch.testing.assert_close(doubled["dice"], 2 * plain["dice"])
    without = compute_losses(alpha, truth, trimap, replace(ALL, dice=0.0))
    assert "dice" not in without
    torch.testing.assert_close(plain["total"], without["total"] + plain["dice"])


@pytest.mark.parametrize("change", [{"dice": -1.0}, dict.fromkeys(LOSS_NAMES, 0.0)])
def test_invalid_weights_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="loss"):
        replace(ALL, **change)  # type: ignore[arg-type]


def test_trimap_files_have_three_levels() -> None:
    levels = quantise_trimap(torch.tensor([0, 84, 85, 128, 169, 170, 255], dtype=torch.uint8))
    assert levels.tolist() == [0.0, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0]


def test_laplacian_needs_64_px() -> None:
    small = torch.rand(1, 1, 48, 64)
    with pytest.raises(ValueError, match="64 px"):
        compute_losses(small, small, small, LossConfig())
