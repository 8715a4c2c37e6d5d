"""Resuming: alphas record what made them, so that later runs can keep or recompute them."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from icm_cli.environment import __version__
from icm_cli.errors import FileAccessError, ImageError, UsageError
from icm_cli.images.decoding import SourceFile
from icm_cli.images.reading import read_stored_pixels
from icm_cli.images.writing import read_stamp
from icm_cli.matting.digest import code_fingerprint
from icm_cli.matting.jobs import Job
from icm_cli.matting.sources import MAX_LISTED_FILES
from icm_cli.reports.result import ImageResult, MattingDetails

DIGEST_KEY = "icm-digest"
VERSION_KEY = "icm-version"
CODE_KEY = "icm-code"
SOURCE_KEY = "icm-source"
NAME_KEY = "icm-name"
ROOT_KEY = "icm-root"
CONTENT_KEY = "icm-sha256"
RESULT_KEY = "icm-result"
UNRECORDED_VERSION = "0.1"
"""Version of alphas that do not record one: those of icm 0.1.x."""


class OtherSourceError(ImageError):
    """An output file is the alpha of another source, or an image that icm did not write."""


@dataclass(frozen=True)
class Origin:
    """The source of an alpha at the time when it was read."""

    state: str
    content: str
    """SHA-256 of its files."""


@dataclass(frozen=True)
class ExistingAlpha:
    """A complete alpha that an earlier run made for the source of a job."""

    result: ImageResult
    """Result if the alpha is kept."""
    digest: str
    version: str
    """Version of icm that made it."""
    code: str
    """Fingerprint of the code that made it; "" if it is not recorded."""
    is_of_same_state: bool
    """Whether the source has the same state as when the alpha was made."""
    content: str
    """SHA-256 of the source's files when the alpha was made."""

    @property
    def is_of_this_icm(self) -> bool:
        """Whether this version of icm, with this code, made it."""
        return self.version == __version__ and self.code == code_fingerprint()

    def can_be_kept(self, job: Job, digest: str, *, keep_all: bool) -> bool:
        """Return whether the alpha is up to date, or with ``keep_all`` of the same source."""
        if keep_all:
            return self.is_of_same_state or self.content == job.content_digest()
        return self.is_of_same_state and self.digest == digest


def make_stamp(job: Job, digest: str, origin: Origin, measured: dict[str, Any]) -> dict[str, str]:
    """Return the metadata of an alpha: what made it, its source, and its result."""
    return {
        DIGEST_KEY: digest,
        VERSION_KEY: __version__,
        CODE_KEY: code_fingerprint(),
        SOURCE_KEY: origin.state,
        NAME_KEY: _to_text(job.planned.name),
        ROOT_KEY: _to_text(job.root),
        CONTENT_KEY: origin.content,
        RESULT_KEY: json.dumps(measured),
    }


def find_kept_result(job: Job, digest: str, *, keep_all: bool = False) -> ImageResult | None:
    """Return the result of an existing alpha that is kept; None if the job has to be done.

    ``keep_all``: keep every alpha of icm that was made from the same source. Raises
    OtherSourceError if the output is the alpha of another source, and ImageError if the source
    cannot be read.
    """
    existing = read_existing_alpha(job)
    return existing.result if existing and existing.can_be_kept(job, digest, keep_all=keep_all) else None


def keep_existing_alphas(
    jobs: Sequence[Job],
    digest_for: Callable[[Job], str],
    *,
    workers: int,
    on_result: Callable[[ImageResult], None],
    notice: Callable[[str], None],
    keep_all: bool = False,
    hint: str = "",
    reusable_outputs: Callable[[Collection[Path]], set[Path]] | None = None,
) -> list[Job]:
    """Report the images whose alpha is kept, and return the other jobs. Needs no model.

    A notice counts the alphas that another version of icm made; ``hint`` is added to it.
    ``reusable_outputs`` returns those of the outputs that depend on no other job, because frames of
    a shot depend on frames before them; with ``keep_all`` all are kept. Raises UsageError, before
    anything is reported, if an output is the alpha of another source.
    """

    def inspect(job: Job) -> tuple[ExistingAlpha | OtherSourceError | None, bool]:
        try:
            existing = read_existing_alpha(job)
            return existing, existing is not None and existing.can_be_kept(job, digest_for(job), keep_all=keep_all)
        except OtherSourceError as error:
            return error, False
        except ImageError:
            return None, False  # the engine reports it

    with ThreadPoolExecutor(workers, "icm-inspect") as executor:
        inspected = list(zip(jobs, executor.map(inspect, jobs), strict=True))
    _refuse_conflicts([existing for _, (existing, _) in inspected if isinstance(existing, OtherSourceError)])
    kept = {job.output for job, (_, is_kept) in inspected if is_kept}
    if reusable_outputs is not None and not keep_all:
        kept = reusable_outputs(kept)
    existing_alphas = [(job, existing) for job, (existing, _) in inspected if isinstance(existing, ExistingAlpha)]
    for job, existing in existing_alphas:
        if job.output in kept:
            on_result(existing.result)
    outdated = [existing for job, existing in existing_alphas if job.output not in kept]
    versions = Counter(_version_text(existing) for existing in outdated if not existing.is_of_this_icm)
    if versions:
        counts = ", ".join(f"{version}: {count}" for version, count in sorted(versions.items()))
        notice(f"{versions.total()} alpha(s) were made by another version of icm ({counts}) and are recomputed{hint}")
    return [job for job in jobs if job.output not in kept]


