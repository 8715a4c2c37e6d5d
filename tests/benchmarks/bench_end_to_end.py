"""Measure the speed of the stage "end-to-end" on a device, relative to the speed of a matrix product in the same run.

    python tests/benchmarks/bench_end_to_end.py data.yaml --start lite.safetensors --device cuda --seconds 60

prints the seconds of waiting for the images of a batch and of a step, steps and mosaics per second, the floating-point
operations of a step (torch's counter, forward and backward), and the speed relative to a product of two large bfloat16
matrices.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from icm_cli.events import TrainingListener
from icm_cli.options import TrainingDeviceOptions
from icm_cli.training.data.pool import read_pool
from icm_cli.training.learner import Learner
from icm_cli.training.settings import read_settings
from icm_cli.training.stages import make_stage

RECIPE = Path(__file__).parents[2] / "configs" / "train" / "lite-end-to-end.yaml"
WARM_UP_STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    settings = read_settings(RECIPE, given.data, given.set)
    stage = make_stage(settings, read_pool(settings.data))
    options = TrainingDeviceOptions(device=given.device, workers=given.workers, offline=True)
    learner = Learner(settings, stage.trainable_parts, stage.select_module, given.start, options)
    device = learner.device.torch_device
    stage.prepare(learner, Path(), 0, TrainingListener())
    batches = stage.make_batches(learner, 0)

    def synchronise() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def take_step() -> float:
        """Take a step and return the seconds until its batch was available."""
        before = synchronise()
        batch = next(batches)
        made = synchronise() - before
        with learner.accumulate_gradients():
            losses = stage.compute_losses(stage.predict(learner.forward, batch), batch)
            learner.backward(losses["total"].sum())
            learner.clip_gradients()
            learner.step_optimiser()
        learner.ema.update(0)
        return made

    with FlopCounterMode(display=False) as counter:
        for _ in range(WARM_UP_STEPS):
            take_step()
    operations = counter.get_total_flops() / WARM_UP_STEPS
    began, making, steps = synchronise(), 0.0, 0
    while time.perf_counter() - began < given.seconds:
        making += take_step()
        steps += 1
    seconds = (synchronise() - began) / steps
    limit = measure_product_speed(device)
    size = settings.train.batch_size
    print(f"{seconds:.4f} s per step, including {making / steps:.4f} s of waiting for its images")
    print(f"{1 / seconds:.2f} steps/s, {size / seconds:.1f} mosaics/s; peak {learner.device.peak_memory_bytes()} bytes")
    print(
        f"{operations / 1e12:.3f} TFLOP per step: {operations / seconds / 1e12:.2f} TFLOP/s, "
        f"{operations / seconds / limit:.1%} of a bfloat16 product's {limit / 1e12:.1f} TFLOP/s"
    )


def measure_product_speed(device: torch.device) -> float:
    """Return the operations per second of a product of two bfloat16 matrices, the best of several."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        before = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - before)
    return 2.0 * side**3 / best


if __name__ == "__main__":
    main()
