"""The pool of training items: the images of all sources with their alphas, by group, sampled by weight."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from icm_cli.datasets.layouts import list_images
from icm_cli.datasets.registry import find_dataset, get_dataset
from icm_cli.errors import Problem, UsageError
from icm_cli.options import Split
from icm_cli.training.settings import CUTOUTS, EXPECTED_DATA, DataConfig, SourceConfig

MAX_NEGATIVE_DRAWS = 20
MAX_PARTNER_DRAWS = 20
"""If no reference was found for a target in this many draws, another target is drawn."""


@dataclass(frozen=True)
class TrainingItem:
    """An image with its alpha."""

    name: str
    image: Path
    alpha: Path | None
    """File of the alpha; None if it is the alpha channel of the image."""
    trimap: Path | None
    group: str
    """Name of the group, unique over all sources. Items of a group show the same kind of object."""
    is_foreground: bool
    """Whether the image has no meaningful colours outside its alpha."""
    is_binary: bool
    """Whether the alpha is a mask of 0 and 255."""
    classes: frozenset[str] = frozenset()
    """Classes of the object; items that share a class are never negatives for each other."""
    soften_px: float = 0.0
    """Standard deviation of the blur that softens its hard mask."""
    coarse: Path | None = None
    """Alpha of the image that another model computed, if there is one."""

    @property
    def alpha_file(self) -> Path:
        """The file that contains the alpha."""
        return self.alpha or self.image

    def is_negative_for(self, other: TrainingItem) -> bool:
        """Return whether the image does not show the object of another item, according to groups and classes."""
        return self.group != other.group and not (self.classes & other.classes)


@dataclass(frozen=True)
class TrainingPool:
    """All items and backgrounds of a run."""

    sources: tuple[tuple[TrainingItem, ...], ...]
    weights: tuple[float, ...]
    """Sampling weight of each source."""
    backgrounds: tuple[Path, ...]
    problems: tuple[Problem, ...] = ()
    """Problems found in the sources; images with problems are not among the items."""
    lists: tuple[Path, ...] = ()
    """JSON files that list the groups, the classes, or the original files of the data."""
    original_digests: tuple[str, ...] = ()
    """SHA-256 of the files that the data are copies of."""

    @cached_property
    def groups(self) -> dict[str, tuple[TrainingItem, ...]]:
        groups: dict[str, list[TrainingItem]] = {}
        for item in self:
            groups.setdefault(item.group, []).append(item)
        return {group: tuple(items) for group, items in groups.items()}

    def __iter__(self) -> Iterator[TrainingItem]:
        return (item for source in self.sources for item in source)

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    @cached_property
    def _groups_of_sources(self) -> tuple[tuple[tuple[TrainingItem, ...], ...], ...]:
        """The groups of each source (a group belongs to one source)."""
        return tuple(
            tuple(self.groups[group] for group in dict.fromkeys(item.group for item in source))
            for source in self.sources
        )

    @property
    def image_paths(self) -> list[Path]:
        """Every image file that can be part of a sample, once."""
        return list(dict.fromkeys([*(item.image for item in self), *self.backgrounds]))

    @property
    def files(self) -> list[Path]:
        """Every file that decides the samples, once."""
        further = (path for item in self for path in (item.alpha, item.trimap, item.coarse) if path is not None)
        return list(dict.fromkeys([*self.image_paths, *further, *self.lists]))

    def restrict_to(self, items: Container[TrainingItem]) -> TrainingPool:
        """Return the pool of some of its items; sources without any of them are removed."""
        sources, weights = [], []
        for source, weight in zip(self.sources, self.weights, strict=True):
            kept_items = tuple(item for item in source if item in items)
            if kept_items:
                sources.append(kept_items)
                weights.append(weight)
        return replace(self, sources=tuple(sources), weights=tuple(weights))

    def draw_item(self, rng: np.random.Generator) -> TrainingItem:
        """Draw a source by its weight, then one of its groups and one of the group's items with equal probability."""
        probabilities = np.asarray(self.weights) / np.sum(self.weights)
        groups = self._groups_of_sources[rng.choice(len(self.sources), p=probabilities)]
        group = groups[rng.integers(len(groups))]
        return group[rng.integers(len(group))]

    def draw_background(self, rng: np.random.Generator) -> Path:
        """Draw a background image."""
        return self.backgrounds[rng.integers(len(self.backgrounds))]

    def draw_partner(self, item: TrainingItem, rng: np.random.Generator, same_image_probability: float) -> TrainingItem:
        """Draw an item of the same group with another image.

        Returns the item itself with ``same_image_probability``, or if its group has no other image.
        """
        candidates = [candidate for candidate in self.groups.get(item.group, ()) if candidate.image != item.image]
        is_same_image = rng.random() < same_image_probability
        if is_same_image or not candidates:
            return item
        return candidates[rng.integers(len(candidates))]

    def draw_negative(self, item: TrainingItem, rng: np.random.Generator, *, for_cutout: bool) -> TrainingItem | None:
        """Draw an item that shows another object; None if none was drawn in MAX_NEGATIVE_DRAWS draws.

        With ``for_cutout``, binary masks are excluded, because a cut-out would have a hard edge.
        """
        for _ in range(MAX_NEGATIVE_DRAWS):
            candidate = self.draw_item(rng)
            if candidate.is_negative_for(item) and not (for_cutout and candidate.is_binary):
                return candidate
        return None


