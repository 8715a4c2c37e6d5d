"""Time and memory of ``icm eval``.

    python tests/benchmarks/bench_eval.py [--only metrics memory context]

- ``metrics``: MSE, SAD, GRAD, CONN and MAD of one megapixel on one core, compared with the
  reference implementation in tests/plain_metrics.py (without MAD) in the same run;
- ``memory``: ``--pred`` for 10,000 images compared with 500;
- ``context``: matting on a small canvas for 1,000 images compared with 100.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
from plain_metrics import plain_metrics

from icm_cli.options import MetricVariant
from icm_cli.scoring.metrics import compute_scores

COMPOSITES = Path(__file__).parents[1] / "composites"
SMALL_MODEL = (
    "backbone: {name: efficientnet-lite, long_side_px: 224}\nhead: {name: training-free, solve_long_side_px: 128}\n"
)
IMAGE_PX = (128, 96)
GROUP_SIZE = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=BENCHMARKS, default=list(BENCHMARKS))
    for name in parser.parse_args().only:
        with tempfile.TemporaryDirectory() as folder:
            BENCHMARKS[name](Path(folder))


def print_metrics(_: Path) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cv2.setNumThreads(1)
    for name, (alpha, truth) in {"matte": matte_pair(), "noise": noise_pair()}.items():
        for variant in get_args(MetricVariant):
            fast = best_seconds(5, partial(compute_scores, alpha, truth, variant))
            plain = best_seconds(2, partial(plain_metrics, alpha, truth, variant, np.ones(truth.shape, bool)))
            print(f"metrics  {name}, {variant}: {fast:.3f} s, plain {plain:.3f} s: {plain / fast:.1f}x", flush=True)


def print_memory(root: Path) -> None:
    few, many = (run_on_predictions(root / str(count), count) for count in (500, 10_000))
    print(f"memory   --pred: {few[0]:.0f} MB over 500 images, {many[0]:.0f} MB over 10,000; {many[1]:.0f} images/s")


def print_context(root: Path) -> None:
    few, many = (run_in_context(root / str(count), count) for count in (100, 1_000))
    print(f"context  {few[0]:.0f} MB over 100 images, {many[0]:.0f} MB over 1,000; {many[1]:.1f} images/s")


BENCHMARKS: dict[str, Callable[[Path], None]] = {
    "metrics": print_metrics,
    "memory": print_memory,
    "context": print_context,
}


def matte_pair() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return an alpha of one megapixel, blurred and shifted, and the original."""
    truth = cv2.imread(str(COMPOSITES / "alphas" / "launchpad.png"), cv2.IMREAD_GRAYSCALE)
    truth = cv2.resize(truth, (1000, 1000), interpolation=cv2.INTER_CUBIC)
    return np.roll(cv2.GaussianBlur(truth, (0, 0), 4), 3, axis=1), truth


def noise_pair() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return two noise images, which have very many components, the worst case of CONN."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (1000, 1000), np.uint8), rng.integers(0, 256, (1000, 1000), np.uint8)


def best_seconds(times: int, function: Callable[[], object]) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def write_dataset(root: Path, count: int) -> None:
    """Write a dataset of links to a few small images, in groups."""
    for kind, folder, suffix in (("images", "imgs", ".jpg"), ("alphas", "alphas", ".png")):
        files = []
        for path in sorted((COMPOSITES / folder).iterdir()):
            image = cv2.resize(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), IMAGE_PX, interpolation=cv2.INTER_AREA)
            files.append(root / f"{path.stem}-{kind}{suffix}")
            root.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(files[-1]), image)
        for number in range(count):
            link = root / kind / f"{number // GROUP_SIZE:04d}" / f"{number % GROUP_SIZE}{suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(files[number % len(files)])


def run_on_predictions(root: Path, count: int) -> tuple[float, float]:
    write_dataset(root, count)
    return run(root, ["--pred", str(root / "alphas")])


def run_in_context(root: Path, count: int) -> tuple[float, float]:
    write_dataset(root, count)
    (root / "small.yaml").write_text(SMALL_MODEL)
    return run(root, ["--model", str(root / "small.yaml"), "--device", "cpu"])


def run(root: Path, options: list[str]) -> tuple[float, float]:
    """Run ``icm eval`` and return the peak memory in MB and the images per second."""
    report = root / "report.json"
    line = [str(Path(sys.executable).with_name("icm")), "eval", "--dataset", "folder", "--data-root", str(root)]
    subprocess.run([*line, *options, "--quiet", "--report", str(report), "--report", str(root / "r.html")], check=True)
    summary = json.loads(report.read_text())["summary"]
    return summary["peak_memory_bytes"] / 1e6, summary["means"]["whole"]["images"] / summary["matting_seconds"]


if __name__ == "__main__":
    main()
