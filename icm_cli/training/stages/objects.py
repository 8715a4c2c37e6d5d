"""The stage "objects": train the object model to complete coarse alphas and to follow clicks, on mosaics of tokens.

The mosaics are those of the stage "match". A trained head, which stays frozen, predicts coarse alphas for them. With
these uncertain or wrong alphas as its input, the object model learns to predict the true ones. Simulated clicks then
correct its prediction, one after another, or select an object without a coarse alpha.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.errors import ConfigError
from icm_cli.events import TrainingListener
from icm_cli.geometry import ImageU8
from icm_cli.model.contracts import Objects
from icm_cli.model.core import InContextMatting
from icm_cli.model.lite.head import TokenMatchHead
from icm_cli.training.learner import Learner
from icm_cli.training.settings import ClickConfig
from icm_cli.training.stages import PANEL_ROWS, Prediction, add_total, render_layers
from icm_cli.training.stages.clicks import Mask, corrupt_alpha, draw_box, draw_click, select_truth
from icm_cli.training.stages.match import MatchStage
from icm_cli.training.stages.mosaics import MosaicBatch, TokenMatcher, draw_index, require_token_match_head

CROSS_ENTROPY_WEIGHT = 2.0
"""Weight of the cross-entropy; the Dice loss has weight 1."""
MAX_STROKE_POINTS = 8
"""Largest number of points of a stroke."""


class ObjectMatcher(nn.Module):
    """Runs a frozen head on stored tokens, the object model on its predictions, and again for each simulated click."""

    def __init__(self, head: TokenMatchHead, objects: Objects, config: ClickConfig, seed: int) -> None:
        super().__init__()
        self.matcher = TokenMatcher(head)
        self.objects = objects
        self.config = config
        self.seed = seed

    def forward(self, batch: MosaicBatch) -> Prediction:
        """Predict the objects of mosaics in T rounds: without clicks, with the first click, with two, and so on.

        All samples of a batch have the same number of clicks, which depends on the first sample's number. Returns:

        - the logits [B,T,mH,mW];
        - the predicted IoU [B,T], 0 without clicks;
        - the weights of the rounds in the loss [B,T];
        - the true alpha [B,nH,nW];
        - the coarse alpha [B,nH,nW], 0 if only clicks select the object.
        """
        rng = np.random.default_rng((self.seed, 5, batch.sample_numbers[0]))
        clicks = draw_index(self.config.count_weights, rng)
        has_coarse = not (clicks > 0 and rng.random() < self.config.alone_probability)
        coarse = self._coarse_alphas(batch) if has_coarse else torch.zeros_like(batch.alpha)
        rounds = _Rounds(self.objects, batch, coarse, self.config, rng)
        if clicks:
            rounds.select_objects()
        if has_coarse:
            rounds.complete(can_corrupt=clicks > 0)
        elif rng.random() < self.config.box_probability:
            rounds.draw_boxes()
            clicks -= 1  # the box replaces the first click
        for _ in range(clicks):
            rounds.click()
        return rounds.prediction()

    @torch.no_grad()
    def _coarse_alphas(self, batch: MosaicBatch) -> Tensor:
        """Return the coarse alphas of the head, [B,nH,nW] 0..1."""
        _, fine, _, presence = self.matcher(batch)
        return torch.sigmoid(fine) * torch.sigmoid(self.matcher.head.sharpen_presence(presence))[:, None, None]


@dataclass(frozen=True)
class _Round:
    """Prediction of one round for B samples."""

    logits: Tensor
    """[B,1,mH,mW]."""
    iou: Tensor
    """Predicted IoU, [B]; 0 without clicks."""
    weights: Tensor
    """Weights of the samples in the loss, [B]."""


class _Rounds:
    """Predictions for one batch in rounds: each round has one click more than the round before."""

    def __init__(
        self, objects: Objects, batch: MosaicBatch, coarse: Tensor, config: ClickConfig, rng: np.random.Generator
    ) -> None:
        self._objects = objects
        self._batch = batch
        self._coarse = coarse
        self._config = config
        self._rng = rng
        self._embedding = batch.embedding.float()
        self._truth = batch.alpha
        self._has_other_object = [False] * len(batch.alpha)
        """For each sample: whether the clicks select another object than the reference's."""
        self._alpha: Tensor | None = None
        """The completed alpha, which the clicks correct, [B,1,mH,mW]."""
        self._coordinates: list[Tensor] = []
        """Clicks and box corners so far, as in :meth:`Objects.decode_prompts`: [B,n,2] for each round with prompts."""
        self._labels: list[Tensor] = []
        """Labels of ``_coordinates``: [B,n] for each of these rounds."""
        self._rounds: list[_Round] = []

    def select_objects(self) -> None:
        """Draw the objects that the clicks select."""
        batch, layout = self._batch, (self._batch.rows, self._batch.columns)
        drawn = [
            select_truth(truth, every_alpha, layout, self._config, self._rng)
            for truth, every_alpha in zip(batch.alpha, batch.every_alpha, strict=True)
        ]
        self._truth = torch.stack([truth for truth, _ in drawn])
        self._has_other_object = [is_other for _, is_other in drawn]

    def complete(self, *, can_corrupt: bool = False) -> None:
        """Complete the coarse alphas without clicks.

        With ``can_corrupt``, some alphas are made worse: either the coarse ones or the completed ones. A sample has no
        loss in this round if its coarse alpha was made worse, or if the clicks will select another object.
        """
        count, corrupts_coarse = len(self._coarse), self._rng.random() < 0.5
        must_corrupt = [can_corrupt and self._rng.random() < self._config.corruption_probability for _ in range(count)]
        coarse = self._corrupt(self._coarse, must_corrupt) if corrupts_coarse else self._coarse
        logits = self._objects(self._embedding, coarse[:, None])
        completed = torch.sigmoid(logits.detach())[:, 0]
        if not corrupts_coarse:
            completed = self._corrupt(completed, must_corrupt)
        self._alpha = completed[:, None]
        has_loss = [
            not has_other_object and not (corrupts_coarse and was_corrupted)
            for has_other_object, was_corrupted in zip(self._has_other_object, must_corrupt, strict=True)
        ]
        self._rounds.append(_Round(logits, logits.new_zeros(count), torch.tensor(has_loss).to(logits)))

    def draw_boxes(self) -> None:
        """Select the objects by boxes."""
        boxes = [draw_box(mask, self._rng) for mask in self._masks(self._truth)]
        corners = torch.tensor(boxes).reshape(-1, 2, 2)
        self._predict(corners, torch.tensor([[2, 3]] * len(boxes)))  # labels of the two corners of a box

    def click(self) -> None:
        """Predict with one more click or stroke, which corrects the last prediction or the completed alpha."""
        true_masks = self._masks(self._truth)
        if self._labels:
            predicted_masks = self._masks(torch.sigmoid(self._rounds[-1].logits.detach())[:, 0])
        elif self._alpha is not None:
            predicted_masks = self._masks(self._alpha[:, 0])
        else:
            predicted_masks = [np.zeros_like(mask) for mask in true_masks]
        is_stroke = self._rng.random() < self._config.stroke_probability
        count = int(self._rng.integers(2, MAX_STROKE_POINTS + 1)) if is_stroke else 1
        height, width = true_masks[0].shape
        positions, labels = [], []
        for predicted, truth in zip(predicted_masks, true_masks, strict=True):
            clicks = [draw_click(predicted, truth, self._config, self._rng) for _ in range(count)]
            positions.append([((click.column + 0.5) / width, (click.row + 0.5) / height) for click in clicks])
            labels.append([click.label for click in clicks])
        self._predict(torch.tensor(positions), torch.tensor(labels))

    def prediction(self) -> Prediction:
        """Return the result of :meth:`ObjectMatcher.forward`."""
        logits = torch.cat([prediction.logits for prediction in self._rounds], dim=1)
        iou = torch.stack([prediction.iou for prediction in self._rounds], dim=1)
        weights = torch.stack([prediction.weights for prediction in self._rounds], dim=1)
        # With several processes, every weight needs a gradient in every step, also if its part was not used.
        no_change = 0.0 * sum(weight.sum() for weight in self._objects.parameters() if weight.requires_grad)
        return logits + no_change, iou, weights, self._truth, self._coarse

    def _predict(self, coordinates: Tensor, labels: Tensor) -> None:
        """Predict with all earlier points and these: coordinates [B,n,2] and labels [B,n]. Adds a round."""
        self._coordinates.append(coordinates.to(self._embedding))
        self._labels.append(labels.to(self._embedding.device))
        logits, iou = self._objects.decode_prompts(
            self._embedding, self._alpha, torch.cat(self._coordinates, dim=1), torch.cat(self._labels, dim=1)
        )
        self._rounds.append(_Round(logits, iou, weights=torch.ones_like(iou)))

    def _corrupt(self, alphas: Tensor, must_corrupt: list[bool]) -> Tensor:
        """Return alphas [B,h,w], of which those that ``must_corrupt`` selects are made worse."""
        return torch.stack(
            [
                corrupt_alpha(alpha, self._config, self._rng) if is_selected else alpha
                for alpha, is_selected in zip(alphas, must_corrupt, strict=True)
            ]
        )

    def _masks(self, alphas: Tensor) -> list[Mask]:
        """Return alphas [B,h,w] as masks of the true alpha's resolution."""
        size = (self._truth.shape[-2], self._truth.shape[-1])
        return list((F.adaptive_avg_pool2d(alphas[:, None].float(), size)[:, 0] > 0.5).cpu().numpy())


