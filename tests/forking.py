"""Processes of icm that start at once: a server that has imported torch forks them, which takes seconds otherwise.

:class:`Popen`, which the tests have in place of ``subprocess.Popen``, does so for modules of icm that are run by
``python -m``, and starts anything else as ever. Such a process is a child of the test's, with descriptors, directory
and environment of its own, and can be waited for, signalled and killed. Run by itself this file is the server.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import importlib
import inspect
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

IS_POSSIBLE = sys.platform == "linux" and hasattr(subprocess.Popen, "_execute_child")
PR_SET_CHILD_SUBREAPER = 36
MOST_BYTES = 1 << 17
HIGH = 500
"""Descriptors that come in are moved to this number and above, to be out of the way of those that they are to be."""
IMPORTED = (
    "icm_cli.evaluation.evaluate",
    "icm_cli.matting.engine",
    "icm_cli.matting.matte",
    "icm_cli.model.loading",
    "icm_cli.training.train",
)
"""What the server imports; no module that is itself run."""

_Popen = subprocess.Popen
_server: socket.socket | None = None
_one_at_a_time = threading.Lock()


class Popen(_Popen):  # type: ignore[type-arg]
    """Starts a process of icm by the server, and any other as ever."""

    lines: ClassVar[dict[int, list[str]]] = {}
    """Command lines of the processes that the server has started, by their numbers."""

    def _execute_child(self, args: Any, *given: Any, **named: Any) -> None:
        execute = super()._execute_child  # type: ignore[misc]
        call = inspect.signature(execute).bind(args, *given, **named).arguments
        is_plain = not call["shell"] and call["preexec_fn"] is None and not call["start_new_session"]
        if not is_plain or not is_of_icm(args):
            execute(args, *given, **named)
            return
        ours = (call["p2cread"], call["c2pwrite"], call["errwrite"])
        numbers = {number: number if each == -1 else each for number, each in enumerate(ours)}
        numbers.update({each: each for each in call["pass_fds"]})
        order = {
            "line": [str(each) for each in args[2:]],
            "directory": os.fspath(call["cwd"] or Path.cwd()),
            "environment": dict(os.environ if call["env"] is None else call["env"]),
            "descriptors": list(numbers),
        }
        self.pid = forked(order, list(numbers.values()))
        self.lines[self.pid] = order["line"]
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(call[name] for name in pipes))  # type: ignore[attr-defined]


def command_line(pid: int) -> list[str]:
    """What a process of icm was started with, or any other."""
    return Popen.lines.get(pid) or Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")


def is_of_icm(args: Any) -> bool:
    return not isinstance(args, (str, bytes, os.PathLike)) and (
        [str(each) for each in args[:2]] == [sys.executable, "-m"] and str(args[2]).startswith("icm_cli.")
    )


def forked(order: dict[str, Any], descriptors: list[int]) -> int:
    """The number of a new child of this process, which runs what is ordered."""
    global _server
    with _one_at_a_time:
        if _server is None:
            _server = started()
        message = json.dumps(order).encode()
        assert len(message) < MOST_BYTES
        socket.send_fds(_server, [message], descriptors)
        pid = _server.recv(64)
    assert pid, "the server of processes has died"
    return int(pid)


def started() -> socket.socket:
    """Start the server; its children's children become this process' own."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = _Popen([sys.executable, __file__, str(its.fileno())], pass_fds=[its.fileno()])
    its.close()

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


def serve(link: socket.socket) -> list[str] | None:
    """Fork a process for every order; comes back in each with its command line, and at the end without."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(link, MOST_BYTES, 32)
        if not message:
            return None
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            os.close(reading)
            pid = os.fork()
            if pid == 0:
                os.close(writing)
                link.close()
                return become(json.loads(message), list(descriptors))
            os.write(writing, str(pid).encode())
            os._exit(0)
        os.close(writing)
        os.waitpid(between, 0)  # from now on the new process is a child of the tests'
        link.send(os.read(reading, 64))
        for each in (reading, *descriptors):
            os.close(each)


def become(order: dict[str, Any], descriptors: list[int]) -> list[str]:
    """Take on descriptors, directory, environment and the paths of modules, as a process that is started has them."""
    high = [fcntl.fcntl(each, fcntl.F_DUPFD, HIGH) for each in descriptors]
    os.closerange(3, HIGH)
    for each, number in zip(high, order["descriptors"], strict=True):
        os.dup2(each, number)
        os.close(each)
    os.chdir(order["directory"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.path[0] = order["directory"]
    sys.path[1:1] = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    line: list[str] = order["line"]
    return line


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    line = serve(socket.socket(fileno=int(sys.argv[1])))
    if line is not None:
        sys.argv = line
        runpy.run_module(line[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())
    main()
