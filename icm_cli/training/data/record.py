"""The record of the files that a run trains on, in its folder. A resumed run detects by it that data changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from icm_cli.files import combined_digest, write_json

RECORD_NAME = "data.json"
MAX_LISTED_FILES = 3
"""Number of files of each kind of change that a message names."""


@dataclass(frozen=True)
class FileState:
    """Size in bytes, modification time in ns and SHA-256 of a file; the SHA-256 is "" if it cannot be read."""

    size: int
    mtime_ns: int
    sha256: str


class DataRecord:
    """The state of every file of the training data, by path."""

    def __init__(self, states: Mapping[str, FileState]) -> None:
        self.states = dict(states)

    @classmethod
    def load(cls, folder: Path) -> DataRecord | None:
        """Read the record of a run's folder; None if there is none, or if it is damaged."""
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            stored = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
            return cls({path: FileState(**state) for path, state in stored.items()})
        return None

    @classmethod
    def from_files(
        cls, paths: Iterable[Path], earlier: DataRecord | None, notice: Callable[[str], None] = lambda _: None
    ) -> DataRecord:
        """Record files. Only those whose size or time differs from the ``earlier`` record are read.

        Files that cannot be read are reported with ``notice``.
        """
        known = {} if earlier is None else earlier.states
        states = {}
        for path in paths:
            try:
                stat = path.stat()
                state = known.get(str(path))
                if state is None or (stat.st_size, stat.st_mtime_ns) != (state.size, state.mtime_ns):
                    with path.open("rb") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                    state = FileState(stat.st_size, stat.st_mtime_ns, digest)
            except OSError as error:
                notice(f"{path} cannot be read ({error.strerror}), so its content is not recorded")
                state = FileState(0, 0, "")
            states[str(path)] = state
        return cls(states)

    def save(self, folder: Path) -> None:
        """Write the record to a run's folder, atomically. Raises OutputError."""
        write_json(folder / RECORD_NAME, {path: asdict(state) for path, state in self.states.items()})

    @property
    def digest(self) -> str:
        """Digest of the paths and contents of all files."""
        return combined_digest(*(part for path, state in sorted(self.states.items()) for part in (path, state.sha256)))

    def list_changes(self, now: DataRecord) -> str:
        """Describe which files changed, were added or were removed until ``now``; "" if none did."""
        before, after = self.states, now.states
        changes = {
            "changed": [path for path in before if path in after and before[path].sha256 != after[path].sha256],
            "added": [path for path in after if path not in before],
            "removed": [path for path in before if path not in after],
        }
        return ", ".join(f"{len(paths)} {kind} ({_list_first(paths)})" for kind, paths in changes.items() if paths)


def _list_first(paths: list[str]) -> str:
    more = len(paths) - MAX_LISTED_FILES
    return ", ".join(paths[:MAX_LISTED_FILES]) + (f" and {more} more" if more > 0 else "")
