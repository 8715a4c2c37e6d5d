"""Listeners of runs: the commands print what they hear, other callers may do with it what they like."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from icm_cli.problems import Problem
    from icm_cli.reports.report import Report
    from icm_cli.reports.result import ImageResult


class Listener:
    """Listener of a run; the command's prints what it hears. Every method may be left as it is."""

    def notice(self, text: str) -> None:
        """Something the user should know; may come from another thread."""

    def detail(self, text: str) -> None:
        """Something only a curious user wants to know."""

    def problem(self, problem: Problem) -> None:
        """Something is wrong with the data; the run goes on without it."""

    def started(self, total: int) -> None:
        """``total`` images follow."""

    def finished_image(self, result: ImageResult) -> None:
        """An image ended, well or not."""

    def finished(self, report: Report) -> None:
        """The run ended, by an interrupt too."""


@dataclass(frozen=True)
class TrainingSummary:
    """Summary of a training run."""

    folder: Path
    steps: int = 0
    """Steps that the model has taken, those before a resume included."""
    loss: float | None = None
    """Mean over the last logged steps."""
    best_step: int | None = None
    best_mse: float | None = None
    """On the validation set; None where there is none, or it was not reached."""
    seconds: float = 0.0
    """Seconds of this run's steps."""
    samples_per_second: float = 0.0
    waiting_share: float = 0.0
    """Share of the steps' time that was spent waiting for samples, 0..1."""
    skipped: int = 0
    """Unreadable draws."""
    peak_memory_bytes: int = 0
    checkpoint: Path | None = None
    """The best model, or the last where nothing was validated; None where nothing was trained."""
    pack: Path | None = None
    """The same with its backbone in one small file, where that was wanted."""
    preview: Path | None = None
    """The contact sheet, where only that was wanted."""


class TrainingListener(Listener):
    """Listener of training; the command's prints what it hears. Every method may be left as it is."""

    def training_started(self, first_step: int, steps: int | None, samples: int) -> None:
        """Steps ``first_step`` + 1 to ``steps`` follow, of so many samples each; None: until the time is over."""

    def stepped(self, step: int) -> None:
        """A step is done."""

    def logged(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures since the last such call: loss, its terms, rate, gradient_norm, samples_per_second, waiting_share."""

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Around all steps."""
        try:
            yield
        finally:
            self.training_ended()

    def training_ended(self) -> None:
        """No more steps follow, however it ended."""

    def training_finished(self, summary: TrainingSummary) -> None:
        """The run ended well, or after a signal."""

    def validated(self, step: int, figures: Mapping[str, float], *, is_best: bool) -> None:
        """The metrics of ``icm eval`` after a step, named validation_mse and so on."""


class BesideMain(TrainingListener):
    """Listener of a process beside the main one: it passes on notices alone."""

    def __init__(self, listener: TrainingListener) -> None:
        self._listener = listener

    def notice(self, text: str) -> None:
        self._listener.notice(text)
