"""Batches of training samples, and how they come: in order, by step, made ahead by workers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from icm_cli.errors import TrainingError

WORKER_NICENESS = 15


@dataclass(frozen=True)
class Batch:
    """Samples side by side; every stage of training adds its tensors, the samples first."""

    names: tuple[str, ...]
    counters: tuple[int, ...]
    skipped: tuple[str, ...]
    """Why draws before these could not be read."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name; those of a tuple are numbered."""
        found: dict[str, Tensor] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Tensor):
                found[each.name] = value
            elif isinstance(value, tuple):
                found.update({f"{each.name}.{i}": part for i, part in enumerate(value) if isinstance(part, Tensor)})
        return found

    def first(self, count: int) -> Self:
        """The first samples."""
        fewer = replace(self, names=self.names[:count], counters=self.counters[:count])
        return fewer._mapped(lambda tensor: tensor[:count])

    def pin_memory(self) -> Self:
        """Copy to page-locked memory, for a faster way to a GPU; DataLoader calls it."""
        return self._mapped(Tensor.pin_memory)

    def to(self, device: torch.device) -> Self:
        """Copy to a device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Tensor):
                changed[each.name] = change(value)
            elif isinstance(value, tuple) and value and all(isinstance(part, Tensor) for part in value):
                changed[each.name] = tuple(change(part) for part in value)
        return replace(self, **changed)


AnyBatch = TypeVar("AnyBatch", bound=Batch)


@dataclass(frozen=True)
class StepSampler(Sampler[list[int]]):
    """Order in which this process takes samples, micro-batch by micro-batch, from a step on to the end.

    Step s is made of samples s * batch_size and following, whatever the number of processes and micro-batches.
    """

    batch_size: int
    micro_batch_size: int
    process: int
    processes: int
    first_step: int
    steps: int | None
    """None: without an end."""

    def __iter__(self) -> Iterator[list[int]]:
        together = self.micro_batch_size * self.processes
        start = self.first_step * self.batch_size + self.process * self.micro_batch_size
        end = math.inf if self.steps is None else self.steps * self.batch_size
        while start < end:
            yield list(range(start, start + self.micro_batch_size))
            start += together


def load_batches(
    maker: Dataset[Any],
    sampler: StepSampler,
    collate: Callable[[list[Any]], AnyBatch | str],
    *,
    workers: int,
    pin: bool,
) -> Iterator[AnyBatch]:
    """Batches in the order of ``sampler``, made ahead by ``workers`` processes (0: made here when they are wanted).

    ``collate`` joins samples; a str in the place of a batch says why it cannot be made (an exception would lose its
    type on the way from a worker), and becomes a TrainingError.
    """
    loader = DataLoader(
        maker,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=start_worker if workers else None,
        multiprocessing_context="spawn" if workers else None,  # a fork would copy the model's threads half-way
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
    batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, str):
                raise TrainingError(batch)
            yield batch
    finally:
        # torch raises for a worker that dies wherever the main process is just then, while it ends the others too, and
        # from a destructor that is a traceback on the screen. By now nobody wants a sample of them.
        with contextlib.suppress(RuntimeError):
            getattr(batches, "_shutdown_workers", lambda: None)()


def start_worker(_: int) -> None:
    """Set a worker up: one thread, as there is a worker for each spare core; signals are the main process's to answer.

    On a CPU the model's threads want the same cores, and one that waits holds up the others: the worker gives way.
    """
    import os
    import signal

    if hasattr(os, "nice"):
        os.nice(WORKER_NICENESS)
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
