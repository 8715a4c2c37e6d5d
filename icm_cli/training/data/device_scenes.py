"""Scenes made on the training device, for the stage "joint". Experimental: never measured on a GPU.

All images are stored on the device as uint8 and are warped and composited there in batches; the CPU only draws random
numbers. The scenes equal those of :mod:`icm_cli.training.data.scenes`, with two exceptions: foreground colours at soft
edges are estimated by another method, and JPEG compression is reduced to the quantisation of its cosine transform.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from icm_cli.errors import ImageError, TrainingError
from icm_cli.geometry import ImageU8, downscaled_size, resize, round_to_u8
from icm_cli.images.reading import read_image
from icm_cli.training.data.augment import Affine, Rng, draw_cutout_transform, draw_photograph_transform
from icm_cli.training.data.pool import TrainingItem, TrainingPool
from icm_cli.training.data.scenes import (
    MAX_DISTRACTOR_SIDE,
    MAX_OBJECT_SIDE,
    MAX_PLACEMENTS,
    MIN_VISIBLE_FRACTION,
    VISIBLE_U8,
    read_photograph,
)
from icm_cli.training.settings import AugmentConfig, TrainConfig

PYRAMID_LEVELS = 3
"""Number of sizes in which each image is stored, each half as large as the one before."""
THUMBNAIL_PX = 16
"""Side of the thumbnails from which the CPU computes how much of an object is visible."""
CELL_CENTRES = (np.indices((THUMBNAIL_PX, THUMBNAIL_PX)).reshape(2, -1)[::-1].T + 0.5) / THUMBNAIL_PX
"""Centres (x, y) of a thumbnail's cells, as fractions of the image's sides, [T*T,2]."""
EXTRAPOLATION_PX = 4.0
"""Standard deviation of the blur that extrapolates a cut-out's colours beyond its alpha."""
FOREGROUND_RADII = (12, 3)
"""Radii, in px, of the windows in which the foreground colours at soft edges are estimated."""
JPEG_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
"""Quantisation table of luminance (ITU-T T.81, annex K.1)."""
Source = TypeVar("Source")


@dataclass(frozen=True)
class DeviceImages:
    """Images stored on a device, each in the top left corner of a square that is padded by edge replication.

    levels: uint8 [N,4,S,S], [N,4,S/2,S/2] ..., colours and alpha, on the device. On the CPU: sizes, int [N,2], height
    and width of each image in px; boxes, int [N,4], the bounding box of the visible alpha (first and end row, first and
    end column); thumbnails, float32 [N,T,T], mean alphas of the cells of each image.
    """

    levels: tuple[Tensor, ...]
    sizes: NDArray[np.int64]
    boxes: NDArray[np.int64]
    thumbnails: NDArray[np.float32]

    @classmethod
    def upload_layers(
        cls, layers: Sequence[tuple[ImageU8, ImageU8]], side_px: int, device: torch.device
    ) -> DeviceImages:
        """Copy layers, rgb uint8 [h,w,3] and alpha uint8 [h,w] of at most ``side_px``, to a device."""
        squares = torch.empty((len(layers), 4, side_px, side_px), dtype=torch.uint8, device=device)
        sizes, boxes, thumbnails = [], [], []
        for index, (rgb, alpha) in enumerate(layers):
            height, width = alpha.shape
            pad = ((0, side_px - height), (0, side_px - width))
            square = np.concatenate([np.pad(rgb, (*pad, (0, 0)), mode="edge"), np.pad(alpha, pad)[..., None]], axis=-1)
            squares[index] = torch.from_numpy(square.transpose(2, 0, 1)).to(device)
            rows, columns = (np.flatnonzero((alpha > VISIBLE_U8).any(axis=axis)) for axis in (1, 0))
            box = (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) if len(rows) else (0, height, 0, width)
            sizes.append((height, width))
            boxes.append(box)
            thumbnails.append(resize(alpha, (THUMBNAIL_PX, THUMBNAIL_PX)).astype(np.float32) / 255.0)
        levels = [squares]
        for _ in range(PYRAMID_LEVELS - 1):
            halves = [_to_u8(F.avg_pool2d(part.float(), 2)) for part in torch.split(levels[-1], 64)]
            levels.append(torch.cat(halves))
        return cls(tuple(levels), np.array(sizes), np.array(boxes), np.stack(thumbnails))


