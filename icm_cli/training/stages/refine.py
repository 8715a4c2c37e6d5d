"""The stage "refine": train the edges on images with a mask or an alpha, and degraded coarse alphas.

It needs no pairs: any image with a mask or an alpha can be used. Alphas of composites are exact, so all
their pixels count fully. Outlines drawn by hand locate the edge but not its softness, so pixels at their
edges have a smaller weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from icm_cli.errors import ConfigError
from icm_cli.geometry import Float, ImageU8, alpha_to_u8
from icm_cli.model.core import InContextMatting
from icm_cli.training.batches import Batch, Sample, SampleDataset, StepSampler, load_batches
from icm_cli.training.data.degradation import (
    add_uncertain_regions,
    degrade_outline,
    degrade_to_object_mask,
    degrade_to_tokens,
)
from icm_cli.training.data.pool import TrainingItem, TrainingPool
from icm_cli.training.data.scenes import Scene, SceneMaker
from icm_cli.training.learner import Learner
from icm_cli.training.losses import laplacian_loss
from icm_cli.training.settings import REFINE_LOSS_NAMES, RefineStageConfig, Settings, TrainConfig
from icm_cli.training.stages import PANEL_ROWS, Prediction, Stage, add_total, grey_to_rgb, render_layers

PHOTOGRAPH_BACKGROUND_PROBABILITY = 0.7
"""Probability that a composite has another item's photograph as its background instead of a background image."""
EDGE_CROP_PROBABILITY = 0.85
"""Probability that a crop is placed at an edge or an error of the coarse alpha; others are placed anywhere."""
EDGE_ALPHAS = (0.1, 0.9)
"""Pixels with an alpha between these, and their neighbours, are edge pixels."""
UNKNOWN_TOLERANCE = 0.05
"""A pixel is unknown if its coarse or true alpha is further than this from 0 and 1, or if the two differ
by more."""


@dataclass(frozen=True)
class EdgeSample(Sample):
    """Crops of a scene: rgb uint8 [n,S,S,3]; coarse alpha, true alpha and weight float16 [n,S,S]."""

    rgb: ImageU8
    coarse: NDArray[np.float16]
    truth: NDArray[np.float16]
    weight: NDArray[np.float16]


@dataclass(frozen=True)
class EdgeBatch(Batch):
    """Crops of scenes: rgb uint8 [B,n,S,S,3]; coarse alpha, true alpha and weight float16 [B,n,S,S]."""

    rgb: Tensor
    coarse: Tensor
    truth: Tensor
    weight: Tensor


class EdgeMaker(SampleDataset[EdgeSample]):
    """Makes crops of scenes, with degraded coarse alphas."""

    def __init__(self, pool: TrainingPool, config: TrainConfig) -> None:
        super().__init__(config.seed)
        self.pool = pool
        self.config = config.refine
        self._scene_maker = SceneMaker(config.canvas_px, config.augment)

    def draw_sample(self, counter: int, rng: np.random.Generator) -> EdgeSample:
        """Draw a scene and a coarse alpha, and crop both."""
        config, item = self.config, self.pool.draw_item(rng)
        scene, has_exact_alpha = self._make_scene(item, rng)
        scene = self._scene_maker.augment_colours(scene, rng)
        truth = scene.alpha.astype(np.float32) / 255.0
        if scene.coarse is not None and rng.random() < config.predicted_probability:
            coarse = scene.coarse.astype(np.float32) / 255.0
        else:
            coarse = _draw_degradation(config, rng)(truth, rng)
        if rng.random() < config.uncertain_probability:
            coarse = add_uncertain_regions(coarse, scene.rgb, truth, rng)
        weight = scene.valid.astype(np.float32)
        if not has_exact_alpha:
            is_edge = ((truth > EDGE_ALPHAS[0]) & (truth < EDGE_ALPHAS[1])).astype(np.uint8)
            weight[cv2.dilate(is_edge, np.ones((3, 3), np.uint8)) > 0] *= config.edge_weight
        boxes = [_draw_crop(truth, coarse, config.crop_px, rng) for _ in range(config.crops_per_image)]
        layers = [np.stack([layer[box] for box in boxes]).astype(np.float16) for layer in (coarse, truth, weight)]
        return EdgeSample(item.name, counter, np.stack([scene.rgb[box] for box in boxes]), *layers)

    def _make_scene(self, item: TrainingItem, rng: np.random.Generator) -> tuple[Scene, bool]:
        """Make a scene of an item; return it and whether its alpha is exact."""
        wants_photograph = rng.random() < self.config.photograph_probability
        backgrounds = self.pool.backgrounds
        if item.is_binary or (wants_photograph and not item.is_foreground) or not (backgrounds or item.is_foreground):
            return self._scene_maker.make_photograph(item, rng), False
        background_items = [
            background_item
            for background_item in (self.pool.draw_item(rng) for _ in range(8))
            if not background_item.is_foreground
        ]
        if background_items and (rng.random() < PHOTOGRAPH_BACKGROUND_PROBABILITY or not backgrounds):
            behind = self._scene_maker.make_photograph(background_items[0], rng)
            behind = Scene(behind.rgb, np.zeros_like(behind.alpha), np.ones_like(behind.valid))
        else:
            behind = self._scene_maker.make_background(backgrounds[rng.integers(len(backgrounds))], rng)
        return self._scene_maker.make_composite(item, behind, rng), True


