"""Time and memory of planning many small images, and of keeping their alphas in a second run.

    python tests/benchmarks/bench_planning.py 10000

Every file is inspected once. The second figure is the time to compare the state of every source, as
a run does that finds all alphas. Peak memory is that of the process, less its start.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from icm_cli.matting.jobs import OutputLayout
from icm_cli.matting.planning import JobPlanner
from icm_cli.matting.sources import SkippedFiles, find_sources


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_images(folder: Path, count: int) -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    content = {}
    for suffix in ("jpg", "png"):
        Image.fromarray(rgb).save(folder / f"image.{suffix}")
        content[suffix] = (folder / f"image.{suffix}").read_bytes()
        (folder / f"image.{suffix}").unlink()
    for number in range(count):
        suffix = ("jpg", "png")[number % 2]
        (folder / f"image.{number:06d}.{suffix}").write_bytes(content[suffix])


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10000
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "images"
        folder.mkdir()
        write_images(folder, count)
        before, start = peak_mb(), time.perf_counter()
        skipped_files = SkippedFiles(print)
        jobs = (
            JobPlanner(find_sources(folder, None, skipped_files), OutputLayout(Path(home) / "out"), skipped_files)
            .plan_images()
            .jobs
        )
        planned = time.perf_counter()
        for job in jobs:
            job.state()
        checked = time.perf_counter()
        print(f"{len(jobs)} images: planned in {planned - start:.2f} s, states in {checked - planned:.2f} s, ", end="")
        print(f"{peak_mb() - before:.0f} MB")
