"""Resume: every alpha says what decided it, so those that are there already are found."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from icm_cli.images.writing import read_stamp
from icm_cli.matting.jobs import Job
from icm_cli.reports.result import ImageResult

DIGEST_KEY = "icm-digest"
SOURCE_KEY = "icm-source"
RESULT_KEY = "icm-result"


def stamp(digest: str, source_state: str, measured: dict[str, Any]) -> dict[str, str]:
    """The text chunks of an alpha: the run's digest, the source's state, and what the report says of it."""
    return {DIGEST_KEY: digest, SOURCE_KEY: source_state, RESULT_KEY: json.dumps(measured)}


def finished(job: Job, digest: str, *, has_trimap: bool = False) -> ImageResult | None:
    """The result of an earlier run that made this very alpha from this very source, None if it is to be made."""
    if not job.output.exists() or (has_trimap and not job.trimap.exists()):
        return None
    found = read_stamp(job.output) or {}
    if found.get(DIGEST_KEY) != digest or found.get(SOURCE_KEY) != job.state():
        return None
    measured = json.loads(found.get(RESULT_KEY, "{}"))
    return replace(job.planned, status="skipped", seconds=0.0, **measured)
