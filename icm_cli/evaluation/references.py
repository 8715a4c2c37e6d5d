"""Which images of a group are its references: fixed by name, kept in a file, never the target itself."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from icm_cli.datasets.samples import Problem, Sample
from icm_cli.errors import UsageError
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
) -> tuple[Rounds, list[Problem]]:
    """The references of every round and group, and the groups that are too small to have any.

    A group's names stand in the order of their SHA-256; round r takes those from the r-th on, beginning again at the
    first after the last. ``is_usable`` is asked before a sample is taken; the next one stands in for one that is not.
    At least one image of a group stays a target.
    """
    chosen: Rounds = [{} for _ in range(rounds)]
    problems = []
    for group, samples in groups.items():
        if len({sample.file for sample in samples}) < 2:
            problems += [
                Problem("lone-image", each.name, f"{each.name} is alone in group {group}; nothing shows it its thing")
                for each in samples
            ]
            continue
        ordered = sorted(samples, key=_sha256)
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
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        rounds = [{str(group): list(names) for group, names in each.items()} for each in content["references"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"references file {path} cannot be used ({error}); {EXPECTED}") from error
    problems: dict[str, Problem] = {}
    for names in rounds:
        for group in list(names):
            known = {sample.name for sample in groups.get(group, ())}
            for name in [name for name in names[group] if name not in known]:
                reason = f"{path} names {name} as a reference of group {group}, which has no such image"
                problems[name] = Problem("absent-file", name, reason)
            names[group] = [name for name in names[group] if name in known]
            if not names[group]:
                del names[group]
    if not any(rounds):
        raise UsageError(f"references file {path} names no group of this dataset; {EXPECTED}")
    return rounds, list(problems.values())


def write_rounds(path: Path, rounds: Rounds) -> None:
    """Write references for ``--references`` of a later run, whole or not at all. Raises OutputError."""
    write_json(path, {"references": rounds})


def targets(samples: Sequence[Sample], references: Sequence[str]) -> list[Sample]:
    """The samples of a group that are matted with these references: no reference, nor another alpha of its image."""
    shown = {sample.file for sample in samples if sample.name in references}
    return [sample for sample in samples if sample.file not in shown]
