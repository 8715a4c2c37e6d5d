"""Figures of the steps since the last log line, and where the time went."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

from torch import Tensor

from icm_cli.training.batches import Batch


class StepStats:
    """Adds up losses and times; ``waiting`` is time in which the model had no samples."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._samples = 0
        self._steps = 0
        self._since = time.perf_counter()
        self._waiting = 0.0
        self._paused = 0.0
        self.total_samples = 0
        self.total_waiting = 0.0
        self.total_seconds = 0.0
        """Seconds of the steps; validation, saving and logging are left out."""

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time until it is there counts as waiting."""
        before = time.perf_counter()
        batch = next(batches)
        self._waiting += time.perf_counter() - before
        return batch

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Take the losses [B] of a micro-batch."""
        for name, values in terms.items():
            self._sums["loss" if name == "total" else name] += float(values.detach().sum())
        self._samples += len(terms["total"])

    def stepped(self, gradient_norm: float) -> None:
        """A step is complete."""
        self._steps += 1
        self._sums["gradient_norm"] += gradient_norm

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no step's."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - before

    @property
    def seconds(self) -> float:
        """Seconds of the steps so far; validation, saving and logging are left out."""
        return self.total_seconds + time.perf_counter() - self._since - self._paused

    def figures(self, rate: float) -> dict[str, float]:
        """Means since the last call, and begin anew; names as in the log."""
        seconds = max(1e-9, time.perf_counter() - self._since - self._paused)
        self.total_samples += self._samples
        self.total_waiting += self._waiting
        self.total_seconds += seconds
        figures = {
            name: value / (self._steps if name == "gradient_norm" else self._samples)
            for name, value in self._sums.items()
        }
        figures |= {
            "rate": rate,
            "samples_per_second": self._samples / seconds,
            "waiting_share": self._waiting / seconds,
            "seconds": seconds,
        }
        self._sums.clear()
        self._samples = self._steps = 0
        self._waiting = self._paused = 0.0
        self._since = time.perf_counter()
        return figures
