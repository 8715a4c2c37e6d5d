"""The outcome of a run: results are gathered, scored and reported, whatever happens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from icm_cli import environment
from icm_cli.errors import OutputError, Problem
from icm_cli.events import Listener
from icm_cli.reports.report import Report, RunTotals
from icm_cli.reports.result import ImageResult
from icm_cli.reports.write import ReportFiles

if TYPE_CHECKING:
    from icm_cli.scoring.pool import Scorer
    from icm_cli.scoring.task import FlickerTask, ScoreTask


class Outcome:
    """Gathers results, has them scored beside the model, and however the run ends sees the reports written."""

    def __init__(
        self,
        report: Report,
        planned: Sequence[ImageResult],
        listener: Listener,
        *,
        start: float,
        scoring: Scorer | None = None,
        trained_on: frozenset[str] | None = None,
    ) -> None:
        self.report = report
        self._planned = planned
        self._listener = listener
        self._start = start
        self._scoring = scoring
        self._trained_on = trained_on
        self._ended: set[tuple[int, str]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._scoring:
            self._scoring.pool.close()

    def add(self, result: ImageResult) -> None:
        """Take a result of the engine; it ends here once it is scored."""
        if result.status == "done":
            result = replace(result, matting=replace(result.matting, made_by=environment.__version__))
        if result.status == "failed" and result.output and Path(result.output).is_file():
            earlier = f"its earlier alpha {result.output} is of the former picture or settings and stays"
            result = replace(result, reason=f"{result.reason}; {earlier}")
        task = self._scoring.task_for(result) if self._scoring and result.status in ("done", "kept") else None
        if task is None:
            self._end(result)
        else:
            self._submit(task, partial(self._scored, result))

    def scored(self) -> list[ImageResult]:
        """The results that have scores; waits for those in hand."""
        self._drain()
        return [result for result in self.report.results if result.evaluation.scores]

    def add_flicker(self, tasks: Sequence[tuple[tuple[int, str], FlickerTask]]) -> None:
        """Measure the flicker of results, given by their keys."""
        at = {result.key: number for number, result in enumerate(self.report.results)}
        for key, task in tasks:
            self._submit(task, partial(self._flickered, at[key]))

    def add_problem(self, problem: Problem) -> None:
        self.report.problems.append(problem)
        self._listener.on_problem(problem)

    @contextlib.contextmanager
    def reported(self, report_files: ReportFiles, peak_memory: Callable[[], int]) -> Iterator[None]:
        """Around the work: whatever happens in it, what is done is scored and reported."""
        begun = time.perf_counter()
        try:
            yield
        except BaseException:
            with contextlib.suppress(OutputError):
                self._finish(report_files, begun, peak_memory)
            raise
        self._finish(report_files, begun, peak_memory)

    def _scored(self, result: ImageResult, answer: Any) -> None:
        if answer is None:
            reason = (
                f"the process that scored {result.output} died, perhaps of too little memory; run the command again"
            )
            self._end(replace(result, status="failed", reason=reason))
            return
        for problem in answer.problems:
            self.add_problem(problem)
        is_seen = None if self._trained_on is None else answer.image_sha256 in self._trained_on
        foreground = answer.foreground if result.matting.foreground is None else result.matting.foreground
        self._end(
            replace(
                result,
                status=result.status if answer.evaluation.scores else "unscored",
                matting=replace(result.matting, foreground=foreground),
                evaluation=replace(answer.evaluation, is_seen=is_seen),
                reason="; ".join(problem.reason for problem in answer.problems),
            )
        )

    def _flickered(self, number: int, answer: Any) -> None:
        if isinstance(answer, float):
            result = self.report.results[number]
            self.report.results[number] = replace(result, evaluation=replace(result.evaluation, dt_ssd=answer))

    def _end(self, result: ImageResult) -> None:
        if result.key in self._ended:
            return
        self._ended.add(result.key)
        self.report.results.append(result)
        self._listener.on_image_end(result)

    def _submit(self, task: ScoreTask | FlickerTask, then: Callable[[Any], None]) -> None:
        assert self._scoring
        self._scoring.pool.submit(task, then)

    def _drain(self) -> None:
        if self._scoring:
            self._scoring.pool.drain()

    def _finish(self, report_files: ReportFiles, begun: float, peak_memory: Callable[[], int]) -> None:
        self._drain()
        report = self.report
        report.results += [
            replace(result, status="not reached") for result in self._planned if result.key not in self._ended
        ]
        order = {result.key: number for number, result in enumerate(self._planned)}
        report.results.sort(key=lambda result: order[result.key])
        now = time.perf_counter()
        report.totals = RunTotals(now - self._start, now - begun, peak_memory())
        try:
            for path in report_files.write_all(report):
                self._listener.on_notice(f"{path} is left as it was: this run was cut short")
        finally:
            self._listener.on_run_end(report)


def environment_settings() -> dict[str, Any]:
    """Versions and hardware, as every report states them."""
    return {"icm": environment.__version__, "versions": environment.versions(), "hardware": environment.hardware()}