def read_pool(data: DataConfig) -> TrainingPool:
    """Find the items of all sources. Raises UsageError if training on them is not possible."""
    if not data.sources:
        raise UsageError(f"there is nothing to train on: no 'sources' are given; {EXPECTED_DATA}")
    problems: list[Problem] = []
    sources = [_find_items(number, source, problems) for number, source in enumerate(data.sources)]
    backgrounds = tuple(path for folder in data.backgrounds for path in _find_images(Path(folder), "backgrounds"))
    if not backgrounds and any(item.is_foreground for source in sources for item in source):
        raise UsageError(
            "some sources contain foregrounds, and there are no backgrounds to put them on; add data: backgrounds"
        )
    lists = [data.copies_of]
    for source in data.sources:
        lists += [source.groups, source.classes]
    return TrainingPool(
        tuple(sources),
        tuple(source.weight for source in data.sources),
        backgrounds,
        tuple(problems),
        tuple(Path(path) for path in lists if path is not None),
        _read_original_digests(data.copies_of),
    )


def _read_original_digests(path: str | None) -> tuple[str, ...]:
    """Read the file of :attr:`DataConfig.copies_of`. Raises UsageError."""
    if path is None:
        return ()
    expected = "a list of SHA-256 digests"
    digests = _read_json("copies_of", path, expected)
    if not _is_text_list(digests):
        raise UsageError(f"data: copies_of {path} has another content; expected {expected}")
    return tuple(digests)


def explain_data_error(where: str, error: UsageError) -> UsageError:
    """Return an error about a dataset that names the keys of the data file instead of the options of ``icm eval``."""
    text = str(error).replace("--data-root", "'root'")
    return UsageError(f"data: {where}: " + re.sub(r"--(dataset|images|alphas|trimaps|groups)\b", r"'\1'", text))


def _find_items(number: int, source: SourceConfig, problems: list[Problem]) -> tuple[TrainingItem, ...]:
    """Find the items of source ``number``, and add the problems of its files. Raises UsageError."""
    try:
        items = _find_cutouts(source) if source.dataset == CUTOUTS else _find_dataset_items(source, problems)
    except UsageError as error:
        raise explain_data_error(f"source {number + 1}", error) from error
    if source.coarse is not None and not Path(source.coarse).is_dir():
        raise UsageError(f"data: coarse folder {source.coarse} of {source.title} does not exist; expected alphas")
    included = [item for item in items if not any(fnmatch(item.name, pattern) for pattern in source.exclude)]
    if not included:
        raise UsageError(f"data: {source.title} has no image left to train on; expected images with alphas")
    classes = _read_classes(source.classes)
    return tuple(_complete_item(item, number, source, classes) for item in included)


