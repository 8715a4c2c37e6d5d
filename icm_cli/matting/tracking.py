"""Tracking of the object of a shot: each frame is cropped around the object of the frame before.

A small object then gets the full token grid, and similar objects elsewhere in the frame do not matter. The head has
learned the references in crops too. A crop that cuts the object is enlarged. If the object has no known position, or
the crop shows only a small part of it, the full frame is matted to find it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from icm_cli.config import CropSettings
from icm_cli.geometry import HALF_U8, ImageU8
from icm_cli.matting.crops import CropBox, crop_box, matte_in_crops, paste_crop
from icm_cli.matting.predictor import CoarseAlpha, Frame, Predictor
from icm_cli.matting.references import Reference
from icm_cli.model.alphas import resize_alpha
from icm_cli.model.contracts import PreparedReferences

PROGRESS_INTERVAL_S = 10.0
"""Interval of the notices about the progress of learning."""


@dataclass(frozen=True)
class TrackingConfig:
    """Settings of the tracking in a shot."""

    crop: CropSettings = field(default_factory=CropSettings)
    min_area_ratio: float = 0.5
    """If a crop shows less than this fraction of the object's area in the frame before, the full frame is matted."""


@dataclass(frozen=True)
class TrackingReferences:
    """References of a shot in two forms.

    Attributes:
        full: References as they are given.
        cropped: References cropped around their objects, which the head has learned.
    """

    full: PreparedReferences
    cropped: PreparedReferences

    @property
    def notices(self) -> Sequence[str]:
        return self.full.notices

    def coarse_alpha(
        self, predictor: Predictor, frame: Frame, previous_alpha: ImageU8 | None, config: TrackingConfig
    ) -> CoarseAlpha:
        """Return the coarse alpha of a frame.

        Args:
            predictor: The model.
            frame: The frame.
            previous_alpha: Alpha of an earlier frame, uint8 [h,w] of its display window; None if there is none.
            config: Settings of the crops.
        """
        position = np.zeros(frame.size, np.bool_) if previous_alpha is None else previous_alpha > HALF_U8
        box = crop_box(position, frame.size, config.crop, frame.windows)
        tracked = box and self._matte_crop_of(predictor, frame, box, config)
        display = frame.size if frame.windows is None else frame.windows.display
        scale = display[0] * display[1] / (frame.size[0] * frame.size[1])
        if tracked and tracked.found and tracked.area >= config.min_area_ratio * float(position.mean()) * scale:
            return tracked
        (full,) = predictor.coarse_alphas([frame], self.full)
        box = crop_box((full.alpha > 0.5).numpy(force=True), frame.size, config.crop) if full.found else None
        found_again = box and self._matte_crop_of(predictor, frame, box, config)
        candidates = [each for each in (tracked, found_again) if each and each.found]
        return max(candidates, key=lambda each: each.area) if candidates else full

    def _matte_crop_of(self, predictor: Predictor, frame: Frame, box: CropBox, config: TrackingConfig) -> CoarseAlpha:
        """Coarse alpha of a frame from a crop; it is 0 outside the crop."""

        def matte_crop(box: CropBox) -> tuple[CoarseAlpha, Tensor]:
            crop = predictor.prepare_frame(box.crop(frame.rgb))
            (coarse,) = predictor.coarse_alphas([crop], self.cropped)
            return coarse, resize_alpha(coarse.alpha, crop.size)

        found = matte_in_crops(box, frame.size, matte_crop, config.crop)
        assert found is not None  # matte_crop does not give up
        coarse, alpha, box = found
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
    """Prepare references; for a shot with learned references, both in full and cropped.

    ``notice`` receives the progress of learning. Raises UsageError, ConfigError and DeviceError as
    :meth:`Predictor.reference` does.
    """
    if not learn_steps:
        return predictor.reference(references)
    notice(f"learning the references in {learn_steps} steps; --learn-steps 0 omits this")
    report = _LearningProgress(notice)
    if not is_shot:
        return predictor.reference(references, learn_steps=learn_steps, on_progress=report)
    crops = [crop_reference(each, TrackingConfig().crop) for each in references]
    cropped = predictor.reference(crops, learn_steps=learn_steps, on_progress=report)
    return TrackingReferences(predictor.reference(references), cropped)


class _LearningProgress:
    """Reports the progress of learning from time to time."""

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
    """Crop a reference around its object."""
    box = crop_box(reference.guidance, (reference.rgb.shape[0], reference.rgb.shape[1]), settings)
    if box is None:
        return reference
    unknown = None if reference.unknown is None else box.crop(reference.unknown)
    return Reference(box.crop(reference.rgb), box.crop(reference.guidance), unknown)
