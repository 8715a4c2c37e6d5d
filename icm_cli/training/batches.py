"""Batches of training samples: their order, and loading them ahead of time in worker processes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Generic, Self, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from icm_cli.errors import ImageError, TrainingError

WORKER_NICENESS = 15
MAX_ATTEMPTS = 10
"""Number of unreadable draws for one sample after which training ends."""


@dataclass(frozen=True)
class Batch:
    """A batch of samples. Each stage of training adds its tensors, with the samples along the first axis."""

    names: tuple[str, ...]
    counters: tuple[int, ...]
    skipped: tuple[str, ...]
    """For each draw that could not be read: the reason."""

    def named_tensors(self) -> dict[str, Tensor]:
        """Return the tensors by field name; tensors of a tuple are numbered ("scales.0")."""
        found: dict[str, Tensor] = {}
        for name, value in vars(self).items():
            parts = {f"{name}.{i}": part for i, part in enumerate(value)} if isinstance(value, tuple) else {name: value}
            found |= {key: part for key, part in parts.items() if isinstance(part, Tensor)}
        return found

    def first_samples(self, count: int) -> Self:
        """Return a batch of at most the first ``count`` samples."""
        fewer = replace(self, names=self.names[:count], counters=self.counters[:count])
        return fewer._map_tensors(lambda tensor: tensor[:count])

    def pin_memory(self) -> Self:
        """Copy to page-locked memory, which a GPU reads faster. DataLoader calls this method."""
        return self._map_tensors(Tensor.pin_memory)

    def to(self, device: torch.device) -> Self:
        """Copy to a device."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                changed[name] = change(value)
            elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
                changed[name] = tuple(change(part) for part in value)
        return replace(self, **changed)


BatchT = TypeVar("BatchT", bound=Batch)


@dataclass(frozen=True)
class Sample:
    """A training sample. Each stage adds its arrays, named like the tensors of its batches."""

    name: str
    counter: int
    skipped: tuple[str, ...] = field(default=(), kw_only=True)
    """For each earlier draw that could not be read: the reason."""


SampleT = TypeVar("SampleT", bound=Sample)


class SampleDataset(Dataset["SampleT | str"], Generic[SampleT]):
    """Makes sample number ``counter``, which is the same in every run, process and worker with the same seed.

    If no sample can be made, the item is a str with the reason (an exception would lose its type between processes).
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def draw_sample(self, counter: int, rng: np.random.Generator) -> SampleT:
        """Draw a sample. Raises ImageError if an image cannot be read."""
        raise NotImplementedError

    def __getitem__(self, counter: int) -> SampleT | str:
        skipped: list[str] = []
        for attempt in range(MAX_ATTEMPTS):
            rng = np.random.default_rng((self._seed, counter, attempt))
            try:
                return replace(self.draw_sample(counter, rng), skipped=tuple(skipped))
            except ImageError as error:
                skipped.append(str(error))
        return (
            f"sample {counter} could not be made in {MAX_ATTEMPTS} draws; the last reason: {skipped[-1]}. Repair the "
            "data, or exclude files with 'exclude'"
        )

    def make_sample(self, counter: int) -> SampleT:
        """Make sample number ``counter``. Raises TrainingError if all draws are unreadable."""
        sample = self[counter]
        if isinstance(sample, str):
            raise TrainingError(sample)
        return sample


def collate_samples(batch_class: type[BatchT], samples: Sequence[Sample | str]) -> BatchT | str:
    """Stack samples into a batch, or return the reason why one of them could not be made."""
    made = [sample for sample in samples if isinstance(sample, Sample)]
    if len(made) < len(samples):
        return next(sample for sample in samples if isinstance(sample, str))
    arrays = {each.name for each in fields(batch_class)} - {each.name for each in fields(Batch)}
    return batch_class(
        tuple(sample.name for sample in made),
        tuple(sample.counter for sample in made),
        tuple(reason for sample in made for reason in sample.skipped),
        **{name: torch.from_numpy(np.stack([getattr(sample, name) for sample in made])) for name in arrays},
    )


@dataclass(frozen=True)
class StepSampler(Sampler[list[int]]):
    """Sample numbers of this process, one micro-batch at a time, from ``first_step`` to the end.

    Step s consists of samples s * batch_size to (s + 1) * batch_size - 1, whatever the number of processes and
    micro-batches.
    """

    batch_size: int
    micro_batch_size: int
    process: int
    processes: int
    first_step: int
    steps: int | None
    """None: without an end."""

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.micro_batch_size * self.processes
        start = self.first_step * self.batch_size + self.process * self.micro_batch_size
        end = math.inf if self.steps is None else self.steps * self.batch_size
        while start < end:
            yield list(range(start, start + self.micro_batch_size))
            start += stride


def load_batches(
    dataset: SampleDataset[Any], sampler: StepSampler, batch_class: type[BatchT], *, workers: int, pin: bool
) -> Iterator[BatchT]:
    """Yield batches in the order of ``sampler``, loaded ahead by ``workers`` processes.

    With 0 workers each batch is made in this process when it is requested. Raises TrainingError if a sample cannot be
    made.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=partial(collate_samples, batch_class),
        num_workers=workers,
        worker_init_fn=initialise_worker if workers else None,
        multiprocessing_context="spawn" if workers else None,  # fork would copy the model's threads in any state
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
        # When a worker has died, torch raises wherever the main process happens to be, also while it stops the other
        # workers; raised from a destructor, this would print a traceback. No further samples are needed here.
        with contextlib.suppress(RuntimeError):
            getattr(batches, "_shutdown_workers", lambda: None)()


def initialise_worker(_: int) -> None:
    """Initialise a worker process: a single thread, low priority, and no handling of Ctrl-C.

    The priority is low because on a CPU the model's threads need the same cores, and one delayed thread delays all
    others. The main process handles the signals.
    """
    import os
    import signal

    if hasattr(os, "nice"):
        os.nice(WORKER_NICENESS)
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
