"""Resume: every alpha says what decided it, so those that are there already are found, and none is overwritten."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from icm_cli.errors import ImageError
from icm_cli.images.decoding import SourceFile
from icm_cli.images.reading import read_stored_pixels
from icm_cli.images.writing import read_stamp
from icm_cli.matting.jobs import Job
from icm_cli.reports.result import ImageResult, MattingDetails

DIGEST_KEY = "icm-digest"
SOURCE_KEY = "icm-source"
NAME_KEY = "icm-name"
ROOT_KEY = "icm-root"
CONTENT_KEY = "icm-sha256"
RESULT_KEY = "icm-result"


class OtherSourceError(ImageError):
    """An output holds the alpha of another source, or a picture that is not of icm."""


@dataclass(frozen=True)
class Origin:
    """State of a source when it was read."""

    state: str
    content: str
    """SHA-256 of its file."""


def stamp(job: Job, digest: str, origin: Origin, measured: dict[str, Any]) -> dict[str, str]:
    """The text chunks of an alpha: the run's digest, its source and the source's state, and what the report says."""
    return {
        DIGEST_KEY: digest,
        SOURCE_KEY: origin.state,
        NAME_KEY: _text(job.planned.name),
        ROOT_KEY: _text(job.root),
        CONTENT_KEY: origin.content,
        RESULT_KEY: json.dumps(measured),
    }


def finished(job: Job, digest: str) -> ImageResult | None:
    """The result of an earlier run that made this very alpha from this very source, None if it is to be made.

    A source is another one where its name below the root is another; or where the root is another folder and the file
    another too. Raises OtherSourceError for an alpha of such a one, and ImageError where the source cannot be read.
    """
    stamps = [_own_stamp(path, job) for path in job.outputs]
    found = stamps[0]
    if not found or not all(path.exists() for path in job.outputs):
        return None
    is_same_root = found.get(ROOT_KEY) == _text(job.root)
    if found.get(DIGEST_KEY) != digest or (is_same_root and found.get(SOURCE_KEY) != job.state()):
        return None
    measured = json.loads(found.get(RESULT_KEY, "{}"))
    return replace(job.planned, status="kept", matting=MattingDetails(seconds=0.0, **measured))


def _own_stamp(path: Path, job: Job) -> dict[str, str]:
    """The stamp of a file that an earlier run made for this source, {} where there is none, or a damaged one.

    Raises OtherSourceError for a whole picture that is of another source, or not of icm.
    """
    if not path.is_file():
        return {}
    found = read_stamp(path)
    is_foreign = DIGEST_KEY not in found if found is not None else _is_picture_of_another(path)
    if is_foreign:
        raise OtherSourceError(
            f"{path} was not made by icm and would be written over; give another folder or name, or, to icm matte, "
            f"--overwrite to replace it or --exclude {job.name.name} to keep it"
        )
    if not found or NAME_KEY not in found:
        return {}
    is_same_root = found.get(ROOT_KEY) == _text(job.root)
    is_same = found[NAME_KEY] == _text(job.planned.name) and (
        is_same_root or found.get(CONTENT_KEY) == job.content_digest()
    )
    if not is_same:
        earlier = f"{found.get(ROOT_KEY)}/{found[NAME_KEY]}"
        raise OtherSourceError(
            f"{path} is the alpha of {earlier}, and {job.source} would be written over it; give another --out "
            "or --name, or --overwrite to replace it"
        )
    return found


def _is_picture_of_another(path: Path) -> bool:
    """Whether a file is a whole picture without icm's stamp; what is damaged may be made again."""
    try:
        if SourceFile.inspect(path).type.is_icm_output:
            return False
        read_stored_pixels(path)
    except (ImageError, OSError):
        return False
    return True


def _text(path: str) -> str:
    """A path as text that any file can hold; bytes that are no UTF-8 are escaped."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")
