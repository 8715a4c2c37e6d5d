"""The streaming engine: reader threads decode ahead, the model takes batches, writer threads encode.

Every queue is bounded, so memory does not grow with the number of images, and the model waits for the disk only
where reading is slower than matting.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from icm_cli.device import is_device_lost, is_out_of_memory, release_memory
from icm_cli.errors import DeviceError, ImageError, OutputError, UsageError
from icm_cli.geometry import Float, ImageU8, alpha_to_u8
from icm_cli.images.pixels import DecodedImage, ImageWindows
from icm_cli.images.writing import DEFAULT_OUTPUT, OutputFormat, write_alpha, write_foreground, write_trimap
from icm_cli.matting.foreground import foreground_colours, trimap_of_alpha
from icm_cli.matting.jobs import Job
from icm_cli.matting.near import NearBy
from icm_cli.matting.predictor import CanvasMatte, Frame, Predictor
from icm_cli.matting.resume import Origin, OtherSourceError, finished, stamp
from icm_cli.matting.shot import CARRIED_KEY, Carrier, Shot, encoded
from icm_cli.matting.sources import MAX_LISTED_FILES
from icm_cli.model.contracts import PreparedReferences
from icm_cli.reports.result import ImageResult, MattingDetails


@dataclass(frozen=True)
class Loaded:
    """An image ready for the model."""

    job: Job
    frame: Frame
    origin: Origin
    colorspace: str
    stored: DecodedImage
    """The source's own pixels."""
    seconds: float


@dataclass(frozen=True)
class EngineOptions:
    """Options of the engine; none changes an alpha but ``shot``, and ``digests`` stand for all that decides it."""

    digests: Sequence[str]
    """Digests of all that decides an alpha beside its source, one for each example."""
    batch_size: int
    workers: int
    overwrite: bool = False
    fail_fast: bool = False
    output: OutputFormat = DEFAULT_OUTPUT
    shot: Shot | None = None
    """The images are frames of a shot, and come in its order."""


