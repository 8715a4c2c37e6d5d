"""Fine edges: gradient error on procedural hair with exact alpha at 1024 px, against a guided filter over a mask.

    python tests/benchmarks/bench_hair.py [--backgrounds DIR] [--keep DIR]

The baseline is given the truth: the best binary mask (alpha at 0.5), filtered along the photograph's edges (He et al.,
"Guided Image Filtering", 2013) with whichever radius and regularisation do best on each picture. icm is given another
view of the same thing on another background.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np

import icm_cli
from icm_cli.evaluation.metrics import score
from icm_cli.images import read_picture
from icm_cli.training.procedural import Look, _noise, draw

SIZE_PX = 1024
SEED = 2026
"""Not the one that the weights were trained with."""
RADII = (1, 2, 4, 8, 16)
EPSILONS = (1e-5, 1e-4, 1e-3, 1e-2)


def guided(mask: np.ndarray, image: np.ndarray, radius: int, epsilon: float) -> np.ndarray:
    """The colour guided filter of a mask by its image, both float 0..1."""

    def mean(values: np.ndarray) -> np.ndarray:
        return cv2.blur(values, (2 * radius + 1, 2 * radius + 1), borderType=cv2.BORDER_REFLECT)

    mean_image, mean_mask = mean(image), mean(mask)
    covariance = mean(image * mask[..., None]) - mean_image * mean_mask[..., None]
    pairs = [
        [mean(image[..., i] * image[..., j]) - mean_image[..., i] * mean_image[..., j] for j in range(3)]
        for i in range(3)
    ]
    variance = np.stack([np.stack(row, axis=-1) for row in pairs], axis=-2) + epsilon * np.eye(3)
    a = np.linalg.solve(variance, covariance[..., None])[..., 0]
    b = mean_mask - (a * mean_image).sum(axis=-1)
    return ((mean(a) * image).sum(axis=-1) + mean(b)).clip(0.0, 1.0)


def backdrop(rng: np.random.Generator, folder: Path | None) -> np.ndarray:
    if folder is not None:
        paths = sorted(path for path in folder.rglob("*.jpg"))
        picture = read_picture(paths[rng.integers(len(paths))]).rgb
        return cv2.resize(picture, (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_AREA) / 255.0
    return np.dstack([_noise(SIZE_PX, 7, rng) * rng.uniform(0.4, 1.0) for _ in range(3)]).astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--backgrounds", type=Path)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="write pictures, alphas and truth here")
    arguments = parser.parse_args()
    matter = icm_cli.load(arguments.model, checkpoint=arguments.checkpoint)
    ours, theirs = [], []
    seed = SEED
    while len(ours) < arguments.count:
        seed += 1
        rng = np.random.default_rng(seed)
        look = Look.drawn(rng)
        if look.kind != "hair":
            continue
        pictures, truths = [], []
        for _ in range(2):
            thing = draw(look, SIZE_PX, rng)
            behind = backdrop(rng, arguments.backgrounds)
            picture = thing.colour + behind * (1.0 - thing.alpha[..., None])
            pictures.append(np.round(picture.clip(0, 1) * 255).astype(np.uint8))
            truths.append(np.round(thing.alpha * 255).astype(np.uint8))
        reference = matter.reference([(pictures[0], truths[0] > 127)])
        alpha = matter.matte(pictures[1], reference)
        truth, image = truths[1], pictures[1] / 255.0
        mask = (truth > 127).astype(np.float64)
        filtered = [
            np.round(guided(mask, image, radius, epsilon) * 255).astype(np.uint8)
            for radius in RADII
            for epsilon in EPSILONS
        ]
        ours.append(score(alpha, truth)["whole"].grad)
        errors = [score(each, truth)["whole"].grad for each in filtered]
        theirs.append(min(errors))
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            best = filtered[int(np.argmin(errors))]
            sheet = [pictures[0], pictures[1], *(np.dstack([each] * 3) for each in (truth, alpha, best))]
            cv2.imwrite(str(arguments.keep / f"{seed}.png"), cv2.cvtColor(np.hstack(sheet), cv2.COLOR_RGB2BGR))
        print(f"thing {seed}: icm {ours[-1]:.2f}, guided filter {theirs[-1]:.2f}, ratio {ours[-1] / theirs[-1]:.2f}")
    print(
        f"mean gradient error: icm {np.mean(ours):.2f}, guided filter over the best mask {np.mean(theirs):.2f}, "
        f"ratio {np.mean(ours) / np.mean(theirs):.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
