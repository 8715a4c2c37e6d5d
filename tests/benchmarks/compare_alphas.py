"""Compare the alphas of this checkout with those of another one, in one run with the same threads.

    python tests/benchmarks/compare_alphas.py ../before
    python tests/benchmarks/compare_alphas.py ../before --keep /tmp/compared --only demo shot

Both checkouts matte the same sets of images: the demo, the composites (one by one and in batches),
six frames of a shot with ``--shot``, the demo with edges by the guided filter and by closed-form
matting, and images with a distractor next to the object, in some of which ``lite`` is uncertain and
makes a second pass. The script prints one line per set. It exits with code 1 if more than 0.1 % of
the pixels of a set differ, or if any pixel differs by more than one level of 255.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).parents[2]
LARGEST_DIFFERENCE = 1
"""Largest allowed difference of a pixel, in levels of 255."""
DIFFERENT_PIXELS = 0.001
"""Largest allowed fraction of pixels that differ."""
FRAMES = 6
GROUPS = ("bottle", "candle", "handbag")
"""Groups of the distractor set; those that are missing are skipped."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout of the version to compare with")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--only", nargs="*", help="names of the sets to compare; all by default")
    parser.add_argument("--keep", type=Path, help="keep the alphas here; alphas of the other checkout are reused")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.keep or Path(temporary)).resolve()
        commands = matte_commands(arguments.data.resolve(), folder / "inputs")
        names = arguments.only or list(commands)
        results = [compare_set(name, commands[name], arguments.before, folder) for name in names]
    return 0 if all(results) else 1


def matte_commands(data: Path, inputs: Path) -> dict[str, list[list[str]]]:
    """Arguments of ``icm matte`` for each set, one list per run; ``--out`` is added later."""
    demo, composites = (tests_set(ROOT / "tests" / name) for name in ("demo", "composites"))
    commands = {
        "demo": [demo],
        "composites": [composites],
        "batches": [[*composites, "--batch-size", "4"]],
        "guided-filter": [[*demo, "--model", "lite-training-free"]],
        "closed-form": [[*demo, "--edges", "closed-form"]],
    }
    sequences = sorted(path for path in (data / "sequences").glob("*") if path.is_dir())
    if sequences:
        frames = sorted((sequences[-1] / "img").iterdir())[:FRAMES]
        plates = inputs / "plates"
        plates.mkdir(parents=True, exist_ok=True)
        for frame in frames:
            shutil.copy2(frame, plates)
        mask = min((sequences[-1] / "gt").iterdir())
        shot = ["--ref", str(plates / frames[0].name), "--mask", str(mask), "--src", str(plates), "--shot"]
        commands["shot"] = [shot]
    groups = [data / "validation" / "distractor" / name for name in GROUPS]
    found = [group for group in groups if group.is_dir()]
    if found:
        commands["distractors"] = [
            ["--ref", str(next(group.glob("ref.*"))), "--mask", str(group / "mask.png"), "--src", str(group / "src")]
            for group in found
        ]
    return commands


def tests_set(folder: Path) -> list[str]:
    """Arguments of ``icm matte`` for a set of the tests."""
    return ["--ref", str(folder / "ref.jpg"), "--mask", str(folder / "mask.png"), "--src", str(folder / "imgs")]


def compare_set(name: str, commands: list[list[str]], before: Path, folder: Path) -> bool:
    """Matte a set with both checkouts, print the differences, return whether they are allowed."""
    outputs = {"before": (before, folder / "before" / name), "after": (ROOT, folder / "after" / name)}
    for version, (checkout, out) in outputs.items():
        if version == "after":
            shutil.rmtree(out, ignore_errors=True)
        for number, command in enumerate(commands):
            run_matte(checkout, [*command, "--out", str(out / str(number))])
    before_alphas, after_alphas = (read_alphas(out) for _, out in outputs.values())
    if before_alphas.keys() != after_alphas.keys() or not before_alphas:
        print(f"{name}: before {len(before_alphas)} files, after {len(after_alphas)}; expected the same names")
        return False
    differences = [
        np.abs(alpha.astype(np.int16) - after_alphas[key].astype(np.int16)) for key, alpha in before_alphas.items()
    ]
    largest = max(int(each.max()) for each in differences)
    different = sum(int((each > 0).sum()) for each in differences) / sum(each.size for each in differences)
    equal = sum(not each.any() for each in differences)
    is_allowed = largest <= LARGEST_DIFFERENCE and different <= DIFFERENT_PIXELS
    print(
        f"{name}: {len(differences)} files, {equal} equal, largest difference {largest} of 255, "
        f"{different:.4%} of pixels differ: {'ok' if is_allowed else 'TOO MUCH'}",
        flush=True,
    )
    return is_allowed


def run_matte(checkout: Path, arguments: list[str]) -> None:
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONPATH": str(checkout.resolve()),
    }
    command = [sys.executable, "-m", "icm_cli.cli", "matte", *arguments, "--device", "cpu", "--quiet"]
    subprocess.run(command, check=True, cwd=checkout, env=environment)


def read_alphas(folder: Path) -> Mapping[str, np.ndarray]:
    """Alphas below a folder by their relative names."""
    return {
        str(path.relative_to(folder)): cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        for path in sorted(folder.rglob("*.png"))
    }


if __name__ == "__main__":
    sys.exit(main())
