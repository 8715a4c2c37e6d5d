"""``icm_cli.evaluate``, the command ``icm eval``: score alphas of a dataset."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
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
    dataset_samples = find_dataset(
        data.dataset,
        data.data_root,
        split=data.split,
        images=data.images,
        alphas=data.alphas,
        trimaps=data.trimaps,
        groups=data.groups,
        backgrounds=data.backgrounds,
    )
    if dataset_samples.dataset.has_shots:
        reason = f"the first frame of every shot of {dataset_samples.dataset.title} is its only reference"
        options.refuse_given(("rounds", "refs_per_group", "groups", "video"), reason)
        dataset_samples = _select_shot_frames(dataset_samples)
    are_videos = dataset_samples.dataset.has_shots or data.video
    if options.matting.shot and not are_videos:
        raise UsageError("--shot requires frames of shots; give --dataset davis16, or --video if the groups are videos")
    if not are_videos:
        return dataset_samples
    frames = [replace(sample, categories={**sample.categories, "type": "video"}) for sample in dataset_samples.samples]
    return replace(dataset_samples, samples=frames)


def _select_shot_frames(dataset_samples: DatasetSamples) -> DatasetSamples:
    """Exclude the last frame of every shot, and all frames of shots shorter than MIN_SHOT_FRAMES, which are problems.

    Raises UsageError if all shots are shorter.
    """
    samples: list[Sample] = []
    problems = list(dataset_samples.problems)
    for shot, frames in group_samples(dataset_samples.samples).items():
        if len(frames) >= MIN_SHOT_FRAMES:
            samples += frames[:-1]
            continue
        length = format_count(len(frames), "frame")
        reason = f"shot {shot} has {length}; no frame is scored, because the first and last never are"
        problems.append(Problem("lone-image", shot, reason))
    if not samples:
        raise UsageError(
            f"{dataset_samples.dataset.title} has no shot of three frames or more; the first and last frame "
            "of a shot are not scored, so give complete shots"
        )
    return replace(dataset_samples, samples=samples, notes=[*dataset_samples.notes, SHOT_NOTE], problems=problems)


def _make_rule(dataset_samples: DatasetSamples, options: EvaluateOptions) -> ScoringRule:
    """Return the scoring rule from the options, which default to the conventions of the dataset.

    Images of the dataset ``folder`` with trimaps are scored over both regions by default.
    """
    dataset, protocol = dataset_samples.dataset, options.protocol
    defaults = dataset.conventions
    default_regions = defaults.regions
    if options.dataset.dataset == "folder" and any(sample.trimap for sample in dataset_samples.samples):
        default_regions = REGIONS
    regions = protocol.region or default_regions
    if protocol.trimap_kernel is not None and "unknown" not in regions:
        raise UsageError(
            "--trimap-kernel has no effect: the unknown region is not scored; remove it, or give --region unknown"
        )
    return ScoringRule(
        regions=tuple(region for region in REGIONS if region in regions),
        scored_size=protocol.size or defaults.size,
        metric_variant=protocol.metric_variant or defaults.metric_variant,
        trimap_kernel_px=protocol.trimap_kernel or ScoringRule.trimap_kernel_px,
        has_detail_maps=dataset.has_detail_maps,
        has_shots=dataset.has_shots,
    )


def _score_predictions(evaluation: Evaluation, folder: Path) -> Report:
    """Score the alphas in ``folder``, except the references. Raises UsageError if no alpha belongs to an image."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"folder of predictions {folder} {what}; expected a folder of alphas named like the images")
    references, problems = _references_of_predictions(evaluation)
    rounds = len(references)
    planned: list[ImageResult] = []
    for round_number, names_by_group in enumerate(references, 1):
        alphas_folder = round_folder(folder, round_number, rounds)
        planned += _plan_results(evaluation, alphas_folder, round_number, names_by_group)
    predicted = [Path(result.output) for result in planned if result.output]
    if not predicted:
        raise _no_predictions_error(evaluation, folder, rounds)
    evaluation.reports.check_no_overwrite(predicted)
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
            alphas_folder = round_folder(folder, result.round, rounds)
            expected = f"expected {alphas_folder / result.name}.png, or one file of this name in another format"
            reason = f"{result.source} has no alpha, or several; {expected}"
            if not any(references):
                reason += (
                    "; if it was a reference of icm eval --save-alphas, give --references with the report of that run"
                )
            collector.add_problem(Problem("missing-prediction", result.name, reason))
            collector.add(replace(result, status="unscored", reason=reason))
        evaluation.score_flicker(collector)
    return collector.report


