"""The environment of a run: versions, processor, memory. Imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
from pathlib import Path

__version__ = importlib.metadata.version("icm-cli")
PACKAGES = (
    "icm-cli",
    "torch",
    "diffusers",
    "transformers",
    "numpy",
    "scipy",
    "opencv-python-headless",
    "pillow",
    "pymatting",
)


def versions() -> dict[str, str]:
    """Versions of Python and of every package that decides a number."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def hardware() -> dict[str, str | int]:
    """System, processor and number of cores this process may use."""
    return {"system": platform.platform(), "processor": _processor(), "cores": cores()}


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def child_environment() -> dict[str, str]:
    """Environment variables with which a child process imports this very package."""
    home = str(Path(__file__).resolve().parents[1])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def peak_memory_bytes() -> int:
    """The most memory this process held so far.

    Linux's own count: what getrusage says begins, after a fork and exec, at the peak of the parent.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


DEFAULT_WORKERS = max(1, min(4, cores() // 2))
"""Threads that read, as many that write, and processes that score; a few keep a model fed, more only take its cores."""


def available_memory_bytes() -> int | None:
    """Memory that new work may take before the system swaps, None where the system does not say."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
