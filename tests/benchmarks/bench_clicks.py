"""Quality of alphas that simulated clicks correct, by the standard protocol of interactive segmentation.

    python tests/benchmarks/bench_clicks.py ../shared/data/validation --edges ../shared/data/edges/ecssd

The next click is at the centre of the largest connected error, see
icm_cli/training/stages/clicks.py. Errors and IoU (at 0.5) are those of the object decoder's alpha,
before its edges are refined. The first folder has the layout of bench_validation.py; its images are
corrected from the model's alpha, and selected by clicks alone. Those of ``--edges`` (NAME.png masks
next to NAME.webp or NAME.jpg) are selected by clicks alone. The composites of the tests, which are
made of photographs of scikit-image, are both. NoC is the mean number of clicks until an IoU is
reached, at most ``--clicks``.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
import timeit
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

import icm_cli
from icm_cli.images.reading import read_alpha, read_image
from icm_cli.matting.crops import CropBox
from icm_cli.matting.hinting import make_prompts
from icm_cli.matting.predictor import Predictor
from icm_cli.matting.prompting import ImageEmbedder, complete_by_prompts, select_by_prompts
from icm_cli.model.checkpoint import read_checkpoint
from icm_cli.model.contracts import EmbeddedImage, Objects
from icm_cli.training.stages.clicks import Click, click_on_largest_error

TRUTH_PX = 512
"""Long side of the masks on which errors are searched."""
COMPOSITES = Path(__file__).parents[1] / "composites"
MEGAPIXEL = (864, 1152)
DEMO = Path(__file__).parents[1] / "demo"


@dataclass(frozen=True)
class Case:
    """An image of a size (height, width) with its object, bool [h,w], and the model's coarse alphas, None without a
    reference."""

    name: str
    part: str
    embedder: ImageEmbedder
    size: tuple[int, int]
    truth: np.ndarray
    coarse: Tensor | None
    coarse_if_present: Tensor | None

    @property
    def image(self) -> EmbeddedImage:
        return self.embedder.image


@dataclass(frozen=True)
class Trial:
    """IoU of a case without clicks (0 without a coarse alpha), and after each click."""

    case: Case
    ious: Sequence[float]
    error: float
    """Mean squared error without clicks."""
    labels: Sequence[int]
    """Labels of the clicks."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--edges", type=Path, help="folder of images and masks without references")
    parser.add_argument("--edges-count", type=int, default=60, help="number of these images")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--objects", type=Path, help="take the decoder of the objects from this checkpoint")
    parser.add_argument("--every", type=int, default=1, help="use every n-th image")
    parser.add_argument("--clicks", type=int, default=5)
    parser.add_argument("--cache", type=Path, help="folder for embeddings and coarse alphas, which are kept")
    parser.add_argument("--list", action="store_true", help="print the IoU of every image")
    arguments = parser.parse_args()
    predictor = icm_cli.load(checkpoint=arguments.checkpoint)
    objects = predictor.model.objects
    assert objects is not None
    cache = Cache(arguments.cache, predictor)
    if arguments.objects is not None:
        load_decoder(objects, arguments.objects)
    cases = list(read_groups(arguments.root, predictor, cache, arguments.every))
    composites = list(read_group("composites", COMPOSITES, "imgs", "alphas", predictor, cache))
    corrected = [correct_case(objects, case, arguments.clicks) for case in cases]
    print_corrections(corrected)
    print_ious("composites", [correct_case(objects, case, arguments.clicks) for case in composites])
    alone = {"images of the groups": [case for case in cases if case.part == "plain"], "composites": composites}
    if arguments.edges is not None:
        alone["images of --edges"] = list(read_edges(arguments.edges, objects, cache, arguments.edges_count))
    for title, each in alone.items():
        selected = [select_case(objects, case, arguments.clicks) for case in each]
        print_ious(f"no coarse alpha, {title}", selected)
        corrected += selected
    if arguments.list:
        for trial in corrected:
            print(trial.case.part, trial.case.name, " ".join(f"{iou:.3f}" for iou in trial.ious))
    decoder_seconds, edge_seconds = measure_seconds(predictor)
    print(f"one click at 1 megapixel: {decoder_seconds:.3f} s, with edges {edge_seconds:.2f} s")


class Cache:
    """Embeddings and coarse alphas of images, on the disk if there is a folder for them."""

    def __init__(self, folder: Path | None, predictor: Predictor) -> None:
        self._folder = folder
        digest = hashlib.sha256()
        for name, tensor in predictor.model.state_dict().items():
            if not name.startswith(("edges.", "objects.coarse_decoder.", "objects.prompt_decoder.")):
                digest.update(tensor.detach().contiguous().float().numpy().tobytes())
        self._digest = digest.hexdigest()[:16]

    def load(self, source: Path) -> tuple[EmbeddedImage, Tensor | None, Tensor | None] | None:
        """Return the embedding and the coarse alphas of an image; None if they are not stored."""
        path = self._path(source)
        if path is None or not path.exists():
            return None
        embedding, size, coarse, coarse_if_present = torch.load(path, weights_only=True)
        return EmbeddedImage(embedding.float(), tuple(size)), coarse, coarse_if_present

    def store(self, source: Path, image: EmbeddedImage, coarse: Tensor | None, if_present: Tensor | None) -> None:
        path = self._path(source)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save((image.embedding.half(), list(image.mask_size), coarse, if_present), path)

    def _path(self, source: Path) -> Path | None:
        name = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:16]
        return None if self._folder is None else self._folder / self._digest / f"{name}.pt"


