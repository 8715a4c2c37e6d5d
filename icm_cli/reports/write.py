"""Write the report files of a run: reports, contact sheet and list of references."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from icm_cli.errors import OutputError, UsageError
from icm_cli.files.atomic_writes import atomic_write, check_writable
from icm_cli.files.digests import combined_digest
from icm_cli.files.json_files import write_json
from icm_cli.files.paths import LIST_SUFFIXES, RECORD_FOLDER, ROOT_MARK, describe_obstacle, is_file
from icm_cli.images.image_file import HEAD_BYTES, ICM_MASK_MARK, ICM_SHEET_MARK, detect_file_type
from icm_cli.reports.report import Report
from icm_cli.reports.result import COLUMNS, METRICS, REGIONS, ImageResult

REPORT_SUFFIXES = (".csv", ".json", ".html")
SHARDS_NAME = "shards"
"""Folder in RECORD_FOLDER of an output folder; see :meth:`ReportFiles.check_shard`."""
OWN_COLUMNS = frozenset({"source", "output", "status"})
"""Columns by which a CSV report of icm is recognised."""
OWN_KEYS = frozenset({"settings", "summary", "images"})
"""Keys by which a JSON report of icm is recognised."""
OWN_TITLE_END = " – icm</title>".encode()
FORMULA_START = re.compile(r"(?:^|(?<=;))(?=[\t\r\n]|[\s\x00-\x1f\u200b\ufeff]*[=+\-@＝＋－＠])")
"""Start of text that a spreadsheet may run as a formula, also after invisible characters.

Some spreadsheets separate columns by semicolons.
"""


@dataclass(frozen=True)
class ReportFiles:
    """Paths of the files that a run writes in addition to the alphas."""

    reports: tuple[Path, ...] = ()
    contact_sheet: Path | None = None
    references: Path | None = None
    """File that lists the references of an evaluation, for use in a later evaluation."""
    mask: Path | None = None
    """Mask of the reference."""
    review_list: Path | None = None
    """List of the images that a person should look at."""

    def __post_init__(self) -> None:
        """Raise UsageError for a path with the wrong suffix."""
        for path in self.reports:
            if path.suffix.lower() not in REPORT_SUFFIXES:
                raise UsageError(f"report {path} has an unknown suffix; expected one of {', '.join(REPORT_SUFFIXES)}")
        if self.contact_sheet and self.contact_sheet.suffix.lower() != ".png":
            raise UsageError(f"contact sheet {self.contact_sheet} is not a .png file; give it the suffix .png")
        if self.references and self.references.suffix.lower() != ".json":
            raise UsageError(f"references file {self.references} is not a .json file; give it the suffix .json")
        if self.review_list and self.review_list.suffix.lower() not in LIST_SUFFIXES:
            raise UsageError(
                f"review list {self.review_list} has an unknown suffix; expected one of "
                f"{', '.join(sorted(LIST_SUFFIXES))}, which --src reads as lists"
            )

    @property
    def paths(self) -> list[Path]:
        """All paths."""
        return [*self.reports, *filter(None, [self.contact_sheet, self.references, self.mask, self.review_list])]

    def check_no_overwrite(
        self, other_files: Sequence[str | Path], remedy: str | None = "give another name, or remove the file"
    ) -> None:
        """Raise UsageError for a path that the report cannot be written to.

        It may be a folder or the like, one of ``other_files``, given twice, or a file that icm did not write.
        ``remedy``: advice for a file that icm did not write; None: it may be replaced.
        """
        others = {os.path.realpath(path) for path in other_files} if self.paths else set()
        for number, path in enumerate(self.paths):
            if os.path.realpath(path) in {os.path.realpath(other) for other in self.paths[:number]}:
                raise UsageError(f"{path} is given for two outputs; give each output its own path")
            if obstacle := describe_obstacle(path):
                raise UsageError(f"{path} is {obstacle}; expected the path of a file")
            if os.path.realpath(path) in others:
                raise UsageError(
                    f"{path} is an input or an alpha of this run and would be overwritten; give another path"
                )
            if remedy is not None and is_file(path) and not self._is_own_file(path):
                kinds = {self.contact_sheet: "contact sheet", self.mask: "mask", self.review_list: "review list"}
                kind = kinds.get(path, "report")
                raise UsageError(f"{path} exists and is no {kind} that icm wrote; {remedy}")

    def check_writable(self, *folders: Path) -> None:
        """Create the folders. Raises OutputError if a file cannot be created in one of them."""
        for folder in {*folders, *(path.parent for path in self.paths)}:
            check_writable(folder)

    def check_shard(self, folder: Path, shard: tuple[int, int] | None) -> dict[Path, Path]:
        """Return the claims of a shard: files below the output folder that say which shard writes which report.

        A claim is empty while its shard runs. ``shard``: number and count; without, there are no claims. Raises
        UsageError if another shard of as many writes a report, or has written it.
        """
        number, count = shard or (0, 0)
        paths = {path for path in self.paths if path != self.mask} if shard else ()
        claims = {
            path: folder / RECORD_FOLDER / SHARDS_NAME / combined_digest(os.path.realpath(path)) for path in paths
        }
        for path, claim in claims.items():
            for other in claim.parent.glob(f"{claim.name}-*-{count}"):
                other_number = other.name.split("-")[1]
                if other_number != str(number) and (path.exists() or _is_running(other)):
                    raise UsageError(
                        f"{path} is given for shard {number}/{count}, and shard {other_number}/{count} writes it too; "
                        "give each shard its own path, such as one with the number of the shard"
                    )
        return {path: claim.with_name(f"{claim.name}-{number}-{count}") for path, claim in claims.items()}

    @contextlib.contextmanager
    def claim_for_shard(self, folder: Path, shard: tuple[int, int] | None) -> Iterator[None]:
        """Context of a run of a shard, in which other shards refuse to write its reports; see :meth:`check_shard`."""
        claims = self.check_shard(folder, shard)
        is_alone = False
        try:
            for claim in claims.values():
                with atomic_write(claim):
                    pass
            self.check_shard(folder, shard)  # if two shards start at once, at least one of them stops here
            is_alone = True
            yield
        finally:
            for path, claim in claims.items():
                with contextlib.suppress(OSError):
                    if is_alone and path.exists():
                        claim.write_bytes(b"ended")
                    else:
                        claim.unlink()

    def write_all(self, report: Report) -> list[str]:
        """Write the reports, the contact sheet and the review list, and return notices. Raises OutputError.

        An interrupted run does not replace existing files.
        """
        notices: list[str] = []
        errors: list[OutputError] = []
        for path in [*self.reports, *filter(None, [self.contact_sheet, self.review_list])]:
            try:
                if not report.is_complete and path.exists():
                    notices.append(f"{path} is unchanged, because this run was interrupted")
                elif path == self.review_list:
                    notices += write_review_list(path, report.to_review)
                else:
                    write_report(path, report)
            except OutputError as error:  # the other files are written
                errors.append(error)
        report.page_images.previews.clear()
        if errors:
            raise errors[0]
        return notices

    def _is_own_file(self, path: Path) -> bool:
        """Return whether a file is empty, or has the marks of a file that icm wrote. The suffix decides which marks."""
        suffix = path.suffix.lower()
        with contextlib.suppress(OSError, ValueError, RecursionError), path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return True
            if suffix == ".csv":
                columns = file.readline(1 << 20).decode("utf-8-sig").strip().split(",")
                return OWN_COLUMNS.issubset(columns)
            content = file.read()
            if suffix in LIST_SUFFIXES:
                lines = content.rstrip(b"\n").split(b"\n")
                return all(ROOT_MARK.encode() in line for line in lines)
            if suffix == ".png":
                mark = ICM_MASK_MARK if path == self.mask else ICM_SHEET_MARK
                return detect_file_type(content[:HEAD_BYTES]).name == "png" and mark in content[:HEAD_BYTES]
            if suffix == ".html":
                return OWN_TITLE_END in content
            value = json.loads(content)
            if path == self.references and isinstance(value, dict) and set(value) == {"references"}:
                return True
            return isinstance(value, dict) and OWN_KEYS.issubset(value)
        return False  # the file cannot be read, or it is not JSON


def _is_running(claim: Path) -> bool:
    """Return whether the shard of a claim runs: the claim is empty. A removed claim is not an error."""
    with contextlib.suppress(FileNotFoundError):
        return not claim.stat().st_size
    return False


def write_report(path: Path, report: Report) -> None:
    """Write a report as .csv (one row per image), .json (complete), .html (page) or .png (contact sheet).

    Raises OutputError.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        write_json(path, report.as_dict())
    elif suffix == ".html":
        from icm_cli.reports.page import write_page

        write_page(path, report)
    elif suffix == ".png":
        from icm_cli.reports.contact_sheet import write_contact_sheet

        write_contact_sheet(path, report)
    else:
        _write_csv(path, report)