def _references_of_predictions(evaluation: Evaluation) -> tuple[ReferenceRounds, list[Problem]]:
    """Return the references of every round, which are not scored, and the problems of the references file."""
    protocol = evaluation.options.protocol
    if protocol.references:
        return read_references_file(protocol.references, evaluation.groups)
    if evaluation.rule.has_shots:
        return [{shot: [frames[0].name] for shot, frames in evaluation.groups.items()}], []
    return [{} for _ in range(protocol.rounds or 1)], []


def _no_predictions_error(evaluation: Evaluation, folder: Path, rounds: int) -> UsageError:
    """Return the error about a folder without a usable alpha."""
    expected = f"{round_folder(folder, 1, rounds) / evaluation.data.samples[0].name}.png"
    hint = ""
    if (folder / "round-1").is_dir():
        hint = "; it has several rounds, so give --references with the report of the run that made them"
    return UsageError(
        f"folder of predictions {folder} has no alpha of any image, or several of the same "
        f"name; expected names like {expected}{hint}"
    )


def _plan_results(
    evaluation: Evaluation, folder: Path, round_number: int, references: Mapping[str, list[str]]
) -> list[ImageResult]:
    """Return a result for every target of a round, with the path of its alpha if there is one.

    ``references``: their names by group.
    """
    samples = evaluation.data.samples
    targets = {sample.name for sample in samples if not sample.group}
    for group, members in evaluation.groups.items():
        targets |= {sample.name for sample in select_targets(members, references.get(group, []))}
    alphas = _PredictedAlphas(folder, samples)
    return [
        evaluation.plan_result(sample, alphas.find(sample) or "", round_number)
        for sample in samples
        if sample.name in targets
    ]


class _PredictedAlphas:
    """The alphas in a folder of predictions, which are found by the names of their samples.

    An alpha in another subfolder than expected is found by its stem, if no other alpha and no other sample has it.
    """

    def __init__(self, folder: Path, samples: Sequence[Sample]) -> None:
        paths = list_images(folder) if folder.is_dir() else []
        names = {path: path.relative_to(folder).with_suffix("").as_posix() for path in paths}
        pngs = {name: path for path, name in names.items() if path.suffix == ".png"}
        self._by_name = _invert_unique(names) | pngs  # of files with the same name, the PNG is the alpha
        self._by_stem = _invert_unique({path: path.stem for path in self._by_name.values()})
        self._sample_by_stem = _invert_unique({sample.name: Path(sample.name).name for sample in samples})

    def find(self, sample: Sample) -> Path | None:
        """Return the path of the alpha of a sample; None if there is none, or if it is not clear which one it is."""
        if sample.name in self._by_name:
            return self._by_name[sample.name]
        stem = Path(sample.name).name
        if self._sample_by_stem.get(stem) != sample.name:
            return None
        if stem not in self._by_stem and not isinstance(sample.image, CompositeSource):
            stem = sample.file.stem  # the file of the image may have another name than its alpha
        return self._by_stem.get(stem)


def _invert_unique(names: Mapping[NamedT, str]) -> dict[str, NamedT]:
    """Return the inverse of a mapping, without the names that several keys have."""
    counts = Counter(names.values())
    return {name: key for key, name in names.items() if counts[name] == 1}
