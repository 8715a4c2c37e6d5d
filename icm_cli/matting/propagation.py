"""Propagation in shots: the alpha of a frame is moved along the optical flow to the next frame.

The moved alpha is combined with the coarse alpha of the model, so propagation works with any backbone, head and edges.
The final alpha is then stabilised: blended with the moved alpha, so that details do not flicker. If the frame before
failed or does not show the object, an earlier frame is used.

If the head was fine-tuned on the references (``--learn-steps``), the object is tracked too, see ``tracking.py``.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from icm_cli.errors import ImageError
from icm_cli.files.digests import combined_digest
from icm_cli.geometry import ImageU8
from icm_cli.images.writing import read_provenance
from icm_cli.matting.engine import IndependentMatting
from icm_cli.matting.jobs import Job
from icm_cli.matting.optical_flow import FlowField, FrameMemory, PropagationConfig, reduce_image
from icm_cli.matting.predictor import CoarseAlpha, Frame, FrameAlpha, Predictor, Session
from icm_cli.matting.provenance import MEMORY_KEY, NO_MEMORY, PREDECESSORS_KEY
from icm_cli.matting.references import Reference
from icm_cli.matting.shot import Keyframe, Shot, start_entry, unreadable_entry
from icm_cli.matting.tracking import TrackingReferences
from icm_cli.model.contracts import PreparedReferences

PROPAGATED_KEY = "icm-propagated"
"""Provenance entry with :attr:`FrameMemory.alpha`, from which a later run can propagate."""
CORRECTED_KEY = "icm-corrected"
"""Provenance entry with :attr:`FrameMemory.correction`."""
MATTED_KEY = "icm-matted"
"""Provenance entry with :attr:`FrameMemory.matte_weight`."""
PROPAGATED_KEY_0_1 = "icm-carried"
"""Name of ``PROPAGATED_KEY`` in alphas of icm 0.1."""


class FlowPropagator:
    """Mattes the frames of a shot in their order, each with the alpha of an earlier frame.

    It implements :class:`~icm_cli.matting.engine.FrameMatting`, and keeps only a few reduced frames.
    """

    keeps_order = True

    def __init__(
        self,
        predictor: Predictor,
        references: Callable[[int], PreparedReferences],
        shot: Shot,
        notice: Callable[[str], None],
        config: PropagationConfig | None = None,
    ) -> None:
        """``references`` returns the prepared references of an example; see :attr:`Job.example_index`."""
        self._predictor = predictor
        self._references = references
        self._shot = shot
        self._notice = notice
        self._config = config or PropagationConfig()
        self._planned: set[Path] = set()
        self._memories: dict[Path, FrameMemory] = {}
        self._unreadable: set[Path] = set()
        self._start: Path | None = None

    def begin_run(self, jobs: Iterable[Job]) -> Iterable[Job]:
        """Record which frames this run mattes. If another frame is needed, its existing alpha is read."""
        jobs = list(jobs)
        self._planned = {job.output for job in jobs}
        return jobs

    def mark_unreadable(self, job: Job) -> None:
        """Record that later frames cannot be propagated from a frame in any run until its files change."""
        self._unreadable.add(job.output)

    def matte(self, jobs: Sequence[Job], frames: Sequence[Frame]) -> list[FrameAlpha]:
        """Matte a batch of frames, in the order of the shot. After an error, the same frames can be matted again."""
        memories = dict(self._memories)
        try:
            references = self._references(jobs[0].example_index)
            if isinstance(references, TrackingReferences):
                return [self._matte_frame(job, frame, references) for job, frame in zip(jobs, frames, strict=True)]
            coarse_alphas = self._predictor.coarse_alphas(frames, references)
            return [
                self._matte_frame(job, frame, coarse)
                for job, frame, coarse in zip(jobs, frames, coarse_alphas, strict=True)
            ]
        except Exception:
            self._memories = memories
            raise

    def open_session(self, job: Job, frame: Frame) -> Session:
        """Return a session for a frame with hints. Such a frame is a keyframe: no alpha is propagated to it."""
        references = self._references(job.example_index)

        def decide_alpha(frame: Frame) -> CoarseAlpha:
            if isinstance(references, TrackingReferences):
                return references.coarse_alpha(self._predictor, frame, None, self._config.tracking)
            return self._predictor.coarse_alphas([frame], references)[0]

        return Session(self._predictor, frame, decide_alpha)

    def _matte_frame(self, job: Job, frame: Frame, source: TrackingReferences | CoarseAlpha) -> FrameAlpha:
        """Matte one frame, and keep its alpha for later frames if the object is found.

        ``source``: the coarse alpha of the frame, or the references with which it is computed by tracking.

        If hints change the alpha, their correction (:attr:`FrameMemory.correction`) is remembered too. It moves along
        the flow from frame to frame, and gives the propagated alpha more weight against that of the model.
        """
        earlier, entries = self._find_earlier(job, reduce_image(frame.rgb, frame.windows, self._config).shape)
        provenance = {PREDECESSORS_KEY: " ".join(entries)}
        if isinstance(source, TrackingReferences):
            previous_alpha = None if earlier is None else earlier.alpha
            coarse = source.coarse_alpha(self._predictor, frame, previous_alpha, self._config.tracking)
        else:
            coarse = source
        if not coarse.found or not coarse.alpha.isfinite().all():
            return replace(self._predictor.refine_alphas([frame], [coarse])[0], provenance=provenance)
        flow = None if earlier is None else FlowField.estimate(earlier, frame.rgb, self._config, frame.windows)
        if flow is not None:
            coarse = replace(coarse, alpha=flow.combine_with_earlier(coarse.alpha))
        # The hard edges of a mask must not change those of the alpha.
        stabilise = None if flow is None or flow.earlier.is_mask else functools.partial(flow.stabilise, frame.rgb)
        (result,) = self._predictor.refine_alphas([frame], [coarse], stabilise)
        memory = FrameMemory.from_frame(frame.rgb, result.alpha, self._config, frame.windows, frame.mattes)
        if job.hints is not None:
            uncorrected = FrameMemory.from_frame(frame.rgb, coarse.alpha.numpy(force=True), self._config, frame.windows)
            memory = replace(memory, correction=_find_correction(uncorrected.alpha, memory.alpha))
        elif flow is not None:
            memory = replace(memory, correction=flow.moved_correction())
        recorded = {PROPAGATED_KEY: memory.alpha, CORRECTED_KEY: memory.correction, MATTED_KEY: memory.matte_weight}
        texts = {key: encode_alpha(values) for key, values in recorded.items() if values is not None}
        memory = replace(memory, digest=combined_digest(memory.rgb.tobytes(), *texts, *texts.values())[:16])
        self._remember_frame(job, memory)
        provenance |= {**texts, MEMORY_KEY: memory.digest}
        return replace(result, provenance=provenance)

    def _remember_frame(self, job: Job, memory: FrameMemory) -> None:
        """Keep the memory of a frame for later frames, and delete memories that are no longer needed.

        A frame with hints is the start of its part of the shot: no memory of a frame before it is needed. Its own is
        kept, because alphas are propagated from it first forward and then backward.
        """
        if job.hints is not None:
            self._memories = {}
            self._start = job.output
        self._memories[job.output] = memory
        deletable = [output for output in self._memories if output != self._start]
        for output in deletable[: -self._config.max_frames_back]:
            del self._memories[output]

    def _find_earlier(self, job: Job, size: tuple[int, ...]) -> tuple[FrameMemory | None, list[str]]:
        """Return the nearest earlier frame that has an alpha and a reduced image of this size [h,w,3]; None if none.

        The second value is the entries of PREDECESSORS_KEY. A notice is given if earlier frames have another size.
        """
        mismatched, entries = list[str](), list[str]()
        for earlier in islice(self._shot.frames_before(job), self._config.max_frames_back):
            memory, entry = self._recall_frame(earlier)
            entries.append(entry)
            if earlier is not None and memory is not None:
                if memory.rgb.shape == size:
                    return memory, entries
                mismatched.append(earlier.name.name)
        if mismatched:
            self._notice(
                f"{job.source} has another size or aspect ratio than {mismatched[0]}, whose alpha is not propagated "
                "to it"
            )
        return None, entries

    def _recall_frame(self, frame: Job | Keyframe | None) -> tuple[FrameMemory | None, str]:
        """Return the memory of an earlier frame, None if it has none, and its entry of PREDECESSORS_KEY."""
        if not isinstance(frame, Job):
            return None if frame is None else self._reference_memory(frame.read()), start_entry(frame)
        if frame.output in self._planned:
            memory, is_unreadable = self._memories.get(frame.output), frame.output in self._unreadable
        else:
            memory, is_unreadable = self._read_existing(frame)
        if memory is not None:
            return memory, memory.digest
        return None, unreadable_entry(frame) if is_unreadable else NO_MEMORY

    def _reference_memory(self, reference: Reference) -> FrameMemory:
        """Return the memory of a reference that is a keyframe. Its alpha is its mask, 0.5 where that is unknown."""
        alpha = reference.guidance.astype(np.float32)
        if reference.unknown is not None:
            alpha[reference.unknown] = 0.5
        memory = FrameMemory.from_frame(reference.rgb, alpha, self._config, reference.windows)
        return replace(memory, is_mask=True)

    def _read_existing(self, job: Job) -> tuple[FrameMemory | None, bool]:
        """Return the memory of a frame that an earlier run matted; None if its file has no alpha to propagate.

        The second value is whether the frame cannot be read until its files change.
        """
        try:
            provenance = read_provenance(job.output) or {}
            alpha = decode_alpha(provenance.get(PROPAGATED_KEY) or provenance.get(PROPAGATED_KEY_0_1, ""))
            if alpha is None:
                return None, False
            correction, matte_weight = (decode_alpha(provenance.get(key, "")) for key in (CORRECTED_KEY, MATTED_KEY))
        except (ImageError, ValueError, cv2.error):
            return None, False
        try:
            rgb = reduce_image(job.read_image().to_display_window().rgb, None, self._config)
        except ImageError as error:
            return None, job.is_permanent_error(error)
        digest = provenance.get(MEMORY_KEY, NO_MEMORY)
        return FrameMemory(rgb, alpha, correction=correction, matte_weight=matte_weight, digest=digest), False


def create_matting(
    predictor: Predictor,
    references: Callable[[int], PreparedReferences],
    shot: Shot | None,
    notice: Callable[[str], None],
) -> IndependentMatting | FlowPropagator:
    """Return how the frames of a run are matted: with propagation if ``shot`` is given, else independently."""
    if shot is None:
        return IndependentMatting(predictor, references)
    return FlowPropagator(predictor, references, shot, notice)


def encode_alpha(alpha: ImageU8) -> str:
    """Encode a reduced alpha as text: a PNG in base64."""
    return base64.b64encode(cv2.imencode(".png", alpha)[1].tobytes()).decode("ascii")


def decode_alpha(text: str) -> ImageU8 | None:
    """Return the alpha of a text from :func:`encode_alpha`; None for "". Raises ValueError or cv2.error."""
    data = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    alpha = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) if len(data) else None
    return None if alpha is None else np.asarray(alpha, np.uint8)


def _find_correction(before: ImageU8, after: ImageU8) -> ImageU8 | None:
    """Return how much an alpha was corrected, uint8 [h,w]: 0 for a change of up to 127, 255 for one of 255.

    Returns None if no pixel changed by more. ``before`` and ``after``: the alpha, uint8 [h,w].
    """
    change = cv2.absdiff(before, after).astype(np.float32)
    correction = np.asarray(np.clip(2 * change - 255, 0, 255), np.uint8)
    return correction if correction.any() else None
