"""A process that mattes on one device: it asks for image after image, and tells of each as it ends."""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icm_cli.matting.engine import Engine
    from icm_cli.matting.jobs import Job


def main() -> None:
    """Serve the process that started this one until it hangs up; the arguments are the descriptors of two pipes.

    A stop that reaches the whole group of processes is that one's to handle.
    """
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    from icm_cli.errors import IcmError
    from icm_cli.matting.work import Begin, Idle

    orders, answers = map(int, sys.argv[1:])
    link = Link(Connection(orders, writable=False), Connection(answers, readable=False))
    try:
        engine = link.work.engine(link.tell, link.tell)
        link.listen(engine)
        link.tell(Idle(engine.peak_memory_bytes()))
        while isinstance(link.order(), Begin):
            engine.run(link.jobs())
            link.tell(Idle(engine.peak_memory_bytes()))
    except IcmError as error:
        link.tell(error)


class Link:
    """The worker's end. The other may hang up at any time: the batch in hand is the last then."""

    def __init__(self, incoming: Connection, answers: Connection) -> None:
        self._incoming, self._answers = incoming, answers
        self._orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._telling = threading.Lock()
        self.work = incoming.recv()

    def tell(self, message: Any) -> None:
        """Send an answer from any thread; nobody hears it where the other process has died."""
        with self._telling, contextlib.suppress(OSError):
            self._answers.send(message)

    def listen(self, engine: Engine) -> None:
        """Take orders from now on; ``engine`` is stopped when the other end hangs up."""
        threading.Thread(target=self._hear, args=(engine,), daemon=True).start()

    def order(self) -> Any:
        """Wait for an order; None once the other end has hung up."""
        return self._orders.get()

    def jobs(self) -> Iterator[Job]:
        """Images as they are asked for, until no more is left."""
        from icm_cli.matting.jobs import Job
        from icm_cli.matting.work import Asked

        while True:
            self.tell(Asked())
            if not isinstance(job := self.order(), Job):
                return
            yield job

    def _hear(self, engine: Engine) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._orders.put(self._incoming.recv())
        engine.stop()
        for _ in range(2):  # one ends the images, one the process
            self._orders.put(None)


if __name__ == "__main__":
    main()