class RefineStage(Stage[EdgeBatch]):
    """Predicts alphas with fine edges from images and coarse alphas."""

    trainable_parts = ("edges",)
    loss_names = REFINE_LOSS_NAMES

    def __init__(self, settings: Settings, pool: TrainingPool) -> None:
        super().__init__(settings, pool)
        self.maker = EdgeMaker(pool, settings.train)

    def select_module(self, model: InContextMatting) -> nn.Module:
        if model.edges is None or not model.edges.is_trained:
            raise ConfigError(
                "train: stage is refine, but the model has no edges to train; expected 'edges: {name: refine}'"
            )
        return model.edges

    def make_batches(self, sampler: StepSampler, *, workers: int, pin: bool) -> Iterator[EdgeBatch]:
        return load_batches(self.maker, sampler, EdgeBatch, workers=workers, pin=pin)

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
        gradient = torch.stack([_gradient_error(alpha - truth, weight, axis) for axis in (2, 3)]).sum(dim=0)
        # The Laplacian loss takes no weights; instead the errors of pixels with a small weight are reduced.
        blended = (truth + (alpha - truth) * batch.weight.float()).flatten(0, 1)[:, None]
        laplacian = laplacian_loss(blended, truth.flatten(0, 1)[:, None], blended)
        values = {
            "l1": ((alpha - truth).abs() * weight).mean(dim=(1, 2, 3)) / mean_weight,
            "cross_entropy": (entropy * weight).mean(dim=(1, 2, 3)) / mean_weight,
            "gradient": gradient / mean_weight,
            "laplacian": laplacian.reshape(truth.shape[:2]).mean(dim=1),
        }
        losses = {name: getattr(config, name) * value for name, value in values.items() if getattr(config, name)}
        return add_total(losses)

    @torch.no_grad()
    def render_panel(self, learner: Learner, batch: EdgeBatch) -> ImageU8:
        """Show for the first crop of each scene: image, coarse alpha, true alpha and prediction."""
        few = batch.first_samples(PANEL_ROWS)
        (logit,) = self.predict(self.select_module(learner.model), few)
        layers = (few.coarse, few.truth, torch.sigmoid(logit))
        return render_layers([layer[:, 0] for layer in layers], few.rgb[:, 0])

    def preview_sample(self, counter: int) -> tuple[str, list[ImageU8]]:
        """Return the first crop of a scene: image, coarse alpha, true alpha and weight."""
        sample = self.maker.make_sample(counter)
        layers = (sample.coarse, sample.truth, sample.weight)
        return sample.name, [
            sample.rgb[0],
            *(grey_to_rgb(alpha_to_u8(layer[0].astype(np.float32))) for layer in layers),
        ]


def _draw_degradation(
    config: RefineStageConfig, rng: np.random.Generator
) -> Callable[[Float, np.random.Generator], Float]:
    """Draw a function that degrades a true alpha to a coarse one, by the configured probabilities."""
    drawn = rng.random()
    if drawn < config.token_probability:
        return degrade_to_tokens
    is_object = drawn < config.token_probability + config.object_probability
    return degrade_to_object_mask if is_object else degrade_outline


def _draw_crop(truth: Float, coarse: Float, crop_px: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """Draw a square, mostly at an edge or at an error of the coarse alpha."""
    interesting = (truth > 0.05) & (truth < 0.95) if rng.random() < 0.6 else np.abs(truth - coarse) > 0.2
    found: Sequence[int] = np.flatnonzero(interesting).tolist()
    side = len(truth)
    spare = side - crop_px
    if len(found) and rng.random() < EDGE_CROP_PROBABILITY:
        at = divmod(found[int(rng.integers(len(found)))], side)
        top, left = (int(np.clip(each - rng.integers(crop_px // 4, 3 * crop_px // 4), 0, spare)) for each in at)
    else:
        top, left = (int(rng.integers(spare + 1)) for _ in range(2))
    return slice(top, top + crop_px), slice(left, left + crop_px)


def _gradient_error(error: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Return the weighted mean L1, [B], between neighbouring pixels of an error, [B,n,S,S], along an axis."""
    count = error.shape[axis] - 1
    return (error.diff(dim=axis).abs() * weight.narrow(axis, 1, count)).mean(dim=(1, 2, 3))


STAGE = RefineStage
