"""Atomic writes, locks, temporary files and checks whether a folder is writable."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias

from icm_cli.errors import OutputError
from icm_cli.files.system_errors import error_for_failed_write, retry_transient

TEMPORARY_PREFIX = ".icm-"
TEMPORARY_SUFFIX = ".tmp"
STALE_AFTER_S = 3600.0
"""Seconds without a write after which a temporary file of another machine or container is stale."""
LOCK_TIMEOUT_S = 10.0
"""Seconds to wait for the lock of a folder, which another process holds while it renames a file."""
LOCK_INTERVAL_S = 0.01
NO_SYNC_ERRORS = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY})
"""Errors of drives that cannot write a file to the disk at once."""
WriteCheck: TypeAlias = Callable[[], None]
"""Function that raises an error if a file must not be replaced."""
FileIdentity: TypeAlias = tuple[int, int]
"""Size and modification time of a file, which change if it is replaced or written."""


@contextlib.contextmanager
def atomic_write(path: Path, check: WriteCheck | None = None, *, is_synced: bool = True) -> Iterator[BinaryIO]:
    """Context of a hidden temporary file next to ``path``, which is open for writing and locked.

    On success it is renamed to ``path``, on failure removed. ``check`` is called immediately before the rename, and
    raises an error to prevent it. No other process of icm writes ``path`` between the two. ``is_synced``: wait until
    the content is on the disk. Without, writing is faster, and the file may be incomplete after a power failure.

    Raises OutputError if the disk is full, FileWriteError if this file cannot be written.
    """
    temporary = path.parent / temporary_name()
    try:
        retry_transient(lambda: path.parent.mkdir(parents=True, exist_ok=True))
        try:
            with retry_transient(lambda: temporary.open("xb")) as file:
                _lock(file.fileno())
                yield file
                file.flush()
                if is_synced:
                    _sync(file.fileno())
            _rename(temporary, path, check)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
    except OSError as error:
        raise error_for_failed_write(path, error) from error


def temporary_name() -> str:
    """Return a name for a hidden file, which a later run removes if this process dies."""
    return f"{TEMPORARY_PREFIX}{process_space()}-{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"


def check_writable(folder: Path) -> None:
    """Create a folder and a temporary file in it. Raises OutputError."""
    probe = folder / temporary_name()
    try:
        retry_transient(lambda: folder.mkdir(parents=True, exist_ok=True))
        retry_transient(probe.touch)
        probe.unlink()
    except OSError as error:
        raise error_for_failed_write(folder, error) from error


def is_writable(folder: Path) -> bool:
    """Return whether a file can be created in a folder."""
    try:
        check_writable(folder)
    except OutputError:
        return False
    return True


def check_would_be_writable(folder: Path) -> None:
    """Raise OutputError if a folder cannot be created or written. Writes nothing."""
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        number = errno.ENOTDIR
    elif not os.access(existing, os.W_OK | os.X_OK):
        is_read_only = bool(os.statvfs(existing).f_flag & os.ST_RDONLY)
        number = errno.EROFS if is_read_only else errno.EACCES
    else:
        return
    raise error_for_failed_write(folder, OSError(number, os.strerror(number)))


def remove_stale_temporaries(folder: Path) -> int:
    """Remove temporary files of dead processes from ``folder`` itself; return their number."""
    removed = 0
    for name in glob.glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}", root_dir=folder):
        path = folder / name
        with contextlib.suppress(OSError):
            if _is_stale(path):
                path.unlink()
                removed += 1
    return removed


def _is_stale(path: Path) -> bool:
    """Return whether the process that wrote a temporary file has died.

    A process holds the lock of the file that it writes. Some network drives ignore locks, so the process must be dead
    too. Whether a process of another container or machine is dead cannot be checked: its file must be old instead.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        is_unlocked = _lock(descriptor, is_shared=True)  # None if the drive has no locks
    finally:
        os.close(descriptor)
    if is_unlocked is False:  # a process writes it
        return False
    owner, _, _ = path.name.removeprefix(TEMPORARY_PREFIX).rpartition("-")  # see temporary_name
    space, _, pid = owner.rpartition("-")
    if space == process_space() and pid.isdigit():
        if not _is_running(int(pid)):
            return True
        if is_unlocked is None:
            return False
    age_s = time.time() - path.stat().st_mtime
    return age_s > STALE_AFTER_S and _age_on_drive_s(path) > STALE_AFTER_S


def _age_on_drive_s(path: Path) -> float:
    """Return the seconds since the last write, by the clock of the drive, which may differ from that of the machine."""
    probe = path.parent / temporary_name()
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink()


@functools.cache
def process_space() -> str:
    """Return a name of the space in which process ids are unique: machine, boot and container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # other systems have no containers that share the host's name
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _is_running(pid: int) -> bool:
    """Return whether a process with this id exists on this machine."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # a process of another user
    return True


def _lock(descriptor: int, *, is_shared: bool = False, timeout_s: float = 0.0) -> bool | None:
    """Lock an open file or folder, and return True.

    Returns False if another process still holds the lock after ``timeout_s``, and None if the drive has no locks.
    """
    kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOCK_INTERVAL_S)
        except OSError:
            return None
        else:
            return True


def _sync(descriptor: int) -> None:
    """Write a file to the disk, if its drive can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC_ERRORS:
            raise


def _rename(temporary: Path, path: Path, check: WriteCheck | None) -> None:
    """Rename a finished temporary file to ``path``; with a check, under a lock of the folder.

    If folders cannot be locked, a new file is created as a hard link. A link cannot replace a file that another machine
    has written since the check.
    """
    if check is None:
        retry_transient(lambda: temporary.replace(path))
        return
    with _locked_folder(path.parent) as is_locked:
        is_new = not os.path.lexists(path)
        check()
        if is_new and not is_locked:
            try:
                os.link(temporary, path)
            except FileExistsError:  # check what the other machine has written
                check()
            except OSError:  # the drive has no hard links
                pass
            else:
                return  # the caller removes the temporary name
        retry_transient(lambda: temporary.replace(path))


def identify_file(path: Path) -> FileIdentity | None:
    """Return size and modification time of a file; None if it does not exist or cannot be accessed."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    return None


def open_locked(path: Path, timeout_s: float) -> int | None:
    """Open a file, which is created, and lock it against other processes and threads of icm.

    Returns its descriptor, or None if the lock was not free within ``timeout_s``. The lock ends when the descriptor and
    its copies in other processes are closed. On a drive without locks, nothing is locked. Raises OutputError if the
    file cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise error_for_failed_write(path, error) from error
    if _lock(descriptor, timeout_s=timeout_s) is not False:
        return descriptor
    os.close(descriptor)
    return None


@contextlib.contextmanager
def locked_file(path: Path, timeout_s: float) -> Iterator[bool]:
    """Context of :func:`open_locked`; yields whether the lock was free."""
    descriptor = open_locked(path, timeout_s)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def _locked_folder(folder: Path) -> Iterator[bool]:
    """Lock a folder against other processes of icm; False if that is impossible."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield _lock(descriptor, timeout_s=LOCK_TIMEOUT_S) is True
    finally:
        os.close(descriptor)
