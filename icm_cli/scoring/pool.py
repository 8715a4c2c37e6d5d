"""Processes beside the model that score, so that its cores and memory stay its own."""

from __future__ import annotations

import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from icm_cli.environment import child_environment
from icm_cli.reports.result import ImageResult
from icm_cli.scoring.task import ScoreTask

Answer = TypeVar("Answer", covariant=True)


class Task(Protocol[Answer]):
    """A task for a process: an object that can be pickled."""

    def run(self) -> Answer: ...


class ScoringPool:
    """Runs tasks in processes; what to do with an answer is done in the thread that submits.

    The standard process pools import the caller's ``__main__`` again (a script without the usual guard would run
    twice), and one dead worker breaks all of them; these processes do neither, and end when this one does.
    """

    def __init__(self, processes: int) -> None:
        self._threads = ThreadPoolExecutor(processes, "icm-score")
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(None)
        self._running: deque[tuple[Future[Any], Callable[[Any], None]]] = deque()
        self._most = 4 * processes

    def submit(self, task: Task[Any], then: Callable[[Any], None]) -> None:
        """Queue a task; waits while too many are in hand, so that memory stays flat.

        ``then`` gets the answer, None where the process died (perhaps of too little memory); an interrupt may make it
        get one twice.
        """
        self._running.append((self._threads.submit(self._run, task), then))
        self._settle(self._most)

    def drain(self) -> None:
        """Wait for every task."""
        self._settle(0)

    def close(self) -> None:
        """End the processes; tasks that were not drained are lost."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            if process := self._idle.get_nowait():
                process.close()

    def _settle(self, at_most: int) -> None:
        while self._running and (len(self._running) > at_most or self._running[0][0].done()):
            future, then = self._running[0]
            then(future.result())
            self._running.popleft()  # last, so that an interrupt loses none

    def _run(self, task: Task[Any]) -> Any:
        process = self._idle.get()
        try:
            process = process or _Process()
            return process.run(task)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            if process:
                process.close()
            process = None  # the next task starts another
            return None
        finally:
            self._idle.put(process)


class _Process:
    """One process that runs tasks as they come, one at a time."""

    def __init__(self) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "icm_cli.scoring.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(),
        )

    def run(self, task: Task[Answer]) -> Answer:
        assert self._popen.stdin
        assert self._popen.stdout
        pickle.dump(task, self._popen.stdin)
        self._popen.stdin.flush()
        answer: Answer = pickle.load(self._popen.stdout)  # noqa: S301  our own process wrote it
        return answer

    def close(self) -> None:
        self._popen.kill()
        self._popen.communicate()


@dataclass(frozen=True)
class Scoring:
    """Scoring of the images of a run: ``task_for`` gives the task of one that has its alpha, None for no score."""

    pool: ScoringPool
    task_for: Callable[[ImageResult], ScoreTask | None]
