"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math

from icm_cli.training.settings import TrainConfig

START_FACTOR = 1e-6
"""Of the rate, at step 0 of the warm-up (released code)."""


def rate_factor(step: int, config: TrainConfig, elapsed: float | None = None) -> float:
    """What the learning rates are multiplied by at ``step`` (from 0): linear warm-up, then constant or a cosine.

    The cosine ends with the last step, or with the minutes of the run, of which ``elapsed`` (0..1) have passed.
    """
    if step < config.warmup_steps:
        return START_FACTOR + (1.0 - START_FACTOR) * step / config.warmup_steps
    if config.decay == "constant":
        return 1.0
    progress = elapsed
    if progress is None:
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
