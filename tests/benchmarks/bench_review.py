"""Time to the first view of ``icm review``, blank cells while scrolling, and memory of the server.

    python tests/benchmarks/bench_review.py --images 10000 --folder ../review-bench

Makes small photographs and their alphas with a tiny model, unless the folder has them, and opens the
run in headless Chromium: first without cached thumbnails, then again with them. A cell is blank from
the moment it is in view until its thumbnail is drawn. The wheel turns at ``--speed`` for
``--seconds``; then the page jumps to ten random positions.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from playwright.sync_api import Page

sys.path.insert(0, str(Path(__file__).parents[1]))
from browser import ReviewServer, open_browser, wait_until

DEMO = Path(__file__).parents[1] / "demo"
IMAGES_PER_FOLDER = 100
SIZE = (320, 240)
TINY_MODEL = """
backbone: {name: efficientnet-lite, long_side_px: 96}
head: {name: training-free, solve_long_side_px: 64}
"""
SAMPLER = """() => {
  const state = { since: new Map(), longest: 0, empty: 0, emptySince: null, samples: 0 };
  window.blankCells = state;
  const sample = () => {
    const now = performance.now();
    const seen = new Set();
    let inView = 0;
    for (const cell of document.querySelectorAll("[data-id]")) {
      const box = cell.getBoundingClientRect();
      if (box.bottom <= 0 || box.top >= innerHeight || !box.width) continue;
      inView += 1;
      const image = cell.querySelector("img");
      if (image && image.complete && image.naturalWidth) continue;
      seen.add(cell.dataset.id);
      if (!state.since.has(cell.dataset.id)) state.since.set(cell.dataset.id, now);
      state.longest = Math.max(state.longest, now - state.since.get(cell.dataset.id));
    }
    for (const id of state.since.keys()) if (!seen.has(id)) state.since.delete(id);
    if (inView) state.emptySince = null;
    else {
      state.emptySince ??= now;
      state.empty = Math.max(state.empty, now - state.emptySince);
    }
    state.samples += 1;
    requestAnimationFrame(sample);
  };
  sample();
}"""
ALL_DRAWN = """() => {
  const cells = [...document.querySelectorAll("[data-id]")].filter((cell) => {
    const box = cell.getBoundingClientRect();
    return box.width && box.bottom > 0 && box.top < innerHeight;
  });
  const isDrawn = (image) => image && image.complete && image.naturalWidth;
  return cells.length > 0 && cells.every((cell) => isDrawn(cell.querySelector("img")));
}"""


def make_run(folder: Path, count: int) -> Path:
    """Write the images and compute their alphas; return the folder of the alphas."""
    photographs = [cv2.imread(str(path)) for path in sorted((DEMO / "imgs").glob("*.jpg"))]
    photographs = [cv2.resize(each, SIZE, interpolation=cv2.INTER_AREA) for each in photographs]
    shifts = np.random.default_rng(0).integers(SIZE[0], size=count)
    for number, shift in enumerate(shifts):
        path = folder / "images" / f"{number // IMAGES_PER_FOLDER:03d}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.roll(photographs[number % len(photographs)], int(shift), axis=1))
    model, alphas = folder / "tiny.yaml", folder / "alphas"
    model.write_text(TINY_MODEL)
    options = {"ref": DEMO / "ref.jpg", "mask": DEMO / "mask.png", "src": folder / "images", "out": alphas}
    line = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "icm_cli", "matte", *line, "--model", str(model), "--device", "cpu", "--quiet"]
    subprocess.run(command, check=True)
    return alphas


def memory_mb(process_id: int, field: str) -> float:
    """Return a field of the memory of a process: VmRSS (now), VmHWM (peak)."""
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure_scrolling(page: Page, pixels_per_second: float, seconds: float) -> dict[str, float]:
    """Turn the wheel, then jump; return the longest times in which a cell, and the whole view, was blank (ms)."""
    page.mouse.move(*(side / 2 for side in page.viewport_size.values()))  # type: ignore[union-attr]
    page.evaluate(SAMPLER)
    start = time.monotonic()
    turned = 0.0
    while (elapsed := time.monotonic() - start) < seconds:
        page.mouse.wheel(0, elapsed * pixels_per_second - turned)
        turned = elapsed * pixels_per_second
        time.sleep(0.03)
    wait_until(lambda: page.evaluate(ALL_DRAWN), "thumbnails are missing")
    while_scrolling = page.evaluate("blankCells.longest")
    page.evaluate("blankCells.longest = 0")
    numbers = random.Random(0)
    for _ in range(10):
        page.mouse.wheel(0, numbers.uniform(-1, 1) * 50_000)
        wait_until(lambda: page.evaluate(ALL_DRAWN), "thumbnails are missing")
    found = page.evaluate("({ jump: blankCells.longest, empty: blankCells.empty })")
    return {"scrolling": while_scrolling, **found}


def measure(alphas: Path, options: argparse.Namespace, title: str) -> None:
    """Start the server, open the page, scroll, and print one row."""
    before = time.monotonic()
    server = ReviewServer.start(alphas, "--device", "cpu")
    try:
        started = time.monotonic() - before
        with open_browser() as browser:
            page = browser.new_page(viewport={"width": 1920, "height": 1080})
            before = time.monotonic()
            page.goto(server.url, wait_until="commit")
            page.wait_for_selector("[data-id]")
            first_cells = time.monotonic() - before
            wait_until(lambda: page.evaluate(ALL_DRAWN), "thumbnails are missing")
            first_view = time.monotonic() - before
            blank = measure_scrolling(page, options.speed, options.seconds)
        cells = " ".join(
            f"| {value}"
            for value in (
                title,
                f"{started:.1f} s",
                f"{first_cells:.2f} s",
                f"{first_view:.2f} s",
                *(f"{blank[name] / 1000:.2f} s" for name in ("scrolling", "jump", "empty")),
                f"{memory_mb(server.process.pid, 'VmHWM'):.0f} MB",
            )
        )
        print(f"{cells} |", flush=True)
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, required=True, help="where the images and alphas are kept")
    parser.add_argument("--speed", type=float, default=4000, help="pixels per second while scrolling")
    parser.add_argument("--seconds", type=float, default=20, help="duration of scrolling")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    alphas = options.folder / "alphas"
    if not alphas.exists():
        before = time.monotonic()
        make_run(options.folder, options.images)
        print(f"{options.images} images and alphas made in {time.monotonic() - before:.0f} s")
    print("| thumbnails | server answers | first cells | first view | blank scrolling | blank after a jump ", end="")
    print("| no cell at all | memory of the server |")
    shutil.rmtree(alphas / ".icm" / "thumbnails", ignore_errors=True)
    measure(alphas, options, "new")
    measure(alphas, options, "cached")


if __name__ == "__main__":
    main()
