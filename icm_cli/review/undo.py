"""Undo of changes to images, from copies of the files that a change replaces.

The entry of a change is saved in the state of the review before any file is replaced. So a change can be undone even if
the process was killed in the middle of it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from icm_cli.errors import IcmError
from icm_cli.files.atomic_writes import atomic_write, identify_file
from icm_cli.files.system_errors import describe_os_error, error_for_failed_write

UNDO_NAME = "undo"
Entry: TypeAlias = dict[str, Any]
"""A change of an image, as JSON:

- ``cause``: "decision" or "recompute";
- ``folder``: random name of the folder with the copies, which identifies the entry;
- ``status``: status of the image before the change;
- ``files``: the replaced files. Each has its ``path`` and the name of its ``copy``, None if there was no file;
- ``alpha``: identity of the alpha that the change wrote; None until then.
"""


class UndoCopies:
    """Copies of replaced files, below ``.icm/undo``."""

    def __init__(self, record_folder: Path) -> None:
        """``record_folder``: the folder ``.icm`` of the run."""
        self._root, self._folder = record_folder.parent, record_folder / UNDO_NAME

    def save(self, paths: Sequence[Path], status: str, earlier: Mapping[Path, Path] | None = None) -> Entry:
        """Copy those of ``paths`` that exist, and return the entry of a decision. Raises OutputError.

        ``earlier``: the paths of a recompute that has replaced ``paths`` already, each with a copy of what it was.
        """
        folder_name = secrets.token_hex(8)
        folder, files = self._folder / folder_name, []
        try:
            for number, path in enumerate(paths):
                copied = path if earlier is None else earlier[path]
                copy_name = f"{number}{path.suffix}" if copied.is_file() else None
                stored_path = path.relative_to(self._root) if path.is_relative_to(self._root) else path
                files.append({"path": str(stored_path), "copy": copy_name})
                if copy_name is not None:
                    folder.mkdir(parents=True, exist_ok=True)
                    (shutil.copy2 if earlier is None else link_or_copy)(copied, folder / copy_name)
        except OSError as error:
            raise error_for_failed_write(folder, error) from error
        cause = "decision" if earlier is None else "recompute"
        return {"cause": cause, "folder": folder_name, "status": status, "files": files, "alpha": None}

    def restore(self, entry: Entry, alpha: Path) -> None:
        """Restore the files of an entry, in the reverse order of ``save``. ``alpha``: path of the alpha.

        Raises IcmError if a later run has replaced the alpha, or if a file cannot be written.
        """
        copy_names = {self._root / file["path"]: file["copy"] for file in entry["files"]}
        if not self._may_replace(alpha, entry, copy_names.get(alpha)):
            raise IcmError(
                f"{alpha} was written again since this change, and is not replaced; correct the new alpha instead"
            )
        for path, copy_name in reversed(copy_names.items()):
            try:
                if copy_name is None:
                    path.unlink(missing_ok=True)
                    continue
                saved = self._folder / entry["folder"] / copy_name
                with saved.open("rb") as copy, atomic_write(path) as out:
                    shutil.copyfileobj(copy, out)
                    out.flush()
                    times = os.fstat(copy.fileno())
                    os.utime(out.fileno(), ns=(times.st_atime_ns, times.st_mtime_ns))
            except OSError as error:
                reason = describe_os_error(error, f"its copy is in {self._folder}")
                raise IcmError(f"{path} cannot be restored: {reason}") from error

    def _may_replace(self, alpha: Path, entry: Entry, copy_name: str | None) -> bool:
        """Return whether undo may replace an alpha: it must be the one that the change wrote, or the one before it.

        ``copy_name``: name of the copy of the alpha before it; None if there was none.
        """
        if not entry["files"] or entry["alpha"] is None:  # nothing was replaced, or the change was interrupted
            return True
        before = None if copy_name is None else identify_file(self._folder / entry["folder"] / copy_name)
        return identify_file(alpha) in (tuple(entry["alpha"]), before)

    def discard(self, entry: Entry) -> None:
        """Remove the copies of an entry."""
        with contextlib.suppress(OSError):
            shutil.rmtree(self._folder / entry["folder"])

    @contextlib.contextmanager
    def restored_on_error(self, entry: Entry, alpha: Path) -> Iterator[None]:
        """Context of a change. If it fails, the files are restored, as far as that is possible."""
        try:
            yield
        except Exception:
            with contextlib.suppress(IcmError, OSError):
                self.restore(entry, alpha)
            raise


def link_or_copy(path: Path, target: Path) -> None:
    """Make a hard link of a file that is only replaced, never changed; a copy on a drive without hard links."""
    try:
        target.hardlink_to(path)
    except OSError:
        shutil.copy2(path, target)


def undo_cause(entries: Sequence[Entry]) -> str:
    """Return what undo takes back: "decision" or "recompute"; "" if there is nothing to undo."""
    return entries[-1].get("cause", "decision") if entries else ""


def last_decision(entries: Sequence[Entry]) -> str:
    """Return the folder of the last decision, which identifies it; "" if there is none."""
    return next((entry["folder"] for entry in reversed(entries) if undo_cause([entry]) == "decision"), "")
