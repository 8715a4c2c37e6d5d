"""Validation during training: ``icm eval`` on the current model."""

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
from icm_cli.training.data.pool import explain_data_error
from icm_cli.training.learner import Learner
from icm_cli.training.settings import ValidationConfig


def check_validation(config: ValidationConfig, images: Sequence[Path], notice: Callable[[str], None]) -> None:
    """Check that images can be scored, and report those that are also trained on. Raises UsageError."""
    try:
        found = find_dataset(config.dataset, config.root, split=config.split, composite=False, **config.path_options)
    except UsageError as error:
        raise explain_data_error("validation", error) from error
    if not any(_can_be_scored(samples) for samples in group_samples(found.samples).values()):
        raise UsageError(
            "data: validation: no group has two images, one of which could be a reference (its alpha is not empty); "
            "expected a subfolder with several images for each object, or 'groups' that list the images of each object"
        )
    trained_on = {path.resolve() for path in images}
    shared = sum(sample.file.resolve() in trained_on for sample in found.samples)
    if shared:
        notice(
            f"{shared} of the {len(found.samples)} validation images are also trained on, so their scores are too good"
        )


def _can_be_scored(samples: Sequence[Sample]) -> bool:
    if len({sample.image for sample in samples}) < 2:
        return False
    for sample in samples:
        with contextlib.suppress(ImageError):
            if (read_alpha(sample.alpha) > HALF_U8).any():
                return True
    return False


def validate(
    config: ValidationConfig, checkpoint: Path, learner: Learner, *, is_stopped: Callable[[], bool]
) -> dict[str, float] | None:
    """Score a checkpoint as ``icm eval --checkpoint`` does; return the mean metrics ("mse", "sad", ...).

    The model in training is not used, because its dtypes and its noise may differ from those of ``icm eval``. The
    metrics are those of the first region. Returns None if no image was scored or validation was interrupted.
    """
    try:
        report = evaluate(
            config.dataset,
            config.root,
            **config.path_options,
            split=config.split,
            size=config.size,
            rounds=config.rounds,
            checkpoint=checkpoint,
            weights=learner.separate_weights,
            device=str(learner.device.torch_device),
            offline=learner.offline,
            listener=_InterruptingListener(is_stopped),
        )
    except _Stopped:
        return None
    means = next(iter(report.means.values()), None)
    return None if means is None else {name: mean.mean for name, mean in means.metrics.items() if name != "dt_ssd"}


class _Stopped(KeyboardInterrupt):
    """Interrupts validation after a signal. As with KeyboardInterrupt, writes in progress are completed."""


class _InterruptingListener(Listener):
    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self._is_stopped = is_stopped
        self._has_raised = False

    def on_image_end(self, result: ImageResult) -> None:  # noqa: ARG002
        if self._is_stopped() and not self._has_raised:
            self._has_raised = True
            raise _Stopped
