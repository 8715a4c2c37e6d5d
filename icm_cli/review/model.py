"""The model of a run under review. It computes alphas of single images, equal to those of ``icm matte``."""

from __future__ import annotations

import contextlib
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from icm_cli.device import parse_devices
from icm_cli.errors import IcmError
from icm_cli.files.atomic_writes import FileIdentity, identify_file
from icm_cli.files.json_files import write_json
from icm_cli.geometry import ImageU8, alpha_to_u8
from icm_cli.guidance.hints import Hints
from icm_cli.images.pixels import ImageWindows
from icm_cli.matting.engine import Engine, EngineOptions, FrameMatting, IndependentMatting
from icm_cli.matting.hint_files import ImageHints
from icm_cli.matting.hinting import move_hints
from icm_cli.matting.jobs import Job
from icm_cli.matting.matte import order_as_shot, read_all_references, run_digest
from icm_cli.matting.model_choice import ModelChoice
from icm_cli.matting.predictor import Frame, FrameAlpha, Predictor, Session
from icm_cli.matting.propagation import FlowPropagator, create_matting
from icm_cli.matting.provenance import REVIEWED_KEY, file_identities
from icm_cli.matting.resume import ExistingAlpha, read_existing_alpha
from icm_cli.matting.shot import Shot
from icm_cli.matting.sources import real_path
from icm_cli.matting.tracking import prepare_references
from icm_cli.options import MatteOptions
from icm_cli.reports.result import ImageResult
from icm_cli.review.run import ReviewRun
from icm_cli.review.shapes import Annotation, Shapes, clean_shapes, make_annotation, parse_shapes

MAX_SESSIONS = 16
MAX_SESSION_BYTES = 1 << 29
"""Largest number of images that are kept ready for answers, and largest size of their pixels together."""


@dataclass(frozen=True)
class OpenImage:
    """An image that is ready for answers: it is decoded, and what does not depend on hints is computed."""

    source_identities: tuple[FileIdentity | None, ...]
    """Identities of its files when it was read. If they differ now, it is read again."""
    frame: Frame
    windows: ImageWindows
    session: Session


