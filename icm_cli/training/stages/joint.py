"""The stage "joint": the token-match head and, where it may, the backbone learn which thing is meant, on mosaics.

The mosaics are those of the stage "match", but every picture is made anew for its step and seen by the backbone then,
so that no view is seen twice and gradients reach the backbone. It is for a GPU: all pictures lie on the training
device, and samples are made there (:mod:`icm_cli.training.data.card`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from icm_cli.geometry import ImageU8
from icm_cli.model.contracts import Backbone
from icm_cli.model.core import InContextMatting
from icm_cli.model.lite.finetuning import LOSS_TERMS, match_losses
from icm_cli.model.lite.head import TokenMatchHead
from icm_cli.training.batches import Batch, StepSampler
from icm_cli.training.data.card import CardScenes, ScenePlan
from icm_cli.training.data.pool import Item, Pool
from icm_cli.training.data.samples import SampleMaker
from icm_cli.training.panels import MOST_ROWS, grey
from icm_cli.training.settings import Settings
from icm_cli.training.stages.contract import Answer, Stage
from icm_cli.training.stages.mosaics import (
    LARGE,
    Mosaic,
    TokenMatcher,
    draw_layout,
    draw_mosaic,
    joined,
    panel,
    token_match_head,
    views_of,
)

if TYPE_CHECKING:
    from icm_cli.events import TrainingListener
    from icm_cli.training.learner import Learner


@dataclass(frozen=True)
class PictureBatch(Batch):
    """Pictures of mosaics of ``rows`` times ``columns`` = T tiles, beside R references each.

    image uint8 [B,T,3,S,S], alpha uint8 and valid bool [B,T,S,S]; the same of the references, [B,R,...,S',S'];
    places: for each mosaic the tiles that show the references' thing.
    """

    rows: int
    columns: int
    places: tuple[tuple[int, ...], ...]
    image: Tensor
    alpha: Tensor
    valid: Tensor
    reference_image: Tensor
    reference_alpha: Tensor
    reference_valid: Tensor


class JointMatcher(nn.Module):
    """Backbone and token-match head, asked for what :class:`TokenMatcher` is asked for, from pictures."""

    def __init__(self, backbone: Backbone, head: TokenMatchHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, batch: PictureBatch) -> Answer:
        """The answers of :class:`TokenMatcher`, true alphas float32 [B,nH,nW], which tokens hold the frame [B,H,W]."""
        tiles, references = (
            list(views_of(self.backbone, self.head, *_flat(*layers)))
            for layers in (
                (batch.image, batch.alpha, batch.valid),
                (batch.reference_image, batch.reference_alpha, batch.reference_valid),
            )
        )
        count = len(batch.names)
        in_one, shown = len(tiles) // count, len(references) // count
        mosaics = [
            Mosaic(name, references[i * shown : (i + 1) * shown], tiles[i * in_one : (i + 1) * in_one], shows)
            for i, (name, shows) in enumerate(zip(batch.names, batch.places, strict=False))  # a part of a batch has all
        ]
        seen = joined(mosaics, batch.counters, batch.rows, batch.columns)
        return (*TokenMatcher(self.head)(seen), seen.alpha, seen.valid)


class JointStage(Stage[PictureBatch]):
    """Mosaics of pictures in, which of them are the thing out."""

    learns = ("head", "backbone")
    terms = LOSS_TERMS

    def __init__(self, settings: Settings, pool: Pool) -> None:
        super().__init__(settings, pool)
        self._scenes: CardScenes | None = None

    def module(self, model: InContextMatting) -> nn.Module:
        return JointMatcher(model.backbone, token_match_head(model, "joint"))

    def prepare(self, learner: Learner, folder: Path, first_step: int, listener: TrainingListener) -> None:
        del folder, first_step
        train = self.settings.train
        self._scenes = CardScenes(
            self.pool, train, learner.device.torch_device, side_px=train.match.kept_px, notice=listener.on_notice
        )

    def batches(self, sampler: StepSampler, *, workers: int, pin: bool) -> Iterator[PictureBatch]:
        """Batches are made on the training device; ``workers`` and ``pin`` have nothing to do."""
        del workers, pin
        for counters in sampler:
            yield self.batch(counters)

    def answer(self, forward: nn.Module, batch: PictureBatch) -> Answer:
        found: Answer = forward(batch)
        return found

    def losses(self, answer: Answer, batch: PictureBatch) -> dict[str, Tensor]:
        del batch
        *asked, truth, valid = answer
        return match_losses(tuple(asked), truth, valid, self.settings.train.match.presence)

    @torch.no_grad()
    def panel(self, learner: Learner, batch: PictureBatch) -> ImageU8:
        """For each mosaic its true alpha, the coarse alpha, and what all comparisons together carry over."""
        *asked, truth, _ = self.answer(self.module(learner.model), batch.first(MOST_ROWS))
        return panel(truth, tuple(asked))

    def preview(self, counter: int) -> tuple[str, list[ImageU8]]:
        """A picture and its alpha, as the stages on the CPU make it."""
        items = list(self.pool)
        item = items[counter % len(items)]
        seed = (self.settings.train.seed, counter)
        scene = SampleMaker(self.pool, self.settings.train).view(item, np.random.default_rng(seed))
        return f"{item.group} {item.name}", [scene.rgb, grey(scene.alpha)]

    def batch(self, counters: Sequence[int]) -> PictureBatch:
        """Samples number ``counters``: the same for every run of a seed. All of them have one layout.

        Raises TrainingError where the pictures do not suffice for a mosaic.
        """
        assert self._scenes is not None
        scenes, train = self._scenes, self.settings.train
        config = train.match
        rng = np.random.default_rng((train.seed, 1, counters[0]))
        rows, columns, references = draw_layout(config, rng)
        large = LARGE * train.canvas_px if config.large_views else train.canvas_px
        tile_px = large if (rows, columns) == (1, 1) else train.canvas_px
        reference_px = large if rng.random() < 0.5 else train.canvas_px

        def planned(item: Item, canvas_px: int) -> ScenePlan | None:
            return scenes.plan(item, canvas_px, rng) if item in scenes.items else None

        mosaics = [
            draw_mosaic(
                self.pool,
                config,
                rows * columns,
                references,
                rng,
                as_target=lambda item: planned(item, tile_px),
                as_reference=lambda item: planned(item, reference_px),
            )
            for _ in counters
        ]
        image, alpha, valid = scenes.views([plan for each in mosaics for plan in each.tiles], tile_px)
        shown = scenes.views([plan for each in mosaics for plan in each.references], reference_px)
        reference_image, reference_alpha, reference_valid = shown
        count = len(mosaics)
        return PictureBatch(
            tuple(each.name for each in mosaics),
            tuple(counters),
            (),
            rows,
            columns,
            tuple(each.places for each in mosaics),
            _grouped(image, count),
            _grouped(alpha, count),
            _grouped(valid, count),
            _grouped(reference_image, count),
            _grouped(reference_alpha, count),
            _grouped(reference_valid, count),
        )


def _grouped(layer: Tensor, count: int) -> Tensor:
    """[N,...] as [count,N/count,...]."""
    return layer.reshape(count, -1, *layer.shape[1:])


def _flat(image: Tensor, alpha: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Layers of [B,T,...] as [N,...]: image float32 0..1, alpha float32 [N,1,S,S] 0..1, valid."""
    return image.flatten(0, 1).float() / 255.0, alpha.flatten(0, 1)[:, None].float() / 255.0, valid.flatten(0, 1)


STAGE = JointStage
