"""Batches of training samples: their order, and loading them ahead of time in worker processes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeAlias, TypeGuard, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from icm_cli.errors import ImageError, TrainingError
from icm_cli.signals import ignore_stop_signals

WORKER_NICENESS = 15
MAX_ATTEMPTS = 10
"""Number of attempts to read a sample. After them, training ends; a view of a view set is skipped instead."""
MAX_SKIPPED_FRACTION = 0.01
"""If a larger fraction of the drawn samples cannot be read, the run ends."""
MIN_DRAWS_TO_JUDGE = 100
"""The fraction is checked only after this many draws."""


@dataclass(frozen=True)
class Batch:
    """A batch of samples. Each stage of training adds its tensors, with the samples along the first axis."""

    names: tuple[str, ...]
    sample_numbers: tuple[int, ...]
    """Numbers of the samples in the run, from 0."""
    skipped: tuple[str, ...]
    """Reasons for the draws that could not be read."""
    empty_alphas: tuple[Path, ...] = field(default=(), kw_only=True)
    """Files of targets' alphas that have no object."""

    def named_tensors(self) -> dict[str, Tensor]:
        """Return the tensors by field name; tensors of a tuple are numbered ("scales.0")."""
        tensors: dict[str, Tensor] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                tensors[name] = value
            elif _is_tensor_tuple(value):
                tensors |= {f"{name}.{i}": tensor for i, tensor in enumerate(value)}
        return tensors

    def first_samples(self, count: int) -> Self:
        """Return a batch of at most the first ``count`` samples."""
        fewer = replace(self, names=self.names[:count], sample_numbers=self.sample_numbers[:count])
        return fewer._map_tensors(lambda tensor: tensor[:count])

    def pin_memory(self) -> Self:
        """Copy to page-locked memory, which a GPU reads faster. DataLoader calls this method."""
        return self._map_tensors(Tensor.pin_memory)

    def to(self, device: torch.device) -> Self:
        """Copy to a device."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a batch in which ``change`` was applied to every tensor. All other fields are the same."""
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                changed[name] = change(value)
            elif _is_tensor_tuple(value):
                changed[name] = tuple(map(change, value))
        return replace(self, **changed)


def _is_tensor_tuple(value: object) -> TypeGuard[tuple[Tensor, ...]]:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], Tensor)


BatchT = TypeVar("BatchT", bound=Batch)
Layers: TypeAlias = dict[str, NDArray[Any]]
"""Arrays of one sample, by the names of the tensors of its batch."""


class TrainingSample(NamedTuple):
    """A training sample."""

    name: str
    layers: Layers
    empty_alphas: tuple[Path, ...]
    """Files of the alphas that were drawn for a target and have no object."""


class BatchMaker(Dataset[Any], ABC, Generic[BatchT]):
    """Makes batches that depend only on the numbers of their samples and on the seed of the run."""

    @abstractmethod
    def make_batch(self, sample_numbers: Sequence[int]) -> BatchT:
        """Make the batch of some samples. Raises TrainingError if a sample cannot be made."""

    def __getitems__(self, sample_numbers: Sequence[int]) -> BatchT | str:
        """Make a batch for DataLoader. An error is returned as text, because DataLoader would change its type."""
        try:
            return self.make_batch(sample_numbers)
        except TrainingError as error:
            return str(error)


class SampleMaker(BatchMaker[BatchT]):
    """Makes batches of samples that do not depend on each other."""

    batch_class: type[BatchT]

    def __init__(self, seed: int) -> None:
        self._seed = seed

    @abstractmethod
    def draw_sample(self, rng: np.random.Generator) -> TrainingSample:
        """Draw a sample. Raises ImageError if an image cannot be read."""

    def make_batch(self, sample_numbers: Sequence[int]) -> BatchT:
        skipped: list[str] = []
        samples = [self._make_sample(sample_number, skipped) for sample_number in sample_numbers]
        names = tuple(sample.name for sample in samples)
        tensors = {
            layer: torch.from_numpy(np.stack([sample.layers[layer] for sample in samples]))
            for layer in samples[0].layers
        }
        empty_alphas = tuple(path for sample in samples for path in sample.empty_alphas)
        return self.batch_class(names, tuple(sample_numbers), tuple(skipped), **tensors, empty_alphas=empty_alphas)

    def _make_sample(self, number: int, skipped: list[str]) -> TrainingSample:
        """Make a sample. If an image cannot be read, add the reason to ``skipped`` and draw again."""
        for attempt in range(MAX_ATTEMPTS):
            try:
                return self.draw_sample(np.random.default_rng((self._seed, number, attempt)))
            except ImageError as error:
                skipped.append(str(error))
        raise TrainingError(
            f"sample {number} could not be made in {MAX_ATTEMPTS} draws; the last reason: {skipped[-1]}. Repair "
            "the data, or exclude files with 'exclude'"
        )


