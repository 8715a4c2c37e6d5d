"""Threads that make thumbnails: those that the page asks for, and ahead of it those that come next in its list."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

from icm_cli.environment import DEFAULT_WORKERS, measure_free_memory
from icm_cli.errors import ImageMemoryError
from icm_cli.images.decoding import library_settings
from icm_cli.images.pixels import reserve_memory, too_large_message
from icm_cli.review.images import View

BATCH_S = 0.1
"""Seconds after which a request is answered with the thumbnails that are ready: the page may want others by then."""
MAX_AHEAD = 150
"""Number of thumbnails that are made ahead: those after the last ones that the page has asked for."""
SMALL_IMAGE_BYTES = 1 << 26
"""Images that need less memory are decoded without checking the free memory, which takes as long as decoding them."""
Batch: TypeAlias = dict[int, bytes | str]
"""Thumbnails by the id of the image; for an image without one, the reason."""


class ThumbnailWorkers:
    """Two threads that answer requests, and one that works ahead while there are none."""

    def __init__(self, make: Callable[[int, View], bytes], order: Sequence[int]) -> None:
        """``make`` returns the thumbnail of an image in a view as a JPEG.

        ``order``: the ids as the page lists them. Thumbnails of other images are not made ahead.
        """
        self._make, self._order = make, order
        self._ranks = {id: rank for rank, id in enumerate(order)}
        self._settings = contextlib.ExitStack()
        self._settings.enter_context(library_settings())  # changed once, and not for each file
        self._executor = ThreadPoolExecutor(min(2, DEFAULT_WORKERS), "icm-thumbnail", _skip_memory_checks)
        self._condition = threading.Condition()
        self._requests = 0
        """Number of requests that are being answered or wait."""
        self._next_ranks = range(min(MAX_AHEAD, len(order)))
        """Ranks of the images whose thumbnails are made ahead."""
        self._view: View = "cutout"
        self._is_closed = False
        self._thread = threading.Thread(target=self._work_ahead, name="icm-thumbnail-ahead", daemon=True)
        self._thread.start()

    async def make(self, ids: Sequence[int], view: View) -> Batch:
        """Return thumbnails for the first of ``ids``: as many as can be made in BATCH_S seconds, but at least one.

        Afterwards, the thumbnails of the next images are made in advance, while no request waits.
        """
        with self._condition:
            self._requests += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._make_batch, ids, view)
        finally:
            with self._condition:
                self._requests -= 1
                start = 1 + max(self._ranks.get(id, -1) for id in ids)
                self._next_ranks = range(start, min(start + MAX_AHEAD, len(self._order)))
                self._view = view
                self._condition.notify()

    def close(self) -> None:
        """End the threads after their current thumbnail."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        self._executor.shutdown(cancel_futures=True)
        self._thread.join()
        self._settings.close()

    def _make_batch(self, ids: Sequence[int], view: View) -> Batch:
        """Return the thumbnails of the first of ``ids``: at least one, and more until BATCH_S seconds are over."""
        end = time.monotonic() + BATCH_S
        batch: Batch = {}
        for id in ids:
            try:
                batch[id] = self._make(id, view)
            except Exception as error:  # noqa: BLE001  handed to the page
                batch[id] = str(error)
            if time.monotonic() > end or self._is_closed:
                break
        return batch

    def _work_ahead(self) -> None:
        """Make the next thumbnails while there are no requests, so that they are cached. Runs in its own thread."""
        _skip_memory_checks()
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._is_closed or (self._next_ranks and not self._requests))
                if self._is_closed:
                    return
                rank, self._next_ranks = self._next_ranks[0], self._next_ranks[1:]
            self._make_batch([self._order[rank]], self._view)


def _skip_memory_checks() -> None:
    """Let this thread decode small images without checking the free memory."""
    reserve_memory.set(_check_large_image)


def _check_large_image(path: Path, size: str, needed: int) -> None:
    """Raise ImageMemoryError for a large image that does not fit into the free memory."""
    if needed <= SMALL_IMAGE_BYTES:
        return
    free = measure_free_memory()
    if needed > free.size:
        raise ImageMemoryError(too_large_message(path, size, needed, free))
