"""Matting on several devices: a worker process for each device, which requests jobs from this process."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from multiprocessing import Pipe
from typing import Any, Protocol, Self

import torch

from icm_cli.environment import start_module
from icm_cli.errors import DeviceError, IcmError, format_count
from icm_cli.files.atomic_writes import remove_stale_temporaries
from icm_cli.matting.engine import Engine, EngineOptions
from icm_cli.matting.jobs import Job
from icm_cli.matting.model_choice import ModelChoice
from icm_cli.matting.propagation import create_matting
from icm_cli.matting.references import Reference
from icm_cli.matting.tracking import prepare_references
from icm_cli.reports.result import ImageResult


class Runner(Protocol):
    """What mattes the jobs of a run: an engine, a pool of workers, or the actors of a Ray cluster."""

    def run(self, jobs: Sequence[Job], /) -> None:
        """Matte every image, and report each result as soon as it is ready."""

    def peak_memory_bytes(self) -> int:
        """Largest peak memory of any process that mattes."""


@dataclass(frozen=True)
class EngineSetup:
    """Everything that a process needs to create an engine: model, device, references, options. It can be pickled."""

    choice: ModelChoice
    references: Sequence[Reference]
    learn_steps: int
    options: EngineOptions

    def create_engine(self, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]) -> Engine:
        """Load the model, prepare the references once, and return the engine. Raises ConfigError."""
        predictor = self.choice.load_predictor()
        shot = self.options.shot
        prepared = prepare_references(predictor, self.references, self.learn_steps, notice, is_shot=shot is not None)
        for sentence in prepared.notices:
            notice(sentence)
        matting = create_matting(predictor, lambda _: prepared, shot, notice)
        return Engine(predictor, matting, self.options, on_result=on_result, notice=notice)


class WorkerMessage(Enum):
    """Messages without content between a worker and its parent process."""

    REQUEST_JOB = "from a worker: it can take another job"
    START_RUN = "to a worker: jobs are waiting, request them"
    NO_JOBS_LEFT = "to a worker: no job is waiting at the moment"


@dataclass(frozen=True)
class WorkerIdle:
    """Message of a worker that its model is loaded, or that all jobs that it took are finished."""

    peak_memory_bytes: int


class WorkerPool:
    """Mattes images in a worker process for each device.

    ``on_result`` is called in the thread that calls :meth:`run`. If a device is lost or its process dies, a notice
    names it, and the other workers do its jobs.
    """

    def __init__(
        self, setups: Sequence[EngineSetup], *, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]
    ) -> None:
        self._setups = setups
        self._on_result = on_result
        self._notice = notice
        self._messages: deque[tuple[_WorkerProcess, Any]] = deque()
        self._has_message = threading.Event()
        self._workers: list[_WorkerProcess] = []
        self._waiting: deque[Job] = deque()
        self._error: IcmError | None = None
        self._is_stopped = False

    def __enter__(self) -> Self:
        """Start the workers and wait until each has loaded its model.

        Raises ConfigError, or DeviceError if no worker is alive.
        """
        try:
            for number, setup in enumerate(self._setups, 1):
                self._workers.append(_WorkerProcess(number, setup.choice.device.torch_device, self._receive))
            # Sent only when all processes have started, because sending may block until the process reads.
            for worker, setup in zip(self._workers, self._setups, strict=True):
                worker.send(setup)
            while self._is_busy and not self._error:
                self._handle_next_message()
            self._raise_if_ended()
        except BaseException:
            self._kill_workers()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._kill_workers()

    def run(self, jobs: Sequence[Job]) -> None:
        """Matte every image; may be called once. An image that fails is reported, and the run continues.

        Raises OutputError if no more output can be written, DeviceError if no device is left. On any exception,
        including an interrupt, writes in progress are finished first.
        """
        self._waiting.extend(jobs)
        try:
            while not self._is_stopped and (self._waiting or self._is_busy):
                self._start_idle_workers()
                self._raise_if_ended()
                self._handle_next_message()
        finally:
            self._stop_workers()
            while self._is_busy or self._messages:
                self._handle_next_message()
        if self._error:
            raise self._error

    def peak_memory_bytes(self) -> int:
        """Largest peak memory of any worker."""
        return max(worker.peak_memory_bytes for worker in self._workers)

    @property
    def _live_workers(self) -> list[_WorkerProcess]:
        return [worker for worker in self._workers if worker.is_alive]

    @property
    def _is_busy(self) -> bool:
        return any(not worker.is_idle for worker in self._live_workers)

    def _start_idle_workers(self) -> None:
        """If jobs are waiting, send idle workers the message to request them."""
        for worker in self._live_workers:
            if self._waiting and worker.is_idle:
                worker.is_idle = False
                worker.send(WorkerMessage.START_RUN)

    def _raise_if_ended(self) -> None:
        """Raise the error that ended the run, if there is one, or DeviceError if no worker is alive."""
        if self._error:
            raise self._error
        if not self._live_workers:
            reasons = "; ".join(f"{worker.name}: {worker.end_reason}" for worker in self._workers)
            raise DeviceError(f"no device is left ({reasons})")

    def _receive(self, worker: _WorkerProcess, message: Any) -> None:
        """Queue a message of a worker; called in that worker's thread."""
        self._messages.append((worker, message))
        self._has_message.set()

    def _handle_next_message(self) -> None:
        """Wait for a message and handle it.

        A message is removed after it was handled. So after an interrupt it may be handled twice, but none is lost.
        """
        while not self._messages:
            self._has_message.wait()
            self._has_message.clear()
        self._handle_message(*self._messages[0])
        self._messages.popleft()

    def _handle_message(self, worker: _WorkerProcess, message: Any) -> None:
        match message:
            case ImageResult():
                self._on_result(message)
                worker.jobs.pop(message.key, None)
                if message.status == "failed" and self._setups[0].options.fail_fast:
                    self._stop_workers()
            case WorkerMessage.REQUEST_JOB:
                if self._waiting and not self._is_stopped:
                    worker.send(worker.take_job(self._waiting))
                else:
                    worker.send(WorkerMessage.NO_JOBS_LEFT)
            case WorkerIdle():
                worker.is_idle = True
                worker.peak_memory_bytes = max(worker.peak_memory_bytes, message.peak_memory_bytes)
            case DeviceError():
                worker.end_reason = message.args[0]
            case IcmError():
                self._error = self._error or message
                self._stop_workers()
            case str():
                self._notice(message)
            case None:  # the process has ended
                self._reap_worker(worker)

    def _reap_worker(self, worker: _WorkerProcess) -> None:
        """Put the jobs of a worker that has ended back into the queue; report it if it ended by itself."""
        worker.is_alive = False
        status = worker.wait_for_exit()
        worker.end_reason = worker.end_reason or status
        if self._is_stopped or self._error:
            return
        for folder in {job.output.parent for job in worker.jobs.values()}:
            remove_stale_temporaries(folder)
        self._waiting.extend(worker.jobs.values())  # at the end, because one of them may have killed the worker
        self._notice(
            f"{worker.name} is lost ({worker.end_reason}); {format_count(len(worker.jobs), 'image')} queued again"
        )
        worker.jobs.clear()

    def _stop_workers(self) -> None:
        self._is_stopped = True
        for worker in self._workers:
            worker.close()

    def _kill_workers(self) -> None:
        for worker in self._workers:
            worker.kill()


