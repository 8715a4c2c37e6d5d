"""References of each group: chosen by name alone, kept in a file, never the target itself."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from icm_cli.datasets.groups import Sample
from icm_cli.datasets.registry import ONE_GROUP
from icm_cli.errors import Problem, UsageError
from icm_cli.files import write_json

Rounds = list[dict[str, list[str]]]
"""For every round, the names of each group's references."""

EXPECTED = 'expected {"references": [{"GROUP": ["NAME"]}]}, a mapping for each round, or a JSON report of icm eval'


def choose_references(
    groups: Mapping[str, Sequence[Sample]],
    *,
    rounds: int,
    refs_per_group: int,
    is_usable: Callable[[Sample], bool],
    in_order: bool = False,
) -> tuple[Rounds, list[Problem]]:
    """The references of every round and group, and the groups that are too small to have any.

    A group's names stand in the order of their SHA-256, or ``in_order`` as they come; round r takes those from the
    r-th on, beginning again at the first after the last. ``is_usable`` is asked before a sample is taken; the next one
    stands in for one that is not. At least one image of a group stays a target.
    """
    chosen: Rounds = [{} for _ in range(rounds)]
    problems = []
    for group, samples in groups.items():
        if len({sample.image for sample in samples}) < 2:
            problems += [
                Problem("lone-image", each.name, f"{each.name} is alone in group {group}; nothing shows it its thing")
                for each in samples
            ]
            continue
        ordered = list(samples) if in_order else sorted(samples, key=_sha256)
        usable = functools.cache(is_usable)
        for number, names in enumerate(chosen):
            first = number % len(ordered)
            candidates = (each for each in (*ordered[first:], *ordered[:first]) if usable(each))
            taken = [each.name for each in islice(candidates, min(refs_per_group, len(ordered) - 1))]
            if taken:
                names[group] = taken
    return chosen, problems


def _sha256(sample: Sample) -> str:
    return hashlib.sha256(sample.name.encode(errors="surrogateescape")).hexdigest()


def read_rounds(path: Path, groups: Mapping[str, Sequence[Sample]]) -> tuple[Rounds, list[Problem]]:
    """References of an earlier run, from their own file or its JSON report; what this dataset lacks is left out.

    Raises UsageError for a file of another kind.
    """
    named = _named_rounds(path)
    problems: dict[str, Problem] = {}
    rounds: Rounds = []
    for number, names in enumerate(named):
        rounds.append({})
        for group, wanted in names.items():
            known = {sample.name for sample in groups.get(group, ())}
            if there := [name for name in dict.fromkeys(wanted) if name in known]:
                rounds[number][group] = there
            for name in wanted:
                if name not in known:
                    reason = f"{path} names {name} as a reference of group {group}, which has no such image here"
                    problems[name] = Problem("absent-file", name, reason)
    if not any(rounds):
        raise UsageError(f"references file {path} names no image of this dataset in its group; {EXPECTED}")
    return rounds, list(problems.values())


def _named_rounds(path: Path) -> Rounds:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UsageError(f"references file {path} cannot be read ({error}); {EXPECTED}") from error
    rounds = content.get("references") if isinstance(content, dict) else None
    is_right = isinstance(rounds, list) and all(
        isinstance(groups, dict)
        and all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in groups.values())
        for groups in rounds
    )
    if not is_right:
        raise UsageError(f"references file {path} is of another kind; {EXPECTED}")
    return list(rounds or [])


def group_notes(groups: Mapping[str, Sequence[Sample]], rounds: int, refs_per_group: int) -> list[str]:
    """Sentences on groups that cannot give as many rounds or references as asked."""
    sizes = {group: len(samples) for group, samples in groups.items() if len(samples) > 1}
    notes = []
    if set(groups) == {ONE_GROUP}:
        notes.append(
            "no groups are known, so all images are one group and a reference may show another thing than its target; "
            "--groups FILE says which belong together"
        )
    if small := [group for group, size in sizes.items() if size < rounds]:
        notes.append(
            f"{len(small)} group(s), such as {small[0]}, have fewer than {rounds} images: their references and scores "
            "come again in later rounds, and the spread is too small"
        )
    if small := [group for group, size in sizes.items() if size <= refs_per_group]:
        notes.append(
            f"{len(small)} group(s), such as {small[0]}, have too few images for {refs_per_group} references and a "
            "target: they have as many references as leave one"
        )
    return notes


def write_rounds(path: Path, rounds: Rounds) -> None:
    """Write references for ``--references`` of a later run, whole or not at all. Raises OutputError."""
    write_json(path, {"references": rounds})


def targets(samples: Sequence[Sample], references: Sequence[str]) -> list[Sample]:
    """The samples of a group that are matted with these references: no reference, nor another alpha of its image."""
    shown = {sample.image for sample in samples if sample.name in references}
    return [sample for sample in samples if sample.image not in shown]
