"""The stage "objects": what makes things whole learns which of them a coarse alpha means, on mosaics of kept tokens.

The mosaics are those of the stage "match". A trained head, which stays as it is, answers them, and its coarse alpha,
uncertain or wrong as it is, is what the objects are asked with.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.errors import ConfigError
from icm_cli.geometry import ImageU8, alpha_to_u8
from icm_cli.model.contracts import Objects
from icm_cli.model.core import InContextMatting
from icm_cli.model.lite.head import TokenMatchHead
from icm_cli.training.panels import MOST_ROWS, grey, table
from icm_cli.training.stages.contract import Answer
from icm_cli.training.stages.match import MatchStage
from icm_cli.training.stages.mosaics import MosaicBatch, TokenMatcher, token_match_head

if TYPE_CHECKING:
    from icm_cli.events import TrainingListener
    from icm_cli.training.learner import Learner

CROSS_ENTROPY = 2.0
"""Weight of the cross-entropy beside 1 of the Dice loss."""


class ObjectMatcher(nn.Module):
    """A head that stays as it is, and the objects that learn from its answers."""

    def __init__(self, head: TokenMatchHead, objects: Objects) -> None:
        super().__init__()
        self.matcher = TokenMatcher(head)
        self.objects = objects

    def forward(self, batch: MosaicBatch) -> Answer:
        """Logit of the whole alpha [B,mH,mW], and the coarse alpha that it was asked with [B,nH,nW] 0..1."""
        with torch.no_grad():
            _, fine, _, presence = self.matcher(batch)
            coarse = torch.sigmoid(fine) * torch.sigmoid(self.matcher.head.sharpen_presence(presence))[:, None, None]
        return self.objects(batch.embedding.float(), coarse[:, None])[:, 0], coarse


class ObjectsStage(MatchStage):
    """Coarse alphas of mosaics in, whole things out."""

    learns: ClassVar[tuple[str, ...]] = ("objects",)
    terms: ClassVar[tuple[str, ...]] = ("cross_entropy", "dice")
    embeds: ClassVar[bool] = True

    def module(self, model: InContextMatting) -> nn.Module:
        head = token_match_head(model, "objects")
        if model.objects is None:
            raise ConfigError("train: stage is objects, and the model has none to teach; add a section 'objects'")
        return ObjectMatcher(head, model.objects)

    def prepare(self, learner: Learner, folder: Path, first_step: int, listener: TrainingListener) -> None:
        if not learner.is_from_checkpoint:
            raise ConfigError("train: stage is objects, which learn from a trained head; give one with --checkpoint")
        super().prepare(learner, folder, first_step, listener)

    def losses(self, answer: Answer, batch: MosaicBatch) -> dict[str, Tensor]:
        """Cross-entropy, and Dice where the thing is there, on the cells of the true alpha."""
        truth = batch.alpha
        logit = F.adaptive_avg_pool2d(answer[0][:, None], (truth.shape[-2], truth.shape[-1]))[:, 0]
        alpha = torch.sigmoid(logit)
        there = (truth.sum(dim=(1, 2)) > 1.0).float()
        common, sizes = (alpha * truth).sum(dim=(1, 2)), (alpha + truth).sum(dim=(1, 2))
        entropy = F.binary_cross_entropy_with_logits(logit, truth, reduction="none").mean(dim=(1, 2))
        terms = {
            "cross_entropy": CROSS_ENTROPY * entropy,
            "dice": (1.0 - (2.0 * common + 1.0) / (sizes + 1.0)) * there,
        }
        return {**terms, "total": torch.stack(list(terms.values())).sum(dim=0)}

    @torch.no_grad()
    def panel(self, learner: Learner, batch: MosaicBatch) -> ImageU8:
        """For each mosaic its true alpha, the coarse alpha, and the whole one."""
        few = batch.first(MOST_ROWS)
        logit, coarse = self.answer(self.module(learner.model), few)
        layers = [
            F.interpolate(each[:, None].float(), logit.shape[-2:], mode="nearest")[:, 0]
            for each in (few.alpha, coarse, torch.sigmoid(logit))
        ]
        return table([[grey(alpha_to_u8(layer[i].cpu().numpy())) for layer in layers] for i in range(len(few.alpha))])


STAGE = ObjectsStage
