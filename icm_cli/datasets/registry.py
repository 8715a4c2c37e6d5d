"""Registry of published matting datasets. A new dataset is one entry in DATASETS."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from icm_cli.datasets.groups import GroupMetadata, Sample
from icm_cli.datasets.layouts import FileSets, Layout, find_file_sets, find_files, list_images, pair_files
from icm_cli.errors import Problem, UsageError, did_you_mean
from icm_cli.options import DatasetName, MetricVariant, Region, ScoredSize, Split

ONE_GROUP = "all"
"""Group of all images of a dataset without published groups."""


@dataclass(frozen=True)
class ScoringConventions:
    """Scoring conventions of the papers on a dataset."""

    regions: tuple[Region, ...] = ("whole",)
    size: ScoredSize = "original"
    metric_variant: MetricVariant = "composition"


@dataclass(frozen=True)
class Dataset:
    """A published dataset: its file layouts, groups and scoring conventions.

    ``test`` and ``train`` are the layouts of the two splits. The first that exists on disk is used.
    """

    title: str
    test: tuple[Layout, ...]
    train: tuple[Layout, ...] = ()
    conventions: ScoringConventions = ScoringConventions()
    metadata: str | None = None
    """File name of the published groups in ``icm_cli/datasets/metadata``."""
    group_pattern: str | None = None
    """Without metadata: a regular expression whose first capture group in the name of an image is its group."""
    is_binary: bool = False
    """Whether the alphas are binary masks of 0 and 255."""
    has_detail_maps: bool = False
    """Whether the trimaps are detail maps, in which every pixel above 0 is unknown."""
    has_shots: bool = False
    """Whether groups are shots that are scored as DAVIS does. All palette indices above 0 are one object."""

    def group_by_name(self, name: str) -> str:
        """Return the group of an image, by its name."""
        match = re.match(self.group_pattern, name) if self.group_pattern else None
        return match[1] if match else ONE_GROUP


@dataclass(frozen=True)
class DatasetSamples:
    """The samples of a dataset on this disk."""

    dataset: Dataset
    samples: list[Sample]
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Notes for readers of the scores."""
    are_foregrounds: bool = False
    """Whether the images are foregrounds that must be composited onto backgrounds."""


AIM = ScoringConventions(("whole", "unknown"), metric_variant="aim")
COMPOSITION = ScoringConventions(("unknown",))
FOREGROUND_PATTERN = r"(.+)_\d+$"
"""Names of composites are FOREGROUND_NUMBER."""
FOLDER_PATTERN = r"(.+)/[^/]+$"
_ADOBE = "Adobe-licensed images"


def _davis_layout(split: str) -> Layout:
    """Return the layout of frames at 480p, with the list in DAVIS 2016 or DAVIS 2017."""
    lists = tuple(f"ImageSets/{folder}/{split}.txt" for folder in ("480p", "2016"))
    return Layout("JPEGImages/480p", "Annotations/480p", lists=lists)


DATASETS: dict[DatasetName, Dataset] = {
    "aim500": Dataset("AIM-500", (Layout("original", "mask", "trimap"),), conventions=AIM, metadata="aim500.json"),
    "icm57": Dataset(
        "ICM-57",
        (Layout("image", "alpha", "trimap"),),
        conventions=ScoringConventions(size="square768"),
        metadata="icm57.json",
    ),
    "am2k": Dataset(
        "AM-2k",
        (Layout("original", "mask", "trimap", parent_folder="validation"),),
        (Layout("original", "mask", parent_folder="train"),),
        conventions=AIM,
    ),
    "p3m500np": Dataset(
        "P3M-500-NP",
        (Layout("original_image", "mask", "trimap", parent_folder="validation/P3M-500-NP"),),
        (Layout("blurred_image", "mask", parent_folder="train"),),
        conventions=AIM,
    ),
    "p3m500p": Dataset(
        "P3M-500-P",
        (Layout("blurred_image", "mask", "trimap", parent_folder="validation/P3M-500-P"),),
        (Layout("blurred_image", "mask", parent_folder="train"),),
        conventions=AIM,
    ),
    "ppm100": Dataset(
        "PPM-100", (Layout("image", "matte"), Layout("image_train", "matte_train"), Layout("train/fg", "train/alpha"))
    ),
    "rwp636": Dataset(
        "RWP-636",
        (Layout("image", "alpha", "detailmap", key_pattern=r"\d+"),),
        conventions=ScoringConventions(("whole", "unknown")),
        has_detail_maps=True,
    ),
    "rw100": Dataset("RefMatte-RW100", (Layout("image", "mask", alpha_suffix=r"_\d+$"),)),
    "composition1k": Dataset(
        "Composition-1k",
        (
            Layout("merged", "alpha_copy", "trimaps", parent_folder="Test_set"),
            Layout("fg", "alpha", "trimaps", parent_folder=f"Test_set/{_ADOBE}", backgrounds_per_foreground=20),
            Layout("fg", "alpha", "trimaps", parent_folder=_ADOBE, backgrounds_per_foreground=20),
        ),
        (
            Layout("fg", "alpha", parent_folder=f"Training_set/{_ADOBE}", backgrounds_per_foreground=100),
            Layout("fg", "alpha", parent_folder="Training_set/Other", backgrounds_per_foreground=100),
        ),
        conventions=COMPOSITION,
        group_pattern=FOREGROUND_PATTERN,
    ),
    "d646": Dataset(
        "Distinctions-646",
        (Layout("FG", "GT", parent_folder="Test", backgrounds_per_foreground=20),),
        (Layout("FG", "GT", parent_folder="Train", backgrounds_per_foreground=100),),
        conventions=COMPOSITION,
        group_pattern=FOREGROUND_PATTERN,
    ),
    "transparent460": Dataset(
        "Transparent-460",
        (Layout("fg", "alpha", "trimap", parent_folder="Test", backgrounds_per_foreground=20),),
        (Layout("fg", "alpha", parent_folder="Train", backgrounds_per_foreground=100),),
        conventions=COMPOSITION,
        group_pattern=FOREGROUND_PATTERN,
    ),
    "davis16": Dataset(
        "DAVIS-2016",
        (_davis_layout("val"),),
        (_davis_layout("train"),),
        group_pattern=FOLDER_PATTERN,
        is_binary=True,
        has_shots=True,
    ),
    "openimages": Dataset(
        "Open Images",
        (Layout("images", "masks", alpha_suffix=r"^.*/|_[^_/]+_[^_/]+$"),),
        group_pattern=r"(?:.*/)?[^_/]+_([^_/]+)_[^_/]+$",
        is_binary=True,
    ),
    "folder": Dataset("a folder dataset", (Layout("images", "alphas", "trimaps"),), group_pattern=FOLDER_PATTERN),
}


