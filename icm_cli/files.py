"""Atomic writes, system errors, digests, the cache folder, and walking folders and globs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import functools
import glob
import hashlib
import json
import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar

from icm_cli.errors import FileWriteError, OutputError, UsageError

TEMPORARY_PREFIX = ".icm-"
TEMPORARY_SUFFIX = ".tmp"
RECORD_FOLDER = ".icm"
"""Folder below the alphas of a run with the options of the run and the state of its review.

No command searches it for files.
"""
STALE_AFTER_S = 3600.0
"""Seconds without a write after which a temporary file of another machine or container is stale."""
LOCK_TIMEOUT_S = 10.0
"""Seconds to wait for the lock of a folder, which another process holds while it renames a file."""
LOCK_INTERVAL_S = 0.01
MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4095
MAX_SHOWN_CHARACTERS = 100
"""Maximum number of characters of a wrong path that a message shows."""
SERVICE_FOLDERS = frozenset({"@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "__MACOSX"})
"""Folders that storage servers and archivers create: thumbnails, recycle bins, snapshots, resource forks."""
HIDDEN = "hidden"
LINK_INTO_TREE = "a link to a folder of the same tree, whose files are found there"
LINK_LOOP = "a link to a folder that contains it"
UNREADABLE = "a folder that cannot be read"

WriteCheck: TypeAlias = Callable[[], None]
"""Function that raises an error if a file must not be replaced."""
FileIdentity: TypeAlias = tuple[int, int]
"""Size and modification time of a file, which change if it is replaced or written."""
JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
"""Names of the types of JSON values. A boolean is not an integer."""

SkippedPaths: TypeAlias = dict[str, list[Path]]
"""Paths that a walk skips, by reason: files, links to folders, and folders that cannot be read."""
RETRY_DELAYS_S = (0.1, 0.4, 1.0)
"""Seconds to wait before each further attempt after a transient error."""
MAX_WASTED_S = 30.0
"""After this many seconds of waiting without success, a process no longer repeats failed operations."""
Result = TypeVar("Result")


def _error_numbers(*names: str) -> frozenset[int]:
    """Return the numbers of errors; systems without one of them never report it."""
    return frozenset(getattr(errno, name) for name in names if hasattr(errno, name))


_DRIVE_ERRORS = _error_numbers(
    *("EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "ENOTCONN", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED"),
    *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "ENOLINK", "ESHUTDOWN"),
)
_BUSY_ERRORS = _error_numbers("EAGAIN", "EINTR", "EBUSY", "ETXTBSY", "EDEADLK")
_OPEN_FILES_ERRORS = _error_numbers("EMFILE", "ENFILE")
_PERMISSION_ERRORS = _error_numbers("EACCES", "EPERM", "EKEYEXPIRED", "EKEYREVOKED", "EKEYREJECTED", "ENOKEY")
_UNSUPPORTED_ERRORS = _error_numbers("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "ENOTTY")
_RUN_AGAIN = "run the same command again, which resumes (icm train: with --resume)"
_ERROR_ADVICE = {
    _DRIVE_ERRORS: f"the drive or the network did not answer; check it and {_RUN_AGAIN}",
    _BUSY_ERRORS: f"another program uses it; {_RUN_AGAIN}",
    _OPEN_FILES_ERRORS: "raise the limit, as with ulimit -n 4096, or give fewer --workers",
    _PERMISSION_ERRORS: "give this user permission",
    _error_numbers("ENOMEM"): f"free memory, and {_RUN_AGAIN}",
    _error_numbers("ELOOP"): "the path is a link to itself; check the link",
    _error_numbers("ENAMETOOLONG"): "the path is too long for this file system; use a shorter one",
}
_wasted_s = 0.0
"""Seconds that this process has waited without success since a repeated operation last succeeded."""


def is_transient(error: OSError) -> bool:
    """Return whether an error may go away: the drive did not answer, or too many files are open."""
    return error.errno in _DRIVE_ERRORS | _BUSY_ERRORS | _OPEN_FILES_ERRORS


def is_system_error(error: BaseException) -> bool:
    """Return whether the system reported an error; decoders raise OSError for damaged files too."""
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)  # EINVAL: an offset in the file


def describe_os_error(error: OSError, other_advice: str = "") -> str:
    """Return what the system reports, with advice: the end of a message about a file.

    ``other_advice``: advice for errors for which icm has none.
    """
    reason = error.strerror or str(error) or type(error).__name__
    advice = next((text for numbers, text in _ERROR_ADVICE.items() if error.errno in numbers), other_advice)
    return f"{reason}; {advice}" if advice else reason


def retry_transient(operation: Callable[[], Result]) -> Result:
    """Return the result of an operation, which is repeated up to three times after a transient error.

    Raises the last OSError. After a drive has failed for MAX_WASTED_S, operations are not repeated any more.
    """
    global _wasted_s
    delays, waited_s = iter(RETRY_DELAYS_S), 0.0
    while True:
        try:
            result = operation()
        except OSError as error:
            delay_s = next(delays, None)
            if delay_s is None or not is_transient(error) or _wasted_s + waited_s >= MAX_WASTED_S:
                _wasted_s += waited_s
                raise
            time.sleep(delay_s)
            waited_s += delay_s
        else:
            if waited_s:
                _wasted_s = 0.0
            return result


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


def error_for_failed_write(path: Path, error: OSError) -> OutputError:
    """Return the error for an output that cannot be written: a FileWriteError if other outputs may be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = f"no space left on the device; free some space and {_RUN_AGAIN}"
        return OutputError(f"{path} cannot be written: {reason}")
    remedy = "give an output location that you can write to"
    if error.errno in (errno.ENAMETOOLONG, errno.EISDIR, errno.EILSEQ):
        reason = f"{error.strerror}; the file system does not accept this name; choose other names with --name"
    elif error.errno in (errno.EEXIST, errno.ENOTDIR):
        reason = f"a file has the name of its folder; {remedy}"
    else:
        reason = describe_os_error(error, remedy)
    return FileWriteError(f"{path} cannot be written: {reason}")


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
    return combined_digest(*parts)[:16]


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
        if error.errno not in _UNSUPPORTED_ERRORS:
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


