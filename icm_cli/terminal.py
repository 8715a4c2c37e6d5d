"""What ``icm`` prints: progress, notices and the closing summary. The only module that knows tqdm and rich."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from icm_cli.matting import Listener

if TYPE_CHECKING:
    from tqdm import tqdm

    from icm_cli.report import ImageResult, MatteReport

MOST_REASONS = 20
"""Failures named again in the summary; every one was printed when it happened."""


class Terminal(Listener):
    """Progress and notices on stderr, the summary on stdout; plain lines where stderr is no terminal."""

    def __init__(self, *, quiet: bool, verbose: bool) -> None:
        self.quiet = quiet
        self.verbose = verbose and not quiet
        self.total = 0
        self.ended = 0
        self._bar: tqdm[Any] | None = None

    def notice(self, text: str) -> None:
        if not self.quiet:
            self._print(f"icm: {text}")

    def detail(self, text: str) -> None:
        if self.verbose:
            self._print(f"icm: {text}")

    def started(self, total: int) -> None:
        self.total = total
        if sys.stderr.isatty() and not (self.quiet or self.verbose):
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="image", dynamic_ncols=True, smoothing=0.1)

    def finished_image(self, result: ImageResult) -> None:
        self.ended += 1
        if result.status == "failed":
            self._print(f"icm: failed: {result.source}: {_without_prefix(result)}")
        if self._bar is not None:
            self._bar.update()
        elif not self.quiet and result.status != "failed":
            self._print(f"[{self.ended}/{self.total}] {result.status} {result.source}{_figures(result)}")

    def finished(self, report: MatteReport) -> None:
        if self._bar is not None:
            self._bar.close()
        if not self.quiet:
            _print_summary(report)

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)


def print_plan(report: MatteReport) -> None:
    """List source -> output."""
    for result in report.results:
        print(f"{result.source} -> {result.output}")


def _figures(result: ImageResult) -> str:
    parts = [f" {result.seconds:.2f} s" if result.status == "done" and result.seconds is not None else ""]
    if result.mse is not None and result.sad is not None:
        parts.append(f", MSE {result.mse:.4f}, SAD {result.sad:.2f}")
    if result.not_found:
        parts.append(", reference's thing not found")
    return "".join(parts)


def _without_prefix(result: ImageResult) -> str:
    """The reason, which often begins with the path that stands before it already."""
    return result.reason.removeprefix(result.source).lstrip(": ")


def _print_summary(report: MatteReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _summary_rows(report):
        table.add_row(name, value)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(table)
    for result in report.failures[:MOST_REASONS]:
        console.print(f"failed: {result.source}: {_without_prefix(result)}")
    if len(report.failures) > MOST_REASONS:
        console.print(f"... and {len(report.failures) - MOST_REASONS} more failed")


def _summary_rows(report: MatteReport) -> list[tuple[str, str]]:
    rows = [
        ("done", f"{report.count('done')} ({report.images_per_second:.2f} images/s)"),
        ("skipped", f"{report.count('skipped')}"),
        ("failed", f"{len(report.failures)}"),
    ]
    if unreached := report.count("not reached"):
        rows.append(("not reached", f"{unreached}"))
    if missing := sum(bool(result.not_found) for result in report.results):
        rows.append(("thing not found", f"{missing}"))
    mse, sad = report.mean("mse"), report.mean("sad")
    if mse is not None and sad is not None:
        rows.append(("mean MSE, SAD", f"{mse:.5f}, {sad:.3f}"))
    rows.append(("device", report.settings["device"]))
    rows.append(("time", f"{report.seconds:.1f} s, images {report.matting_seconds:.1f} s"))
    rows.append(("peak memory", f"{report.peak_memory_bytes / 1e6:.0f} MB"))
    return rows
