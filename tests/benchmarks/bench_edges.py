"""Quality of fine edges on 60 images with exact alphas.

Each image is its own reference, with its binary mask.

    python tests/benchmarks/bench_edges.py --data ../shared/data --keep edges/
    python tests/benchmarks/bench_edges.py --data ../shared/data --checkpoint other.safetensors

The images are 20 composites of photographed objects that are not used for training, 20 images of
ETH-80 with an alpha from a blue-screen key, and 20 procedural objects with hair, fur or wire. MSE
and GRAD are computed within 12 px of the true edge. To measure the edge refinement alone, it is
also applied to masks that were distorted by 5 px and blurred.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch

import icm_cli
from icm_cli.images.reading import read_alpha, read_image
from icm_cli.model.training_free.closed_form import load_foreground_estimator
from icm_cli.scoring.metrics import compute_scores
from icm_cli.training.data.procedural import ObjectStyle, draw_view

COUNT = 20
BAND_PX = 12
SIDE_PX = 640
SEED = 2026
"""Not used by any training."""
FINE_KINDS = ("hair", "fur", "wire")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--keep", type=Path, help="write images, ground truth and alphas to this folder")
    arguments = parser.parse_args()
    predictor = icm_cli.load(arguments.model, checkpoint=arguments.checkpoint)
    edges = getattr(predictor.model, "edges", None)
    rows: dict[str, list[tuple[float, ...]]] = {}
    start = time.perf_counter()
    for number, (kind, rgb, truth) in enumerate(make_images(arguments.data)):
        mask = truth > 127
        alpha = predictor.matte(rgb, predictor.reference([(rgb, mask)]))
        alphas = [alpha]
        if edges is not None:
            coarse = degrade_mask(mask, np.random.default_rng((SEED, number)))
            alphas += [
                np.round(255 * coarse).astype(np.uint8),
                np.round(255 * edges.refine_alphas([rgb], [torch.from_numpy(coarse)])[0].numpy()).astype(np.uint8),
            ]
        rows.setdefault(kind, []).append(tuple(value for each in alphas for value in edge_scores(each, truth)))
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            sheet = np.hstack([rgb, *(np.dstack([each] * 3) for each in (truth, *alphas))])
            cv2.imwrite(str(arguments.keep / f"{number:02}-{kind}.png"), sheet[..., ::-1])
    print(f"{sum(map(len, rows.values()))} images in {time.perf_counter() - start:.0f} s; MSE and GRAD in the band")
    for kind, each in [*rows.items(), ("all", [row for group in rows.values() for row in group])]:
        means = np.mean(each, axis=0)
        text = f"{kind}: icm {means[0]:.4f} / {means[1]:.2f}; undecided far from edges {means[2]:.4f}"
        if edges is not None:
            text += f"; degraded {means[3]:.4f} / {means[4]:.2f}, refined {means[6]:.4f} / {means[7]:.2f} "
            text += f"(ratios {means[6] / means[3]:.2f}, {means[7] / means[4]:.2f})"
        print(text)


def edge_scores(alpha: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Return MSE and GRAD in the band, and the fraction of other pixels with an alpha between 0.05
    and 0.95."""
    soft = cv2.morphologyEx((truth > 127).astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    soft |= (truth > 0) & (truth < 255)
    distance = cv2.distanceTransform((~soft).astype(np.uint8), cv2.DIST_L2, 5)
    band = distance <= BAND_PX
    trimap = np.where(band, 128, truth).astype(np.uint8)
    scores = compute_scores(alpha, truth, trimap=trimap)["unknown"]
    undecided = (alpha > 0.05 * 255) & (alpha < 0.95 * 255) & ~band
    return scores.mse, scores.grad, float(undecided.mean())


def degrade_mask(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move the outline of a binary mask by up to 5 px and blur it; float32 0..1."""
    height, width = mask.shape
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    small = rng.uniform(-5, 5, (2, max(2, height // 24), max(2, width // 24))).astype(np.float32)
    dx, dy = (cv2.resize(each, (width, height), interpolation=cv2.INTER_CUBIC) for each in small)
    moved = cv2.remap(mask.astype(np.float32), x + dx, y + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.clip(cv2.GaussianBlur(moved, (0, 0), 2.5), 0, 1)


def make_images(data: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield kind, image sRGB uint8 [H,W,3] and alpha uint8 [H,W]."""
    rng = np.random.default_rng(SEED)
    backgrounds = sorted((data / "backgrounds").rglob("*.jpg"))
    yield from draw_composites(data / "validation" / "plain", backgrounds, rng)
    for path in sorted((data / "groups" / "eth80").glob("*/*.webp"))[:: 640 // COUNT][:COUNT]:
        rgb = read_image(path).rgb
        yield "keyed", rgb, blue_key(rgb)
    count, seed = 0, SEED
    while count < COUNT:
        seed += 1
        object_rng = np.random.default_rng(seed)
        style = ObjectStyle.draw_random(object_rng)
        if style.kind not in FINE_KINDS:
            continue
        count += 1
        view = draw_view(style, SIDE_PX, object_rng)
        yield "procedural", *composite_over(view[..., :3], view[..., 3], draw_background(backgrounds, rng))


def draw_composites(
    plain: Path, backgrounds: list[Path], rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    groups = ("fancy_boot", "robot_toy", "duck_toy", "wolf_plushie", "rc_car", "rooster", "elephant")
    paths = [path for group in groups for path in sorted((plain / group / "src").iterdir())]
    for index in rng.permutation(len(paths))[:COUNT]:
        path = paths[index]
        rgb, alpha = read_image(path).rgb, read_alpha(path.parent.parent / "alpha" / f"{path.stem}.png") / 255.0
        side = max(alpha.shape)
        square = [(0, side - alpha.shape[0]), (0, side - alpha.shape[1])]
        colour = load_foreground_estimator()(rgb / 255.0, alpha) * alpha[..., None]
        colour, alpha = np.pad(colour, [*square, (0, 0)]), np.pad(alpha, square)
        colour, alpha = (cv2.resize(each, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA) for each in (colour, alpha))
        yield "composite", *composite_over(colour, alpha, draw_background(backgrounds, rng))


def draw_background(paths: list[Path], rng: np.random.Generator) -> np.ndarray:
    rgb = read_image(paths[rng.integers(len(paths))]).rgb
    side = min(rgb.shape[:2])
    return cv2.resize(rgb[:side, :side], (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA) / 255.0


def composite_over(colour: np.ndarray, alpha: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    image = colour + background * (1.0 - alpha[..., None])
    return np.round(image.clip(0, 1) * 255).astype(np.uint8), np.round(alpha.clip(0, 1) * 255).astype(np.uint8)


def blue_key(rgb: np.ndarray) -> np.ndarray:
    """Return the alpha of an object in front of a uniform blue background."""
    values = rgb.astype(np.float32)
    excess = values[..., 2] - values[..., :2].max(axis=-1)
    border = np.concatenate([excess[:8].ravel(), excess[-8:].ravel(), excess[:, :8].ravel(), excess[:, -8:].ravel()])
    level = max(10.0, float(np.median(border)))
    alpha = 1.0 - np.clip((excess / level - 0.15) / 0.6, 0.0, 1.0)
    solid = cv2.morphologyEx((alpha > 0.5).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(solid)
    body = labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    near = cv2.dilate(body.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    deep = cv2.erode(
        cv2.morphologyEx(body.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8)), np.ones((5, 5))
    )
    alpha = np.where(deep > 0, 1.0, np.where(near, alpha, 0.0))
    return np.round(alpha * 255).astype(np.uint8)


if __name__ == "__main__":
    sys.exit(main())
