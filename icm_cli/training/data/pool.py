"""The pool of training pictures: every source's images with their alphas, by group, drawn by weight."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import numpy as np

from icm_cli.datasets.layouts import list_images
from icm_cli.datasets.registry import find_dataset, get_dataset
from icm_cli.errors import ConfigError, Problem, UsageError
from icm_cli.training.settings import CUTOUTS, DataConfig, PairConfig, SourceConfig


@dataclass(frozen=True)
class Item:
    """An image with its alpha."""

    name: str
    image: Path
    alpha: Path | None
    """None: the image's own."""
    trimap: Path | None
    group: str
    """Items of a group show the same kind of thing; unique over all sources."""
    is_foreground: bool
    """The image's colours mean nothing outside its alpha."""
    is_binary: bool
    """The alpha is a mask of 0 and 255."""
    classes: frozenset[str] = frozenset()
    """Classes of the thing; pictures that share one are never taken for one another's absence."""
    soften_px: float = 0.0
    """Standard deviation of the blur that its hard mask gets."""
    coarse: Path | None = None
    """The alpha that a first stage made of it."""

    def is_alien_to(self, other: Item) -> bool:
        """Whether this picture does not show what the other one does, as far as groups and classes tell."""
        return self.group != other.group and not (self.classes & other.classes)


@dataclass(frozen=True)
class Pool:
    """All items and backgrounds of a run."""

    sources: tuple[tuple[Item, ...], ...]
    weights: tuple[float, ...]
    backgrounds: tuple[Path, ...]
    problems: tuple[Problem, ...] = ()
    """Problems of the sources; the items are those without."""

    @cached_property
    def groups(self) -> dict[str, tuple[Item, ...]]:
        groups: dict[str, list[Item]] = {}
        for item in self:
            groups.setdefault(item.group, []).append(item)
        return {group: tuple(items) for group, items in groups.items()}

    @cached_property
    def _shares(self) -> np.ndarray:
        weights = np.asarray(self.weights)
        return weights / weights.sum()

    def __iter__(self) -> Iterator[Item]:
        return (item for source in self.sources for item in source)

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    @cached_property
    def _groups_of_sources(self) -> tuple[tuple[tuple[Item, ...], ...], ...]:
        """The groups of each source (a group lies in one source)."""
        return tuple(tuple(self.groups[group] for group in dict.fromkeys(map(_group, each))) for each in self.sources)

    def chances(self) -> list[float]:
        """Probabilities with which :meth:`draw` gives each item, in their order."""
        return [
            float(share) / len(groups) / len(self.groups[item.group])
            for source, groups, share in zip(self.sources, self._groups_of_sources, self._shares, strict=True)
            for item in source
        ]

    @property
    def images(self) -> list[Path]:
        """Every image file that can reach a sample, each once."""
        return list(dict.fromkeys([*(item.image for item in self), *self.backgrounds]))

    def restricted_to(self, items: Container[Item]) -> Pool:
        """The pool of some of its items, with the weights of the sources that have any."""
        kept = [tuple(item for item in source if item in items) for source in self.sources]
        sources = [(source, weight) for source, weight in zip(kept, self.weights, strict=True) if source]
        return replace(
            self, sources=tuple(source for source, _ in sources), weights=tuple(weight for _, weight in sources)
        )

    def draw(self, rng: np.random.Generator) -> Item:
        """A source by its weight, any of its groups, any item of that: small groups count as much as large ones."""
        groups = self._groups_of_sources[rng.choice(len(self.sources), p=self._shares)]
        group = groups[rng.integers(len(groups))]
        return group[rng.integers(len(group))]

    def partner(self, item: Item, rng: np.random.Generator, same_image_share: float) -> Item:
        """Another item of its group with another image; itself at a share, or where there is none."""
        others = [each for each in self.groups.get(item.group, ()) if each.image != item.image]
        wants_itself = rng.random() < same_image_share
        return item if wants_itself or not others else others[rng.integers(len(others))]

    def stranger(self, shown: Item, rng: np.random.Generator, *, cuttable: bool) -> Item | None:
        """An item that shows another thing, None where hardly any does.

        ``cuttable``: one that can be cut out, so no mask, whose hard edge would be learned.
        """
        for _ in range(20):
            item = self.draw(rng)
            if item.is_alien_to(shown) and not (cuttable and item.is_binary):
                return item
        return None


