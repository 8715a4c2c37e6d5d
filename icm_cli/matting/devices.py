"""Several devices: a process for each, one queue of images, and what they tell gathered here."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from typing import Any, Self

import torch

from icm_cli.environment import child_environment
from icm_cli.errors import DeviceError, IcmError
from icm_cli.files import remove_stale_temporaries
from icm_cli.matting.jobs import Job
from icm_cli.matting.work import Asked, Begin, Idle, NoMore, Work
from icm_cli.reports.result import ImageResult


class Devices:
    """Mattes images on several devices; ``on_result`` hears of each as it ends, in the caller's thread.

    A device that is lost, or whose process dies, is named, and the others take its images.
    """

    def __init__(
        self, works: Sequence[Work], *, on_result: Callable[[ImageResult], None], notice: Callable[[str], None]
    ) -> None:
        self._works = works
        self._on_result = on_result
        self._notice = notice
        self._heard: deque[tuple[_Process, Any]] = deque()
        self._bell = threading.Event()
        self._processes: list[_Process] = []
        self._waiting: deque[Job] = deque()
        self._error: IcmError | None = None
        self._is_stopped = False

    def __enter__(self) -> Self:
        """Start the processes and wait until each has its model. Raises ConfigError, or DeviceError if none has."""
        try:
            for number, work in enumerate(self._works, 1):
                self._processes.append(_Process(number, work.choice.where.torch_device, self._hear))
            for process, work in zip(self._processes, self._works, strict=True):
                process.order(work)
            while self._has_work and not self._error:
                self._take()
            self._check()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._kill()

    def run(self, jobs: Sequence[Job]) -> None:
        """Matte every image, once. An image that fails is reported and the others go on.

        Raises OutputError when nothing more can be written, DeviceError when no device is left. On any exception, an
        interrupt too, the writes in hand are finished first.
        """
        self._waiting.extend(jobs)
        try:
            while not self._is_stopped and (self._waiting or self._has_work):
                self._begin()
                self._check()
                self._take()
        finally:
            self._stop()
            while self._has_work or self._heard:
                self._take()
        if self._error:
            raise self._error

    def peak_memory_bytes(self) -> int:
        """The most memory that any of the devices held."""
        return max(each.peak_memory_bytes for each in self._processes)

    @property
    def _living(self) -> list[_Process]:
        return [each for each in self._processes if each.is_alive]

    @property
    def _has_work(self) -> bool:
        return any(not each.is_idle for each in self._living)

    def _begin(self) -> None:
        """Let those that have nothing to do ask for images, where there are any."""
        for process in self._living:
            if self._waiting and process.is_idle:
                process.is_idle = False
                process.order(Begin())

    def _check(self) -> None:
        """Raise what ended the run; DeviceError where no process is left."""
        if self._error:
            raise self._error
        if not self._living:
            ends = "; ".join(f"{each.name}: {each.end}" for each in self._processes)
            raise DeviceError(f"no device is left ({ends})")

    def _hear(self, process: _Process, message: Any) -> None:
        """Runs in a process's thread."""
        self._heard.append((process, message))
        self._bell.set()

    def _take(self) -> None:
        """Wait for a message and act on it. An interrupt may make a result heard of twice, and loses none."""
        while not self._heard:
            self._bell.wait()
            self._bell.clear()
        self._act(*self._heard[0])
        self._heard.popleft()

    def _act(self, process: _Process, message: Any) -> None:
        match message:
            case ImageResult():
                self._on_result(message)
                process.in_hand.pop(message.key, None)
                if message.status == "failed" and self._works[0].options.fail_fast:
                    self._stop()
            case Asked():
                process.order(NoMore() if self._is_stopped or not self._waiting else process.given(self._waiting))
            case Idle():
                process.is_idle = True
                process.peak_memory_bytes = max(process.peak_memory_bytes, message.peak_memory_bytes)
            case DeviceError():
                process.end = message.args[0]
            case IcmError():
                self._error = self._error or message
                self._stop()
            case str():
                self._notice(message)
            case None:
                self._bury(process)

    def _bury(self, process: _Process) -> None:
        """Take the images of a process that has ended back into the queue, and name it where nobody ended it."""
        process.is_alive = False
        status = process.exit_status()  # waits, so that it counts as dead
        process.end = process.end or status
        if self._is_stopped or self._error:
            return
        for folder in {job.output.parent for job in process.in_hand.values()}:
            remove_stale_temporaries(folder)
        self._waiting.extend(process.in_hand.values())  # last, in case that one of them ended it
        self._notice(f"{process.name} is lost ({process.end}); {len(process.in_hand)} image(s) in its hands wait again")
        process.in_hand.clear()

    def _stop(self) -> None:
        self._is_stopped = True
        for process in self._processes:
            process.hang_up()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()


class _Process:
    """A process of one device, and what is known of it."""

    def __init__(self, number: int, place: torch.device, hear: Callable[[_Process, Any], None]) -> None:
        """Start it; what it tells goes to ``hear`` in a thread, and None once it has ended. Its first order is a Work.

        ``number``: from 1.
        """
        self.name = f"process {number} on {place}"
        self.in_hand: dict[tuple[int, str], Job] = {}
        self.is_alive = True
        self.is_idle = False
        self.peak_memory_bytes = 0
        self.end = ""
        their_orders, self._orders = Pipe(duplex=False)
        self._answers, their_answers = Pipe(duplex=False)
        descriptors = their_orders.fileno(), their_answers.fileno()
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "icm_cli.matting.worker", *map(str, descriptors)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=descriptors,
            env=child_environment(),
        )
        their_orders.close()
        their_answers.close()
        threading.Thread(target=self._listen, args=(hear,), daemon=True).start()

    def order(self, message: Any) -> None:
        """Send an order; one that has died takes none, and is heard to have ended."""
        with contextlib.suppress(OSError):
            self._orders.send(message)

    def given(self, waiting: deque[Job]) -> Job:
        """The next image, which is in its hands from now on."""
        job = waiting[0]
        self.in_hand[job.planned.key] = job
        return waiting.popleft()

    def hang_up(self) -> None:
        """Let it finish the batch in hand and the writes, and end."""
        self._orders.close()

    def kill(self) -> None:
        self.hang_up()
        self._popen.kill()
        self._popen.wait()

    def exit_status(self) -> str:
        """The way that it ended, in words."""
        code = self._popen.wait()
        return f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _listen(self, hear: Callable[[_Process, Any], None]) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                hear(self, self._answers.recv())
        hear(self, None)
