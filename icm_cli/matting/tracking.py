"""Tracking in shots whose head was fine-tuned on the references (``--learn-steps``).

Each frame is cropped around the position of the object in the frame before. So a small object fills the token grid, and
similar objects elsewhere are outside the crop. If the position is not known, or the crop shows only a small part of the
object, the full frame is matted to find it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from icm_cli.config import CropSettings
from icm_cli.geometry import HALF_U8, ImageU8
from icm_cli.matting.crops import CropBox, crop_box, matte_in_crops, paste_crop
from icm_cli.matting.predictor import CoarseAlpha, Frame, Predictor
from icm_cli.matting.references import Reference
from icm_cli.model.alphas import resize_alpha
from icm_cli.model.contracts import PreparedReferences

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
        tracked = box and self._matte_in_crop(predictor, frame, box, config)
        display = frame.size if frame.windows is None else frame.windows.display
        # ``position.mean()`` is a fraction of the display window, ``tracked.area`` one of the data window.
        scale = display[0] * display[1] / (frame.size[0] * frame.size[1])
        if tracked and tracked.found and tracked.area >= config.min_area_ratio * float(position.mean()) * scale:
            return tracked
        (full,) = predictor.coarse_alphas([frame], self.full)
        # ``full.alpha`` shows the data window, so the box is computed without the windows.
        box = crop_box((full.alpha > 0.5).numpy(force=True), frame.size, config.crop) if full.found else None
        found_again = box and self._matte_in_crop(predictor, frame, box, config)
        candidates = [coarse for coarse in (tracked, found_again) if coarse and coarse.found]
        return max(candidates, key=lambda coarse: coarse.area) if candidates else full

    def _matte_in_crop(self, predictor: Predictor, frame: Frame, box: CropBox, config: TrackingConfig) -> CoarseAlpha:
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


def _remove_small_parts(mask: NDArray[np.bool_], min_ratio: float) -> NDArray[np.bool_]:
    """Return a mask [h,w] without connected parts of less than ``min_ratio`` of the area of the largest part."""
    _, parts, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    areas = statistics[:, cv2.CC_STAT_AREA]
    areas[0] = 0  # the background
    return mask & (areas >= min_ratio * areas.max())[parts]


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


def crop_reference(reference: Reference, settings: CropSettings) -> Reference:
    """Return a reference cropped around its object."""
    box = crop_box(reference.guidance, (reference.rgb.shape[0], reference.rgb.shape[1]), settings)
    if box is None:
        return reference
    unknown = None if reference.unknown is None else box.crop(reference.unknown)
    return Reference(box.crop(reference.rgb), box.crop(reference.guidance), unknown)


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
