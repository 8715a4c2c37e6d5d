"""The stage "objects": train the object model to complete coarse alphas, on mosaics of stored tokens.

The mosaics are those of the stage "match". A trained head, which stays frozen, predicts coarse alphas for them. With
these uncertain or wrong alphas as its input, the object model learns to predict the true ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

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
from icm_cli.training.stages import PANEL_ROWS, Prediction, add_total, render_layers
from icm_cli.training.stages.match import MatchStage
from icm_cli.training.stages.mosaics import MosaicBatch, TokenMatcher, require_token_match_head

CROSS_ENTROPY_WEIGHT = 2.0
"""Weight of the cross-entropy; the Dice loss has weight 1."""


class ObjectMatcher(nn.Module):
    """Runs a frozen head on stored tokens, and the object model on its predictions."""

    def __init__(self, head: TokenMatchHead, objects: Objects) -> None:
        super().__init__()
        self.matcher = TokenMatcher(head)
        self.objects = objects

    def forward(self, batch: MosaicBatch) -> Prediction:
        """Return the logit of the object's alpha [B,mH,mW], and the coarse alpha that was its input [B,nH,nW] 0..1."""
        with torch.no_grad():
            _, fine, _, presence = self.matcher(batch)
            coarse = torch.sigmoid(fine) * torch.sigmoid(self.matcher.head.sharpen_presence(presence))[:, None, None]
        return self.objects(batch.embedding.float(), coarse[:, None])[:, 0], coarse


class ObjectsStage(MatchStage):
    """Predicts the alphas of complete objects from the coarse alphas of mosaics."""

    trainable_parts: ClassVar[tuple[str, ...]] = ("objects",)
    loss_names: ClassVar[tuple[str, ...]] = ("cross_entropy", "dice")
    needs_embeddings: ClassVar[bool] = True

    def select_module(self, model: InContextMatting) -> nn.Module:
        head = require_token_match_head(model, "objects")
        if model.objects is None:
            raise ConfigError("train: stage is objects, but the model has no object model; add a section 'objects'")
        return ObjectMatcher(head, model.objects)

    def prepare(self, learner: Learner, folder: Path, first_step: int, listener: TrainingListener) -> None:
        if not learner.is_from_checkpoint:
            raise ConfigError("train: stage is objects, which needs a trained head; give one with --checkpoint")
        super().prepare(learner, folder, first_step, listener)

    def compute_losses(self, prediction: Prediction, batch: MosaicBatch) -> dict[str, Tensor]:
        """Return cross-entropy and, for mosaics that show the object, Dice loss, at the true alpha's resolution."""
        truth = batch.alpha
        logit = F.adaptive_avg_pool2d(prediction[0][:, None], (truth.shape[-2], truth.shape[-1]))[:, 0]
        alpha = torch.sigmoid(logit)
        is_present = (truth.sum(dim=(1, 2)) > 1.0).float()
        common, sizes = (alpha * truth).sum(dim=(1, 2)), (alpha + truth).sum(dim=(1, 2))
        entropy = F.binary_cross_entropy_with_logits(logit, truth, reduction="none").mean(dim=(1, 2))
        return add_total(
            {
                "cross_entropy": CROSS_ENTROPY_WEIGHT * entropy,
                "dice": (1.0 - (2.0 * common + 1.0) / (sizes + 1.0)) * is_present,
            }
        )

    @torch.no_grad()
    def render_panel(self, learner: Learner, batch: MosaicBatch) -> ImageU8:
        """Show for each mosaic: true alpha, coarse alpha, and the alpha of the object model."""
        few = batch.first_samples(PANEL_ROWS)
        logit, coarse = self.predict(self.select_module(learner.model), few)
        layers = (few.alpha, coarse, torch.sigmoid(logit))
        return render_layers([F.interpolate(layer[:, None].float(), logit.shape[-2:])[:, 0] for layer in layers])


STAGE = ObjectsStage
