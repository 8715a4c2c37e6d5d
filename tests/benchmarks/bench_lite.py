"""Time and memory of ``icm matte`` with the default model: one megapixel, many images, 4K.

    python tests/benchmarks/bench_lite.py [--only help photograph 4k memory]

Every figure is measured in a separate process. Memory is compared between 500 and 50 images.
Folders of 4K images (JPEG, 16-bit PNG and EXR) are compared with matting the same images as decoded
arrays.
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

COMPOSITES = Path(__file__).parents[1] / "composites"
ICM = str(Path(sys.executable).with_name("icm"))
MEGAPIXEL = (1152, 864)
FOUR_K = (3840, 2160)
SMALL_MODEL = "backbone: {name: efficientnet-lite, long_side_px: 320}\nhead: {name: training-free}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=BENCHMARKS, default=list(BENCHMARKS))
    names = parser.parse_args().only
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"{name:12}  {BENCHMARKS[name](Path(folder))}", flush=True)


def show_help(_: Path) -> str:
    return f"{measure_help():.2f} s (icm --help, best of 5)"


def show_photograph(root: Path) -> str:
    first, best, peak = measure_photograph(root)
    return f"{best:.2f} s per image of 1 megapixel (best of 6 in one run), first {first:.2f} s, peak {peak:.0f} MB"


def show_four_k(root: Path) -> str:
    arrays, streamed = measure_four_k(root)
    each = ", ".join(f"{kind} {seconds:.2f} s ({seconds / arrays:.2f}x)" for kind, seconds in streamed.items())
    return f"{arrays:.2f} s per image from array to alpha; from files: {each}"


def show_memory(root: Path) -> str:
    few, many = measure_peak_memory(root, 50), measure_peak_memory(root, 500)
    return f"{few:.0f} MB over 50 images, {many:.0f} MB over 500: {many - few:+.0f} MB (320 px canvas)"


BENCHMARKS = {"help": show_help, "photograph": show_photograph, "4k": show_four_k, "memory": show_memory}


def measure_help() -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([ICM, "--help"], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    return min(times)


def measure_photograph(root: Path) -> tuple[float, float, float]:
    """Return the seconds of the first and the fastest image of one megapixel, and the peak memory
    in MB."""
    write_images(root / "mega", MEGAPIXEL, 7)
    report = run_icm(root / "mega", root)
    seconds = [image["seconds"] for image in report["images"]]
    return seconds[0], min(seconds[1:]), report["summary"]["peak_memory_bytes"] / 1e6


def measure_peak_memory(root: Path, count: int) -> float:
    """Return the peak memory in MB for ``count`` images of a quarter megapixel, on a small canvas
    to save time."""
    write_images(root / f"n{count}", (576, 432), count)
    model = root / "small.yaml"
    model.write_text(SMALL_MODEL)
    return run_icm(root / f"n{count}", root, "--model", str(model))["summary"]["peak_memory_bytes"] / 1e6


def measure_four_k(root: Path) -> tuple[float, dict[str, float]]:
    """Return the seconds per 4K image, for decoded arrays and for files of each type."""
    write_images(root / "4k-jpg", FOUR_K, 10)
    streamed = {}
    for kind in ("jpg", "png", "exr"):
        folder = root / f"4k-{kind}"
        if kind != "jpg":
            folder.mkdir()
            for path in (root / "4k-jpg").iterdir():
                convert_image(path, folder / f"{path.stem}.{kind}")
        streamed[kind] = 1 / run_icm(folder, root)["summary"]["images_per_second"]
    code = (
        "import sys, time, cv2, icm_cli\n"
        "rgb = lambda path: cv2.imread(path)[..., ::-1].copy()\n"
        "predictor = icm_cli.load()\n"
        f"mask = cv2.imread({str(COMPOSITES / 'mask.png')!r}, 0)\n"
        f"reference = predictor.reference([(rgb({str(COMPOSITES / 'ref.jpg')!r}), mask)])\n"
        "images = [rgb(path) for path in sys.argv[1:]]\n"
        "predictor.matte(images[0], reference)\n"
        "start = time.perf_counter()\n"
        "for image in images: predictor.matte(image, reference)\n"
        "print((time.perf_counter() - start) / len(images))"
    )
    paths = sorted(map(str, (root / "4k-jpg").iterdir()))
    arrays = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True).stdout
    return float(arrays), streamed


def write_images(folder: Path, size: tuple[int, int], count: int) -> None:
    """Write resized JPEGs with noise, so that they take as long to decode as photographs."""
    folder.mkdir()
    sources = sorted((COMPOSITES / "imgs").iterdir())
    written: dict[int, Path] = {}
    for number in range(count):
        kind, path = number % len(sources), folder / f"{number:04d}.jpg"
        if kind in written:
            shutil.copy(written[kind], path)
            continue
        image = cv2.resize(cv2.imread(str(sources[kind])), size, interpolation=cv2.INTER_CUBIC)
        grain = np.random.default_rng(number).normal(0, 3, image.shape)
        cv2.imwrite(str(path), np.clip(image + grain, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 92])
        written[kind] = path


def convert_image(source: Path, path: Path) -> None:
    """Convert a JPEG to a 16-bit PNG with noise, or to a scene-linear half-float EXR."""
    rgb = cv2.imread(str(source))[..., ::-1].astype(np.float32) / 255
    if path.suffix == ".png":
        rgb += np.random.default_rng(0).normal(0, 1e-3, rgb.shape)
    else:
        rgb = rgb**2.2
    image = oiio.ImageBuf(np.ascontiguousarray(rgb.clip(0, 1), np.float32))
    image.write(str(path), "uint16" if path.suffix == ".png" else "half")


def run_icm(folder: Path, root: Path, *options: str) -> Any:
    """Matte a folder by the command and return the report."""
    report = root / f"{folder.name}.json"
    line = [ICM, "matte", "--ref", COMPOSITES / "ref.jpg", "--mask", COMPOSITES / "mask.png", "--src", folder]
    line += ["--out", root / f"{folder.name}-out", "--report", report, "--quiet", "--device", "cpu", *options]
    subprocess.run(list(map(os.fspath, line)), check=True)
    return json.loads(report.read_text())


if __name__ == "__main__":
    main()
