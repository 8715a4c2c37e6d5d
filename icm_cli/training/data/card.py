"""Scenes made on the device that trains: all pictures lie there as uint8, and are warped and composed in batches.

They are those that :mod:`icm_cli.training.data.scenes` makes one by one on a CPU, but for two things: the colours under
soft edges are estimated in another way, and the damage of JPEG is that of its cosine transform alone. The CPU draws
numbers and touches no pixel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
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
from icm_cli.training.data.augment import Affine, Rng, place_cutout, place_photograph
from icm_cli.training.data.layers import VISIBLE_U8, photograph
from icm_cli.training.data.pool import Item, Pool
from icm_cli.training.data.scenes import LARGEST_DISTRACTOR, LARGEST_THING, LEAST_VISIBLE, TRIES
from icm_cli.training.settings import AugmentConfig, TrainConfig

LEVELS = 3
"""Sizes of every picture on the device, each half the one before: what is shrunk is taken from the nearest."""
THUMBNAIL = 16
"""Side of the coarse alphas that tell, on the CPU, how much of a thing a placement leaves in sight."""
SPREAD_PX = 4.0
"""Standard deviation of the blur that carries a cut-out's colours beyond its alpha."""
FOREGROUND_RADII = (12, 3)
"""Radii, in px, of the windows in which the colours under soft edges are estimated."""
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
Made = TypeVar("Made")


@dataclass(frozen=True)
class CardPictures:
    """Pictures in the first corner of squares, their edges repeated beyond it.

    levels: uint8 [N,4,S,S], [N,4,S/2,S/2] ..., colours and alpha; sizes: int [N,2], height and width of each in px;
    boxes: int [N,4], first and last row and column of what is visible of the alpha; thumbnails: float32 [N,T,T], mean
    alphas of the cells of each picture. All but the levels lie on the CPU.
    """

    levels: tuple[Tensor, ...]
    sizes: NDArray[np.int64]
    boxes: NDArray[np.int64]
    thumbnails: NDArray[np.float32]

    @classmethod
    def of(cls, layers: Sequence[tuple[ImageU8, ImageU8]], side_px: int, device: torch.device) -> CardPictures:
        """Bring layers, rgb uint8 [h,w,3] and alpha uint8 [h,w] of at most ``side_px``, to a device."""
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
            thumbnails.append(resize(alpha, (THUMBNAIL, THUMBNAIL)).astype(np.float32) / 255.0)
        levels = [squares]
        for _ in range(LEVELS - 1):
            levels.append(torch.cat([_halved(part) for part in torch.split(levels[-1], 64)]))
        return cls(tuple(levels), np.array(sizes), np.array(boxes), np.stack(thumbnails))


@dataclass(frozen=True)
class Placed:
    """A picture, by its number, and where it lies: ``affine`` from px of the picture to px of the canvas."""

    index: int
    affine: Affine


@dataclass(frozen=True)
class ScenePlan:
    """All that decides a scene but its pixels; see :class:`CardScenes`."""

    thing: Placed
    is_cut_out: bool
    behind: Placed | None
    """Background of what is cut out."""
    distractors: tuple[Placed, ...]
    colours: NDArray[np.float32]
    """Factors of each channel, [3], then of saturation and contrast."""
    blur_px: float
    noise: float
    """Standard deviation, 0..255."""
    jpeg_quality: int | None
    noise_seed: int


