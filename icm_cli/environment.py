"""Versions, processor and memory of this machine. Imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
from pathlib import Path

__version__ = "0.2.0"
"""Version of the code that runs; the package takes its version from here."""
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "numpy",
    "scipy",
    "opencv-python-headless",
    "pillow",
    "pymatting",
)


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of all packages that influence results."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "icm-cli": __version__, **versions}


def describe_hardware() -> dict[str, str | int]:
    """Return the system, the processor and the number of cores that this process may use."""
    return {"system": platform.platform(), "processor": _processor_name(), "cores": available_cores()}


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def child_environment() -> dict[str, str]:
    """Return environment variables with which a child process imports the same package."""
    home = str(Path(__file__).resolve().parents[1])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def peak_memory_bytes() -> int:
    """Return the peak memory of this process.

    On Linux it is read from ``/proc``, because getrusage includes the peak of the parent after a
    fork and exec.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


DEFAULT_WORKERS = max(1, min(4, available_cores() // 2))
"""Default number of threads that read, of threads that write, and of processes that score.

A few keep the model busy; more would only take its cores.
"""


def available_memory_bytes() -> int | None:
    """Return the memory that is available without swapping; None if the system does not report
    it."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
