"""Worker processes that score alphas in parallel with the model, on cores of their own."""

from __future__ import annotations

import contextlib
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import cv2

from icm_cli.environment import start_module
from icm_cli.reports.result import ImageResult
from icm_cli.scoring.task import ScoreTask
from icm_cli.signals import ignore_stop_signals


class Task(Protocol):
    """A picklable object that a worker process runs."""

    def run(self) -> Any: ...


class ScoringPool:
    """Pool of worker processes that exit with their parent process. Callbacks run in the thread that submits tasks.

    Unlike the pools of the standard library, it does not import the ``__main__`` module of the caller again, and one
    dead worker does not break it.
    """

    def __init__(self, processes: int) -> None:
        self._threads = ThreadPoolExecutor(processes, "icm-score")
        self._idle: queue.LifoQueue[_ScoringProcess | None] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(None)  # a process that is started when a task needs it
        self._running: deque[tuple[Future[Any], Callable[[Any], None]]] = deque()
        self._max_pending = 4 * processes

    def submit(self, task: Task, callback: Callable[[Any], None]) -> None:
        """Queue a task. Blocks while too many tasks are pending.

        ``callback`` is called with the result of the task, or with None if its process died, for example from lack of
        memory. After an interrupt it may be called twice with the same result.
        """
        self._running.append((self._threads.submit(self._run_task, task), callback))
        self._collect_results(self._max_pending)

    def drain(self) -> None:
        """Wait for all pending tasks."""
        self._collect_results(0)

    def close(self) -> None:
        """Stop the processes. Pending tasks are discarded."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            if process := self._idle.get_nowait():
                process.close()

    def _collect_results(self, max_pending: int) -> None:
        """Call the callbacks of finished tasks until at most ``max_pending`` tasks are pending."""
        while self._running and (len(self._running) > max_pending or self._running[0][0].done()):
            future, callback = self._running[0]
            callback(future.result())
            self._running.popleft()  # after the callback, so that an interrupt loses no result

    def _run_task(self, task: Task) -> Any:
        """Run a task in an idle process; return None if the process dies."""
        process = self._idle.get()
        try:
            process = process or _ScoringProcess()
            return process.run(task)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            if process:
                process.close()
            process = None  # the next task starts a new process
            return None
        finally:
            self._idle.put(process)


class _ScoringProcess:
    """A process that runs this module: one task at a time, see :func:`run_tasks`."""

    def __init__(self) -> None:
        self._popen = start_module("icm_cli.scoring.pool", stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, task: Task) -> Any:
        assert self._popen.stdin
        assert self._popen.stdout
        pickle.dump(task, self._popen.stdin)
        self._popen.stdin.flush()
        return pickle.load(self._popen.stdout)  # noqa: S301  written by our own process

    def close(self) -> None:
        self._popen.kill()
        self._popen.communicate()


@dataclass(frozen=True)
class Scorer:
    """Scores the images of a run. ``task_for`` returns the task of a finished image, None if it is not scored."""

    pool: ScoringPool
    task_for: Callable[[ImageResult], ScoreTask | None]


def run_tasks() -> None:
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
    run_tasks()
