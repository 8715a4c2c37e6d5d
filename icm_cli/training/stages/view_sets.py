"""View sets: which images of every group have their tokens kept, and how they are replaced while training continues.

Every group has an order of its images, drawn with the seed. Part number n of the views takes the next images of that
order, and starts again at its end. A view set is a window of :attr:`MatchConfig.rotation_parts` parts. After every
:attr:`MatchConfig.rotate_every` steps the oldest part leaves the window and the next one enters it. The parts depend
on the seed alone, so a resumed run has the same view sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from icm_cli.files import atomic_write
from icm_cli.training.data.pool import Item, Pool
from icm_cli.training.settings import MatchConfig
from icm_cli.training.stages.mosaics import LARGE, View

CHUNK_VIEWS = 64
"""Most views in a file; of large views, which have more tokens, accordingly fewer."""


@dataclass(frozen=True)
class Chunk:
    """Views whose tokens are read together and kept in one file."""

    part: int
    number: int
    is_large: bool
    items: tuple[Item, ...]

    @property
    def file_name(self) -> str:
        return f"{self.part:05d}-{'large' if self.is_large else 'small'}-{self.number:03d}.pt"

    def view_seed(self, seed: int, index: int) -> tuple[int, ...]:
        """Seed of the scene of item number ``index``."""
        return (seed, 3, self.part, int(self.is_large), self.number, index)


class ViewPlan:
    """Plan of the views: the chunks of every part, and the parts of every step."""

    def __init__(self, pool: Pool, config: MatchConfig, seed: int) -> None:
        self._pool = pool
        self._config = config
        self._seed = seed
        self._chunks: dict[int, list[Chunk]] = {}

    def set_number(self, step: int) -> int:
        """Number of the view set that a step (from 0) draws from."""
        return step // self._config.rotate_every if self._config.rotate_every else 0

    def chunks_of_set(self, number: int) -> list[Chunk]:
        """Chunks of a view set."""
        parts = range(number, number + self._config.rotation_parts)
        return [chunk for part in parts for chunk in self.chunks(part)]

    def chunks_due(self, step: int) -> list[Chunk]:
        """Chunks of the next part that must be read by a step, so that reading is spread evenly over all steps."""
        every = self._config.rotate_every
        if not every:
            return []
        chunks = self.chunks(step // every + self._config.rotation_parts)
        return chunks[: -(-len(chunks) * (step % every + 1) // every)]

    def chunks(self, part: int) -> list[Chunk]:
        """Chunks of a part."""
        if part not in self._chunks:
            self._chunks[part] = [chunk for is_large in (False, True) for chunk in self._split(part, is_large=is_large)]
        return self._chunks[part]

    def _split(self, part: int, *, is_large: bool) -> Iterator[Chunk]:
        items = self._items(part, is_large=is_large)
        size = CHUNK_VIEWS // LARGE**2 if is_large else CHUNK_VIEWS
        for start in range(0, len(items), size):
            yield Chunk(part, start // size, is_large, tuple(items[start : start + size]))

    def _items(self, part: int, *, is_large: bool) -> list[Item]:
        """Items that a part shows: of each group the next ones of its order."""
        config, items = self._config, list[Item]()
        views = config.large_views if is_large else config.views
        for order in self._orders[is_large]:
            count = min(views, config.most_views * len(order))
            indices = range(count * part // config.rotation_parts, count * (part + 1) // config.rotation_parts)
            items += [order[index % len(order)] for index in indices]
        return items

    @cached_property
    def _orders(self) -> tuple[list[list[Item]], list[list[Item]]]:
        """The order of every group's items, for small and for large views."""
        small, large = (np.random.default_rng((self._seed + offset, 2)) for offset in (0, 1))
        groups = self._pool.groups.values()
        return (
            [[items[index] for index in small.permutation(len(items))] for items in groups],
            [[items[index] for index in large.permutation(len(items))] for items in groups],
        )


class ViewSet:
    """Views of one size by item, and the pool of the items that have any."""

    def __init__(self, pool: Pool, chunks: Mapping[Chunk, list[View | None]]) -> None:
        self._views: dict[Item, list[View]] = {}
        for chunk, views in chunks.items():
            for item, view in zip(chunk.items, views, strict=True):
                if view is not None:
                    self._views.setdefault(item, []).append(view)
        self.pool = pool.restricted_to(self._views)

    def __bool__(self) -> bool:
        return bool(self._views)

    def draw_view(self, item: Item, rng: np.random.Generator) -> View | None:
        """One of the item's views; None where it has none."""
        views = self._views.get(item)
        return views[int(rng.integers(len(views)))] if views else None


def save_views(path: Path, digest: str, views: list[View | None]) -> None:
    """Write the views of a chunk atomically. Raises OutputError."""
    tensors = [tuple(getattr(view, each.name) for each in fields(View)) if view else None for view in views]
    with atomic_write(path) as file:
        torch.save({"digest": digest, "views": tensors}, file)


def load_views(path: Path, digest: str) -> list[View | None] | None:
    """Read what :func:`save_views` wrote; None where there is no file, or it has another digest."""
    try:
        stored: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError):
        return None
    return [View(*view) if view else None for view in stored["views"]] if stored["digest"] == digest else None
