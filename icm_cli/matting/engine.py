"""The streaming engine: reader threads decode ahead, the model mattes batches, and writer threads
encode.

Every queue is bounded, so that memory does not grow with the number of images. The model waits for
the disk only if reading is slower than matting.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from icm_cli.device import is_device_lost, is_out_of_memory, release_memory
from icm_cli.errors import DeviceError, ImageError, OutputError
from icm_cli.geometry import Float, alpha_to_u8
from icm_cli.images.pixels import DecodedImage, ImageWindows
from icm_cli.images.writing import DEFAULT_OUTPUT, OutputFormat, write_alpha, write_foreground, write_trimap
from icm_cli.matting.foreground import estimate_foreground, trimap_from_alpha
from icm_cli.matting.jobs import Job
from icm_cli.matting.predictor import Frame, FrameAlpha, Predictor
from icm_cli.matting.resume import Origin, find_kept_result, make_stamp
from icm_cli.matting.shot import Shot
from icm_cli.model.contracts import PreparedReferences
from icm_cli.reports.result import ImageResult, MattingDetails


class FrameMatting(Protocol):
    """How the frames of a run are matted: each one independently, or with the alphas of earlier
    frames."""

    @property
    def keeps_order(self) -> bool:
        """Whether frames must be matted in the order of the jobs, because they depend on each
        other."""

    def begin_run(self, jobs: Iterable[Job]) -> Iterable[Job]:
        """Prepare for a run over these jobs, and return them."""

    def matte(self, jobs: Sequence[Job], frames: Sequence[Frame]) -> list[FrameAlpha]:
        """Matte a batch: frames of one example with canvases of one size.

        If it raises RuntimeError or MemoryError, the same frames can be matted again in smaller
        batches.
        """


class IndependentMatting:
    """Mattes every frame independently of the others."""

    keeps_order = False

    def __init__(self, predictor: Predictor, references: Callable[[int], PreparedReferences]) -> None:
        """``references``: prepared references of an example, by its number."""
        self._predictor = predictor
        self._references = references

    def begin_run(self, jobs: Iterable[Job]) -> Iterable[Job]:
        return jobs

    def matte(self, jobs: Sequence[Job], frames: Sequence[Frame]) -> list[FrameAlpha]:
        return self._predictor.matte_frames(frames, self._references(jobs[0].example))


@dataclass(frozen=True)
class LoadedImage:
    """An image that was read and is ready for the model."""

    job: Job
    frame: Frame
    origin: Origin
    colorspace: str
    stored: DecodedImage
    """Pixels of the source as they are stored."""
    seconds: float

    @property
    def windows(self) -> ImageWindows:
        """Data and display window of the source."""
        return self.stored.windows


@dataclass(frozen=True)
class EngineOptions:
    """Options of the engine. Except for ``shot``, none of them changes an alpha: the digests
    represent what does.

    Attributes:
        digests: For each example, the digest of everything that its alphas depend on, except their
            sources.
        batch_size: Largest number of images per batch.
        workers: Number of reader threads, and of writer threads.
        overwrite: Matte images again even if their alphas exist.
        fail_fast: Stop after the first image that fails.
        output: Format of the files.
        shot: Order of the frames of a shot; None if the images are independent.
    """

    digests: Sequence[str]
    batch_size: int
    workers: int
    overwrite: bool = False
    keep_existing: bool = False
    """Keep every alpha that icm made from the same source, whatever made it."""
    fail_fast: bool = False
    output: OutputFormat = DEFAULT_OUTPUT
    shot: Shot | None = None

    def job_digest(self, job: Job) -> str:
        """Return the digest of everything besides the source that decides the alpha of a job."""
        digest = self.digests[job.example]
        return self.shot.job_digest(job, digest) if self.shot else digest


class Engine:
    """Mattes images. ``on_result`` is called for each result, in the caller's thread."""

    def __init__(
        self,
        predictor: Predictor,
        matting: FrameMatting,
        options: EngineOptions,
        *,
        on_result: Callable[[ImageResult], None],
        notice: Callable[[str], None],
    ) -> None:
        """``matting``: how frames are matted with the model of ``predictor``; jobs of one example
        are consecutive."""
        self.predictor = predictor
        self.matting = matting
        self.options = options
        self.batch_size = options.batch_size
        self._on_result = on_result
        self._notice = notice
        self._fatal: OutputError | None = None
        self._has_failed = False
        self._is_stopped = False
        self._reported: set[str] = set()

    def run(self, jobs: Iterable[Job]) -> None:
        """Matte every image. An image that fails is reported, and the run continues.

        Raises OutputError if no more output can be written, DeviceError if the device is lost. On
        any exception, including an interrupt, writes in progress are finished first.
        """
        workers = self.options.workers
        jobs = self.matting.begin_run(jobs)
        readers = ThreadPoolExecutor(workers, "icm-read")
        writers = ThreadPoolExecutor(workers, "icm-write")
        writing: deque[Future[ImageResult]] = deque()
        try:
            loaded = read_ahead(readers, self._read, jobs, ahead=workers + self.batch_size)
            for batch in self._batches(loaded):
                for image, alpha, seconds in self._matte_batch(batch):
                    writing.append(writers.submit(self._write, image, alpha, seconds))
                self._report_written(writing, max_pending=workers + self.batch_size)
                if self._must_stop():
                    break
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            self._report_written(writing, max_pending=0)
            writers.shutdown()
        if self._fatal:
            raise self._fatal

    def stop(self) -> None:
        """End the run after the current batch; can be called from any thread."""
        self._is_stopped = True

    def peak_memory_bytes(self) -> int:
        """Peak memory so far."""
        return self.predictor.device.peak_memory_bytes()

    def _must_stop(self) -> bool:
        return self._is_stopped or self._fatal is not None or (self.options.fail_fast and self._has_failed)

    def _report(self, result: ImageResult) -> None:
        self._has_failed |= result.status == "failed"
        self._on_result(result)

    def _report_written(self, writing: deque[Future[ImageResult]], max_pending: int) -> None:
        """Report finished writes, and wait until at most ``max_pending`` are left.

        After an interrupt a result may be reported twice, but none is lost.
        """
        while writing and (len(writing) > max_pending or writing[0].done()):
            self._report(writing[0].result())
            writing.popleft()

    def _notice_once(self, kind: str, sentence: str) -> None:
        """Print a notice, unless one of the same kind was printed before."""
        if kind not in self._reported:
            self._reported.add(kind)
            self._notice(sentence)

    def _read(self, job: Job) -> LoadedImage | ImageResult:
        """Read an image and prepare it for the model; runs in a reader thread."""
        start = time.perf_counter()
        try:
            keep_all, digest = self.options.keep_existing, self.options.job_digest(job)
            earlier = None if self.options.overwrite else find_kept_result(job, digest, keep_all=keep_all)
            if earlier and not self.matting.keeps_order:
                return earlier
            source, *origin = job.read_with_digest()
            if source.alpha is not None:
                self._notice_once("alpha", f"{job.source} has an alpha of its own; alphas of sources are ignored")
            for sentence in source.notices:
                self._notice(sentence)
            stored = source.stored or DecodedImage(source.rgb, None, 255.0, source.space)
            frame = self.predictor.prepare_frame(source.rgb, stored.windows)
        except ImageError as error:
            return _failed_result(job, str(error))
        except MemoryError:
            return _failed_result(job, f"{job.source} is too large for this machine's memory")
        self._report_windows(job, source.windows)
        return LoadedImage(job, frame, Origin(*origin), source.space, stored, time.perf_counter() - start)

    def _report_windows(self, job: Job, windows: ImageWindows) -> None:
        """Report once if the output format cannot store the data and display windows of an EXR."""
        output = self.options.output
        written = "trimap" if output.has_windows else output.format.upper()
        if windows.is_full or (output.has_windows and output.trimap == "none"):
            return
        remedy = "" if output.has_windows else "; icm matte --format exr keeps both"
        self._notice_once(
            "windows",
            f"{job.source} has {windows}; every {written} covers the display window: pixels outside of it are cut off, "
            f"and missing pixels are 0{remedy}",
        )

    def _batches(self, stream: Iterable[LoadedImage | ImageResult]) -> Iterator[list[LoadedImage]]:
        """Group images by example and canvas size.

        At most ``2 * batch_size`` images are held back until their batch is full. If the order must
        be kept, the waiting batch is yielded as soon as an image of another group arrives.
        """
        waiting: dict[tuple[int, tuple[int, int]], list[LoadedImage]] = {}
        for item in stream:
            if isinstance(item, ImageResult):
                self._report(item)
                if self._must_stop():
                    return
                continue
            group = item.job.example, item.frame.placement.canvas
            for other in list(waiting):
                if other[0] != group[0] or (self.matting.keeps_order and other != group):
                    yield waiting.pop(other)
            images = waiting.setdefault(group, [])
            images.append(item)
            if len(images) >= self.batch_size:
                yield waiting.pop(group)
            elif sum(map(len, waiting.values())) >= 2 * self.batch_size:
                yield waiting.pop(max(waiting, key=lambda group: len(waiting[group])))
        yield from waiting.values()

    def _matte_batch(self, images: list[LoadedImage]) -> Iterator[tuple[LoadedImage, FrameAlpha, float]]:
        """Run the model. If memory runs out, the batch size is halved; a single image fails."""
        while images:
            batch = images[: self.batch_size]
            start = time.perf_counter()
            alphas = self._try_matte(batch)
            if alphas is not None:
                seconds = (time.perf_counter() - start) / len(batch)
                yield from ((image, alpha, seconds) for image, alpha in zip(batch, alphas, strict=True))
                images = images[len(batch) :]
                continue
            release_memory(self.predictor.device)
            if len(batch) > 1:
                self.batch_size = len(batch) // 2
                self._notice(f"out of memory with batches of {len(batch)} images; continuing with {self.batch_size}")
            else:
                device = self.predictor.device.description
                self._report(_failed_result(batch[0].job, f"{batch[0].job.source} ran out of memory on {device}"))
                images = images[1:]

    def _try_matte(self, batch: list[LoadedImage]) -> list[FrameAlpha] | None:
        """Matte a batch; None if memory ran out. Raises DeviceError if the device is lost."""
        try:
            return self.matting.matte([image.job for image in batch], [image.frame for image in batch])
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                return None
            if is_device_lost(error):
                reason = str(error).splitlines()[0]
                raise DeviceError(f"device {self.predictor.device.torch_device} was lost: {reason}") from error
            raise

    def _write(self, image: LoadedImage, result: FrameAlpha, model_seconds: float) -> ImageResult:
        """Bring the alpha to the size of the source and write it; runs in a writer thread."""
        start = time.perf_counter()
        job = image.job
        if not np.isfinite(result.alpha).all():
            return _failed_result(
                job,
                f"{job.source}: the alpha of the model has values that are not finite; run again with --dtype float32",
            )
        alpha = self.predictor.alpha_at_source(image.frame, result)
        measured: dict[str, Any] = {
            "foreground": round(float(alpha_to_u8(alpha).mean()) / 255.0, 6),
            "confidence": round(result.confidence, 4),
            "not_found": not result.found,
            "colorspace": image.colorspace,
        }
        try:
            stamp = make_stamp(job, self.options.job_digest(job), image.origin, measured)
            self._write_files(image, alpha, {**stamp, **result.stamp})
        except ImageError as error:
            return _failed_result(job, str(error))
        except OutputError as error:
            self._fatal = error
            return _failed_result(job, str(error))
        seconds = image.seconds + model_seconds + time.perf_counter() - start
        return replace(job.planned, status="done", matting=MattingDetails(seconds=round(seconds, 4), **measured))

    def _write_files(self, image: LoadedImage, alpha: Float, stamp: dict[str, str]) -> None:
        """Write the requested files. The image's own file is the last: it shows that the image is
        finished."""
        output, job, windows = self.options.output, image.job, image.windows
        if output.trimap != "none":
            trimap = windows.move_pixels(trimap_from_alpha(alpha, output.band_px), windows.display_window)
            write_trimap(job.trimap if output.trimap == "also" else job.output, trimap, stamp)
        if output.trimap == "instead":
            return
        if output.foreground != "none":
            colours = estimate_foreground(image.stored, alpha)
            self._report_clipping(image, colours)
            if not output.has_windows:
                colours, alpha = (windows.move_pixels(each, windows.display_window) for each in (colours, alpha))
            write_foreground(job.output, colours, alpha, stamp, output, image.stored, job.colour.config)
        else:
            alpha = alpha if output.has_windows else windows.move_pixels(alpha, windows.display_window)
            write_alpha(job.output, alpha, stamp, output, image.stored)

    def _report_clipping(self, image: LoadedImage, colours: Float) -> None:
        """Report once if an integer format clips colours outside 0..1."""
        output = self.options.output
        if output.depth_for(image.stored) not in ("8", "16"):
            return
        if colours.min() < 0 or colours.max() > 1 + 1e-3:
            self._notice_once(
                "clipping",
                f"{image.job.source} has colours from {colours.min():.3g} to {colours.max():.3g}; foregrounds in "
                f"{output.format.upper()} are clipped to 0..1; --format exr keeps all colours",
            )


def _failed_result(job: Job, reason: str) -> ImageResult:
    return replace(job.planned, status="failed", reason=reason)


Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    executor: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Yield results in the order of the items. At most ``ahead`` of them are computed before they
    are requested."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(executor.submit(function, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