class _WorkerProcess:
    """The worker process of one device, with the jobs that it has taken and not finished."""

    def __init__(self, number: int, device: torch.device, receive: Callable[[_WorkerProcess, Any], None]) -> None:
        """Start worker ``number``, counted from 1. The first message to it must be an :class:`EngineSetup`.

        A thread passes every message of the worker to ``receive``, and None when the worker has ended.
        """
        self.name = f"process {number} on {device}"
        self.jobs: dict[tuple[int, str], Job] = {}
        self.is_alive = True
        self.is_idle = False
        self.peak_memory_bytes = 0
        self.end_reason = ""
        worker_inbox, self._outbox = Pipe(duplex=False)
        self._inbox, worker_outbox = Pipe(duplex=False)
        descriptors = worker_inbox.fileno(), worker_outbox.fileno()
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "pass_fds": descriptors}
        self._popen = start_module("icm_cli.matting.worker", *map(str, descriptors), **options)
        worker_inbox.close()
        worker_outbox.close()
        threading.Thread(target=self._receive_messages, args=(receive,), daemon=True).start()

    def send(self, message: Any) -> None:
        """Send a message; it is lost if the worker has died, which :meth:`_receive_messages` reports."""
        with contextlib.suppress(OSError):
            self._outbox.send(message)

    def take_job(self, waiting: deque[Job]) -> Job:
        """Move the first waiting job to this worker, and return it."""
        job = waiting[0]
        self.jobs[job.planned.key] = job  # before it leaves the queue, so that an interrupt loses no job
        return waiting.popleft()

    def close(self) -> None:
        """Close the connection: the worker finishes its current batch and its writes, and ends."""
        self._outbox.close()

    def kill(self) -> None:
        self.close()
        self._popen.kill()
        self._popen.wait()

    def wait_for_exit(self) -> str:
        """Wait for the process to end, and return how it ended, such as "killed by signal 9"."""
        code = self._popen.wait()
        return f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _receive_messages(self, receive: Callable[[_WorkerProcess, Any], None]) -> None:
        """Call ``receive`` with each message, and with None when the connection has ended."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                receive(self, self._inbox.recv())
        receive(self, None)