def combined_digest(*parts: bytes | str) -> str:
    """Return the SHA-256 of the parts as hexadecimal digits. Parts that are divided differently have another digest."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()


def cached_file_digest(path: Path) -> str:
    """Return the SHA-256 of a file. It is cached by path, size and time, because weights are large."""
    state = path.stat()
    key = combined_digest(str(path.resolve()), str(state.st_size), str(state.st_mtime_ns), str(state.st_ino))
    cached = cache_folder() / "digests" / key
    with contextlib.suppress(OSError):
        digest = cached.read_text()
        if len(digest) == 64:
            return digest
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(OutputError), atomic_write(cached) as out:
        out.write(digest.encode())
    return digest


@functools.cache
def cache_folder() -> Path:
    """Return the first of these that is writable: $ICM_CACHE, $XDG_CACHE_HOME/icm, ~/.cache/icm, a temporary folder."""
    for folder in _cache_candidates():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    folder = Path(tempfile.gettempdir()) / f"icm-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    is_own = folder.stat().st_uid == os.getuid()  # the content of another user's folder is not trusted
    return folder if is_own else Path(tempfile.mkdtemp(prefix="icm-"))


def _cache_candidates() -> Iterator[Path]:
    if "ICM_CACHE" in os.environ:
        yield Path(os.environ["ICM_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        yield Path(os.environ["XDG_CACHE_HOME"]) / "icm"
    with contextlib.suppress(RuntimeError):  # a user without a home folder, as in many containers
        yield Path.home() / ".cache" / "icm"


LIST_SUFFIXES = frozenset({".txt", ".lst", ".list"})
"""Suffixes of lists of paths."""
ROOT_MARK = "/./"
"""Ends the root in a line of a list, as for ``rsync -R``: in ``/plates/./sh010/a.png`` it is ``/plates``."""


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as JSON, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")


def read_json(path: Path, kind: str, schema: Any, expected: str, *, use: str = "read") -> Any:
    """Return the content of a JSON file, checked against a schema by :func:`check_schema`.

    Raises UsageError for a file that is missing, is not JSON or does not match. The message begins with "``kind`` FILE
    cannot be ``use``", such as "report a.json cannot be compared", and ends with what was ``expected``.
    """
    try:
        if not path.is_file():
            problem = "is not a file" if path.exists() else "does not exist"
            raise UsageError(f"{kind} {path} {problem}; {expected}")
        content = json.loads(path.read_bytes())
        check_schema(content, schema, "")
    except RecursionError as error:
        raise UsageError(f"{kind} {path} cannot be {use}: it is nested too deeply; {expected}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{kind} {path} cannot be {use}: {reason}; {expected}") from error
    return content


def format_json(value: Any) -> str:
    """Return a value as JSON for messages, truncated if it is long."""
    return shorten(json.dumps(value, ensure_ascii=False))


def check_schema(value: Any, schema: Any, name: str) -> None:
    """Raise ValueError if a JSON value does not match a schema. The message names the first wrong value.

    A schema is a type, a tuple of types, ``[schema]`` for a list, or a dict with a schema for each key. A key that ends
    in "?" is optional; the key "*" stands for every key. ``name``: what messages call the value, "" for a whole file.

    >>> check_schema({"id": 1}, {"id": int, "label?": str}, "")
    """
    if isinstance(schema, tuple):
        types = schema
    elif isinstance(schema, type):
        types = (schema,)
    else:
        types = (type(schema),)
    if type(value) not in types:
        expected = " or ".join(JSON_TYPES[type_] for type_ in types)
        raise ValueError(f"{name or 'its content'} is {format_json(value)} instead of {expected}")
    if isinstance(schema, list):
        for number, item in enumerate(value):
            check_schema(item, schema[0], f"{name}[{number}]")
    if isinstance(schema, dict):
        for pattern, inner_schema in schema.items():
            key = pattern.removesuffix("?")
            is_optional = pattern == "*" or pattern.endswith("?")
            if key not in value and not is_optional:
                raise ValueError(f"{name}.{key}".lstrip(".") + " is missing")
            for present in value if pattern == "*" else {key} & value.keys():
                check_schema(value[present], inner_schema, f"{name}.{present}".lstrip("."))


def shorten(text: str) -> str:
    """Return a wrong value for a message, cut off after ``MAX_SHOWN_CHARACTERS``."""
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def is_file(path: str | Path) -> bool:
    """Return whether a path is a file; False for a path that cannot be one, such as a name that is too long."""
    return os.path.isfile(path)  # noqa: PTH113  Path.is_file raises errors


def special_file_kind(mode: int) -> str:
    """Return what a file with this mode is; "" for a regular file or folder."""
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return ""
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def describe_obstacle(path: str | Path) -> str:
    """Return what prevents writing a file at a path, such as "a folder" or "a pipe" that is there.

    Returns "" for a regular file or a link to one, and if the path does not exist.
    """
    if is_file(path) or not os.path.lexists(path):
        return ""
    if os.path.isdir(path):  # noqa: PTH112  Path.is_dir raises errors
        return "a folder"
    if not os.path.exists(path):  # noqa: PTH110  Path.exists raises errors
        return "a link to a file that does not exist"
    return special_file_kind(os.stat(path).st_mode)  # noqa: PTH116


def check_path(text: str | Path, name: str) -> None:
    """Raise UsageError for a text that is no path on any drive. ``name``: its option, for the message."""
    text = str(text)
    short = shorten(text)
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} {short!r} has characters that no file name has ({error.reason})") from error
    if b"\0" in data:
        raise UsageError(f"{name} {short!r} has a NUL character; expected a path")
    if is_too_long(data):
        longest = max(map(len, data.split(os.sep.encode())))
        has_lines = len(text.split()) > 1
        remedy = "; give several files as a text list, or as lines on standard input" if has_lines else ""
        raise UsageError(
            f"{name} {short!r} is too long for a path: it has {len(data)} bytes, and its longest name {longest}; "
            f"expected at most {MAX_PATH_BYTES}, and {MAX_NAME_BYTES} in a name{remedy}"
        )


def is_too_long(path: bytes) -> bool:
    """Return whether no drive has a file of this path."""
    return len(path) > MAX_PATH_BYTES or max(map(len, path.split(os.sep.encode()))) > MAX_NAME_BYTES


def walk_files(folder: Path, skipped: SkippedPaths, trees: Sequence[str] = ()) -> Iterator[Path]:
    """Yield every file below a folder that is not hidden, and add skipped paths to ``skipped``.

    A link to a folder outside the tree is followed. A link into a tree that is walked anyway is skipped, because its
    files are found there. A link to a folder that contains it is skipped. ``trees``: used by the recursion; the real
    folders whose walk led to this one through links, outermost first.
    """
    trees = (*trees, os.path.realpath(folder))

    def report_unreadable(error: OSError) -> None:
        if is_transient(error):  # the images in it are expected to be matted
            raise error
        skipped.setdefault(UNREADABLE, []).append(Path(error.filename))

    for parent, folders, files in os.walk(folder, onerror=report_unreadable):
        folders[:] = [name for name in folders if name != RECORD_FOLDER]
        for name in list(folders):
            path = Path(parent) / name
            if reason := _skip_reason(path, trees):
                folders.remove(name)  # os.walk does not enter it
                skipped_paths = [path] if reason in (LINK_INTO_TREE, LINK_LOOP) else _files_below(path)
                skipped.setdefault(reason, []).extend(skipped_paths)
            elif path.is_symlink():
                folders.remove(name)
                yield from walk_files(path, skipped, trees)
        for name in files:
            if not name.startswith("."):
                yield Path(parent) / name
            elif not name.startswith(TEMPORARY_PREFIX):
                skipped.setdefault(HIDDEN, []).append(Path(parent) / name)


def expand_glob(pattern: str, skipped: SkippedPaths) -> Iterator[Path]:
    """Yield the files that a glob matches. ``**`` matches folders as :func:`walk_files` finds them.

    A folder that exists is read literally, even with brackets in its name.
    """
    fixed, parts = split_glob(pattern)
    before_stars = parts[: parts.index("**")] if "**" in parts else parts
    from_stars = parts[len(before_stars) :]
    matches = map(Path, glob.iglob(os.path.join(glob.escape(fixed), *before_stars)))  # noqa: PTH118
    if not from_stars:
        yield from (path for path in matches if path.is_file())
        return
    for folder in matches if before_stars else [Path(fixed)]:
        if folder.is_dir():
            for path in walk_files(folder, skipped):
                if _matches_parts(path.relative_to(folder).parts, from_stars):
                    yield path


def split_glob(pattern: str) -> tuple[str, tuple[str, ...]]:
    """Return the path of the leading parts that have no wildcards or exist, and the parts after them."""
    parts = Path(pattern).parts
    fixed = ""
    for number, part in enumerate(parts):
        extended = os.path.join(fixed, part)  # noqa: PTH118  a Path cannot be empty
        if glob.has_magic(part) and not os.path.lexists(extended):
            return fixed, parts[number:]
        fixed = extended
    return fixed, ()


def _skip_reason(path: Path, trees: Sequence[str]) -> str:
    """Return the reason to skip a folder, "" if it is walked. ``trees``: as in :func:`walk_files`."""
    if path.is_symlink():
        target = Path(os.path.realpath(path))
        if any(Path(tree).is_relative_to(target) for tree in trees):
            return LINK_LOOP
        if any(target.is_relative_to(tree) and _is_searched(target.relative_to(tree).parts) for tree in trees):
            return LINK_INTO_TREE
    if path.name.startswith("."):
        return HIDDEN
    if path.name in SERVICE_FOLDERS:
        return f"in {path.name}, a folder that a storage server or archiver created"
    return ""


def _is_searched(parts: Iterable[str]) -> bool:
    """Return whether no part of a path is hidden or a service folder."""
    return not any(part.startswith(".") or part in SERVICE_FOLDERS for part in parts)


def _files_below(folder: Path) -> list[Path]:
    """Return all files below a folder, also hidden ones, except temporary files."""
    paths = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    return [path for path in paths if not path.name.startswith(TEMPORARY_PREFIX)]


def _matches_parts(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return whether the parts of a path match the parts of a glob. ``**`` matches any number of parts."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_matches_parts(names[count:], patterns[1:]) for count in range(len(names) + 1))
    if not names:
        return False
    return fnmatch.fnmatch(names[0], patterns[0]) and _matches_parts(names[1:], patterns[1:])
