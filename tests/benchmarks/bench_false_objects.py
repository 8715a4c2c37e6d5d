"""One click off the object, on a false object: what is left of it, and of the object.

    python tests/benchmarks/bench_false_objects.py ../shared/data/validation

An object of another group is pasted into every n-th image of the part "plain", next to the object or
overlapping it. The coarse alpha shows both; it is made from their true alphas, with blur and noise.
The click is in the middle of the pasted object. Alphas are those before edges are refined. The folder
has the layout of bench_validation.py. Images whose completed alpha does not show both are skipped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from bench_clicks import enlarge_alpha, load_decoder
from torch import Tensor

import icm_cli
from icm_cli.images.reading import read_alpha, read_image
from icm_cli.matting.hinting import make_prompts
from icm_cli.matting.prompting import ImageEmbedder, complete_by_prompts
from icm_cli.model.contracts import Objects

COARSE_CELLS = 96
GROUP_STEP = 7
"""Number of groups from that of an image to that of the object that is pasted into it."""
MIN_PIXELS = 500
VOID = 128
POSITION_TRIES = 200


@dataclass(frozen=True)
class Pasted:
    """An image, sRGB uint8 [H,W,3], with the alphas of its object and of the pasted one, float32 [H,W]."""

    rgb: np.ndarray
    object_alpha: np.ndarray
    false_alpha: np.ndarray
    coarse: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--objects", type=Path, help="take the decoder of the objects from this checkpoint")
    parser.add_argument("--every", type=int, default=5, help="use every n-th image")
    arguments = parser.parse_args()
    predictor = icm_cli.load()
    objects = predictor.model.objects
    assert objects is not None
    if arguments.objects is not None:
        load_decoder(objects, arguments.objects)
    rows = [row for image in paste_objects(arguments.root, arguments.every) for row in measure_click(objects, image)]
    for is_connected, title in ((False, "separate"), (True, "connected")):
        chosen = np.array([values for connected, *values in rows if connected == is_connected])
        if len(chosen):
            iou_before, iou, false, kept_before, kept, error = chosen.mean(axis=0)
            print(f"{title}: n={len(chosen)} IoU {iou_before:.3f} -> {iou:.3f}, MSE {error:.4f}")
            print(f"  alpha on the pasted object {false:.3f}; above .02: {(chosen[:, 2] > 0.02).mean():.0%}")
            print(f"  alpha on the object {kept_before:.3f} -> {kept:.3f}")


def paste_objects(root: Path, every: int) -> Iterator[Pasted]:
    groups = sorted(path for path in (root / "plain").glob("*") if path.is_dir())
    sources = [(n, path) for n, group in enumerate(groups) for path in sorted((group / "src").iterdir())]
    for number, (index, source) in list(enumerate(sources, 1))[every - 1 :: every]:
        others = sorted((groups[(index + GROUP_STEP) % len(groups)] / "src").iterdir())
        alpha, pasted_alpha = read_truth(source), read_truth(others[number % len(others)])
        pasted = paste_object(
            read_image(source).rgb,
            alpha,
            cut_out(read_image(others[number % len(others)]).rgb, pasted_alpha),
            number,
            is_overlapping=bool((number // every) % 2),
        )
        if pasted is not None:
            yield pasted


def read_truth(source: Path) -> np.ndarray:
    alpha = read_alpha(source.parents[1] / "alpha" / f"{source.stem}.png")
    return np.where(alpha == VOID, 0, alpha).astype(np.float32) / np.float32(255)


def cut_out(rgb: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = (np.flatnonzero((alpha > 0.5).any(axis=axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return rgb[box], alpha[box]


def paste_object(
    rgb: np.ndarray, alpha: np.ndarray, other: tuple[np.ndarray, np.ndarray], seed: int, *, is_overlapping: bool
) -> Pasted | None:
    rng, (height, width) = np.random.default_rng(seed), alpha.shape
    scale = np.sqrt((alpha > 0.5).sum() / max(1, (other[1] > 0.5).sum())) * rng.uniform(0.5, 1)
    scale = min(scale, 0.6 * height / other[1].shape[0], 0.6 * width / other[1].shape[1])
    size = max(8, int(other[1].shape[1] * scale)), max(8, int(other[1].shape[0] * scale))
    pixels, opacity = (cv2.resize(each, size, interpolation=cv2.INTER_AREA) for each in other)
    if min((alpha > 0.5).sum(), (opacity > 0.5).sum()) < MIN_PIXELS:
        return None
    for _ in range(POSITION_TRIES):
        top, left = rng.integers(0, height - size[1] + 1), rng.integers(0, width - size[0] + 1)
        box = slice(top, top + size[1]), slice(left, left + size[0])
        covered = float((alpha[box] * opacity).sum() / opacity.sum())
        if 0.05 < covered < 0.4 if is_overlapping else covered == 0:
            break
    else:
        return None
    composite, visible, false = rgb.astype(np.float32), alpha.copy(), np.zeros_like(alpha)
    composite[box] += opacity[..., None] * (pixels - composite[box])
    visible[box] *= 1 - opacity
    false[box] = opacity
    coarse = np.maximum(make_coarse(visible, 0.9, rng), make_coarse(false, rng.uniform(0.6, 0.95), rng))
    return Pasted(np.round(composite).astype(np.uint8), visible, false, torch.from_numpy(coarse))


def make_coarse(alpha: np.ndarray, value: float, rng: np.random.Generator) -> np.ndarray:
    scale = COARSE_CELLS / max(alpha.shape)
    size = round(alpha.shape[1] * scale), round(alpha.shape[0] * scale)
    noise = cv2.GaussianBlur(rng.standard_normal(size[::-1], np.float32), (0, 0), 3)
    small = cv2.GaussianBlur(cv2.resize(alpha, size, interpolation=cv2.INTER_AREA), (0, 0), 1.2)
    return np.asarray(small * np.clip(value + 1.5 * noise, 0, 1), np.float32)


def measure_click(objects: Objects, image: Pasted) -> Iterator[tuple[float, ...]]:
    """Yield whether both objects are connected, and the measured values, for an image that shows both."""
    embedder = ImageEmbedder(objects, image.rgb)
    (completed,) = objects.complete_embedded_alphas([embedder.image], [image.coarse])
    before = enlarge_alpha(completed, image.object_alpha)
    is_object, is_false = image.object_alpha > 0.5, image.false_alpha > 0.5
    if (before[is_object] > 0.5).mean() < 0.7 or (before[is_false] > 0.5).mean() < 0.3:
        return
    distance = cv2.distanceTransform(np.pad(is_false & (before > 0.5), 1).astype(np.uint8), cv2.DIST_L2, 5)
    row, column = np.unravel_index(distance[1:-1, 1:-1].argmax(), is_false.shape)
    hints = icm_cli.Hints(size=is_object.shape, not_points=[(column + 0.5, row + 0.5)])
    prompts = make_prompts(hints)
    assert prompts is not None
    after = enlarge_alpha(complete_by_prompts(embedder, image.coarse, hints, prompts), is_object)
    _, labels = cv2.connectedComponents((before > 0.3).astype(np.uint8))
    yield (
        bool((labels[is_object & (before > 0.5)] == labels[row, column]).any()),
        *(float(((each > 0.5) & is_object).sum() / ((each > 0.5) | is_object).sum()) for each in (before, after)),
        float(after[is_false].mean()),
        float(before[is_object].mean()),
        float(after[is_object].mean()),
        float(((after - image.object_alpha) ** 2).mean()),
    )


if __name__ == "__main__":
    sys.exit(main())
