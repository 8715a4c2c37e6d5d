"""Propagation in shots: the alpha of a frame is moved along the optical flow to the next frame.

The moved alpha is combined with the coarse alpha of the model, so propagation works with any backbone, head and edges.
The final alpha is then stabilised: blended with the moved alpha, so that details do not flicker. If the frame before
failed or does not show the object, an earlier frame is used.

If the head was fine-tuned on the references (``--learn-steps``), the object is tracked too: each frame is cropped
around the position of the object in the frame before. So a small object fills the token grid, and similar objects
elsewhere are outside the crop. If the position is not known, or the crop shows only a small part of the object, the
full frame is matted to find it again.
"""

from __future__ import annotations

import base64
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icm_cli.config import CropSettings
from icm_cli.errors import ImageError
from icm_cli.files.digests import combined_digest
from icm_cli.geometry import HALF_U8, Float, ImageU8, alpha_to_u8, downscaled_size, resize
from icm_cli.images.pixels import ImageWindows
from icm_cli.images.writing import read_provenance
from icm_cli.matting.crops import CropBox, crop_box, matte_in_crops, paste_crop
from icm_cli.matting.engine import IndependentMatting
from icm_cli.matting.jobs import Job
from icm_cli.matting.mattes import Mattes
from icm_cli.matting.predictor import CoarseAlpha, Frame, FrameAlpha, Predictor, Session
from icm_cli.matting.provenance import MEMORY_KEY, NO_MEMORY, PREDECESSORS_KEY
from icm_cli.matting.references import Reference
from icm_cli.matting.shot import Keyframe, Shot, start_entry, unreadable_entry
from icm_cli.model.alphas import resize_alpha
from icm_cli.model.contracts import PreparedReferences

PROPAGATED_KEY = "icm-propagated"
"""Provenance entry with :attr:`FrameMemory.alpha`, from which a later run can propagate."""
CORRECTED_KEY = "icm-corrected"
"""Provenance entry with :attr:`FrameMemory.correction`."""
MATTED_KEY = "icm-matted"
"""Provenance entry with :attr:`FrameMemory.matted`."""
EARLIER_KEY = "icm-carried"
"""Name of ``PROPAGATED_KEY`` in alphas of icm 0.1."""
PROGRESS_INTERVAL_S = 10.0
"""Interval of the notices about the progress of the fine-tuning."""


@dataclass(frozen=True)
class TrackingConfig:
    """Settings of the tracking in a shot."""

    crop: CropSettings = field(default_factory=CropSettings)
    min_area_ratio: float = 0.5
    """The full frame is matted if a crop shows less of the object than this fraction of its last area."""
    min_part_ratio: float = 0.02
    """Parts of the last alpha with less than this fraction of the area of its largest part are not tracked.

    They are mostly errors, which would widen the crop so that it shows other objects.
    """