class CardScenes:
    """Makes views of items, in batches, on a device; what it is given and the generators decide every pixel."""

    def __init__(
        self, pool: Pool, config: TrainConfig, device: torch.device, *, side_px: int, notice: Callable[[str], None]
    ) -> None:
        """Read all pictures, at most ``side_px`` large, with ``notice`` for those that cannot be read.

        Raises TrainingError where none can.
        """
        self.pool = pool
        self.config = config
        self.device = device
        items = list(pool)
        layers = _in_threads(lambda item: _layer(item, side_px), items, notice)
        self.items = {item: index for index, item in enumerate(layers)}
        if not layers:
            raise TrainingError("no picture could be read; mend the data, or leave files out with 'exclude'")
        self.pictures = CardPictures.of(list(layers.values()), side_px, device)
        backdrops = _in_threads(lambda path: _backdrop(path, side_px), list(pool.backgrounds), notice)
        self.backdrops = CardPictures.of(list(backdrops.values()), side_px, device) if backdrops else None

    def plan(self, item: Item, canvas_px: int, rng: Rng) -> ScenePlan:
        """Draw an item's scene as a target or a reference shows it, other things in it at times."""
        pairs, augment = self.config.pairs, self.config.augment
        index = self.items[item]
        can_move = self.backdrops is not None and not item.is_binary
        is_cut_out = item.is_foreground or (can_move and rng.random() < pairs.composite_share)
        behind = None
        if is_cut_out and self.backdrops is not None:
            behind = self._backdrop(canvas_px, rng)
        thing = self._placed(index, canvas_px, rng, largest=LARGEST_THING if is_cut_out else None)
        others = []
        if rng.random() < pairs.distractor_share and pairs.distractors:
            for _ in range(int(rng.integers(1, pairs.distractors + 1))):
                other = self.pool.stranger(item, rng, cuttable=True)
                if other is not None and other in self.items:
                    others.append(self._placed(self.items[other], canvas_px, rng, largest=LARGEST_DISTRACTOR))
        return ScenePlan(thing, is_cut_out, behind, tuple(others), *_finish(augment, rng))

    @torch.no_grad()
    def views(self, plans: Sequence[ScenePlan], canvas_px: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scenes: image uint8 [N,3,S,S], alpha uint8 [N,S,S], valid bool [N,S,S], on the device."""
        rgb, alpha, valid = self._warped(self.pictures, [plan.thing for plan in plans], canvas_px)
        cut = [i for i, plan in enumerate(plans) if plan.behind is not None]
        if cut and self.backdrops is not None:
            places = [behind for plan in plans if (behind := plan.behind) is not None]
            backdrop, _, _ = self._warped(self.backdrops, places, canvas_px)
            at = torch.tensor(cut, device=self.device)
            rgb[at] = over(rgb[at], alpha[at], backdrop)
            valid[at] = True
        for number in range(max((len(plan.distractors) for plan in plans), default=0)):
            with_one = [i for i, plan in enumerate(plans) if len(plan.distractors) > number]
            placed = [plans[i].distractors[number] for i in with_one]
            colour, weight, _ = self._warped(self.pictures, placed, canvas_px)
            at = torch.tensor(with_one, device=self.device)
            before = alpha[at]
            hidden = (before * weight).sum(dim=(1, 2, 3)) / before.sum(dim=(1, 2, 3)).clamp(min=1.0)
            weight = weight * (hidden <= (1 - LEAST_VISIBLE) / 2)[:, None, None, None]
            rgb[at] = over(colour, weight, rgb[at])
            alpha[at] = before * (1 - weight)
        image = self._finished(rgb, plans)
        return _to_u8(image), _to_u8(alpha[:, 0] * 255.0), valid

    def _placed(self, index: int, canvas_px: int, rng: Rng, *, largest: float | None) -> Placed:
        """A picture, or with ``largest`` what is cut out of it, where enough of the thing is in sight."""
        augment, pictures = self.config.augment, self.pictures
        height, width = (int(each) for each in pictures.sizes[index])
        top, bottom, left, right = (int(each) for each in pictures.boxes[index])
        for _ in range(TRIES):
            if largest is None:
                affine = place_photograph((height, width), canvas_px, augment, rng)
            else:
                affine = place_cutout((bottom - top, right - left), canvas_px, augment, rng, largest)
                affine[:, 2] -= affine[:, :2] @ [left, top]
            if self._share_in_sight(index, affine, canvas_px) >= LEAST_VISIBLE:
                return Placed(index, affine)
        scale = canvas_px / max(height, width)
        return Placed(index, np.array([[scale, 0.0, 0.0], [0.0, scale, 0.0]]))

    def _share_in_sight(self, index: int, affine: Affine, canvas_px: int) -> float:
        """Share of a thing that lies on the canvas."""
        height, width = self.pictures.sizes[index]
        weight = self.pictures.thumbnails[index]
        x, y = (self._cells * [width, height]).T
        on_canvas = affine[:, :2] @ np.stack([x, y]) + affine[:, 2:]
        inside = ((on_canvas >= 0) & (on_canvas <= canvas_px)).all(axis=0)
        return float((weight.ravel() * inside).sum() / max(1e-6, float(weight.sum())))

    @cached_property
    def _cells(self) -> NDArray[np.float64]:
        """Centres (x, y) of a thumbnail's cells, in sides of the picture."""
        y, x = np.mgrid[:THUMBNAIL, :THUMBNAIL]
        return (np.stack([x.ravel(), y.ravel()], axis=-1) + 0.5) / THUMBNAIL

    def _backdrop(self, canvas_px: int, rng: Rng) -> Placed:
        """A square part of a picture, over the whole canvas."""
        assert self.backdrops is not None
        index = int(rng.integers(len(self.backdrops.sizes)))
        height, width = (int(each) for each in self.backdrops.sizes[index])
        part = min(height, width) * rng.uniform(0.5, 1.0)
        top, left = (rng.uniform(0.0, length - part) for length in (height, width))
        scale = canvas_px / part
        mirror = -1.0 if rng.random() < self.config.augment.flip else 1.0
        x = -left * scale if mirror > 0 else canvas_px + left * scale
        return Placed(index, np.array([[mirror * scale, 0.0, x], [0.0, scale, -top * scale]]))

    def _warped(
        self, pictures: CardPictures, placed: Sequence[Placed], canvas_px: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """rgb float32 [N,3,S,S] 0..255, alpha float32 [N,1,S,S] 0..1, and valid bool [N,S,S]: where a picture is."""
        count = len(placed)
        rgba = torch.empty((count, 4, canvas_px, canvas_px), device=self.device)
        inside = torch.empty((count, canvas_px, canvas_px), dtype=torch.bool, device=self.device)
        levels = np.array([_level(each.affine) for each in placed])
        for level in np.unique(levels):
            chosen = np.flatnonzero(levels == level).tolist()
            affines = np.stack([placed[i].affine for i in chosen])
            indices = torch.tensor([placed[i].index for i in chosen], device=self.device)
            sizes = torch.from_numpy(pictures.sizes[[placed[i].index for i in chosen]]).to(self.device)
            at = torch.tensor(chosen, device=self.device)
            source = pictures.levels[level]
            points = self._points(affines, canvas_px)  # [n,S,S,2] x, y in px of the whole picture
            grid = points * (2.0 / pictures.levels[0].shape[-1]) - 1.0
            rgba[at] = F.grid_sample(
                source[indices].float(), grid, mode="bilinear", padding_mode="border", align_corners=False
            )
            limits = sizes.flip(1)[:, None, None].float()
            inside[at] = ((points >= 0) & (points <= limits)).all(dim=-1)
        alpha = rgba[:, 3:] / 255.0 * inside[:, None]
        return rgba[:, :3], alpha, inside

    def _points(self, affines: NDArray[np.float64], canvas_px: int) -> Tensor:
        """Places [n,S,S,2] in the pictures, (x, y) in their px, of each px of the canvas."""
        linear = np.linalg.inv(affines[:, :, :2])
        moved = -linear @ affines[:, :, 2:]
        back = torch.from_numpy(np.concatenate([linear, moved], axis=-1)).float().to(self.device)
        centres = torch.arange(canvas_px, device=self.device, dtype=torch.float32) + 0.5
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        of_x, of_y, shift = back[:, None, None].unbind(-1)
        # (not as a product of matrices, whose sums are in another order for another number of scenes)
        return of_x * x[..., None] + of_y * y[..., None] + shift

    def _finished(self, rgb: Tensor, plans: Sequence[ScenePlan]) -> Tensor:
        """With the colours and the damage of the augmentation; float32 [N,3,S,S] 0..255."""
        colours = torch.from_numpy(np.stack([plan.colours for plan in plans])).to(self.device)[..., None, None]
        image = rgb * colours[:, :3]
        grey = image.mean(dim=1, keepdim=True)
        image = grey + (image - grey) * colours[:, 3:4]
        mean = image.mean(dim=(1, 2, 3), keepdim=True)
        image = (mean + (image - mean) * colours[:, 4:5]).clamp(0, 255)
        for i, plan in enumerate(plans):
            if plan.blur_px:
                image[i] = _blurred(image[i : i + 1], plan.blur_px)[0]
            if plan.noise:
                drawn = torch.Generator(self.device).manual_seed(plan.noise_seed)
                noise = torch.randn(image[i].shape, generator=drawn, device=self.device)
                image[i] = (image[i] + noise * plan.noise).clamp(0, 255)
        coded = [i for i, plan in enumerate(plans) if plan.jpeg_quality is not None]
        if coded and not image.shape[-1] % 8:
            at = torch.tensor(coded, device=self.device)
            qualities = [quality for plan in plans if (quality := plan.jpeg_quality) is not None]
            image[at] = _quantised(image[at], torch.tensor(qualities, device=self.device))
        return image


def over(colour: Tensor, alpha: Tensor, behind: Tensor) -> Tensor:
    """Put a thing before a scene; colours [N,3,S,S] 0..255, alpha [N,1,S,S] 0..1.

    The thing's own colours under its soft edges are estimated by means over windows (Forte and Pitie, "F, B, Alpha
    Matting", 2020; the fast estimate of Forte, "Approximate Fast Foreground Colour Estimation", 2021).
    """
    foreground, background = colour, colour
    for radius in FOREGROUND_RADII:
        foreground, background = _estimated(colour, alpha, foreground, background, radius)
    return foreground * alpha + behind * (1 - alpha)


def _estimated(
    colour: Tensor, alpha: Tensor, foreground: Tensor, background: Tensor, radius: int
) -> tuple[Tensor, Tensor]:
    """One step of the blur-fusion estimate, foreground and background [N,3,S,S]."""
    weight, rest = _box(alpha, radius), _box(1 - alpha, radius)
    near = _box(foreground * alpha, radius) / (weight + 1e-5)
    far = _box(background * (1 - alpha), radius) / (rest + 1e-5)
    exact = near + alpha * (colour - alpha * near - (1 - alpha) * far)
    return exact.clamp(0, 255), far


def _box(x: Tensor, radius: int) -> Tensor:
    """Means over squares of 2 radius + 1 px, along rows and then along columns."""
    side = 2 * radius + 1
    rows = F.avg_pool2d(x, (1, side), 1, (0, radius), count_include_pad=False)
    return F.avg_pool2d(rows, (side, 1), 1, (radius, 0), count_include_pad=False)


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of [N,C,H,W]."""
    reach = max(1, round(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(x.shape[1], 1, 1, 1)
    padded = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, kernel, groups=x.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=x.shape[1])


def _quantised(image: Tensor, quality: Tensor) -> Tensor:
    """The damage of JPEG at qualities [N] to [N,3,S,S] 0..255: cosine coefficients of 8 px squares, rounded."""
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


def _level(affine: Affine) -> int:
    """The size of a picture that an affine map shrinks least, without enlarging it much."""
    shrink = float(np.sqrt(abs(np.linalg.det(affine[:, :2]))))
    return int(np.clip(np.floor(np.log2(1.4 / max(1e-6, shrink))), 0, LEVELS - 1))


def _finish(augment: AugmentConfig, rng: Rng) -> tuple[NDArray[np.float32], float, float, int | None, int]:
    """Colours, blur, noise, JPEG quality and the noise's seed of a scene."""
    brightness, contrast, saturation = 1 + rng.uniform(-1, 1, 3) * augment.colour
    balance = 1 + rng.uniform(-1, 1, 3) * augment.colour / 3
    colours = np.array([*(brightness * balance), saturation, contrast], np.float32)
    blur = float(rng.uniform(0.4, 1.6)) if rng.random() < augment.blur else 0.0
    noise = float(rng.uniform(1, 10)) if rng.random() < augment.noise else 0.0
    quality = int(rng.integers(40, 95)) if rng.random() < augment.jpeg else None
    return colours, blur, noise, quality, int(rng.integers(2**31))


def _halved(part: Tensor) -> Tensor:
    return _to_u8(F.avg_pool2d(part.float(), 2))


def _to_u8(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def _layer(item: Item, side_px: int) -> tuple[ImageU8, ImageU8]:
    layer = photograph(item, side_px)
    if not item.is_foreground:
        return layer.rgb, layer.alpha
    weight = layer.alpha.astype(np.float32) / 255.0  # what lies outside a cut-out has no colour, and must not shine in
    spread, share = (cv2.GaussianBlur(x, (0, 0), SPREAD_PX) for x in (layer.rgb * weight[..., None], weight))
    around = spread / (share[..., None] + 1e-4)
    return round_to_u8(np.where(weight[..., None] > 0, layer.rgb, around).astype(np.float32)), layer.alpha


def _backdrop(path: Path, side_px: int) -> tuple[ImageU8, ImageU8]:
    rgb = read_image(path).rgb
    small = resize(rgb, downscaled_size(rgb.shape[:2], side_px))
    return small, np.full(small.shape[:2], 255, np.uint8)


def _in_threads(
    read: Callable[[Made], tuple[ImageU8, ImageU8]], sources: Sequence[Made], notice: Callable[[str], None]
) -> dict[Made, tuple[ImageU8, ImageU8]]:
    """Layers of each source that can be read."""

    def tried(source: Made) -> tuple[ImageU8, ImageU8] | str:
        try:
            return read(source)
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = list(threads.map(tried, sources))
    for each in found:
        if isinstance(each, str):
            notice(f"skipped: {each}")
    return {source: each for source, each in zip(sources, found, strict=True) if not isinstance(each, str)}
