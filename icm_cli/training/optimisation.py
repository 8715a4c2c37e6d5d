"""Learning rates as functions of the step, and the moving average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from icm_cli.training.settings import TrainConfig

START_FACTOR = 1e-6
"""Factor of the learning rate at step 0 of the warm-up (released code)."""


def learning_rate_factor(step: int, config: TrainConfig, elapsed_fraction: float | None = None) -> float:
    """Return the factor of the learning rates at ``step`` (from 0): linear warm-up, then constant or cosine.

    The cosine reaches 0 at the last step. If the run has a time limit, it reaches 0 at the end of
    that time, of which ``elapsed_fraction`` (0..1) has passed.
    """
    if step < config.warmup_steps:
        return START_FACTOR + (1.0 - START_FACTOR) * step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = elapsed_fraction
    if progress is None:
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


class MovingAverage:
    """Exponential moving average (EMA) of tensors; with ``decay`` None it is the tensors themselves.

    At step n the decay is at most (1 + n) / (10 + n), so that the average soon forgets the initial
    weights. Integer tensors, such as BatchNorm's counters, are copied.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float | None) -> None:
        self._tensors = tensors
        self._decay = decay
        self.average = {} if decay is None else {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the current tensors, those after ``step`` (from 0), to the average."""
        if self._decay is None:
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, average in self.average.items():
            if average.is_floating_point():
                average.lerp_(self._tensors[name].detach(), 1 - decay)
            else:
                average.copy_(self._tensors[name])

    @contextlib.contextmanager
    def swap_into_model(self) -> Iterator[None]:
        """Put the average into the model's tensors inside the context; restore them afterwards."""
        self._swap_tensors()
        try:
            yield
        finally:
            self._swap_tensors()

    @torch.no_grad()
    def _swap_tensors(self) -> None:
        for name, average in self.average.items():
            current = self._tensors[name].detach().clone()
            self._tensors[name].copy_(average)
            average.copy_(current)
