"""Which alphas are already there: every PNG says what decided it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from icm_cli.errors import ImageError
from icm_cli.images import read_stamp
from icm_cli.report import ImageResult
from icm_cli.sources import Job
from icm_cli.streams import read_ahead

DIGEST_KEY = "icm-digest"
SOURCE_KEY = "icm-source"
RESULT_KEY = "icm-result"


def stamp(digest: str, source_state: str, measured: dict[str, Any]) -> dict[str, str]:
    """The text chunks of an alpha: the run's digest, the source's state, and what the report says of it."""
    return {DIGEST_KEY: digest, SOURCE_KEY: source_state, RESULT_KEY: json.dumps(measured)}


def finished(job: Job, digest: str) -> ImageResult | None:
    """The result of an earlier run that made this very alpha from this very source, None if it is to be made."""
    if not job.output.exists():
        return None
    found = read_stamp(job.output) or {}
    if found.get(DIGEST_KEY) != digest or found.get(SOURCE_KEY) != job.state():
        return None
    measured = json.loads(found.get(RESULT_KEY, "{}"))
    return replace(job.planned, status="skipped", seconds=0.0, **measured)


def keep_finished(
    jobs: Sequence[Job], digests: Sequence[str], workers: int, on_result: Callable[[ImageResult], None]
) -> list[Job]:
    """Tell of every image whose alpha is there already; returns the others. Needs no model.

    ``digests``: of all that decides an alpha beside its source, one for each example.
    """

    def look(job: Job) -> ImageResult | Job:
        try:
            return finished(job, digests[job.example]) or job
        except ImageError:
            return job  # the engine says what is wrong with it

    remaining = []
    with ThreadPoolExecutor(workers, "icm-look") as executor:
        for seen in read_ahead(executor, look, jobs, ahead=2 * workers):
            if isinstance(seen, Job):
                remaining.append(seen)
            else:
                on_result(seen)
    return remaining
