"""Throughput of two one-thread processes over one: ``python tests/benchmarks/bench_devices.py``, a few minutes.

Runs ``icm matte --device cpu`` and ``--device cpu,cpu`` in turns on copies of a photograph, every process with one
thread for the model, and compares images a second once the models are loaded. The machine's load is printed beside.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

DEMO = Path(__file__).parents[1] / "demo"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENCV_FOR_THREADS_NUM": "1"}


def images_per_second(folder: Path, device: str, model: str) -> float:
    """Matte all of ``folder/imgs`` anew."""
    out, report = folder / "out", folder / "report.json"
    options = {"ref": DEMO / "ref.jpg", "mask": DEMO / "mask.png", "src": folder / "imgs", "out": out, "report": report}
    options |= {"device": device, "model": model, "workers": 1}
    line = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "icm_cli.cli", "matte", *line, "--quiet", "--overwrite"]
    subprocess.run(command, env={**os.environ, **ONE_THREAD}, check=True)
    return float(json.loads(report.read_text())["summary"]["images_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="lite")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        (folder / "imgs").mkdir()
        source = min((DEMO / "imgs").iterdir())
        for number in range(arguments.images):
            shutil.copy(source, folder / "imgs" / f"{number:04d}{source.suffix}")
        ratios = []
        for number in range(arguments.rounds):
            one, two = (images_per_second(folder, device, arguments.model) for device in ("cpu", "cpu,cpu"))
            ratios.append(two / one)
            rates = f"{one:.2f} and {two:.2f} images/s, {two / one:.2f} x"
            print(f"round {number + 1}: {rates}; load {os.getloadavg()[0]:.1f}", flush=True)
    print(f"median of {arguments.rounds}: {statistics.median(ratios):.2f} x")


if __name__ == "__main__":
    main()