@dataclass(frozen=True)
class PlacedImage:
    """The index of an image, and the transform ``affine`` from px of the image to px of the canvas."""

    index: int
    affine: Affine


@dataclass(frozen=True)
class ScenePlan:
    """Everything that determines a scene except the pixels of its images; see :class:`DeviceScenes`."""

    target: PlacedImage
    is_cut_out: bool
    behind: PlacedImage | None
    """Background of a composite."""
    distractors: tuple[PlacedImage, ...]
    colours: NDArray[np.float32]
    """Factors of the channels, [3], of saturation, and of contrast."""
    blur_px: float
    noise: float
    """Standard deviation, 0..255."""
    jpeg_quality: int | None
    noise_seed: int


class DeviceScenes:
    """Makes scenes of items, in batches, on a device. They depend only on the arguments and the random generators."""

    def __init__(
        self,
        pool: TrainingPool,
        config: TrainConfig,
        device: torch.device,
        *,
        side_px: int,
        notice: Callable[[str], None],
    ) -> None:
        """Read all images, reduced to at most ``side_px``; report unreadable ones with ``notice``.

        Raises TrainingError if no image can be read.
        """
        self.pool = pool
        self.config = config
        self.device = device
        items = list(pool)
        layers = _read_in_threads(lambda item: _read_item(item, side_px), items, notice)
        self.items = {item: index for index, item in enumerate(layers)}
        if not layers:
            raise TrainingError("no training image could be read; repair the data, or exclude files with 'exclude'")
        self.images = DeviceImages.upload_layers(list(layers.values()), side_px, device)
        backgrounds = _read_in_threads(lambda path: _read_background(path, side_px), list(pool.backgrounds), notice)
        self.backgrounds = (
            DeviceImages.upload_layers(list(backgrounds.values()), side_px, device) if backgrounds else None
        )

    def plan_scene(self, item: TrainingItem, canvas_px: int, rng: Rng) -> ScenePlan:
        """Draw a scene of an item as a target or a reference, with random distractors."""
        pairs, augment = self.config.pairs, self.config.augment
        index = self.items[item]
        can_composite = self.backgrounds is not None and not item.is_binary
        is_cut_out = item.is_foreground or (can_composite and rng.random() < pairs.composite_probability)
        behind = None
        if is_cut_out and self.backgrounds is not None:
            behind = self._place_background(canvas_px, rng)
        target = self._place_image(index, canvas_px, rng, largest=MAX_OBJECT_SIDE if is_cut_out else None)
        distractors = []
        if rng.random() < pairs.distractor_probability and pairs.max_distractors:
            for _ in range(int(rng.integers(1, pairs.max_distractors + 1))):
                other = self.pool.draw_negative(item, rng, for_cutout=True)
                if other is not None and other in self.items:
                    placed = self._place_image(self.items[other], canvas_px, rng, largest=MAX_DISTRACTOR_SIDE)
                    distractors.append(placed)
        return ScenePlan(target, is_cut_out, behind, tuple(distractors), *_draw_augmentation(augment, rng))

    @torch.no_grad()
    def render_scenes(self, plans: Sequence[ScenePlan], canvas_px: int) -> tuple[Tensor, Tensor, Tensor]:
        """Render scenes; return image uint8 [N,3,S,S], alpha uint8 [N,S,S], valid bool [N,S,S], on the device."""
        rgb, alpha, valid = self._warp_images(self.images, [plan.target for plan in plans], canvas_px)
        composites = [i for i, plan in enumerate(plans) if plan.behind is not None]
        if composites and self.backgrounds is not None:
            placed = [behind for plan in plans if (behind := plan.behind) is not None]
            background, _, _ = self._warp_images(self.backgrounds, placed, canvas_px)
            at = torch.tensor(composites, device=self.device)
            rgb[at] = composite_over(rgb[at], alpha[at], background)
            valid[at] = True
        for number in range(max((len(plan.distractors) for plan in plans), default=0)):
            chosen = [i for i, plan in enumerate(plans) if len(plan.distractors) > number]
            placed = [plans[i].distractors[number] for i in chosen]
            colour, weight, _ = self._warp_images(self.images, placed, canvas_px)
            at = torch.tensor(chosen, device=self.device)
            before = alpha[at]
            hidden = (before * weight).sum(dim=(1, 2, 3)) / before.sum(dim=(1, 2, 3)).clamp(min=1.0)
            weight = weight * (hidden <= (1 - MIN_VISIBLE_FRACTION) / 2)[:, None, None, None]
            rgb[at] = composite_over(colour, weight, rgb[at])
            alpha[at] = before * (1 - weight)
        image = self._augment_colours(rgb, plans)
        return _to_u8(image), _to_u8(alpha[:, 0] * 255.0), valid

    def _place_image(self, index: int, canvas_px: int, rng: Rng, *, largest: float | None) -> PlacedImage:
        """Place an image (or with ``largest`` its cut-out object) at random, so that enough of the object is visible.

        If no random transform succeeds, the image fits the canvas.
        """
        augment, images = self.config.augment, self.images
        height, width = (int(each) for each in images.sizes[index])
        top, bottom, left, right = (int(each) for each in images.boxes[index])
        for _ in range(MAX_PLACEMENTS):
            if largest is None:
                affine = draw_photograph_transform((height, width), canvas_px, augment, rng)
            else:
                affine = draw_cutout_transform((bottom - top, right - left), canvas_px, augment, rng, largest)
                affine[:, 2] -= affine[:, :2] @ [left, top]
            if self._visible_fraction(index, affine, canvas_px) >= MIN_VISIBLE_FRACTION:
                return PlacedImage(index, affine)
        scale = canvas_px / max(height, width)
        return PlacedImage(index, np.array([[scale, 0.0, 0.0], [0.0, scale, 0.0]]))

    def _visible_fraction(self, index: int, affine: Affine, canvas_px: int) -> float:
        """Fraction of an object that is on the canvas."""
        height, width = self.images.sizes[index]
        weight = self.images.thumbnails[index]
        x, y = (CELL_CENTRES * [width, height]).T
        on_canvas = affine[:, :2] @ np.stack([x, y]) + affine[:, 2:]
        inside = ((on_canvas >= 0) & (on_canvas <= canvas_px)).all(axis=0)
        return float((weight.ravel() * inside).sum() / max(1e-6, float(weight.sum())))

    def _place_background(self, canvas_px: int, rng: Rng) -> PlacedImage:
        """Draw a background and a square part of it, which covers the canvas."""
        assert self.backgrounds is not None
        index = int(rng.integers(len(self.backgrounds.sizes)))
        height, width = (int(each) for each in self.backgrounds.sizes[index])
        crop_side = min(height, width) * rng.uniform(0.5, 1.0)
        top, left = (rng.uniform(0.0, length - crop_side) for length in (height, width))
        scale = canvas_px / crop_side
        mirror = -1.0 if rng.random() < self.config.augment.flip else 1.0
        x = -left * scale if mirror > 0 else canvas_px + left * scale
        return PlacedImage(index, np.array([[mirror * scale, 0.0, x], [0.0, scale, -top * scale]]))

    def _warp_images(
        self, images: DeviceImages, placed: Sequence[PlacedImage], canvas_px: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Warp images to the canvas.

        Returns rgb float32 [N,3,S,S] 0..255, alpha float32 [N,1,S,S] 0..1, and valid bool [N,S,S], True where the image
        covers the canvas.
        """
        count = len(placed)
        rgba = torch.empty((count, 4, canvas_px, canvas_px), device=self.device)
        inside = torch.empty((count, canvas_px, canvas_px), dtype=torch.bool, device=self.device)
        levels = np.array([_pyramid_level(each.affine) for each in placed])
        for level in np.unique(levels):
            chosen = np.flatnonzero(levels == level).tolist()
            affines = np.stack([placed[i].affine for i in chosen])
            indices = torch.tensor([placed[i].index for i in chosen], device=self.device)
            sizes = torch.from_numpy(images.sizes[[placed[i].index for i in chosen]]).to(self.device)
            at = torch.tensor(chosen, device=self.device)
            source = images.levels[level]
            points = self._source_points(affines, canvas_px)  # [n,S,S,2] x, y in px of the image
            grid = points * (2.0 / images.levels[0].shape[-1]) - 1.0
            rgba[at] = F.grid_sample(
                source[indices].float(), grid, mode="bilinear", padding_mode="border", align_corners=False
            )
            limits = sizes.flip(1)[:, None, None].float()
            inside[at] = ((points >= 0) & (points <= limits)).all(dim=-1)
        alpha = rgba[:, 3:] / 255.0 * inside[:, None]
        return rgba[:, :3], alpha, inside

    def _source_points(self, affines: NDArray[np.float64], canvas_px: int) -> Tensor:
        """Return for each px of the canvas the point (x, y) of each image, in px, that maps to it: [n,S,S,2]."""
        linear = np.linalg.inv(affines[:, :, :2])
        offset = -linear @ affines[:, :, 2:]
        inverse = torch.from_numpy(np.concatenate([linear, offset], axis=-1)).float().to(self.device)
        centres = torch.arange(canvas_px, device=self.device, dtype=torch.float32) + 0.5
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        x_factor, y_factor, shift = inverse[:, None, None].unbind(-1)
        # (not a matrix product, whose order of summation depends on the number of scenes)
        return x_factor * x[..., None] + y_factor * y[..., None] + shift

    def _augment_colours(self, rgb: Tensor, plans: Sequence[ScenePlan]) -> Tensor:
        """Apply colours, blur, noise and compression of the plans; float32 [N,3,S,S] 0..255."""
        colours = torch.from_numpy(np.stack([plan.colours for plan in plans])).to(self.device)[..., None, None]
        image = rgb * colours[:, :3]
        grey = image.mean(dim=1, keepdim=True)
        image = grey + (image - grey) * colours[:, 3:4]
        mean = image.mean(dim=(1, 2, 3), keepdim=True)
        image = (mean + (image - mean) * colours[:, 4:5]).clamp(0, 255)
        for i, plan in enumerate(plans):
            if plan.blur_px:
                image[i] = _gaussian_blur(image[i : i + 1], plan.blur_px)[0]
            if plan.noise:
                drawn = torch.Generator(self.device).manual_seed(plan.noise_seed)
                noise = torch.randn(image[i].shape, generator=drawn, device=self.device)
                image[i] = (image[i] + noise * plan.noise).clamp(0, 255)
        compressed = [i for i, plan in enumerate(plans) if plan.jpeg_quality is not None]
        if compressed and not image.shape[-1] % 8:
            at = torch.tensor(compressed, device=self.device)
            qualities = [quality for plan in plans if (quality := plan.jpeg_quality) is not None]
            image[at] = _quantise_jpeg(image[at], torch.tensor(qualities, device=self.device))
        return image


def composite_over(colour: Tensor, alpha: Tensor, behind: Tensor) -> Tensor:
    """Composite objects onto scenes; colours [N,3,S,S] 0..255, alpha [N,1,S,S] 0..1.

    The foreground colours at soft edges are estimated by means over windows (Forte and Pitie, "F, B, Alpha Matting",
    2020; Forte, "Approximate Fast Foreground Colour Estimation", 2021).
    """
    foreground, background = colour, colour
    for radius in FOREGROUND_RADII:
        foreground, background = _estimate_colours(colour, alpha, foreground, background, radius)
    return foreground * alpha + behind * (1 - alpha)


def _estimate_colours(
    colour: Tensor, alpha: Tensor, foreground: Tensor, background: Tensor, radius: int
) -> tuple[Tensor, Tensor]:
    """Return improved estimates of foreground and background, [N,3,S,S]: one step of blur fusion."""
    weight, rest = _box_blur(alpha, radius), _box_blur(1 - alpha, radius)
    mean_foreground = _box_blur(foreground * alpha, radius) / (weight + 1e-5)
    mean_background = _box_blur(background * (1 - alpha), radius) / (rest + 1e-5)
    exact = mean_foreground + alpha * (colour - alpha * mean_foreground - (1 - alpha) * mean_background)
    return exact.clamp(0, 255), mean_background


def _box_blur(x: Tensor, radius: int) -> Tensor:
    """Return means over squares of 2 radius + 1 px, computed along rows and then along columns."""
    side = 2 * radius + 1
    rows = F.avg_pool2d(x, (1, side), 1, (0, radius), count_include_pad=False)
    return F.avg_pool2d(rows, (side, 1), 1, (radius, 0), count_include_pad=False)


def _gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Blur images, [N,C,H,W], by a Gaussian."""
    reach = max(1, round(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(x.shape[1], 1, 1, 1)
    padded = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, kernel, groups=x.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=x.shape[1])


def _quantise_jpeg(image: Tensor, quality: Tensor) -> Tensor:
    """Degrade images, [N,3,S,S] 0..255, like JPEG at qualities [N]: round the cosine coefficients of 8 px blocks."""
    n = torch.arange(8, device=image.device, dtype=torch.float32)
    basis = torch.cos((2 * n[None] + 1) * n[:, None] * torch.pi / 16) * 0.5
    basis[0] /= 2**0.5
    scale = torch.where(quality < 50, 5000.0 / quality, 200.0 - 2.0 * quality) / 100.0
    table = torch.tensor(JPEG_LUMINANCE, device=image.device, dtype=torch.float32)
    steps = (table * scale[:, None, None]).clamp(min=1.0)[:, None, None, None]
    cells = image.shape[-1] // 8
    blocks = (image - 128.0).reshape(*image.shape[:2], cells, 8, cells, 8).transpose(3, 4)  # [N,3,S/8,S/8,8,8]
    coefficients = basis @ blocks @ basis.T
    blocks = basis.T @ (torch.round(coefficients / steps) * steps) @ basis
    return (blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3) + 128.0).clamp(0, 255)


def _pyramid_level(affine: Affine) -> int:
    """Return the pyramid level that a transform reduces least and enlarges at most slightly."""
    scale = float(np.sqrt(abs(np.linalg.det(affine[:, :2]))))
    return int(np.clip(np.floor(np.log2(1.4 / max(1e-6, scale))), 0, PYRAMID_LEVELS - 1))


def _draw_augmentation(augment: AugmentConfig, rng: Rng) -> tuple[NDArray[np.float32], float, float, int | None, int]:
    """Draw colour factors, blur, noise, JPEG quality and the seed of the noise."""
    brightness, contrast, saturation = 1 + rng.uniform(-1, 1, 3) * augment.colour
    balance = 1 + rng.uniform(-1, 1, 3) * augment.colour / 3
    colours = np.array([*(brightness * balance), saturation, contrast], np.float32)
    blur = float(rng.uniform(0.4, 1.6)) if rng.random() < augment.blur else 0.0
    noise = float(rng.uniform(1, 10)) if rng.random() < augment.noise else 0.0
    quality = int(rng.integers(40, 95)) if rng.random() < augment.jpeg else None
    return colours, blur, noise, quality, int(rng.integers(2**31))


def _to_u8(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def _read_item(item: TrainingItem, side_px: int) -> tuple[ImageU8, ImageU8]:
    """Read image and alpha of an item; outside a cut-out, where it has no colour, its colours are extrapolated."""
    layer = read_photograph(item, side_px)
    if not item.is_foreground:
        return layer.rgb, layer.alpha
    weight = layer.alpha.astype(np.float32) / 255.0
    sums, weights = (cv2.GaussianBlur(x, (0, 0), EXTRAPOLATION_PX) for x in (layer.rgb * weight[..., None], weight))
    around = sums / (weights[..., None] + 1e-4)
    return round_to_u8(np.where(weight[..., None] > 0, layer.rgb, around).astype(np.float32)), layer.alpha


def _read_background(path: Path, side_px: int) -> tuple[ImageU8, ImageU8]:
    rgb = read_image(path).rgb
    small = resize(rgb, downscaled_size(rgb.shape[:2], side_px))
    return small, np.full(small.shape[:2], 255, np.uint8)


def _read_in_threads(
    read: Callable[[Source], tuple[ImageU8, ImageU8]], sources: Sequence[Source], notice: Callable[[str], None]
) -> dict[Source, tuple[ImageU8, ImageU8]]:
    """Read the layers of all sources; report those that cannot be read with ``notice``."""

    def try_reading(source: Source) -> tuple[ImageU8, ImageU8] | str:
        try:
            return read(source)
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = list(threads.map(try_reading, sources))
    for each in found:
        if isinstance(each, str):
            notice(f"skipped: {each}")
    return {source: each for source, each in zip(sources, found, strict=True) if not isinstance(each, str)}
