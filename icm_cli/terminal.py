"""Terminal output of ``icm``: progress, notices, tables and summaries."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from icm_cli import environment
from icm_cli.errors import shorten
from icm_cli.events import Listener, ReviewListener, TrainingListener, TrainingSummary
from icm_cli.files.paths import is_too_long
from icm_cli.reports.means import SHOT_SCORE_TITLES, format_mean, format_metric
from icm_cli.reports.published import comparison_caveats, published_scores
from icm_cli.reports.result import METRIC_TITLES, METRICS

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table
    from tqdm import tqdm

    from icm_cli.errors import Problem
    from icm_cli.model.hub.catalogue import ListedModel
    from icm_cli.reports.comparison import Comparison
    from icm_cli.reports.report import Report
    from icm_cli.reports.result import ImageResult

PLAIN_WIDTH = 160
"""Width of tables if standard output is not a terminal."""
MAX_PRINTED = 20
"""Maximum number of failures in the summary, and of problems of one kind."""
ENCODING_LINE_INTERVAL_S = 20.0
"""Interval of the lines about encoding images if stderr is not a terminal."""


class Terminal(Listener):
    """Listener that prints progress and notices to stderr and the summary to stdout.

    Progress is a bar, or one line per image if stderr is not a terminal.
    """

    def __init__(self, *, quiet: bool, verbose: bool, bar: bool = True, lines: bool = True) -> None:
        """``bar`` enables the progress bar, and ``lines`` the lines per image without a bar."""
        self.quiet = quiet
        self.verbose = verbose and not quiet
        self.may_show_bar = bar and not (self.quiet or self.verbose)
        self.has_lines = lines and not self.quiet
        self.total = 0
        self.ended = 0
        self._bar: tqdm[Any] | None = None
        self._problems: Counter[str] = Counter()

    def on_notice(self, text: str) -> None:
        if not self.quiet:
            self._print(f"icm: {text}")

    def on_detail(self, text: str) -> None:
        if self.verbose:
            self._print(f"icm: {text}")

    def on_problem(self, problem: Problem) -> None:
        self._problems[problem.kind] += 1
        if self._problems[problem.kind] <= MAX_PRINTED or self.verbose:
            self._print(f"icm: {problem.kind}: {problem.reason}")
        elif self._problems[problem.kind] == MAX_PRINTED + 1:
            self._print(f"icm: {problem.kind}: further problems of this kind are only in the --report")

    def on_run_start(self, total: int) -> None:
        self.total = total
        self._start_bar("image", total)

    def on_image_end(self, result: ImageResult) -> None:
        self.ended += 1
        if result.status == "failed":
            self._print(f"icm: failed: {_failure_text(result)}")
        if self._bar is not None:
            self._bar.update()
        elif self.has_lines and result.status != "failed":
            self._print(f"[{self.ended}/{self.total}] {result.status} {_source_text(result)}{_format_result(result)}")

    def on_run_end(self, report: Report) -> None:
        self._close_bar()
        if not self.quiet:
            _print_summary(report)

    def _start_bar(self, unit: str, total: int | None, initial: int = 0) -> None:
        if sys.stderr and sys.stderr.isatty() and self.may_show_bar:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, unit=unit, dynamic_ncols=True, smoothing=0.1)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        write_line(sys.stderr, text)


def print_plan(report: Report) -> None:
    """Print "source -> output" for every image, with the reason for a recompute; then the images that would fail."""
    for result in report.results:
        if result.status != "failed":
            note = " (kept)" if result.status == "kept" else ""
            if result.reason:
                note = f" (recomputed: {result.reason})"
            write_line(sys.stdout, f"{result.source} -> {result.output}{note}")
    for result in report.failures:
        write_line(sys.stderr, f"icm: would fail: {_failure_text(result)}")


def print_models(models: Sequence[ListedModel]) -> None:
    """Print two lines per model: name and state; requirements, size and licence."""
    for model in models:
        write_line(sys.stdout, f"{model.name}: {model.state}")
        write_line(sys.stdout, f"    needs {model.needs}; {model.size}; {model.licence}")


def print_comparison(comparison: Comparison, before: Path, after: Path) -> None:
    """Print a table of the images that are in both reports, worst change first."""
    for region, rows in comparison.images.items():
        titles = [METRIC_TITLES[metric] for metric in METRICS]
        table = _make_table("image", titles, f"{after} minus {before}, {region}; positive values are worse")
        for row in rows:
            name = f"{row.name} (round {row.round})" if row.round > 1 else row.name
            table.add_row(_escape_unprintable(name), *(f"{row.change(metric):+.5f}" for metric in METRICS))
        table.add_section()
        means = comparison.means(region).values()
        table.add_row(
            f"mean of {len(rows)}", *(f"{mean_after - mean_before:+.5f}" for mean_before, mean_after in means)
        )
        table.add_row(
            "before -> after", *(f"{mean_before:.5f} -> {mean_after:.5f}" for mean_before, mean_after in means)
        )
        _print_blocks(table)
    for warning in comparison.warnings:
        write_line(sys.stderr, f"icm: {warning}")


def _source_text(result: ImageResult) -> str:
    """Return the source for a message, with its page if the file has several images."""
    return f"{_shown_source(result)} page {result.page}" if result.page else _shown_source(result)


def _shown_source(result: ImageResult) -> str:
    """Return the source, shortened if it is a line of a list that is too long for a path."""
    return shorten(result.source) if is_too_long(os.fsencode(result.source)) else result.source


def _format_result(result: ImageResult) -> str:
    """Return the end of the line about an image: time, scores and quality, as far as they are known."""
    text = ""
    if result.status == "done" and result.matting.seconds is not None:
        text += f" {result.matting.seconds:.2f} s"
    for region, scores in result.evaluation.scores.items():
        text += f", {region}: MSE {scores.mse:.4f}, SAD {scores.sad:.2f}"
    if result.matting.not_found:
        text += ", object not found"
    if result.matting.quality is not None:
        text += f", quality {result.matting.quality:.2f}"
    return text


def _failure_text(result: ImageResult) -> str:
    """Return a failed source and the reason, in which the source is not repeated."""
    reason = result.reason.removeprefix(result.source).lstrip(": ")
    return f"{_source_text(result)}: {reason}"


def _make_table(first_column: str, number_columns: Sequence[str], title: str | None = None) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(first_column)
    for name in number_columns:
        table.add_column(name, justify="right")
    return table


def _print_blocks(*blocks: Table | str) -> None:
    """Print tables and text for the width and encoding of standard output."""
    from rich.console import Console

    if sys.stdout is None:
        return
    is_terminal = sys.stdout.isatty()
    # Rich draws the borders of tables with characters that the encoding of its file has.
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding, errors="surrogateescape")
    width = None if is_terminal else PLAIN_WIDTH  # None: that of the terminal
    console = Console(file=buffer, width=width, color_system=None, highlight=False, markup=False, emoji=False)
    for block in blocks:
        if isinstance(block, str):
            console.print(_escape_unprintable(block), soft_wrap=True)
        else:
            console.print(block, soft_wrap=not is_terminal)
    buffer.seek(0)
    for line in buffer.read().rstrip("\n").split("\n"):
        write_line(sys.stdout, line)


def print_table(rows: Sequence[tuple[str, str]], *lines: str) -> None:
    """Print a table of names and values, followed by lines of text."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(name, value)
    _print_blocks(table, *lines)


