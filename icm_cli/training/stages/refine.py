"""The stage "refine": train the edges on images with a mask or an alpha, and degraded coarse alphas.

It needs no pairs of images: every image with a mask or an alpha can be used. Composites have exact alphas, so all their
pixels have full weight. An outline drawn by hand shows where an edge is, but not how soft it is, so pixels at its edges
have a smaller weight. Coarse alphas are true alphas with simulated errors of a head, or of a rough mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.errors import ConfigError
from icm_cli.geometry import Float, ImageU8
from icm_cli.model.core import InContextMatting
from icm_cli.training.batches import Batch, Layers, SampleMaker, TrainingSample
from icm_cli.training.data.augment import Rng
from icm_cli.training.data.pool import TrainingItem, TrainingPool
from icm_cli.training.data.scenes import Scene, SceneMaker
from icm_cli.training.learner import Learner
from icm_cli.training.losses import laplacian_loss
from icm_cli.training.settings import REFINE_LOSS_NAMES, RefineStageConfig, Settings, TrainConfig
from icm_cli.training.stages import PANEL_ROWS, Prediction, Stage, add_total, render_layers, to_rgb

PHOTOGRAPH_BACKGROUND_PROBABILITY = 0.7
"""Probability that a composite has another item's photograph as its background instead of a background image."""
EDGE_CROP_PROBABILITY = 0.85
"""Probability that a crop is placed at an edge or at an error of the coarse alpha, and not anywhere."""
EDGE_ALPHAS = (0.1, 0.9)
"""Pixels with an alpha between these, and their neighbours, are edge pixels."""
UNKNOWN_TOLERANCE = 0.05
"""A pixel is unknown if its coarse or true alpha is further than this from 0 and 1, or if the two differ by more."""
TOKEN_CELL_RANGE = (1 / 52, 1 / 14)
"""Smallest and largest side of a token's cell, as a fraction of the image's long side."""
OBJECT_CELL_RANGE = (1 / 256, 1 / 128)
"""Smallest and largest side of a pixel of an object mask, as a fraction of the image's long side."""
OBJECT_BLUR = (0.4, 3.0)
"""Smallest and largest standard deviation of the blur of an object mask, in pixels of the mask.

A network that was trained with more blur changes masks that are correct.
"""
CERTAIN_LOGIT = 4.0
"""Far from the object, the logit of an object mask is at most -CERTAIN_LOGIT."""
MAX_REGION_FRACTION = 0.12
"""Largest fraction of the image that an uncertain region covers."""
REGION_IMAGE_PX = 160
"""Long side of the reduced image in which regions of similar colour are searched."""
INSIDE_PROBABILITY = 0.65
"""Probability that an uncertain region is inside the object instead of outside."""


@dataclass(frozen=True)
class EdgeBatch(Batch):
    """n crops of each scene: rgb uint8 [B,n,S,S,3]; coarse alpha, true alpha and weight float16 [B,n,S,S]."""

    rgb: Tensor
    coarse: Tensor
    truth: Tensor
    weight: Tensor


