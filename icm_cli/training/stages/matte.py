"""The stage "matte": the head, and the backbone where it may, learn from pairs of pictures, as in the paper."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from icm_cli.files import combined_digest
from icm_cli.geometry import ImageU8
from icm_cli.model.core import InContextMatting
from icm_cli.reports.contact_sheet import composite_on_grey
from icm_cli.training.batches import StepSampler, load_batches
from icm_cli.training.data.pool import Pool
from icm_cli.training.data.samples import PairBatch, SampleMaker, collated
from icm_cli.training.feature_cache import FeatureCache
from icm_cli.training.losses import TERMS, losses
from icm_cli.training.panels import masked, panel
from icm_cli.training.settings import Settings
from icm_cli.training.stages.contract import Answer, Stage

if TYPE_CHECKING:
    from icm_cli.events import TrainingListener
    from icm_cli.training.learner import Learner


class MatteStage(Stage[PairBatch]):
    """Pairs of pictures in, an alpha out, the losses of the released code (Guo et al. 2024, section 4)."""

    learns = ("head", "backbone")
    terms = TERMS

    def __init__(self, settings: Settings, pool: Pool) -> None:
        super().__init__(settings, pool)
        self.maker = SampleMaker(pool, settings.train)
        self._model: InContextMatting | None = None
        self._cache: FeatureCache | None = None

    def module(self, model: InContextMatting) -> nn.Module:
        return model

    def prepare(self, learner: Learner, folder: Path, first_step: int, listener: TrainingListener) -> None:  # noqa: ARG002
        self._model = learner.model
        config = self.settings.train
        if learner.trains_backbone or config.changes_pixels or not config.feature_cache_gb:
            return
        if learner.is_main:
            listener.on_notice(
                "features of the frozen backbone are kept on disk, as no augmentation changes pixels; the noise is "
                "the same for every step"
            )
        decides = [json.dumps(self.settings.model.as_dict()["backbone"], sort_keys=True), learner.weights_digest]
        digest = combined_digest(*decides, str(config.seed), learner.device.dtype_name)
        room = int(config.feature_cache_gb * 1e9) // learner.accelerator.num_processes
        self._cache = FeatureCache(digest, room, notice=listener.on_notice)

    def batches(self, sampler: StepSampler, *, workers: int, pin: bool) -> Iterator[PairBatch]:
        return load_batches(self.maker, sampler, collated, workers=workers, pin=pin)

    def answer(self, forward: nn.Module, batch: PairBatch) -> Answer:
        pairs = batch.pairs(fixed_noise=self._cache is not None)
        features = None
        if self._cache is not None and self._model is not None:
            features = self._cache.features(self._model, batch, pairs)
        alpha: Tensor = forward(pairs, features).alpha.float()
        # Padding is no one's fault: where the truth stands in for the prediction, no loss has a gradient.
        return (torch.where(batch.valid[:, None], alpha, batch.truth()),)

    def losses(self, answer: Answer, batch: PairBatch) -> dict[str, Tensor]:
        return losses(answer[0], batch.truth(), batch.trimap_levels(), self.settings.train.loss)

    def panel(self, learner: Learner, batch: PairBatch) -> ImageU8:
        return panel(learner.model, batch, fixed_noise=self._cache is not None)

    def preview(self, counter: int) -> tuple[str, list[ImageU8]]:
        sample = self.maker.sample(counter)
        return sample.name, [
            masked(sample.reference_rgb, sample.guidance),
            sample.rgb,
            np.repeat(sample.alpha[..., None], 3, -1),
            np.repeat(sample.trimap[..., None], 3, -1),
            composite_on_grey(sample.rgb, sample.alpha),
        ]


STAGE = MatteStage
