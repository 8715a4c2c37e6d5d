"""What ``icm matte`` with the default model costs: a photograph, memory over many, 4K against the bare model.

    python tests/benchmarks/bench_lite.py [--only help photograph 4k memory]

Every figure comes from a process of its own. Baselines are measured in the same run: 500 images against 50, and a
folders of 4K JPEGs, PNGs of 16 bits and EXRs against the same pictures from decoded array to source-size alpha.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import OpenImageIO as oiio

DEMO = Path(__file__).parents[1] / "composites"
ICM = str(Path(sys.executable).with_name("icm"))
MEGAPIXEL = (1152, 864)
FOUR_K = (3840, 2160)
SMALL_MODEL = "backbone: {name: efficientnet-lite, long_side_px: 320}\nhead: {name: training-free}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=SIDES, default=list(SIDES))
    wanted = parser.parse_args().only
    with tempfile.TemporaryDirectory() as folder:
        for side in wanted:
            print(f"{side:12}  {SIDES[side](Path(folder))}", flush=True)


def show_help(_: Path) -> str:
    return f"{help_seconds():.2f} s (icm --help, best of 5)"


def show_photograph(root: Path) -> str:
    first, best, peak = photograph(root)
    return f"{best:.2f} s an image of 1 megapixel (best of 6 in one run), first one {first:.2f} s, peak {peak:.0f} MB"


def show_four_k(root: Path) -> str:
    bare, streamed = four_k(root)
    each = ", ".join(f"{kind} {seconds:.2f} s ({seconds / bare:.2f}x)" for kind, seconds in streamed.items())
    return f"{bare:.2f} s an image from array to alpha; streamed {each}"


def show_memory(root: Path) -> str:
    few, many = folder_peak(root, 50), folder_peak(root, 500)
    return f"{few:.0f} MB over 50 images, {many:.0f} MB over 500: {many - few:+.0f} MB (320 px canvas)"


SIDES = {"help": show_help, "photograph": show_photograph, "4k": show_four_k, "memory": show_memory}


def help_seconds() -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([ICM, "--help"], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    return min(times)


def photograph(root: Path) -> tuple[float, float, float]:
    """First and best seconds an image of one megapixel, and the peak in MB."""
    pictures(root / "mega", MEGAPIXEL, 7)
    report = run_icm(root / "mega", root)
    seconds = [image["seconds"] for image in report["images"]]
    return seconds[0], min(seconds[1:]), report["summary"]["peak_memory_bytes"] / 1e6


def folder_peak(root: Path, count: int) -> float:
    """Peak memory in MB over ``count`` images of a quarter megapixel, on a small canvas so that 500 end soon."""
    pictures(root / f"n{count}", (576, 432), count)
    model = root / "small.yaml"
    model.write_text(SMALL_MODEL)
    return run_icm(root / f"n{count}", root, "--model", str(model))["summary"]["peak_memory_bytes"] / 1e6


def four_k(root: Path) -> tuple[float, dict[str, float]]:
    """Seconds an image: the model with its return to 4K on decoded arrays, and a folder of each kind by the command."""
    pictures(root / "4k-jpg", FOUR_K, 10)
    streamed = {}
    for kind in ("jpg", "png", "exr"):
        folder = root / f"4k-{kind}"
        if kind != "jpg":
            folder.mkdir()
            for path in (root / "4k-jpg").iterdir():
                deepened(path, folder / f"{path.stem}.{kind}")
        streamed[kind] = 1 / run_icm(folder, root)["summary"]["images_per_second"]
    code = (
        "import sys, time, cv2, icm_cli\n"
        "rgb = lambda path: cv2.imread(path)[..., ::-1].copy()\n"
        "predictor = icm_cli.load()\n"
        f"thing = predictor.reference([(rgb({str(DEMO / 'ref.jpg')!r}), cv2.imread({str(DEMO / 'mask.png')!r}, 0))])\n"
        "pictures = [rgb(path) for path in sys.argv[1:]]\n"
        "predictor.matte(pictures[0], thing)\n"
        "start = time.perf_counter()\n"
        "for picture in pictures: predictor.matte(picture, thing)\n"
        "print((time.perf_counter() - start) / len(pictures))"
    )
    paths = sorted(map(str, (root / "4k-jpg").iterdir()))
    bare = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True).stdout
    return float(bare), streamed


def pictures(folder: Path, size: tuple[int, int], count: int) -> None:
    """JPEGs of the demo's pictures, resized, so that decoding costs what photographs cost."""
    folder.mkdir()
    sources = sorted((DEMO / "imgs").iterdir())
    made: dict[int, Path] = {}
    for number in range(count):
        kind, path = number % len(sources), folder / f"{number:04d}.jpg"
        if kind in made:
            shutil.copy(made[kind], path)
            continue
        image = cv2.resize(cv2.imread(str(sources[kind])), size, interpolation=cv2.INTER_CUBIC)
        grain = np.random.default_rng(number).normal(0, 3, image.shape)
        cv2.imwrite(str(path), np.clip(image + grain, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 92])
        made[kind] = path


def deepened(source: Path, path: Path) -> None:
    """A JPEG as PNG of 16 bits, its last bits noise as a scanner's, or as scene-linear EXR of halves."""
    rgb = cv2.imread(str(source))[..., ::-1].astype(np.float32) / 255
    if path.suffix == ".png":
        rgb += np.random.default_rng(0).normal(0, 1e-3, rgb.shape)
    else:
        rgb = rgb**2.2
    picture = oiio.ImageBuf(np.ascontiguousarray(rgb.clip(0, 1), np.float32))
    picture.write(str(path), "uint16" if path.suffix == ".png" else "half")


def run_icm(folder: Path, root: Path, *options: str) -> Any:
    """The report of a run of the command over a folder."""
    report = root / f"{folder.name}.json"
    line = [ICM, "matte", "--ref", DEMO / "ref.jpg", "--mask", DEMO / "mask.png", "--src", folder]
    line += ["--out", root / f"{folder.name}-out", "--report", report, "--quiet", "--device", "cpu", *options]
    subprocess.run(list(map(os.fspath, line)), check=True)
    return json.loads(report.read_text())


if __name__ == "__main__":
    main()
