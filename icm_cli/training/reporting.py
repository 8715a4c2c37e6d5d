"""What happens beside the steps, when it is due: log lines, pictures, validation, saving; and the closing summary."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Self

from icm_cli.training.guards import check_skipped
from icm_cli.training.items import Pool
from icm_cli.training.keeper import Keeper
from icm_cli.training.learner import Learner
from icm_cli.training.listening import Summary, TrainingListener
from icm_cli.training.meter import Meter
from icm_cli.training.panels import panel
from icm_cli.training.samples import Batch
from icm_cli.training.settings import Settings
from icm_cli.training.state import BEST_NAME, LAST_NAME
from icm_cli.training.stopping import StopSignals
from icm_cli.training.tracking import Tracker
from icm_cli.training.validation import check_validation, validate

MOST_SKIPS_NAMED = 20
"""Unreadable draws named one by one."""


class Reporter:
    """Only the main process of several writes and speaks; the others keep step with it."""

    def __init__(
        self,
        learner: Learner,
        keeper: Keeper,
        settings: Settings,
        pool: Pool,
        hear: TrainingListener,
        *,
        resume: bool,
    ) -> None:
        """Take up the saved run where ``resume`` is wanted and there is one. Raises UsageError or ConfigError."""
        self._learner = learner
        self._keeper = keeper
        self._recipe = settings.train
        self._validation = settings.data.validation
        self._hear = hear if learner.is_main else TrainingListener()
        self._loss: float | None = None
        if learner.is_main:
            self._prepare(pool)
        self.first_step, self._skipped = keeper.resume(learner) if resume else (0, 0)
        """Steps that are done already."""
        if resume and not self.first_step:
            self._hear.notice(f"{keeper.folder} holds no run yet; this one begins there")
        self._step = self.first_step
        self._tracker = Tracker(keeper.folder, self.first_step, self._hear.notice, is_main=learner.is_main)
        self._hear.training_started(self.first_step, self._recipe.steps, self._recipe.batch_size)

    def _prepare(self, pool: Pool) -> None:
        """Say what is wrong with the data, and what the main process alone must know."""
        for problem in pool.problems:
            self._hear.problem(problem)
        if self._validation is not None:
            check_validation(self._validation, pool.images, self._hear.notice)
        self._hear.detail(f"hashing {len(pool.images)} training images")
        self._keeper.hash_images(self._hear.notice)

    def __enter__(self) -> Self:
        self._tracker.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._tracker.__exit__(*error)
        self._hear.training_ended()

    def skipped(self, batch: Batch) -> None:
        """Count and name unreadable draws. Raises TrainingError where there are too many."""
        for reason in batch.skipped:
            self._skipped += 1
            if self._skipped <= MOST_SKIPS_NAMED:
                self._hear.notice(f"skipped: {reason}")
        if batch.skipped:
            drawn = (max(batch.counters) + 1) // self._learner.accelerator.num_processes + self._skipped
            check_skipped(self._skipped, drawn, batch.skipped[-1])

    def after(self, step: int, batch: Batch, meter: Meter, rate: float, stop: StopSignals, *, is_last: bool) -> None:
        """All that is due after a step. Raises OutputError where the run cannot be saved."""
        self._step = step
        self._hear.stepped(step)
        recipe = self._recipe
        if step % recipe.log_every == 0 or is_last:
            self._log(step, meter, rate)
        with _paused(meter):
            if step % recipe.image_every == 0 and self._learner.is_main:
                with self._learner.resting():
                    picture = panel(self._learner.model, batch, fixed_noise=self._learner.cache is not None)
                self._tracker.picture(step, picture)
            is_due = step % recipe.validate_every == 0 or step == recipe.steps
            if not self._learner.is_main:
                return
            if step % recipe.save_every == 0 or is_due or is_last:
                self._keeper.save(self._learner, step, self._skipped)
            if self._validation is not None and is_due and stop.received is None:
                self._validate(step, stop)

    def summary(self, meter: Meter) -> Summary:
        """Tell and return how the run ended."""
        learner, best = self._learner, self._keeper.best
        name = BEST_NAME if best else LAST_NAME
        path = self._keeper.folder / name
        summary = Summary(
            folder=self._keeper.folder,
            steps=self._step,
            loss=self._loss,
            best_step=int(best["step"]) if best else None,
            best_mse=best["mse"] if best else None,
            seconds=meter.total_seconds,
            samples_per_second=meter.total_samples * learner.accelerator.num_processes / max(1e-9, meter.total_seconds),
            waiting_share=meter.total_waiting / max(1e-9, meter.total_seconds),
            skipped=self._skipped,
            peak_memory_bytes=learner.device.peak_memory_bytes(),
            checkpoint=path if path.exists() else None,
        )
        self._hear.training_finished(summary)
        return summary

    def _log(self, step: int, meter: Meter, rate: float) -> None:
        figures = self._learner.mean(meter.figures(rate))
        figures["samples_per_second"] *= self._learner.accelerator.num_processes
        self._loss = figures["loss"]
        self._tracker.row(step, figures)
        self._hear.logged(step, figures)

    def _validate(self, step: int, stop: StopSignals) -> None:
        assert self._validation is not None
        scores = validate(self._validation, self._learner, is_stopped=lambda: stop.received is not None)
        if scores is None:
            self._hear.notice(f"step {step}: validation was cut short or scored nothing")
            return
        figures = {f"validation_{name}": value for name, value in scores.items()}
        self._tracker.row(step, figures)
        is_best = self._keeper.save_best(self._learner, step, scores["mse"])
        self._keeper.save(self._learner, step, self._skipped)
        self._hear.validated(step, figures, is_best=is_best)


@contextlib.contextmanager
def _paused(meter: Meter) -> Iterator[None]:
    """Time that is no step's."""
    before = time.perf_counter()
    try:
        yield
    finally:
        meter.pause(time.perf_counter() - before)
