"""Optical flow between the frames of a shot: an alpha is moved along it, and combined with that of the next frame."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icm_cli.geometry import Float, ImageU8, alpha_to_u8, downscaled_size, resize
from icm_cli.images.pixels import ImageWindows
from icm_cli.matting.mattes import Mattes
from icm_cli.matting.provenance import NO_MEMORY
from icm_cli.matting.tracking import TrackingConfig


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
        matte_weight: How much a garbage or keep matte decided the alpha, uint8 [h,w]; None if nowhere. Mattes are for
            one frame only, so such pixels are not propagated.
        digest: Digest of all this, as the provenance of the frame records it.
    """

    rgb: ImageU8
    alpha: ImageU8
    is_mask: bool = False
    correction: ImageU8 | None = None
    matte_weight: ImageU8 | None = None
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
        small = reduce_image(rgb, windows, config)

        def reduce_values(values: Float) -> ImageU8:
            if windows is not None and not windows.is_full:
                at_size: Float = resize(values, windows.size)
                values = np.asarray(_move_to_display(at_size, windows), np.float32)
            return alpha_to_u8(resize(values, (small.shape[0], small.shape[1])))

        matte_weight = None if mattes is None else reduce_values(mattes.combined(rgb.shape[:2]))
        return cls(small, reduce_values(alpha), matte_weight=matte_weight if np.any(matte_weight) else None)


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
        now = reduce_image(rgb, windows, config)
        flow = _compute_flow(now, earlier.rgb, config)
        difference = np.abs(_warp(earlier.rgb.astype(np.float32), flow) - now).mean(axis=-1)
        agreement = np.asarray(np.exp(-((difference / config.colour_tolerance) ** 2)), np.float32)
        if earlier.matte_weight is not None:
            agreement *= 1 - _warp_fraction(earlier.matte_weight, flow)
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


def _move_to_display(pixels: NDArray[Any], windows: ImageWindows | None) -> NDArray[Any]:
    """Move pixels [H,W] or [H,W,3] of a data window to the display window; pixels without a source are 0."""
    return pixels if windows is None else windows.move_pixels(pixels, windows.display_window)


def reduce_image(rgb: ImageU8, windows: ImageWindows | None, config: PropagationConfig) -> ImageU8:
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
    """Return values in 0..255, moved by :func:`_warp` and divided by 255."""
    return np.asarray(_warp(values.astype(np.float32), flow) / np.float32(255), np.float32)


def _logit(alpha: ImageU8, min_alpha: float) -> Float:
    """Return log(a / (1 - a)) of an alpha, clipped to min_alpha..1 - min_alpha."""
    clipped = np.clip(alpha / np.float32(255), min_alpha, 1.0 - min_alpha)
    return np.asarray(np.log(clipped / (1.0 - clipped)), np.float32)
