"""The streaming engine: reader threads decode ahead, the model mattes batches, and writer threads encode.

Every queue is bounded, so that memory does not grow with the number of images. The model waits for the disk only if
reading is slower than matting.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from icm_cli.device import is_device_lost, release_memory
from icm_cli.environment import OUT_OF_MEMORY, FreeMemory, free_threads, is_out_of_memory, measure_free_memory
from icm_cli.errors import DeviceError, FileWriteError, ImageError, OutputError
from icm_cli.files.atomic_writes import FileIdentity, is_writable
from icm_cli.files.digests import combined_digest
from icm_cli.geometry import Float, alpha_to_u8, trimap_from_alpha
from icm_cli.images.pixels import DecodedImage, ImageWindows, reserve_memory
from icm_cli.images.writing import DEFAULT_OUTPUT, OutputFormat, write_alpha, write_foreground, write_trimap
from icm_cli.matting.digest import AlphaDigest
from icm_cli.matting.hinting import apply_hints_to_trimap
from icm_cli.matting.jobs import Job
from icm_cli.matting.memory_budget import MemoryBudget
from icm_cli.matting.predictor import Frame, FrameAlpha, Predictor, Session
from icm_cli.matting.provenance import Origin, OtherSourceError, check_unchanged, file_identities, make_provenance
from icm_cli.matting.resume import find_kept_result
from icm_cli.matting.shot import Shot
from icm_cli.model.contracts import PreparedReferences
from icm_cli.model.training_free.closed_form import estimate_foreground
from icm_cli.quality.estimate import estimate_quality
from icm_cli.reports.result import ImageResult, MattingDetails


class FrameMatting(Protocol):
    """How the frames of a run are matted: each one independently, or with the alphas of earlier frames."""

    @property
    def keeps_order(self) -> bool:
        """Whether frames must be matted in the order of the jobs, because they depend on each other."""

    def begin_run(self, jobs: Iterable[Job]) -> Iterable[Job]:
        """Prepare for a run over these jobs. Returns them, perhaps after looking at all of them."""

    def mark_unreadable(self, job: Job) -> None:
        """Record that an image cannot be read, and will not be readable until its files change."""

    def matte(self, jobs: Sequence[Job], frames: Sequence[Frame]) -> list[FrameAlpha]:
        """Matte a batch: frames of one example with canvases of one size.

        If memory runs out, the same frames can be matted again in smaller batches.
        """


class IndependentMatting:
    """Mattes every frame independently of the others."""

    keeps_order = False

    def __init__(self, predictor: Predictor, references: Callable[[int], PreparedReferences]) -> None:
        """``references`` returns the prepared references of an example; see :attr:`Job.example_index`."""
        self._predictor = predictor
        self._references = references

    def begin_run(self, jobs: Iterable[Job]) -> Iterable[Job]:
        return jobs

    def mark_unreadable(self, job: Job) -> None:
        pass  # no other image depends on it

    def matte(self, jobs: Sequence[Job], frames: Sequence[Frame]) -> list[FrameAlpha]:
        return self._predictor.matte_frames(frames, self._references(jobs[0].example_index))

    def open_session(self, job: Job, frame: Frame) -> Session:
        """Return a session for a frame. Its alphas equal those of a run in which the frame has the same hints."""
        return self._predictor.open_session(frame, self._references(job.example_index))


@dataclass(frozen=True)
class LoadedImage:
    """An image that was read and is ready for the model."""

    job: Job
    frame: Frame
    origin: Origin
    replaceable: Mapping[Path, FileIdentity]
    """Existing outputs that may be replaced. If another run changes one of them meanwhile, it is not replaced."""
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
    """Options of the engine.

    Of these, only ``shot`` changes alphas. All other settings that change them are in the model or the references, and
    ``digests`` covers them.

    Attributes:
        digests: For each example, the digest of everything that its alphas depend on, except their sources.
        batch_size: Largest number of images per batch.
        workers: Number of reader threads, and of writer threads.
        overwrite: Matte images again even if their alphas exist.
        keep_existing: Keep every alpha that icm made from the same source, whatever its digest.
        fail_fast: Stop after the first image that fails.
        output: Format of the files.
        shot: Order of the frames of a shot; None if the images are independent.
        processes: Number of processes that share the memory of this machine.
        decoder_digest: Digest of the object model that follows hints; "" if the model has its own, which ``digests``
            covers.
    """

    digests: Sequence[AlphaDigest]
    batch_size: int
    workers: int
    overwrite: bool = False
    keep_existing: bool = False
    fail_fast: bool = False
    output: OutputFormat = DEFAULT_OUTPUT
    shot: Shot | None = None
    processes: int = 1
    decoder_digest: str = ""

    def job_digest(self, job: Job) -> AlphaDigest:
        """Return the digest of everything that decides the alpha of a job besides its source and earlier frames."""
        digest = self.digests[job.example_index]
        if job.hints is not None:
            digest = replace(digest, value=combined_digest(digest.value, job.hints_digest, self.decoder_digest))
        return digest if job.mattes is None else digest.add_parts(job.mattes.digests)


WORKING_BYTES = 150_000_000
"""Memory that the default model needs for each image of a batch while it runs on the CPU; other models need more."""


class Engine:
    """Mattes the images of a run with reader threads, batches and writer threads."""

    def __init__(
        self,
        predictor: Predictor,
        matting: FrameMatting,
        options: EngineOptions,
        *,
        on_result: Callable[[ImageResult], None],
        notice: Callable[[str], None],
    ) -> None:
        """``matting`` mattes the batches. ``on_result`` gets each result, in the thread that calls :meth:`run`."""
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
        self._memory = MemoryBudget(self._free_memory)

    def run(self, jobs: Iterable[Job]) -> None:
        """Matte every image. An image that fails is reported, and the run continues.

        The jobs of one example must be consecutive. Raises OutputError if no more output can be written, and
        DeviceError if the device is lost. On any exception, including an interrupt, writes in progress are finished
        first.
        """
        workers = int(max(1, min(self.options.workers, free_threads() // 4)))
        jobs = self.matting.begin_run(jobs)
        readers = ThreadPoolExecutor(workers, "icm-read")
        writers = ThreadPoolExecutor(workers, "icm-write")
        writing: deque[Future[ImageResult]] = deque()
        self._limit_batch_size()
        self._memory = MemoryBudget(self._free_memory)
        try:
            for batch in self._batches(self._read_ahead(readers, jobs, ahead=workers + self.batch_size)):
                for image, alpha, seconds in self._matte_batch(batch):
                    writing.append(writers.submit(self._write, image, alpha, seconds))
                    del image, alpha
                del batch
                self._report_written(writing, max_pending=workers + self.batch_size)
                if self._must_stop():
                    break
        finally:
            self._memory.close()
            readers.shutdown(wait=False, cancel_futures=True)
            self._report_written(writing, max_pending=0)
            writers.shutdown()
        if self._fatal:
            raise self._fatal

    def _limit_batch_size(self) -> None:
        """Reduce the batch size if the free memory is certainly too small for it."""
        free = measure_free_memory()
        limit = max(1, free.size / self.options.processes // (2 * WORKING_BYTES))
        if self.batch_size > limit and self.predictor.device.torch_device.type == "cpu":
            self.batch_size = int(limit)
            self._notice(f"images are matted in batches of {self.batch_size}, because only {free}")

    def _free_memory(self) -> FreeMemory:
        """Return the memory that is free for images, without the memory that the model needs to run."""
        free = measure_free_memory()
        working = WORKING_BYTES * self.batch_size if self.predictor.device.torch_device.type == "cpu" else 0
        return FreeMemory(max(0.0, free.size / self.options.processes - working), free.where)

    def _read_ahead(
        self, readers: ThreadPoolExecutor, jobs: Iterable[Job], ahead: int
    ) -> Iterator[Future[LoadedImage | ImageResult]]:
        """Yield the images in the order of the jobs, while reader threads read at most ``ahead`` images in advance."""
        pending: deque[Future[LoadedImage | ImageResult]] = deque()
        for job in jobs:
            self._memory.add_job(job)
            pending.append(readers.submit(self._read, job))
            if len(pending) >= ahead:
                yield pending.popleft()
        while pending:
            yield pending.popleft()

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
        """Give a notice, unless one of the same kind was given before."""
        if kind not in self._reported:
            self._reported.add(kind)
            self._notice(sentence)

    def _read(self, job: Job) -> LoadedImage | ImageResult:
        """Read an image and prepare it for the model; runs in a reader thread."""
        reserve_memory.set(partial(self._memory.reserve, job))
        result: LoadedImage | ImageResult
        try:
            result = self._load(job)
        except OtherSourceError as error:  # the image itself may be readable
            result = _failed_result(job, str(error))
        except ImageError as error:
            if job.is_permanent_error(error):
                self.matting.mark_unreadable(job)
            result = _failed_result(job, str(error))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            result = _failed_result(job, f"{job.source} {OUT_OF_MEMORY.format(measure_free_memory())}")
        self._memory.end_reading(job)
        if isinstance(result, ImageResult):
            self._memory.release(job)
        return result

    def _load(self, job: Job) -> LoadedImage | ImageResult:
        """Return the image of a job with its hints and mattes, or the result of an alpha that is kept."""
        start = time.perf_counter()
        replaceable = job.replaceable if self.options.overwrite else file_identities(job)
        if not self.options.overwrite:
            earlier = find_kept_result(job, self.options.job_digest, keep_all=self.options.keep_existing)
            if earlier and (earlier.matting.reviewed or not self.matting.keeps_order):
                return earlier
        source, state, content_digest = job.read_with_digest()
        if source.alpha is not None and source.alpha.min() != source.alpha.max():
            self._notice_once("alpha", f"{job.source} has an alpha of its own; alphas of sources are ignored")
        for sentence in source.notices:
            self._notice(sentence)
        stored = source.stored or DecodedImage(source.rgb, None, 255.0, source.space)
        hints = None if job.hints is None else job.hints.read(stored.windows)
        mattes = None if job.mattes is None else job.mattes.read(stored.windows)
        if mattes is not None and (overlap := mattes.overlap):
            self._notice_once(
                "overlap",
                f"{job.source}: the garbage matte and the keep matte overlap in {overlap:.2%} of the image; "
                "the keep matte is used there",
            )
        frame = self.predictor.prepare_frame(source.rgb, stored.windows, hints, mattes)
        self._report_windows(job, source.windows)
        origin = Origin(state, content_digest)
        return LoadedImage(job, frame, origin, replaceable, source.space, stored, time.perf_counter() - start)

    def _report_windows(self, job: Job, windows: ImageWindows) -> None:
        """Give a notice once if the output format cannot store the data and display windows of an EXR."""
        output = self.options.output
        written = "trimap" if output.keeps_windows else output.format.upper()
        if windows.is_full or (output.keeps_windows and output.trimap == "none"):
            return
        remedy = "" if output.keeps_windows else "; icm matte --format exr keeps both"
        self._notice_once(
            "windows",
            f"{job.source} has {windows}; every {written} covers the display window: pixels outside of it are cut off, "
            f"and missing pixels are 0{remedy}",
        )

    def _batches(self, stream: Iterable[Future[LoadedImage | ImageResult]]) -> Iterator[list[LoadedImage]]:
        """Yield batches of images with the same example and canvas size.

        Images wait until their batch is full. A batch is yielded earlier in these cases: more than ``2 * batch_size``
        images wait; the next image needs their memory; an image of another example arrives; or, if the order must be
        kept, an image of another canvas size arrives.
        """
        waiting: dict[tuple[int, tuple[int, int]], list[LoadedImage]] = {}
        for reading in stream:
            while waiting and not self._memory.wait_until_read(reading):
                yield waiting.pop(next(iter(waiting)))
            item = reading.result()
            if isinstance(item, ImageResult):
                self._report(item)
                if self._must_stop():
                    return
                continue
            group = item.job.example_index, item.frame.placement.canvas
            for other in list(waiting):
                is_other_example = other[0] != group[0]
                if is_other_example or (self.matting.keeps_order and other != group):
                    yield waiting.pop(other)
            images = waiting.setdefault(group, [])
            images.append(item)
            if len(images) >= self.batch_size:
                yield waiting.pop(group)
            elif sum(map(len, waiting.values())) >= 2 * self.batch_size:
                largest = max(waiting, key=lambda group: len(waiting[group]))
                yield waiting.pop(largest)
        yield from waiting.values()

    def _matte_batch(self, images: list[LoadedImage]) -> Iterator[tuple[LoadedImage, FrameAlpha, float]]:
        """Run the model on a batch. Yields each image with its alpha and the seconds that it took.

        If memory runs out, the batch size is halved for the rest of the run. If it runs out for a single image, that
        image fails.
        """
        while images:
            batch = images[: self.batch_size]
            start = time.perf_counter()
            alphas = self._try_matte(batch)
            if alphas is not None:
                seconds = (time.perf_counter() - start) / len(batch)
                images = images[len(batch) :]
                for image in batch:
                    yield image, alphas.pop(0), seconds
                continue
            release_memory(self.predictor.device)
            if len(batch) > 1:
                self.batch_size = len(batch) // 2
                self._notice(f"out of memory with batches of {len(batch)} images; continuing with {self.batch_size}")
            else:
                device, job = self.predictor.device, batch[0].job
                free = f"; {measure_free_memory()}" if device.torch_device.type == "cpu" else ""
                self._report(_failed_result(job, f"{job.source} ran out of memory on {device.description}{free}"))
                self._memory.release(job)
                images = images[1:]

    def _try_matte(self, batch: list[LoadedImage]) -> list[FrameAlpha] | None:
        """Matte a batch; None if memory ran out. Raises DeviceError if the device is lost."""
        try:
            return self.matting.matte([image.job for image in batch], [image.frame for image in batch])
        except Exception as error:
            if is_out_of_memory(error):
                return None
            if is_device_lost(error):
                reason = str(error).splitlines()[0]
                raise DeviceError(f"device {self.predictor.device.torch_device} was lost: {reason}") from error
            raise

    def _write(self, image: LoadedImage, result: FrameAlpha, model_seconds: float) -> ImageResult:
        """Write the alpha of an image, and return its result; runs in a writer thread."""
        try:
            return self._write_alpha(image, result, model_seconds)
        except ImageError as error:
            return _failed_result(image.job, str(error))
        except OutputError as error:
            is_problem_of_one_file = isinstance(error, FileWriteError) and is_writable(image.job.output_folder)
            if not is_problem_of_one_file:
                self._fatal = error  # ends the run
            return _failed_result(image.job, str(error))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return _failed_result(image.job, f"{image.job.source} {OUT_OF_MEMORY.format(measure_free_memory())}")
        finally:
            self._memory.release(image.job)

    def _write_alpha(self, image: LoadedImage, result: FrameAlpha, model_seconds: float) -> ImageResult:
        """Resize an alpha to its source, estimate its quality and write its files."""
        start = time.perf_counter()
        job = image.job
        if not np.isfinite(result.alpha).all():
            return _failed_result(
                job,
                f"{job.source}: the alpha of the model has values that are not finite; run again with --dtype float32",
            )
        alpha = self.predictor.alpha_at_source(image.frame, result)
        estimate = estimate_quality(result.signals, shows_object=image.frame.shows_object)
        details = MattingDetails(
            colorspace=image.colorspace,
            foreground=round(float(alpha_to_u8(alpha).mean()) / 255.0, 6),
            quality=estimate.quality,
            reasons=estimate.reasons,
            signals=result.signals,
            not_found=not result.found,
        )
        provenance = make_provenance(job, self.options.job_digest(job), image.origin, details)
        self._write_files(image, alpha, {**provenance, **result.provenance})
        seconds = image.seconds + model_seconds + time.perf_counter() - start
        return replace(job.planned, status="done", matting=replace(details, seconds=round(seconds, 4)))

    def _write_files(self, image: LoadedImage, alpha: Float, provenance: dict[str, str]) -> None:
        """Write the files of an image. The one at ``job.output`` comes last: if it exists, the image is finished."""
        output, job, windows = self.options.output, image.job, image.windows
        digest = self.options.job_digest(job).value
        check = partial(check_unchanged, job=job, digest=digest, replaceable=image.replaceable)
        if output.trimap != "none":
            trimap = trimap_from_alpha(alpha, output.band_px)
            if image.frame.hints is not None:
                trimap = apply_hints_to_trimap(trimap, image.frame.hints)
            trimap = windows.move_pixels(trimap, windows.display_window)
            path = job.trimap if output.trimap == "also" else job.output
            write_trimap(path, trimap, provenance, partial(check, path))
        if output.trimap == "instead":
            return
        if output.foreground != "none":
            colours = estimate_foreground(image.stored, alpha)
            self._report_clipping(image, colours)
            if not output.keeps_windows:
                colours = windows.move_pixels(colours, windows.display_window)
                alpha = windows.move_pixels(alpha, windows.display_window)
            config = job.colour.config
            write_foreground(
                job.output, colours, alpha, provenance, output, image.stored, config, partial(check, job.output)
            )
        else:
            if not output.keeps_windows:
                alpha = windows.move_pixels(alpha, windows.display_window)
            write_alpha(job.output, alpha, provenance, output, image.stored, partial(check, job.output))

    def _report_clipping(self, image: LoadedImage, colours: Float) -> None:
        """Give a notice once if an integer format clips foreground colours outside 0..1."""
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
