"""``icm_cli.evaluate``, the command ``icm eval``: score alphas of a dataset."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from icm_cli.datasets.groups import Sample, group_samples
from icm_cli.datasets.layouts import list_images
from icm_cli.datasets.registry import DatasetSamples, find_dataset
from icm_cli.environment import limited_threads, peak_memory_bytes
from icm_cli.errors import Problem, UsageError, format_count
from icm_cli.evaluation.protocol import Evaluation, round_folder
from icm_cli.evaluation.rounds import ReferenceRounds, read_references_file, select_targets
from icm_cli.events import Listener, check_argument
from icm_cli.images.reading import CompositeSource
from icm_cli.options import EvaluateOptions, keyword_arguments
from icm_cli.reports.report import Report
from icm_cli.reports.result import REGIONS, ImageResult
from icm_cli.reports.write import ReportFiles
from icm_cli.scoring.task import ScoringRule

if TYPE_CHECKING:
    from icm_cli.matting.model_choice import AnyModelChoice
    from icm_cli.matting.predictor import Predictor

NamedT = TypeVar("NamedT")
MIN_SHOT_FRAMES = 3
"""Minimum length of a shot: its first frame is the reference, and its last one is excluded."""
SHOT_NOTE = "the first frame of every shot is its reference, and the last one is excluded, as in the tool of DAVIS"


@keyword_arguments(EvaluateOptions)
def evaluate(
    options: EvaluateOptions, *, predictor: Predictor | None = None, listener: Listener | None = None
) -> Report:
    """Matte a dataset, each group with its own references, or read alphas from ``pred``, and score them.

    Options that are None default to the conventions of the dataset. ``predictor`` is a loaded model, which replaces the
    options that select one. Problems with the data are listed in the report, and all other images are scored. The
    ``exit_code`` of the report is then 1, unless these problems are allowed.

    Raises UsageError, ConfigError or OutputError.

    >>> report = icm_cli.evaluate("folder", images="imgs", alphas="alphas", pred="alphas")
    >>> report.means["whole"].metrics["mse"].mean
    0.0
    """
    listener = check_argument(listener, Listener, "listener")
    start = time.perf_counter()
    data, protocol, matting = options.dataset, options.protocol, options.matting
    if data.dataset is None:
        raise UsageError("--dataset is missing; expected a name, or folder for your own images (or --compare A B)")
    if protocol.pred is not None:
        options.refuse_given(options.matting_names(), "--pred scores existing alphas")
        if predictor is not None:
            raise UsageError("pred scores existing alphas, so predictor has no effect; remove it")
    if protocol.references and (protocol.rounds or matting.refs_per_group):
        raise UsageError("--references fixes rounds and references; remove --rounds and --refs-per-group")
    dataset_samples = _find_dataset(options)
    reports = ReportFiles(options.reports.report, references=matting.write_references)
    evaluation = Evaluation(options, dataset_samples, _make_rule(dataset_samples, options), reports, listener, start)
    evaluation.check_no_overwrite()
    if protocol.pred is not None:
        return _score_predictions(evaluation, protocol.pred)
    from icm_cli.evaluation.in_context import matte_and_score
    from icm_cli.matting.model_choice import LoadedModel, ModelChoice
    from icm_cli.matting.predictor import Predictor

    if predictor is None:
        choice: AnyModelChoice = ModelChoice.from_options(options.model, options.resources.batch_size)
    else:
        choice = LoadedModel(check_argument(predictor, Predictor, "predictor"))
    with limited_threads():
        return matte_and_score(evaluation, choice)


def _find_dataset(options: EvaluateOptions) -> DatasetSamples:
    """Return the samples of the dataset, with video frames marked. Raises UsageError."""
    data = options.dataset
    assert data.dataset is not None
    files = {name: getattr(data, name) for name in ("split", "images", "alphas", "trimaps", "groups", "backgrounds")}
    dataset_samples = find_dataset(data.dataset, data.data_root, **files)
    if dataset_samples.dataset.has_shots:
        reason = f"the first frame of every shot of {dataset_samples.dataset.title} is its only reference"
        options.refuse_given(("rounds", "refs_per_group", "groups", "video"), reason)
        dataset_samples = _select_shot_frames(dataset_samples)
    if options.matting.shot and not (dataset_samples.dataset.has_shots or data.video):
        raise UsageError("--shot requires frames of shots; give --dataset davis16, or --video if the groups are videos")
    if dataset_samples.dataset.has_shots or data.video:
        frames = [
            replace(sample, categories={**sample.categories, "type": "video"}) for sample in dataset_samples.samples
        ]
        dataset_samples = replace(dataset_samples, samples=frames)
    return dataset_samples


def _select_shot_frames(dataset_samples: DatasetSamples) -> DatasetSamples:
    """Exclude the last frame of every shot, and all frames of shots shorter than MIN_SHOT_FRAMES, which are problems.

    Raises UsageError if all shots are shorter.
    """
    shots = group_samples(dataset_samples.samples)
    lengths = {shot: len(frames) for shot, frames in shots.items()}
    problems = [
        Problem(
            "lone-image",
            shot,
            f"shot {shot} has {format_count(length, 'frame')}; no frame is scored, because the first and last"
            " never are",
        )
        for shot, length in lengths.items()
        if length < MIN_SHOT_FRAMES
    ]
    if len(problems) == len(shots):
        raise UsageError(
            f"{dataset_samples.dataset.title} has no shot of three frames or more; the first and last frame "
            "of a shot are not scored, so give complete shots"
        )
    samples = [frame for shot, frames in shots.items() if lengths[shot] >= MIN_SHOT_FRAMES for frame in frames[:-1]]
    notes = [*dataset_samples.notes, SHOT_NOTE]
    return replace(dataset_samples, samples=samples, notes=notes, problems=[*dataset_samples.problems, *problems])


def _make_rule(dataset_samples: DatasetSamples, options: EvaluateOptions) -> ScoringRule:
    """Return the scoring rule from the options, which default to the conventions of the dataset.

    Images of the dataset ``folder`` with trimaps are scored over both regions by default.
    """
    dataset, protocol, defaults = dataset_samples.dataset, options.protocol, dataset_samples.dataset.conventions
    has_trimaps = options.dataset.dataset == "folder" and any(sample.trimap for sample in dataset_samples.samples)
    regions = protocol.region or (REGIONS if has_trimaps else defaults.regions)
    if protocol.trimap_kernel is not None and "unknown" not in regions:
        raise UsageError(
            "--trimap-kernel has no effect: the unknown region is not scored; remove it, or give --region unknown"
        )
    return ScoringRule(
        tuple(region for region in REGIONS if region in regions),
        protocol.size or defaults.size,
        protocol.metric_variant or defaults.metric_variant,
        protocol.trimap_kernel or ScoringRule.trimap_kernel_px,
        dataset.has_detail_maps,
        dataset.has_shots,
    )


def _score_predictions(evaluation: Evaluation, folder: Path) -> Report:
    """Score the alphas in ``folder``, except the references. Raises UsageError if no alpha belongs to an image."""
    if not folder.is_dir():
        raise UsageError(f"folder of predictions {folder} does not exist; expected alphas named like the images")
    protocol = evaluation.options.protocol
    references: ReferenceRounds = [{} for _ in range(protocol.rounds or 1)]
    problems: list[Problem] = []
    if protocol.references:
        references, problems = read_references_file(protocol.references, evaluation.groups)
    elif evaluation.rule.has_shots:
        references = [{shot: [frames[0].name] for shot, frames in evaluation.groups.items()}]
    planned = [
        result
        for round_number, names in enumerate(references, 1)
        for result in _plan_results(
            evaluation, round_folder(folder, round_number, len(references)), round_number, names
        )
    ]
    if not any(result.output for result in planned):
        expected = f"{round_folder(folder, 1, len(references)) / evaluation.data.samples[0].name}.png"
        has_rounds = (folder / "round-1").is_dir()
        hint = "; it has several rounds, so give --references with the report of the run that made them"
        raise UsageError(
            f"folder of predictions {folder} has no alpha of any image, or several of the same "
            f"name; expected names like {expected}{hint if has_rounds else ''}"
        )
    evaluation.reports.check_no_overwrite([result.output for result in planned if result.output])
    evaluation.reports.check_writable()
    collector = evaluation.make_collector(planned, {"predictions": str(folder)}, references)
    for problem in problems:
        collector.add_problem(problem)
    evaluation.listener.on_run_start(len(planned))
    with collector, collector.writing_reports(evaluation.reports, peak_memory_bytes):
        for result in planned:
            if result.output:
                collector.add(replace(result, status="done"))
                continue
            searched = round_folder(folder, result.round, len(references))
            reason = f"{result.source} has no unique alpha in {searched}; expected a file named {result.name}"
            collector.add_problem(Problem("missing-prediction", result.name, reason))
            collector.add(replace(result, status="unscored", reason=reason))
        evaluation.score_flicker(collector)
    return collector.report


def _plan_results(
    evaluation: Evaluation, folder: Path, round_number: int, references: Mapping[str, list[str]]
) -> list[ImageResult]:
    """Return a result for every target of a round, with the path of its alpha if there is one."""
    samples = evaluation.data.samples
    paths = list_images(folder) if folder.is_dir() else []
    alphas = {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
    alpha_by_stem = _unique_stems({path: path.stem for path in alphas.values()})
    unique_names = _unique_stems({sample.name: Path(sample.name).name for sample in samples})
    targets = {
        sample.name
        for group, members in evaluation.groups.items()
        for sample in select_targets(members, references.get(group, []))
    } | {sample.name for sample in samples if not sample.group}

    def find_alpha(sample: Sample) -> Path | str:
        if sample.name in alphas:
            return alphas[sample.name]
        name = Path(sample.name).name
        if unique_names.get(name) != sample.name:
            return ""
        stems = [name] if isinstance(sample.image, CompositeSource) else [name, sample.file.stem]
        return next((alpha_by_stem[stem] for stem in stems if stem in alpha_by_stem), "")

    return [
        evaluation.plan_result(sample, find_alpha(sample), round_number) for sample in samples if sample.name in targets
    ]


def _unique_stems(stems: Mapping[NamedT, str]) -> dict[str, NamedT]:
    """Return stem -> key, for the stems that only one key has."""
    counts = Counter(stems.values())
    return {stem: key for key, stem in stems.items() if counts[stem] == 1}
