"""``icm_cli.evaluate``: matte a dataset in context, or take alphas that any tool made, and score them.

The body of the ``icm eval`` command.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from icm_cli import environment
from icm_cli.datasets.groups import Sample
from icm_cli.datasets.registry import SIZES, SPLITS, DatasetSamples, find_dataset
from icm_cli.environment import DEFAULT_WORKERS
from icm_cli.errors import PROBLEM_KINDS, UsageError, did_you_mean
from icm_cli.evaluation.protocol import Evaluation, EvaluationDataset, EvaluationFiles, RunSettings
from icm_cli.evaluation.shots import as_shots, refuse_other_references
from icm_cli.events import Listener
from icm_cli.files import Paths, as_path
from icm_cli.reports.report import Report
from icm_cli.reports.result import LINEAGES, REGIONS
from icm_cli.reports.write import ReportFiles
from icm_cli.scoring.rule import ScoringRule

if TYPE_CHECKING:
    from icm_cli.matting.predictor import Predictor

Choice = TypeVar("Choice", bound=str)


def evaluate(
    dataset: str,
    data_root: str | Path | None = None,
    *,
    images: str | None = None,
    alphas: str | None = None,
    trimaps: str | None = None,
    groups: str | Path | None = None,
    backgrounds: str | Path | None = None,
    split: str = "test",
    video: bool = False,
    pred: str | Path | None = None,
    references: str | Path | None = None,
    write_references: str | Path | None = None,
    rounds: int | None = None,
    refs_per_group: int | None = None,
    region: str | Sequence[str] = (),
    size: str | None = None,
    lineage: str | None = None,
    trimap_kernel: int | None = None,
    model: str | None = None,
    checkpoint: str | Path | None = None,
    weights: str | None = None,
    edges: str = "model",
    edges_weights: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | str = "auto",
    seed: int = 0,
    workers: int | None = None,
    save_alphas: str | Path | None = None,
    shot: bool = False,
    learn_steps: int | None = None,
    note: str | None = None,
    report: Paths = (),
    allow: str | Sequence[str] = (),
    offline: bool = False,
    predictor: Predictor | None = None,
    listener: Listener | None = None,
) -> Report:
    """Score alphas of a dataset: matted here, every group by its own references, or taken from ``pred``.

    The arguments are the options of ``icm eval`` (see its help); None means the dataset's own convention. ``predictor``
    is a model that is loaded already, in the place of the options that name one. Bad data is
    named in ``problems`` and the rest is scored; the report's ``exit_code`` is 1 then, unless it was allowed.

    Raises UsageError, ConfigError or OutputError.
    """
    listener = listener or Listener()
    start = time.perf_counter()
    _check_numbers(workers=workers, rounds=rounds, refs_per_group=refs_per_group, trimap_kernel=trimap_kernel)
    region, allow = _names(region), _names(allow)
    for kind in allow:
        _one_of("allow", kind, tuple(PROBLEM_KINDS))
    if references and (rounds or refs_per_group):
        raise UsageError("--references says how many rounds and references there are; leave --rounds and the like out")
    found = find_dataset(
        dataset,
        data_root,
        split=_one_of("split", split, SPLITS),
        images=images,
        alphas=alphas,
        trimaps=trimaps,
        groups=groups,
        backgrounds=backgrounds,
    )
    if found.dataset.is_shots:
        others = {"rounds": rounds, "refs_per_group": refs_per_group, "groups": groups, "video": video}
        refuse_other_references(found.dataset.title, **others)
        found = as_shots(found)
    if shot and not (found.dataset.is_shots or video):
        raise UsageError("--shot is for frames of shots: davis16, or groups that are videos (--video); leave it out")
    if video:
        found = replace(found, samples=[_as_frame(sample) for sample in found.samples])
    has_trimaps = dataset == "folder" and any(sample.trimap for sample in found.samples)
    rule = _rule(found, region, size, lineage, trimap_kernel, has_trimaps)
    if trimap_kernel is not None and "unknown" not in rule.regions:
        raise UsageError(
            "--trimap-kernel makes the unknown region, which is not scored here; leave it out, or give --region unknown"
        )
    report_files = ReportFiles.from_options(report, references=write_references)
    evaluation = Evaluation(
        EvaluationDataset(dataset, str(data_root or images), split, found),
        rule,
        EvaluationFiles(report_files, references=as_path(references), groups=as_path(groups)),
        RunSettings(
            listener,
            start,
            workers=workers or (DEFAULT_WORKERS if pred is None else environment.cores()),
            note=note,
            allowed=frozenset(allow),
        ),
    )
    evaluation.check_no_overwrite()
    of_the_model: dict[str, Any] = {
        **{"model": model, "checkpoint": as_path(checkpoint), "weights": weights, "device": device, "dtype": dtype},
        **{"edges": edges, "edges_weights": edges_weights},
        **{"batch_size": batch_size, "seed": seed, "offline": offline},
    }
    if pred is not None:
        others = {"refs_per_group": refs_per_group, "save_alphas": save_alphas, "shot": shot}
        others |= {"learn_steps": learn_steps, "write_references": write_references}
        _refuse_with_pred({**of_the_model, **others, "predictor": predictor})
        from icm_cli.evaluation.predictions import score_predictions

        return score_predictions(evaluation, Path(pred), rounds or 1)
    from icm_cli.evaluation.in_context import InContextOptions, matte_and_score
    from icm_cli.matting.model_choice import LoadedModel, ModelChoice

    choice = ModelChoice.checked(**of_the_model) if predictor is None else LoadedModel(predictor)
    matting = InContextOptions(rounds or 1, refs_per_group or 1, as_path(save_alphas), shot, learn_steps)
    return matte_and_score(evaluation, choice, matting)


def _rule(
    found: DatasetSamples,
    region: Sequence[str],
    size: str | None,
    lineage: str | None,
    trimap_kernel: int | None,
    has_trimaps: bool,
) -> ScoringRule:
    """Take the options, else the dataset's own convention; one's own folders with trimaps have both regions."""
    dataset = found.dataset
    own = REGIONS if has_trimaps else dataset.conventions.regions
    regions = tuple(_one_of("region", each, REGIONS) for each in region) or own
    return ScoringRule(
        tuple(each for each in REGIONS if each in regions),
        _one_of("size", size or dataset.conventions.size, SIZES),
        _one_of("lineage", lineage or dataset.conventions.lineage, LINEAGES),
        ScoringRule.trimap_kernel_px if trimap_kernel is None else trimap_kernel,
        dataset.has_detail_maps,
        dataset.is_shots,
    )


def _check_numbers(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and not (isinstance(number, int) and number >= 1):
            raise UsageError(f"--{name.replace('_', '-')} is {number!r}; expected a whole number of 1 or more")


def _one_of(option: str, value: str, known: Sequence[Choice]) -> Choice:
    if value not in known:
        raise UsageError(f"--{option} {value!r} is not known. {did_you_mean(value, known)}")
    return cast(Choice, value)


def _names(value: str | Sequence[str]) -> list[str]:
    """One or several names -> a list."""
    return [value] if isinstance(value, str) else list(value)


def _refuse_with_pred(options: Mapping[str, Any]) -> None:
    """Raises UsageError for an option of the model that was given, as no model is loaded."""
    defaults = inspect.signature(evaluate).parameters
    for name, value in options.items():
        if value != defaults[name].default:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"--pred scores alphas that are there already, so {option} has no effect; leave it out")


def _as_frame(sample: Sample) -> Sample:
    return replace(sample, categories={**sample.categories, "type": "video"})