class ObjectsStage(MatchStage):
    """Predicts the alphas of complete objects from the coarse alphas of mosaics, and from clicks."""

    trainable_parts: ClassVar[tuple[str, ...]] = ("objects",)
    loss_names: ClassVar[tuple[str, ...]] = ("cross_entropy", "dice", "iou")
    needs_embeddings: ClassVar[bool] = True

    def select_module(self, model: InContextMatting) -> nn.Module:
        head = require_token_match_head(model, "objects")
        if model.objects is None:
            raise ConfigError("train: stage is objects, but the model has no object model; add a section 'objects'")
        return ObjectMatcher(head, model.objects, self.settings.train.clicks, self.settings.train.seed)

    def prepare(self, learner: Learner, folder: Path, first_step: int, listener: TrainingListener) -> None:
        if not learner.is_from_checkpoint:
            raise ConfigError("train: stage is objects, which needs a trained head; give one with --checkpoint")
        super().prepare(learner, folder, first_step, listener)

    def compute_losses(self, prediction: Prediction, batch: MosaicBatch) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the losses at the true alpha's resolution, means over the rounds.

        They are the cross-entropy, the Dice loss for mosaics that show the object, and the squared error of the
        predicted IoU. A predicted IoU of exactly 0 has no loss: it stands for a round without clicks.
        """
        logits, predicted_iou, weights, truth, _ = prediction
        logit = F.adaptive_avg_pool2d(logits, (truth.shape[-2], truth.shape[-1]))
        alpha = torch.sigmoid(logit)
        truth = truth[:, None].expand_as(logit)
        axes = (2, 3)
        is_present = (truth.sum(dim=axes) > 1.0).float()
        intersection, sum_of_areas = (alpha * truth).sum(dim=axes), (alpha + truth).sum(dim=axes)
        entropy = F.binary_cross_entropy_with_logits(logit, truth, reduction="none").mean(dim=axes)
        mask, true_mask = alpha.detach() > 0.5, truth > 0.5
        iou = (mask & true_mask).sum(dim=axes) / (mask | true_mask).sum(dim=axes).clamp(min=1)
        iou_error = (predicted_iou - iou) ** 2 * (predicted_iou.detach() != 0.0)
        losses = {
            "cross_entropy": CROSS_ENTROPY_WEIGHT * entropy,
            "dice": (1.0 - (2.0 * intersection + 1.0) / (sum_of_areas + 1.0)) * is_present,
            "iou": self.settings.train.clicks.iou_weight * iou_error,
        }
        return add_total({name: (loss * weights).mean(dim=1) for name, loss in losses.items()})

    @torch.no_grad()
    def render_panel(self, learner: Learner, batch: MosaicBatch) -> ImageU8:
        """Show for each mosaic: true alpha, coarse alpha, and the alphas of the first and the last round."""
        logits, _, _, truth, coarse = self.predict(self.select_module(learner.model), batch.first_samples(PANEL_ROWS))
        layers = (truth, coarse, torch.sigmoid(logits[:, 0]), torch.sigmoid(logits[:, -1]))
        return render_layers([F.interpolate(layer[:, None].float(), logits.shape[-2:])[:, 0] for layer in layers])


STAGE = ObjectsStage
