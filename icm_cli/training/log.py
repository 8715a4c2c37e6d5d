"""The log of a run: CSV, and TensorBoard scalars and pictures. Where it cannot be written the run goes on."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from icm_cli.errors import ImageError, OutputError
from icm_cli.files import atomic_write
from icm_cli.reports.result import METRICS

LOG_NAME = "log.csv"
TENSORBOARD_FOLDER = "tensorboard"
RUN_COLUMNS = ("rate", "gradient_norm", "samples_per_second", "waiting_share", "seconds")


class RunLog:
    """Writes the logs of one run; the first failure to write is told, and ends them."""

    def __init__(
        self,
        folder: Path,
        terms: Sequence[str],
        first_step: int,
        notice: Callable[[str], None],
        *,
        is_main: bool,
    ) -> None:
        """``terms`` names the losses. Rows and scalars after ``first_step`` go: a run that was stopped later than it
        last saved left them."""
        self._path = folder / LOG_NAME
        self._terms = terms
        self._columns = ("step", "loss", *terms, *RUN_COLUMNS, *(f"validation_{metric}" for metric in METRICS))
        self._notice = notice
        self._is_on = is_main
        self._writer: Any = None
        if is_main:
            self._guarded(lambda: self._open(folder, first_step))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._guarded(self._writer.close)

    def row(self, step: int, figures: Mapping[str, float]) -> None:
        """Log figures, named as the columns, at a step."""
        self._guarded(lambda: self._append(step, figures))

    def picture(self, step: int, image: NDArray[np.uint8]) -> None:
        """Log a picture, uint8 [H,W,3]."""
        self._guarded(lambda: self._writer.add_image("samples", image, step, dataformats="HWC"))

    def _open(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = [row for row in _rows(self._path) if int(row["step"]) <= first_step]
        with atomic_write(self._path) as file:
            file.write(self._table(kept, header=True).encode())
        self._writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=first_step + 1)

    def _append(self, step: int, figures: Mapping[str, float]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(self._table([{"step": step, **figures}], header=False))
        for name, value in figures.items():
            section = "losses" if name in self._terms else "validation" if name.startswith("validation_") else "run"
            self._writer.add_scalar(f"{section}/{name.removeprefix('validation_')}", value, step)
        self._writer.flush()

    def _guarded(self, write: Callable[[], None]) -> None:
        if not self._is_on:
            return
        try:
            write()
        except (OSError, OutputError, ImageError) as error:
            self._is_on = False
            self._notice(f"the log {self._path} cannot be written ({error}); training goes on without it")

    def _table(self, rows: list[dict[str, Any]], *, header: bool) -> str:
        text = io.StringIO()
        table = csv.DictWriter(text, self._columns, lineterminator="\n", extrasaction="ignore")
        if header:
            table.writeheader()
        table.writerows(rows)
        return text.getvalue()


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a log; the last may be torn."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="") as file, contextlib.suppress(csv.Error):
        return [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit() and None not in row.values()]
    return []
