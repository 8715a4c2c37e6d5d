"""Lines for people: whatever becomes of the terminal or log, the work goes on."""

from __future__ import annotations

import contextlib
import os
from typing import TextIO


def write_line(stream: TextIO | None, text: str) -> None:
    """Print ``text`` with a newline; characters the stream cannot show, and control characters, are escaped.

    A stream that is closed, full or whose reader has gone is silenced from then on: a log is not worth a run.
    """
    if stream is None:
        return
    shown = "\n".join(_printable(line) for line in text.splitlines())
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(shown.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _printable(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode() for each in line
    )
