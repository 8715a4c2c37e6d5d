"""The provenance: metadata in the file of an alpha that records its digest, its source and its result.

``docs/architecture.md`` lists its entries.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_cli.environment import __version__
from icm_cli.errors import ImageError
from icm_cli.files.atomic_writes import FileIdentity, identify_file
from icm_cli.files.json_files import check_schema
from icm_cli.files.paths import describe_obstacle, is_file
from icm_cli.images.decoding import open_image
from icm_cli.images.image_file import ICM_ALPHA_MARK
from icm_cli.images.writing import has_changed_pixels, read_provenance, set_provenance_entry
from icm_cli.matting.digest import AlphaDigest, code_fingerprint
from icm_cli.matting.jobs import OBSTACLE_ADVICE, Job
from icm_cli.reports.result import MattingDetails

DIGEST_KEY = "icm-digest"
VERSION_KEY = "icm-version"
PARTS_KEY = "icm-parts"
"""Provenance entry with :attr:`AlphaDigest.parts`, from which messages say what has changed."""
CODE_KEY = "icm-code"
SOURCE_KEY = "icm-source"
NAME_KEY = "icm-name"
ROOT_KEY = "icm-root"
CONTENT_KEY = "icm-sha256"
RESULT_KEY = "icm-result"
HINTS_KEY = "icm-hints"
"""Provenance entry of an alpha that follows hints: their digest."""
MEMORY_KEY = "icm-memory"
"""Provenance entry of a frame of a shot: digest of what is propagated from it. Absent if nothing is."""
PREDECESSORS_KEY = "icm-predecessors"
"""Provenance entry of a frame of a shot: a text for each earlier frame that was considered, nearest first.

The text is one of these:

- the value of MEMORY_KEY of the earlier frame;
- NO_MEMORY if nothing can be propagated from that frame; a digest of its files follows if it cannot be read;
- a digest of the name of the keyframe at which propagation starts, or NO_FRAME if it starts without one.

So an alpha depends only on its own files, its digest and these texts.
"""
NO_MEMORY = "-"
NO_FRAME = "."
ENTRY_DIGITS = 16
"""Number of hexadecimal digits of the digests in PREDECESSORS_KEY."""
REVIEWED_KEY = "icm-reviewed"
"""Provenance entry of an alpha that a person has accepted. Only ``--overwrite`` recomputes such an alpha."""
OPTIONAL_NUMBER = (float, int, type(None))
DETAILS_SCHEMA = {
    "colorspace?": str,
    "foreground?": OPTIONAL_NUMBER,
    "quality?": OPTIONAL_NUMBER,
    "reasons?": [str],
    "signals?": {"*": (float, int)},
    "not_found?": (bool, type(None)),
}
"""Schema of the values under RESULT_KEY; see :func:`icm_cli.files.json_files.check_schema`."""
RECORDED_DETAILS = tuple(name.removesuffix("?") for name in DETAILS_SCHEMA)
UNRECORDED_VERSION = "0.1"
"""Version of alphas that do not record one: those of icm 0.1.x."""


@dataclass(frozen=True)
class Origin:
    """The source of an alpha, as it was when the alpha was computed."""

    state: str
    """See :meth:`Job.state`."""
    content: str
    """SHA-256 of its files."""


def make_provenance(job: Job, digest: AlphaDigest, origin: Origin, details: MattingDetails) -> dict[str, str]:
    """Return the provenance of an alpha: what made it, its source, and its result.

    ``digest``: see :func:`icm_cli.matting.digest.alpha_digest`.
    """
    recorded = {name: getattr(details, name) for name in RECORDED_DETAILS}
    return {
        **({HINTS_KEY: job.hints_digest} if job.hints else {}),
        DIGEST_KEY: digest.value,
        PARTS_KEY: digest.parts,
        VERSION_KEY: __version__,
        CODE_KEY: code_fingerprint(),
        SOURCE_KEY: origin.state,
        NAME_KEY: escape_name(job.planned.name),
        ROOT_KEY: escape_name(job.root),
        CONTENT_KEY: origin.content,
        RESULT_KEY: json.dumps(recorded),
    }


def recorded_details(provenance: Mapping[str, str]) -> MattingDetails:
    """Return the details in the provenance of an alpha. Damaged values, and those of newer versions, are ignored."""
    details: dict[str, Any] = {}
    with contextlib.suppress(ValueError, RecursionError):
        recorded = json.loads(provenance.get(RESULT_KEY, "{}"))
        check_schema(recorded, DETAILS_SCHEMA, RESULT_KEY)
        _check_ranges(recorded)
        details = {name: value for name, value in recorded.items() if name in RECORDED_DETAILS}
        details["reasons"] = tuple(details.get("reasons", ()))
    return MattingDetails(
        seconds=0.0,
        made_by=provenance.get(VERSION_KEY, UNRECORDED_VERSION),
        reviewed=provenance.get(REVIEWED_KEY, ""),
        **details,
    )


def _check_ranges(recorded: Mapping[str, Any]) -> None:
    """Raise ValueError for a recorded fraction that is not in 0..1, or a signal that is not finite."""
    fractions = [recorded[name] for name in ("foreground", "quality") if recorded.get(name) is not None]
    are_fractions_valid = all(0 <= value <= 1 for value in fractions)
    are_signals_finite = all(map(math.isfinite, recorded.get("signals", {}).values()))
    if not (are_fractions_valid and are_signals_finite):
        raise ValueError


def escape_name(path: str) -> str:
    """Return a path as text that can be written to any file: bytes that are not UTF-8 are escaped."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