class CachedEmbedder(ImageEmbedder):
    """Embeddings of an image, which is given, and of its crops, from a cache."""

    def __init__(self, objects: Objects, source: Path, image: EmbeddedImage, cache: Cache) -> None:
        self.objects, self._source, self._cache = objects, source, cache
        self.image = image

    def has_crop(self, box: CropBox) -> bool:  # noqa: ARG002
        return True

    def crop(self, box: CropBox) -> EmbeddedImage:
        key = Path(f"{self._source} {box}")
        stored = self._cache.load(key)
        if stored is not None:
            return stored[0]
        (image,) = self.objects.embed_images([box.crop(read_image(self._source).rgb)])
        self._cache.store(key, image, None, None)
        return image


def load_decoder(objects: Objects, checkpoint: Path) -> None:
    """Replace the decoder of the objects, and the weights of its masks."""
    stored = read_checkpoint(checkpoint).component("objects")
    decoder = {name: tensor for name, tensor in stored.items() if not name.startswith("encoder.")}
    expected = {name for name in objects.state_dict() if not name.startswith("encoder.")}
    assert set(decoder) == expected, f"{checkpoint} has another decoder"
    objects.load_state_dict(decoder, strict=False)


def read_groups(root: Path, predictor: Predictor, cache: Cache, every: int) -> Iterator[Case]:
    """Yield every n-th image of the parts "plain" and "distractor"."""
    number = 0
    for part in ("plain", "distractor"):
        for group in sorted(path for path in (root / part).glob("*") if path.is_dir()):
            count = len(list((group / "src").iterdir()))
            chosen = {index for index in range(count) if not (number + index + 1) % every}
            number += count
            yield from read_group(part, group, "src", "alpha", predictor, cache, chosen)


def read_group(
    part: str,
    group: Path,
    images: str,
    alphas: str,
    predictor: Predictor,
    cache: Cache,
    chosen: Container[int] = range(sys.maxsize),
) -> Iterator[Case]:
    """Yield images of a group, with the coarse alphas that the model predicts by its reference."""
    reference, objects = None, predictor.model.objects
    assert objects is not None
    for number, source in enumerate(sorted((group / images).iterdir())):
        if number not in chosen:
            continue
        stored = cache.load(source)
        if stored is None:
            if reference is None:
                guide = next(group.glob("ref.*"))
                reference = predictor.reference([(read_image(guide).rgb, read_alpha(group / "mask.png"))])
            frame = predictor.prepare_frame(read_image(source).rgb)
            (found,) = predictor.coarse_alphas([frame], reference)
            (image,) = objects.embed_images([frame.rgb])
            stored = image, found.alpha, found.alpha_if_present
            cache.store(source, *stored)
        truth = read_alpha(group / alphas / f"{source.stem}.png")
        embedder = CachedEmbedder(objects, source, stored[0], cache)
        yield Case(f"{group.name}/{source.stem}", part, embedder, truth.shape, shrink_mask(truth), *stored[1:])


