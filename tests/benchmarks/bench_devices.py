"""Throughput of two one-thread processes over one: ``python tests/benchmarks/bench_devices.py``, a
few minutes.

It runs ``icm matte --device cpu`` and ``--device cpu,cpu`` alternately on copies of a photograph,
with one thread per process, and compares the images per second after loading the model. The load of
the machine is printed too, because other work affects two processes more than one. The CPU seconds
per image, without start-up, do not depend on the load: twice their ratio is the upper limit of the
speed-up on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

DEMO = Path(__file__).parents[1] / "demo"
DEVICES = ("cpu", "cpu,cpu")
FEW = 4
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENCV_FOR_THREADS_NUM": "1"}


def run_matte(folder: Path, src: str, device: str, model: str) -> tuple[float, float]:
    """Matte ``folder/src``; return images per second and CPU seconds of all processes."""
    out, report = folder / "out", folder / "report.json"
    options = {"ref": DEMO / "ref.jpg", "mask": DEMO / "mask.png", "src": folder / src, "out": out, "report": report}
    options |= {"device": device, "model": model, "workers": 1}
    line = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "icm_cli.cli", "matte", *line, "--quiet", "--overwrite"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env={**os.environ, **ONE_THREAD}, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return float(json.loads(report.read_text())["summary"]["images_per_second"]), cpu


def cpu_seconds(folder: Path, images: int, device: str, model: str, cpu: float) -> float:
    """Return the CPU seconds per image without start-up, given those of a run over ``images``."""
    return (cpu - run_matte(folder, "few", device, model)[1]) / (images - FEW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="lite")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        source = min((DEMO / "imgs").iterdir())
        for name, count in (("imgs", arguments.images), ("few", FEW)):
            (folder / name).mkdir()
            for number in range(count):
                shutil.copy(source, folder / name / f"{number:04d}{source.suffix}")
        ratios = []
        for number in range(arguments.rounds):
            runs = [run_matte(folder, "imgs", device, arguments.model) for device in DEVICES]
            (one, _), (two, _) = runs
            ratios.append(two / one)
            rates = f"{one:.2f} and {two:.2f} images/s, {two / one:.2f} x"
            print(f"round {number + 1}: {rates}; load {os.getloadavg()[0]:.1f}", flush=True)
        costs = [
            cpu_seconds(folder, arguments.images, device, arguments.model, cpu)
            for device, (_, cpu) in zip(DEVICES, runs, strict=True)
        ]
        print(f"{costs[0]:.2f} and {costs[1]:.2f} CPU seconds per image: at most {2 * costs[0] / costs[1]:.2f} x")
    print(f"median of {arguments.rounds}: {statistics.median(ratios):.2f} x")


if __name__ == "__main__":
    main()
