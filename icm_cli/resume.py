"""Which alphas are already there: every PNG says what decided it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_cli.errors import ImageError
from icm_cli.ground_truth import GroundTruth
from icm_cli.images import read_stamp
from icm_cli.report import ImageResult
from icm_cli.sources import Job
from icm_cli.streams import read_ahead

DIGEST_KEY = "icm-digest"
SOURCE_KEY = "icm-source"
RESULT_KEY = "icm-result"


@dataclass(frozen=True)
class SourceState:
    """A source file's size in bytes and time of last change in nanoseconds."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> SourceState:
        """Raises ImageError for a file that is not there."""
        try:
            state = path.stat()
        except OSError as error:
            raise ImageError(f"{path} cannot be read: {error.strerror}") from error
        return cls(state.st_size, state.st_mtime_ns)

    def __str__(self) -> str:
        return f"{self.size} {self.mtime_ns}"


def stamp(digest: str, source: SourceState, measured: dict[str, Any]) -> dict[str, str]:
    """The text chunks of an alpha: the run's digest, the source's state, and what the report says of it."""
    return {DIGEST_KEY: digest, SOURCE_KEY: str(source), RESULT_KEY: json.dumps(measured)}


def finished(job: Job, digest: str) -> ImageResult | None:
    """The result of an earlier run that made this very alpha from this very source, None if it is to be made."""
    if not job.output.exists():
        return None
    found = read_stamp(job.output) or {}
    if found.get(DIGEST_KEY) != digest or found.get(SOURCE_KEY) != str(SourceState.of(job.source)):
        return None
    measured = json.loads(found.get(RESULT_KEY, "{}"))
    return ImageResult(str(job.source), str(job.output), "skipped", 0.0, **measured)


def keep_finished(
    jobs: Sequence[Job], digest: str, truth: GroundTruth, workers: int, on_result: Callable[[ImageResult], None]
) -> list[Job]:
    """Tell of every image whose alpha is there already; returns the others. Needs no model."""

    def look(job: Job) -> ImageResult | Job:
        try:
            earlier = finished(job, digest)
        except ImageError:
            return job  # the engine says what is wrong with it
        return truth.score(earlier, job) if earlier else job

    remaining = []
    with ThreadPoolExecutor(workers, "icm-look") as executor:
        for seen in read_ahead(executor, look, jobs, ahead=2 * workers):
            if isinstance(seen, Job):
                remaining.append(seen)
            else:
                on_result(seen)
    return remaining
