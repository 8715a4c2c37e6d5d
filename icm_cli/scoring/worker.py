"""A process of the scoring pool: tasks in on standard input, answers out on standard output, until that ends."""

from __future__ import annotations

import contextlib
import pickle
import signal
import sys

import cv2


def main() -> None:
    """Run tasks one by one, on one core; a stop that reaches the whole group of processes is the parent's to handle."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    cv2.setNumThreads(1)
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            task = pickle.load(sys.stdin.buffer)  # noqa: S301  our own parent wrote it
            pickle.dump(task.run(), answers)
            answers.flush()


if __name__ == "__main__":
    main()