@dataclass(frozen=True)
class PropagationConfig:
    """Settings of the propagation in a shot. All of them are part of the digest."""

    flow_px: int = 432
    """Long side, in px, of the reduced images between which the flow is computed."""
    min_flow_px: int = 128
    """Both sides of the reduced images are padded to at least this, which the image pyramid of the flow needs."""
    max_logit: float = 3.0
    """Largest absolute logit of the evidence from a propagated alpha."""
    min_alpha: float = 0.02
    """Alphas are clipped to this distance from 0 and 1 before logits are taken, which would be infinite there."""
    colour_tolerance: float = 15.0
    """Colour difference along the flow, in levels of 0..255, at which the weight of the frame before falls to 1/e.
    Larger differences mean that the flow is probably wrong."""
    stabilisation: float = 0.5
    """Where colours agree, the final alpha is moved by this fraction towards the moved alpha of the frame before."""
    max_frames_back: int = 3
    """An alpha is propagated from at most this many frames before."""
    correction_weight: float = 3.0
    """Factor of the evidence where hints have corrected an alpha, so that it can override a confident model."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass(frozen=True)
class FrameMemory:
    """What is kept of a matted frame for later frames, reduced to ``PropagationConfig.flow_px``.

    Attributes:
        rgb: Its display window, sRGB uint8 [h,w,3].
        alpha: Its alpha in the display window, uint8 [h,w].
        is_mask: Whether the alpha is the mask of a reference, which has no soft edges.
        correction: How much hints have corrected the alpha, uint8 [h,w]: 0 not at all, 255 completely; None if nowhere.
            Corrections are propagated together with the alpha.
        matted: How much a garbage or keep matte decided the alpha, uint8 [h,w]; None if nowhere. Mattes are of one
            frame only, so such pixels are not propagated.
        digest: Digest of all this, as the provenance of the frame records it.
    """

    rgb: ImageU8
    alpha: ImageU8
    is_mask: bool = False
    correction: ImageU8 | None = None
    matted: ImageU8 | None = None
    digest: str = NO_MEMORY

    @classmethod
    def from_frame(
        cls,
        rgb: ImageU8,
        alpha: Float,
        config: PropagationConfig,
        windows: ImageWindows | None = None,
        mattes: Mattes | None = None,
    ) -> FrameMemory:
        """Reduce an image [H,W,3], its alpha (0..1, any size), and its garbage and keep mattes.

        ``windows``: position of the image in its display window.
        """
        small = _reduce_image(rgb, windows, config)

        def reduce_values(values: Float) -> ImageU8:
            if windows is not None and not windows.is_full:
                at_size: Float = resize(values, windows.size)
                values = np.asarray(_move_to_display(at_size, windows), np.float32)
            return alpha_to_u8(resize(values, (small.shape[0], small.shape[1])))

        matted = None if mattes is None else reduce_values(mattes.combined(rgb.shape[:2]))
        return cls(small, reduce_values(alpha), matted=matted if np.any(matted) else None)


@dataclass(frozen=True)
class FlowField:
    """Optical flow from a frame to an earlier one, between their reduced display windows.

    Attributes:
        earlier: The earlier frame.
        flow: DIS flow (Kroeger et al., ECCV 2016), float32 [h,w,2].
        agreement: Agreement of the colours along the flow, float32 [h,w] in 0..1; 0 where a matte decided the alpha of
            the earlier frame.
        windows: Position of the frame's pixels in its display window; None if they fill it.
        config: Settings of the propagation.
    """

    earlier: FrameMemory
    flow: Float
    agreement: Float
    windows: ImageWindows | None
    config: PropagationConfig

    @classmethod
    def estimate(
        cls, earlier: FrameMemory, rgb: ImageU8, config: PropagationConfig, windows: ImageWindows | None = None
    ) -> FlowField:
        """Estimate the flow from an image, sRGB uint8 [H,W,3], to an earlier frame of the same display size."""
        now = _reduce_image(rgb, windows, config)
        flow = _compute_flow(now, earlier.rgb, config)
        difference = np.abs(_warp(earlier.rgb.astype(np.float32), flow) - now).mean(axis=-1)
        agreement = np.asarray(np.exp(-((difference / config.colour_tolerance) ** 2)), np.float32)
        if earlier.matted is not None:
            agreement *= 1 - _warp_fraction(earlier.matted, flow)
        return cls(earlier, flow, agreement, windows, config)

    def combine_with_earlier(self, coarse: Tensor) -> Tensor:
        """Return a coarse alpha [h,w] in 0..1, combined with the alpha of the earlier frame.

        The logit of the earlier alpha is moved along the flow, and weighted by the agreement of the colours. Its weight
        is larger where hints corrected the earlier frame. Then it is added to the logit of the coarse alpha.
        """
        config = self.config
        evidence = np.clip(_logit(self.earlier.alpha, config.min_alpha), -config.max_logit, config.max_logit)
        if (correction := self.earlier.correction) is not None:
            evidence *= 1 + (config.correction_weight - 1) * correction / np.float32(255)
        weighted = np.asarray(_warp(evidence, self.flow) * self.agreement, np.float32)
        added = torch.from_numpy(self._resize_to_frame(weighted, (coarse.shape[0], coarse.shape[1]))).to(coarse.device)
        # Alphas of 0 and 1 have infinite logits, which no evidence could change. They are first moved inwards.
        margin = config.min_alpha * added.abs().clamp(max=1.0)
        alpha = torch.minimum(torch.maximum(coarse, margin), 1.0 - margin)
        # This is sigmoid(logit(alpha) + added), computed without logits.
        foreground = alpha * added.exp()
        return (foreground / (foreground + 1.0 - alpha)).clamp(max=1.0)

    def stabilise(self, rgb: ImageU8, alpha: Float) -> Float:
        """Return a final alpha [h,w] in 0..1 of the frame ``rgb``, moved towards the alpha of the earlier frame.

        Where hints have corrected the earlier alpha, the moved alpha replaces it. The change is computed at the reduced
        size and then enlarged, so that fine edges are preserved.
        """
        config = self.config
        now = FrameMemory.from_frame(rgb, alpha, config, self.windows).alpha / np.float32(255)
        fraction: Float | float = config.stabilisation
        if self.earlier.correction is not None:
            fraction = np.maximum(fraction, _warp_fraction(self.earlier.correction, self.flow))
        difference = _warp_fraction(self.earlier.alpha, self.flow) - now
        change = np.asarray(fraction * self.agreement * difference, np.float32)
        change = self._resize_to_frame(change, (alpha.shape[0], alpha.shape[1]))
        return np.asarray(np.clip(alpha + change, 0.0, 1.0), np.float32)

    def moved_correction(self) -> ImageU8 | None:
        """Return the correction of the earlier frame, moved to this frame where the colours agree; None if empty."""
        if self.earlier.correction is None:
            return None
        moved = _warp(self.earlier.correction.astype(np.float32), self.flow) * self.agreement
        correction = np.asarray(np.round(moved), np.uint8)
        return correction if correction.any() else None

    def _resize_to_frame(self, values: Float, size: tuple[int, int]) -> Float:
        """Crop values [h,w] of the display window to the frame's pixels, and resize them to ``size``."""
        windows = self.windows
        if windows is None or windows.is_full:
            return resize(values, size)

        def positions(axis: int) -> NDArray[np.float32]:
            """Pixel centres of the result along an axis, in pixels of ``values``."""
            in_frame = (np.arange(size[axis]) + 0.5) * windows.size[axis] / size[axis]
            in_values = (in_frame + windows.offset[axis]) * values.shape[axis] / windows.display[axis] - 0.5
            return in_values.astype(np.float32)

        x, y = np.meshgrid(positions(1), positions(0))
        return np.asarray(cv2.remap(values, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.float32)


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
        earlier, entries = self._find_earlier(job, _reduce_image(frame.rgb, frame.windows, self._config).shape)
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
        kept = {PROPAGATED_KEY: memory.alpha, CORRECTED_KEY: memory.correction, MATTED_KEY: memory.matted}
        texts = {key: encode_alpha(values) for key, values in kept.items() if values is not None}
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
            alpha = decode_alpha(provenance.get(PROPAGATED_KEY) or provenance.get(EARLIER_KEY, ""))
            if alpha is None:
                return None, False
            correction, matted = (decode_alpha(provenance.get(key, "")) for key in (CORRECTED_KEY, MATTED_KEY))
        except (ImageError, ValueError, cv2.error):
            return None, False
        try:
            rgb = _reduce_image(job.read_image().to_display_window().rgb, None, self._config)
        except ImageError as error:
            return None, job.is_permanent_error(error)
        digest = provenance.get(MEMORY_KEY, NO_MEMORY)
        return FrameMemory(rgb, alpha, correction=correction, matted=matted, digest=digest), False


@dataclass(frozen=True)
class TrackingReferences:
    """References of a shot for tracking."""

    full: PreparedReferences
    """The references as they are given. They find the object in a full frame."""
    cropped: PreparedReferences
    """The references cropped around their objects, on which the head was fine-tuned. They matte crops of frames."""

    @property
    def notices(self) -> Sequence[str]:
        return self.full.notices

    def coarse_alpha(
        self, predictor: Predictor, frame: Frame, previous_alpha: ImageU8 | None, config: TrackingConfig
    ) -> CoarseAlpha:
        """Return the coarse alpha of a frame, matted in a crop around the position of the object in an earlier frame.

        If that crop shows too little of the object, the full frame is matted to find it, and then a crop around it. Of
        the two crops, that with the larger object is used. ``previous_alpha``: alpha of the earlier frame, uint8 [h,w]
        of its display window; None if there is none.
        """
        position = np.zeros(frame.size, np.bool_)
        if previous_alpha is not None:
            position = _remove_small_parts(previous_alpha > HALF_U8, config.min_part_ratio)
        box = crop_box(position, frame.size, config.crop, frame.windows)
        tracked = box and self._matte_crop_of(predictor, frame, box, config)
        display = frame.size if frame.windows is None else frame.windows.display
        # ``position.mean()`` is a fraction of the display window, ``tracked.area`` one of the data window.
        scale = display[0] * display[1] / (frame.size[0] * frame.size[1])
        if tracked and tracked.found and tracked.area >= config.min_area_ratio * float(position.mean()) * scale:
            return tracked
        (full,) = predictor.coarse_alphas([frame], self.full)
        # ``full.alpha`` shows the data window, so the box is computed without the windows.
        box = crop_box((full.alpha > 0.5).numpy(force=True), frame.size, config.crop) if full.found else None
        found_again = box and self._matte_crop_of(predictor, frame, box, config)
        candidates = [coarse for coarse in (tracked, found_again) if coarse and coarse.found]
        return max(candidates, key=lambda coarse: coarse.area) if candidates else full

    def _matte_crop_of(self, predictor: Predictor, frame: Frame, box: CropBox, config: TrackingConfig) -> CoarseAlpha:
        """Return the coarse alpha of a frame from a crop; it is 0 outside the crop."""

        def matte_crop(box: CropBox) -> tuple[CoarseAlpha, Tensor]:
            crop = predictor.prepare_crop(frame, box)
            (coarse,) = predictor.coarse_alphas([crop], self.cropped)
            return coarse, resize_alpha(coarse.alpha, crop.size)

        matted = matte_in_crops(box, frame.size, matte_crop, config.crop)
        assert matted is not None  # matte_crop never returns None
        coarse, alpha, box = matted
        pasted = paste_crop(alpha, box, frame.size)
        return replace(coarse, alpha=resize_alpha(pasted, frame.placement.content))


def prepare_references(
    predictor: Predictor,
    references: Sequence[Reference],
    learn_steps: int,
    notice: Callable[[str], None],
    *,
    is_shot: bool,
) -> PreparedReferences:
    """Prepare references. If a shot has ``learn_steps``, they are prepared both in full and cropped, for tracking.

    ``notice`` gets the progress of the fine-tuning. Raises UsageError, ConfigError and DeviceError, as
    :meth:`Predictor.reference` does.
    """
    if not learn_steps:
        return predictor.reference(references)
    notice(f"learning the references in {learn_steps} steps; --learn-steps 0 omits this")
    report = _LearningProgress(notice)
    if not is_shot:
        return predictor.reference(references, learn_steps=learn_steps, on_progress=report)
    crops = [crop_reference(reference, TrackingConfig().crop) for reference in references]
    cropped = predictor.reference(crops, learn_steps=learn_steps, on_progress=report)
    return TrackingReferences(predictor.reference(references), cropped)


class _LearningProgress:
    """Gives notices about the progress of the fine-tuning, every ``PROGRESS_INTERVAL_S``."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice
        self._start = self._last = time.monotonic()

    def __call__(self, fraction: float) -> None:
        now = time.monotonic()
        if now - self._last >= PROGRESS_INTERVAL_S:
            self._last = now
            seconds = (now - self._start) * (1.0 - fraction) / fraction
            self._notice(f"learning the references: {fraction:.0%}, about {seconds:.0f} s left")


def crop_reference(reference: Reference, settings: CropSettings) -> Reference:
    """Return a reference cropped around its object."""
    box = crop_box(reference.guidance, (reference.rgb.shape[0], reference.rgb.shape[1]), settings)
    if box is None:
        return reference
    unknown = None if reference.unknown is None else box.crop(reference.unknown)
    return Reference(box.crop(reference.rgb), box.crop(reference.guidance), unknown)


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


def _remove_small_parts(mask: NDArray[np.bool_], min_ratio: float) -> NDArray[np.bool_]:
    """Return a mask [h,w] without connected parts of less than ``min_ratio`` of the area of the largest part."""
    _, parts, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    areas = statistics[:, cv2.CC_STAT_AREA]
    areas[0] = 0  # the background
    return mask & (areas >= min_ratio * areas.max())[parts]


def _move_to_display(pixels: NDArray[Any], windows: ImageWindows | None) -> NDArray[Any]:
    """Move pixels [H,W] or [H,W,3] of a data window to the display window; pixels without a source are 0."""
    return pixels if windows is None else windows.move_pixels(pixels, windows.display_window)


def _reduce_image(rgb: ImageU8, windows: ImageWindows | None, config: PropagationConfig) -> ImageU8:
    """Return the display window of an image [H,W,3], reduced to a long side of at most ``config.flow_px``."""
    display: ImageU8 = _move_to_display(rgb, windows)
    return resize(display, downscaled_size(display.shape[:2], config.flow_px))


def _compute_flow(now: ImageU8, earlier: ImageU8, config: PropagationConfig) -> Float:
    """Return the offset (x, y) from every pixel of an image, uint8 [h,w,3], to the earlier image, [h,w,2]."""
    height, width = now.shape[:2]
    below, right = max(0, config.min_flow_px - height), max(0, config.min_flow_px - width)
    grey = [
        cv2.copyMakeBorder(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), 0, below, 0, right, cv2.BORDER_REPLICATE)
        for image in (now, earlier)
    ]
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)  # type: ignore[call-overload]
    return np.asarray(flow[:height, :width], np.float32)


def _warp(values: Float, flow: Float) -> Float:
    """Return the values [h,w] or [h,w,C] of the earlier image at the positions that the flow [h,w,2] points to."""
    height, width = flow.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return np.asarray(
        cv2.remap(values, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    )


def _warp_fraction(values: ImageU8, flow: Float) -> Float:
    """Return :func:`_warp` of values in 0..255, in 0..1."""
    return np.asarray(_warp(values.astype(np.float32), flow) / np.float32(255), np.float32)


def _logit(alpha: ImageU8, min_alpha: float) -> Float:
    """Return log(a / (1 - a)) of an alpha, clipped to min_alpha..1 - min_alpha."""
    clipped = np.clip(alpha / np.float32(255), min_alpha, 1.0 - min_alpha)
    return np.asarray(np.log(clipped / (1.0 - clipped)), np.float32)