def _print_summary(report: Report) -> None:
    """Print the scores of an evaluation, and the counts and failures of a run."""
    if report.means:
        notes = comparison_caveats(report.protocol, report.means)
        _print_blocks(_scores_table(report), *(f"- {note}" for note in notes), "")
    if report.shots:
        table = _make_table("shot", ["frames", *SHOT_SCORE_TITLES.values()])
        for shot, scores in report.shots.items():
            table.add_row(shot, f"{scores.frames}", *(f"{getattr(scores, name):.3f}" for name in SHOT_SCORE_TITLES))
        _print_blocks(table, "")
    lines = [f"failed: {_failure_text(result)}" for result in report.failures[:MAX_PRINTED]]
    if len(report.failures) > MAX_PRINTED:
        lines.append(f"... and {len(report.failures) - MAX_PRINTED} more failures")
    print_table(_summary_rows(report), *lines)


def _scores_table(report: Report) -> Table:
    """Return a table of the means by region, followed by published scores for the same dataset."""
    metrics = report.measured_metrics
    columns = [*(METRIC_TITLES[metric] for metric in metrics), "MSE x1e3", "images"]
    # "" is the heading of the first column.
    table = _make_table("", columns, _protocol_line(report.protocol, report.settings.get("note")))
    missing = f"{report.count('not reached')} of {len(report.results)} images not reached"
    incomplete_note = "" if report.is_complete else f" (incomplete, {missing})"
    for suffix, by_region in (("", report.means), (", not trained on", report.means_unseen or {})):
        for region, means in by_region.items():
            cells = [format_mean(means.metrics.get(metric), metric) for metric in metrics]
            mse_in_thousandths = f"{1e3 * means.metrics['mse'].mean:.2f}"
            name = f"{report.method_name}, {region}{suffix}{incomplete_note}"
            table.add_row(name, *cells, mse_in_thousandths, f"{means.images}")
    table.add_section()
    for row in published_scores(report.protocol):
        cells = [format_metric(getattr(row, metric, None), metric) for metric in metrics]
        table.add_row(f"{row.method} ({row.note}; published)", *cells, f"{1e3 * row.mse:.2f}", "")
    return table