def _refuse_conflicts(conflicts: Sequence[OtherSourceError]) -> None:
    """Raise UsageError if there are outputs that belong to other sources."""
    if conflicts:
        more = f"; and {len(conflicts) - MAX_LISTED_FILES} more" if len(conflicts) > MAX_LISTED_FILES else ""
        raise UsageError("; ".join(map(str, conflicts[:MAX_LISTED_FILES])) + more)


def read_existing_alpha(job: Job) -> ExistingAlpha | None:
    """Return the alpha that an earlier run made for a job; None without one, or if it is damaged.

    Another source is one with another name below the root; or with another root and other content.
    Raises OtherSourceError if the output belongs to one, and ImageError if the source cannot be
    read.
    """
    stamps = [_read_own_stamp(path, job) for path in job.outputs]
    stamp = stamps[0]
    if not stamp or not all(path.exists() for path in job.outputs):
        return None
    is_same_root = stamp.get(ROOT_KEY) == _to_text(job.root)
    version = stamp.get(VERSION_KEY, UNRECORDED_VERSION)
    return ExistingAlpha(
        replace(job.planned, status="kept", matting=_recorded_details(stamp, version)),
        stamp[DIGEST_KEY],
        version,
        stamp.get(CODE_KEY, ""),
        not is_same_root or stamp.get(SOURCE_KEY) == job.state(),  # under another root the content was compared
        stamp.get(CONTENT_KEY, ""),
    )


def _recorded_details(stamp: dict[str, str], version: str) -> MattingDetails:
    """Return the details that an alpha records, except those unknown to this version."""
    known = {field.name for field in dataclasses.fields(MattingDetails)} - {"seconds", "made_by"}
    recorded = json.loads(stamp.get(RESULT_KEY, "{}"))
    details = {name: value for name, value in recorded.items() if name in known}
    return MattingDetails(seconds=0.0, made_by=version, **details)


def _version_text(existing: ExistingAlpha) -> str:
    return f"{existing.version} with other code" if existing.version == __version__ else existing.version


def _read_own_stamp(path: Path, job: Job) -> dict[str, str]:
    """Return the metadata of an output, {} if it does not exist or is damaged.

    Raises OtherSourceError for a complete image of another source, or one that icm did not write.
    """
    if not path.is_file():
        return {}
    stamp = read_stamp(path)
    is_foreign = DIGEST_KEY not in stamp if stamp is not None else _is_foreign_image(path)
    if is_foreign:
        raise OtherSourceError(
            f"{path} was not made by icm and would be overwritten; give another folder or name, or, to icm matte, "
            f"--overwrite to replace it or --exclude {job.name.name} to keep it"
        )
    if not stamp or NAME_KEY not in stamp:
        return {}
    is_same_root = stamp.get(ROOT_KEY) == _to_text(job.root)
    is_same_name = stamp[NAME_KEY] == _to_text(job.planned.name)
    if not (is_same_name and (is_same_root or stamp.get(CONTENT_KEY) == job.content_digest())):
        raise OtherSourceError(
            f"{path} is the alpha of {stamp.get(ROOT_KEY)}/{stamp[NAME_KEY]} and would be overwritten by that of "
            f"{job.source}; give another --out or --name, or --overwrite to replace it"
        )
    return stamp


def _is_foreign_image(path: Path) -> bool:
    """Return whether a file is a complete image that icm did not write."""
    try:
        if SourceFile.inspect(path).type.is_icm_output:
            return False
        read_stored_pixels(path)
    except FileAccessError:
        raise
    except ImageError:
        return False
    return True


def _to_text(path: str) -> str:
    """Return a path as text for any file; bytes that are not UTF-8 are escaped."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")
