"""Errors of the system about files: advice for the user, and repetition after transient errors."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from icm_cli.errors import FileWriteError, OutputError

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
