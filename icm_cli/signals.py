"""Ctrl-C and SIGTERM: the current step or write is finished before they take effect."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def ignore_stop_signals() -> None:
    """Ignore Ctrl-C and SIGTERM in a worker process, because its parent process handles them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """Context that delays a first signal: it is recorded, and raised again for the former handler at the end.

    A second signal takes effect immediately. In other threads than the main one, which receives all signals, the
    context does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._is_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._is_main:
            self._former_handlers = {number: signal.signal(number, self._record_signal) for number in SIGNALS}
        return self

    def __exit__(self, error_type: type[BaseException] | None, *error: object) -> None:
        if self._is_main:
            self._restore_handlers()
        if self.received is not None and error_type is None:
            signal.raise_signal(self.received)

    def _record_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.received = signal.Signals(number)
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)


RESEND_S = 0.05
"""Seconds after which a signal that could not take effect is sent again."""
UNINTERRUPTIBLE_FILES = ("<frozen importlib._bootstrap>", str(Path("numba/core/serialize.py")))
"""Ends of the names of files whose functions lose a KeyboardInterrupt.

Libraries suppress it during an import. numba calls its function from C, and replaces the exception by a SystemError.
"""
SIGNAL_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Interrupt:
    """Context that raises KeyboardInterrupt for the first Ctrl-C or SIGTERM.

    If the signal comes in a function of UNINTERRUPTIBLE_FILES, for example during an import, the exception is raised
    afterwards. Otherwise some libraries would suppress it and stay incomplete. Later signals are ignored, so that
    writes finish.
    """

    def __init__(self) -> None:
        self.exit_code = SIGNAL_EXIT_CODES[signal.SIGINT]
        self._is_raised = False

    def __enter__(self) -> Self:
        self._former_handlers = {number: signal.signal(number, self._receive_signal) for number in SIGNAL_EXIT_CODES}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)

    def _receive_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_raised:
            return
        if _is_uninterruptible(frame):  # send the same signal again later
            main_thread = threading.main_thread().ident
            threading.Timer(RESEND_S, signal.pthread_kill, [main_thread, number]).start()
            return
        self._is_raised = True
        self.exit_code = SIGNAL_EXIT_CODES[signal.Signals(number)]
        raise KeyboardInterrupt


def _is_uninterruptible(frame: FrameType | None) -> bool:
    """Return whether a frame, or a frame that called it, belongs to one of UNINTERRUPTIBLE_FILES."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(UNINTERRUPTIBLE_FILES):
            return True
        frame = frame.f_back
    return False
