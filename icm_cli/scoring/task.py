"""Score an alpha file against a ground truth file, by a rule: regions, size, variant, unknown pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.errors import ImageError, Problem
from icm_cli.geometry import UNKNOWN, ImageU8, format_size, has_same_aspect
from icm_cli.images.decoding import image_size
from icm_cli.images.reading import HAS_COLOUR, GroundTruthAlpha, file_digest, read_alpha, read_ground_truth
from icm_cli.options import MetricVariant, Region, ScoredSize
from icm_cli.reports.result import ImageEvaluation, ImageResult
from icm_cli.scoring.metrics import as_unit_range, compute_boundary_f, compute_dt_ssd, compute_jaccard, compute_scores

ImageT = TypeVar("ImageT", ImageU8, NDArray[np.float64])
LONG_SIDE_PX = 1024
SQUARE_PX = 768
DECIMALS = 6
"""Resized alphas in 0..1 are rounded to this many decimals, which are finer than 16 bits."""


@dataclass(frozen=True)
class ScoringRule:
    """The conventions that a score depends on. Every report states them."""

    regions: tuple[Region, ...] = ("whole",)
    scored_size: ScoredSize = "original"
    metric_variant: MetricVariant = "composition"
    trimap_kernel_px: int = 25
    """Side of the square that dilates 0 < alpha < 1 to the unknown region, if there is no published trimap."""
    has_detail_maps: bool = False
    """The published trimaps are detail maps: every pixel above 0 is unknown."""
    has_shots: bool = False
    """Score J and F, accept empty frames, and read palette files as label maps: indices above 0 are the object."""

    def as_protocol(self) -> dict[str, Any]:
        """Return the settings that reports compare."""
        return {"regions": list(self.regions), "size": self.scored_size, "metric_variant": self.metric_variant}


def resize_for_scoring(
    image: ImageT, truth_shape: tuple[int, ...], size: ScoredSize, interpolation: int = cv2.INTER_LINEAR
) -> ImageT:
    """Resize an alpha or trimap [h,w] to the size at which it is scored. Floats are not rounded to 8 bits.

    ``original`` is the size of the ground truth. ``long1024`` scales its long side to 1024 pixels. ``square768`` crops
    the centre square and scales it to 768 x 768 pixels, like the code of In-Context Matting. ``truth_shape``: height
    and width of the ground truth.
    """
    height, width = truth_shape
    if size == "square768":
        own_height, own_width = image.shape
        side = min(own_height, own_width)
        top, left = (own_height - side) // 2, (own_width - side) // 2
        image = image[top : top + side, left : left + side]
        height = width = SQUARE_PX
    elif size == "long1024":
        scale = LONG_SIDE_PX / max(truth_shape)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
    if image.shape == (height, width):
        return image
    resized = cv2.resize(image, (width, height), interpolation=interpolation)
    # The interpolation is not exact. Clipping keeps the value of a constant image, rounding that of a constant region.
    return cast(ImageT, resized.clip(image.min(), image.max()).round(DECIMALS))


def make_trimap(truth: ImageU8, kernel_px: int) -> ImageU8:
    """Generate a trimap, uint8 [H,W] of 0, 128 and 255, from a ground truth.

    Unknown are its values between 0 and 255, dilated by a square of ``kernel_px``.
    """
    is_soft = ((truth > 0) & (truth < 255)).astype(np.uint8)
    is_unknown = cv2.dilate(is_soft, np.ones((kernel_px, kernel_px), np.uint8)) > 0
    return np.where(is_unknown, UNKNOWN, truth).astype(np.uint8)


@dataclass(frozen=True)
class ScoreResult:
    """Result of a :class:`ScoreTask`. ``evaluation`` has no scores if the alpha could not be scored."""

    evaluation: ImageEvaluation = field(default_factory=ImageEvaluation)
    problems: tuple[Problem, ...] = ()
    image_sha256: str | None = None
    mean_alpha: float | None = None
    """Mean of the alpha at its own size, 0..1."""


@dataclass(frozen=True)
class ScoreTask:
    """An alpha to score. Of the image, only the size and, if requested, the digest are read."""

    name: str
    alpha_path: Path
    truth_path: Path
    rule: ScoringRule
    trimap_path: Path | None = None
    image_path: Path | None = None
    needs_sha256: bool = False
    is_external: bool = False
    """Whether another tool made the alpha. If so, its colour and value range are checked."""
    allowed: frozenset[str] = frozenset()
    """Kinds of problems that do not prevent scoring."""

    def run(self) -> ScoreResult:
        """Read the files and compute the scores. Problems with the files are part of the result."""
        digest = None
        try:
            if self.needs_sha256 and self.image_path:
                digest = file_digest(self.image_path)
            truth = read_ground_truth(self.truth_path, is_label_map=self.rule.has_shots)
            predicted = read_ground_truth(self.alpha_path, is_label_map=self.rule.has_shots)
            problems = self._check_truth(truth)
        except ImageError as error:
            return ScoreResult(problems=(Problem("unreadable", self.name, str(error)),), image_sha256=digest)
        if self.is_external:
            problems += self._check_values(self.alpha_path, predicted)
        can_be_scored = all(problem.kind == "16-bit-alpha" for problem in problems)
        alpha = predicted.alpha
        if can_be_scored and not has_same_aspect(alpha.shape, truth.alpha.shape):
            problems.append(self._size_mismatch("alpha", self.alpha_path, alpha.shape, truth.alpha.shape))
            can_be_scored = False
        if not can_be_scored:
            return ScoreResult(problems=tuple(problems), image_sha256=digest)
        evaluation, trimap_problems = self._score(alpha, truth.alpha)
        mean_alpha = round(float(alpha.mean()) / 255.0, 6)
        return ScoreResult(evaluation, (*problems, *trimap_problems), digest, mean_alpha)

    def _score(self, alpha: ImageU8, truth: ImageU8) -> tuple[ImageEvaluation, list[Problem]]:
        """Return the scores of an alpha at the scored size, and the problems of the trimap."""
        trimap, problems = self._load_trimap(truth)
        resized_truth = resize_for_scoring(as_unit_range(truth), truth.shape, self.rule.scored_size)
        resized_alpha = resize_for_scoring(as_unit_range(alpha), truth.shape, self.rule.scored_size)
        scores = compute_scores(resized_alpha, resized_truth, self.rule.metric_variant, trimap)
        if trimap is not None and "unknown" not in scores:
            reason = f"ground truth {self.truth_path} has only the values 0 and 255, so no pixel is unknown"
            if self.trimap_path:
                reason = f"trimap {self.trimap_path} has no unknown pixel; expected some pixels of value 128"
            problems.append(Problem("no-unknown", self.name, reason))
        evaluation = ImageEvaluation(
            {region: scores[region] for region in self.rule.regions if region in scores},
            jaccard=compute_jaccard(resized_alpha, resized_truth) if self.rule.has_shots else None,
            boundary_f=compute_boundary_f(resized_alpha, resized_truth) if self.rule.has_shots else None,
            was_resized=alpha.shape != truth.shape,
        )
        return evaluation, problems

    def _check_truth(self, truth: GroundTruthAlpha) -> list[Problem]:
        """Return the problems of the ground truth. All of them except 16-bit values prevent scoring."""
        problems = []
        if self.image_path is not None and (size := image_size(self.image_path)) != truth.alpha.shape:
            problems.append(self._size_mismatch("ground truth", self.truth_path, truth.alpha.shape, size))
        problems += self._check_values(self.truth_path, truth)
        if not (truth.alpha.any() or self.rule.has_shots or "empty-alpha" in self.allowed):
            reason = f"ground truth {self.truth_path} has no foreground; give --allow empty-alpha to score it anyway"
            problems.append(Problem("empty-alpha", self.name, reason))
        if truth.has_16_bits and "16-bit-alpha" not in self.allowed:
            reason = f"ground truth {self.truth_path} has 16 bits; it is rounded to 8 bits before scoring"
            problems.append(Problem("16-bit-alpha", self.name, reason))
        return problems

    def _check_values(self, path: Path, alpha: GroundTruthAlpha) -> list[Problem]:
        """Return at most one problem: the alpha has colour, or the values 0 and 1 instead of 0 and 255."""
        if alpha.has_colour:
            reason = f"{path} {HAS_COLOUR}"
            return [Problem("colour-alpha", self.name, reason)]
        if alpha.alpha.max() == 1 and "unscaled-alpha" not in self.allowed:
            reason = f"the largest value of {path} is 1; expected values of 0..255, so scale the alpha"
            return [Problem("unscaled-alpha", self.name, reason)]
        return []

    def _size_mismatch(self, kind: str, path: Path, size: tuple[int, ...], expected: tuple[int, ...]) -> Problem:
        ratio = ", or the same aspect ratio" if kind == "alpha" else ""
        expectation = f"expected {format_size(expected)}, the size of its image{ratio}"
        reason = f"{kind} {path} is {format_size(size)}; {expectation}; replace it by a file of this size"
        return Problem("size-mismatch", self.name, reason)

    def _load_trimap(self, truth: ImageU8) -> tuple[ImageU8 | None, list[Problem]]:
        """Return the trimap at the scored size and its problems; no trimap if no scored region needs it."""
        if "unknown" not in self.rule.regions:
            return None, []
        shape, size = truth.shape, self.rule.scored_size
        if self.trimap_path is None:
            scored_truth = resize_for_scoring(truth, shape, size)
            return make_trimap(scored_truth, self.rule.trimap_kernel_px), []
        try:
            trimap = read_alpha(self.trimap_path)
        except ImageError as error:
            return None, [Problem("unreadable", self.name, str(error))]
        if trimap.shape != shape:
            return None, [self._size_mismatch("trimap", self.trimap_path, trimap.shape, shape)]
        if self.rule.has_detail_maps:
            trimap = np.where(trimap > 0, UNKNOWN, 0).astype(np.uint8)
        elif not np.isin(trimap, (0, UNKNOWN, 255)).all():
            reason = (
                f"trimap {self.trimap_path} has values that are not 0, 128 or 255; expected 0 for background, "
                "128 for unknown and 255 for foreground"
            )
            return None, [Problem("bad-trimap", self.name, reason)]
        return resize_for_scoring(trimap, shape, size, cv2.INTER_NEAREST), []


class FrameFiles(NamedTuple):
    """Paths of the alpha of a frame and of its ground truth."""

    alpha: Path
    truth: Path

    @classmethod
    def of_result(cls, result: ImageResult) -> FrameFiles:
        """Return the files of a result of an evaluation."""
        return cls(Path(result.output), Path(result.truth))


@dataclass(frozen=True)
class FlickerTask:
    """Compute dtSSD between a frame and the frame before it."""

    frame: FrameFiles
    previous_frame: FrameFiles
    rule: ScoringRule

    def run(self) -> float | None:
        """Return dtSSD, or None if a file cannot be read."""
        # The palette files of datasets with shots are label maps.
        read = partial(read_alpha, is_label_map=self.rule.has_shots)
        try:
            alpha, truth = read(self.frame.alpha), read(self.frame.truth)
            alpha_before, truth_before = read(self.previous_frame.alpha), read(self.previous_frame.truth)
        except ImageError:
            return None

        def resize(image: ImageU8) -> NDArray[np.float64]:
            return resize_for_scoring(as_unit_range(image), truth.shape, self.rule.scored_size)

        return compute_dt_ssd(resize(alpha), resize(alpha_before), resize(truth), resize(truth_before))
