"""``icm_cli.evaluate``, the command ``icm eval``: score alphas of a dataset."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from icm_cli import environment
from icm_cli.datasets.groups import Sample, group_samples
from icm_cli.datasets.registry import DatasetSamples, find_dataset
from icm_cli.environment import DEFAULT_WORKERS, limited_threads
from icm_cli.errors import Problem, UsageError
from icm_cli.evaluation.protocol import Evaluation, EvaluationDataset, EvaluationFiles, RunSettings
from icm_cli.events import Listener, check_argument
from icm_cli.options import EvaluateOptions, ProtocolOptions, keyword_arguments
from icm_cli.reports.report import Report
from icm_cli.reports.result import REGIONS
from icm_cli.reports.write import ReportFiles
from icm_cli.scoring.rule import ScoringRule

if TYPE_CHECKING:
    from icm_cli.matting.model_choice import AnyModelChoice
    from icm_cli.matting.predictor import Predictor

MIN_SHOT_FRAMES = 3
"""Minimum length of a shot: its first frame is the reference, and its last one is excluded."""
SHOT_NOTE = "the first frame of every shot is its reference, and the last one is excluded, as in the tool of DAVIS"


@keyword_arguments(EvaluateOptions)
@limited_threads()
def evaluate(
    options: EvaluateOptions, *, predictor: Predictor | None = None, listener: Listener | None = None
) -> Report:
    """Matte a dataset, each group with its own references, or read alphas from ``pred``; score
    them.

    Options that are None default to the conventions of the dataset. ``predictor`` is a loaded
    model, which replaces the options that select one. Problems with the data are listed in the
    report, and all other images are scored. The ``exit_code`` of the report is then 1, unless these
    problems are allowed.

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
    has_trimaps = data.dataset == "folder" and any(sample.trimap for sample in dataset_samples.samples)
    rule = _make_rule(dataset_samples, protocol, has_trimaps=has_trimaps)
    workers = DEFAULT_WORKERS if protocol.pred is None else environment.available_cores()
    evaluation = Evaluation(
        EvaluationDataset(data.dataset, str(data.data_root or data.images), data.split, dataset_samples),
        rule,
        EvaluationFiles(
            ReportFiles.from_options(options.reports.report, references=matting.write_references),
            references=protocol.references,
            groups=data.groups,
        ),
        RunSettings(
            listener,
            start,
            workers=options.resources.workers or workers,
            note=options.reports.note,
            allowed=frozenset(protocol.allow),
        ),
    )
    evaluation.check_no_overwrite()
    rounds = protocol.rounds or 1
    if protocol.pred is not None:
        from icm_cli.evaluation.predictions import score_predictions

        return score_predictions(evaluation, protocol.pred, rounds)
    from icm_cli.evaluation.in_context import InContextOptions, matte_and_score
    from icm_cli.matting.model_choice import LoadedModel, ModelChoice
    from icm_cli.matting.predictor import Predictor

    if predictor is None:
        choice: AnyModelChoice = ModelChoice.from_options(options.model, options.resources.batch_size)
    else:
        choice = LoadedModel(check_argument(predictor, Predictor, "predictor"))
    settings = InContextOptions(
        rounds, matting.refs_per_group or 1, matting.save_alphas, matting.shot, matting.learn_steps
    )
    return matte_and_score(evaluation, choice, settings)


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
    if options.matting.shot and not (dataset_samples.dataset.has_shots or data.video):
        raise UsageError("--shot requires frames of shots; give --dataset davis16, or --video if the groups are videos")
    if data.video:
        dataset_samples = replace(
            dataset_samples, samples=[_mark_video_frame(sample) for sample in dataset_samples.samples]
        )
    return dataset_samples


def _select_shot_frames(dataset_samples: DatasetSamples) -> DatasetSamples:
    """Exclude the last frame of every shot, and mark the others as video frames.

    Shots with fewer than MIN_SHOT_FRAMES frames become problems. Raises UsageError if there are no
    other shots.
    """
    shots = group_samples(dataset_samples.samples)
    problems = [
        Problem("lone-image", shot, f"shot {shot} has {len(frames)} frame(s), and the first and last are not scored")
        for shot, frames in shots.items()
        if len(frames) < MIN_SHOT_FRAMES
    ]
    if len(problems) == len(shots):
        raise UsageError(
            f"{dataset_samples.dataset.title} has no shot of three frames or more; the first and last frame "
            "of a shot are not scored, so give complete shots"
        )
    scored = [frames[:-1] for frames in shots.values() if len(frames) >= MIN_SHOT_FRAMES]
    samples = [_mark_video_frame(frame) for frames in scored for frame in frames]
    return replace(
        dataset_samples,
        samples=samples,
        notes=[*dataset_samples.notes, SHOT_NOTE],
        problems=[*dataset_samples.problems, *problems],
    )


def _make_rule(dataset_samples: DatasetSamples, options: ProtocolOptions, *, has_trimaps: bool) -> ScoringRule:
    """Return the scoring rule from the options, which default to the conventions of the dataset.

    Images of the dataset ``folder`` with trimaps are scored over both regions by default.
    """
    dataset = dataset_samples.dataset
    regions = options.region or (REGIONS if has_trimaps else dataset.conventions.regions)
    if options.trimap_kernel is not None and "unknown" not in regions:
        raise UsageError(
            "--trimap-kernel has no effect: the unknown region is not scored; remove it, or give --region unknown"
        )
    return ScoringRule(
        tuple(region for region in REGIONS if region in regions),
        options.size or dataset.conventions.size,
        options.metric_variant or dataset.conventions.metric_variant,
        options.trimap_kernel or ScoringRule.trimap_kernel_px,
        dataset.has_detail_maps,
        dataset.has_shots,
    )


def _mark_video_frame(sample: Sample) -> Sample:
    return replace(sample, categories={**sample.categories, "type": "video"})
