"""Calibrate the estimated quality on groups of the training data, and print its weights.

    python tests/benchmarks/calibrate_quality.py ../shared/data --records calibration.jsonl --write

DATA holds the folders ``dreambooth``, ``caltech101`` and ``groups`` and the file ``classes.json``.
Each round draws one group. Its reference is one of the images of the group that are not held out,
and its targets are held out: a third of all images, chosen by a hash of the file name. There are up
to two targets as they are, the same two with a photograph of another group next to them and a third
object pasted, and one image in which the object is absent. Objects of the same class are never used
as another object.

The head was trained on these groups, so it hardly ever finds an object that is absent. There are as
many rounds with photographs of ``edges/ecssd``, on which it was not trained: the reference is a
mirrored, brighter or darker copy of a photograph, and the targets are the photograph with another
one next to it, and another photograph.

An alpha that shows an object has the expected IoU ``sigmoid(offset + sum of weight * (signal -
mean) / std)``, fitted by maximum likelihood with a penalty of the squared weights. An empty alpha
has a model of its own for the probability that the object is absent. A reason is given below or
above a threshold of its signal, beyond which a fraction of at least MIN_WRONG of the alphas is wrong.
The most reliable reason comes first.

With --records, results are kept in a file, and images in it are not matted again. --write writes
the weights to ``icm_cli/quality/weights.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from bench_quality import Record, append_record, matte_image, read_records

import icm_cli
from icm_cli.images.reading import read_alpha, read_image
from icm_cli.matting.predictor import Predictor
from icm_cli.quality.estimate import WEIGHTS_PATH

Sample = tuple[np.ndarray, np.ndarray]
"""An image, sRGB uint8 [H,W,3], and its alpha, uint8 [H,W]: 0 outside, 255 inside, 128 unknown."""

SEED = 7
SOURCE_WEIGHTS = {"dreambooth": 1.0, "caltech101": 1.5, "eth80": 0.5, "ccp": 0.9, "coco_small": 0.8}
GROUP_WEIGHT = 0.6
"""Weight of other sources, for the root of their number of groups."""
SHOWN_SIGNALS = {
    **dict.fromkeys(("coarse_agreement", "completed_agreement", "completed_confidence", "presence", "similarity"), 1),
    "background_similarity": -1,
}
"""Signals of the model of alphas that show an object, and the sign of their influence. A signal whose fitted weight has
the other sign is removed."""
EMPTY_SIGNALS = {"presence": -1, "similarity": -1}
PENALTY = 2.0
"""Weight of the squared weights of standardised signals."""
NEW = "new"
"""Beginning of the names of records of new objects."""
REASONS = {
    "low presence": ("presence", "below"),
    "passes disagree": ("coarse_agreement", "below"),
    "low confidence": ("confidence", "below"),
    "split": ("largest_component", "below"),
    "soft interior": ("soft_interior", "above"),
    "touches border": ("border", "above"),
}
"""Reason -> its signal, and the side of the threshold on which it is given."""
MIN_WRONG = 0.75
MIN_BEYOND = 5
"""Smallest number of alphas beyond a threshold."""


class Groups:
    """The groups of the training data, and the samples of each round."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._new = list_images(root / "edges" / "ecssd")
        classes = json.loads((root / "classes.json").read_text())
        folders = [each for top in ("dreambooth", "caltech101", "groups/*") for each in sorted(root.glob(f"{top}/*"))]
        self._sources: dict[str, list[Path]] = {}
        self._classes: dict[Path, frozenset[str]] = {}
        for folder in filter(self._is_usable, folders):
            parts = folder.relative_to(root).parts
            self._sources.setdefault(parts[-2], []).append(folder)
            found = classes.get("/".join(parts), classes.get("/".join(parts[-2:]), ()))
            self._classes[folder] = frozenset([found] if isinstance(found, str) else found)
        self._names = sorted(self._sources)
        weights = [SOURCE_WEIGHTS.get(n, GROUP_WEIGHT * np.sqrt(len(self._sources[n]))) for n in self._names]
        self._weights = np.array(weights) / sum(weights)

    def draw_round(self, number: int) -> tuple[Sample, list[tuple[str, Sample]]]:
        """Return the reference of a round, and its targets with their part."""
        rng = np.random.default_rng([SEED, number])
        group = self._draw_group(rng)
        references = [each for each in list_images(group) if not is_held_out(each)]
        reference = read_sample(references[rng.integers(len(references))])
        held_out = [each for each in list_images(group) if is_held_out(each)]
        targets = [held_out[index] for index in rng.permutation(len(held_out))[:2]]
        samples = [("plain", read_sample(each)) for each in targets]
        for target in targets:
            other, other_classes = self._draw_other(rng, group, self._classes[group])
            third, _ = self._draw_other(rng, group, self._classes[group] | other_classes)
            sample = put_next_to(read_sample(target), other, rng)
            samples.append(("distractor", paste_object(sample, third, rng) if rng.random() < 0.8 else sample))
        absent, absent_classes = self._draw_other(rng, group, self._classes[group])
        if rng.random() < 0.7:
            third, _ = self._draw_other(rng, group, self._classes[group] | absent_classes)
            absent = paste_object(absent, third, rng)
        samples.append(("absent", (absent[0], np.zeros_like(absent[1]))))
        return reference, samples

    def draw_new_round(self, number: int) -> tuple[Sample, list[tuple[str, Sample]]]:
        """Return the reference and the targets of a round with an object on which the head was not trained."""
        rng = np.random.default_rng([SEED, number])
        first, absent = (read_sample(self._new[index]) for index in rng.choice(len(self._new), 2, replace=False))
        other, _ = self._draw_other(rng, self._root, frozenset())
        copy = np.clip(first[0][:, ::-1] * rng.uniform(0.7, 1.3, 3), 0, 255).astype(np.uint8)
        samples = [("distractor", put_next_to(first, other, rng)), ("absent", (absent[0], np.zeros_like(absent[1])))]
        return (copy, np.ascontiguousarray(first[1][:, ::-1])), samples

    def _draw_group(self, rng: np.random.Generator) -> Path:
        groups = self._sources[self._names[rng.choice(len(self._names), p=self._weights)]]
        return groups[rng.integers(len(groups))]

    def _draw_other(
        self, rng: np.random.Generator, group: Path, excluded: frozenset[str]
    ) -> tuple[Sample, frozenset[str]]:
        """Draw an image of another group that shows none of the classes ``excluded``."""
        while True:
            other = self._draw_group(rng)
            classes = self._classes[other]
            if other != group and classes and not classes & excluded:
                images = list_images(other)
                return read_sample(images[rng.integers(len(images))]), classes

    @staticmethod
    def _is_usable(folder: Path) -> bool:
        held_out = [is_held_out(each) for each in list_images(folder)]
        return any(held_out) and not all(held_out)