def write_review_list(path: Path, results: Sequence[ImageResult]) -> list[str]:
    """Write the sources of results, each once, as lines of root, ROOT_MARK and path below the root.

    Returns notices. Raises OutputError.
    """
    lines = dict.fromkeys(_list_line(result) for result in results)
    unlisted = [line for line in lines if "\n" in line or line != line.strip()]
    with atomic_write(path) as file:
        file.write(b"".join(os.fsencode(line) + b"\n" for line in lines if line not in unlisted))
    if not unlisted:
        return []
    names = "1 image is" if len(unlisted) == 1 else f"{len(unlisted)} images are"
    return [f"{names} not in {path}, because a name has a line break or ends in a space, such as {unlisted[0]}"]


def _list_line(result: ImageResult) -> str:
    """Return the line of a result in a review list, such as "/plates/./sh010/a.png" for "sh010/a.png" in "/plates".

    A result's name is its path below the root, so the root is as many folders up as the name has parts.
    """
    source = Path(os.path.abspath(result.source))  # noqa: PTH100  resolve() would follow links
    root = source.parents[len(Path(result.name).parts) - 1]
    return f"{str(root).rstrip(os.sep)}{ROOT_MARK}{source.relative_to(root)}"


def _write_csv(path: Path, report: Report) -> None:
    """Write a table with one row per image. The scores are columns before ``was_resized``."""
    columns = list(COLUMNS)
    index = columns.index("was_resized")
    columns[index:index] = [f"{region}_{metric}" for region in REGIONS for metric in METRICS]
    scoring = {f"scored_{key}": report.protocol[key] for key in ("size", "metric_variant") if key in report.protocol}
    rows = [result.as_row() | scoring for result in report.results]
    further_columns = {column for row in rows for column in row} - set(columns)
    columns += sorted(further_columns)
    text = io.StringIO()
    table = csv.DictWriter(text, columns)
    table.writeheader()
    table.writerows({column: _escape_formula(value) for column, value in row.items()} for row in rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode(errors="backslashreplace"))  # names need not be UTF-8


def _escape_formula(value: object) -> object:
    """Return a cell in which text that a spreadsheet may run as a formula starts with an apostrophe."""
    return FORMULA_START.sub("'", value) if isinstance(value, str) else value
