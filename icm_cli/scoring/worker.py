"""Main module of a worker process of the scoring pool."""

from __future__ import annotations

import contextlib
import pickle
import sys

import cv2

from icm_cli.signals import ignore_stop_signals


def main() -> None:
    """Run pickled tasks from standard input, one at a time on one core, until the input ends."""
    ignore_stop_signals()
    cv2.setNumThreads(1)
    results = sys.stdout.buffer
    sys.stdout = sys.stderr
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            task = pickle.load(sys.stdin.buffer)  # noqa: S301  written by our own parent process
            pickle.dump(task.run(), results)
            results.flush()


if __name__ == "__main__":
    main()
