"""Many small images, and runs that are killed: ``python tests/benchmarks/bench_kills.py``, some twenty minutes.

Planning: seconds until the first image could be read. Memory: the peak over all images, and over 500 of them. Kills: a
run, and one of two shards side by side, are killed again and again at random moments, in starting, reading, matting and
writing; then one more run must leave the very bytes of an unbroken one, nothing else, and at no time a torn file.
``--images`` and ``--kills`` say how many.
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

from icm_cli.files import TEMPORARY_PREFIX

DEMO = Path(__file__).parents[1] / "demo"
FEW = 500
"""Images of the run whose memory that of all is compared with."""
SIDE_PX = 64
MODEL = "backbone: {name: efficientnet-lite, long_side_px: 64}\nhead: {name: training-free, solve_long_side_px: 64}\n"
"""The fastest model there is; what is tested here knows nothing of its quality."""
PLANNING = """
import sys, time, icm_cli
def planned(src):
    start, busy = time.perf_counter(), time.process_time()
    icm_cli.matte(sys.argv[1], sys.argv[2], src=src, out=sys.argv[3], model=sys.argv[4], device="cpu", dry_run=True)
    return f"{time.perf_counter() - start:.2f} s, {time.process_time() - busy:.2f} s of the processor"
planned(sys.argv[5])
print(planned(sys.argv[6]))
"""


class Scene:
    """Small images in a folder of its own, and the command over them."""

    def __init__(self, home: Path, images: int) -> None:
        self.home = home
        (home / "model.yaml").write_text(MODEL)
        picture = cv2.imread(str(min((DEMO / "imgs").iterdir())))
        small = cv2.resize(picture, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(home / "small.jpg"), small)
        for folder, count in (("imgs", images), ("few", min(FEW, images))):
            (home / folder).mkdir()
            for number in range(count):
                shutil.copy(home / "small.jpg", home / folder / f"sh.{number:05d}.jpg")

    def line(self, out: str, *options: str, src: str = "imgs") -> list[str]:
        given = {"ref": DEMO / "ref.jpg", "mask": DEMO / "mask.png", "src": self.home / src, "out": self.home / out}
        given |= {"model": self.home / "model.yaml", "device": "cpu"}
        named = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        return [sys.executable, "-m", "icm_cli.cli", "matte", *named, "--quiet", *options]

    def run(self, out: str, *, src: str = "imgs") -> dict[str, float]:
        """The summary of a run that nothing disturbs."""
        report = self.home / "report.json"
        report.unlink(missing_ok=True)
        subprocess.run(self.line(out, "--report", str(report), src=src), check=True)
        summary: dict[str, float] = json.loads(report.read_text())["summary"]
        return summary

    def planning(self) -> str:
        names = ("out", "model.yaml", "few", "imgs")
        given = [DEMO / "ref.jpg", DEMO / "mask.png", *(self.home / name for name in names)]
        line = [sys.executable, "-c", PLANNING, *map(str, given)]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()


def digests(folder: Path) -> dict[str, str]:
    """Digest of every file, hidden ones too, by its name."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a temporary file of a run that goes on
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def count(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(not entry.name.startswith(TEMPORARY_PREFIX) for entry in os.scandir(folder))


def killed(scene: Scene, out: str, ways: Sequence[Sequence[str]], kills: int, whole: dict[str, str]) -> str:
    """Kill runs side by side, now one, now another, then let one more end. Raises AssertionError for what is wrong."""
    chance, folder = random.Random(len(ways)), scene.home / out
    moments = sorted(chance.uniform(0, 0.97 * len(whole)) for _ in range(kills))
    runs = [subprocess.Popen(scene.line(out, *way), stderr=subprocess.PIPE) for way in ways]
    left_behind = 0
    for moment in moments:
        while count(folder) < moment and any(run.poll() is None for run in runs):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.2) if chance.random() < 0.75 else chance.uniform(0, 8))
        alive = [number for number, run in enumerate(runs) if run.poll() is None]
        which = chance.choice(alive or range(len(runs)))
        if not alive:  # all of them ended before the moment came: this one is killed in starting, or in looking around
            runs[which].communicate()
            runs[which] = subprocess.Popen(scene.line(out, *ways[which]), stderr=subprocess.PIPE)
            time.sleep(chance.uniform(0, 3))
        runs[which].kill()
        runs[which].communicate()
        now = digests(folder) if folder.is_dir() else {}
        temporary = {name for name in now if Path(name).name.startswith(TEMPORARY_PREFIX)}
        left_behind += len(temporary)
        assert {name: now[name] for name in now.keys() - temporary}.items() <= whole.items()
        runs[which] = subprocess.Popen(scene.line(out, *ways[which]), stderr=subprocess.PIPE)
    for run in runs:
        run.kill()
        run.communicate()
    before = count(folder)
    scene.run(out)
    assert digests(folder) == whole
    return f"{kills} kills, {before} alphas there before the last run, {left_behind} temporary files seen; byte-equal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        scene = Scene(Path(home), arguments.images)
        print(f"planning {arguments.images} images: {scene.planning()}", flush=True)
        few, many = scene.run("few-out", src="few"), scene.run("whole")
        peaks = [summary["peak_memory_bytes"] / 1e6 for summary in (few, many)]
        print(f"peak memory of {few['done']} images {peaks[0]:.0f} MB, of {many['done']} {peaks[1]:.0f} MB", flush=True)
        print(f"{many['images_per_second']:.0f} images/s; load {os.getloadavg()[0]:.1f}", flush=True)
        kept = scene.run("whole")
        print(f"all there already: {kept['skipped']} kept in {kept['seconds']:.1f} s", flush=True)
        whole = digests(scene.home / "whole")
        for name, ways in (("one run", [[]]), ("two shards", [["--shard", "1/2"], ["--shard", "2/2"]])):
            print(f"{name}: {killed(scene, name.replace(' ', '-'), ways, arguments.kills, whole)}", flush=True)


if __name__ == "__main__":
    main()