def assign_sample_numbers(
    batch_size: int, micro_batch_size: int, process: int, processes: int, first_step: int, steps: int | None
) -> Iterator[list[int]]:
    """Yield the sample numbers of a process, one micro-batch at a time, from ``first_step`` to the end of the run.

    Step s consists of samples s * batch_size to (s + 1) * batch_size - 1, whatever the number of processes and
    micro-batches. The processes take micro-batches in turn. ``steps`` None: without an end.
    """
    start = first_step * batch_size + process * micro_batch_size
    stride = micro_batch_size * processes
    first_numbers = itertools.count(start, stride) if steps is None else range(start, steps * batch_size, stride)
    for first in first_numbers:
        yield list(range(first, first + micro_batch_size))


def load_batches(
    maker: BatchMaker[BatchT], sample_numbers: Iterator[list[int]], *, workers: int, pin: bool
) -> Iterator[BatchT]:
    """Yield the batches of these sample numbers, made ahead of time by ``workers`` processes.

    With 0 workers each batch is made in this process when it is requested. Raises TrainingError if a sample cannot be
    made.
    """
    loader = DataLoader(
        maker, batch_sampler=sample_numbers, collate_fn=_keep_batch, pin_memory=pin, **worker_options(workers)
    )
    for batch in iterate_loader(loader):
        if isinstance(batch, str):
            raise TrainingError(batch)
        yield batch


def iterate_loader(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches of a loader. At the end, stop its workers, even in the middle of a batch."""
    batches = iter(loader)
    try:
        yield from batches
    finally:
        # If a worker has died, torch raises RuntimeError while it stops the other workers. In the destructor of the
        # iterator, this would print a traceback, so the workers are stopped here and the error is ignored.
        workers = getattr(batches, "_workers", ())  # an iterator without workers does not have the attribute
        for worker in workers:
            worker.join = functools.partial(_kill_worker, worker)
        if workers:
            with contextlib.suppress(RuntimeError):
                batches._shutdown_workers()  # type: ignore[attr-defined]
            for worker in workers:
                worker.kill()


def _kill_worker(worker: BaseProcess, timeout: float | None = None) -> None:
    """Kill a worker, where torch would wait 10 s for each one that is starting or in the middle of a batch."""
    worker.kill()
    type(worker).join(worker, timeout)


def check_skipped_fraction(skipped: int, drawn: int, last_reason: str) -> None:
    """Check that few of the draws could not be read. Raises TrainingError."""
    if drawn >= MIN_DRAWS_TO_JUDGE and skipped > MAX_SKIPPED_FRACTION * drawn:
        raise TrainingError(
            f"{skipped} of {drawn} draws could not be read, more than {MAX_SKIPPED_FRACTION:.0%}; the last: "
            f"{last_reason}. Repair the data, or exclude files with 'exclude'"
        )


def _keep_batch(batch: Any) -> Any:
    """Collate function for DataLoader: the maker has already collated the samples."""
    return batch


def worker_options(workers: int) -> dict[str, Any]:
    """Return the arguments of DataLoader for a number of worker processes."""
    if not workers:
        return {}
    return {
        "num_workers": workers,
        "worker_init_fn": _initialise_worker,
        "multiprocessing_context": "spawn",  # fork would copy the model's threads in any state
        "prefetch_factor": 4,
    }


def _initialise_worker(_: int) -> None:
    """Initialise a worker process: a single thread, low priority, and stop signals are ignored.

    The priority is low because on a CPU the model's threads need the same cores, and one delayed thread delays all
    others. A terminal or a farm sends Ctrl-C and SIGTERM to all processes of a run; the main process handles them.
    """
    os.nice(WORKER_NICENESS)
    cv2.setNumThreads(0)
    ignore_stop_signals()
