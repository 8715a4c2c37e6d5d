"""``--dry-run``: what a run would do with each image, found without decoding or writing anything."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from dataclasses import replace
from pathlib import Path

from icm_cli.errors import FileAccessError, ImageError, OutputError
from icm_cli.files.atomic_writes import check_would_be_writable
from icm_cli.files.paths import is_file, is_too_long, special_file_kind
from icm_cli.files.system_errors import error_for_failed_write
from icm_cli.images.decoding import SourceFile, image_windows
from icm_cli.images.image_file import EMPTY_FILE, movie_message
from icm_cli.matting.hint_files import MAX_CHECKED_PIXELS
from icm_cli.matting.jobs import Job
from icm_cli.reports.result import ImageResult


def planned_result(job: Job, reason: str = "", *, is_output_read: bool = True) -> ImageResult:
    """Return the result of a job in a dry run.

    ``reason``: why its alpha is recomputed; "" for a new one. ``is_output_read``: whether a run would read the alpha.
    """
    if problem := _find_problem(job) or _find_problem_of_outputs(job, is_read=is_output_read):
        return replace(job.planned, status="failed", reason=problem)
    return replace(job.planned, reason=reason)


def find_damage(job: Job) -> str:
    """Return why the existing alpha of a job is not complete."""
    return "its alpha is damaged or incomplete" if all(map(os.path.lexists, job.outputs)) else "it has no trimap"


def _find_problem_of_guidance(job: Job) -> str:
    """Return why a job would fail because of its hints or mattes, by the header of its image; "" if this is unknown."""
    windows = None
    with contextlib.suppress(ImageError):  # is reported when the image is matted
        windows = image_windows(job.header_file) if job.header_file and (job.hints or job.mattes) else None
    try:
        if job.mattes:
            job.mattes.check(windows)
        if job.hints and windows and math.prod(windows.display) <= MAX_CHECKED_PIXELS:
            job.hints.read(windows)
    except ImageError as error:
        return str(error)
    return ""


def _find_problem(job: Job) -> str:
    """Return why a job would fail, as far as this is known without decoding the image; "" if no reason is known."""
    source, inspected = job.source, job.inspected
    assert isinstance(source, Path)
    if not os.path.exists(source):  # noqa: PTH110  Path.exists raises errors
        return f"{source} does not exist"
    if kind := special_file_kind(source.stat().st_mode):
        return f"{source} is {kind}; expected an image file"
    if source.is_file() and source.stat().st_size == 0:
        return f"{source} {EMPTY_FILE}"
    if inspected is not None and inspected.type.is_movie:
        return f"{source}: {movie_message(source)}"
    if inspected is not None and inspected.error is not None and not inspected.error.is_transient:
        return str(inspected.error)
    return _find_problem_of_guidance(job)


def _find_problem_of_outputs(job: Job, *, is_read: bool) -> str:
    """Return why the outputs of a job could not be written, or read with ``is_read``; "" if no reason is known."""
    try:
        for path in job.outputs:
            if is_too_long(os.fsencode(path)):
                raise error_for_failed_write(path, OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG)))
            check_would_be_writable(path.parent)
            if is_read and is_file(path) and (error := SourceFile.inspect(path).error):
                raise error
    except (OutputError, FileAccessError) as error:
        return str(error)
    return ""
