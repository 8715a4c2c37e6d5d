"""Writes the files beside the alphas: reports and the contact sheet."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from icm_cli.errors import UsageError
from icm_cli.files import Paths, as_path, as_paths, atomic_write, temporary_name, write_error, write_json
from icm_cli.reports.report import Report
from icm_cli.reports.result import METRICS, REGIONS, ImageResult

REPORT_SUFFIXES = (".csv", ".json", ".html")


def check_report_paths(paths: list[Path]) -> None:
    """Raises UsageError for a report of no known kind."""
    for path in paths:
        if path.suffix.lower() not in REPORT_SUFFIXES:
            raise UsageError(f"report {path} is none of {', '.join(REPORT_SUFFIXES)}; give the file one of these names")


@dataclass(frozen=True)
class SideOutputs:
    """The files beside the alphas."""

    reports: tuple[Path, ...]
    contact_sheet: Path | None = None
    references: Path | None = None
    """File for the references of an evaluation, for a later one."""

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
        real = {os.path.realpath(path) for path in taken} if self.paths else set()
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
            probe = folder / temporary_name()
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
                write_report(path, report)
        if self.contact_sheet and self.contact_sheet not in kept:
            from icm_cli.reports.contact_sheet import write_contact_sheet

            write_contact_sheet(self.contact_sheet, report)
        return kept


def write_report(path: Path, report: Report) -> None:
    """Write as .csv (one row per image), .json (everything), or .html (a page to read). Raises OutputError."""
    if path.suffix.lower() == ".json":
        write_json(path, report.as_dict())
    elif path.suffix.lower() == ".html":
        from icm_cli.reports.page import write_page

        write_page(path, report)
    else:
        _write_csv(path, report)


def _write_csv(path: Path, report: Report) -> None:
    columns = [each.name for each in dataclasses.fields(ImageResult) if each.name not in ("scores", "categories")]
    at = columns.index("was_resized")
    columns[at:at] = [f"{region}_{metric}" for region in REGIONS for metric in METRICS]
    protocol = report.settings.get("protocol", {})
    stated = {f"scored_{key}": protocol[key] for key in ("size", "lineage") if key in protocol}
    rows = [result.as_row() | stated for result in report.results]
    columns += sorted({column for row in rows for column in row} - set(columns))
    text = io.StringIO()
    table = csv.DictWriter(text, columns)
    table.writeheader()
    table.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode(errors="backslashreplace"))  # names need not be UTF-8
