"""Looks at the thing of a shot from near by: each frame is cropped to where the thing was in the frame before.

A small thing gets the whole grid of tokens then, and what is like it elsewhere in the frame is not asked. The head has
learned references that are cropped alike. Where the thing goes on beyond the crop, the crop is made wider. Where nobody
knows yet where the thing is, or much of it is not found in the crop, the whole frame says where to look again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from icm_cli.geometry import HALF_U8, Float, ImageU8, resize
from icm_cli.images.pixels import ImageWindows
from icm_cli.matting.crops import Place, looked, place_of
from icm_cli.matting.predictor import CanvasMatte, Frame, Predictor
from icm_cli.matting.references import Reference
from icm_cli.model.contracts import PreparedReferences

LOST_BELOW = 0.5
"""Least share of the thing's area in the frame before that a crop must show, or the whole frame is looked at too."""


@dataclass(frozen=True)
class NearBy:
    """References as they are given, ``whole``, and cropped about their things and learned, ``near``."""

    whole: PreparedReferences
    near: PreparedReferences

    @property
    def notices(self) -> Sequence[str]:
        return self.whole.notices

    def coarse(
        self, predictor: Predictor, frame: Frame, before: ImageU8 | None, windows: ImageWindows | None = None
    ) -> CanvasMatte:
        """Coarse alpha of a frame; ``before``: the alpha uint8 [h,w] of a frame before it, or None.

        That is of the display window; ``windows``: where the frame's pixels lie in it.
        """
        size = (frame.rgb.shape[0], frame.rgb.shape[1])
        known = np.zeros(size, np.bool_) if before is None else before > HALF_U8
        place = place_of(known, size, windows)
        first = place and self._near(predictor, frame, place)
        display = size if windows is None else windows.display
        expected = LOST_BELOW * float(known.mean()) * display[0] * display[1] / (size[0] * size[1])
        if first and first.found and _share(first, frame) >= expected:
            return first
        whole = predictor.coarse([frame], self.whole)[0]
        place = place_of(frame.placement.crop_to_content(whole.alpha) > 0.5, size) if whole.found else None
        second = place and self._near(predictor, frame, place)
        found = [each for each in (first, second) if each and each.found]
        return max(found, key=lambda each: _share(each, frame)) if found else whole

    def _near(self, predictor: Predictor, frame: Frame, place: Place) -> CanvasMatte:
        """The coarse alpha of a part of a frame, on the canvas of the whole, 0 elsewhere."""
        size = (frame.rgb.shape[0], frame.rgb.shape[1])

        def look(place: Place) -> tuple[CanvasMatte, Float]:
            crop = predictor.prepare(np.ascontiguousarray(frame.rgb[place]))
            (matte,) = predictor.coarse([crop], self.near)
            return matte, resize(crop.placement.crop_to_content(matte.alpha), (crop.rgb.shape[0], crop.rgb.shape[1]))

        seen = looked(place, size, look)
        assert seen is not None
        matte, part, place = seen
        alpha = np.zeros(size, np.float32)
        alpha[place] = part
        canvas = np.zeros(frame.placement.canvas, np.float32)
        height, width = frame.placement.content
        canvas[:height, :width] = resize(alpha, (height, width))
        return replace(matte, alpha=canvas)


def _share(matte: CanvasMatte, frame: Frame) -> float:
    """Share of the frame that is the thing."""
    return float((frame.placement.crop_to_content(matte.alpha) > 0.5).mean())


def shown(
    predictor: Predictor, references: Sequence[Reference], learn_steps: int, *, is_shot: bool
) -> PreparedReferences:
    """References as the model prepares them, in both ways for a shot whose references are learned.

    Raises UsageError, ConfigError and DeviceError as the predictor does.
    """
    if not (is_shot and learn_steps):
        return predictor.reference(references, learn_steps=learn_steps)
    near = predictor.reference([cropped(each) for each in references], learn_steps=learn_steps)
    return NearBy(predictor.reference(references), near)


def cropped(reference: Reference) -> Reference:
    """A reference about its thing."""
    place = place_of(reference.guidance, (reference.rgb.shape[0], reference.rgb.shape[1]))
    if place is None:
        return reference
    unknown = None if reference.unknown is None else np.ascontiguousarray(reference.unknown[place])
    return Reference(
        np.ascontiguousarray(reference.rgb[place]), np.ascontiguousarray(reference.guidance[place]), unknown
    )
