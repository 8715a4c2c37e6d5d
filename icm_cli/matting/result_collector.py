"""Collect and score the results of a run, and write its reports even if the run fails."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from icm_cli import environment
from icm_cli.errors import OutputError, Problem
from icm_cli.events import Listener
from icm_cli.files.paths import is_file
from icm_cli.reports.report import Report
from icm_cli.reports.result import ImageResult
from icm_cli.reports.write import ReportFiles

if TYPE_CHECKING:
    from icm_cli.scoring.pool import Scorer
    from icm_cli.scoring.task import FlickerTask, ScoreTask


class ResultCollector:
    """Collects the results of a run, scores them in other processes, and writes the reports at the end.

    Args:
        report: The report that the results are added to.
        planned: The results of all jobs before the run, in the order of the report.
        start: time.perf_counter() when the run began.
        scorer: Scores alphas that have a ground truth; None to score none.
        trained_on: SHA-256 digests of the images that the model was trained on; None if they are not known.
        add_reasons: Adds the reasons of :mod:`icm_cli.quality.batch` to all results at the end of the run.
    """

    def __init__(
        self,
        report: Report,
        planned: Sequence[ImageResult],
        listener: Listener,
        *,
        start: float,
        scorer: Scorer | None = None,
        trained_on: frozenset[str] | None = None,
        add_reasons: Callable[[Sequence[ImageResult]], list[ImageResult]] = list,
    ) -> None:
        self.report = report
        self._planned = planned
        self._listener = listener
        self._start = start
        self._scorer = scorer
        self._trained_on = trained_on
        self._add_reasons = add_reasons
        self._reported: set[tuple[int, str]] = set()  # keys of results

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._scorer:
            self._scorer.pool.close()

    def add(self, result: ImageResult) -> None:
        """Add details to a result of the engine, and report it; if it is scored, as soon as it has its scores."""
        is_made_by_icm = "predictions" not in self.report.settings  # with --pred, alphas of other tools are scored
        if result.status == "done" and is_made_by_icm:
            result = replace(result, matting=replace(result.matting, made_by=environment.__version__))
        reason_names_output = result.output in result.reason  # then the reason says what happens to the file
        if result.status == "failed" and result.output and not reason_names_output and is_file(result.output):
            earlier = f"the earlier alpha {result.output} is kept, although its source or settings have changed"
            result = replace(result, reason=f"{result.reason}; {earlier}")
        task = self._scorer.task_for(result) if self._scorer and result.status in ("done", "kept") else None
        if task is None:
            self._report_result(result)
        else:
            self._submit_task(task, partial(self._add_scores, result))

    def wait_for_scores(self) -> list[ImageResult]:
        """Wait until all results are scored, and return those that have scores."""
        self._wait_for_scorer()
        return [result for result in self.report.results if result.evaluation.scores]

    def add_flicker(self, tasks: Sequence[tuple[tuple[int, str], FlickerTask]]) -> None:
        """Measure the flicker of results. ``tasks``: pairs of the key of a result and its task."""
        positions = {result.key: position for position, result in enumerate(self.report.results)}
        for key, task in tasks:
            self._submit_task(task, partial(self._add_flicker_score, positions[key]))

    def add_problem(self, problem: Problem) -> None:
        """Add a problem of the data, and report it."""
        self.report.problems.append(problem)
        self._listener.on_problem(problem)

    @contextlib.contextmanager
    def writing_reports(self, report_files: ReportFiles, peak_memory: Callable[[], int]) -> Iterator[None]:
        """Context for matting. At its end, even after an exception, the results are scored and reported."""
        matting_start = time.perf_counter()
        try:
            yield
        except BaseException:
            with contextlib.suppress(OutputError):
                self._write_reports(report_files, matting_start, peak_memory)
            raise
        self._write_reports(report_files, matting_start, peak_memory)

    def _add_scores(self, result: ImageResult, scored: Any) -> None:
        """Report a result with its scores. ``scored``: what the task returned; None if its process died."""
        if scored is None:
            reason = (
                f"the process that scored {result.output} died, perhaps because memory ran out; run the command again"
            )
            self._report_result(replace(result, status="failed", reason=reason))
            return
        for problem in scored.problems:
            self.add_problem(problem)
        is_seen = None if self._trained_on is None else scored.image_sha256 in self._trained_on
        foreground = scored.mean_alpha if result.matting.foreground is None else result.matting.foreground
        self._report_result(
            replace(
                result,
                status=result.status if scored.evaluation.scores else "unscored",
                matting=replace(result.matting, foreground=foreground),
                evaluation=replace(scored.evaluation, is_seen=is_seen),
                reason="; ".join(problem.reason for problem in scored.problems),
            )
        )

    def _add_flicker_score(self, position: int, score: Any) -> None:
        """Add a flicker score to the result at a position of the report; None is ignored."""
        if isinstance(score, float):
            result = self.report.results[position]
            self.report.results[position] = replace(result, evaluation=replace(result.evaluation, dt_ssd=score))

    def _report_result(self, result: ImageResult) -> None:
        """Add a result to the report and notify the listener, unless that was done before."""
        if result.key in self._reported:
            return
        self._reported.add(result.key)
        self.report.results.append(result)
        self._listener.on_image_end(result)

    def _submit_task(self, task: ScoreTask | FlickerTask, then: Callable[[Any], None]) -> None:
        assert self._scorer
        self._scorer.pool.submit(task, then)

    def _wait_for_scorer(self) -> None:
        if self._scorer:
            self._scorer.pool.drain()

    def _write_reports(self, report_files: ReportFiles, matting_start: float, peak_memory: Callable[[], int]) -> None:
        """Complete the report, write its files and notify the listener. Images without a result are "not reached"."""
        self._wait_for_scorer()
        report = self.report
        report.results += [
            replace(result, status="not reached") for result in self._planned if result.key not in self._reported
        ]
        order = {result.key: number for number, result in enumerate(self._planned)}
        report.results = self._add_reasons(sorted(report.results, key=lambda result: order[result.key]))
        now = time.perf_counter()
        report.seconds, report.matting_seconds = now - self._start, now - matting_start
        report.peak_memory_bytes = peak_memory()
        try:
            for notice in report_files.write_all(report):
                self._listener.on_notice(notice)
        finally:
            self._listener.on_run_end(report)


def environment_settings() -> dict[str, Any]:
    """Return the versions and the hardware, which every report states."""
    return {
        "icm": environment.__version__,
        "versions": environment.package_versions(),
        "hardware": environment.describe_hardware(),
    }
