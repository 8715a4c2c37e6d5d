"""Several devices: one worker process each, one queue and one report. Whichever worker dies, the alphas are those of
one device."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from conftest import Icm, alphas, arguments, copy_many
from faulty_setups import FullDiskSetup, LostDeviceSetup, UnloadableSetup
from forking import command_line

from icm_cli.matting import matte as matting
from icm_cli.matting.predictor import Predictor

MANY = 14
"""Number of images in a run that is disturbed."""


@pytest.fixture
def single_device_alphas(icm: Icm, scene: Path) -> dict[str, bytes]:
    """Alphas of MANY images in many/ by one device, which must not start a worker."""
    copy_many(scene / "imgs" / "wall.jpg", scene / "many", MANY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matting, "WorkerPool", None)
        assert icm(src=scene / "many", out=scene / "alone").exit_code == 0
    return alphas(scene / "alone")


DisturbedRun = Callable[[Callable[[list[int]], object]], Result]


def worker_processes(pid: int) -> list[int]:
    """Worker processes that the main thread of a process has started."""
    children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in children if "icm_cli.matting.worker" in command_line(child)]


def after_third_alpha(scene: Path, pid: int, then: Callable[[list[int]], object]) -> threading.Thread:
    """Wait in a thread for the third alpha, then call a function with the worker processes."""

    def wait() -> None:
        until = time.monotonic() + 100
        while len(list((scene / "out").glob("*.png"))) < 3 and time.monotonic() < until:
            time.sleep(0.005)
        then(worker_processes(pid))

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.fixture
def run_disturbed(icm: Icm, scene: Path) -> DisturbedRun:
    """A function that runs ``icm matte`` on two devices, and another function with their processes during the run."""

    def run(then: Callable[[list[int]], object]) -> Result:
        thread = after_third_alpha(scene, os.getpid(), then)
        try:
            return icm(src=scene / "many", device="cpu,cpu", report=scene / "r.json")
        finally:
            thread.join()

    return run


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def statuses(report: Path) -> dict[str, int]:
    images = json.loads(report.read_text())["images"]
    assert len(images) == MANY
    found = [image["status"] for image in images]
    return {status: found.count(status) for status in set(found)}


def test_two_processes_write_the_same_bytes_and_one_report(
    icm: Icm, scene: Path, single_device_alphas: dict[str, bytes]
) -> None:
    (scene / "many" / "0003.jpg").write_bytes(b"")
    result = icm("--progress", "json", src=scene / "many", device="cpu,cpu", report=scene / "r.json")
    assert result.exit_code == 1, result.output
    del single_device_alphas["0003.png"]
    assert alphas(scene / "out") == single_device_alphas
    assert statuses(scene / "r.json") == {"done": MANY - 1, "failed": 1}
    assert json.loads((scene / "r.json").read_text())["settings"]["device"].count("cpu") == 2
    events = [json.loads(line)["event"] for line in result.stdout.splitlines()]
    assert events == ["started", *["image"] * MANY, "finished"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Predictor, "matte_frames", None)
        (scene / "many" / "0003.jpg").unlink()
        assert icm(src=scene / "many").exit_code == 0  # one device keeps what two have made


@pytest.mark.slow
def test_fail_fast_stops_all_processes(icm: Icm, scene: Path, single_device_alphas: dict[str, bytes]) -> None:
    (scene / "many" / "0000.jpg").write_bytes(b"")
    result = icm("--fail-fast", src=scene / "many", device="cpu,cpu", report=scene / "r.json")
    assert result.exit_code == 1
    found = statuses(scene / "r.json")
    assert found["failed"] == 1
    assert found["not reached"] > 0
    assert alphas(scene / "out").items() <= single_device_alphas.items()


def test_images_of_a_killed_process_are_matted_by_the_other(
    scene: Path, run_disturbed: DisturbedRun, single_device_alphas: dict[str, bytes]
) -> None:
    result = run_disturbed(lambda processes: os.kill(processes[0], signal.SIGKILL))
    assert result.exit_code == 0, result.output
    assert "process 1 on cpu is lost (killed by signal 9)" in result.stderr
    assert alphas(scene / "out") == single_device_alphas
    assert statuses(scene / "r.json").get("failed") is None


@pytest.mark.slow
def test_images_of_a_lost_device_are_matted_by_the_other(
    icm: Icm, scene: Path, single_device_alphas: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matting, "EngineSetup", LostDeviceSetup)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("LOST", str(scene / "lost"))
    result = icm(src=scene / "many", device="cpu,cpu")
    assert result.exit_code == 0, result.output
    assert "is lost (device cpu was lost: CUDA error: unspecified launch failure)" in result.stderr
    assert "Traceback" not in result.stderr
    assert alphas(scene / "out") == single_device_alphas


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "message"), [(FullDiskSetup, "no space left on the device"), (UnloadableSetup, "no such model")]
)
def test_other_errors_end_the_run(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch, work: type, message: str
) -> None:
    copy_many(scene / "imgs" / "wall.jpg", scene / "many", 3)
    monkeypatch.setattr(matting, "EngineSetup", work)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    result = icm("--quiet", src=scene / "many", device="cpu,cpu")
    assert result.exit_code == 3, result.output
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not alphas(scene / "out")
    assert not worker_processes(os.getpid())


@pytest.mark.slow
def test_loss_of_all_devices_is_reported(
    icm: Icm, scene: Path, run_disturbed: DisturbedRun, single_device_alphas: dict[str, bytes]
) -> None:
    result = run_disturbed(lambda processes: [os.kill(pid, signal.SIGKILL) for pid in processes])
    assert result.exit_code == 3, result.output
    assert "no device is left (process 1 on cpu: killed by signal 9; process 2 on cpu: killed by" in result.stderr
    assert statuses(scene / "r.json")["not reached"] > 0
    assert icm(src=scene / "many").exit_code == 0
    assert alphas(scene / "out") == single_device_alphas


@pytest.mark.slow
@pytest.mark.parametrize(("number", "is_to_all", "code"), [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)])
def test_signal_lets_all_processes_finish_their_writes(
    scene: Path,
    run_disturbed: DisturbedRun,
    single_device_alphas: dict[str, bytes],
    number: signal.Signals,
    is_to_all: bool,
    code: int,
) -> None:
    seen = []

    def stop(processes: list[int]) -> None:
        seen.extend(processes)
        for pid in (*(processes if is_to_all else ()), os.getpid()):
            os.kill(pid, number)

    result = run_disturbed(stop)
    assert result.exit_code == code, result.output
    assert len(seen) == 2
    assert not any(map(is_running, seen))
    made = alphas(scene / "out")
    assert 3 <= len(made) < MANY
    assert made.items() <= single_device_alphas.items()
    assert statuses(scene / "r.json") == {"done": len(made), "not reached": MANY - len(made)}


@pytest.mark.slow
def test_processes_exit_when_the_run_is_killed_and_leave_no_partial_files(
    scene: Path, small_model: Path, single_device_alphas: dict[str, bytes]
) -> None:
    given = {"ref": scene / "ref.png", "mask": scene / "mask.png", "src": scene / "many", "out": scene / "out"}
    line = arguments({**given, "model": small_model, "device": "cpu,cpu"})
    run = subprocess.Popen([sys.executable, "-m", "icm_cli.cli", "matte", *line], stderr=subprocess.PIPE, text=True)
    seen = []

    def kill(processes: list[int]) -> None:
        seen.extend(processes)
        run.kill()

    after_third_alpha(scene, run.pid, kill).join()
    assert "Traceback" not in run.communicate(timeout=100)[1]
    assert len(seen) == 2
    until = time.monotonic() + 30
    while any(map(is_running, seen)):
        assert time.monotonic() < until
        time.sleep(0.01)
    made = alphas(scene / "out")
    assert 3 <= len(made) < MANY
    assert made.items() <= single_device_alphas.items()


@pytest.mark.parametrize(
    ("device", "code", "message"),
    [
        ("cpu,cuda:7", 3, "this machine has no device 'cuda:7'"),
        ("cpu,", 2, "--device is 'cpu,'; expected auto, cpu"),
        ("cpu,auto", 2, "--device is 'cpu,auto'; expected auto, cpu"),
        ("cuda:0,cpu", 2, "mixes types of devices"),
        ("cuda,cuda:0", 2, "contains a device twice"),
    ],
)
def test_incompatible_devices_are_refused(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch, device: str, code: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")
    result = icm(device=device)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (scene / "out").exists()


def test_all_gpus_without_a_gpu_is_an_error(icm: Icm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = icm(device="cuda:all")
    assert result.exit_code == 3
    assert "--device is 'cuda:all', but this machine has no GPU" in result.stderr
