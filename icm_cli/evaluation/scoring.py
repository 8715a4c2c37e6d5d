"""Score alpha files against ground truth files, in processes beside the model."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import cv2
import numpy as np

from icm_cli.datasets import Size
from icm_cli.datasets.samples import Problem
from icm_cli.errors import ImageError
from icm_cli.evaluation.metrics import UNKNOWN, Lineage, Region, Scores, dt_ssd, score
from icm_cli.geometry import ImageU8
from icm_cli.images import TrueAlpha, content_sha256, image_size, read_matte, read_true_alpha
from icm_cli.references import ASPECT_TOLERANCE

LONG_SIDE_PX = 1024
SQUARE_PX = 768


@dataclass(frozen=True)
class Rule:
    """The conventions that a score depends on; every report states them."""

    regions: tuple[Region, ...] = ("whole",)
    size: Size = "original"
    lineage: Lineage = "composition"
    trimap_kernel_px: int = 25
    """Where no trimap is published, unknown is 0 < alpha < 1 dilated by a square of this side, at the scored size."""
    has_detail_maps: bool = False
    """Trimaps are detail maps: every pixel above 0 is unknown."""

    def as_protocol(self) -> dict[str, Any]:
        """What every report states of it."""
        return {"regions": list(self.regions), "size": self.size, "lineage": self.lineage}


@dataclass(frozen=True)
class Scored:
    """What became of one :class:`ScoreTask`; ``scores`` is empty where the alpha could not be scored."""

    scores: dict[Region, Scores] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    was_resized: bool = False
    """The alpha was not of the ground truth's size and was brought to it bilinearly."""
    image_sha256: str | None = None
    foreground: float | None = None
    """Share of foreground: the mean of the alpha at its own size, 0..1."""


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
            truth, predicted = read_true_alpha(self.truth), read_true_alpha(self.alpha)
            problems = self._oddities(truth) + (self._unusable(self.alpha, predicted) if self.is_foreign else [])
            if any(each.kind != "16-bit-alpha" for each in problems):
                return Scored(problems=tuple(problems), image_sha256=digest)
            alpha = predicted.alpha
        except ImageError as error:
            return Scored(problems=(Problem("unreadable", self.name, str(error)),), image_sha256=digest)
        if not _same_shape(alpha.shape, truth.alpha.shape):
            problems.append(self._mismatch("alpha", self.alpha, alpha.shape, truth.alpha.shape))
            return Scored(problems=tuple(problems), image_sha256=digest)
        at_size = scored_size(truth.alpha, truth.alpha.shape, self.rule.size)
        trimap, more = self._trimap(at_size, truth.alpha.shape)
        scores = score(scored_size(alpha, truth.alpha.shape, self.rule.size), at_size, self.rule.lineage, trimap)
        if trimap is not None and "unknown" not in scores:
            more.append(Problem("no-unknown", self.name, f"{self.trimap or self.truth} leaves no unknown pixel (128)"))
        return Scored(
            {region: scores[region] for region in self.rule.regions if region in scores},
            (*problems, *more),
            was_resized=alpha.shape != truth.alpha.shape,
            image_sha256=digest,
            foreground=round(float(alpha.mean()) / 255.0, 6),
        )

    def _oddities(self, truth: TrueAlpha) -> list[Problem]:
        """What is odd about the ground truth; all but 16 bits, and what is allowed, keeps it from being scored."""
        found = []
        if self.image is not None and (size := image_size(self.image)) != truth.alpha.shape:
            found.append(self._mismatch("ground truth", self.truth, truth.alpha.shape, size))
        found += self._unusable(self.truth, truth)
        if not truth.alpha.any() and "empty-alpha" not in self.allowed:
            found.append(
                Problem("empty-alpha", self.name, f"{self.truth} is empty; --allow empty-alpha scores against it")
            )
        if truth.is_deep and "16-bit-alpha" not in self.allowed:
            found.append(Problem("16-bit-alpha", self.name, f"{self.truth} has 16 bits; it is scored at 8"))
        return found

    def _unusable(self, path: Path, alpha: TrueAlpha) -> list[Problem]:
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
            trimap = read_matte(self.trimap)
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
    size: Size

    def run(self) -> float | None:
        try:
            shape = read_true_alpha(self.frame[1]).alpha.shape
            alpha, truth, alpha_before, truth_before = (
                scored_size(read_matte(path), shape, self.size) for path in (*self.frame, *self.before)
            )
        except ImageError:
            return None
        return dt_ssd(alpha, alpha_before, truth, truth_before)


