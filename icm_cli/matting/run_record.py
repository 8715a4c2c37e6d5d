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
from icm_cli.files.atomic_writes import atomic_write
from icm_cli.files.json_files import read_json, write_json
from icm_cli.files.paths import LIST_SUFFIXES, RECORD_FOLDER
from icm_cli.matting.jobs import Job
from icm_cli.matting.planning import SourceFilter, choose_output
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
RERUN_ADVICE = (
    "run the same icm matte command again: it keeps the alphas that are up to date, and records the run for icm review"
)


def record_run(options: MatteOptions, folder: Path, jobs: Sequence[Job], notice: Callable[[str], None]) -> None:
    """Write the record of a run into its output folder, or give a notice if that is not possible.

    A record must name all images of the folder. So an existing record stays if this run corrects only some of them:
    ``--src`` is a list whose lines contain the root, as ``--review-list`` writes it, or the run is a selection of the
    recorded one (see :func:`_is_part_of_recorded_run`).
    """
    values = recorded_values(options)
    if "root" not in values and _is_list(options.sources.src):
        values["root"] = jobs[0].root
        if values["root"] != str(Path.cwd()) and (folder / RECORD_FOLDER / RECORD_NAME).is_file():
            return
    try:
        if options.sources.src == "-":
            values["src"] = str(_write_sources(folder, jobs, is_part=bool(options.given & {"shard", "frames"})))
        elif _is_part_of_recorded_run(options, values, folder, jobs):
            return
        record = {"schema_version": SCHEMA_VERSION, "icm": __version__, "options": values}
        path = folder / RECORD_FOLDER / RECORD_NAME
        with contextlib.suppress(UsageError):  # a shard of another user may have written it
            if read_json(path, "run record", RECORD_SCHEMA, RERUN_ADVICE) == record:
                return
        write_json(path, record)
    except OutputError as error:
        notice(f"icm review will not be able to open this run: {error}")


def recorded_values(options: MatteOptions) -> dict[str, Any]:
    """Return the given options that decide which alphas a run makes, as JSON. Paths are absolute."""
    return {
        field.name: _to_recorded(field, options.get_value(field.name))
        for field in options.option_fields()
        if field.name in options.given and field.name not in UNRECORDED and field.group not in UNRECORDED_GROUPS
    }


def _is_part_of_recorded_run(
    options: MatteOptions, values: Mapping[str, Any], folder: Path, jobs: Sequence[Job]
) -> bool:
    """Return whether a run mattes a selection of the images of the recorded run, to the same paths in the folder.

    It has another ``include`` or ``exclude`` than the recorded run, or the source is a part of the recorded folder. The
    folder may have been copied or moved since the recorded run.
    """
    with contextlib.suppress(UsageError, OutputError):
        record = read_run_record(folder)
        earlier = recorded_values(record)
        changed = {name for name in {**values, **earlier} if values.get(name) != earlier.get(name)}
        if changed & {"name", "keep_suffix", "format"} or _out_pattern(options) != _out_pattern(record):
            return False
        if changed & {"src", "root"}:
            is_selection = _are_in_folder(jobs, earlier["src"], earlier.get("root", earlier["src"]))
        else:
            is_selection = bool(changed & {"include", "exclude"})
        source_filter = SourceFilter(earlier.get("include", ()), earlier.get("exclude", ()))
        return is_selection and all(source_filter.selects_name(job.name) for job in jobs)
    return False


def _out_pattern(options: MatteOptions) -> str:
    """Return the frame pattern of ``--out`` without its folder; "" if ``--out`` is a folder. Raises UsageError."""
    _, layout = choose_output(options.output)
    return "" if layout.pattern is None else Path(options.output.out).name


def _are_in_folder(jobs: Sequence[Job], folder: str, root: str) -> bool:
    """Return whether all files of the jobs are below a folder, and their names are relative to ``root``."""
    is_folder = os.path.isdir(folder)  # noqa: PTH112  Path.is_dir raises errors
    files = [path for job in jobs for path in job.files]
    return is_folder and jobs[0].root == root and all(Path(folder) in path.parents for path in files)


def _is_list(src: str) -> bool:
    return src == "-" or Path(src).suffix.lower() in LIST_SUFFIXES


def read_run_record(folder: Path) -> MatteOptions:
    """Return the options of the run that made the alphas in a folder. Raises UsageError."""
    path = folder / RECORD_FOLDER / RECORD_NAME
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; expected the folder with the alphas of a run, its --out")
    if not path.is_file():
        raise UsageError(
            f"{folder} is not the output folder of a run of icm matte ({path} does not exist); give the folder that "
            "was its --out. If icm 0.2.0 or earlier wrote alphas there, run the same command again first"
        )
    record = read_json(path, "run record", RECORD_SCHEMA, RERUN_ADVICE)
    if record["schema_version"] != SCHEMA_VERSION:
        raise UsageError(
            f"{path} has schema version {record['schema_version']}; this icm reads version {SCHEMA_VERSION}; "
            f"{RERUN_ADVICE}"
        )
    try:
        options = MatteOptions.from_values(record["options"], record["options"])
    except (TypeError, UsageError) as error:
        raise UsageError(f"{path} has an option that this icm cannot use: {error}; {RERUN_ADVICE}") from error
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
