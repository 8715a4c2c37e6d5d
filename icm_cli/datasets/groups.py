"""Samples of a dataset and their groups: images that show the same object, by the metadata of In-Context Matting."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from icm_cli.errors import Problem, UsageError
from icm_cli.files.json_files import read_json
from icm_cli.images.reading import CompositeSource

GROUP_FIELDS = ("class", "sub_class", "HalfOrFull")
"""Metadata fields that form the name of a group. Null values are omitted."""
CATEGORY_FIELDS = {"class": "class", "type": "type", "TransparentOrOpaque": "opacity", "source": "source"}
"""Metadata fields for which reports have a table, and the names of the tables."""
GROUPS_SCHEMA = {"*": {"class": str, **{f"{name}?": (str, type(None)) for name in (*GROUP_FIELDS, *CATEGORY_FIELDS)}}}
EXPECTED_GROUPS = (
    'expected a JSON object such as {"cat_01": {"class": "cat", "sub_class": null, "HalfOrFull": "full", '
    '"type": "instance"}}; "type": "video" marks frames of a video'
)


@dataclass(frozen=True)
class Sample:
    """An image with its true alpha."""

    name: str
    """Unique name in the dataset: the path of the alpha relative to its folder without suffix, or its number."""
    image: Path | CompositeSource
    alpha: Path
    trimap: Path | None = None
    group: str = ""
    """Images of a group show the same kind of object; "" if the metadata lacks the image."""
    categories: Mapping[str, str] = field(default_factory=dict, hash=False)
    """For example {"class": "animal", "type": "SO"}."""

    @property
    def file(self) -> Path:
        """Path of the image, or of the foreground of a composite."""
        return self.image.foreground if isinstance(self.image, CompositeSource) else self.image

    @property
    def is_video_frame(self) -> bool:
        """Whether the group is a video whose frames are in the order of their names."""
        return self.categories.get("type") == "video"


def group_samples(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Return group -> samples. Samples without a group are excluded."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.group:
            groups.setdefault(sample.group, []).append(sample)
    return groups


@dataclass(frozen=True)
class GroupMetadata:
    """Metadata of a dataset by image name."""

    origin: str
    """Description of the file, for error messages."""
    entries: Mapping[str, Mapping[str, Any]]

    @classmethod
    def load_bundled(cls, name: str) -> GroupMetadata:
        """Load the published metadata of ICM-57 or AIM-500, which is part of the package."""
        text = files("icm_cli.datasets").joinpath("metadata", name).read_text(encoding="utf-8")
        return cls(f"the bundled metadata {name}", json.loads(text))

    @classmethod
    def read_file(cls, path: Path) -> GroupMetadata:
        """Read a metadata file. Raises UsageError if its format is wrong."""
        entries = read_json(path, "groups file", GROUPS_SCHEMA, EXPECTED_GROUPS)
        if not entries:
            raise UsageError(f"groups file {path} names no images; {EXPECTED_GROUPS}")
        for name, entry in entries.items():
            if not entry["class"]:
                raise UsageError(f"groups file {path}: {name!r} has no class; {EXPECTED_GROUPS}")
        return cls(f"groups file {path}", entries)

    def assign_groups(self, samples: Iterable[Sample]) -> tuple[list[Sample], list[Problem]]:
        """Return the samples with their groups and categories, and the problems found.

        An entry lists a sample by its name, or by the last part of it. A sample that the metadata do not list is a
        problem, and so is an entry without a sample.
        """
        grouped, problems, listed_names = [], [], set()
        for sample in samples:
            listed_name = sample.name if sample.name in self.entries else Path(sample.name).name
            entry = self.entries.get(listed_name)
            if entry is None:
                problems.append(Problem("no-group", sample.name, f"{sample.file} is not listed in {self.origin}"))
                grouped.append(sample)
                continue
            listed_names.add(listed_name)
            group = "-".join(str(entry[name]) for name in GROUP_FIELDS if entry.get(name))
            categories = {table: str(entry[name]) for name, table in CATEGORY_FIELDS.items() if entry.get(name)}
            grouped.append(replace(sample, group=group, categories=categories))
        problems += [
            Problem("absent-file", name, f"{self.origin} lists {name}, but this image does not exist")
            for name in self.entries
            if name not in listed_names
        ]
        return grouped, problems
