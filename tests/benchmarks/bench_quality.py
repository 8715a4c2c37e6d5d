"""How well the estimated quality finds wrong alphas, on a folder of groups as in bench_validation.py.

    python tests/benchmarks/bench_quality.py ../shared/data/validation --records records.jsonl

An alpha is wrong if its IoU at 0.5 is below 0.8, or if anything is shown (mean alpha above 0.01)
where the object is absent. The script prints

- AUROC: the probability that a wrong alpha has a lower quality than one that is right;
- the fraction of all wrong alphas that are among the 20 % with the lowest quality, of those that
  fit there;
- calibration error: the mean difference of quality and IoU in 10 bins of equal size;
- the time of signals and estimate, as a fraction of the whole time;
- AUROC of every signal, and how often each reason is given to wrong alphas and to those that are
  right.

With --records, results are kept in a file, and images in it are not matted again. The estimate is
always computed anew from the signals.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_validation import PARTS, read_reference
from scipy.stats import rankdata

import icm_cli
from icm_cli.geometry import alpha_to_u8
from icm_cli.images.reading import read_alpha, read_image
from icm_cli.matting import predictor as predictor_module
from icm_cli.matting.predictor import Predictor
from icm_cli.quality.estimate import estimate_quality

MIN_IOU = 0.8
"""Alphas with a lower IoU are wrong."""
SHOWN_MEAN = 0.01
"""Mean alpha above which something is shown."""
REVIEWED = 0.2
"""Fraction of the alphas that a person looks at."""
BINS = 10


@dataclass(frozen=True)
class Record:
    """Result of one image."""

    name: str
    part: str
    iou: float
    """IoU with the truth at 0.5."""
    mean: float
    """Mean alpha."""
    signals: dict[str, float]

    @property
    def is_wrong(self) -> bool:
        return self.mean > SHOWN_MEAN if self.part == "absent" else self.iou < MIN_IOU

    @property
    def true_quality(self) -> float:
        return float(not self.is_wrong) if self.part == "absent" else self.iou


def matte_image(
    predictor: Predictor, rgb: np.ndarray, reference: Any, truth: np.ndarray
) -> tuple[float, float, dict[str, float]]:
    """Return IoU, mean alpha and signals of an image; ``truth``: uint8 [H,W], 128 where it is unknown."""
    frame = predictor.prepare_frame(np.ascontiguousarray(rgb))
    (result,) = predictor.matte_frames([frame], reference)
    alpha = alpha_to_u8(predictor.alpha_at_source(frame, result))
    found, true = (alpha > 127) & (truth != 128), truth > 128
    iou = float((found & true).sum() / max(1, (found | true).sum()))
    return iou, float(alpha.mean()) / 255, dict(result.signals)


def read_records(path: Path | None) -> dict[str, Record]:
    if path is None or not path.exists():
        return {}
    records = [Record(**json.loads(line)) for line in path.read_text().splitlines()]
    return {record.name: record for record in records}


def append_record(path: Path | None, record: Record) -> None:
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")


def matte_groups(predictor: Predictor, root: Path, every: int, path: Path | None) -> Iterator[Record]:
    known = read_records(path)
    for part in PARTS:
        for group in sorted(each for each in (root / part).iterdir() if each.is_dir()):
            names = {f"{part}/{group.name}/{each.stem}": each for each in sorted((group / "src").iterdir())[::every]}
            reference = predictor.reference([read_reference(group)]) if names.keys() - known.keys() else None
            for name, source in names.items():
                if name not in known:
                    truth = np.where(read_alpha(group / "alpha" / f"{source.stem}.png") > 127, 255, 0)
                    result = matte_image(predictor, read_image(source).rgb, reference, truth)
                    known[name] = Record(name, part, *result)
                    append_record(path, known[name])
                yield known[name]


def auroc(values: np.ndarray, is_wrong: np.ndarray) -> float:
    """Return the probability that a wrong alpha has a lower value than one that is right."""
    right = ~is_wrong
    if not right.any() or not is_wrong.any():
        return float("nan")
    ranks = rankdata(values)
    return float((ranks[right].sum() - right.sum() * (right.sum() + 1) / 2) / (right.sum() * is_wrong.sum()))


def found_in_lowest(quality: np.ndarray, is_wrong: np.ndarray) -> float:
    """Return the fraction of the wrong alphas among those of the lowest quality, of those that fit there."""
    count = round(REVIEWED * len(quality))
    return float(is_wrong[np.argsort(quality, kind="stable")[:count]].sum() / max(1, min(count, is_wrong.sum())))


def calibration_error(quality: np.ndarray, true_quality: np.ndarray) -> float:
    bins = [each for each in np.array_split(np.argsort(quality, kind="stable"), BINS) if len(each)]
    differences = [abs(quality[each].mean() - true_quality[each].mean()) * len(each) for each in bins]
    return float(sum(differences) / len(quality))


def summarise(records: list[Record]) -> str:
    """Return the figures of the estimate and of every signal."""
    estimates = [estimate_quality(record.signals) for record in records]
    quality = np.array([estimate.quality for estimate in estimates])
    wrong, true = (np.array([getattr(each, name) for each in records]) for name in ("is_wrong", "true_quality"))
    lines = [f"{len(records)} alphas, {wrong.sum()} wrong", describe(quality, wrong, true)]
    for part in PARTS:
        chosen = np.array([record.part == part for record in records])
        if chosen.any():
            lines.append(
                f"  {part}: {wrong[chosen].sum()} wrong, {describe(quality[chosen], wrong[chosen], true[chosen])}"
            )
    lines.append("signal: AUROC in the direction of its influence, on the alphas that have it")
    for name in sorted({name for record in records for name in record.signals}):
        having = np.array([name in record.signals for record in records])
        values = np.array([record.signals[name] for record in records if name in record.signals])
        area = auroc(values, wrong[having])
        lines.append(
            f"  {name}: {max(area, 1 - area):.3f} ({'high' if area >= 0.5 else 'low'} is good, n={having.sum()})"
        )
    lines.append("reason: given to wrong alphas, to those that are right")
    for reason in sorted({reason for estimate in estimates for reason in estimate.reasons}):
        given = np.array([reason in estimate.reasons for estimate in estimates])
        lines.append(f"  {reason}: {given[wrong].sum()}, {given[~wrong].sum()}")
    reasons = np.array([bool(estimate.reasons) for estimate in estimates])
    lines.append(f"  any: {reasons[wrong].sum()}, {reasons[~wrong].sum()}")
    return "\n".join(lines)


def describe(quality: np.ndarray, is_wrong: np.ndarray, true_quality: np.ndarray) -> str:
    return (
        f"AUROC {auroc(quality, is_wrong):.3f}, lowest {REVIEWED:.0%} hold {found_in_lowest(quality, is_wrong):.0%} "
        f"of the wrong, calibration error {calibration_error(quality, true_quality):.3f}, "
        f"mean quality {quality.mean():.3f}, true {true_quality.mean():.3f}"
    )


class Stopwatch:
    """Sums the time of the calls of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._function(*args, **options)
        finally:
            self.seconds += time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--every", type=int, default=1, help="use every n-th image of a group")
    parser.add_argument("--records", type=Path, help="keep the results in this file, and use those that it has")
    arguments = parser.parse_args()
    predictor = icm_cli.load(arguments.model, checkpoint=arguments.checkpoint)
    measure = Stopwatch(predictor_module.measure_signals)
    matte = Stopwatch(predictor.matte_frames)
    predictor_module.measure_signals, predictor.matte_frames = measure, matte  # type: ignore[assignment, method-assign]
    records = list(matte_groups(predictor, arguments.root, arguments.every, arguments.records))
    print(summarise(records))
    start = time.perf_counter()
    for record in records:
        estimate_quality(record.signals)
    estimate = (time.perf_counter() - start) / len(records)
    if matte.seconds:
        print(
            f"time of the signals: {measure.seconds / (matte.seconds - measure.seconds):.2%} of the model's", end="; "
        )
    print(f"estimate: {estimate * 1e6:.0f} µs")


if __name__ == "__main__":
    sys.exit(main())
