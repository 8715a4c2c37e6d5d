"""``--match same`` against ``--match kind``, on dogs and on species of flowers.

    python tests/benchmarks/bench_match.py ../shared/data

Each group, such as one dog, has a reference and one or more targets. Every target is matted as it is ("plain"), next to
a photograph of another group of the same kind ("next"), and such a photograph is matted alone ("absent"). The script
prints the mean IoU at 0.5 of "plain" and "next", and the fraction of "absent" images with a mean alpha of at most
0.01, for each rule.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
from pathlib import Path

import numpy as np
from calibrate_quality import Sample, list_images, put_next_to, read_sample

import icm_cli

KINDS = {
    "dogs": "dreambooth/dog*",
    "flowers": "groups/flowers_ppbc/*",
}
"""Kind -> pattern of the folders with its groups."""
SHOWN_MEAN = 0.01


def draw_samples(
    groups: list[list[Path]], index: int, targets: int, rng: np.random.Generator
) -> list[tuple[str, Sample]]:
    """Return the targets of a group with their part: "plain", "next" or "absent"."""
    others = [path for number, paths in enumerate(groups) for path in paths if number != index]
    samples = []
    for path in groups[index][1 : 1 + targets]:
        target, other = read_sample(path), read_sample(others[rng.integers(len(others))])
        absent = other[0], np.zeros_like(other[1])
        samples += [("plain", target), ("next", put_next_to(target, other, rng)), ("absent", absent)]
    return samples


def score(alpha: np.ndarray, truth: np.ndarray, part: str) -> float:
    if part == "absent":
        return float(alpha.mean() / 255 <= SHOWN_MEAN)
    found, true = (alpha > 127) & (truth != 128), truth > 128
    return float((found & true).sum() / max(1, (found | true).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--targets", type=int, default=1, help="targets per group")
    parser.add_argument("--min-similarity", type=float, help="instead of that of the model")
    arguments = parser.parse_args()
    predictor = icm_cli.load()
    rng = np.random.default_rng(5)
    for kind, pattern in KINDS.items():
        groups = [list_images(folder) for folder in sorted(arguments.data.glob(pattern))]
        scores = collections.defaultdict(list)
        for index, paths in enumerate(groups):
            rgb, mask = read_sample(paths[0])
            reference = predictor.reference([(rgb, np.where(mask == 255, 255, 0).astype(np.uint8))])
            for part, (image, truth) in draw_samples(groups, index, arguments.targets, rng):
                for rule in ("kind", "same"):
                    match = dataclasses.replace(predictor.model.match, rule=rule)
                    if arguments.min_similarity is not None:
                        match = dataclasses.replace(match, min_similarity=arguments.min_similarity)
                    predictor.model.match = match
                    scores[part, rule].append(score(predictor.matte(image, reference), truth, part))
        results = "; ".join(
            f"{part} {np.mean(scores[part, 'kind']):.3f} -> {np.mean(scores[part, 'same']):.3f}"
            for part in ("plain", "next", "absent")
        )
        print(f"{kind}, {len(groups)} groups: kind -> same: {results}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
