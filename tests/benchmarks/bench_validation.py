"""Quality on a folder of groups
``{plain,distractor,absent}/<group>/{ref.*,mask.png,src/*,alpha/*.png}``.

    python tests/benchmarks/bench_validation.py ../shared/data/validation --out OUT --baseline
    lite-training-free

It mattes every group with a model and with a baseline. For "plain" and "distractor" it prints IoU
at 0.5 and MSE, the groups with the lowest IoU, IoU by the origin of the masks, and IoU of objects
that cover 2 to 6 % of the image. For "absent" it prints the fraction of images with a mean alpha of
at most 0.01.

With --negatives, the reference of the group whose photograph is in an image of "distractor" or
"absent" is a negative example for that image; in "plain", that of the next group is. Images in
which no such group is found are skipped, also without --negatives if --comparable is given.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

import icm_cli
from icm_cli.images.reading import read_alpha, read_image

PARTS = ("plain", "distractor", "absent")
BY_HAND = "bottle cheetah dogs handbag kite monitor motorbike panda pyramid rescue_helicopter skaters statue_of_liberty"
"""Groups whose masks were made by hand. The other groups have pseudo alphas."""
SMALL = (0.02, 0.06)
"""Objects that cover a fraction of the image in this range are listed separately."""


class Row(NamedTuple):
    """Result of an image: group, name, IoU at 0.5, MSE, mean alpha, and fraction of the image that
    is the object."""

    group: str
    name: str
    overlap: float
    error: float
    mean: float
    size: float


class OtherGroups:
    """Finds the group whose photograph is a part of an image."""

    HEIGHT = 64
    """Height at which photographs are compared."""
    MAX_DIFFERENCE = 2.0
    """Largest median difference of equal photographs, in levels of 255."""

    def __init__(self, root: Path) -> None:
        self.groups = sorted(path for path in (root / "plain").iterdir() if path.is_dir())
        photographs = {group: [*group.glob("ref.*"), *(group / "src").iterdir()] for group in self.groups}
        self._small = {group: list(map(self._read_small, paths)) for group, paths in photographs.items()}

    def find(self, part: str, group: Path, source: Path) -> Path | None:
        """Return the group in ``plain`` that is the negative example of an image."""
        if part == "plain":
            return self.groups[(self.groups.index(group) + 1) % len(self.groups)]
        image = self._read_small(source)
        for other in self.groups:
            for small in self._small[other] if other.name != group.name else []:
                width = min(small.shape[1], image.shape[1])
                for half in (image[:, :width], image[:, -width:]):
                    if np.median(np.abs(half - small[:, :width])) <= self.MAX_DIFFERENCE:
                        return other
        return None

    def _read_small(self, path: Path) -> np.ndarray:
        rgb = read_image(path).rgb
        size = max(8, round(rgb.shape[1] * self.HEIGHT / rgb.shape[0])), self.HEIGHT
        return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA).astype(np.float32)


def read_reference(group: Path) -> tuple[np.ndarray, np.ndarray]:
    return read_image(next(group.glob("ref.*"))).rgb, read_alpha(group / "mask.png")


def matte_groups(
    predictor: icm_cli.matting.predictor.Predictor,
    root: Path,
    out: Path | None,
    every: int,
    others: OtherGroups | None = None,
    *,
    use_negatives: bool = False,
) -> dict[str, list[Row]]:
    """Matte every group and return the results by part."""
    rows: dict[str, list[Row]] = collections.defaultdict(list)
    for part in PARTS:
        for group in sorted(path for path in (root / part).glob("*") if path.is_dir()):
            reference = predictor.reference([read_reference(group)])
            for source in sorted((group / "src").iterdir())[::every]:
                if others is not None:
                    other = others.find(part, group, source)
                    if other is None:
                        continue
                    if use_negatives:
                        negatives = [read_reference(other)]
                        reference = predictor.reference([read_reference(group)], negatives=negatives)
                alpha = predictor.matte(read_image(source).rgb, reference)
                if out is not None:
                    to = out / part / group.name / f"{source.stem}.png"
                    to.parent.mkdir(parents=True, exist_ok=True)
                    cv2.imwrite(str(to), alpha)
                truth = read_alpha(group / "alpha" / f"{source.stem}.png") / 255.0
                found = alpha / 255.0
                union = ((found > 0.5) | (truth > 0.5)).sum()
                overlap = ((found > 0.5) & (truth > 0.5)).sum() / max(1, union)
                error = float(((found - truth) ** 2).mean())
                rows[part].append(
                    Row(
                        group.name, source.stem, float(overlap), error, float(found.mean()), float((truth > 0.5).mean())
                    )
                )
    return rows


def summarise_part(rows: list[Row], part: str) -> str:
    overlaps, errors, means = (np.array([getattr(row, name) for row in rows]) for name in ("overlap", "error", "mean"))
    if part == "absent":
        return f"n={len(rows)} mean alpha {means.mean():.4f}, at most 0.01 in {(means <= 0.01).mean():.0%}"
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row.group].append(row.overlap)
    worst = sorted((float(np.mean(each)), name) for name, each in groups.items())[:8]
    listed = " ".join(f"{name} {value:.2f}" for value, name in worst)
    halves = [[row.overlap for row in rows if (row.group in BY_HAND.split()) == by_hand] for by_hand in (True, False)]
    small = [row for row in rows if SMALL[0] <= row.size <= SMALL[1]]
    text = f"n={len(rows)} IoU {overlaps.mean():.3f} MSE {errors.mean():.4f}; worst: {listed}"
    if all(halves):
        text += "\n  masks by hand: IoU {:.4f}, pseudo alphas: {:.4f}".format(*map(np.mean, halves))
    if small:
        each = ", ".join(f"{row.group}/{row.name} {row.overlap:.2f}" for row in small)
        text += f"\n  small objects: n={len(small)} IoU {np.mean([row.overlap for row in small]):.3f}: {each}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--baseline", help="preset to compare with")
    parser.add_argument("--out", type=Path, help="write the alphas of the model to this folder")
    parser.add_argument("--every", type=int, default=1, help="use every n-th image of a group")
    parser.add_argument("--negatives", action="store_true", help="give a negative example for every image")
    parser.add_argument("--comparable", action="store_true", help="use the images that --negatives uses")
    arguments = parser.parse_args()
    others = OtherGroups(arguments.root) if arguments.negatives or arguments.comparable else None
    models = {"model": icm_cli.load(arguments.model, checkpoint=arguments.checkpoint)}
    if arguments.baseline:
        models[arguments.baseline] = icm_cli.load(arguments.baseline)
    for name, predictor in models.items():
        start = time.perf_counter()
        out = arguments.out if name == "model" else None
        rows = matte_groups(predictor, arguments.root, out, arguments.every, others, use_negatives=arguments.negatives)
        for part in PARTS:
            print(f"{name}: {part}: {summarise_part(rows[part], part)}")
        print(f"{name}: {(time.perf_counter() - start) / sum(map(len, rows.values())):.2f} s per image")


if __name__ == "__main__":
    sys.exit(main())
