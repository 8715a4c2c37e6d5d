"""Versions, processor and memory of this machine. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib.metadata
import math
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from icm_cli.errors import IcmError, ResourceError, UsageError

__version__ = "0.2.0"
"""Version of the code that runs; the package takes its version from here."""
ROOT = Path("/")
"""Folder that contains ``proc`` and the mounted cgroups."""
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "scipy", "opencv-python-headless", "pillow", "pymatting")


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of all packages that influence results."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "icm-cli": __version__, **versions}


def describe_hardware() -> dict[str, str | int]:
    """Return the system, the processor and the number of cores that this process may use."""
    return {"system": platform.platform(), "processor": processor_property("model name"), "cores": available_cores()}


def available_cores() -> int:
    """Return the number of cores of this process: its affinity, limited by the CPU quotas of its cgroups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, cpu_quotas())]))


def start_module(module: str, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Run a module of this package as a process, with options of ``subprocess.Popen``."""
    search_path = str(Path(__file__).resolve().parents[1])  # so that the process imports this copy of the package
    if os.environ.get("PYTHONPATH"):
        search_path += os.pathsep + os.environ["PYTHONPATH"]
    environment = {**os.environ, "PYTHONPATH": search_path}
    return subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment, **options)


def peak_memory_bytes() -> int:
    """Return the peak memory of this process.

    On Linux it is read from ``/proc``, because getrusage includes the peak of the parent after a fork and exec.
    """
    peak = _read_table(ROOT / "proc/self/status").get("VmHWM:")
    if peak is not None:
        return peak * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def trim_heap() -> None:
    """Return the free memory of the heap to the system. Only glibc does so on request."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def processor_property(name: str) -> str:
    """Return the first value of a name in ``/proc/cpuinfo``. On other systems, return the name of the processor."""
    lines = _read_text(ROOT / "proc/cpuinfo").splitlines()
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(values, platform.processor() or platform.machine())


@dataclass(frozen=True)
class FreeMemory:
    """Memory that this process can still allocate."""

    size: float
    """In bytes; infinite if the system does not report it."""
    where: str
    """What limits it, such as "on this machine"."""

    def __str__(self) -> str:
        if math.isinf(self.size):
            return "the free memory is unknown"
        return f"{format_gb(self.size)} are free {self.where}"


def format_gb(size: float) -> str:
    """Return a number of bytes as text, for example "1.5 GB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e9:.3f} GB"


def measure_free_memory() -> FreeMemory:
    """Return the memory that this process can still allocate.

    It is the least of what is free on the machine, in every cgroup of the process, and within its resource limits
    (ulimit). Memory that caches files counts as free.
    """
    limits = [FreeMemory(math.inf, "")]
    available_kb = _read_table(ROOT / "proc/meminfo").get("MemAvailable:")
    if available_kb is not None:
        limits.append(FreeMemory(available_kb * 1024, "on this machine"))
    for folder in cgroup_folders("memory"):
        limits += _free_memory_of_cgroup(folder)
    status = _read_table(ROOT / "proc/self/status")
    for kind, used_name, flag in ((resource.RLIMIT_AS, "VmSize:", "-v"), (resource.RLIMIT_DATA, "VmData:", "-d")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and used_name in status:
            where = f"within the limit of {format_gb(limit)} of ulimit {flag}"
            limits.append(FreeMemory(max(0, limit - status[used_name] * 1024), where))
    return min(limits, key=lambda memory: memory.size)


def _free_memory_of_cgroup(folder: Path) -> list[FreeMemory]:
    """Return what is free within each memory limit of a cgroup, of version 1 or 2."""
    statistics = _read_table(folder / "memory.stat")
    # In version 1, values with the prefix total_ include the cgroups below.
    cached = sum(statistics.get(f"total_{name}", statistics.get(name, 0)) for name in ("inactive_file", "active_file"))
    used = _read_number(folder / "memory.current") or _read_number(folder / "memory.usage_in_bytes") or 0
    used_without_cache = max(0, used - cached)
    free = []
    for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
        limit = _read_number(folder / name)
        if limit is not None:
            where = f"within the memory limit of {format_gb(limit)} of the container or cgroup"
            free.append(FreeMemory(max(0, limit - used_without_cache), where))
    return free


def free_threads() -> float:
    """Return how many further threads and processes this process may start; infinite without a limit."""
    free = [math.inf]
    for folder in cgroup_folders("pids"):
        limit, used = _read_number(folder / "pids.max"), _read_number(folder / "pids.current")
        if limit is not None and used is not None:
            free.append(limit - used)
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if limit != resource.RLIM_INFINITY and os.getuid():  # root may exceed it
        free.append(limit - _count_threads_of_user())
    return max(0, min(free))


def cpu_quotas() -> list[float]:
    """Return the CPU quotas of all cgroups of this process, in cores."""
    quotas = []
    for folder in cgroup_folders("cpu"):
        words = _read_text(folder / "cpu.max").split()  # quota and period in version 2 of cgroups
        if not words:
            words = [_read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if all(word.isdigit() for word in words) and int(words[1]):  # without a limit, the quota is "max" or -1
            quotas.append(int(words[0]) / int(words[1]))
    return quotas


def cgroup_folders(controller: str) -> list[Path]:
    """Return the folders of the cgroups that may limit this process: its own and those above, of version 1 and 2."""
    path_of_kind = {}  # "cgroup" (version 1) or "cgroup2" -> path of the cgroup of this process in its hierarchy
    for line in _read_text(ROOT / "proc/self/cgroup").splitlines():  # such as "4:memory:/user.slice"
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            path_of_kind["cgroup2"] = path
        elif controller in controllers.split(","):
            path_of_kind["cgroup"] = path
    folders: list[Path] = []
    for line in _read_text(ROOT / "proc/self/mountinfo").splitlines():
        mount, _, file_system = line.partition(" - ")
        kind, _, options = file_system.split(" ", 2)
        cgroup = path_of_kind.get(kind)
        if cgroup is None or (kind == "cgroup" and controller not in options.split(",")):
            continue
        # The mount shows the part of the hierarchy below its root. In a cgroup namespace, the root may be elsewhere.
        root, mount_point = (part.encode().decode("unicode_escape") for part in mount.split(" ")[3:5])
        path_in_mount = PurePosixPath(cgroup)
        parts = path_in_mount.relative_to(root).parts if path_in_mount.is_relative_to(root) else ()
        folder = ROOT / mount_point.lstrip("/")
        folders += [folder.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]
    return folders


def _count_threads_of_user() -> int:
    """Return the number of threads of all processes of this user."""
    count, user = 0, os.getuid()
    for entry in (ROOT / "proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry.stat().st_uid == user:
                count += len(list((entry / "task").iterdir()))
    return count


def _read_text(path: Path) -> str:
    """Return the content of a file; "" if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _read_number(path: Path) -> int | None:
    """Read a number; None if the file does not exist or states no limit."""
    text = _read_text(path).strip()
    return int(text) if text.isdigit() else None


def _read_table(path: Path) -> dict[str, int]:
    """Read lines of a name and a whole number, such as those of ``/proc/meminfo``."""
    rows = (line.split() for line in _read_text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


_model_process: int | None = None
"""Process in which the first model was loaded."""


def check_not_forked(*, loads_model: bool = False) -> None:
    """Raise UsageError in a process that was forked after a model was loaded.

    In the forked process torch would wait for ever for threads that exist only in the original process.
    ``loads_model``: whether the caller is about to load a model in this process, which is then remembered.
    """
    global _model_process
    if _model_process not in (None, os.getpid()):
        raise UsageError(
            "this process was forked from one in which icm had loaded a model, and the threads of the model do not "
            "exist in the fork; start this process with the method 'spawn' of multiprocessing, or load models only in "
            "the forked process"
        )
    if loads_model:
        _model_process = os.getpid()


@contextlib.contextmanager
def limited_threads() -> Iterator[None]:
    """Context in which torch and OpenCV use at most as many threads as there are cores, and as this process may start.

    If the environment sets the number (OMP_NUM_THREADS), only the second limit applies. It always applies, because
    torch ends the process if it cannot start its threads.
    """
    import cv2
    import torch

    check_not_forked()
    max_threads = 1 + free_threads() // 3  # readers, writers and other processes need some too
    if "OMP_NUM_THREADS" not in os.environ:
        max_threads = min(max_threads, available_cores())
    libraries = ((torch.get_num_threads(), torch.set_num_threads), (cv2.getNumThreads(), cv2.setNumThreads))
    too_many = [(threads, set_threads) for threads, set_threads in libraries if threads > max_threads]
    for _, set_threads in too_many:
        set_threads(int(max_threads))
    try:
        yield
    finally:
        for threads, set_threads in too_many:
            set_threads(threads)


OUT_OF_MEMORY = "needs more memory than could be allocated; {}; free memory, raise the limit or scale the image down"
"""End of a message about an image. The field is the free memory."""
_NO_MEMORY = re.compile(
    r"out of memory|(can't|cannot) allocate memory|(failed|unable) to allocate|bad_alloc|ALLOC_FAILED|"
    r"insufficient memory|failed to map segment|could not (create a primitive|create a memory object|execute a "
    r"primitive)$",
    re.IGNORECASE,
)
"""Messages of torch, oneDNN, CUDA, OpenCV, NumPy, the C++ library and the dynamic linker."""
_NO_THREADS = re.compile("can't start new thread|resource temporarily unavailable", re.IGNORECASE)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error of any library, or an error that led to it, means that memory ran out, on any device."""
    while error is not None:
        is_of_torch = type(error).__name__ == "OutOfMemoryError"
        is_of_system = getattr(error, "errno", None) == errno.ENOMEM
        if isinstance(error, MemoryError) or is_of_torch or is_of_system or _NO_MEMORY.search(str(error).strip()):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def resource_errors() -> Iterator[None]:
    """Convert errors about memory, threads and processes to ResourceError."""
    try:
        yield
    except IcmError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise ResourceError(
                f"memory ran out; {measure_free_memory()}; raise the memory limit of the process, end other programs, "
                "or choose a smaller model"
            ) from error
        if getattr(error, "errno", None) == errno.EAGAIN or _NO_THREADS.search(str(error)):
            raise ResourceError(
                "no further thread or process can be started; raise the limit (ulimit -u, or the limit "
                "of processes of the container), or give fewer --workers"
            ) from error
        raise


DEFAULT_WORKERS = max(1, min(4, available_cores() // 2))
"""Default number of threads that read, of threads that write, and of processes that score.

A few keep the model busy; more would only take its cores.
"""