def get_dataset(name: str) -> Dataset:
    """Return a dataset of the registry. Raises UsageError if the name is unknown."""
    if name not in DATASETS:
        raise UsageError(f"unknown dataset {name!r}. {did_you_mean(name, DATASETS)} For your own data use 'folder'.")
    return DATASETS[name]


def find_dataset(
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
) -> DatasetSamples:
    """Return all samples of a dataset, and the problems with its files. Raises UsageError.

    The dataset ``folder`` is given by ``images``, ``alphas`` and optionally ``trimaps`` (folders or glob patterns), or
    by a ``root`` with subfolders of these names. All other datasets are given by ``root``.

    ``groups`` is a JSON file in the published format. By default, the groups come from the bundled metadata, or else
    from the names of the images. If ``composite`` is false, foregrounds are returned without backgrounds.
    """
    dataset = get_dataset(name)
    layout, files = _locate_files(name, dataset, root, split, (images, alphas, trimaps))
    are_foregrounds = bool(layout.backgrounds_per_foreground) and not composite
    if are_foregrounds:
        layout = replace(layout, backgrounds_per_foreground=0)
    background_files = _find_backgrounds(dataset, layout, backgrounds)
    composite_count = layout.backgrounds_per_foreground * len(files.alphas)
    notes = []
    if len(background_files) < composite_count:
        notes.append(f"{len(background_files)} backgrounds are reused for {composite_count} composites")
    samples, problems = pair_files(layout, files, background_files)
    if not samples:
        raise UsageError(
            f"no image of {dataset.title} has an alpha; expected files of equal names, but images "
            f"are like {min(files.images)} and alphas like {min(files.alphas)}"
        )
    samples, group_problems = _assign_groups(dataset, samples, groups)
    return DatasetSamples(dataset, samples, problems + group_problems, notes, are_foregrounds)


def _assign_groups(
    dataset: Dataset, samples: Sequence[Sample], groups_file: str | Path | None
) -> tuple[list[Sample], list[Problem]]:
    """Return the samples with their groups, from a file, the bundled metadata or their names; and the problems."""
    if groups_file is not None:
        return GroupMetadata.read_file(Path(groups_file)).assign_groups(samples)
    if dataset.metadata:
        return GroupMetadata.load_bundled(dataset.metadata).assign_groups(samples)
    return [replace(sample, group=dataset.group_by_name(sample.name)) for sample in samples], []


def _locate_files(
    name: str, dataset: Dataset, root: str | Path | None, split: Split, patterns: Sequence[str | None]
) -> tuple[Layout, FileSets]:
    """Return layout and files of a dataset, from its root or from the patterns of images, alphas and trimaps.

    Raises UsageError.
    """
    images, alphas, trimaps = patterns
    if any(patterns) and name != "folder":
        raise UsageError(f"--images, --alphas and --trimaps are for --dataset folder; give --data-root for {name}")
    if any(patterns) and root is not None:
        raise UsageError("--data-root cannot be combined with --images, --alphas and --trimaps; give only one of them")
    if images and alphas:
        return dataset.test[0], find_file_sets(images, alphas, trimaps)
    if any(patterns) or root is None:
        options = "--images and --alphas, or --data-root" if name == "folder" else "its folder as --data-root"
        raise UsageError(f"the location of {dataset.title} is missing; give {options}")
    layouts = dataset.test if split == "test" else dataset.train
    if not layouts:
        raise UsageError(f"{dataset.title} has no {split} split; all its images are for testing")
    return find_files(layouts, Path(root), dataset.title)


def _find_backgrounds(dataset: Dataset, layout: Layout, folder: str | Path | None) -> list[Path]:
    """Return the background images that a dataset of foregrounds needs; none for others. Raises UsageError."""
    if not layout.backgrounds_per_foreground:
        if folder is not None:
            raise UsageError(f"--backgrounds has no effect: {dataset.title} contains complete images; remove it")
        return []
    if folder is None:
        raise UsageError(
            f"{dataset.title} contains only foregrounds; give --backgrounds DIR (the published test set uses images of "
            f"PASCAL VOC); each foreground is composited onto {layout.backgrounds_per_foreground} of them"
        )
    expected = "expected images to composite foregrounds onto"
    if not Path(folder).is_dir():
        raise UsageError(f"backgrounds folder {folder} does not exist; {expected}")
    backgrounds = list_images(Path(folder))
    if not backgrounds:
        raise UsageError(f"backgrounds folder {folder} contains no images; {expected}")
    return backgrounds
