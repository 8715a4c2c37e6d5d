"""The field's matting datasets, as published: one registry, in which adding one is a few lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from icm_cli.datasets.groups import Groups
from icm_cli.datasets.layouts import (
    FileSets,
    Layout,
    find_by_pattern,
    find_files,
    image_files,
    leading_number,
    pair,
    without_label_and_box,
    without_last_number,
)
from icm_cli.datasets.samples import Sample
from icm_cli.errors import Problem, UsageError, did_you_mean
from icm_cli.reports.scores import Lineage, Region

Size = Literal["original", "long1024", "square768"]
SIZES: tuple[Size, ...] = ("original", "long1024", "square768")
Split = Literal["test", "train"]
SPLITS: tuple[Split, ...] = ("test", "train")

ONE_GROUP = "all"
"""The group of every image where a dataset publishes no groups and is about one kind of thing, or none is known."""


@dataclass(frozen=True)
class Dataset:
    """Layout of a dataset's files, and the scores of its papers. The first layout that is found is taken."""

    title: str
    test: tuple[Layout, ...]
    train: tuple[Layout, ...] = ()
    regions: tuple[Region, ...] = ("whole",)
    size: Size = "original"
    lineage: Lineage = "composition"
    metadata: str | None = None
    """A file of ``icm_cli/datasets/metadata`` with the published groups."""
    group_of: str | None = None
    """Without metadata: a regular expression whose first group, found in an image's name, is the image's group."""
    is_binary: bool = False
    """The alphas are masks of 0 and 255."""
    has_detail_maps: bool = False
    """The trimaps are detail maps: every pixel above 0 is unknown."""
    is_shots: bool = False
    """Groups are shots whose first frame is given, scored as DAVIS does; all indices of a palette are one thing."""


