"""Score alpha files against ground truth files, in processes beside the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from icm_cli.errors import ImageError, Problem
from icm_cli.geometry import UNKNOWN, ImageU8, has_same_aspect
from icm_cli.images.decoding import image_size
from icm_cli.images.reading import GroundTruthAlpha, content_sha256, read_alpha, read_ground_truth
from icm_cli.reports.scores import Region, Scores
from icm_cli.scoring.metrics import dt_ssd, score
from icm_cli.scoring.overlap import boundary_accuracy, region_similarity
from icm_cli.scoring.rule import Rule, scored_size, trimap_of


@dataclass(frozen=True)
class Scored:
    """Result of one :class:`ScoreTask`; ``scores`` is empty where the alpha could not be scored."""

    scores: dict[Region, Scores] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    was_resized: bool = False
    """The alpha was not of the ground truth's size and was brought to it bilinearly."""
    image_sha256: str | None = None
    foreground: float | None = None
    """Share of foreground: the mean of the alpha at its own size, 0..1."""
    jaccard: float | None = None
    boundary_f: float | None = None


@dataclass(frozen=True)
class ScoreTask:
    """One alpha to score. ``image`` is only looked at for its size and, if wanted, its content."""

    name: str
    alpha: Path
    truth: Path
    rule: Rule
    trimap: Path | None = None
    image: Path | None = None
    wants_sha256: bool = False
    is_foreign: bool = False
    """The alpha is of another tool, so its file may be odd; icm's own may hold nothing but a 1 of 255."""
    allowed: frozenset[str] = frozenset()
    """Kinds of problems under which the alpha is scored all the same."""

    def run(self) -> Scored:
        """Read the files and score; what is wrong with them comes back as problems."""
        digest = None
        try:
            if self.wants_sha256 and self.image:
                digest = content_sha256(self.image)
            truth = read_ground_truth(self.truth, has_objects=self.rule.is_shots)
            predicted = read_ground_truth(self.alpha, has_objects=self.rule.is_shots)
            problems = self._oddities(truth) + (self._unusable(self.alpha, predicted) if self.is_foreign else [])
            if any(each.kind != "16-bit-alpha" for each in problems):
                return Scored(problems=tuple(problems), image_sha256=digest)
            alpha = predicted.alpha
        except ImageError as error:
            return Scored(problems=(Problem("unreadable", self.name, str(error)),), image_sha256=digest)
        if not has_same_aspect(alpha.shape, truth.alpha.shape):
            problems.append(self._mismatch("alpha", self.alpha, alpha.shape, truth.alpha.shape))
            return Scored(problems=tuple(problems), image_sha256=digest)
        at_size = scored_size(truth.alpha, truth.alpha.shape, self.rule.size)
        trimap, more = self._trimap(at_size, truth.alpha.shape)
        scored = scored_size(alpha, truth.alpha.shape, self.rule.size)
        scores = score(scored, at_size, self.rule.lineage, trimap)
        if trimap is not None and "unknown" not in scores:
            more.append(Problem("no-unknown", self.name, f"{self.trimap or self.truth} leaves no unknown pixel (128)"))
        return Scored(
            {region: scores[region] for region in self.rule.regions if region in scores},
            (*problems, *more),
            was_resized=alpha.shape != truth.alpha.shape,
            image_sha256=digest,
            foreground=round(float(alpha.mean()) / 255.0, 6),
            jaccard=region_similarity(scored, at_size) if self.rule.is_shots else None,
            boundary_f=boundary_accuracy(scored, at_size) if self.rule.is_shots else None,
        )

    def _oddities(self, truth: GroundTruthAlpha) -> list[Problem]:
        """Find what is odd about the ground truth; all but 16 bits, and what is allowed, keeps it from being scored."""
        found = []
        if self.image is not None and (size := image_size(self.image)) != truth.alpha.shape:
            found.append(self._mismatch("ground truth", self.truth, truth.alpha.shape, size))
        found += self._unusable(self.truth, truth)
        if not (truth.alpha.any() or self.rule.is_shots or "empty-alpha" in self.allowed):
            found.append(
                Problem("empty-alpha", self.name, f"{self.truth} is empty; --allow empty-alpha scores against it")
            )
        if truth.is_deep and "16-bit-alpha" not in self.allowed:
            found.append(Problem("16-bit-alpha", self.name, f"{self.truth} has 16 bits; it is scored at 8"))
        return found

    def _unusable(self, path: Path, alpha: GroundTruthAlpha) -> list[Problem]:
        if alpha.has_colour:
            reason = f"{path} has colour; expected one grey channel as the alpha"
            return [Problem("colour-alpha", self.name, reason)]
        if alpha.alpha.max() == 1 and "unscaled-alpha" not in self.allowed:
            return [Problem("unscaled-alpha", self.name, f"the largest value of {path} is 1; scale it to 0..255")]
        return []

    def _mismatch(self, what: str, path: Path, size: tuple[int, ...], expected: tuple[int, ...]) -> Problem:
        reason = f"{what} {path} is {size[1]}x{size[0]}; expected {expected[1]}x{expected[0]}"
        return Problem("size-mismatch", self.name, reason)

    def _trimap(self, truth: ImageU8, source: tuple[int, ...]) -> tuple[ImageU8 | None, list[Problem]]:
        """The trimap at the scored size, where a region wants one; ``truth`` is at that size already."""
        if "unknown" not in self.rule.regions:
            return None, []
        if self.trimap is None:
            return trimap_of(truth, self.rule.trimap_kernel_px), []
        try:
            trimap = read_alpha(self.trimap)
        except ImageError as error:
            return None, [Problem("unreadable", self.name, str(error))]
        if trimap.shape != source:
            return None, [self._mismatch("trimap", self.trimap, trimap.shape, source)]
        if self.rule.has_detail_maps:
            trimap = np.where(trimap > 0, UNKNOWN, 0).astype(np.uint8)
        elif not np.isin(trimap, (0, UNKNOWN, 255)).all():
            reason = f"{self.trimap} has other values than 0, 128 and 255, so it is no trimap"
            return None, [Problem("bad-trimap", self.name, reason)]
        return scored_size(trimap, source, self.rule.size, cv2.INTER_NEAREST), []


@dataclass(frozen=True)
class FlickerTask:
    """dtSSD of a frame to the one before it; both (alpha, ground truth). None where they cannot be compared."""

    frame: tuple[Path, Path]
    before: tuple[Path, Path]
    rule: Rule

    def run(self) -> float | None:
        try:
            shape = self._read(self.frame[1]).shape
            alpha, truth, alpha_before, truth_before = (
                scored_size(self._read(path), shape, self.rule.size) for path in (*self.frame, *self.before)
            )
        except ImageError:
            return None
        return dt_ssd(alpha, alpha_before, truth, truth_before)

    def _read(self, path: Path) -> ImageU8:
        return read_alpha(path, has_objects=self.rule.is_shots)
