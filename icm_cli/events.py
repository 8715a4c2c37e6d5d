"""Callbacks that report the progress of a run.

The commands pass listeners that print to the terminal. Callers of the Python API may pass their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from icm_cli.errors import UsageError

if TYPE_CHECKING:
    from icm_cli.errors import Problem
    from icm_cli.reports.report import Report
    from icm_cli.reports.result import ImageResult


class Listener:
    """Base class of callbacks for a run. Every method does nothing by default; override those you need."""

    def on_notice(self, text: str) -> None:
        """Handle a message for the user. May be called from any thread."""

    def on_detail(self, text: str) -> None:
        """Handle a message that is only of interest with ``--verbose``."""

    def on_problem(self, problem: Problem) -> None:
        """Handle a problem with the input data. The run continues without the affected data."""

    def on_run_start(self, total: int) -> None:
        """Called before the first of ``total`` images."""

    def on_image_end(self, result: ImageResult) -> None:
        """Called when an image is finished, whether it succeeded or failed."""

    def on_run_end(self, report: Report) -> None:
        """Called at the end of the run, also after an interrupt."""


Expected = TypeVar("Expected")


def check_argument(value: object, expected: type[Expected], name: str) -> Expected:
    """Return the argument ``name`` of a function of the API; None means a new instance.

    Raises UsageError if it is of another class than ``expected``.
    """
    if value is None:
        return expected()
    if not isinstance(value, expected):
        raise UsageError(
            f"{name}= is {value!r}; expected an instance of {expected.__module__}.{expected.__qualname__} or of a "
            "subclass"
        )
    return value


@dataclass(frozen=True)
class BestStep:
    """The step whose model has the lowest MSE on the validation set."""

    step: int
    mse: float


@dataclass(frozen=True)
class TrainingStatistics:
    """Speed, memory and skipped samples of a training run."""

    seconds: float = 0.0
    """Total duration of the steps of this run."""
    samples_per_second: float = 0.0
    waiting_fraction: float = 0.0
    """Fraction of ``seconds`` that was spent waiting for samples, 0..1."""
    skipped: int = 0
    """Number of samples that were skipped because a file could not be read."""
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class TrainingSummary:
    """Result of a training run."""

    folder: Path
    steps: int = 0
    """Number of steps in total, including those before a resume."""
    loss: float | None = None
    """Mean loss over the last logged steps."""
    best: BestStep | None = None
    """None without a validation set, or if no validation was reached."""
    statistics: TrainingStatistics = TrainingStatistics()
    checkpoint: Path | None = None
    """The best model, or the last one without validation. None if nothing was trained."""
    pack: Path | None = None
    """The model and its backbone in a single file, if requested."""
    preview: Path | None = None
    """The contact sheet of samples, if only that was requested."""


class TrainingListener(Listener):
    """Base class of callbacks for a training run. Every method does nothing by default."""

    def on_encoding_start(self, total: int, stored: int) -> None:
        """Called before the backbone encodes images for a training stage that stores their tokens.

        ``stored`` of the ``total`` images were encoded by an earlier run.
        """

    def on_encoding_progress(self, encoded: int) -> None:
        """Called when ``encoded`` images are encoded, including those of an earlier run."""

    def on_encoding_end(self) -> None:
        """Called after the last image, also after an error."""

    @contextlib.contextmanager
    def encoding_images(self, total: int, stored: int) -> Iterator[None]:
        """Context of the encoding. It calls :meth:`on_encoding_end` however it ends."""
        self.on_encoding_start(total, stored)
        try:
            yield
        finally:
            self.on_encoding_end()

    def on_training_start(self, first_step: int, steps: int | None, samples: int) -> None:
        """Called before step ``first_step`` + 1.

        ``steps`` is the number of the last step, or None for a run that is limited by time. Each step uses ``samples``
        samples.
        """

    def on_step_end(self, step: int) -> None:
        """Called after each step."""

    def on_log(self, step: int, figures: Mapping[str, float]) -> None:
        """Handle the mean figures since the previous call.

        They are the loss, its terms, learning_rate, gradient_norm, samples_per_second and waiting_fraction.
        """

    def on_validation_end(self, step: int, figures: Mapping[str, float], *, is_best: bool) -> None:
        """Handle the metrics of ``icm eval`` after a step. Their names begin with ``validation_``."""

    def on_steps_end(self) -> None:
        """Called after the last step, also after an error."""

    def on_training_end(self, summary: TrainingSummary) -> None:
        """Called when the run succeeded or was stopped by a signal."""

    @contextlib.contextmanager
    def training_steps(self) -> Iterator[None]:
        """Context of all steps. It calls :meth:`on_steps_end` however they end."""
        try:
            yield
        finally:
            self.on_steps_end()


class ReviewListener(Listener):
    """Base class of callbacks for a review."""

    def on_link(self, link: str) -> None:
        """Called with the link to the page when the server accepts connections."""


class SecondaryProcessListener(TrainingListener):
    """Listener for the secondary processes of a distributed run. It forwards notices only."""

    def __init__(self, listener: TrainingListener) -> None:
        self._listener = listener

    def on_notice(self, text: str) -> None:
        self._listener.on_notice(text)
