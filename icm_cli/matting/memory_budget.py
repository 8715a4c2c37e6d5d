"""``MemoryBudget``: limits the memory of the images that are being processed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from icm_cli.environment import FreeMemory
from icm_cli.errors import ImageError, ImageMemoryError
from icm_cli.images.pixels import too_large_message
from icm_cli.matting.jobs import Job


class MemoryBudget:
    """Limits the memory of images that are being processed: decoded, and not yet written.

    Images reserve memory in the order of their jobs, so that none waits for a later one. An image so large that it fits
    into memory only alone waits until all others are written.
    """

    def __init__(self, measure: Callable[[], FreeMemory]) -> None:
        """``measure``: returns the memory that is free while no image is being processed."""
        self._measure = measure
        self._free = measure()
        self._queue: deque[Job] = deque()
        self._reserved: dict[int, int] = {}
        self._condition = threading.Condition()
        self._is_waiting = self._is_closed = False

    def add_job(self, job: Job) -> None:
        """Add a job to the end of the queue, in whose order images reserve memory."""
        self._queue.append(job)

    def reserve(self, job: Job, path: Path, size: str, needed: int) -> None:
        """Reserve ``needed`` bytes for an image of a job; wait until there is enough.

        Raises ImageMemoryError if the image is too large even when it is alone.
        """
        with self._condition:
            if job in self._queue:  # else it is another file of the same job, for which no job waits
                self._condition.wait_for(lambda: self._is_closed or self._queue[0] is job)
                self._is_waiting = True  # ends wait_until_read(), so that the images before are matted
                self._condition.notify_all()
                self._condition.wait_for(lambda: self._is_closed or not self._reserved or self._fits(needed))
                self._is_waiting = False
                if self._is_closed:
                    raise ImageError(f"{path} was not read, because the run ended")
                if not self._reserved and not self._fits(needed):
                    self._free = self._measure()
                    if not self._fits(needed):
                        raise ImageMemoryError(too_large_message(path, size, needed, self._free))
                self._queue.remove(job)
            elif needed > self._free.size and needed > (free := self._measure()).size:
                raise ImageMemoryError(too_large_message(path, size, needed, free))
            self._reserved[id(job)] = self._reserved.get(id(job), 0) + needed
            self._condition.notify_all()

    def _fits(self, needed: int) -> bool:
        return sum(self._reserved.values()) + needed <= self._free.size

    def end_reading(self, job: Job) -> None:
        """Remove a job from the queue if reading failed before it reserved memory. Else later jobs would wait."""
        with self._condition:
            if job in self._queue:
                self._queue.remove(job)
            self._condition.notify_all()

    def release(self, job: Job) -> None:
        """Release the memory of a job."""
        with self._condition:
            self._reserved.pop(id(job), None)
            self._condition.notify_all()

    def wait_until_read(self, reading: Future[Any]) -> bool:
        """Wait until an image is read and return True, or return False as soon as it waits for the memory of others."""
        reading.add_done_callback(lambda _: self._notify())
        with self._condition:
            self._condition.wait_for(lambda: reading.done() or self._is_waiting)
        return reading.done()

    def close(self) -> None:
        """End all waiting."""
        self._is_closed = True
        self._notify()

    def _notify(self) -> None:
        with self._condition:
            self._condition.notify_all()
