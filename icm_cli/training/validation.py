"""Validation while a model learns: the code of ``icm eval``, on the model as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from icm_cli.datasets.groups import Sample, group_samples
from icm_cli.datasets.registry import find_dataset
from icm_cli.errors import ImageError, UsageError
from icm_cli.evaluation.evaluate import evaluate
from icm_cli.events import Listener
from icm_cli.geometry import HALF_U8
from icm_cli.images.reading import read_alpha
from icm_cli.reports.result import ImageResult
from icm_cli.training.learner import Learner
from icm_cli.training.settings import ValidationConfig


def check_validation(config: ValidationConfig, images: Sequence[Path], notice: Callable[[str], None]) -> None:
    """Raises UsageError where there is nothing to validate on; tells what is trained on too."""
    try:
        found = find_dataset(config.dataset, config.root, split=config.split, composite=False, **config.patterns)
    except UsageError as error:
        raise UsageError(f"data: validation: {error}") from error
    if not any(_can_be_scored(samples) for samples in group_samples(found.samples).values()):
        raise UsageError(
            "data: validation: no group has two images of which one could be a reference (its alpha not empty); "
            "expected subfolders with several images of the same thing each, or 'groups' that say which belong together"
        )
    trained_on = {path.resolve() for path in images}
    shared = sum(sample.file.resolve() in trained_on for sample in found.samples)
    if shared:
        notice(f"{shared} of the {len(found.samples)} validation images are trained on too, so the scores flatter")


def _can_be_scored(samples: Sequence[Sample]) -> bool:
    if len({sample.image for sample in samples}) < 2:
        return False
    for sample in samples:
        with contextlib.suppress(ImageError):
            if (read_alpha(sample.alpha) > HALF_U8).any():
                return True
    return False


def validate(config: ValidationConfig, learner: Learner, *, is_stopped: Callable[[], bool]) -> dict[str, float] | None:
    """Score the mean of the weights; returns the means over the first region, None where there are none or it was cut.

    Keys are "mse", "sad" and so on.
    """
    try:
        with learner.inference_mode() as predictor:
            report = evaluate(
                config.dataset,
                config.root,
                **config.patterns,
                split=config.split,
                size=config.size,
                rounds=config.rounds,
                predictor=predictor,
                listener=_Stoppable(is_stopped),
            )
    except _Stopped:
        return None
    means = next(iter(report.means.values()), None)
    return None if means is None else {name: mean.mean for name, mean in means.metrics.items() if name != "dt_ssd"}


class _Stopped(KeyboardInterrupt):
    """Validation was cut short by a signal; like one, it lets the writes in hand finish."""


class _Stoppable(Listener):
    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self._is_stopped = is_stopped
        self._has_raised = False

    def on_image_end(self, result: ImageResult) -> None:  # noqa: ARG002
        if self._is_stopped() and not self._has_raised:
            self._has_raised = True
            raise _Stopped
