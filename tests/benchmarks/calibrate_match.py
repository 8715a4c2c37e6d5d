"""Fit the probability that two objects are the same instance to their similarity (``--match same``).

    python tests/benchmarks/calibrate_match.py ../shared/data

Objects of one group, such as one dog, one tool or one species, count as the same instance. Objects of
different groups of one source are not. The script prints the constants of
``icm_cli/quality/estimate.py``: offset and slope of a logistic regression, in which both kinds of
pairs of each source have the same weight.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from calibrate_quality import fit_logistic, list_images, read_sample

import icm_cli
from icm_cli.errors import UsageError

SOURCES = {
    "dogs": "dreambooth/dog*",
    "flowers": "groups/flowers_ppbc/*",
    "animals": "groups/endangered_animals/*",
    "subjects": "groups/icoseg/*",
    "tools": "groups/rmgc_bin_objects/*",
    "parts": "groups/workpieces/*",
    "small objects": "groups/class5segment/*",
    "food": "groups/indonesian_food/*",
}
LIMIT = 0.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=3, help="images per group")
    arguments = parser.parse_args()
    predictor = icm_cli.load()
    layers = len(predictor.model.head.config.feature_channels)  # type: ignore[union-attr]
    similarities, targets, counts = [], [], []
    for source, pattern in SOURCES.items():
        groups, means = [], []
        for number, folder in enumerate(sorted(arguments.data.glob(pattern))):
            for path in list_images(folder)[: arguments.images]:
                rgb, mask = read_sample(path)
                try:
                    reference = predictor.reference([(rgb, np.where(mask == 255, 255, 0).astype(np.uint8))])
                except UsageError:  # an empty mask
                    continue
                means.append(reference.object_means[0].reshape(layers, -1))  # type: ignore[attr-defined]
                groups.append(number)
        pairs = list(itertools.combinations(range(len(means)), 2))
        similarity = [float(F.cosine_similarity(means[one], means[other], dim=-1).mean()) for one, other in pairs]
        is_same = np.array([groups[one] == groups[other] for one, other in pairs])
        kept = np.array(similarity) >= LIMIT
        print(
            f"{source}: {kept[is_same].mean():.0%} of {is_same.sum()} equal pairs and {kept[~is_same].mean():.0%} of "
            f"{(~is_same).sum()} other pairs have a similarity of at least {LIMIT}",
            flush=True,
        )
        for label in (True, False):  # each kind of pair gets the same weight: 1000 draws
            values = np.array(similarity)[is_same == label]
            drawn = np.random.default_rng(0).choice(values, 1000)
            similarities.append(drawn)
            targets.append(np.full(1000, float(label)))
        counts.append(len(pairs))
    offset, slope = fit_logistic(np.concatenate(similarities)[:, None], np.concatenate(targets))
    print(f"{sum(counts)} pairs: offset {offset:.2f}, slope {slope:.2f}")


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
