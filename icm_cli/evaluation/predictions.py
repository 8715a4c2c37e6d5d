"""Score a folder of alphas made by any tool (``icm eval --pred``)."""

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
from icm_cli.evaluation.rounds import ReferenceRounds, choose_first_frames, read_references_file, select_targets
from icm_cli.images.reading import CompositeSource
from icm_cli.reports.report import Report
from icm_cli.reports.result import ImageResult

NamedT = TypeVar("NamedT")


def score_predictions(evaluation: Evaluation, folder: Path, rounds: int) -> Report:
    """Score the alphas in ``folder``, named as by ``--save-alphas`` or by file name only.

    If the evaluation has a references file, the references of each round are excluded. Otherwise
    every image is scored. Raises UsageError if no alpha belongs to an image.
    """
    if not folder.is_dir():
        raise UsageError(f"folder of predictions {folder} does not exist; expected alphas named like the images")
    dataset = evaluation.dataset
    references: ReferenceRounds = [{} for _ in range(rounds)]
    problems: list[Problem] = []
    if evaluation.files.references:
        references, problems = read_references_file(evaluation.files.references, dataset.groups)
    elif evaluation.rule.has_shots:
        references = choose_first_frames(dataset.groups)
    planned = [
        result
        for number, names in enumerate(references, 1)
        for result in _plan_results(evaluation, round_folder(folder, number, len(references)), number, names)
    ]
    if not any(result.output for result in planned):
        expected = f"{round_folder(folder, 1, len(references)) / dataset.samples[0].name}.png"
        has_rounds = (folder / "round-1").is_dir()
        hint = "; it has several rounds, so give --references with the report of the run that made them"
        raise UsageError(
            f"folder of predictions {folder} has no alpha of any image, or several of the same "
            f"name; expected names like {expected}{hint if has_rounds else ''}"
        )
    evaluation.files.reports.check_no_overwrite([result.output for result in planned if result.output])
    evaluation.files.reports.check_writable()
    outcome = evaluation.make_outcome(planned, {"predictions": str(folder)}, references)
    for problem in problems:
        outcome.add_problem(problem)
    evaluation.run.listener.on_run_start(len(planned))
    with outcome, outcome.writing_reports(evaluation.files.reports, environment.peak_memory_bytes):
        for result in planned:
            if result.output:
                outcome.add(replace(result, status="done"))
                continue
            searched = round_folder(folder, result.dataset.round, len(references))
            reason = f"{result.source} has no unique alpha in {searched}; expected a file named {result.name}"
            outcome.add_problem(Problem("missing-prediction", result.name, reason))
            outcome.add(replace(result, status="unscored", reason=reason))
        evaluation.score_flicker(outcome)
    return outcome.report


def _plan_results(
    evaluation: Evaluation, folder: Path, number: int, references: Mapping[str, list[str]]
) -> list[ImageResult]:
    """Return a result for every target of a round, with the path of its alpha if there is one."""
    dataset = evaluation.dataset
    paths = list_images(folder) if folder.is_dir() else []
    alphas = {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
    alpha_by_stem = _unique_stems({path: path.stem for path in alphas.values()})
    name_by_stem = _unique_stems({sample.name: Path(sample.name).name for sample in dataset.samples})
    targets = {
        sample.name
        for samples in dataset.groups.values()
        for sample in select_targets(samples, references.get(samples[0].group, []))
    } | {sample.name for sample in dataset.samples if not sample.group}

    def find_alpha(sample: Sample) -> Path | str:
        if sample.name in alphas:
            return alphas[sample.name]
        stems = [Path(sample.name).name]
        if name_by_stem.get(stems[0]) != sample.name:
            return ""
        if not isinstance(sample.image, CompositeSource):
            stems.append(sample.file.stem)
        return next((alpha_by_stem[stem] for stem in stems if stem in alpha_by_stem), "")

    return [
        replace(evaluation.plan_result(sample, Path(), number), output=str(find_alpha(sample)))
        for sample in dataset.samples
        if sample.name in targets
    ]


def _unique_stems(stems: Mapping[NamedT, str]) -> dict[str, NamedT]:
    """Return the keys by stem, for stems that occur once."""
    counts = Counter(stems.values())
    return {stem: key for key, stem in stems.items() if counts[stem] == 1}
