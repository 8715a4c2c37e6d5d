"""The log of a training run: metrics of its steps, in a CSV file and for TensorBoard, and skipped images."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from icm_cli.errors import ImageError, OutputError
from icm_cli.files.atomic_writes import atomic_write
from icm_cli.reports.result import METRICS
from icm_cli.training.batches import Batch

LOG_NAME = "log.csv"
SKIPPED_NAME = "skipped.txt"
TENSORBOARD_FOLDER = "tensorboard"
MAX_REPORTED_SKIPS = 20
"""Number of skipped images that are reported one by one."""
RUN_COLUMNS = ("learning_rate", "gradient_norm", "samples_per_second", "waiting_fraction", "seconds")


class RunLog:
    """Writes the logs of one run.

    The first write that fails is reported and ends logging; training continues without a log.
    """

    def __init__(
        self,
        folder: Path,
        loss_names: Sequence[str],
        last_step: int,
        notice: Callable[[str], None],
        *,
        is_main: bool,
    ) -> None:
        """Open the logs in ``folder``. Only the main process (``is_main``) writes.

        Rows and scalars after ``last_step`` are removed: an interrupted run may have logged steps after its last saved
        state.
        """
        self._path = folder / LOG_NAME
        self._loss_names = loss_names
        self._columns = ("step", "loss", *loss_names, *RUN_COLUMNS, *(f"validation_{metric}" for metric in METRICS))
        self._notice = notice
        self._is_logging = is_main
        self._writer: Any = None
        self.has_image = False
        """Whether an image was logged since the log was opened."""
        self._try_writing(lambda: self._open_files(folder, last_step))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._try_writing(self._writer.close)

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics, named like the columns, at a step."""
        self._try_writing(lambda: self._append_row(step, metrics))

    def write_image(self, step: int, image: NDArray[np.uint8]) -> None:
        """Log an image, uint8 [H,W,3], to TensorBoard."""
        self.has_image = True
        self._try_writing(lambda: self._writer.add_image("samples", image, step, dataformats="HWC"))

    def _open_files(self, folder: Path, last_step: int) -> None:
        """Remove the rows after ``last_step`` from the CSV file, and open TensorBoard's log."""
        from torch.utils.tensorboard import SummaryWriter

        rows = [row for row in _read_rows(self._path) if int(row["step"]) <= last_step]
        with atomic_write(self._path) as file:
            file.write(self._format_csv(rows, header=True).encode())
        self._writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=last_step + 1)

    def _append_row(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a row to the CSV file, and its values to TensorBoard's log."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(self._format_csv([{"step": step, **metrics}], header=False))
        for name, value in metrics.items():
            if name.startswith("validation_"):
                tag = name.replace("_", "/", 1)
            elif name in self._loss_names:
                tag = f"losses/{name}"
            else:
                tag = f"run/{name}"
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def _try_writing(self, write: Callable[[], None]) -> None:
        """Call ``write``; if it fails, report that and log no more."""
        if not self._is_logging:
            return
        try:
            write()
        except (OSError, OutputError, ImageError) as error:
            self._is_logging = False
            self._notice(f"the log {self._path} cannot be written ({error}); training continues without it")

    def _format_csv(self, rows: list[dict[str, Any]], *, header: bool) -> str:
        text = io.StringIO()
        table = csv.DictWriter(text, self._columns, lineterminator="\n", extrasaction="ignore")
        if header:
            table.writeheader()
        table.writerows(rows)
        return text.getvalue()


class SkippedLog:
    """Reports why images are skipped, each reason once, and writes all reasons to a file of the run folder."""

    def __init__(self, folder: Path, notice: Callable[[str], None]) -> None:
        self._path = folder / SKIPPED_NAME
        self._notice = notice
        self._reported: set[str] = set()

    def report(self, reasons: Sequence[str]) -> None:
        """Report reasons. At most MAX_REPORTED_SKIPS are notices; the file lists the others, too."""
        for reason in reasons:
            if reason in self._reported:
                continue
            self._reported.add(reason)
            if len(self._reported) <= MAX_REPORTED_SKIPS:
                self._notice(f"skipped: {reason}")
            with contextlib.suppress(OSError), self._path.open("a+", encoding="utf-8", errors="replace") as file:
                file.seek(0)
                if reason not in file.read().splitlines():  # written before the run was resumed, or by another process
                    file.write(f"{reason}\n")


class StepStats:
    """Accumulates losses and times of the steps since the last log row, and over all steps."""

    def __init__(self) -> None:
        self.samples = 0
        """Samples of all steps."""
        self.waiting = 0.0
        """Seconds of all steps in which the model had no samples to train on."""
        self._start = time.perf_counter()
        self._paused = 0.0
        self._steps = 0
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._logged_samples, self._logged_waiting, self._logged_seconds = 0, 0.0, 0.0
        """The totals at the last log row."""

    def take_next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch; the time until it is available counts as waiting time."""
        before = time.perf_counter()
        batch = next(batches)
        self.waiting += time.perf_counter() - before
        return batch

    def add_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of a micro-batch, [B] each."""
        for name, values in losses.items():
            self._sums["loss" if name == "total" else name] += float(values.detach().sum())
        self.samples += len(losses["total"])

    def finish_step(self, gradient_norm: float) -> None:
        """Count a step and its gradient norm."""
        self._steps += 1
        self._sums["gradient_norm"] += gradient_norm

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time spent inside the context from the time of the steps."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - before

    @property
    def seconds(self) -> float:
        """Seconds of all steps, without validation, saving and logging."""
        return time.perf_counter() - self._start - self._paused

    def take_metrics(self, learning_rate: float) -> dict[str, float]:
        """Return the means since the last call, by the names of the log's columns."""
        total_seconds = self.seconds
        samples = self.samples - self._logged_samples
        seconds = max(1e-9, total_seconds - self._logged_seconds)
        metrics = {
            name: total / (self._steps if name == "gradient_norm" else samples) for name, total in self._sums.items()
        }
        metrics |= {
            "learning_rate": learning_rate,
            "samples_per_second": samples / seconds,
            "waiting_fraction": (self.waiting - self._logged_waiting) / seconds,
            "seconds": seconds,
        }
        self._sums.clear()
        self._steps = 0
        self._logged_samples, self._logged_waiting, self._logged_seconds = self.samples, self.waiting, total_seconds
        return metrics


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the complete rows of a log. Damaged rows are skipped; reading stops where the CSV itself is damaged."""
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    with path.open(encoding="utf-8", errors="replace", newline="") as file, contextlib.suppress(csv.Error):
        for row in csv.DictReader(file):
            has_step = re.fullmatch("[0-9]{1,15}", row.get("step") or "") is not None
            is_complete = None not in row.values()  # the values of missing columns are None
            if has_step and is_complete:
                rows.append(row)
    return rows
