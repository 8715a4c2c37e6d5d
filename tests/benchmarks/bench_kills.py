"""Many small images, and runs that are killed: ``python tests/benchmarks/bench_kills.py``, about 20
minutes.

- Planning: seconds until the first image could be read.
- Memory: peak over all images, and over 500 of them.
- Kills: a run, and one of two parallel shards, are killed repeatedly at random moments. A final run
  must then complete the same files with the same bytes as an uninterrupted run. No file may be
  truncated at any time.

``--images`` and ``--kills`` set the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2

from icm_cli.files.atomic_writes import TEMPORARY_PREFIX

DEMO = Path(__file__).parents[1] / "demo"
FEW = 500
"""Number of images of the run for the comparison of memory."""
SIDE_PX = 64
MODEL = "backbone: {name: efficientnet-lite, long_side_px: 64}\nhead: {name: training-free, solve_long_side_px: 64}\n"
"""A fast model. Its quality does not matter here."""
PLANNING = """
import sys, time, icm_cli
def plan(src):
    start, busy = time.perf_counter(), time.process_time()
    icm_cli.matte(sys.argv[1], sys.argv[2], src=src, out=sys.argv[3], model=sys.argv[4], device="cpu", dry_run=True)
    return f"{time.perf_counter() - start:.2f} s, {time.process_time() - busy:.2f} CPU seconds"
plan(sys.argv[5])
print(plan(sys.argv[6]))
"""


class Scene:
    """A folder with small images, and commands that matte them."""

    def __init__(self, home: Path, images: int) -> None:
        self.home = home
        (home / "model.yaml").write_text(MODEL)
        image = cv2.imread(str(min((DEMO / "imgs").iterdir())))
        small = cv2.resize(image, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(home / "small.jpg"), small)
        for folder, count in (("imgs", images), ("few", min(FEW, images))):
            (home / folder).mkdir()
            for number in range(count):
                shutil.copy(home / "small.jpg", home / folder / f"sh.{number:05d}.jpg")

    def command(self, out: str, *options: str, src: str = "imgs") -> list[str]:
        given = {"ref": DEMO / "ref.jpg", "mask": DEMO / "mask.png", "src": self.home / src, "out": self.home / out}
        given |= {"model": self.home / "model.yaml", "device": "cpu"}
        named = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        return [sys.executable, "-m", "icm_cli.cli", "matte", *named, "--quiet", *options]

    def run(self, out: str, *, src: str = "imgs") -> dict[str, float]:
        """Run without interruption and return the summary of the report."""
        report = self.home / "report.json"
        report.unlink(missing_ok=True)
        subprocess.run(self.command(out, "--report", str(report), src=src), check=True)
        summary: dict[str, float] = json.loads(report.read_text())["summary"]
        return summary

    def measure_planning(self) -> str:
        names = ("out", "model.yaml", "few", "imgs")
        given = [DEMO / "ref.jpg", DEMO / "mask.png", *(self.home / name for name in names)]
        line = [sys.executable, "-c", PLANNING, *map(str, given)]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()


def file_digests(folder: Path) -> dict[str, str]:
    """Return the digests of all files by name, including hidden ones."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a temporary file of a concurrent run
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def count_files(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(not entry.name.startswith(TEMPORARY_PREFIX) for entry in os.scandir(folder))


def run_with_kills(
    scene: Scene, out: str, shards: Sequence[Sequence[str]], kills: int, expected: dict[str, str]
) -> str:
    """Kill parallel runs at random, then complete the output.

    Raises AssertionError if a file is wrong.
    """
    chance, folder = random.Random(len(shards)), scene.home / out
    moments = sorted(chance.uniform(0, 0.97 * len(expected)) for _ in range(kills))
    runs = [subprocess.Popen(scene.command(out, *options), stderr=subprocess.PIPE) for options in shards]
    left_behind = 0
    for moment in moments:
        while count_files(folder) < moment and any(run.poll() is None for run in runs):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.2) if chance.random() < 0.75 else chance.uniform(0, 8))
        alive = [number for number, run in enumerate(runs) if run.poll() is None]
        which = chance.choice(alive or range(len(runs)))
        if not alive:  # all runs are finished: kill a new one while it starts
            runs[which].communicate()
            runs[which] = subprocess.Popen(scene.command(out, *shards[which]), stderr=subprocess.PIPE)
            time.sleep(chance.uniform(0, 3))
        runs[which].kill()
        runs[which].communicate()
        now = file_digests(folder) if folder.is_dir() else {}
        temporary = {name for name in now if Path(name).name.startswith(TEMPORARY_PREFIX)}
        left_behind += len(temporary)
        assert {name: now[name] for name in now.keys() - temporary}.items() <= expected.items()
        runs[which] = subprocess.Popen(scene.command(out, *shards[which]), stderr=subprocess.PIPE)
    for run in runs:
        run.kill()
        run.communicate()
    before = count_files(folder)
    scene.run(out)
    assert file_digests(folder) == expected
    return f"{kills} kills, {before} alphas before the last run, {left_behind} temporary files seen; byte-equal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        scene = Scene(Path(home), arguments.images)
        print(f"planning {arguments.images} images: {scene.measure_planning()}", flush=True)
        few, many = scene.run("few-out", src="few"), scene.run("whole")
        peaks = [summary["peak_memory_bytes"] / 1e6 for summary in (few, many)]
        print(f"peak memory of {few['done']} images {peaks[0]:.0f} MB, of {many['done']} {peaks[1]:.0f} MB", flush=True)
        print(f"{many['images_per_second']:.0f} images/s; load {os.getloadavg()[0]:.1f}", flush=True)
        kept = scene.run("whole")
        print(f"second run: {kept['kept']} kept in {kept['seconds']:.1f} s", flush=True)
        expected = file_digests(scene.home / "whole")
        for name, shards in (("one run", [[]]), ("two shards", [["--shard", "1/2"], ["--shard", "2/2"]])):
            result = run_with_kills(scene, name.replace(" ", "-"), shards, arguments.kills, expected)
            print(f"{name}: {result}", flush=True)


if __name__ == "__main__":
    main()
