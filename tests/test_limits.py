"""Limits of memory, processor time and processes, and errors when they are exceeded."""

from __future__ import annotations

import errno
import math
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import OpenImageIO as oiio
import pytest
from conftest import Icm, alphas, shrink

from icm_cli import environment
from icm_cli.environment import (
    FreeMemory,
    available_cores,
    cpu_quotas,
    free_threads,
    is_out_of_memory,
    limited_threads,
    measure_free_memory,
    resource_errors,
)
from icm_cli.errors import ResourceError
from icm_cli.images.pixels import BYTES_PER_PIXEL
from icm_cli.matting import engine
from icm_cli.matting.memory_budget import MemoryBudget

MOUNT_V2 = "30 20 0:26 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
MOUNT_V1 = "35 31 0:32 {top} /sys/fs/cgroup/{name} rw,relatime - cgroup cgroup rw,{name}\n"
GB = 10**9


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the root of the file system, with 8 GB of available memory."""
    folder = tmp_path / "root"
    write(folder / "proc/meminfo", "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n")
    monkeypatch.setattr(environment, "ROOT", folder)
    return folder


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def mount_v2(root: Path, own: str, top: str = "/") -> Path:
    """Mount cgroups of version 2, of which the process is in ``own``; return their folder."""
    write(root / "proc/self/cgroup", f"0::{own}\n")
    write(root / "proc/self/mountinfo", MOUNT_V2.format(top=top))
    return root / "sys/fs/cgroup"


class TestFreeMemory:
    @pytest.mark.usefixtures("root")
    def test_of_machine(self) -> None:
        assert measure_free_memory() == FreeMemory(8_000_000 * 1024, "on this machine")

    def test_smallest_limit_of_nested_cgroups(self, root: Path) -> None:
        folder = mount_v2(root, "/job/step")
        write(folder / "job/memory.max", f"{2 * GB}\n")
        write(folder / "job/memory.current", f"{GB}\n")
        write(folder / "job/memory.stat", "anon 5\ninactive_file 100000000\nactive_file 200000000\n")
        write(folder / "job/step/memory.max", "max\n")
        write(folder / "job/step/memory.current", f"{GB}\n")
        free = measure_free_memory()
        assert free.size == 2 * GB - GB + 300_000_000
        assert str(free) == "1.3 GB are free within the memory limit of 2.0 GB of the container or cgroup"
        write(folder / "job/step/memory.high", f"{GB + 5}\n")
        assert measure_free_memory().size == 5

    def test_version_1_in_a_container(self, root: Path) -> None:
        """The mount shows the cgroup of the container as its top folder."""
        write(root / "proc/self/cgroup", "9:pids:/docker/ab\n4:memory:/docker/ab\n2:cpu,cpuacct:/docker/ab\n0::/\n")
        write(root / "proc/self/mountinfo", MOUNT_V1.format(top="/docker/ab", name="memory"))
        write(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{GB}\n")
        write(root / "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{GB // 2}\n")
        write(root / "sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 1000\n")
        assert measure_free_memory().size == GB // 2 + 1000

    @pytest.mark.parametrize(("kind", "flag"), [("RLIMIT_AS", "-v"), ("RLIMIT_DATA", "-d")])
    def test_resource_limit(self, kind: str, flag: str) -> None:
        code = (
            f"import resource; resource.setrlimit(resource.{kind}, (900_000_000, resource.RLIM_INFINITY))\n"
            "from icm_cli.environment import measure_free_memory; print(measure_free_memory())"
        )
        text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert text.strip().endswith(f"within the limit of 0.9 GB of ulimit {flag}")


class TestProcessor:
    def test_quota_of_version_2(self, root: Path) -> None:
        folder = mount_v2(root, "/a")
        write(folder / "a/cpu.max", "150000 100000\n")
        write(folder / "cpu.max", "max 100000\n")
        assert cpu_quotas() == [1.5]
        assert available_cores() <= 2

    def test_quota_of_version_1(self, root: Path) -> None:
        write(root / "proc/self/cgroup", "2:cpu,cpuacct:/a\n")
        write(root / "proc/self/mountinfo", MOUNT_V1.format(top="/", name="cpu"))
        write(root / "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "50000\n")
        write(root / "sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n")
        write(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
        write(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
        assert cpu_quotas() == [0.5]
        assert available_cores() == 1

    def test_limit_of_processes_limits_threads_during_a_run(self, root: Path) -> None:
        import torch

        folder = mount_v2(root, "/a")
        write(folder / "a/pids.max", "12\n")
        write(folder / "a/pids.current", "11\n")
        before = torch.get_num_threads(), cv2.getNumThreads()
        assert free_threads() == 1
        with limited_threads():
            assert torch.get_num_threads() == cv2.getNumThreads() == 1
        assert (torch.get_num_threads(), cv2.getNumThreads()) == before

    @pytest.mark.usefixtures("root")
    def test_no_limit(self) -> None:
        assert free_threads() == math.inf or resource.getrlimit(resource.RLIMIT_NPROC)[0] > 0
        assert cpu_quotas() == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 1 GiB for an array"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("could not create a primitive"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        cv2.error("OpenCV(4.11.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 9 bytes"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        ValueError("std::bad_alloc"),
    ],
)
def test_errors_about_memory(error: Exception) -> None:
    assert is_out_of_memory(error)
    with (
        pytest.raises(ResourceError, match="memory ran out; "),
        resource_errors(),
    ):
        raise error


def test_other_errors_stay() -> None:
    with pytest.raises(RuntimeError, match="could not create a primitive descriptor for"), resource_errors():
        raise RuntimeError("could not create a primitive descriptor for the matmul primitive")
    with pytest.raises(ResourceError, match="no further thread or process"), resource_errors():
        raise RuntimeError("can't start new thread")


class TestRuns:
    @pytest.fixture
    def few(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The free memory is enough for one image of the scene, not for two."""
        monkeypatch.setattr(engine, "WORKING_BYTES", 1)
        monkeypatch.setattr(engine, "measure_free_memory", lambda: FreeMemory(200 * 150 * BYTES_PER_PIXEL, "in a test"))

    @pytest.mark.usefixtures("few")
    @pytest.mark.parametrize("batch_size", ["1", "4"])
    def test_images_wait_for_memory(self, icm: Icm, scene: Path, batch_size: str) -> None:
        result = icm("--workers", "3", "--batch-size", batch_size)
        assert result.exit_code == 0
        assert len(alphas(scene / "out")) == 3

    @pytest.mark.usefixtures("few")
    def test_large_image_fails_alone(self, icm: Icm, scene: Path) -> None:
        shrink(scene / "imgs" / "wall.jpg", scene / "imgs" / "big.png", 800)
        result = icm("--workers", "2")
        assert result.exit_code == 1
        assert "big.png: is 600x800, which needs about 0.012 GB of memory, and only 0.001 GB are free" in result.stderr
        assert sorted(alphas(scene / "out")) == ["pad.0101.png", "sub/deep.png", "wall.png"]

    def test_free_memory_is_measured_again_before_a_matte_is_refused(self) -> None:
        sizes = iter((100, 1000))
        budget = MemoryBudget(lambda: FreeMemory(next(sizes), "in a test"))
        job: Any = SimpleNamespace()
        budget.add_job(job)
        for size in (50, 200):
            budget.reserve(job, Path("a.png"), "1x1", size)

    @pytest.mark.usefixtures("few")
    def test_large_display_window_or_matte_fails_alone(self, icm: Icm, scene: Path) -> None:
        for side in (40, 50, 60):
            spec = oiio.ImageSpec(side, 30, 3, "half")
            spec.full_width, spec.full_height = 800, 600
            path = str(scene / "imgs" / f"{side}.exr")
            file = oiio.ImageOutput.create(path)
            assert file.open(path, spec)
            assert file.write_image(np.zeros((30, side, 3), np.float32))
            file.close()
        result = icm()
        assert result.exit_code == 1
        for side in (40, 50, 60):
            assert f"{side}.exr: is 800x600, which needs about 0.016 GB of memory" in result.stderr
        assert sorted(alphas(scene / "out")) == ["pad.0101.png", "sub/deep.png", "wall.png"]
        cv2.imwrite(str(scene / "g.png"), np.zeros((800, 600), np.uint8))
        result = icm(src=scene / "imgs" / "wall.jpg", garbage=scene / "g.png", out=scene / "o")
        assert result.exit_code == 1
        assert f"{scene}/g.png is 600x800, which needs about 0.012 GB of memory" in result.stderr

    def test_memory_runs_out_while_writing(self, icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_alpha = engine.write_alpha

        def fail(path: Path, *arguments: object) -> None:
            if path.stem == "wall":
                raise MemoryError("Unable to allocate 748. MiB for an array")
            write_alpha(path, *arguments)

        monkeypatch.setattr(engine, "write_alpha", fail)
        result = icm()
        assert result.exit_code == 1
        assert "wall.jpg: needs more memory than could be allocated" in result.stderr
        assert sorted(alphas(scene / "out")) == ["pad.0101.png", "sub/deep.png"]

    def test_memory_runs_out_while_loading(self, icm: Icm, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9437184 bytes")

        monkeypatch.setattr("icm_cli.matting.model_choice.load_model", fail)
        result = icm()
        assert result.exit_code == 3
        assert result.stderr.startswith("icm: memory ran out; ")
        assert result.stderr.count("\n") == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("kilobytes", [700_000, 1_100_000])
    def test_limit_of_address_space(self, scene: Path, small_model: Path, kilobytes: int) -> None:
        """Whatever fails under ``ulimit -v``, one line says so."""
        line = (
            f"ulimit -v {kilobytes}; exec {sys.executable} -m icm_cli.cli matte --ref ref.png --mask mask.png "
            f"--src imgs --out out --model {small_model}"
        )
        run = subprocess.run(["bash", "-c", line], cwd=scene, capture_output=True, text=True, check=False)
        assert run.returncode in (0, 1, 3), run.stderr
        assert "Traceback" not in run.stderr
        if run.returncode == 3:
            assert "memory ran out" in run.stderr