def _protocol_line(protocol: Mapping[str, Any], note: str | None) -> str | None:
    """Return the title of the table of scores: how they were computed."""
    if not protocol:
        return None
    parts = [
        protocol["title"],
        f"size {protocol['size']}",
        f"GRAD and CONN of the {protocol['metric_variant']} variant",
        "1 round" if protocol["rounds"] == 1 else f"{protocol['rounds']} rounds",
        f"references per group: {protocol['refs_per_group']}" if protocol["refs_per_group"] else "no references",
    ]
    return ", ".join(parts) + (f"\n{note}" if note else "")


def _summary_rows(report: Report) -> list[tuple[str, str]]:
    """Return the rows of the summary: counts of images and problems, device, time and memory."""
    rows = _image_count_rows(report)
    if report.to_review and not report.is_evaluation:
        where = f"listed in {report.review_list}" if report.review_list else "--review-list FILE.txt lists them"
        counts = f"{len(report.to_review)} of {len(report.by_quality)} alphas"
        rows.append((f"quality below {report.review_below:g}", f"{counts}; {where}"))
    for kind, count in sorted(Counter(problem.kind for problem in report.problems).items()):
        note = f" (the exit code is 1; --allow {kind} accepts them)" if report.is_evaluation else ""
        rows.append((kind, f"{count} (allowed)" if kind in report.allowed else f"{count}{note}"))
    if resized := sum(result.evaluation.was_resized for result in report.results):
        rows.append(("resized for scoring", f"{resized}"))
    if seen := sum(bool(result.evaluation.is_seen) for result in report.results):
        rows.append(("trained on", f"{seen} of the images"))
    matting_time = ""
    if "device" in report.settings:  # without it, finished alphas are scored
        rows.append(("device", report.settings["device"]))
        matting_time = f", of which matting {report.matting_seconds:.1f} s"
    rows.append(("time", f"{report.seconds:.1f} s{matting_time}"))
    rows.append(("peak memory", f"{report.peak_memory_bytes / 1e6:.0f} MB"))
    return rows


def _image_count_rows(report: Report) -> list[tuple[str, str]]:
    """Return the rows with the counts of images by their status. Most rows are omitted if the count is 0."""
    rate = f" ({report.images_per_second:.2f} images/s)" if report.count("done") else ""
    rows = [("done", f"{report.count('done')}{rate}"), ("kept", f"{report.count('kept')}")]
    kept_by_version = Counter(result.matting.made_by for result in report.results if result.status == "kept")
    for version, count in sorted(kept_by_version.items()):
        if version not in ("", environment.__version__):
            rows.append((f"kept, made by icm {version}", f"{count}"))
    rows.append(("failed", f"{len(report.failures)}"))
    counts = {
        "reviewed": sum(bool(result.matting.reviewed) for result in report.results),
        **{f"skipped file, {reason}": count for reason, count in sorted(report.skipped_files.items())},
        "unscored": report.count("unscored"),
        "not reached": report.count("not reached"),
        "object not found": sum(bool(result.matting.not_found) for result in report.results),
    }
    return rows + [(name, f"{count}") for name, count in counts.items() if count]


def write_line(stream: TextIO | None, text: str) -> None:
    """Print one line.

    Control characters, and characters that the stream cannot encode, are escaped.

    If the stream is closed or cannot be written, further output to it is discarded, so that the run continues.
    """
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    encodable = _escape_unprintable(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        stream.write(encodable + "\n")
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, stream.fileno())
            os.close(devnull)


