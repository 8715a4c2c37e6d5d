"""A worker process of :class:`icm_cli.matting.devices.WorkerPool`, which mattes on one device."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from icm_cli.signals import ignore_stop_signals

if TYPE_CHECKING:
    from icm_cli.matting.engine import Engine
    from icm_cli.matting.jobs import Job


def main() -> None:
    """Request and matte jobs until the parent process closes the connection.

    The command line arguments are the file descriptors of two pipes, for reading and for writing.
    """
    ignore_stop_signals()
    from icm_cli.environment import limited_threads, resource_errors
    from icm_cli.errors import IcmError
    from icm_cli.matting.devices import WorkerIdle, WorkerMessage

    inbox, outbox = map(int, sys.argv[1:])
    parent = ParentConnection(Connection(inbox, writable=False), Connection(outbox, readable=False))
    try:
        with limited_threads(), resource_errors():
            engine = parent.setup.create_engine(parent.send, parent.send)
            parent.start_receiving(engine)
            parent.send(WorkerIdle(engine.peak_memory_bytes()))
            while parent.next_message() is WorkerMessage.START_RUN:
                engine.run(parent.request_jobs())
                parent.send(WorkerIdle(engine.peak_memory_bytes()))
    except IcmError as error:
        parent.send(error)


class ParentConnection:
    """Connection to the parent process. When the parent closes it, the current batch is the last one."""

    def __init__(self, inbox: Connection, outbox: Connection) -> None:
        """Wait for the first message, the :class:`~icm_cli.matting.devices.EngineSetup`."""
        self._inbox, self._outbox = inbox, outbox
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._send_lock = threading.Lock()
        self.setup = inbox.recv()

    def send(self, message: Any) -> None:
        """Send a message from any thread; it is lost if the parent process has died."""
        with self._send_lock, contextlib.suppress(OSError):
            self._outbox.send(message)

    def start_receiving(self, engine: Engine) -> None:
        """Receive messages in a thread; stop ``engine`` when the parent closes the connection."""
        threading.Thread(target=self._receive_messages, args=(engine,), daemon=True).start()

    def next_message(self) -> Any:
        """Wait for a message and return it; None after the parent has closed the connection."""
        return self._messages.get()

    def request_jobs(self) -> Iterator[Job]:
        """Request jobs one by one, and yield them until none is left."""
        from icm_cli.matting.devices import WorkerMessage
        from icm_cli.matting.jobs import Job

        while True:
            self.send(WorkerMessage.REQUEST_JOB)
            if not isinstance(job := self.next_message(), Job):
                return
            yield job

    def _receive_messages(self, engine: Engine) -> None:
        """Queue all messages. When the connection ends, stop the engine and the process."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._messages.put(self._inbox.recv())
        engine.stop()
        for _ in range(2):  # the first None ends the jobs, the second one the process
            self._messages.put(None)


if __name__ == "__main__":
    main()