class RunModel:
    """The model of a run with its prepared references. Not thread-safe."""

    def __init__(
        self,
        run: ReviewRun,
        options: MatteOptions,
        notice: Callable[[str], None],
        earlier: RunModel | None = None,
    ) -> None:
        """Load the model and prepare the references.

        ``options``: options of the run, with the device and the taught references of the review. ``earlier``: a model
        whose network is used again, so that only the references are prepared. Raises UsageError or ConfigError.
        """
        self._run, self._options, self._notice = run, options, notice
        self._choice = ModelChoice.from_options(
            options.model, batch_size=1, device=parse_devices(options.model.device)[0]
        )
        self.references = read_all_references(options, notice)
        self._choice.check_guidance(self.references)
        steps = self._choice.resolve_learn_steps(options.sequences.learn_steps, is_shot=run.is_shot)
        self._digest = run_digest(options, self.references, run.output, self._choice)
        self._predictor: Predictor = earlier._predictor if earlier else self._choice.load_predictor()
        self._prepared = prepare_references(self._predictor, self.references, steps, notice, is_shot=run.is_shot)
        for sentence in self._prepared.notices:
            notice(sentence)
        self._images: OrderedDict[int, OpenImage] = OrderedDict()
        """Images for which answers can be computed, by id; the one that was used last is at the end."""

    @property
    def name(self) -> str:
        """Name of the model that the page shows."""
        return self._choice.config.title

    def open_image(self, id: int) -> OpenImage:
        """Return an image that is ready for answers. Raises ImageError.

        It is opened first if it is not open, or if its files have changed.
        """
        job = self._run.jobs[id]
        identities = tuple(identify_file(path) for path in job.files)
        image = self._images.pop(id, None)
        if image is None or image.source_identities != identities:
            source = job.read_image()
            mattes = None if job.mattes is None else job.mattes.read(source.windows)
            frame = self._predictor.prepare_frame(source.rgb, source.windows, mattes=mattes)
            session = self._create_matting(self._find_shot(id, job)).open_session(job, frame)
            image = OpenImage(identities, frame, source.windows, session)
        self._images[id] = image  # at the end: the last one used
        self._close_oldest_images()
        return image

    def _close_oldest_images(self) -> None:
        """Close the images that were not used for longest, until the others keep to the limits."""
        sizes = [image.frame.rgb.nbytes for image in self._images.values()]
        while len(sizes) > MAX_SESSIONS or (len(sizes) > 1 and sum(sizes) > MAX_SESSION_BYTES):
            self._images.popitem(last=False)
            del sizes[0]

    def answer(self, id: int, shapes: Shapes, *, refined: bool) -> ImageU8:
        """Return the alpha of an image for hints, uint8 [H,W] of the display window; coarse unless ``refined``.

        Raises IcmError.
        """
        image = self.open_image(id)
        hints = self._parse_hints(shapes, image.windows)
        if hints is None and self._run.is_shot:
            alpha = self._matte_in_shot(id, image)
        else:
            alpha = image.session.matte(hints) if refined else image.session.coarse(hints)
        return image.windows.move_pixels(alpha, image.windows.display_window)

    def outdated_reason(self, id: int) -> str:
        """Return why a run would make the saved alpha of an image again, such as other references; "" if it would not.

        That the alpha is accepted does not count. "" also if files of the image cannot be read.
        """
        with contextlib.suppress(IcmError):
            job = self._with_saved_hints(id)
            options = self._engine_options(self._find_shot(id, job))
            existing = read_existing_alpha(job, options.job_digest)
            if existing is not None and (existing.is_outdated() or not _has_same_predecessors(existing, options)):
                return existing.outdated_reason()
        return ""

    def correct(self, id: int, shapes: Shapes, stamp: str, begin_writing: Callable[[Annotation | None], None]) -> None:
        """Matte an image with ``shapes`` as its hints, as a run does, and write its alpha with a stamp.

        ``stamp`` is the value of ``icm-reviewed`` in the metadata of the alpha. ``begin_writing`` is called before any
        file is replaced. Its argument is the content of the new hint file; None if there are no hints. Raises IcmError
        if the image fails.
        """
        image = self.open_image(id)
        display = image.windows.display
        shapes = clean_shapes(shapes, display)
        self._parse_hints(shapes, image.windows)  # raises errors before anything is changed
        annotation: Annotation | None = None
        if shapes:
            source = self._run.jobs[id].files[0]
            annotation = make_annotation(shapes, self._run.hint_target(id), source, display)
        with self._unsaved_hints(id, annotation) as hints:
            job = replace(self._run.jobs[id], hints=hints)
            shot = self._find_shot(id, job)
            if shot is None:
                matting: FrameMatting = _SessionMatting(image)
            else:  # only the matting of a shot records which frames an alpha was propagated from
                matting = self._create_matting(shot)
            result = self._run_engine(job, shot, _StampedMatting(matting, stamp, lambda: begin_writing(annotation)))
        if result.status != "done":
            raise IcmError(result.reason)

    def _run_engine(self, job: Job, shot: Shot | None, matting: FrameMatting) -> ImageResult:
        """Matte one image as a run does, and replace its outputs."""
        planned = replace(job.planned, has_hints=job.hints is not None)
        job = replace(job, planned=planned, replaceable=file_identities(job))
        options, results = self._engine_options(shot), list[ImageResult]()
        Engine(self._predictor, matting, options, on_result=results.append, notice=self._notice).run([job])
        return results[-1]

    def _engine_options(self, shot: Shot | None) -> EngineOptions:
        """Return the options with which single images are matted."""
        return EngineOptions(
            [self._digest],
            batch_size=1,
            workers=1,
            overwrite=True,
            output=self._run.output,
            shot=shot,
            decoder_digest=self._choice.decoder_digest(),
        )

    def _create_matting(self, shot: Shot | None) -> IndependentMatting | FlowPropagator:
        """Return the matting of a run with the prepared references. ``shot``: with propagation between its frames."""
        return create_matting(self._predictor, lambda _: self._prepared, shot, self._notice)

    def _parse_hints(self, shapes: Shapes, windows: ImageWindows) -> Hints | None:
        """Return hints in pixels of the data window of an image; None without shapes. Raises UsageError."""
        hints = parse_shapes(clean_shapes(shapes, windows.display), windows.display)
        return None if hints is None else move_hints(hints, windows)

    @contextlib.contextmanager
    def _unsaved_hints(self, id: int, annotation: Annotation | None) -> Iterator[ImageHints | None]:
        """Context that yields hints whose hint file is not written yet; None without hints.

        The engine reads hints only from files, so a temporary file contains them.
        """
        if annotation is None:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="icm-") as folder:
            path = Path(folder) / "hints.json"
            write_json(path, annotation)
            yield ImageHints.from_files(self._run.jobs[id].name, [path])

    def _find_shot(self, id: int, job: Job) -> Shot | None:
        """Return the shot that contains an image, with the current hints of its frames; None in a run without shots.

        ``job``: the job of this image. Its hints may differ from those in its hint files. Raises UsageError for a hint
        file that cannot be used.
        """
        frame_ids = self._run.shot_of(id)
        if frame_ids is None:
            return None
        references = self._options.references.ref
        reference_paths = {real_path(path) for path in references}
        jobs = []
        for frame_id in frame_ids:
            frame_files = self._run.jobs[frame_id].files
            if frame_id == id:
                jobs.append(job)
            elif not any(real_path(path) in reference_paths for path in frame_files):  # a reference is a keyframe
                jobs.append(self._with_saved_hints(frame_id))
        names = [frame.name for frame in self._run.jobs if frame.name.parent == job.name.parent]
        _, shot = order_as_shot(jobs, references, self.references, None, names)
        return shot

    def _with_saved_hints(self, id: int) -> Job:
        """Return the job of an image with the hints of its current hint files. Raises UsageError."""
        job, paths = self._run.jobs[id], self._run.hint_paths(id)
        return replace(job, hints=ImageHints.from_files(job.name, paths) if paths else None)

    def _matte_in_shot(self, id: int, image: OpenImage) -> ImageU8:
        """Return the alpha of a frame without hints, uint8 [H,W]. Hints of other frames are propagated to it."""
        job = replace(self._run.jobs[id], hints=None)
        matting = self._create_matting(self._find_shot(id, job))
        matting.begin_run([job])
        (result,) = matting.matte([job], [image.frame])
        return alpha_to_u8(self._predictor.alpha_at_source(image.frame, result))