class EdgeMaker(SampleMaker[EdgeBatch]):
    """Makes crops of scenes, with degraded coarse alphas."""

    batch_class = EdgeBatch

    def __init__(self, pool: TrainingPool, config: TrainConfig) -> None:
        super().__init__(config.seed)
        self.pool = pool
        self.config = config.refine
        self._scenes = SceneMaker(pool, config)

    def draw_sample(self, rng: Rng) -> TrainingSample:
        """Draw a scene and a coarse alpha, and crop both."""
        config, item = self.config, self.pool.draw_item(rng)
        scene, has_exact_alpha = self._make_scene(item, rng)
        scene = self._scenes.augment_colours(scene, rng)
        truth = scene.alpha.astype(np.float32) / 255.0
        coarse = self._draw_coarse_alpha(scene, truth, rng)
        weight = scene.valid.astype(np.float32)
        if not has_exact_alpha:
            is_edge = ((truth > EDGE_ALPHAS[0]) & (truth < EDGE_ALPHAS[1])).astype(np.uint8)
            weight[cv2.dilate(is_edge, np.ones((3, 3), np.uint8)) > 0] *= config.edge_weight
        boxes = [_draw_crop(truth, coarse, config.crop_px, rng) for _ in range(config.crops_per_image)]
        layers = {"coarse": coarse, "truth": truth, "weight": weight}
        crops: Layers = {"rgb": np.stack([scene.rgb[box] for box in boxes])}
        for name, layer in layers.items():
            crops[name] = np.stack([layer[box] for box in boxes]).astype(np.float16)
        return TrainingSample(item.name, crops, () if scene.alpha.any() else (item.alpha_file,))

    def _draw_coarse_alpha(self, scene: Scene, truth: Float, rng: Rng) -> Float:
        """Return the coarse alpha of a scene: that of another model, or a degraded true alpha."""
        config = self.config
        if scene.coarse is not None and rng.random() < config.predicted_probability:
            coarse = scene.coarse.astype(np.float32) / 255.0
        else:
            coarse = _draw_degradation(config, rng)(truth, rng)
        if rng.random() < config.uncertain_probability:
            coarse = add_uncertain_regions(coarse, scene.rgb, truth, rng)
        return coarse

    def _make_scene(self, item: TrainingItem, rng: Rng) -> tuple[Scene, bool]:
        """Make a scene of an item; return it and whether its alpha is exact."""
        backgrounds = self.pool.backgrounds
        prefers_photograph = rng.random() < self.config.photograph_probability or not backgrounds
        if item.is_binary or (prefers_photograph and not item.is_foreground):
            return self._scenes.make_photograph(item, rng), False
        candidates = [self.pool.draw_item(rng) for _ in range(8)]
        background_items = [candidate for candidate in candidates if not candidate.is_foreground]
        if background_items and (rng.random() < PHOTOGRAPH_BACKGROUND_PROBABILITY or not backgrounds):
            behind = self._scenes.make_photograph(background_items[0], rng)
        else:
            behind = self._scenes.make_background(self.pool.draw_background(rng), rng)
        return self._scenes.make_composite(item, behind.rgb, rng), True


class RefineStage(Stage[EdgeBatch]):
    """Predicts alphas with fine edges from images and coarse alphas."""

    trainable_parts = ("edges",)
    loss_names = REFINE_LOSS_NAMES

    def __init__(self, settings: Settings, pool: TrainingPool) -> None:
        super().__init__(settings, pool)
        self.maker: EdgeMaker = EdgeMaker(pool, settings.train)

    def select_module(self, model: InContextMatting) -> nn.Module:
        if model.edges is None or not model.edges.is_trained:
            raise ConfigError(
                "train: stage is refine, but the model has no edges to train; expected 'edges: {name: refine}'"
            )
        return model.edges

    def predict(self, forward: nn.Module, batch: EdgeBatch) -> Prediction:
        """Predict the logit of the alpha, float32 [B,n,S,S]."""
        image = batch.rgb.flatten(0, 1).permute(0, 3, 1, 2).float() / 255.0
        image = image.contiguous(memory_format=torch.channels_last)
        coarse = batch.coarse.flatten(0, 1)[:, None].float()
        logit = forward(image, coarse)
        return (logit[:, 0].float().reshape(batch.coarse.shape),)

    def compute_losses(self, prediction: Prediction, batch: EdgeBatch) -> dict[str, Tensor]:
        logit, truth, coarse = prediction[0], batch.truth.float(), batch.coarse.float()
        config = self.settings.train.refine
        is_soft = torch.minimum((coarse - 0.5).abs(), (truth - 0.5).abs()) < 0.5 - UNKNOWN_TOLERANCE
        is_unknown = is_soft | ((coarse - truth).abs() > UNKNOWN_TOLERANCE)
        weight = batch.weight.float() * (1.0 + (config.unknown_weight - 1.0) * is_unknown)
        alpha = torch.sigmoid(logit)
        mean_weight = weight.mean(dim=(1, 2, 3)).clamp(min=1e-3)
        entropy = F.binary_cross_entropy_with_logits(logit, truth, reduction="none")
        gradient = _gradient_error(alpha - truth, weight, axis=2) + _gradient_error(alpha - truth, weight, axis=3)
        # The Laplacian loss takes no weights; instead the errors of pixels with a small weight are reduced.
        blended = (truth + (alpha - truth) * batch.weight.float()).flatten(0, 1)[:, None]
        laplacian = laplacian_loss(blended, truth.flatten(0, 1)[:, None], blended)
        values = {
            "l1": ((alpha - truth).abs() * weight).mean(dim=(1, 2, 3)) / mean_weight,
            "cross_entropy": (entropy * weight).mean(dim=(1, 2, 3)) / mean_weight,
            "gradient": gradient / mean_weight,
            "laplacian": laplacian.reshape(truth.shape[:2]).mean(dim=1),
        }
        weights = {name: getattr(config, name) for name in values}
        return add_total({name: weights[name] * value for name, value in values.items() if weights[name]})

    @torch.no_grad()
    def render_panel(self, learner: Learner, batch: EdgeBatch) -> ImageU8:
        """Show for the first crop of each scene: image, coarse alpha, true alpha and prediction."""
        shown = batch.first_samples(PANEL_ROWS)
        (logit,) = self.predict(self.select_module(learner.model), shown)
        return render_layers([layer[:, 0] for layer in (shown.rgb, shown.coarse, shown.truth, torch.sigmoid(logit))])

    def preview_sample(self, number: int) -> tuple[str, list[ImageU8]]:
        """Return the first crop of a scene: image, coarse alpha, true alpha and weight."""
        batch = self.maker.make_batch([number])
        return batch.names[0], [to_rgb(layer[0, 0]) for layer in (batch.rgb, batch.coarse, batch.truth, batch.weight)]


