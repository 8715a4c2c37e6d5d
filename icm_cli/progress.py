"""Progress for farms and other programs: lines of OpenJD, and one JSON object per event."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from icm_cli.errors import UsageError, did_you_mean
from icm_cli.terminal import Terminal, write_line

if TYPE_CHECKING:
    from icm_cli.errors import Problem
    from icm_cli.reports.report import Report
    from icm_cli.reports.result import ImageResult

Progress = Literal["auto", "plain", "json", "openjd", "none"]


def make_terminal(progress: str, *, quiet: bool, verbose: bool) -> Terminal:
    """Make what prints a run, as ``--progress`` says. Raises UsageError for a way that is not known."""
    if progress not in get_args(Progress):
        raise UsageError(f"--progress {progress!r} is not known. {did_you_mean(progress, get_args(Progress))}")
    kind = {"json": JsonTerminal, "openjd": OpenJdTerminal}.get(progress, Terminal)
    return kind(quiet=quiet, verbose=verbose, bar=progress == "auto", lines=progress in ("auto", "plain"))


def tell_failure(arguments: Sequence[str], text: str, exit_code: int) -> None:
    """Print the failure of a command that told none itself, in the way that its arguments ask for, if for any.

    They may be no valid ones, so they are searched, not parsed.
    """
    pairs = [argument.partition("=") for argument in arguments]
    ways = [
        value if equals else after
        for (name, equals, value), after in zip(pairs, [*arguments[1:], ""], strict=True)
        if name == "--progress"
    ]
    if ways and ways[-1] == "openjd":
        _say_openjd("openjd_fail", text)
    elif ways and ways[-1] == "json":
        _say_json("error", message=text, exit_code=exit_code)


def _say_openjd(kind: str, text: str) -> None:
    write_line(sys.stdout, f"{kind}: {' '.join(text.split())}")


def _say_json(event: str, **values: Any) -> None:
    write_line(sys.stdout, json.dumps({"event": event, **values}))


class OpenJdTerminal(Terminal):
    """Lines on stdout that a worker of OpenJD, and so Deadline Cloud, parses: progress, status and failure."""

    def on_run_start(self, total: int) -> None:
        super().on_run_start(total)
        _say_openjd("openjd_status", f"matting {total} images")

    def on_image_end(self, result: ImageResult) -> None:
        super().on_image_end(result)
        _say_openjd("openjd_progress", f"{100.0 * self.ended / max(1, self.total):.1f}")

    def on_run_end(self, report: Report) -> None:
        super().on_run_end(report)
        _say_openjd("openjd_status", f"{report.count('done')} done, {report.count('kept')} kept")
        if report.exit_code:
            _say_openjd("openjd_fail", f"{len(report.failures)} of {len(report.results)} images failed")

    def error(self, text: str, exit_code: int) -> None:
        super().error(text, exit_code)
        _say_openjd("openjd_fail", text)


class JsonTerminal(Terminal):
    """One JSON object per line on stdout, each with an "event"; notices go to stderr as ever."""

    def on_run_start(self, total: int) -> None:
        super().on_run_start(total)
        _say_json("started", total=total)

    def on_problem(self, problem: Problem) -> None:
        super().on_problem(problem)
        _say_json("problem", kind=problem.kind, reason=problem.reason)

    def on_image_end(self, result: ImageResult) -> None:
        super().on_image_end(result)
        row = {name: value for name, value in result.as_dict().items() if value not in (None, "", {})}
        _say_json("image", ended=self.ended, total=self.total, **row)

    def on_run_end(self, report: Report) -> None:
        """Say the end; the exit code of a run that was cut short is told by the error after it."""
        code = report.exit_code or (0 if report.is_complete else None)
        _say_json("finished", exit_code=code, **report.as_dict()["summary"])

    def error(self, text: str, exit_code: int) -> None:
        super().error(text, exit_code)
        _say_json("error", message=text, exit_code=exit_code)
