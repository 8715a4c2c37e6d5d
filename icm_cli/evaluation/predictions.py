"""Score alphas that any tool made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from icm_cli import environment
from icm_cli.datasets.groups import Sample
from icm_cli.datasets.layouts import list_images
from icm_cli.errors import Problem, UsageError
from icm_cli.evaluation.protocol import Evaluation, round_folder
from icm_cli.evaluation.rounds import Rounds, read_rounds, targets
from icm_cli.evaluation.shots import first_frames
from icm_cli.images.reading import CompositeSource
from icm_cli.reports.report import Report
from icm_cli.reports.result import ImageResult

Key = TypeVar("Key")


def score_predictions(evaluation: Evaluation, folder: Path, rounds: int) -> Report:
    """Score every sample's alpha below ``folder``, as ``--save-alphas`` lays them out or by file name alone.

    Fixed references are left out of their round; without them every image is scored. Raises UsageError where no
    alpha belongs to any sample.
    """
    if not folder.is_dir():
        raise UsageError(f"folder of predictions {folder} does not exist; expected alphas named like the images")
    references: Rounds = [{} for _ in range(rounds)]
    problems: list[Problem] = []
    if evaluation.fixed_references:
        references, problems = read_rounds(evaluation.fixed_references, evaluation.groups)
    elif evaluation.found.dataset.is_shots:
        references = first_frames(evaluation.found)
    planned = [
        result
        for number, shown in enumerate(references, 1)
        for result in _planned(evaluation, round_folder(folder, number, len(references)), number, shown)
    ]
    if not any(result.output for result in planned):
        expected = f"{round_folder(folder, 1, len(references)) / evaluation.found.samples[0].name}.png"
        hint = "; it has rounds, so give --references with the report of the run that made them"
        raise UsageError(
            f"folder of predictions {folder} has no alpha of any image, or several of each name; expected names like "
            f"{expected}{hint if (folder / 'round-1').is_dir() else ''}"
        )
    evaluation.report_files.check_no_overwrite([result.output for result in planned if result.output])
    evaluation.report_files.check_writable()
    outcome = evaluation.outcome(planned, {"predictions": str(folder)}, references)
    for problem in problems:
        outcome.add_problem(problem)
    evaluation.listener.on_run_start(len(planned))
    with outcome, outcome.reported(evaluation.report_files, environment.peak_memory_bytes):
        for result in planned:
            if result.output:
                outcome.add(replace(result, status="done"))
                continue
            home = round_folder(folder, result.round, len(references))
            reason = f"{result.source} has no alpha in {home}; expected one named {result.name}, or the only one so"
            outcome.add_problem(Problem("missing-prediction", result.name, reason))
            outcome.add(replace(result, status="unscored", reason=reason))
        evaluation.add_flicker(outcome)
    return outcome.report


def _planned(
    evaluation: Evaluation, folder: Path, number: int, references: Mapping[str, list[str]]
) -> list[ImageResult]:
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in list_images(folder)}
    by_stem = _alone({path: path.stem for path in found.values()})
    stems = _alone({sample.name: Path(sample.name).name for sample in evaluation.found.samples})
    wanted = {
        sample.name
        for samples in evaluation.groups.values()
        for sample in targets(samples, references.get(samples[0].group, []))
    } | {sample.name for sample in evaluation.found.samples if not sample.group}

    def alpha_of(sample: Sample) -> Path | str:
        if sample.name in found:
            return found[sample.name]
        names = (
            [Path(sample.name).name]
            if isinstance(sample.image, CompositeSource)
            else [Path(sample.name).name, sample.file.stem]
        )
        is_alone = stems.get(names[0]) == sample.name
        return next((by_stem[name] for name in names if name in by_stem), "") if is_alone else ""

    return [
        replace(evaluation.planned(sample, Path(), number), output=str(alpha_of(sample)))
        for sample in evaluation.found.samples
        if sample.name in wanted
    ]


def _alone(stems: Mapping[Key, str]) -> dict[str, Key]:
    """Map each stem that occurs once to its key."""
    counts = Counter(stems.values())
    return {stem: key for key, stem in stems.items() if counts[stem] == 1}