class Engine:
    """Mattes images; ``on_result`` hears of each as it ends, in the caller's thread.

    ``reference`` gives the prepared references of an example, by its number; jobs of one example come in a row.
    """

    def __init__(
        self,
        predictor: Predictor,
        reference: Callable[[int], PreparedReferences],
        settings: EngineOptions,
        *,
        on_result: Callable[[ImageResult], None],
        notice: Callable[[str], None],
    ) -> None:
        self.predictor = predictor
        self.reference = reference
        self.settings = settings
        self.batch_size = settings.batch_size
        self._on_result = on_result
        self._notice = notice
        self._fatal: OutputError | None = None
        self._has_failed = False
        self._is_stopped = False
        self._has_seen_alpha = False
        self._has_seen_windows = False
        self._has_seen_range = False
        self._carrier: Carrier | None = None

    def run(self, jobs: Iterable[Job]) -> None:
        """Matte every image. An image that fails is reported and the others go on.

        Raises OutputError when nothing more can be written, DeviceError when the device is lost. On any exception, an
        interrupt too, the writes in hand are finished first.
        """
        workers = self.settings.workers
        if self.settings.shot is not None:
            jobs = list(jobs)
            self._carrier = Carrier(self.settings.shot, jobs, self._notice)
        readers = ThreadPoolExecutor(workers, "icm-read")
        writers = ThreadPoolExecutor(workers, "icm-write")
        writing: deque[Future[ImageResult]] = deque()
        try:
            loaded = read_ahead(readers, self._read, jobs, ahead=workers + self.batch_size)
            for batch in self._batches(loaded):
                for item, matte, seconds in self._infer(batch):
                    writing.append(writers.submit(self._write, item, matte, seconds))
                self._settle(writing, at_most=workers + self.batch_size)
                if self._must_stop():
                    break
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            self._settle(writing, at_most=0)
            writers.shutdown()
        if self._fatal:
            raise self._fatal

    def stop(self) -> None:
        """End the run after the batch in hand; may be called from another thread."""
        self._is_stopped = True

    def peak_memory_bytes(self) -> int:
        """The most memory held so far."""
        return self.predictor.device.peak_memory_bytes()

    def _must_stop(self) -> bool:
        return self._is_stopped or self._fatal is not None or (self.settings.fail_fast and self._has_failed)

    def _emit(self, result: ImageResult) -> None:
        self._has_failed |= result.status == "failed"
        self._on_result(result)

    def _settle(self, writing: deque[Future[ImageResult]], at_most: int) -> None:
        """Hear of finished writes; wait until ``at_most`` are in hand. An interrupt may make one heard of twice."""
        while writing and (len(writing) > at_most or writing[0].done()):
            self._emit(writing[0].result())
            writing.popleft()

    def _read(self, job: Job) -> Loaded | ImageResult:
        """Runs in a reader thread."""
        start = time.perf_counter()
        try:
            earlier = None if self.settings.overwrite else finished(job, self._digest(job))
            if earlier and self._carrier is None:
                return earlier
            picture, *origin = job.read_with_origin()
            if picture.alpha is not None and not self._has_seen_alpha:
                self._has_seen_alpha = True
                self._notice(f"{job.source} has an alpha of its own; those of sources are ignored")
            for sentence in picture.notices:
                self._notice(sentence)
            frame = self.predictor.prepare(picture.rgb)
        except ImageError as error:
            return _failed(job, str(error))
        except MemoryError:
            return _failed(job, f"{job.source} is too large for this machine's memory")
        self._tell_of_windows(job, picture.windows)
        stored = picture.stored or DecodedImage(picture.rgb, None, 255.0, picture.space)
        return Loaded(job, frame, Origin(*origin), picture.space, stored, time.perf_counter() - start)

    def _tell_of_windows(self, job: Job, windows: ImageWindows) -> None:
        """Say once that what cannot carry an EXR's windows covers the display window."""
        output = self.settings.output
        written = "trimap" if output.has_windows else output.format.upper()
        if windows.is_full or self._has_seen_windows or (output.has_windows and output.trimap == "none"):
            return
        self._has_seen_windows = True
        remedy = "" if output.has_windows else "; icm matte --format exr keeps both"
        self._notice(
            f"{job.source} has {windows}; every {written} covers the display window: what lies outside it is cut off, "
            f"and 0 fills it up{remedy}"
        )

    def _batches(self, stream: Iterable[Loaded | ImageResult]) -> Iterator[list[Loaded]]:
        """Group by example and canvas size; at most two batches' worth of images wait for others of their kind, and
        none of them in a shot, whose order stays."""
        waiting: dict[tuple[int, tuple[int, int]], list[Loaded]] = {}
        for item in stream:
            if isinstance(item, ImageResult):
                self._emit(item)
                if self._must_stop():
                    return
                continue
            kind = item.job.example, item.frame.placement.canvas
            for earlier in [other for other in waiting if other[0] != kind[0] or (self._carrier and other != kind)]:
                yield waiting.pop(earlier)  # no more of that example will come
            group = waiting.setdefault(kind, [])
            group.append(item)
            if len(group) >= self.batch_size:
                yield waiting.pop(kind)
            elif sum(map(len, waiting.values())) >= 2 * self.batch_size:
                yield waiting.pop(max(waiting, key=lambda kind: len(waiting[kind])))
        yield from waiting.values()

    def _infer(self, batch: list[Loaded]) -> Iterator[tuple[Loaded, CanvasMatte, float]]:
        """Run the model; out of memory halves the batch, and fails an image only where it is alone."""
        while batch:
            part = batch[: self.batch_size]
            start = time.perf_counter()
            mattes = self._try_infer(part)
            if mattes is not None:
                seconds = (time.perf_counter() - start) / len(part)
                yield from ((item, matte, seconds) for item, matte in zip(part, mattes, strict=True))
                batch = batch[len(part) :]
                continue
            release_memory(self.predictor.device)
            if len(part) > 1:
                self.batch_size = len(part) // 2
                self._notice(f"out of memory with {len(part)} images at a time; going on with {self.batch_size}")
            else:
                device = self.predictor.device.description
                self._emit(_failed(part[0].job, f"{part[0].job.source} ran out of memory on {device}"))
                batch = batch[1:]

    def _try_infer(self, part: list[Loaded]) -> list[CanvasMatte] | None:
        carrier = self._carrier
        state = carrier.state() if carrier else {}
        try:
            reference = self.reference(part[0].job.example)
            if carrier is None:
                return self.predictor.infer([item.frame for item in part], reference)
            looks = self._looks(part, reference)
            return [
                carrier.matte(item.job, item.frame, look, self.predictor.with_edges, item.stored.windows)
                for item, look in zip(part, looks, strict=True)
            ]
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                if carrier is not None:
                    carrier.back_to(state)
                return None
            if is_device_lost(error):
                reason = str(error).splitlines()[0]
                raise DeviceError(f"device {self.predictor.device.torch_device} was lost: {reason}") from error
            raise

    def _looks(
        self, part: list[Loaded], reference: PreparedReferences
    ) -> list[Callable[[ImageU8 | None], CanvasMatte]]:
        """Ways to the coarse alphas of frames, which may depend on the alpha of the frame before."""

        def near(references: NearBy, item: Loaded, before: ImageU8 | None) -> CanvasMatte:
            return references.coarse(self.predictor, item.frame, before, item.stored.windows)

        def known(matte: CanvasMatte, _: ImageU8 | None) -> CanvasMatte:
            return matte

        if isinstance(reference, NearBy):
            return [functools.partial(near, reference, item) for item in part]
        coarse = self.predictor.coarse([item.frame for item in part], reference)
        return [functools.partial(known, matte) for matte in coarse]

    def _write(self, item: Loaded, matte: CanvasMatte, model_seconds: float) -> ImageResult:
        """Bring the alpha to the source's size and write it; runs in a writer thread."""
        start = time.perf_counter()
        job = item.job
        if not np.isfinite(matte.alpha).all():
            return _failed(job, f"{job.source}: the model gave no finite alpha; run again with --dtype float32")
        alpha = matte.at_source(item.frame)
        measured: dict[str, Any] = {
            "foreground": round(float(alpha_to_u8(alpha).mean()) / 255.0, 6),
            "confidence": round(matte.confidence, 4),
            "not_found": not matte.found,
            "colorspace": item.colorspace,
        }
        try:
            mark = stamp(job, self._digest(job), item.origin, measured)
            if matte.carried is not None:
                mark[CARRIED_KEY] = encoded(matte.carried)
            self._write_files(item, alpha, mark)
        except ImageError as error:
            return _failed(job, str(error))
        except OutputError as error:
            self._fatal = error
            return _failed(job, str(error))
        seconds = item.seconds + model_seconds + time.perf_counter() - start
        return replace(job.planned, status="done", matting=MattingDetails(seconds=round(seconds, 4), **measured))

    def _write_files(self, item: Loaded, alpha: Float, mark: dict[str, str]) -> None:
        """Write what the output asks for, the image's own file last: while it is not there, nothing is done."""
        output, job, windows = self.settings.output, item.job, item.stored.windows
        if output.trimap != "none":
            trimap = windows.move_pixels(trimap_of_alpha(alpha, output.band_px), windows.display_window)
            write_trimap(job.trimap if output.trimap == "beside" else job.output, trimap, mark)
        if output.trimap == "instead":
            return
        if output.foreground != "none":
            colours = foreground_colours(item.stored, alpha)
            self._tell_of_range(item, colours)
            if not output.has_windows:
                colours, alpha = (windows.move_pixels(each, windows.display_window) for each in (colours, alpha))
            write_foreground(job.output, colours, alpha, mark, output, item.stored, job.colour.config)
        else:
            alpha = alpha if output.has_windows else windows.move_pixels(alpha, windows.display_window)
            write_alpha(job.output, alpha, mark, output, item.stored)

    def _tell_of_range(self, item: Loaded, colours: Float) -> None:
        """Say once that integers cut colours outside of 0..1."""
        output = self.settings.output
        if self._has_seen_range or output.depth_for(item.stored) not in ("8", "16"):
            return
        if colours.min() < 0 or colours.max() > 1 + 1e-3:
            self._has_seen_range = True
            self._notice(
                f"{item.job.source} has colours of {colours.min():.3g} to {colours.max():.3g}; foregrounds of "
                f"{output.format.upper()} are cut at 0 and 1; --format exr keeps all"
            )

    def _digest(self, job: Job) -> str:
        return _digest(job, self.settings.digests, self.settings.shot)


