"""Measure time and memory of the command ``icm train``, each run in its own process.

    python tests/benchmarks/bench_train.py [--only lite sd21 cache data]

- lite: ``configs/train/lite-refine.yaml`` on composites at several batch sizes: samples per second, waiting, memory;
- sd21: the same for ``configs/icm-sd21.yaml`` with Stable Diffusion 2.1's size and random weights (no download);
- cache: the same model without augmentation, with features from the cache and computed (the baseline);
- data: the time to make a sample of the lite recipe in one process.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")]
COMPOSITES = ROOT / "tests" / "composites"
SIDES = ("lite", "sd21", "cache", "data")
STILL = (
    "train.augment={flip: 0, zoom: 1, rotate_degrees: 0, stretch: 0, colour: 0, jpeg: 0, blur: 0, noise: 0}",
    "train.pairs={composite_probability: 0, same_image_probability: 0, distractor_probability: 0, "
    "negative_probability: 0, mask_jitter_probability: 0}",
)
LITE_BATCHES = {1: 12, 3: 8}
"""Batch size -> steps."""
SD21_BATCHES = {1: 1, 2: 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SIDES, default=SIDES)
    wanted = parser.parse_args().only
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        if "data" in wanted:
            data()
        if "lite" in wanted:
            for batch, steps in LITE_BATCHES.items():
                recipe = "configs/train/lite-refine.yaml"
                out = home / f"lite-{batch}"
                show(f"lite, refine, batch {batch}", run(out, recipe, batch, steps, "--set", "train.minutes=null"))
        if "sd21" in wanted or "cache" in wanted:
            weights = ["--weights", str(write_sd21(home / "sd21"))]
        if "sd21" in wanted:
            for batch, steps in SD21_BATCHES.items():
                show(f"icm-sd21, batch {batch}", run(home / f"sd21-{batch}", "icm-sd21", batch, steps, *weights))
        if "cache" in wanted:
            cache(home, weights)


def run(out: Path, config: str, batch: int, steps: int, *more: str, data: str | None = None) -> dict[str, float]:
    """Train, and return metrics of the log, without the first step, and of the summary."""
    sources = data or json.dumps([{"images": str(COMPOSITES / "imgs"), "alphas": str(COMPOSITES / "alphas")}])
    options = {"data.sources": sources, "data.backgrounds": json.dumps([str(COMPOSITES / "imgs")])}
    options |= {
        "train.batch_size": batch,
        "train.steps": steps,
        "train.log_every": 1,
        "train.pairs.negative_probability": 0,
    }
    line = [sys.executable, "-m", "icm_cli.cli", "train", "--config", config, "--out", str(out), "--device", "cpu"]
    line += [part for name, value in options.items() for part in ("--set", f"{name}={value}")]
    done = subprocess.run([*line, *more], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    with (out / "log.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    rows = rows[1:] or rows
    seconds = sum(float(row["seconds"]) for row in rows)
    found = re.search(r"peak memory\s+(\d+) MB", done.stdout)
    assert found
    return {
        "samples_per_second": batch * len(rows) / seconds,
        "waiting": sum(float(row["waiting_fraction"]) * float(row["seconds"]) for row in rows) / seconds,
        "peak_mb": float(found[1]),
    }


def show(name: str, figures: dict[str, float]) -> None:
    print(
        f"{name}: {figures['samples_per_second']:.3g} samples/s ({1 / figures['samples_per_second']:.3g} s each), "
        f"waiting {figures['waiting']:.1%}, peak {figures['peak_mb']:.0f} MB",
        flush=True,
    )


def cache(home: Path, weights: list[str]) -> None:
    """Train on two images: four encodings (each as target and as reference), of which a step needs two."""
    pair = json.dumps(
        [{"images": str(COMPOSITES / "imgs" / "l*.jpg"), "alphas": str(COMPOSITES / "alphas" / "l*.png")}]
    )
    still = [part for each in STILL for part in ("--set", each)]
    os.environ["ICM_CACHE"] = str(home / "cache")
    off = run(home / "off", "icm-sd21", 1, 2, *weights, *still, "--set", "train.feature_cache_gb=0", data=pair)
    run(home / "cold", "icm-sd21", 1, 6, *weights, *still, data=pair)
    warm = run(home / "warm", "icm-sd21", 1, 6, *weights, *still, data=pair)
    show("icm-sd21, features computed (the baseline)", off)
    show("icm-sd21, cached features", warm)
    size = sum(path.stat().st_size for path in (home / "cache" / "features").rglob("*.pt"))
    print(
        f"speed-up {warm['samples_per_second'] / off['samples_per_second']:.1f} x; "
        f"{size / 2 / 1e6:.1f} MB per image, as target and as reference"
    )


def data() -> None:
    """Make samples of the lite recipe in this process."""
    from icm_cli.training.data.pool import read_pool
    from icm_cli.training.settings import read_settings
    from icm_cli.training.stages.refine import EdgeMaker

    sources = json.dumps([{"images": str(COMPOSITES / "imgs"), "alphas": str(COMPOSITES / "alphas")}])
    lines = [
        f"data.sources={sources}",
        f"data.backgrounds=[{COMPOSITES / 'imgs'}]",
        "train.pairs.negative_probability=0",
    ]
    settings = read_settings("configs/train/lite-refine.yaml", overrides=lines)
    maker = EdgeMaker(read_pool(settings.data), settings.train)
    for counter in range(20):
        maker.make_batch([counter])
    begun = time.perf_counter()
    for counter in range(20, 120):
        maker.make_batch([counter])
    print(f"data: {(time.perf_counter() - begun) / 100 * 1e3:.0f} ms per sample in one process", flush=True)


def write_sd21(folder: Path) -> Path:
    """A diffusers folder of Stable Diffusion 2.1's sizes with random weights."""
    from bench_stable_diffusion import UNET, VAE
    from tiny_sd import write_tiny_sd

    vae = {**VAE, "latent_channels": 4, "scaling_factor": 0.18215}
    return write_tiny_sd(folder, unet={**UNET, "in_channels": 4, "out_channels": 4}, vae=vae)


if __name__ == "__main__":
    main()
