"""What every run that mattes has: who listens, which model, which files beside the alphas, and how it ends."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from icm_cli import __version__, environment
from icm_cli.datasets.samples import Problem
from icm_cli.errors import OutputError, UsageError
from icm_cli.evaluation.scoring import DIED, FlickerTask, ScoreTask, ScoringPool
from icm_cli.files import TEMPORARY_PREFIX, write_error
from icm_cli.report import ImageResult, Report, check_report_paths

Paths = str | Path | Sequence[str | Path]
DEFAULT_WORKERS = max(1, min(4, (os.cpu_count() or 2) // 2))
"""Threads that read, as many that write, and processes that score; a few keep a model fed, more only take its cores."""


class Listener:
    """Hears what a run does; the command prints it. Every method may be left as it is."""

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
class SideOutputs:
    """The files beside the alphas."""

    reports: tuple[Path, ...]
    contact_sheet: Path | None = None
    references: Path | None = None
    """Of an evaluation, for a later one."""

    @classmethod
    def checked(
        cls, reports: Paths, contact_sheet: str | Path | None = None, references: str | Path | None = None
    ) -> SideOutputs:
        """Raises UsageError for a name of no known kind."""
        side = cls(tuple(as_paths(reports)), as_path(contact_sheet), as_path(references))
        check_report_paths(list(side.reports))
        if side.contact_sheet and side.contact_sheet.suffix.lower() != ".png":
            raise UsageError(f"contact sheet {contact_sheet} is no .png; give the file such a name")
        if side.references and side.references.suffix.lower() != ".json":
            raise UsageError(f"references file {references} is no .json; give the file such a name")
        return side

    @property
    def paths(self) -> list[Path]:
        return [*self.reports, *filter(None, [self.contact_sheet, self.references])]

    def check_overwrites_nothing(self, taken: Sequence[str | Path]) -> None:
        """Raises UsageError for a report or sheet in the place of a folder, an input, an alpha or another of them."""
        real = {os.path.realpath(path) for path in taken}
        for number, path in enumerate(self.paths):
            if os.path.realpath(path) in {os.path.realpath(other) for other in self.paths[:number]}:
                raise UsageError(f"{path} is given for two outputs; give each a name of its own")
            if path.is_dir():
                raise UsageError(f"{path} is a folder; give the file another name")
            if os.path.realpath(path) in real:
                raise UsageError(f"{path} is an input or an alpha of this run; give the report another name")

    def check_writable(self, *folders: Path) -> None:
        """Raises OutputError now rather than after hours of work."""
        for folder in {*folders, *(path.parent for path in self.paths)}:
            probe = folder / f"{TEMPORARY_PREFIX}probe-{os.getpid()}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe.touch()
                probe.unlink()
            except OSError as error:
                raise write_error(folder, error) from error

    def write(self, report: Report) -> list[Path]:
        """Write them all; returns those left as they are, since a run cut short replaces none. Raises OutputError."""
        kept = [] if report.is_complete else [path for path in self.paths if path.exists()]
        for path in self.reports:
            if path not in kept:
                report.write(path)
        if self.contact_sheet and self.contact_sheet not in kept:
            from icm_cli.contact_sheet import write_contact_sheet

            write_contact_sheet(self.contact_sheet, report.results)
        return kept


class Outcome:
    """Gathers results, has them scored beside the model, and however the run ends sees the reports written.

    ``task_for`` says how to score an image that has its alpha, None where nothing is to be scored.
    """

    def __init__(
        self,
        report: Report,
        planned: Sequence[ImageResult],
        hear: Listener,
        *,
        start: float,
        processes: int,
        task_for: Callable[[ImageResult], ScoreTask | None],
        trained_on: frozenset[str] | None = None,
    ) -> None:
        self.report = report
        self._planned = planned
        self._hear = hear
        self._start = start
        self._task_for = task_for
        self._trained_on = trained_on
        self._pool = ScoringPool(processes)
        self._ended: set[tuple[int, str]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.close()

    def add(self, result: ImageResult) -> None:
        """Take a result of the engine; it ends here once it is scored."""
        task = self._task_for(result) if result.status in ("done", "skipped") else None
        if task is None:
            self._end(result)
        else:
            self._pool.submit(task, partial(self._scored, result))

    def scored(self) -> list[ImageResult]:
        """The results that have scores; waits for those in hand."""
        self._pool.drain()
        return [result for result in self.report.results if result.scores]

    def add_flicker(self, tasks: Sequence[tuple[tuple[int, str], FlickerTask]]) -> None:
        """Measure the flicker of results, given by their keys."""
        at = {result.key: number for number, result in enumerate(self.report.results)}
        for key, task in tasks:
            self._pool.submit(task, partial(self._flickered, at[key]))

    def add_problem(self, problem: Problem) -> None:
        self.report.problems.append(problem)
        self._hear.problem(problem)

    @contextlib.contextmanager
    def reported(self, side: SideOutputs, peak_memory: Callable[[], int]) -> Iterator[None]:
        """Around the work: whatever happens in it, what is done is scored and reported."""
        begun = time.perf_counter()
        try:
            yield
        except BaseException:
            with contextlib.suppress(OutputError):
                self._finish(side, begun, peak_memory)
            raise
        self._finish(side, begun, peak_memory)

    def _scored(self, result: ImageResult, answer: Any) -> None:
        if answer is DIED:
            reason = (
                f"the process that scored {result.output} died, perhaps of too little memory; run the command again"
            )
            self._end(replace(result, status="failed", reason=reason))
            return
        for problem in answer.problems:
            self.add_problem(problem)
        is_seen = None if self._trained_on is None else answer.image_sha256 in self._trained_on
        self._end(
            replace(
                result,
                status=result.status if answer.scores else "unscored",
                scores=answer.scores,
                was_resized=answer.was_resized,
                foreground=answer.foreground if result.foreground is None else result.foreground,
                is_seen=is_seen,
                reason="; ".join(problem.reason for problem in answer.problems),
            )
        )

    def _flickered(self, number: int, answer: Any) -> None:
        if isinstance(answer, float):
            self.report.results[number] = replace(self.report.results[number], dt_ssd=answer)

    def _end(self, result: ImageResult) -> None:
        if result.key in self._ended:
            return
        self._ended.add(result.key)
        self.report.results.append(result)
        self._hear.finished_image(result)

    def _finish(self, side: SideOutputs, begun: float, peak_memory: Callable[[], int]) -> None:
        self._pool.drain()
        report = self.report
        report.results += [
            replace(result, status="not reached") for result in self._planned if result.key not in self._ended
        ]
        order = {result.key: number for number, result in enumerate(self._planned)}
        report.results.sort(key=lambda result: order[result.key])
        now = time.perf_counter()
        report.seconds, report.matting_seconds = now - self._start, now - begun
        report.peak_memory_bytes = peak_memory()
        try:
            for path in side.write(report):
                self._hear.notice(f"{path} is left as it was: this run was cut short")
        finally:
            self._hear.finished(report)


def environment_settings() -> dict[str, Any]:
    """Versions and hardware, as every report states them."""
    return {"icm": __version__, "versions": environment.versions(), "hardware": environment.hardware()}


def check_workers(workers: int) -> None:
    """Raises UsageError for none."""
    if workers < 1:
        raise UsageError(f"workers is {workers}; expected 1 or more")


def as_paths(value: Paths) -> list[Path]:
    """One or several paths -> a list."""
    return [Path(value)] if isinstance(value, (str, Path)) else [Path(one) for one in value]


def as_path(value: str | Path | None) -> Path | None:
    """A path where one is given."""
    return None if value is None else Path(value)
