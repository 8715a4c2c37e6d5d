"""Learning rates as functions of the step, and the running mean of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from icm_cli.training.settings import TrainConfig

START_FACTOR = 1e-6
"""Factor of the rate at step 0 of the warm-up (released code)."""


def rate_factor(step: int, config: TrainConfig, elapsed: float | None = None) -> float:
    """Factor of the learning rates at ``step`` (from 0): linear warm-up, then constant or a cosine.

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


class Ema:
    """Mean of tensors over steps, weights decaying; with ``decay`` None it is the tensors themselves.

    Early on the mean is short, so that it does not remember the start: the decay is at most (1 + n) / (10 + n) at step
    n. Counters, such as BatchNorm's, are copied.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float | None) -> None:
        self._live = tensors
        self._decay = decay
        self.mean = {} if decay is None else {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the tensors as they are after ``step`` (from 0)."""
        if self._decay is None:
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, mean in self.mean.items():
            if mean.is_floating_point():
                mean.lerp_(self._live[name].detach(), 1 - decay)
            else:
                mean.copy_(self._live[name])

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The model has the mean of its weights for as long as this lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, mean in self.mean.items():
            kept = self._live[name].detach().clone()
            self._live[name].copy_(mean)
            mean.copy_(kept)
