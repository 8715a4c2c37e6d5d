"""Refining network: computes a fine alpha from an image and a coarse alpha. It does not see the references.

The same network runs in two steps, as in CascadePSP (Cheng et al., CVPR 2020). The first one runs on the image at
``RefineConfig.frame_px``, where a coarse alpha of a few hundred tokens becomes an outline. For larger sources, the
second one runs on tiles at the size of the source, where that outline becomes an edge. Both steps omit the parts of the
image in which the alpha cannot change.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.config import Section, limited
from icm_cli.geometry import ImageU8, downscaled_size, resize
from icm_cli.model.alphas import Tile, apply_in_batches, blend_tiles, max_batch_size, resize_alpha, split_into_tiles
from icm_cli.model.contracts import Edges

UNSHUFFLE = 2
"""Side of the square of pixels that becomes channels in the first layer."""
TILES_PER_BATCH = 4
"""Tiles of one image that are refined at a time."""


@dataclass(frozen=True)
class RefineConfig(Section, title="edges"):
    """Settings of the refining network."""

    widths: tuple[int, ...] = (32, 48, 64, 96, 128)
    """Channels of each scale; the first has half the size of the image, and each other half the size of the one before.
    """
    detail_blocks: int = limited(0, 0, 64)
    """Number of residual blocks before the output, at half the size of the image."""
    frame_px: int = 1024
    """Long side, in px, of the image in the first step."""
    context_px: int = limited(32)
    """Margin in px around the pixels that may change, which the first step sees too."""
    tile_px: int = 256
    """Side, in px, of the tiles of a larger source."""
    overlap_px: int = 32
    """Overlap of tiles, in px, over which they are blended."""
    logit_eps: float = 0.02
    """Smallest distance of a coarse alpha from 0 and 1 before its logit is taken, so that the network can override it.
    """
    unknown_margin: float = limited(0.05, below=0.5)
    """A pixel is unknown if its coarse alpha is further than this from 0 and 1."""
    change_radius: float = limited(0.06, above=0, most=2)
    """The coarse alpha is not changed further from unknown pixels than this fraction of the long side.

    Edges of the image there belong to other objects.
    """
    core_distance: float = limited(0.015, 0, 0.25)
    """Further from edges than this fraction of the long side, alphas become 1 or 0; 0 disables it."""
    core_long_side_px: int = limited(640, 1)
    """Long side, in px, of the alpha in which these distances are measured."""
    core_opaque_from: float = limited(0.8, above=0.5, most=1)
    """Alphas from this value on become 1 far inside the object."""
    core_transparent_to: float = limited(0.15, below=0.5)
    """Alphas up to this value become 0 far outside the object."""
    core_softness: float = limited(0.3, above=0, most=0.5)
    """``core_opaque_from`` and ``core_transparent_to`` apply fully where all alphas nearby are this far from 0.5, on
    one side; else in part."""
    decided_margin: float = limited(0.01, below=0.5)
    """A tile is not changed if all its alphas are within this distance of 0, or all within this distance of 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        multiple, widths = self.multiple, self.widths
        self.check("widths", len(widths) >= 2 and min(widths) >= 1, "two or more numbers of 1 or more")
        for name in ("frame_px", "tile_px"):
            side = getattr(self, name)
            self.check(name, side >= multiple and not side % multiple, f"a multiple of {multiple}")
        self.check("logit_eps", 0 < self.logit_eps < 0.5, "more than 0 and less than 0.5")
        self.check("overlap_px", 0 <= self.overlap_px <= self.tile_px // 2, "0 to half of tile_px")

    @property
    def multiple(self) -> int:
        """Images are padded to a multiple of this, in px."""
        return UNSHUFFLE * 2 ** max(0, len(self.widths) - 1)


class ConvReLU(nn.Module):
    """3 x 3 convolution and ReLU. Without BatchNorm, because the few crops of a batch differ too much."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x), inplace=True)


class Residual(nn.Module):
    """Residual block: two 3 x 3 convolutions with a ReLU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = ConvReLU(width, width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        _make_zero(self.second)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out.add_(x)


class Refine(Edges):
    """U-Net on pixel-unshuffled input that corrects the logit of a coarse alpha."""

    Config = RefineConfig
    is_trained = True

    def __init__(self, config: RefineConfig) -> None:
        super().__init__()
        self.config = config
        inputs = (3 + 1) * UNSHUFFLE**2
        widths = config.widths
        self.stem = _convolutions(inputs, widths[0])
        self.down = nn.ModuleList(
            nn.Sequential(ConvReLU(fine, coarse, stride=2), _convolutions(coarse, coarse))
            for fine, coarse in itertools.pairwise(widths)
        )
        self.up = nn.ModuleList(_convolutions(coarse + fine, fine) for fine, coarse in itertools.pairwise(widths))
        self.details = nn.Sequential(*(Residual(widths[0]) for _ in range(config.detail_blocks)))
        self.output = nn.Conv2d(widths[0], UNSHUFFLE**2, 3, padding=1)
        _make_zero(self.output)  # before training, the result is the coarse alpha

    def set_dtype(self, dtype: torch.dtype, fast_dtype: torch.dtype) -> None:  # noqa: ARG002
        self.to(fast_dtype)

    def forward(self, image: Tensor, coarse: Tensor) -> Tensor:
        """Return the logits of corrected alphas, float32 [B,1,H,W].

        ``image``: sRGB [B,3,H,W] in 0..1. ``coarse``: [B,1,H,W]. H and W are multiples of ``config.multiple``.
        """
        logit = torch.logit(coarse.float(), eps=self.config.logit_eps)
        dtype = self.output.weight.dtype
        x = torch.cat([4.0 * image.float() - 2.0, logit / 2.0], dim=1).to(dtype)
        x = self.stem(F.pixel_unshuffle(x, UNSHUFFLE))
        scales = [x]
        for step in self.down:
            scales.append(step(scales[-1]))
        x = scales.pop()
        for step in reversed(self.up):
            x = enlarge_and_join(x, scales.pop())
            for layer in step.children():  # not step(x), which would keep its input in memory until its last layer
                x = layer(x)
        return logit + F.pixel_shuffle(self.output(self.details(x)), UNSHUFFLE).float()

    @torch.inference_mode()
    def refine_alphas(self, images: Sequence[ImageU8], coarse: Sequence[Tensor]) -> list[Tensor]:
        indices = [index for index, alpha in enumerate(coarse) if self._is_undecided(alpha)]
        reduced = [self._reduce_image(images[index], coarse[index]) for index in indices]
        corrected = self._correct_alphas(  # the first step, for all images together
            [image.rgb[image.region] for image in reduced],
            [image.alpha[image.region] for image in reduced],
            max_batch_size(self.output.weight.device),
        )
        refined = {}
        for index, image, correction in zip(indices, reduced, corrected, strict=True):
            alpha = image.alpha.clone()  # it may be the coarse alpha itself
            alpha[image.region] += image.weight[image.region] * (correction - alpha[image.region])
            size = images[index].shape[0], images[index].shape[1]
            if size != tuple(alpha.shape):  # the second step, for larger images
                alpha = self._refine_tiles(images[index], resize_alpha(alpha, size), resize_alpha(image.weight, size))
            refined[index] = self._clear_core(alpha)
        return [
            refined[index] if index in refined else resize_alpha(alpha.float(), images[index].shape[:2])
            for index, alpha in enumerate(coarse)
        ]

    def _reduce_image(self, rgb: ImageU8, coarse: Tensor) -> _ReducedImage:
        """Prepare an image for the first step, at ``config.frame_px``."""
        size = downscaled_size(rgb.shape[:2], self.config.frame_px)
        alpha = resize_alpha(coarse.float(), size)
        weight = self._weight_near_unknown(alpha)
        return _ReducedImage(resize(rgb, size), alpha, weight, self._changed_region(weight))

    def _changed_region(self, weight: Tensor) -> tuple[slice, slice]:
        """Return the smallest region, rows and columns, with all positive weights [h,w] and ``context_px`` around them.

        It begins and ends at multiples of ``config.multiple``, or at the border of the image, so that few sizes of
        regions occur.
        """
        is_changed = weight > 0
        return self._extend_range(is_changed.any(dim=1)), self._extend_range(is_changed.any(dim=0))

    def _extend_range(self, is_changed: Tensor) -> slice:
        """Return the range from the first to the last True of a bool [n], with the context of the region."""
        positions = is_changed.nonzero()[:, 0].tolist() or [0]
        start = positions[0] - self.config.context_px
        end = positions[-1] + 1 + self.config.context_px
        multiple = self.config.multiple
        rounded_start, rounded_end = start // multiple * multiple, math.ceil(end / multiple) * multiple
        return slice(max(0, rounded_start), min(len(is_changed), rounded_end))

    def _refine_tiles(self, rgb: ImageU8, alpha: Tensor, weight: Tensor) -> Tensor:
        """Refine an alpha [H,W] in overlapping tiles. ``weight`` [H,W]: fraction of the correction that is applied.

        Tiles in which nothing can change are omitted.
        """
        size = (alpha.shape[0], alpha.shape[1])
        tiles = split_into_tiles(size, self.config.tile_px, self.config.overlap_px)
        can_change = [bool(weight[tile.slices].any()) and self._is_undecided(alpha[tile.slices]) for tile in tiles]
        corrections = self._correct_tiles(rgb, alpha, list(itertools.compress(tiles, can_change)))

        def refine_tiles() -> Iterator[Tensor]:
            for tile, is_corrected in zip(tiles, can_change, strict=True):
                refined = alpha[tile.slices]
                if is_corrected:
                    refined = refined + weight[tile.slices] * (next(corrections) - refined)
                yield refined

        return blend_tiles(size, tiles, refine_tiles(), alpha.device)

    def _correct_tiles(self, rgb: ImageU8, alpha: Tensor, tiles: Sequence[Tile]) -> Iterator[Tensor]:
        """Yield the corrected alphas of tiles. Only those of TILES_PER_BATCH tiles are in memory at a time."""
        for start in range(0, len(tiles), TILES_PER_BATCH):
            slices = [tile.slices for tile in tiles[start : start + TILES_PER_BATCH]]
            yield from self._correct_alphas([rgb[part] for part in slices], [alpha[part] for part in slices], None)

    def _clear_core(self, alpha: Tensor) -> Tensor:
        """Make an alpha [H,W] opaque far inside the object and transparent far outside it, in place.

        ``inside`` is 1 where all alphas nearby are high, ``outside`` where all are low; near edges both are 0. The
        range ``low``..``high`` of the alpha is stretched to 0..1. Inside, high is below 1; outside, low is above 0.
        """
        config = self.config
        if not config.core_distance:
            return alpha
        small = resize_alpha(alpha, downscaled_size(alpha.shape, config.core_long_side_px)).numpy(force=True)
        reach = max(1, round(config.core_distance * max(small.shape)))
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
        smallest_nearby = cv2.blur(cv2.erode(small, disc), (reach, reach))
        largest_nearby = cv2.blur(cv2.dilate(small, disc), (reach, reach))

        def to_fraction(distance_from_half: np.ndarray) -> np.ndarray:
            return np.clip(distance_from_half / config.core_softness, 0.0, 1.0).astype(np.float32)

        def enlarge(limit: np.ndarray) -> Tensor:
            return resize_alpha(torch.from_numpy(limit).to(alpha.device), alpha.shape)

        inside = to_fraction(smallest_nearby - 0.5)
        outside = to_fraction((1.0 - largest_nearby) - 0.5)
        high = enlarge(1.0 - (1.0 - config.core_opaque_from) * inside)
        low = enlarge(config.core_transparent_to * outside)
        return alpha.sub_(low).div_(high.sub_(low)).clamp_(0.0, 1.0)

    def _is_undecided(self, coarse: Tensor) -> bool:
        """Return whether a coarse alpha needs refinement, because it is neither nearly 0 nor nearly 1 everywhere."""
        largest_distance = torch.minimum(coarse, 1.0 - coarse).max()  # from 0 or 1
        has_both = bool(coarse.min() < 0.5 < coarse.max())
        return bool(largest_distance > self.config.decided_margin) or has_both

    def _weight_near_unknown(self, coarse: Tensor) -> Tensor:
        """Return weights [h,w] that fall with the distance from unknown pixels.

        They are 1 up to half of ``config.change_radius``, then fall linearly, and are 0 beyond ``change_radius``.
        """
        alpha = coarse.numpy(force=True)
        inside = (alpha > 0.5).astype(np.uint8)
        edge = cv2.morphologyEx(inside, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        is_unknown = edge | (np.minimum(alpha, 1.0 - alpha) > self.config.unknown_margin)
        distance = cv2.distanceTransform((~is_unknown).astype(np.uint8), cv2.DIST_L2, 5)
        reach = self.config.change_radius * max(alpha.shape)
        weight = np.clip(2.0 - 2.0 * np.minimum(distance, reach) / reach, 0.0, 1.0).astype(np.float32)
        return torch.from_numpy(weight).to(coarse.device)

    def _correct_alphas(
        self, images: Sequence[ImageU8], coarse: Sequence[Tensor], max_batch: int | None
    ) -> list[Tensor]:
        """Return the corrected alphas [h,w] of images [h,w,3] and their coarse alphas [h,w], on the network's device.

        Images of equal size are in one batch of at most ``max_batch``; None for any number.
        """

        def correct(batch: Sequence[tuple[ImageU8, Tensor]]) -> list[Tensor]:
            height, width = batch[0][1].shape
            below, right = (-length % self.config.multiple for length in (height, width))
            padded = [np.pad(rgb, ((0, below), (0, right), (0, 0)), mode="edge") for rgb, _ in batch]
            image = torch.from_numpy(np.stack(padded)).to(self.output.weight.device).permute(0, 3, 1, 2)
            alpha = torch.stack([alpha for _, alpha in batch])[:, None].to(self.output.weight.device)
            logit = self(image.float().div_(255.0), F.pad(alpha, (0, right, 0, below), mode="replicate"))
            return list(torch.sigmoid(logit)[:, 0, :height, :width])

        return apply_in_batches(correct, list(zip(images, coarse, strict=True)), lambda item: item[1].shape, max_batch)


@dataclass(frozen=True, eq=False)
class _ReducedImage:
    """An image in the first step."""

    rgb: ImageU8
    alpha: Tensor
    """Its coarse alpha, float32 [h,w]."""
    weight: Tensor
    """Fraction of the correction that is applied to each pixel, float32 [h,w] in 0..1."""
    region: tuple[slice, slice]
    """The part that the network sees. It contains all pixels with a weight."""


def enlarge_and_join(x: Tensor, scale: Tensor) -> Tensor:
    """Enlarge features [B,C,h,w] to the nearest [B,C,2h,2w], and append the channels of ``scale`` [B,D,2h,2w].

    Equal to ``torch.cat``, but without a copy of the enlarged features: at the finest scale it is 38 MB.
    """
    is_channels_last = scale.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if is_channels_last else torch.contiguous_format
    channels = x.shape[1]
    size = (len(x), channels + scale.shape[1], *scale.shape[2:])
    joined = torch.empty(size, dtype=scale.dtype, device=scale.device, memory_format=order)
    enlarged = joined[:, :channels].view(*x.shape[:3], 2, x.shape[3], 2)
    enlarged.copy_(x[:, :, :, None, :, None])
    joined[:, channels:] = scale
    return joined


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(ConvReLU(inputs, outputs), ConvReLU(outputs, outputs))


def _make_zero(conv: nn.Conv2d) -> None:
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