@dataclass(frozen=True)
class Found:
    """A dataset as it lies on this disk."""

    dataset: Dataset
    samples: list[Sample]
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Notes for a reader of its numbers."""
    are_foregrounds: bool = False
    """The images are foregrounds that must be put on backgrounds."""


WHOLE_AND_UNKNOWN: tuple[Region, ...] = ("whole", "unknown")
BY_FOREGROUND = r"(.+)_\d+$"
"""Composites are named FOREGROUND_NUMBER."""
BY_FOLDER = r"(.+)/[^/]+$"
_ADOBE = "Adobe-licensed images"


def _davis(split: str) -> Layout:
    """Frames at 480p; the list is that of DAVIS 2016, or of the 2016 shots in DAVIS 2017."""
    lists = tuple(f"ImageSets/{folder}/{split}.txt" for folder in ("480p", "2016"))
    return Layout("JPEGImages/480p", "Annotations/480p", lists=lists)


DATASETS: dict[str, Dataset] = {
    "aim500": Dataset(
        "AIM-500",
        (Layout("original", "mask", "trimap"),),
        regions=WHOLE_AND_UNKNOWN,
        lineage="aim",
        metadata="aim500.json",
    ),
    "icm57": Dataset("ICM-57", (Layout("image", "alpha", "trimap"),), size="square768", metadata="icm57.json"),
    "am2k": Dataset(
        "AM-2k",
        (Layout("original", "mask", "trimap", under="validation"),),
        (Layout("original", "mask", under="train"),),
        regions=WHOLE_AND_UNKNOWN,
        lineage="aim",
    ),
    "p3m500np": Dataset(
        "P3M-500-NP",
        (Layout("original_image", "mask", "trimap", under="validation/P3M-500-NP"),),
        (Layout("blurred_image", "mask", under="train"),),
        regions=WHOLE_AND_UNKNOWN,
        lineage="aim",
    ),
    "p3m500p": Dataset(
        "P3M-500-P",
        (Layout("blurred_image", "mask", "trimap", under="validation/P3M-500-P"),),
        (Layout("blurred_image", "mask", under="train"),),
        regions=WHOLE_AND_UNKNOWN,
        lineage="aim",
    ),
    "ppm100": Dataset(
        "PPM-100", (Layout("image", "matte"), Layout("image_train", "matte_train"), Layout("train/fg", "train/alpha"))
    ),
    "rwp636": Dataset(
        "RWP-636",
        (Layout("image", "alpha", "detailmap", key=leading_number),),
        regions=WHOLE_AND_UNKNOWN,
        has_detail_maps=True,
    ),
    "rw100": Dataset("RefMatte-RW100", (Layout("image", "mask", image_of=without_last_number),)),
    "composition1k": Dataset(
        "Composition-1k",
        (
            Layout("merged", "alpha_copy", "trimaps", under="Test_set"),
            Layout("fg", "alpha", "trimaps", under=f"Test_set/{_ADOBE}", backgrounds_each=20),
            Layout("fg", "alpha", "trimaps", under=_ADOBE, backgrounds_each=20),
        ),
        (
            Layout("fg", "alpha", under=f"Training_set/{_ADOBE}", backgrounds_each=100),
            Layout("fg", "alpha", under="Training_set/Other", backgrounds_each=100),
        ),
        regions=("unknown",),
        group_of=BY_FOREGROUND,
    ),
    "d646": Dataset(
        "Distinctions-646",
        (Layout("FG", "GT", under="Test", backgrounds_each=20),),
        (Layout("FG", "GT", under="Train", backgrounds_each=100),),
        regions=("unknown",),
        group_of=BY_FOREGROUND,
    ),
    "transparent460": Dataset(
        "Transparent-460",
        (Layout("fg", "alpha", "trimap", under="Test", backgrounds_each=20),),
        (Layout("fg", "alpha", under="Train", backgrounds_each=100),),
        regions=("unknown",),
        group_of=BY_FOREGROUND,
    ),
    "davis16": Dataset(
        "DAVIS-2016",
        (_davis("val"),),
        (_davis("train"),),
        group_of=BY_FOLDER,
        is_binary=True,
        is_shots=True,
    ),
    "openimages": Dataset(
        "Open Images",
        (Layout("images", "masks", image_of=without_label_and_box),),
        group_of=r"(?:.*/)?[^_/]+_([^_/]+)_[^_/]+$",
        is_binary=True,
    ),
    "folder": Dataset("a folder dataset", (Layout("images", "alphas", "trimaps"),), group_of=BY_FOLDER),
}


def dataset_named(name: str) -> Dataset:
    """A dataset of the registry. Raises UsageError that names the nearest."""
    if name not in DATASETS:
        raise UsageError(f"unknown dataset {name!r}. {did_you_mean(name, DATASETS)} One's own data is 'folder'.")
    return DATASETS[name]


def find(
    name: str,
    root: str | Path | None = None,
    *,
    split: Split = "test",
    images: str | None = None,
    alphas: str | None = None,
    trimaps: str | None = None,
    groups: str | Path | None = None,
    backgrounds: str | Path | None = None,
    composite: bool = True,
) -> Found:
    """Every sample of a dataset and all that is wrong with it.

    ``folder`` takes ``images``, ``alphas`` and perhaps ``trimaps`` (folders or globs), or a ``root`` that holds folders
    of these names; the others take ``root``. ``groups`` is a JSON file in the published schema; without it the groups
    are the shipped metadata's, the foregrounds', for ``folder`` the subfolders, else one. Without ``composite``
    foregrounds are given as they are, and want no ``backgrounds``. Raises UsageError.
    """
    dataset = dataset_named(name)
    layout, files = _located(name, dataset, root, split, (images, alphas, trimaps))
    are_foregrounds = bool(layout.backgrounds_each) and not composite
    if are_foregrounds:
        layout = replace(layout, backgrounds_each=0)
    behind = _backgrounds(dataset, layout, backgrounds)
    notes = _background_notes(layout, files, behind)
    samples, problems = pair(layout, files, behind)
    if not samples:
        raise UsageError(
            f"no image of {dataset.title} has an alpha; expected files of equal names, but images are like "
            f"{min(files.images)} and alphas like {min(files.alphas)}"
        )
    if groups is not None:
        known = Groups.read(Path(groups))
    elif dataset.metadata:
        known = Groups.shipped(dataset.metadata)
    else:
        grouped = [replace(each, group=_own_group(dataset, each.name)) for each in samples]
        return Found(dataset, grouped, problems, notes, are_foregrounds)
    samples, more = known.assign(samples)
    return Found(dataset, samples, problems + more, notes, are_foregrounds)


def _located(
    name: str, dataset: Dataset, root: str | Path | None, split: Split, patterns: Sequence[str | None]
) -> tuple[Layout, FileSets]:
    images, alphas, trimaps = patterns
    if any(patterns) and name != "folder":
        raise UsageError(f"--images, --alphas and --trimaps are for --dataset folder; {name} is found by --data-root")
    if any(patterns) and root is not None:
        raise UsageError("--data-root and --images, --alphas, --trimaps were given; expected the one or the others")
    if images and alphas:
        return dataset.test[0], find_by_pattern(images, alphas, trimaps)
    if any(patterns) or root is None:
        what = "--images and --alphas, or --data-root" if name == "folder" else "--data-root, its folder on this disk"
        raise UsageError(f"{dataset.title}: where the files are is not said; give {what}")
    layouts = dataset.test if split == "test" else dataset.train
    if not layouts:
        raise UsageError(f"{dataset.title} has no {split} split; its images are all for testing")
    return find_files(layouts, Path(root), dataset.title)


def _backgrounds(dataset: Dataset, layout: Layout, folder: str | Path | None) -> list[Path]:
    if not layout.backgrounds_each:
        if folder is not None:
            raise UsageError(f"--backgrounds was given, but {dataset.title} here holds whole images; leave it out")
        return []
    if folder is None:
        raise UsageError(
            f"{dataset.title} here holds only foregrounds; give --backgrounds DIR (the published test set uses images "
            f"of PASCAL VOC), {layout.backgrounds_each} of them are put behind each in the order of their names"
        )
    if not Path(folder).is_dir():
        raise UsageError(f"backgrounds folder {folder} does not exist; expected pictures to put foregrounds on")
    found = image_files(Path(folder))
    if not found:
        raise UsageError(f"backgrounds folder {folder} holds no images; expected pictures to put foregrounds on")
    return found


def _background_notes(layout: Layout, files: FileSets, backgrounds: Sequence[Path]) -> list[str]:
    wanted = layout.backgrounds_each * len(files.alphas)
    if len(backgrounds) >= wanted:
        return []
    return [f"{len(backgrounds)} backgrounds stand behind {wanted} composites, so they come again"]


def _own_group(dataset: Dataset, name: str) -> str:
    found = re.match(dataset.group_of, name) if dataset.group_of else None
    return found[1] if found else ONE_GROUP


def groups_of(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples by group, those without one left out."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.group:
            groups.setdefault(sample.group, []).append(sample)
    return groups