class OtherSourceError(ImageError):
    """An output path has an alpha of another source, or a file that icm did not write or that was retouched."""


def read_own_provenance(path: Path, job: Job) -> dict[str, str]:
    """Return the provenance of an output; {} if there is no file, or a damaged one of icm.

    Raises OtherSourceError for an alpha of another source, and for a file that icm did not write; and ImageError.
    """
    if what := describe_obstacle(path):
        raise OtherSourceError(f"{path} is {what}, and an alpha would be written there; {OBSTACLE_ADVICE}")
    if not is_file(path):
        return {}
    provenance = read_provenance(path)
    is_foreign = _is_foreign_file(path) if provenance is None else DIGEST_KEY not in provenance
    if is_foreign:
        raise OtherSourceError(
            f"{path} is not an alpha of icm, or another program removed its metadata; it would be overwritten; "
            f"{_keep_advice(job)}"
        )
    if not provenance or NAME_KEY not in provenance:
        return {}
    is_same_root = provenance.get(ROOT_KEY) == escape_name(job.root)
    is_same_name = provenance[NAME_KEY] == escape_name(job.planned.name)
    if not (is_same_name and (is_same_root or provenance.get(CONTENT_KEY) == job.content_digest())):
        raise OtherSourceError(
            f"{path} is the alpha of {provenance.get(ROOT_KEY)}/{provenance[NAME_KEY]} and would be overwritten by "
            f"that of {job.source}; give another --out or --name, or --overwrite to replace it"
        )
    return provenance


def _is_foreign_file(path: Path) -> bool:
    """Return whether another program wrote a file without provenance, by its first bytes. An empty file is not foreign.

    Raises ImageError.
    """
    with open_image(path) as file:
        return file.size_bytes > 0 and not (file.type.is_icm_output and ICM_ALPHA_MARK in file.head)


def mark_reviewed(job: Job, stamp: str | None) -> None:
    """Mark the outputs of a job as reviewed, without changing their pixels. The alpha is marked after its trimap.

    ``stamp``: how and when, see :class:`MattingDetails`; None removes the mark. Raises ImageError if there is no alpha
    of this job, and OutputError.
    """
    if not read_own_provenance(job.output, job):
        raise ImageError(f"{job.source} has no complete alpha at {job.output}; run icm matte again, or correct it")
    for path in reversed(job.outputs):
        if read_own_provenance(path, job):
            set_provenance_entry(path, REVIEWED_KEY, stamp)


def file_identities(job: Job) -> dict[Path, FileIdentity]:
    """Return the identities of the outputs that exist."""
    return {path: identity for path in job.outputs if (identity := identify_file(path)) is not None}


def check_unchanged(path: Path, job: Job, digest: str, replaceable: Mapping[Path, FileIdentity]) -> None:
    """Raise OtherSourceError if an output must not be replaced, because its file has changed during this run.

    Examples: another run has written it, a person has reviewed it, or a folder is there now.

    ``replaceable``: identities of the outputs that this run may replace. A newer output may be replaced too if it is
    damaged, or if it has the same source and ``digest`` as the new one.
    """
    current = file_identities(job).get(path)
    if current == replaceable.get(path) and not describe_obstacle(path):
        return
    provenance = read_own_provenance(path, job)  # raises errors for folders and for files of others
    if provenance and has_changed_pixels(path, provenance):
        raise retouched_error(path, job)
    if REVIEWED_KEY in provenance:
        raise OtherSourceError(f"{path} was reviewed during this run, and is not overwritten")
    if provenance and provenance[DIGEST_KEY] != digest:
        raise OtherSourceError(
            f"{path} was written by another run with other settings during this run, and is not overwritten; "
            "run again when the other run has ended"
        )


def retouched_error(path: Path, job: Job) -> OtherSourceError:
    """Return the error for an output of a job whose pixels another program has changed."""
    return OtherSourceError(f"{path} was changed after icm wrote it and would be overwritten; {_keep_advice(job)}")


def _keep_advice(job: Job) -> str:
    return (
        "give another folder or name; with icm matte, --overwrite replaces this file, and "
        f"--exclude {job.name.name} keeps it"
    )