def _escape_unprintable(line: str) -> str:
    r"""Return a line with its control characters as escape sequences such as \n."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in line
    )


class TrainingTerminal(Terminal, TrainingListener):
    """Listener for training that prints a progress bar, or lines if stderr is not a terminal."""

    def on_encoding_start(self, total: int, stored: int) -> None:
        earlier = f"; an earlier run has encoded {stored} of {total}" if stored else ""
        self.on_notice(f"encoding {total - stored} images with the backbone{earlier}")
        self._images, self._stored = total, stored
        self._encoding_start = self._last_line = time.monotonic()
        self._start_bar("image", total, stored)

    def on_encoding_progress(self, encoded: int) -> None:
        if self._bar is not None:
            self._bar.update(encoded - self._bar.n)
            return
        now = time.monotonic()
        is_line_due = encoded == self._images or now - self._last_line >= ENCODING_LINE_INTERVAL_S
        if self.quiet or not is_line_due:
            return
        self._last_line = now
        seconds_per_image = (now - self._encoding_start) / max(1, encoded - self._stored)
        seconds_left = seconds_per_image * (self._images - encoded)
        left = f"{seconds_left:.0f} s" if seconds_left < 90 else f"{seconds_left / 60:.0f} min"
        self._print(f"[{encoded}/{self._images}] images encoded, {left} left")

    def on_encoding_end(self) -> None:
        self._close_bar()

    def on_training_start(self, first_step: int, steps: int | None, samples: int) -> None:
        self._step_limit = "" if steps is None else f"/{steps}"
        end = "the time limit" if steps is None else steps
        self.on_notice(f"training from step {first_step + 1} to {end}, {samples} samples per step")
        self._start_bar("step", steps, first_step)

    def on_step_end(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def on_log(self, step: int, figures: Mapping[str, float]) -> None:
        values = {
            "loss": f"{figures['loss']:.4f}",
            "rate": f"{figures['learning_rate']:.2e}",
            "samples/s": f"{figures['samples_per_second']:.2f}",
            "waiting": f"{figures['waiting_fraction']:.0%}",
        }
        if self._bar is not None:
            self._bar.set_postfix(values)
        elif not self.quiet:
            self._print(f"[{step}{self._step_limit}] " + ", ".join(f"{name} {value}" for name, value in values.items()))

    def on_validation_end(self, step: int, figures: Mapping[str, float], *, is_best: bool) -> None:
        scores = {name.removeprefix("validation_"): value for name, value in figures.items()}
        text = ", ".join(f"{METRIC_TITLES[name]} {format_metric(value, name)}" for name, value in scores.items())
        note = " (best so far)" if is_best else ""
        self.on_notice(f"step {step}: validation {text}{note}")

    def on_steps_end(self) -> None:
        self._close_bar()

    def on_training_end(self, summary: TrainingSummary) -> None:
        """Print the summary of the run, and the command to matte with its model."""
        if summary.preview is not None:
            write_line(sys.stdout, f"the preview of samples is {summary.preview}; nothing was trained")
        if self.quiet or summary.preview is not None:
            return
        print_table(_training_rows(summary))
        if summary.pack is not None:
            write_line(sys.stdout, f"model with its backbone: {summary.pack}")
        if summary.checkpoint is not None:
            options = "--ref ref.png --mask mask.png --src imgs/ --out alphas/"
            write_line(sys.stdout, f"icm matte --checkpoint {shlex.quote(str(summary.checkpoint))} {options}")


def _training_rows(summary: TrainingSummary) -> list[tuple[str, str]]:
    """Return the rows of the summary of a training run."""
    statistics = summary.statistics
    best = "no validation; the result is the last model"
    if summary.best is not None:
        best = f"{summary.best.step}, validation MSE {summary.best.mse:.5f}"
    rows = [
        ("steps", f"{summary.steps}"),
        ("loss", "-" if summary.loss is None else f"{summary.loss:.4f}"),
        ("best step", best),
        ("time", f"{statistics.seconds:.1f} s of training, {statistics.samples_per_second:.2f} samples/s"),
        ("waiting for data", f"{statistics.waiting_fraction:.1%} of the time"),
        ("peak memory", f"{statistics.peak_memory_bytes / 1e6:.0f} MB"),
        ("folder", str(summary.folder)),
    ]
    if statistics.skipped:
        rows.append(("unreadable", f"{statistics.skipped} samples were skipped"))
    return rows


class ReviewTerminal(Terminal, ReviewListener):
    """Listener that prints the link to the page of a review on a line of its own."""

    def on_link(self, link: str) -> None:
        write_line(sys.stdout, link)
