"""The run record ``.icm/run.json`` of an output folder: options from which ``icm review`` finds the images again."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from icm_cli.environment import __version__
from icm_cli.errors import OutputError, UsageError
from icm_cli.files import LIST_SUFFIXES, RECORD_FOLDER, atomic_write, read_json, write_json
from icm_cli.matting.jobs import Job
from icm_cli.options import MatteOptions
from icm_cli.options.definition import OptionField

RECORD_NAME, SOURCES_NAME = "run.json", "sources.txt"
SCHEMA_VERSION = 1
RECORD_SCHEMA = {"schema_version": int, "icm": str, "options": {}}
UNRECORDED_GROUPS = frozenset({"reports", "display"})
UNRECORDED = frozenset(
    {"shard", "frames", "missing", "overwrite", "keep_existing", "fail_fast", "ray", "ray_cpus", "save_mask"}
)
"""Options that are not recorded, because they select a part of the images or concern a single run only."""
RERUN = (
    "run the same icm matte command again: it keeps the alphas that are up to date, and records the run for icm review"
)


def record_run(options: MatteOptions, folder: Path, jobs: Sequence[Job], notice: Callable[[str], None]) -> None:
    """Write the record of a run into its output folder, or give a notice if that is not possible.

    An existing record stays if ``--src`` is a list whose lines contain the root, as ``--review-list`` writes it. Such a
    run corrects a part of the images, and the record must name all of them. For the same reason, the record keeps the
    sources of earlier runs that this run does not matte (see :func:`_join_sources`).
    """
    if not jobs:
        return
    values = recorded_values(options)
    if "root" not in values and _is_list(options.sources.src):
        values["root"] = jobs[0].root
        if values["root"] != str(Path.cwd()) and (folder / RECORD_FOLDER / RECORD_NAME).is_file():
            return
    try:
        if options.sources.src == "-":
            values["src"] = str(_write_sources(folder, jobs, is_part=bool(options.given & {"shard", "frames"})))
        values = _join_sources(values, folder, jobs[0].root)
        record = {"schema_version": SCHEMA_VERSION, "icm": __version__, "options": values}
        write_json(folder / RECORD_FOLDER / RECORD_NAME, record)
    except OutputError as error:
        notice(f"icm review will not be able to open this run: {error}")


def recorded_values(options: MatteOptions) -> dict[str, Any]:
    """Return the given options that decide which alphas a run makes, as JSON. Paths are absolute."""
    return {
        field.name: _to_recorded(field, options.get_value(field.name))
        for field in options.option_fields()
        if field.name in options.given and field.name not in UNRECORDED and field.group not in UNRECORDED_GROUPS
    }


def _join_sources(values: dict[str, Any], folder: Path, root: str) -> dict[str, Any]:
    """Return the options of a run with sources that include those of the recorded run.

    Both must have the same root and the same output paths. If the recorded run matted a folder, and this one only some
    of its files, the record keeps the folder. ``include`` and ``exclude`` are joined, so that no image of either run is
    excluded. ``root``: root of the sources of this run.
    """
    with contextlib.suppress(UsageError, OutputError):
        options = read_run_record(folder)
        earlier = recorded_values(options)
        is_folder = os.path.isdir(earlier["src"])  # noqa: PTH112  Path.is_dir raises errors
        is_part_of_folder = (
            is_folder and values["src"] != earlier["src"] and earlier.get("root", earlier["src"]) == root
        )
        same = ("out", "name", "keep_suffix", "format", *(() if is_part_of_folder else ("src", "root")))
        if any(values.get(name) != earlier.get(name) for name in same):
            return values
        filters = {
            "include": _join_includes(earlier, values),
            "exclude": [glob for glob in values.get("exclude", ()) if glob in earlier.get("exclude", ())],
        }
        joined = {name: value for name, value in values.items() if name not in ("src", "root", *filters)}
        joined.update((name, earlier[name]) for name in ("src", "root") if name in earlier)
        joined.update((name, globs) for name, globs in filters.items() if globs)
        return joined
    return values


def _join_includes(earlier: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Return the globs of ``include`` of both runs; none if one of them has none, as it matted all images."""
    if not (earlier.get("include") and values.get("include")):
        return []
    return list(dict.fromkeys([*earlier["include"], *values["include"]]))


def _is_list(src: str) -> bool:
    return src == "-" or Path(src).suffix.lower() in LIST_SUFFIXES


def read_run_record(folder: Path) -> MatteOptions:
    """Return the options of the run that made the alphas in a folder. Raises UsageError."""
    path = folder / RECORD_FOLDER / RECORD_NAME
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; expected the folder with the alphas of a run, its --out")
    if not path.is_file():
        raise UsageError(f"{folder} has no record of its run ({path} does not exist); {RERUN}")
    record = read_json(path, "run record", RECORD_SCHEMA, RERUN)
    if record["schema_version"] != SCHEMA_VERSION:
        raise UsageError(
            f"{path} has schema version {record['schema_version']}; this icm reads version {SCHEMA_VERSION}; {RERUN}"
        )
    try:
        options = MatteOptions.from_values(record["options"], record["options"])
    except (TypeError, UsageError) as error:
        raise UsageError(f"{path} has an option that this icm cannot use: {error}; {RERUN}") from error
    return options


def command_line(options: MatteOptions) -> str:
    """Return the ``icm matte`` command for the options that were given, as text for a shell."""
    words = ["icm", "matte"]
    for field in options.option_fields():
        if field.name not in options.given:
            continue
        values = options.get_value(field.name) if field.is_repeatable else [options.get_value(field.name)]
        for value in values:
            if field.value_type is bool:
                words += [field.flag] if value else []
            elif isinstance(value, tuple):
                words += [field.flag, ",".join(f"{number:g}" for number in value)]
            else:
                words += [field.flag, str(value)]
    return shlex.join(words)


def _to_recorded(field: OptionField, value: Any) -> Any:
    """Return the value of an option as JSON."""
    if field.is_repeatable:
        return [_to_recorded_item(field, item) for item in value]
    return _to_recorded_item(field, value)


def _to_recorded_item(field: OptionField, value: Any) -> Any:
    """Return one value as JSON. Paths become absolute. A value that may be a name is a path only if that exists."""
    if isinstance(value, tuple):
        return list(value)
    may_be_name = field.name in ("model", "weights", "ocio")
    if not field.is_path or value == "-" or (may_be_name and not os.path.exists(value)):  # noqa: PTH110
        return value
    return os.path.abspath(value)  # noqa: PTH100  resolve() follows links


def _write_sources(folder: Path, jobs: Sequence[Job], *, is_part: bool) -> Path:
    """Write a list of the sources that were read from standard input (``--src -``), and return its path.

    ``is_part``: whether this run mattes only some of them. Then the sources of earlier runs stay in the list.
    """
    path = Path(os.path.abspath(folder)) / RECORD_FOLDER / SOURCES_NAME  # noqa: PTH100
    before = path.read_bytes().splitlines() if is_part and path.is_file() else []
    sources = [os.fsencode(os.path.abspath(source)) for job in jobs for source in job.files]  # noqa: PTH100
    with atomic_write(path) as file:
        file.writelines(line + b"\n" for line in dict.fromkeys([*before, *sources]))
    return path
