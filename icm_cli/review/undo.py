"""Copies of the files that a change of an image replaces, from which the change can be undone.

Their entry in the state of the review is saved before any file is changed, so that a process that is killed in between
loses nothing: undo then restores what is there already.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from icm_cli.errors import IcmError
from icm_cli.files import atomic_write, describe_os_error, error_for_failed_write, identify_file

UNDO_NAME = "undo"
Entry: TypeAlias = dict[str, Any]
"""What is stored about a change: its folder of copies, the status before it, the files it replaces, each with the name
of its copy or None, and the identity of the alpha that it wrote."""


class UndoCopies:
    """The copies of earlier files of a review, below ``.icm/undo``."""

    def __init__(self, record_folder: Path) -> None:
        self._root, self._folder = record_folder.parent, record_folder / UNDO_NAME

    def save(self, paths: Sequence[Path], status: str) -> Entry:
        """Copy the files that exist, and return the entry. Raises OutputError."""
        name = secrets.token_hex(8)
        folder, files = self._folder / name, []
        try:
            for number, path in enumerate(paths):
                copy = f"{number}{path.suffix}" if path.is_file() else None
                below = path.relative_to(self._root) if path.is_relative_to(self._root) else path
                files.append({"path": str(below), "copy": copy})
                if copy is not None:
                    folder.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, folder / copy)
        except OSError as error:
            raise error_for_failed_write(folder, error) from error
        return {"folder": name, "status": status, "files": files, "alpha": None}

    def restore(self, entry: Entry, alpha: Path) -> None:
        """Bring the files of an entry back, in the reverse order.

        Raises IcmError if the alpha was written again since the change, and OutputError.
        """
        copies = {self._root / file["path"]: file["copy"] for file in entry["files"]}
        if not self._may_replace(alpha, entry, copies.get(alpha)):
            raise IcmError(
                f"{alpha} was written again since this change, and is not replaced; correct the new alpha instead"
            )
        for path, name in reversed(copies.items()):
            try:
                if name is None:
                    path.unlink(missing_ok=True)
                    continue
                saved = self._folder / entry["folder"] / name
                with saved.open("rb") as copy, atomic_write(path) as out:
                    shutil.copyfileobj(copy, out)
                    out.flush()
                    times = os.fstat(copy.fileno())
                    os.utime(out.fileno(), ns=(times.st_atime_ns, times.st_mtime_ns))
            except OSError as error:
                reason = describe_os_error(error, f"its copy is in {self._folder}")
                raise IcmError(f"{path} cannot be restored: {reason}") from error

    def _may_replace(self, alpha: Path, entry: Entry, copy: str | None) -> bool:
        """Return whether an alpha is the one that the change wrote, or already the earlier one."""
        if not entry["files"] or entry["alpha"] is None:  # the process was killed during the change
            return True
        before = None if copy is None else identify_file(self._folder / entry["folder"] / copy)
        return identify_file(alpha) in (tuple(entry["alpha"]), before)

    def discard(self, entry: Entry) -> None:
        """Remove the copies of an entry."""
        with contextlib.suppress(OSError):
            shutil.rmtree(self._folder / entry["folder"])

    @contextlib.contextmanager
    def restored_on_error(self, entry: Entry, alpha: Path) -> Iterator[None]:
        """Context of a change that brings the files back if the change fails."""
        try:
            yield
        except Exception:
            with contextlib.suppress(IcmError, OSError):
                self.restore(entry, alpha)
            raise