def read_edges(root: Path, objects: Objects, cache: Cache, count: int) -> Iterator[Case]:
    """Yield ``count`` images of a folder, evenly spread."""
    masks = sorted(root.glob("*.png"))
    for mask in masks[:: max(1, len(masks) // count)][:count]:
        source = next(path for path in root.glob(f"{mask.stem}.*") if path.suffix != ".png")
        stored = cache.load(source)
        if stored is None:
            (image,) = objects.embed_images([read_image(source).rgb])
            stored = image, None, None
            cache.store(source, *stored)
        embedder = CachedEmbedder(objects, source, stored[0], cache)
        truth = read_alpha(mask)
        yield Case(mask.stem, "edges", embedder, truth.shape, shrink_mask(truth), None, None)


def shrink_mask(alpha: np.ndarray) -> np.ndarray:
    scale = min(1.0, TRUTH_PX / max(alpha.shape))
    size = (max(1, round(alpha.shape[1] * scale)), max(1, round(alpha.shape[0] * scale)))
    return np.asarray(cv2.resize(alpha, size, interpolation=cv2.INTER_AREA) > 128)  # 128 is void


def correct_case(objects: Objects, case: Case, count: int) -> Trial:
    """Correct the completed alpha of a case."""
    assert case.coarse is not None
    alpha = case.coarse
    if objects.has_object(alpha):
        (alpha,) = objects.complete_embedded_alphas([case.image], [alpha])
    found = enlarge_alpha(alpha, case.truth)
    error = float(((found - case.truth) ** 2).mean())
    ious, labels = click_through(objects, case, case.coarse_if_present, case.coarse, found, count)
    return Trial(case, ious, error, labels)


def select_case(objects: Objects, case: Case, count: int) -> Trial:
    """Select the object of a case by clicks, without a coarse alpha."""
    nothing = np.zeros(case.truth.shape, np.float32)
    ious, labels = click_through(objects, case, None, None, nothing, count)
    return Trial(case, ious, 0.0, labels)


def click_through(
    objects: Objects, case: Case, if_present: Tensor | None, coarse: Tensor | None, found: np.ndarray, count: int
) -> tuple[list[float], list[int]]:
    """Return the IoU before the first click and after each one, and the labels of the clicks."""
    clicks: list[Click] = []
    ious = [overlap(found, case.truth)]
    for _ in range(count):
        click = click_on_largest_error(found > 0.5, case.truth)
        if click is not None:  # otherwise the alpha is perfect and stays so
            clicks.append(click)
            scale = case.size[0] / case.truth.shape[0], case.size[1] / case.truth.shape[1]
            on, off = (
                [
                    ((each.column + 0.5) * scale[1], (each.row + 0.5) * scale[0])
                    for each in clicks
                    if each.label == label
                ]
                for label in (1, 0)
            )
            hints = icm_cli.Hints(size=case.size, points=on, not_points=off)
            start = if_present if if_present is not None and on else coarse
            if start is None:
                alpha = select_by_prompts(objects, case.image, hints)
            else:
                alpha = complete_by_prompts(case.embedder, start, hints, make_prompts(hints))
            found = enlarge_alpha(alpha, case.truth)
        ious.append(overlap(found, case.truth))
    return ious, [click.label for click in clicks]


def enlarge_alpha(alpha: Tensor, truth: np.ndarray) -> np.ndarray:
    size = (truth.shape[1], truth.shape[0])
    return np.asarray(cv2.resize(alpha.numpy(), size, interpolation=cv2.INTER_LINEAR))


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    mask = found > 0.5
    return float((mask & truth).sum() / max(1, (mask | truth).sum()))


def print_corrections(trials: Sequence[Trial]) -> None:
    for part in ("plain", "distractor"):
        of_part = [trial for trial in trials if trial.case.part == part]
        if of_part:
            iou, error = (float(np.mean([each(trial) for trial in of_part])) for each in (first_iou, trial_error))
            print(f"without clicks, {part}: n={len(of_part)} IoU {iou:.4f} MSE {error:.5f}")
    wrong = [trial for trial in trials if trial.ious[0] < 0.9]
    right = [trial for trial in trials if trial.ious[0] >= 0.9]
    for title, each in (("below .90", wrong), ("at .90 or more", right)):
        print_ious(f"{title} without clicks", each)
        print_ious(f"{title}, first click off the object", [trial for trial in each if trial.labels[:1] == [0]])
    changes = np.array([trial.ious[1] - trial.ious[0] for trial in right])
    if len(changes):
        harmed = (changes < -0.02).mean()
        change = f"mean change {changes.mean():+.4f}, worst {changes.min():+.3f}, {harmed:.0%} lose .02"
        print(f"at .90 or more, first click: {change}")


def first_iou(trial: Trial) -> float:
    return trial.ious[0]


def trial_error(trial: Trial) -> float:
    return trial.error


def print_ious(title: str, trials: Sequence[Trial]) -> None:
    if not trials:
        return
    ious = np.array([trial.ious for trial in trials])
    print(f"{title}: n={len(trials)}")
    print(f"  IoU after 0 to {ious.shape[1] - 1} clicks: {' '.join(f'{iou:.3f}' for iou in ious.mean(axis=0))}")
    print(f"  at .90 or more: {' '.join(f'{share:.2f}' for share in (ious >= 0.9).mean(axis=0))}")
    for goal in (0.90, 0.95):
        reached = ious >= goal
        clicks = np.where(reached.any(axis=1), reached.argmax(axis=1), ious.shape[1] - 1)
        print(f"  NoC@{100 * goal:.0f} {clicks.mean():.2f}, not reached by {(~reached.any(axis=1)).mean():.0%}")


def measure_seconds(predictor: Predictor) -> tuple[float, float]:
    """Return the time from a click to ``session.coarse`` and to ``session.matte``, on a photograph of one megapixel."""
    rgb = cv2.resize(cv2.imread(str(DEMO / "imgs" / "01.jpg"))[..., ::-1], MEGAPIXEL[::-1])
    reference = cv2.imread(str(DEMO / "ref.jpg"))[..., ::-1], cv2.imread(str(DEMO / "mask.png"), 0)
    session = predictor.session(rgb, predictor.reference(reference))
    hints = icm_cli.Hints(size=MEGAPIXEL, points=[(576.0, 432.0)])
    coarse, refined = (
        min(timeit.repeat(functools.partial(answer, hints), number=1)) for answer in (session.coarse, session.matte)
    )
    return coarse, refined


if __name__ == "__main__":
    sys.exit(main())