def _complete_item(
    item: TrainingItem, number: int, source: SourceConfig, classes: Mapping[str, Sequence[str]]
) -> TrainingItem:
    """Add the properties that a source gives to its items. Raises UsageError if its folder has no classes."""
    parts = item.image.parent.parts
    path_ends = ["/".join(parts[start:]) for start in range(len(parts))]  # the file names a folder by one of these
    item_classes = next((classes[end] for end in path_ends if end in classes), None)
    if source.classes and item_classes is None:
        raise UsageError(
            f"data: classes {source.classes} has no entry for {item.image.parent}; expected every folder of the source"
        )
    coarse = None if source.coarse is None else Path(source.coarse) / f"{item.name}.png"
    return replace(
        item,
        group=f"{number}:{item.name if source.group_by == 'image' else item.group}",
        is_binary=source.binary or item.is_binary,
        classes=frozenset(item_classes or ()),
        soften_px=source.soften_px,
        coarse=coarse if coarse is not None and coarse.is_file() else None,
    )


def _read_classes(path: str | None) -> dict[str, list[str]]:
    """Read the file of :attr:`SourceConfig.classes`: folder -> classes. Raises UsageError."""
    if path is None:
        return {}
    expected = "a JSON object that maps each folder to a class or a list of classes"
    stored = _read_json("classes", path, expected)
    if not isinstance(stored, dict):
        raise UsageError(f"data: classes {path} has another content; expected {expected}")
    classes: dict[str, list[str]] = {}
    for folder, names in stored.items():
        classes[folder] = [names] if isinstance(names, str) else names
        if not _is_text_list(classes[folder]):
            raise UsageError(f"data: classes {path}: the entry {folder!r} is {names!r}; expected {expected}")
    return classes


def _is_text_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _read_json(key: str, path: str, expected: str) -> Any:
    """Read a JSON file that is the value of a key of the data. Raises UsageError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise UsageError(f"data: {key} {path} cannot be read: {reason}; expected {expected}") from error


def _find_cutouts(source: SourceConfig) -> list[TrainingItem]:
    """Return the RGBA images of a folder. A group is a subfolder, or an image outside of all subfolders.

    Raises UsageError if the source has no root.
    """
    if source.root is None:
        raise UsageError("data: a source with 'dataset: cutouts' has no 'root'; expected the folder of RGBA images")
    root = Path(source.root)
    items = []
    for path in _find_images(root, "cutouts"):
        name = path.relative_to(root).with_suffix("").as_posix()
        folder, _, _ = name.rpartition("/")
        items.append(TrainingItem(name, path, None, None, folder or name, is_foreground=True, is_binary=False))
    return items


def _find_dataset_items(source: SourceConfig, problems: list[Problem]) -> list[TrainingItem]:
    """Return the images of a dataset of ``icm eval``, and add the problems of its files."""
    default_split: Split = "train" if get_dataset(source.dataset).train else "test"
    dataset_samples = find_dataset(
        source.dataset, source.root, split=source.split or default_split, **source.path_options, composite=False
    )
    problems += dataset_samples.problems
    return [
        TrainingItem(
            sample.name,
            sample.file,
            sample.alpha,
            None if dataset_samples.dataset.has_detail_maps else sample.trimap,
            sample.name if dataset_samples.are_foregrounds else sample.group or sample.name,
            is_foreground=dataset_samples.are_foregrounds,
            is_binary=dataset_samples.dataset.is_binary,
        )
        for sample in dataset_samples.samples
    ]


def _find_images(folder: Path, kind: str) -> list[Path]:
    """Return the readable images of a folder; ``kind`` names it in messages. Raises UsageError."""
    if not folder.is_dir():
        raise UsageError(f"{kind} folder {folder} does not exist; expected a folder of images")
    images = [path for path in list_images(folder) if os.access(path, os.R_OK)]
    if not images:
        raise UsageError(f"{kind} folder {folder} contains no readable images; expected at least one")
    return images
