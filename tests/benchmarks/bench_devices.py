"""Throughput of two one-thread processes over one: ``python tests/benchmarks/bench_devices.py``, a few minutes.

Runs ``icm matte --device cpu`` and ``--device cpu,cpu`` in turns on copies of a photograph, every process with one
thread for the model, and compares images a second once the models are loaded. The machine's load is printed beside, for
other work takes from two processes more than from one. What it cannot take is counted as well: the processor's seconds
for an image, starting left out; twice their ratio is what two idle cores would give at most.
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


def matted(folder: Path, src: str, device: str, model: str) -> tuple[float, float]:
    """Matte all of ``folder/src`` anew; images a second, and the processor's seconds of all processes."""
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
    """The processor's seconds for an image, given those of a run over ``images``; what starting costs is left out."""
    return (cpu - matted(folder, "few", device, model)[1]) / (images - FEW)


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
            runs = [matted(folder, "imgs", device, arguments.model) for device in DEVICES]
            (one, _), (two, _) = runs
            ratios.append(two / one)
            rates = f"{one:.2f} and {two:.2f} images/s, {two / one:.2f} x"
            print(f"round {number + 1}: {rates}; load {os.getloadavg()[0]:.1f}", flush=True)
        costs = [
            cpu_seconds(folder, arguments.images, device, arguments.model, cpu)
            for device, (_, cpu) in zip(DEVICES, runs, strict=True)
        ]
        print(f"{costs[0]:.2f} and {costs[1]:.2f} s of the processor an image: at most {2 * costs[0] / costs[1]:.2f} x")
    print(f"median of {arguments.rounds}: {statistics.median(ratios):.2f} x")


if __name__ == "__main__":
    main()