def is_held_out(image: Path) -> bool:
    return zlib.crc32(image.name.encode()) % 3 == 0


def list_images(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.jpg"), *folder.glob("*.webp")])


def read_sample(image: Path) -> Sample:
    rgb, alpha = read_image(image).rgb, read_alpha(image.with_suffix(".png"))
    size = rgb.shape[1], rgb.shape[0]
    return rgb, alpha if alpha.shape == rgb.shape[:2] else cv2.resize(alpha, size, interpolation=cv2.INTER_NEAREST)


def put_next_to(sample: Sample, other: Sample, rng: np.random.Generator) -> Sample:
    """Put the photograph ``other`` next to a sample, on a random side."""
    rgb, alpha = sample
    width = max(1, round(other[0].shape[1] * rgb.shape[0] / other[0].shape[0]))
    beside = cv2.resize(other[0], (width, rgb.shape[0]), interpolation=cv2.INTER_AREA)
    order = 1 if rng.random() < 0.5 else -1
    empty = np.zeros(beside.shape[:2], np.uint8)
    return np.hstack([rgb, beside][::order]), np.hstack([alpha, empty][::order])


def paste_object(sample: Sample, other: Sample, rng: np.random.Generator) -> Sample:
    """Paste the object of ``other`` at a random place of a sample, small."""
    rgb, alpha = sample[0].copy(), sample[1].copy()
    rows, columns = np.nonzero(other[1] > 127)
    if not len(rows):
        return sample
    box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
    side = rng.uniform(0.15, 0.35) * min(rgb.shape[:2])
    scale = side / max(each.stop - each.start for each in box)
    height, width = (max(2, round((each.stop - each.start) * scale)) for each in box)
    colours, opacity = (cv2.resize(each[box], (width, height), interpolation=cv2.INTER_AREA) for each in other)
    weight = opacity / 255.0
    top, left = rng.integers(0, rgb.shape[0] - height + 1), rng.integers(0, rgb.shape[1] - width + 1)
    at = slice(top, top + height), slice(left, left + width)
    rgb[at] = np.round(rgb[at] * (1 - weight[..., None]) + colours * weight[..., None]).astype(np.uint8)
    hidden = np.round(alpha[at] * (1 - weight)).astype(np.uint8)
    alpha[at] = np.where(alpha[at] == 128, 128, hidden)
    return rgb, alpha


def matte_rounds(predictor: Predictor, groups: Groups, count: int, path: Path | None) -> Iterator[Record]:
    known = read_records(path)
    for number, kind in itertools.product(range(count), ("", NEW)):
        prefix = f"{kind}{number:04d}/"
        if any(name.startswith(f"{prefix}absent") for name in known):  # the last of a round
            yield from (record for name, record in known.items() if name.startswith(prefix))
            continue
        reference, samples = (groups.draw_new_round if kind else groups.draw_round)(number)
        if not (reference[1] > 250).any():
            continue
        prepared = predictor.reference([reference])
        for index, (part, (rgb, alpha)) in enumerate(samples):
            name = f"{prefix}{part}{index}"
            record = known.get(name) or Record(name, part, *matte_image(predictor, rgb, prepared, alpha))
            if name not in known:
                append_record(path, record)
            yield record


def fit_model(records: Sequence[Record], signs: Mapping[str, int]) -> dict[str, Any]:
    """Fit the true quality of alphas by their signals. A missing signal is its mean."""
    names = list(signs)
    values = np.array([[record.signals.get(name, np.nan) for name in names] for record in records])
    mean, std = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
    standardised = np.nan_to_num((values - mean) / std)
    offset, *weights = fit_logistic(standardised, np.array([record.true_quality for record in records]))
    wrong = [name for name, weight in zip(names, weights, strict=True) if weight * signs[name] < 0]
    if wrong:
        return fit_model(records, {name: sign for name, sign in signs.items() if name not in wrong})
    columns = {"mean": mean, "std": std, "min": np.nanmin(values, axis=0), "max": np.nanmax(values, axis=0)}
    columns["weight"] = np.array(weights)
    signals = {
        name: {key: round(float(column[index]), 5) for key, column in columns.items()}
        for index, name in enumerate(names)
    }
    return {"offset": round(float(offset), 5), "signals": signals}


def fit_logistic(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return offset and weights of a logistic regression of ``targets`` [N] in 0..1, by Newton's method."""
    inputs = np.c_[np.ones(len(inputs)), inputs]
    penalty = np.diag([1e-6, *[PENALTY] * (inputs.shape[1] - 1)])
    weights = np.zeros(inputs.shape[1])
    for _ in range(50):
        predicted = 1 / (1 + np.exp(-inputs @ weights))
        gradient = inputs.T @ (predicted - targets) + penalty @ weights
        hessian = (inputs.T * (predicted * (1 - predicted))) @ inputs + penalty
        weights -= np.linalg.solve(hessian, gradient)
    return weights


def find_threshold(values: np.ndarray, is_wrong: np.ndarray) -> float | None:
    """Return the largest threshold below which at least MIN_WRONG of the alphas are wrong; None without one."""
    order = np.argsort(values, kind="stable")
    fraction = np.cumsum(is_wrong[order]) / np.arange(1, len(order) + 1)
    enough = np.flatnonzero((fraction >= MIN_WRONG) & (np.arange(1, len(order) + 1) >= MIN_BEYOND))
    return float(values[order[enough[-1]]]) if len(enough) else None


def find_reason(shown: Sequence[Record], reason: str) -> tuple[float, str, dict[str, Any]] | None:
    """Return the fraction of wrong alphas among those with a reason, the reason, and its threshold."""
    signal, side = REASONS[reason]
    having = [record for record in shown if signal in record.signals]
    sign = 1 if side == "below" else -1
    values = sign * np.array([record.signals[signal] for record in having])
    is_wrong = np.array([record.is_wrong for record in having])
    threshold = find_threshold(values, is_wrong)
    if threshold is None:
        return None
    return float(is_wrong[values < threshold].mean()), reason, {"signal": signal, side: round(sign * threshold, 4)}


def calibrate(records: Sequence[Record]) -> dict[str, Any]:
    shown = [record for record in records if "largest_component" in record.signals]
    empty = [record for record in records if "largest_component" not in record.signals]
    found = [find_reason(shown, reason) for reason in REASONS]
    reasons = dict(each[1:] for each in sorted(filter(None, found), reverse=True, key=lambda each: each[0]))
    return {
        "alphas": len(records),
        "shown": fit_model(shown, SHOWN_SIGNALS),
        "empty": fit_model(empty, EMPTY_SIGNALS),
        "reasons": reasons,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=50, help="number of groups that are drawn")
    parser.add_argument("--records", type=Path, help="keep the results in this file, and use those that it has")
    parser.add_argument("--write", action="store_true", help="write the weights into the package")
    arguments = parser.parse_args()
    predictor = icm_cli.load(None)
    records = list(matte_rounds(predictor, Groups(arguments.data), arguments.rounds, arguments.records))
    text = json.dumps(calibrate(records), indent=1) + "\n"
    print(f"{len(records)} alphas, {sum(record.is_wrong for record in records)} wrong\n{text}")
    if arguments.write:
        WEIGHTS_PATH.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