def _digest(job: Job, digests: Sequence[str], shot: Shot | None) -> str:
    return shot.digest(job, digests[job.example]) if shot else digests[job.example]


def _failed(job: Job, reason: str) -> ImageResult:
    return replace(job.planned, status="failed", reason=reason)


def keep_finished(
    jobs: Sequence[Job],
    digests: Sequence[str],
    workers: int,
    on_result: Callable[[ImageResult], None],
    shot: Shot | None = None,
) -> list[Job]:
    """Tell of every image whose alpha is there already; returns the others. Needs no model. In a shot a frame is made
    anew where one is that it goes on from.

    ``digests``: of all that decides an alpha beside its source, one for each example. Raises UsageError, before it
    tells of any, where an alpha that is there is another source's.
    """

    def look(job: Job) -> ImageResult | Job | OtherSourceError:
        try:
            return finished(job, _digest(job, digests, shot)) or job
        except OtherSourceError as error:
            return error
        except ImageError:
            return job  # the engine says what is wrong with it

    with ThreadPoolExecutor(workers, "icm-look") as executor:
        seen = list(read_ahead(executor, look, jobs, ahead=2 * workers))
    others = [str(each) for each in seen if isinstance(each, OtherSourceError)]
    if others:
        more = f"; and {len(others) - MAX_LISTED_FILES} more" if len(others) > MAX_LISTED_FILES else ""
        raise UsageError("; ".join(others[:MAX_LISTED_FILES]) + more)
    there = {job.output for job, each in zip(jobs, seen, strict=True) if isinstance(each, ImageResult)}
    kept = shot.unbroken(there) if shot else there
    for job, each in zip(jobs, seen, strict=True):
        if isinstance(each, ImageResult) and job.output in kept:
            on_result(each)
    return [job for job in jobs if job.output not in kept]


Item = TypeVar("Item")
Made = TypeVar("Made")


def read_ahead(
    executor: Executor, function: Callable[[Item], Made], items: Iterable[Item], ahead: int
) -> Iterator[Made]:
    """Results in the items' order, with at most ``ahead`` of them made or in the making before they are asked for."""
    pending: deque[Future[Made]] = deque()
    for item in items:
        pending.append(executor.submit(function, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
