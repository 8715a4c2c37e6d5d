"""``icm_cli.evaluate``: matte a dataset in context, or take alphas that any tool made, and score them.

The body of the ``icm eval`` command.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from icm_cli import environment
from icm_cli.datasets.groups import Sample
from icm_cli.datasets.registry import DatasetSamples, find_dataset
from icm_cli.environment import DEFAULT_WORKERS
from icm_cli.errors import UsageError
from icm_cli.evaluation.protocol import Evaluation, EvaluationDataset, EvaluationFiles, RunSettings
from icm_cli.evaluation.shots import as_shots, refuse_other_references
from icm_cli.events import Listener
from icm_cli.options import EvaluateOptions, ProtocolOptions, keyword_arguments
from icm_cli.reports.report import Report
from icm_cli.reports.result import REGIONS
from icm_cli.reports.write import ReportFiles
from icm_cli.scoring.rule import ScoringRule

if TYPE_CHECKING:
    from icm_cli.matting.model_choice import AnyModel
    from icm_cli.matting.predictor import Predictor


@keyword_arguments(EvaluateOptions)
def evaluate(
    options: EvaluateOptions, *, predictor: Predictor | None = None, listener: Listener | None = None
) -> Report:
    """Score alphas of a dataset: matted here, each group by its own references, or read from ``pred``.

    Where an option is None, the convention of the dataset applies. ``predictor`` is a loaded model, which replaces
    the options that select one. Bad data are named in ``problems`` and the rest is scored. The report's ``exit_code``
    is then 1, unless these data are allowed.

    Raises UsageError, ConfigError or OutputError.
    """
    listener = listener or Listener()
    start = time.perf_counter()
    data, protocol, matting = options.dataset, options.protocol, options.matting
    if data.dataset is None:
        raise UsageError("--dataset is missing; expected a name, or folder for your own images (or --compare A B)")
    if protocol.pred is not None:
        options.refuse(options.matting_names(), "--pred scores existing alphas")
        if predictor is not None:
            raise UsageError("pred scores existing alphas, so predictor has no effect; remove it")
    if protocol.references and (protocol.rounds or matting.refs_per_group):
        raise UsageError("--references fixes rounds and references; remove --rounds and --refs-per-group")
    found = _find_dataset(options)
    has_trimaps = data.dataset == "folder" and any(sample.trimap for sample in found.samples)
    rule = _rule(found, protocol, has_trimaps=has_trimaps)
    workers = DEFAULT_WORKERS if protocol.pred is None else environment.cores()
    evaluation = Evaluation(
        EvaluationDataset(data.dataset, str(data.data_root or data.images), data.split, found),
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

    if predictor is None:
        choice: AnyModel = ModelChoice.from_options(options.model, options.resources.batch_size)
    else:
        choice = LoadedModel(predictor)
    settings = InContextOptions(
        rounds, matting.refs_per_group or 1, matting.save_alphas, matting.shot, matting.learn_steps
    )
    return matte_and_score(evaluation, choice, settings)


def _find_dataset(options: EvaluateOptions) -> DatasetSamples:
    """Find the images of the dataset, with frames of shots marked as such. Raises UsageError."""
    data = options.dataset
    assert data.dataset is not None
    found = find_dataset(
        data.dataset,
        data.data_root,
        split=data.split,
        images=data.images,
        alphas=data.alphas,
        trimaps=data.trimaps,
        groups=data.groups,
        backgrounds=data.backgrounds,
    )
    if found.dataset.is_shots:
        others: dict[str, object] = {"rounds": options.protocol.rounds, "groups": data.groups, "video": data.video}
        others["refs_per_group"] = options.matting.refs_per_group
        refuse_other_references(found.dataset.title, **others)
        found = as_shots(found)
    if options.matting.shot and not (found.dataset.is_shots or data.video):
        raise UsageError("--shot is for frames of shots: davis16, or groups that are videos (--video); leave it out")
    if data.video:
        found = replace(found, samples=[_as_frame(sample) for sample in found.samples])
    return found


def _rule(found: DatasetSamples, options: ProtocolOptions, *, has_trimaps: bool) -> ScoringRule:
    """Return the scoring rule: the options, else the convention of the dataset.

    Images of dataset folder that have trimaps are scored over both regions.
    """
    dataset = found.dataset
    regions = options.region or (REGIONS if has_trimaps else dataset.conventions.regions)
    if options.trimap_kernel is not None and "unknown" not in regions:
        raise UsageError(
            "--trimap-kernel makes the unknown region, which is not scored here; leave it out, or give --region unknown"
        )
    return ScoringRule(
        tuple(each for each in REGIONS if each in regions),
        options.size or dataset.conventions.size,
        options.lineage or dataset.conventions.lineage,
        options.trimap_kernel or ScoringRule.trimap_kernel_px,
        dataset.has_detail_maps,
        dataset.is_shots,
    )


def _as_frame(sample: Sample) -> Sample:
    return replace(sample, categories={**sample.categories, "type": "video"})
