"""View sets of the stage "match": the images whose tokens are stored, and their replacement during training.

The images of each group are shuffled with the seed. Part number n of the views takes the next images in
that order, and starts again at its end. A view set is a window of :attr:`MatchStageConfig.rotation_parts`
parts. Every :attr:`MatchStageConfig.rotate_every` steps the window moves by one part. The parts depend only on
the seed, so a resumed run has the same view sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from icm_cli.files import atomic_write
from icm_cli.training.data.pool import TrainingItem, TrainingPool
from icm_cli.training.settings import MatchStageConfig
from icm_cli.training.stages.mosaics import LARGE_FACTOR, View

VIEWS_PER_FILE = 64
"""Largest number of views in a file; files of large views contain fewer, as these have more tokens."""


@dataclass(frozen=True)
class ViewFile:
    """Views whose tokens are computed together and stored in one file."""

    rotation_part: int
    number: int
    is_large: bool
    items: tuple[TrainingItem, ...]

    @property
    def name(self) -> str:
        return f"{self.rotation_part:05d}-{'large' if self.is_large else 'small'}-{self.number:03d}.pt"

    def scene_seed(self, seed: int, index: int) -> tuple[int, ...]:
        """Return the seed of the scene of item number ``index``."""
        return (seed, 3, self.rotation_part, int(self.is_large), self.number, index)


class ViewPlan:
    """Decides which views belong to each part, and which parts each step uses."""

    def __init__(self, pool: TrainingPool, config: MatchStageConfig, seed: int) -> None:
        self._pool = pool
        self._config = config
        self._seed = seed
        self._files: dict[int, list[ViewFile]] = {}

    def set_number(self, step: int) -> int:
        """Return the number of the view set that a step (from 0) uses."""
        return step // self._config.rotate_every if self._config.rotate_every else 0

    def files_of_set(self, number: int) -> list[ViewFile]:
        """Return the files of a view set."""
        parts = range(number, number + self._config.rotation_parts)
        return [file for part in parts for file in self.files_of_part(part)]

    def files_due(self, step: int) -> list[ViewFile]:
        """Return the files of the next part that must be computed when ``step`` ends.

        Their number grows evenly from step to step.
        """
        interval = self._config.rotate_every
        if not interval:
            return []
        files = self.files_of_part(step // interval + self._config.rotation_parts)
        return files[: -(-len(files) * (step % interval + 1) // interval)]

    def files_of_part(self, part: int) -> list[ViewFile]:
        """Return the files of a part."""
        if part not in self._files:
            self._files[part] = [
                file for is_large in (False, True) for file in self._split_part(part, is_large=is_large)
            ]
        return self._files[part]

    def _split_part(self, part: int, *, is_large: bool) -> Iterator[ViewFile]:
        items = self._items_of_part(part, is_large=is_large)
        size = VIEWS_PER_FILE // LARGE_FACTOR**2 if is_large else VIEWS_PER_FILE
        for start in range(0, len(items), size):
            yield ViewFile(part, start // size, is_large, tuple(items[start : start + size]))

    def _items_of_part(self, part: int, *, is_large: bool) -> list[TrainingItem]:
        """Return the items of a part: the next ones of each group, in its shuffled order."""
        config, items = self._config, list[TrainingItem]()
        views = config.large_views_per_group if is_large else config.views_per_group
        for order in self._shuffled_items[is_large]:
            count = min(views, config.max_views_per_image * len(order))
            indices = range(count * part // config.rotation_parts, count * (part + 1) // config.rotation_parts)
            items += [order[index % len(order)] for index in indices]
        return items

    @cached_property
    def _shuffled_items(self) -> tuple[list[list[TrainingItem]], list[list[TrainingItem]]]:
        """The shuffled items of every group, for small and for large views."""
        small, large = (np.random.default_rng((self._seed + offset, 2)) for offset in (0, 1))
        groups = self._pool.groups.values()
        return (
            [[items[index] for index in small.permutation(len(items))] for items in groups],
            [[items[index] for index in large.permutation(len(items))] for items in groups],
        )


AnyView = TypeVar("AnyView")


class ViewSet(Generic[AnyView]):
    """The views of one size, by item, and the pool of the items that have views."""

    def __init__(self, pool: TrainingPool, files: Mapping[ViewFile, Sequence[AnyView | None]]) -> None:
        self._views: dict[TrainingItem, list[AnyView]] = {}
        for file, views in files.items():
            for item, view in zip(file.items, views, strict=True):
                if view is not None:
                    self._views.setdefault(item, []).append(view)
        self.pool = pool.restrict_to(self._views)

    def __bool__(self) -> bool:
        return bool(self._views)

    def draw_view(self, item: TrainingItem, rng: np.random.Generator) -> AnyView | None:
        """Draw one of an item's views; None if it has none."""
        views = self._views.get(item)
        return views[int(rng.integers(len(views)))] if views else None


def save_views(path: Path, digest: str, views: list[View | None]) -> None:
    """Write the views of a file atomically. Raises OutputError."""
    tensors = [tuple(getattr(view, field.name) for field in fields(View)) if view else None for view in views]
    with atomic_write(path) as file:
        torch.save({"digest": digest, "views": tensors}, file)


def load_views(path: Path, digest: str) -> list[View | None] | None:
    """Read what :func:`save_views` wrote; None if there is no file, or if it has another digest."""
    try:
        stored: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError):
        return None
    return [View(*view) if view else None for view in stored["views"]] if stored["digest"] == digest else None
