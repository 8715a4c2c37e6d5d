"""Refining network: computes a fine alpha from an image and a coarse alpha. It does not see the references.

The same network runs in two steps, as in CascadePSP (Cheng et al., CVPR 2020). The first one runs on the image at
``RefineConfig.frame_px``, where a coarse alpha of a few hundred tokens becomes an outline. For larger sources, the
second one runs on tiles at the size of the source, where that outline becomes an edge. Both steps omit the parts of the
image in which the alpha cannot change.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.config import check_setting
from icm_cli.geometry import ImageU8, downscaled_size, resize
from icm_cli.model.alphas import apply_in_batches, blend_tiles, max_batch_size, resize_alpha, split_into_tiles
from icm_cli.model.contracts import Edges

UNSHUFFLE = 2
"""Side of the square of pixels that becomes channels in the first layer."""
TILES_PER_BATCH = 4
"""Tiles of one image that are refined at a time."""


@dataclass(frozen=True)
class RefineConfig:
    """Settings of the refining network."""

    widths: tuple[int, ...] = (32, 48, 64, 96, 128)
    """Channels of each scale; the first has half the size of the image, and each other half the size of the one before.
    """
    detail_blocks: int = 0
    """Number of residual blocks before the output, at half the size of the image."""
    frame_px: int = 1024
    """Long side, in px, of the image in the first step."""
    context_px: int = 32
    """Distance from the pixels that may change, in px, up to which the first step sees the image."""
    tile_px: int = 256
    """Side, in px, of the tiles of a larger source."""
    overlap_px: int = 32
    """Overlap of tiles, in px, over which they are blended."""
    logit_eps: float = 0.02
    """Smallest distance of a coarse alpha from 0 and 1 before its logit is taken, so that the network can override it.
    """
    unknown_margin: float = 0.05
    """A pixel is unknown if its coarse alpha is further than this from 0 and 1."""
    change_radius: float = 0.06
    """The coarse alpha is not changed further from unknown pixels than this fraction of the long side.

    Edges of the image there belong to other objects.
    """
    core_distance: float = 0.015
    """Further from edges than this fraction of the long side, alphas become 1 or 0; 0 disables it."""
    core_long_side_px: int = 640
    """Long side, in px, of the alpha in which these distances are measured."""
    core_opaque_from: float = 0.8
    """Alphas from this value on become 1 far inside the object."""
    core_transparent_to: float = 0.15
    """Alphas up to this value become 0 far outside the object."""
    core_softness: float = 0.3
    """``core_opaque_from`` applies fully where all alphas nearby are above 0.5 + this; ``core_transparent_to``
    where all are below 0.5 - this. If alphas nearby are closer to 0.5, they apply in part."""
    decided_margin: float = 0.01
    """A tile is not changed if all its alphas are within this distance of 0, or all within this distance of 1."""

    def __post_init__(self) -> None:
        multiple, widths = self.multiple, self.widths
        checks = {
            "widths": (len(widths) >= 2 and min(widths) >= 1, "two or more numbers of 1 or more"),
            "frame_px": (self.frame_px >= multiple and not self.frame_px % multiple, f"a multiple of {multiple}"),
            "context_px": (self.context_px >= 0, "0 or more"),
            "tile_px": (self.tile_px >= multiple and not self.tile_px % multiple, f"a multiple of {multiple}"),
            "overlap_px": (0 <= self.overlap_px <= self.tile_px // 2, "0 to half of tile_px"),
            "detail_blocks": (0 <= self.detail_blocks <= 64, "0 to 64"),
            "logit_eps": (0 < self.logit_eps < 0.5, "more than 0 and less than 0.5"),
            "unknown_margin": (0 <= self.unknown_margin < 0.5, "0 to below 0.5"),
            "change_radius": (0 < self.change_radius <= 2, "more than 0 and at most 2"),
            "core_distance": (0 <= self.core_distance <= 0.25, "0 to 0.25"),
            "core_long_side_px": (self.core_long_side_px >= 1, "1 or more"),
            "core_opaque_from": (0.5 < self.core_opaque_from <= 1, "more than 0.5 and at most 1"),
            "core_transparent_to": (0 <= self.core_transparent_to < 0.5, "0 to below 0.5"),
            "core_softness": (0 < self.core_softness <= 0.5, "more than 0 and at most 0.5"),
            "decided_margin": (0 <= self.decided_margin < 0.5, "0 to below 0.5"),
        }
        for name, (is_valid, expected) in checks.items():
            check_setting("edges", self, name, is_valid, expected)

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
        out: Tensor = x + self.second(self.first(x))
        return out


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
            nn.Sequential(ConvReLU(before, after, stride=2), _convolutions(after, after))
            for before, after in itertools.pairwise(widths)
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
        for step, fine in zip(reversed(self.up), reversed(scales), strict=True):
            x = step(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), fine], dim=1))
        return logit + F.pixel_shuffle(self.output(self.details(x)), UNSHUFFLE).float()

    @torch.inference_mode()
    def refine_alphas(self, images: Sequence[ImageU8], coarse: Sequence[Tensor]) -> list[Tensor]:
        undecided = [index for index, alpha in enumerate(coarse) if self._is_undecided(alpha)]
        # First step: all images at a reduced size, only near unknown pixels.
        sizes = [downscaled_size(images[index].shape[:2], self.config.frame_px) for index in undecided]
        outlines = [resize_alpha(coarse[index].float(), size) for index, size in zip(undecided, sizes, strict=True)]
        weights = [self._weight_near_unknown(outline) for outline in outlines]
        regions = [self._changed_region(weight) for weight in weights]
        pixels = [resize(images[index], size) for index, size in zip(undecided, sizes, strict=True)]
        corrected = self._correct_alphas(
            [rgb[region] for rgb, region in zip(pixels, regions, strict=True)],
            [outline[region] for outline, region in zip(outlines, regions, strict=True)],
            max_batch_size(self.output.weight.device),
        )
        # Second step: each larger image in tiles, at its own size.
        refined = {}
        for index, outline, weight, region, after in zip(undecided, outlines, weights, regions, corrected, strict=True):
            outline = outline.clone()  # it may be the coarse alpha itself
            outline[region] += weight[region] * (after - outline[region])
            size = images[index].shape[0], images[index].shape[1]
            if size != tuple(outline.shape):
                outline = self._refine_tiles(images[index], resize_alpha(outline, size), resize_alpha(weight, size))
            refined[index] = self._clear_core(outline)
        return [
            refined[index] if index in refined else resize_alpha(alpha.float(), images[index].shape[:2])
            for index, alpha in enumerate(coarse)
        ]

    def _changed_region(self, weight: Tensor) -> tuple[slice, slice]:
        """Return the smallest region with all positive weights [h,w] and ``context_px`` around them.

        It begins and ends at multiples of ``config.multiple``, or at the border of the image, so that few sizes of
        regions occur.
        """
        rows, columns = (self._extend_range((weight > 0).any(dim=axis)) for axis in (1, 0))
        return rows, columns

    def _extend_range(self, is_changed: Tensor) -> slice:
        """Return the range of the positions that change, bool [n], with their context."""
        positions, multiple = is_changed.nonzero()[:, 0].tolist() or [0], self.config.multiple
        start, end = positions[0] - self.config.context_px, positions[-1] + 1 + self.config.context_px
        return slice(max(0, start // multiple * multiple), min(len(is_changed), -(-end // multiple) * multiple))

    def _refine_tiles(self, rgb: ImageU8, alpha: Tensor, weight: Tensor) -> Tensor:
        """Refine an alpha [H,W] in overlapping tiles, except tiles without unknown pixels, by at most ``weight``."""
        size = (alpha.shape[0], alpha.shape[1])
        tiles = split_into_tiles(size, self.config.tile_px, self.config.overlap_px)
        is_changed = [bool(weight[tile.slices].any()) and self._is_undecided(alpha[tile.slices]) for tile in tiles]
        changed = list(itertools.compress(tiles, is_changed))
        batches = (changed[start : start + TILES_PER_BATCH] for start in range(0, len(changed), TILES_PER_BATCH))
        corrected = itertools.chain.from_iterable(
            self._correct_alphas([rgb[tile.slices] for tile in batch], [alpha[tile.slices] for tile in batch], None)
            for batch in batches
        )
        refined = (
            alpha[tile.slices] + weight[tile.slices] * (next(corrected) - alpha[tile.slices])
            if change
            else alpha[tile.slices]
            for tile, change in zip(tiles, is_changed, strict=True)
        )
        return blend_tiles(size, tiles, refined, alpha.device)

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
        smallest, largest = (cv2.blur(extreme(small, disc), (reach, reach)) for extreme in (cv2.erode, cv2.dilate))
        inside, outside = (
            np.clip((value - 0.5) / config.core_softness, 0.0, 1.0).astype(np.float32)
            for value in (smallest, 1.0 - largest)
        )
        high, low = (
            resize_alpha(torch.from_numpy(limit).to(alpha.device), alpha.shape)
            for limit in (1.0 - (1.0 - config.core_opaque_from) * inside, config.core_transparent_to * outside)
        )
        return alpha.sub_(low).div_(high.sub_(low)).clamp_(0.0, 1.0)

    def _is_undecided(self, coarse: Tensor) -> bool:
        """Return whether a coarse alpha needs refinement: it is not nearly 0 everywhere, nor nearly 1 everywhere."""
        distance = torch.minimum(coarse, 1.0 - coarse).max()
        return bool(distance > self.config.decided_margin) or bool(coarse.min() < 0.5 < coarse.max())

    def _weight_near_unknown(self, coarse: Tensor) -> Tensor:
        """Return weights [h,w]: 1 near unknown pixels, falling to 0 at ``config.change_radius``."""
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
        """Run the network on images [h,w,3] and coarse alphas [h,w] of the same sizes."""

        def correct(batch: Sequence[tuple[ImageU8, Tensor]]) -> list[Tensor]:
            height, width = batch[0][1].shape
            below, right = (-length % self.config.multiple for length in (height, width))
            padded = [np.pad(rgb, ((0, below), (0, right), (0, 0)), mode="edge") for rgb, _ in batch]
            image = torch.from_numpy(np.stack(padded)).to(self.output.weight.device).permute(0, 3, 1, 2)
            alpha = torch.stack([alpha for _, alpha in batch])[:, None].to(self.output.weight.device)
            logit = self(image.float() / 255.0, F.pad(alpha, (0, right, 0, below), mode="replicate"))
            return list(torch.sigmoid(logit)[:, 0, :height, :width])

        return apply_in_batches(correct, list(zip(images, coarse, strict=True)), lambda item: item[1].shape, max_batch)


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(ConvReLU(inputs, outputs), ConvReLU(outputs, outputs))


def _make_zero(conv: nn.Conv2d) -> None:
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
