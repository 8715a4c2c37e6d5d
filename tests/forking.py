"""Fast start of icm processes in tests: a server that has already imported torch forks them.

In tests, :class:`Popen` replaces ``subprocess.Popen``. It uses the server for modules of icm that
are run with ``python -m``, and starts all other processes normally. A forked process is a child of
the test process with its own descriptors, directory and environment. It can be waited for,
signalled and killed like any other process.

When run as a script, this file is the server.
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
MAX_MESSAGE_BYTES = 1 << 17
FIRST_TEMPORARY_DESCRIPTOR = 500
"""Received descriptors are first moved to numbers from this one on, because their final numbers may be in use."""
PRELOADED_MODULES = (
    "icm_cli.evaluation.evaluate",
    "icm_cli.matting.engine",
    "icm_cli.matting.matte",
    "icm_cli.model.loading",
    "icm_cli.training.train",
)
"""Modules that the server imports. It cannot run one of them as a script."""

_Popen = subprocess.Popen
_server: socket.socket | None = None
_request_lock = threading.Lock()


class Popen(_Popen):  # type: ignore[type-arg]
    """Popen that starts processes of icm by the server, and others normally."""

    lines: ClassVar[dict[int, list[str]]] = {}
    """Command lines of the processes started by the server, by process ID."""

    def _execute_child(self, args: Any, *given: Any, **named: Any) -> None:
        execute = super()._execute_child  # type: ignore[misc]
        call = inspect.signature(execute).bind(args, *given, **named).arguments
        is_plain = not call["shell"] and call["preexec_fn"] is None and not call["start_new_session"]
        if not is_plain or not is_icm_command(args):
            execute(args, *given, **named)
            return
        ours = (call["p2cread"], call["c2pwrite"], call["errwrite"])
        numbers = {number: number if each == -1 else each for number, each in enumerate(ours)}
        numbers.update({each: each for each in call["pass_fds"]})
        request = {
            "line": [str(each) for each in args[2:]],
            "directory": os.fspath(call["cwd"] or Path.cwd()),
            "environment": dict(os.environ if call["env"] is None else call["env"]),
            "descriptors": list(numbers),
        }
        self.pid = request_process(request, list(numbers.values()))
        self.lines[self.pid] = request["line"]
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(call[name] for name in pipes))  # type: ignore[attr-defined]


def command_line(pid: int) -> list[str]:
    """Return the command line of a process."""
    return Popen.lines.get(pid) or Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")


def is_icm_command(args: Any) -> bool:
    return not isinstance(args, (str, bytes, os.PathLike)) and (
        [str(each) for each in args[:2]] == [sys.executable, "-m"] and str(args[2]).startswith("icm_cli.")
    )


def request_process(request: dict[str, Any], descriptors: list[int]) -> int:
    """Let the server start a process; return the process ID."""
    global _server
    with _request_lock:
        if _server is None:
            _server = start_server()
        message = json.dumps(request).encode()
        assert len(message) < MAX_MESSAGE_BYTES
        socket.send_fds(_server, [message], descriptors)
        pid = _server.recv(64)
    assert pid, "the process server has died"
    return int(pid)


def start_server() -> socket.socket:
    """Start the server and return the socket to it.

    Processes that the server starts become children of this process.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = _Popen([sys.executable, __file__, str(its.fileno())], pass_fds=[its.fileno()])
    its.close()

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


def serve_requests(link: socket.socket) -> list[str] | None:
    """Fork a process for every request.

    Returns the command line in each forked process, and None in the server when the socket is
    closed.
    """
    while True:
        message, descriptors, _, _ = socket.recv_fds(link, MAX_MESSAGE_BYTES, 32)
        if not message:
            return None
        reading, writing = os.pipe()
        intermediate_pid = os.fork()
        if intermediate_pid == 0:
            os.close(reading)
            pid = os.fork()
            if pid == 0:
                os.close(writing)
                link.close()
                return apply_request(json.loads(message), list(descriptors))
            os.write(writing, str(pid).encode())
            os._exit(0)
        os.close(writing)
        os.waitpid(intermediate_pid, 0)  # now the new process is a child of the test process
        link.send(os.read(reading, 64))
        for each in (reading, *descriptors):
            os.close(each)


def apply_request(request: dict[str, Any], descriptors: list[int]) -> list[str]:
    """Set descriptors, directory, environment and module paths; return the command line."""
    moved = [fcntl.fcntl(each, fcntl.F_DUPFD, FIRST_TEMPORARY_DESCRIPTOR) for each in descriptors]
    os.closerange(3, FIRST_TEMPORARY_DESCRIPTOR)
    for each, number in zip(moved, request["descriptors"], strict=True):
        os.dup2(each, number)
        os.close(each)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[0] = request["directory"]
    sys.path[1:1] = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    line: list[str] = request["line"]
    return line


def main() -> None:
    for name in PRELOADED_MODULES:
        importlib.import_module(name)
    line = serve_requests(socket.socket(fileno=int(sys.argv[1])))
    if line is not None:
        sys.argv = line
        runpy.run_module(line[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())
    main()