def read_pool(data: DataConfig, pairs: PairConfig) -> Pool:
    """Find every item of the sources. Raises UsageError or ConfigError where nothing can be made of them."""
    if not data.sources:
        raise ConfigError(
            "there is nothing to train on: the configuration names no data; add a section 'data' with 'sources', or "
            "give one with --data FILE (docs/train.md)"
        )
    problems: list[Problem] = []
    sources = [_items(number, source, problems) for number, source in enumerate(data.sources)]
    backgrounds = tuple(path for folder in data.backgrounds for path in _pictures(Path(folder), "backgrounds"))
    pool = Pool(tuple(sources), tuple(source.weight for source in data.sources), backgrounds, tuple(problems))
    if not backgrounds and any(item.is_foreground for item in pool):
        raise ConfigError("some sources are foregrounds, and there is nothing to put them on; add data: backgrounds")
    if pairs.negative_share and len(pool.groups) < 2 and not backgrounds:
        raise ConfigError(
            "there is but one group and no backgrounds, so no picture is without the reference's thing; give "
            "data: backgrounds, say by 'groups' or subfolders what belongs together, or --set "
            "train.pairs.negative_share=0"
        )
    return pool


def _items(number: int, source: SourceConfig, problems: list[Problem]) -> tuple[Item, ...]:
    try:
        found = _cutouts(source) if source.dataset == CUTOUTS else _of_dataset(source, problems)
    except UsageError as error:
        raise UsageError(f"data: source {number + 1}: {error}") from error
    if source.coarse is not None and not Path(source.coarse).is_dir():
        raise UsageError(f"data: coarse folder {source.coarse} of {source.title} does not exist; expected alphas")
    kept = [item for item in found if not any(fnmatch(item.name, pattern) for pattern in source.exclude)]
    if not kept:
        raise UsageError(f"data: {source.title} has no image left to train on; expected images with alphas")
    classes = _read_classes(source.classes)
    if source.classes and (lone := next((each for each in kept if _classes_of(each, classes) is None), None)):
        raise ConfigError(
            f"data: classes {source.classes} has no entry for {lone.image.parent}; expected every folder of the source"
        )
    return tuple(_placed(item, number, source, classes) for item in kept)


def _placed(item: Item, number: int, source: SourceConfig, classes: Mapping[str, Sequence[str]]) -> Item:
    group = item.name if source.group_by == "image" else item.group
    is_binary = source.binary or item.is_binary
    return replace(
        item,
        group=f"{number}:{group}",
        is_binary=is_binary,
        classes=frozenset(_classes_of(item, classes) or ()),
        soften_px=source.soften_px,
        coarse=_coarse(item, source),
    )


def _group(item: Item) -> str:
    return item.group


def _coarse(item: Item, source: SourceConfig) -> Path | None:
    path = None if source.coarse is None else Path(source.coarse) / f"{item.name}.png"
    return path if path is not None and path.is_file() else None


def _classes_of(item: Item, classes: Mapping[str, Sequence[str]]) -> Sequence[str] | None:
    """The entry of the item's folder, which the file may name by its last parts alone; None where there is none."""
    parts = item.image.parent.parts
    return next((classes[key] for n in range(len(parts)) if (key := "/".join(parts[n:])) in classes), None)


def _read_classes(path: str | None) -> dict[str, list[str]]:
    """The classes of each folder, from :attr:`SourceConfig.classes`. Raises ConfigError."""
    if path is None:
        return {}
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        found = {folder: [each] if isinstance(each, str) else list(each) for folder, each in stored.items()}
        if not all(isinstance(name, str) for each in found.values() for name in each):
            raise ValueError("a class is no text")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"data: classes {path} cannot be read ({error}); expected JSON that gives each folder a class or a list"
        ) from error
    return found


def _cutouts(source: SourceConfig) -> list[Item]:
    if source.root is None:
        raise ConfigError("data: a source of cutouts has no root; give the folder of its RGBA images")
    root = Path(source.root)
    items = []
    for path in _pictures(root, "cutouts"):
        name = path.relative_to(root).with_suffix("").as_posix()
        folder, _, _ = name.rpartition("/")
        items.append(Item(name, path, None, None, folder or name, is_foreground=True, is_binary=False))
    return items


def _of_dataset(source: SourceConfig, problems: list[Problem]) -> list[Item]:
    found = find_dataset(
        source.dataset,
        source.root,
        split=source.split or ("train" if _has_train(source) else "test"),
        **source.patterns,
        composite=False,
    )
    problems += found.problems
    return [
        Item(
            sample.name,
            sample.file,
            sample.alpha,
            None if found.dataset.has_detail_maps else sample.trimap,
            sample.name if found.are_foregrounds else sample.group or sample.name,
            is_foreground=found.are_foregrounds,
            is_binary=found.dataset.is_binary,
        )
        for sample in found.samples
    ]


def _has_train(source: SourceConfig) -> bool:
    return bool(get_dataset(source.dataset).train)


def _pictures(folder: Path, what: str) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"{what} folder {folder} does not exist; expected a folder of images")
    found = [path for path in list_images(folder) if os.access(path, os.R_OK)]
    if not found:
        raise UsageError(f"{what} folder {folder} holds no images that can be read")
    return found
