"""References of an evaluation: chosen by name, or read from a file. A target is never its own reference."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from icm_cli.datasets.groups import Sample
from icm_cli.datasets.registry import ONE_GROUP
from icm_cli.errors import Problem, UsageError, format_count
from icm_cli.files.json_files import read_json
from icm_cli.reports.report import REFERENCES_SCHEMA

ReferenceRounds = list[dict[str, list[str]]]
"""One dictionary per round: group -> names of its references."""

EXPECTED_REFERENCES = (
    'expected {"references": [{"GROUP": ["NAME"]}]} with one object per round, or a JSON report of icm eval'
)


def choose_references(
    groups: Mapping[str, Sequence[Sample]],
    *,
    rounds: int,
    refs_per_group: int,
    is_usable: Callable[[str], bool],
    in_order: bool = False,
) -> tuple[ReferenceRounds, list[Problem]]:
    """Choose the references of every group and round, and return the problems of groups with a single image.

    The samples of a group are sorted by the SHA-256 of their names, or left in their order if ``in_order``. Round n
    takes the first ``refs_per_group`` usable samples from the n-th on and wraps around. At least one image of a group
    remains as a target.

    ``is_usable``: reads a sample, so it is only called until enough samples are found.
    """
    chosen: ReferenceRounds = [{} for _ in range(rounds)]
    problems = []
    for group, samples in groups.items():
        names = [sample.name for sample in samples]
        image_count = len({sample.image for sample in samples})
        if image_count < 2:
            problems += [
                Problem("lone-image", name, f"{name} is the only image of group {group} and has no reference")
                for name in names
            ]
            continue
        if not in_order:
            names.sort(key=lambda name: hashlib.sha256(os.fsencode(name)).hexdigest())
        max_references = min(refs_per_group, image_count - 1)
        for number, references_by_group in enumerate(chosen):
            first = number % len(names)
            candidates = [*names[first:], *names[:first]]
            if references := list(islice(filter(is_usable, candidates), max_references)):
                references_by_group[group] = references
    return chosen, problems


def read_references_file(path: Path, groups: Mapping[str, Sequence[Sample]]) -> tuple[ReferenceRounds, list[Problem]]:
    """Read references from a references file or a JSON report. Names that are not in their group become problems.

    Raises UsageError if the format is wrong or no name is known.
    """
    problem_by_name: dict[str, Problem] = {}
    rounds: ReferenceRounds = []
    content = read_json(path, "references file", {"references": REFERENCES_SCHEMA}, EXPECTED_REFERENCES)
    for listed in content["references"]:
        references: dict[str, list[str]] = {}
        for group, names in listed.items():
            group_names = {sample.name for sample in groups.get(group, ())}
            for name in dict.fromkeys(names):
                if name in group_names:
                    references.setdefault(group, []).append(name)
                else:
                    reason = f"{path} names {name} as a reference of group {group}, but this group has no such image"
                    problem_by_name[name] = Problem("absent-file", name, reason)
        rounds.append(references)
    if not any(rounds):
        raise UsageError(f"references file {path} names no image of this dataset in its group; {EXPECTED_REFERENCES}")
    return rounds, list(problem_by_name.values())


def describe_group_problems(groups: Mapping[str, Sequence[Sample]], rounds: int, refs_per_group: int) -> list[str]:
    """Return notes if the dataset has no groups, and about groups too small for the rounds or references.

    Groups of one image are not among them: :func:`choose_references` reports them.
    """
    sizes = {group: len(samples) for group, samples in groups.items() if len(samples) > 1}
    notes = []
    if set(groups) == {ONE_GROUP}:
        notes.append(
            "the dataset has no groups, so all images form one group and a reference may show a "
            "different object than its target; give --groups FILE to define groups"
        )
    if repeating := [group for group, size in sizes.items() if size < rounds]:
        notes.append(
            f"fewer than {rounds} images in {format_count(len(repeating), 'group')}, such as {repeating[0]}: their "
            "references repeat in later rounds, and the standard deviation over rounds is too small"
        )
    if small := [group for group, size in sizes.items() if size <= refs_per_group]:
        notes.append(
            f"too few images for {refs_per_group} references and a target in {format_count(len(small), 'group')}, "
            f"such as {small[0]}: all images but one are references"
        )
    return notes


def select_targets(samples: Sequence[Sample], references: Sequence[str]) -> list[Sample]:
    """Return the targets of a group: its samples, except those whose image is also the image of a reference."""
    reference_images = {sample.image for sample in samples if sample.name in references}
    return [sample for sample in samples if sample.image not in reference_images]