def _draw_degradation(config: RefineStageConfig, rng: Rng) -> Callable[[Float, Rng], Float]:
    """Draw a function that degrades a true alpha to a coarse one, by the configured probabilities."""
    drawn = rng.random()
    if drawn < config.token_probability:
        return degrade_to_tokens
    is_object = drawn < config.token_probability + config.object_probability
    return degrade_to_object_mask if is_object else degrade_outline


def _draw_crop(truth: Float, coarse: Float, crop_px: int, rng: Rng) -> tuple[slice, slice]:
    """Draw a square, mostly at an edge or at an error of the coarse alpha."""
    is_edge, is_wrong = (truth > 0.05) & (truth < 0.95), np.abs(truth - coarse) > 0.2
    is_candidate = is_edge if rng.random() < 0.6 else is_wrong
    candidates = np.flatnonzero(is_candidate)
    side, max_start = len(truth), len(truth) - crop_px
    if len(candidates) and rng.random() < EDGE_CROP_PROBABILITY:
        row, column = divmod(int(candidates[int(rng.integers(len(candidates)))]), side)
        # The pixel is in the middle half of the crop, unless the crop would extend beyond the image.
        top = int(np.clip(row - rng.integers(crop_px // 4, 3 * crop_px // 4), 0, max_start))
        left = int(np.clip(column - rng.integers(crop_px // 4, 3 * crop_px // 4), 0, max_start))
    else:
        top, left = int(rng.integers(max_start + 1)), int(rng.integers(max_start + 1))
    return slice(top, top + crop_px), slice(left, left + crop_px)


def _gradient_error(error: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Return the weighted mean L1, [B], between neighbouring pixels of an error, [B,n,S,S], along an axis."""
    count = error.shape[axis] - 1
    return (error.diff(dim=axis).abs() * weight.narrow(axis, 1, count)).mean(dim=(1, 2, 3))


def degrade_to_tokens(alpha: Float, rng: Rng) -> Float:
    """Return an alpha, [H,W] 0..1, as coarse and wrong as one predicted per token: shifted, with holes and blobs."""
    height, width = alpha.shape
    cell = max(height, width) * np.exp(rng.uniform(*np.log(TOKEN_CELL_RANGE)))
    rows, columns = max(2, round(height / cell)), max(2, round(width / cell))
    offset = rng.uniform(-0.6, 0.6, (2, 1)) * cell
    is_shifted = rng.random() < 0.5
    matrix = np.hstack([np.eye(2), offset * is_shifted]).astype(np.float32)
    shifted = np.asarray(cv2.warpAffine(alpha, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE), np.float32)
    if rng.random() < 0.4:
        shifted = _dilate_or_erode(shifted, rng.uniform(-0.6, 0.6) * cell)
    grid = cv2.resize(shifted, (columns, rows), interpolation=cv2.INTER_AREA)
    confidence, bias = rng.uniform(0.5, 2.0), rng.uniform(-0.7, 0.7)
    logit = np.asarray(np.log((grid + 0.02) / (1.02 - grid)) * confidence + bias, np.float32)
    _disturb_logit(logit, rng)
    coarse = 1.0 / (1.0 + np.exp(-logit))
    return np.asarray(cv2.resize(coarse.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR))


def _disturb_logit(logit: Float, rng: Rng) -> None:
    """Add smooth errors, noise, a hole and a blob to the logit of a grid [h,w], in place."""
    logit += draw_smooth_noise(logit.shape, rng.uniform(1.0, 4.0), rng) * rng.uniform(0.0, 1.6)
    logit += rng.standard_normal(logit.shape) * rng.uniform(0.0, 0.8)
    for sign in (-1.0, 1.0):
        if rng.random() < 0.35:
            logit += sign * rng.uniform(1.0, 4.5) * _draw_blob(logit.shape, rng)


def degrade_outline(alpha: Float, rng: Rng) -> Float:
    """Return an alpha, [H,W] 0..1, with a wrong outline: displaced by a few pixels, sometimes hardened, and blurred."""
    reach = rng.uniform(0.5, 7.0)
    coarse = (alpha > rng.uniform(0.3, 0.7)).astype(np.float32) if rng.random() < 0.5 else alpha
    if rng.random() < 0.8:
        coarse = _warp_outline(coarse, reach, rng)
    if rng.random() < 0.5:
        coarse = _dilate_or_erode(coarse, rng.uniform(-1.0, 1.0) * reach)
    if rng.random() < 0.25:
        holes = _draw_blob(alpha.shape, rng, largest=0.15)
        coarse = coarse * (1 - holes) if rng.random() < 0.6 else np.maximum(coarse, holes * rng.uniform(0.2, 0.8))
    if rng.random() < 0.85:
        std = float(np.exp(rng.uniform(np.log(0.5), np.log(5.0))))
        coarse = np.asarray(cv2.GaussianBlur(coarse, (0, 0), std), np.float32)
    return np.clip(coarse, 0.0, 1.0).astype(np.float32)


def degrade_to_object_mask(alpha: Float, rng: Rng) -> Float:
    """Return an alpha, [H,W] 0..1, with the errors of an object segmentation model.

    The outline is smooth and confident. It cuts off hair or closes the gaps between strands.
    """
    height, width = alpha.shape
    cell = max(height, width) * np.exp(rng.uniform(*np.log(OBJECT_CELL_RANGE)))
    blur_px = cell * np.exp(rng.uniform(*np.log(OBJECT_BLUR)))
    smooth = np.asarray(cv2.GaussianBlur(alpha, (0, 0), blur_px))
    rows, columns = max(2, round(height / cell)), max(2, round(width / cell))
    grid = cv2.resize(smooth, (columns, rows), interpolation=cv2.INTER_AREA)
    steepness = np.exp(rng.uniform(np.log(8.0), np.log(40.0)))
    noise = draw_smooth_noise((rows, columns), rng.uniform(4.0, 24.0), rng) * rng.uniform(0.0, 0.12)
    threshold = np.maximum(rng.uniform(0.25, 0.65) + noise, CERTAIN_LOGIT / steepness)  # the background is certain
    mask = 1.0 / (1.0 + np.exp(-steepness * (grid - threshold)))
    return np.asarray(cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR))


def add_uncertain_regions(coarse: Float, rgb: ImageU8, truth: Float, rng: Rng) -> Float:
    """Return a coarse alpha, [H,W] 0..1, made uncertain in one to three regions of similar colour.

    Regions of the object fade, and regions of the background appear, as in the output of a head that judges by
    similarity. ``rgb`` is the image, uint8 [H,W,3].
    """
    height, width = truth.shape
    scale = min(1.0, REGION_IMAGE_PX / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    colours = np.asarray(cv2.GaussianBlur(small, (0, 0), 1.0), np.uint8)
    is_object = cv2.resize(truth, size, interpolation=cv2.INTER_AREA) > 0.5
    for _ in range(int(rng.integers(1, 4))):
        is_inside = bool(rng.random() < INSIDE_PROBABILITY)
        region = _draw_colour_region(colours, is_object == is_inside, rng)
        blur_px = max(size) * rng.uniform(*TOKEN_CELL_RANGE) * 0.5
        soft_region = cv2.GaussianBlur(region, (0, 0), blur_px)
        weight = cv2.resize(soft_region, (width, height), interpolation=cv2.INTER_LINEAR) * rng.uniform(0.5, 1.0)
        level = rng.uniform(0.05, 0.7) if is_inside else rng.uniform(0.2, 0.7)
        uncertain = np.minimum(coarse, level) if is_inside else np.maximum(coarse, level)
        coarse = (coarse + weight * (uncertain - coarse)).astype(np.float32)
    return np.clip(coarse, 0.0, 1.0).astype(np.float32)


def draw_smooth_noise(size: tuple[int, int], cell: float, rng: Rng) -> Float:
    """Draw normal noise, [H,W], that varies over about ``cell`` pixels, with a standard deviation near 1."""
    small_size = max(2, round(size[0] / cell)), max(2, round(size[1] / cell))
    small = rng.standard_normal(small_size).astype(np.float32)
    return np.asarray(cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC))


def _dilate_or_erode(alpha: Float, px: float) -> Float:
    """Dilate an alpha by ``px`` pixels, or erode it if ``px`` is negative."""
    reach = round(abs(px))
    if not reach:
        return alpha
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    return np.asarray(cv2.dilate(alpha, kernel) if px > 0 else cv2.erode(alpha, kernel))


def _warp_outline(alpha: Float, reach: float, rng: Rng) -> Float:
    """Displace the pixels of an alpha smoothly, by about ``reach`` pixels."""
    cell = rng.uniform(4.0, 12.0) * max(1.0, reach)
    height, width = alpha.shape
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    dx, dy = (draw_smooth_noise(alpha.shape, cell, rng) * np.float32(reach * 0.7) for _ in range(2))
    return np.asarray(cv2.remap(alpha, x + dx, y + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))


def _draw_colour_region(colours: ImageU8, candidates: np.ndarray, rng: Rng) -> Float:
    """Draw a region of similar colour in ``candidates``, bool [h,w]; return 1 inside it and 0 outside.

    The region grows from a random pixel. If it is too large, only a part around that pixel is returned.
    """
    indices = np.flatnonzero(candidates)
    if not len(indices):
        return np.zeros(candidates.shape, np.float32)
    y, x = divmod(int(indices[rng.integers(len(indices))]), candidates.shape[1])
    filled = np.zeros((candidates.shape[0] + 2, candidates.shape[1] + 2), np.uint8)
    difference = (float(rng.uniform(8.0, 40.0)),) * 3
    # 4: neighbours by side; 1 << 8: the value 1 is written to ``filled``, which has a border of one pixel.
    flags = 4 | cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE | 1 << 8
    cv2.floodFill(colours, filled, (x, y), 0, difference, difference, flags)
    region = (filled[1:-1, 1:-1] > 0) & candidates
    if region.mean() > MAX_REGION_FRACTION:
        region &= _draw_blob(region.shape, rng, largest=0.2, centre=(x, y)) > 0.5
    return region.astype(np.float32)


def _draw_blob(
    size: tuple[int, int], rng: Rng, largest: float = 0.3, centre: tuple[float, float] | None = None
) -> Float:
    """Draw a soft ellipse, 1 inside, around a centre (x, y) or at a random place.

    ``largest``: largest half axis, as a fraction of the long side.
    """
    height, width = size
    blob = np.zeros(size, np.float32)
    centre = centre or (rng.uniform(0, width), rng.uniform(0, height))
    axes = rng.uniform(0.04, largest, 2) * max(size)
    diameters = float(2 * max(axes[0], 0.7)), float(2 * max(axes[1], 0.7))
    angle = float(rng.uniform(0, 180))
    cv2.ellipse(blob, (centre, diameters, angle), 1.0, -1)
    return np.asarray(cv2.GaussianBlur(blob, (0, 0), max(0.5, 0.15 * float(min(axes)))))


STAGE = RefineStage
