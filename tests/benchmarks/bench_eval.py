"""What ``icm eval`` costs: the metrics against a plain SciPy and scikit-image version, and memory over many images.

    python tests/benchmarks/bench_eval.py [--only metrics memory context]

``metrics``: all of MSE, SAD, GRAD, CONN and MAD of one megapixel on one core; the baseline (tests/plain_metrics.py,
without MAD) is measured in the same run. ``memory``: ``--pred`` over 10,000 images against 500. ``context``: matting in
context with a small canvas over 1,000 images against 100.
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
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
from plain_metrics import plain_metrics

from icm_cli.reports.result import LINEAGES
from icm_cli.scoring.metrics import compute_scores

DEMO = Path(__file__).parents[1] / "composites"
SMALL_MODEL = (
    "backbone: {name: efficientnet-lite, long_side_px: 224}\nhead: {name: training-free, solve_long_side_px: 128}\n"
)
PICTURE_PX = (128, 96)
GROUP_OF = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=SIDES, default=list(SIDES))
    for side in parser.parse_args().only:
        with tempfile.TemporaryDirectory() as folder:
            SIDES[side](Path(folder))


def show_metrics(_: Path) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cv2.setNumThreads(1)
    for name, (alpha, truth) in {"matte": a_matte(), "noise": noise()}.items():
        for lineage in LINEAGES:
            fast = best(5, lambda a=alpha, t=truth, k=lineage: compute_scores(a, t, k))  # type: ignore[misc]
            everywhere = np.ones(truth.shape, bool)
            plain = best(2, lambda a=alpha, t=truth, k=lineage, e=everywhere: plain_metrics(a, t, k, e))  # type: ignore[misc]
            print(f"metrics  {name}, {lineage}: {fast:.3f} s, plain {plain:.3f} s: {plain / fast:.1f}x", flush=True)


def show_memory(root: Path) -> None:
    few, many = (predictions(root / str(count), count) for count in (500, 10_000))
    print(f"memory   --pred: {few[0]:.0f} MB over 500 images, {many[0]:.0f} MB over 10,000; {many[1]:.0f} images/s")


def show_context(root: Path) -> None:
    few, many = (in_context(root / str(count), count) for count in (100, 1_000))
    print(f"context  {few[0]:.0f} MB over 100 images, {many[0]:.0f} MB over 1,000; {many[1]:.1f} images/s")


SIDES: dict[str, Callable[[Path], None]] = {"metrics": show_metrics, "memory": show_memory, "context": show_context}


def a_matte() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A demo alpha at one megapixel, and the same blurred and shifted."""
    truth = cv2.imread(str(DEMO / "alphas" / "launchpad.png"), cv2.IMREAD_GRAYSCALE)
    truth = cv2.resize(truth, (1000, 1000), interpolation=cv2.INTER_CUBIC)
    return np.roll(cv2.GaussianBlur(truth, (0, 0), 4), 3, axis=1), truth


def noise() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The worst for CONN: components without end."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (1000, 1000), np.uint8), rng.integers(0, 256, (1000, 1000), np.uint8)


def best(times: int, work: Callable[[], object]) -> float:
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    return min(spent)


def write_dataset(root: Path, count: int) -> None:
    """Links to the demo's pictures, in groups."""
    for kind, folder, suffix in (("images", "imgs", ".jpg"), ("alphas", "alphas", ".png")):
        made = []
        for path in sorted((DEMO / folder).iterdir()):
            image = cv2.resize(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), PICTURE_PX, interpolation=cv2.INTER_AREA)
            made.append(root / f"{path.stem}-{kind}{suffix}")
            root.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(made[-1]), image)
        for number in range(count):
            link = root / kind / f"{number // GROUP_OF:04d}" / f"{number % GROUP_OF}{suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(made[number % len(made)])


def predictions(root: Path, count: int) -> tuple[float, float]:
    write_dataset(root, count)
    return run(root, ["--pred", str(root / "alphas")])


def in_context(root: Path, count: int) -> tuple[float, float]:
    write_dataset(root, count)
    (root / "small.yaml").write_text(SMALL_MODEL)
    return run(root, ["--model", str(root / "small.yaml"), "--device", "cpu"])


def run(root: Path, options: list[str]) -> tuple[float, float]:
    """Peak memory in MB and images a second, from the report."""
    report = root / "report.json"
    line = [str(Path(sys.executable).with_name("icm")), "eval", "--dataset", "folder", "--data-root", str(root)]
    subprocess.run([*line, *options, "--quiet", "--report", str(report), "--report", str(root / "r.html")], check=True)
    summary = json.loads(report.read_text())["summary"]
    return summary["peak_memory_bytes"] / 1e6, summary["means"]["whole"]["images"] / summary["matting_seconds"]


if __name__ == "__main__":
    main()
