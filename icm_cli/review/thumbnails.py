"""Threads that make thumbnails in the order of the requests.

The page requests only a few thumbnails at a time, those in view first, so no other order is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from typing import TypeAlias

from icm_cli.environment import DEFAULT_WORKERS
from icm_cli.images.decoding import library_settings
from icm_cli.review.images import View

MAX_WAITING = 128
"""Largest number of waiting requests. A further one cancels the oldest."""
DISCONNECT_POLL_S = 0.5
"""Interval in which the connection of a waiting request is checked. If it is closed, the request is cancelled."""
WaitingRequest: TypeAlias = tuple["Future[bytes]", int, View]
"""The future thumbnail, the id of the image and the view."""


class ThumbnailWorkers:
    """One or two threads that make the requested thumbnails."""

    def __init__(self, make: Callable[[int, View], bytes]) -> None:
        """``make`` returns the thumbnail of an image in a view."""
        self._make = make
        self._waiting: deque[WaitingRequest] = deque()
        self._condition = threading.Condition()
        self._is_closed = False
        for _ in range(min(2, DEFAULT_WORKERS)):
            threading.Thread(target=self._work, name="icm-thumbnail", daemon=True).start()

    async def make(self, id: int, view: View, is_disconnected: Callable[[], Awaitable[bool]]) -> bytes | None:
        """Wait for a thumbnail and return it; None if the request was cancelled. Raises ImageError."""
        future: Future[bytes] = Future()
        with self._condition:
            self._waiting.append((future, id, view))
            if len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()[0].cancel()
            self._condition.notify()
        made = asyncio.wrap_future(future)
        while not (await asyncio.wait({made}, timeout=DISCONNECT_POLL_S))[0]:
            if await is_disconnected():
                future.cancel()
        with contextlib.suppress(CancelledError, asyncio.CancelledError):
            return made.result()
        return None

    def close(self) -> None:
        """End the threads after their current thumbnail."""
        with self._condition:
            self._is_closed = True
            for future, _, _ in self._waiting:
                future.cancel()
            self._waiting.clear()
            self._condition.notify_all()

    def _work(self) -> None:
        with library_settings():  # entered once instead of for each file
            self._take_requests()

    def _take_requests(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                future, id, view = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._make(id, view))
                except BaseException as error:  # noqa: BLE001  handed to the waiting request
                    future.set_exception(error)
