"""Two processes, and gradient accumulation, give the result of one process with the same batch size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from train_data import command, log, train, weights, write_config

SETTINGS = {"batch_size": 4, "batch_norm": "fixed", "steps": 3, "ema_decay": None, "clip_norm": 50.0}


@pytest.fixture
def config(tmp_path: Path, data: Path) -> Path:
    return write_config(tmp_path / "train.yaml", data, **SETTINGS)


@pytest.fixture
def alone(config: Path, tmp_path: Path) -> Path:
    assert train(config, tmp_path / "alone").exit_code == 0
    return tmp_path / "alone"


def assert_equal(out: Path, alone: Path) -> None:
    """Compare losses, and weights except for a few with a gradient near 0, which Adam changes all the same."""
    for name in ("loss", "gradient_norm"):
        ours, theirs = ([float(row[name]) for row in log(each)] for each in (out, alone))
        np.testing.assert_allclose(ours, theirs, rtol=2e-4)
    ours, theirs = weights(out / "last.safetensors"), weights(alone / "last.safetensors")
    differences = np.concatenate([np.abs(ours[name] - theirs[name]).ravel() for name in theirs])
    assert np.quantile(differences, 0.99) < 1e-6
    assert differences.max() < 6e-3


def test_gradient_accumulation_equals_one_batch(config: Path, alone: Path, tmp_path: Path) -> None:
    assert train(config, tmp_path / "out", "--set", "train.micro_batch_size=1").exit_code == 0
    assert_equal(tmp_path / "out", alone)


@pytest.mark.slow
def test_two_processes_equal_one_process(config: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for steps, flags in ((2, []), (3, ["--resume"])):
        line = command(config, out, "--set", "train.micro_batch_size=1", "--set", f"train.steps={steps}", *flags)[1:]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *line]
        done = subprocess.run(
            launch, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("icm: training from step") == 1
        assert done.stdout.count("best step") == 1
    assert_equal(out, alone)
    with pytest.raises(AssertionError):
        assert_equal(out, other_seed(config, tmp_path))


def other_seed(config: Path, tmp_path: Path) -> Path:
    """Train a run that differs from the others."""
    assert train(config, tmp_path / "other", "--set", "train.seed=1").exit_code == 0
    return tmp_path / "other"