def _has_same_predecessors(alpha: ExistingAlpha, options: EngineOptions) -> bool:
    """Return whether the frames before a frame of a shot have the alphas from which its own was propagated.

    An image that is in no shot has no such frames.
    """
    shot = options.shot
    if shot is None:
        return True
    frames = [frame for frame, _ in zip(shot.frames_before(alpha.job), alpha.predecessors, strict=False)]
    found = [read_existing_alpha(frame, options.job_digest) for frame in frames if isinstance(frame, Job)]
    return shot.has_same_predecessors(alpha, {earlier.job.output: earlier for earlier in found if earlier})


class _SessionMatting:
    """Mattes an open image with its session, which has already computed what does not depend on hints."""

    keeps_order = False

    def __init__(self, image: OpenImage) -> None:
        self._image = image

    def begin_run(self, jobs: Iterable[Job]) -> Iterable[Job]:
        return jobs

    def mark_unreadable(self, job: Job) -> None:
        pass  # the image is the only one of its run

    def matte(self, jobs: Sequence[Job], frames: Sequence[Frame]) -> list[FrameAlpha]:
        (job,), (frame,) = jobs, frames
        if not np.array_equal(frame.rgb, self._image.frame.rgb):
            raise IcmError(f"{job.source} has just been changed; try again")
        return [self._image.session.matte_frame(frame.hints)]


class _StampedMatting:
    """Mattes with ``inner``, stamps the alphas as reviewed, and calls ``begin_writing`` before they are written."""

    def __init__(self, inner: FrameMatting, stamp: str, begin_writing: Callable[[], None]) -> None:
        self._inner, self._stamp, self._begin_writing = inner, stamp, begin_writing

    @property
    def keeps_order(self) -> bool:
        return self._inner.keeps_order

    def begin_run(self, jobs: Iterable[Job]) -> Iterable[Job]:
        return self._inner.begin_run(jobs)

    def mark_unreadable(self, job: Job) -> None:
        self._inner.mark_unreadable(job)

    def matte(self, jobs: Sequence[Job], frames: Sequence[Frame]) -> list[FrameAlpha]:
        alphas = self._inner.matte(jobs, frames)
        self._begin_writing()
        return [replace(alpha, provenance={**alpha.provenance, REVIEWED_KEY: self._stamp}) for alpha in alphas]
