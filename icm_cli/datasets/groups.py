"""Groups of images that show the same thing: metadata in the schema published with In-Context Matting."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from icm_cli.datasets.samples import Sample
from icm_cli.errors import Problem, UsageError

GROUP_FIELDS = ("class", "sub_class", "HalfOrFull")
"""A group is named by these, those that are null left out (published rule)."""
CATEGORY_FIELDS = {"class": "class", "type": "type", "TransparentOrOpaque": "opacity", "source": "source"}
"""Fields that images are tabulated by -> the table's name."""
EXPECTED = (
    'expected a JSON object such as {"cat_01": {"class": "cat", "sub_class": null, "HalfOrFull": "full", '
    '"type": "instance"}}; "type": "video" marks frames of a video'
)


@dataclass(frozen=True)
class Groups:
    """The metadata of a dataset, by the name of the image."""

    where: str
    entries: Mapping[str, Mapping[str, Any]]

    @classmethod
    def shipped(cls, name: str) -> Groups:
        """The published metadata of ICM-57 or AIM-500, which icm ships."""
        text = files("icm_cli.datasets").joinpath("metadata", name).read_text(encoding="utf-8")
        return cls(f"the metadata {name} that icm ships", json.loads(text))

    @classmethod
    def read(cls, path: Path) -> Groups:
        """Metadata of one's own. Raises UsageError for a file of another schema."""
        try:
            entries = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise UsageError(f"groups file {path} cannot be read ({error}); {EXPECTED}") from error
        if not isinstance(entries, dict) or not entries:
            raise UsageError(f"groups file {path} names no images; {EXPECTED}")
        for name, entry in entries.items():
            if not isinstance(entry, dict) or not entry.get("class"):
                raise UsageError(f"groups file {path}: {name!r} has no class; {EXPECTED}")
            for field in {*GROUP_FIELDS, *CATEGORY_FIELDS}:
                if not isinstance(entry.get(field), str | None):
                    raise UsageError(f"groups file {path}: {field} of {name!r} is no text; {EXPECTED}")
        return cls(f"groups file {path}", entries)

    def assign(self, samples: Iterable[Sample]) -> tuple[list[Sample], list[Problem]]:
        """The samples with group and categories, and the names that stand on one side only."""
        grouped, problems, met = [], [], set()
        for sample in samples:
            key = sample.name if sample.name in self.entries else Path(sample.name).name
            entry = self.entries.get(key)
            if entry is None:
                problems.append(Problem("no-group", sample.name, f"{sample.file} is not named in {self.where}"))
                grouped.append(sample)
                continue
            met.add(key)
            grouped.append(replace(sample, group=_group(entry), categories=_categories(entry)))
        problems += [
            Problem("absent-file", name, f"{self.where} names {name}, but there is no such image")
            for name in self.entries
            if name not in met
        ]
        return grouped, problems


def _group(entry: Mapping[str, Any]) -> str:
    return "-".join(str(entry[field]) for field in GROUP_FIELDS if entry.get(field))


def _categories(entry: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(entry[field]) for field, name in CATEGORY_FIELDS.items() if entry.get(field)}
