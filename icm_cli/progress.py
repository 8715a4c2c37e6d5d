"""Progress and errors for farms: Open Job Description lines, or one JSON object per event."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from icm_cli.errors import format_count
from icm_cli.options import MatteDisplayOptions
from icm_cli.terminal import Terminal, write_line

if TYPE_CHECKING:
    from icm_cli.errors import Problem
    from icm_cli.reports.report import Report
    from icm_cli.reports.result import ImageResult


def make_terminal(display: MatteDisplayOptions) -> Terminal:
    """Return the listener that prints a run in the form that ``--progress`` selects."""
    terminal_class = {"json": JsonTerminal, "openjd": OpenJdTerminal}.get(display.progress, Terminal)
    return terminal_class(
        quiet=display.quiet,
        verbose=display.verbose,
        bar=display.progress == "auto",
        lines=display.progress in ("auto", "plain"),
    )


def print_error(progress: str, text: str, exit_code: int) -> None:
    """Print the error that ended a run on stderr and, depending on ``progress``, on stdout."""
    write_line(sys.stderr, f"icm: {text}")
    report_error_to_farm(progress, text, exit_code)


def report_error_to_farm(progress: str, text: str, exit_code: int) -> None:
    """Print an error on stdout if ``progress`` is a format for farms."""
    if progress == "openjd":
        _print_openjd("openjd_fail", text)
    elif progress == "json":
        _print_event("error", message=text, exit_code=exit_code)


def find_progress_mode(arguments: Sequence[str]) -> str:
    """Return the last value of ``--progress`` in a command line, "" without one.

    The command line may be invalid, so it is searched and not parsed.
    """
    mode = ""
    for argument, next_argument in itertools.pairwise([*arguments, ""]):
        if argument == "--progress":
            mode = next_argument
        elif argument.startswith("--progress="):
            mode = argument.removeprefix("--progress=")
    return mode


def _print_openjd(kind: str, text: str) -> None:
    """Print a message of Open Job Description, whose text is a single line."""
    write_line(sys.stdout, f"{kind}: {' '.join(text.split())}")


def _print_event(event: str, **values: Any) -> None:
    write_line(sys.stdout, json.dumps({"event": event, **values}))


class OpenJdTerminal(Terminal):
    """Listener that prints Open Job Description lines, as parsed by Deadline Cloud."""

    def on_run_start(self, total: int) -> None:
        super().on_run_start(total)
        _print_openjd("openjd_status", f"matting {format_count(total, 'image')}")

    def on_image_end(self, result: ImageResult) -> None:
        super().on_image_end(result)
        _print_openjd("openjd_progress", f"{100.0 * self.ended / max(1, self.total):.1f}")

    def on_run_end(self, report: Report) -> None:
        super().on_run_end(report)
        _print_openjd("openjd_status", f"{report.count('done')} done, {report.count('kept')} kept")
        if report.exit_code:
            _print_openjd("openjd_fail", f"{len(report.failures)} of {len(report.results)} images failed")


class JsonTerminal(Terminal):
    """Listener that prints one JSON object per event on stdout; notices go to stderr."""

    def on_run_start(self, total: int) -> None:
        super().on_run_start(total)
        _print_event("started", total=total)

    def on_problem(self, problem: Problem) -> None:
        super().on_problem(problem)
        _print_event("problem", kind=problem.kind, reason=problem.reason)

    def on_image_end(self, result: ImageResult) -> None:
        super().on_image_end(result)
        values = result.as_dict()
        del values["signals"]
        values_present = {name: value for name, value in values.items() if value not in (None, "", {}, ())}
        _print_event("image", ended=self.ended, total=self.total, **values_present)

    def on_run_end(self, report: Report) -> None:
        """Print the totals.

        If the run was interrupted, the exit code is null here, and follows in the event "error".
        """
        is_interrupted = not report.exit_code and not report.is_complete
        exit_code = None if is_interrupted else report.exit_code
        _print_event("finished", exit_code=exit_code, **report.as_dict()["summary"])