def scored_size(
    image: ImageU8, truth_shape: tuple[int, ...], size: Size, interpolation: int = cv2.INTER_LINEAR
) -> ImageU8:
    """Bring an alpha or trimap, uint8 [h,w], to the size at which it is scored.

    ``original`` is the ground truth's own size; ``long1024`` makes its long side 1024; ``square768`` takes the centre
    square and makes it 768 x 768 (the code of In-Context Matting). Bilinear, trimaps by nearest neighbour.
    """
    height, width = truth_shape
    if size == "square768":
        side = min(image.shape)
        top, left = ((length - side) // 2 for length in image.shape)
        image = image[top : top + side, left : left + side]
        height = width = SQUARE_PX
    elif size == "long1024":
        scale = LONG_SIDE_PX / max(truth_shape)
        height, width = (max(1, round(length * scale)) for length in truth_shape)
    if image.shape == (height, width):
        return image
    return np.asarray(cv2.resize(image, (width, height), interpolation=interpolation), np.uint8)


def trimap_of(truth: ImageU8, kernel_px: int) -> ImageU8:
    """A trimap, uint8 [H,W] in 0, 128, 255, whose unknown is 0 < alpha < 1 dilated by a square kernel."""
    soft = ((truth > 0) & (truth < 255)).astype(np.uint8)
    unknown = cv2.dilate(soft, np.ones((kernel_px, kernel_px), np.uint8)) > 0
    return np.where(unknown, UNKNOWN, truth).astype(np.uint8)


def _same_shape(size: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether one is the other scaled, but for rounding."""
    ratio = (size[1] / size[0]) / (expected[1] / expected[0])
    return abs(ratio - 1) <= ASPECT_TOLERANCE


Answer = TypeVar("Answer", covariant=True)


class Task(Protocol[Answer]):
    """What a process can run: an object that can be pickled."""

    def run(self) -> Answer: ...


class ScoringPool:
    """Runs tasks in processes; what to do with an answer is done in the thread that submits.

    The standard process pools import the caller's ``__main__`` again (a script without the usual guard would run
    twice), and one dead worker breaks all of them; these processes do neither, and end when this one does.
    """

    def __init__(self, processes: int) -> None:
        self._threads = ThreadPoolExecutor(processes, "icm-score")
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(None)
        self._running: deque[tuple[Future[Any], Callable[[Any], None]]] = deque()
        self._most = 4 * processes

    def submit(self, task: Task[Any], then: Callable[[Any], None]) -> None:
        """Queue a task; waits while too many are in hand, so that memory stays flat.

        ``then`` gets the answer, or DIED; an interrupt may make it get one twice.
        """
        self._running.append((self._threads.submit(self._run, task), then))
        self._settle(self._most)

    def drain(self) -> None:
        """Wait for every task."""
        self._settle(0)

    def close(self) -> None:
        """End the processes; tasks that were not drained are lost."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            if process := self._idle.get_nowait():
                process.close()

    def _settle(self, at_most: int) -> None:
        while self._running and (len(self._running) > at_most or self._running[0][0].done()):
            future, then = self._running[0]
            then(future.result())
            self._running.popleft()  # last, so that an interrupt loses none

    def _run(self, task: Task[Any]) -> Any:
        process = self._idle.get()
        try:
            process = process or _Process()
            return process.run(task)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            if process:
                process.close()
            process = None  # the next task starts another
            return DIED
        finally:
            self._idle.put(process)


DIED = object()
"""The answer of a process that was killed, perhaps by a lack of memory."""


class _Process:
    """One process that runs tasks as they come, one at a time."""

    def __init__(self) -> None:
        package_home = str(Path(__file__).resolve().parents[2])
        paths = [package_home, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "icm_cli.evaluation.scoring_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def run(self, task: Task[Answer]) -> Answer:
        assert self._popen.stdin
        assert self._popen.stdout
        pickle.dump(task, self._popen.stdin)
        self._popen.stdin.flush()
        answer: Answer = pickle.load(self._popen.stdout)  # noqa: S301  our own process wrote it
        return answer

    def close(self) -> None:
        self._popen.kill()
        self._popen.communicate()
