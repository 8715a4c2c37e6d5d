"""The stage "matte": train the head, and the backbone if it is trainable, on pairs of images, as in the paper."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from icm_cli.errors import UsageError
from icm_cli.events import TrainingListener
from icm_cli.files import combined_digest
from icm_cli.geometry import ImageU8, alpha_to_u8
from icm_cli.model.contracts import TrainedHead
from icm_cli.model.core import InContextMatting
from icm_cli.reports.contact_sheet import composite_on_grey
from icm_cli.training.batches import StepSampler, load_batches
from icm_cli.training.data.pool import TrainingPool
from icm_cli.training.data.samples import PairBatch, SampleMaker
from icm_cli.training.feature_cache import FeatureCache
from icm_cli.training.learner import Learner
from icm_cli.training.losses import LOSS_NAMES, compute_losses
from icm_cli.training.settings import Settings
from icm_cli.training.stages import PANEL_ROWS, Prediction, Stage, darken_outside, grey_to_rgb, image_grid


class MatteStage(Stage[PairBatch]):
    """Predicts the alphas of pairs of images, with the losses of the released code (Guo et al. 2024, section 4)."""

    trainable_parts = ("head", "backbone")
    loss_names = LOSS_NAMES

    def __init__(self, settings: Settings, pool: TrainingPool) -> None:
        super().__init__(settings, pool)
        if settings.train.pairs.negative_probability and len(pool.groups) < 2 and not pool.backgrounds:
            raise UsageError(
                "there is only one group and no background, so every image shows the reference's object; add data: "
                "backgrounds, or give the images of each object with 'groups' or subfolders, or set "
                "train.pairs.negative_probability=0"
            )
        self.maker = SampleMaker(pool, settings.train)
        self._model: InContextMatting | None = None
        self._cache: FeatureCache | None = None

    def select_module(self, model: InContextMatting) -> nn.Module:
        return model

    def prepare(self, learner: Learner, folder: Path, first_step: int, listener: TrainingListener) -> None:
        del folder, first_step
        self._model = learner.model
        config = self.settings.train
        if learner.trains_backbone or config.changes_pixels or not config.feature_cache_gb:
            return
        if learner.is_main:
            listener.on_notice(
                "features of the frozen backbone are cached on disk, because no augmentation changes pixels; the noise "
                "is the same in every step"
            )
        backbone = [json.dumps(self.settings.model.as_dict()["backbone"], sort_keys=True), learner.weights_digest]
        digest = combined_digest(*backbone, str(config.seed), learner.device.dtype_name)
        limit_bytes = int(config.feature_cache_gb * 1e9) // learner.accelerator.num_processes
        self._cache = FeatureCache(digest, limit_bytes, notice=listener.on_notice)

    def make_batches(self, sampler: StepSampler, *, workers: int, pin: bool) -> Iterator[PairBatch]:
        return load_batches(self.maker, sampler, PairBatch, workers=workers, pin=pin)

    def predict(self, forward: nn.Module, batch: PairBatch) -> Prediction:
        """Predict the alpha, float32 [B,1,S,S]. At padding it is the true alpha, so that padding has no loss."""
        pairs = batch.to_pairs(fixed_noise=self._cache is not None)
        features = None
        if self._cache is not None and self._model is not None:
            features = self._cache.pair_features(self._model, batch, pairs)
        alpha: Tensor = forward(pairs, features).alpha.float()
        return (torch.where(batch.valid[:, None], alpha, batch.true_alpha()),)

    def compute_losses(self, prediction: Prediction, batch: PairBatch) -> dict[str, Tensor]:
        return compute_losses(prediction[0], batch.true_alpha(), batch.trimap_levels(), self.settings.train.loss)

    @torch.no_grad()
    def render_panel(self, learner: Learner, batch: PairBatch) -> ImageU8:
        """Show for each sample: target, reference, true alpha, prediction, inter- and intra-similarity."""
        head = learner.model.head
        assert isinstance(head, TrainedHead)
        few = batch.first_samples(PANEL_ROWS)
        pairs = few.to_pairs(fixed_noise=self._cache is not None)
        features = learner.model.extract_features(pairs)
        prepared = learner.model.prepare_pairs(pairs, features)
        predicted = head(features.target, prepared, pairs.image, pairs.valid).alpha
        inter, intra = head.similarity_maps(features.target, prepared)
        return image_grid(
            [
                [
                    few.rgb[i].cpu().numpy(),
                    darken_outside(few.reference_rgb[i].cpu().numpy(), few.guidance[i].cpu().numpy()),
                    grey_to_rgb(few.alpha[i].cpu().numpy()),
                    grey_to_rgb(alpha_to_u8(predicted[i, 0].float().cpu().numpy())),
                    _heat_map(inter[i, 0]),
                    _heat_map(intra[i, 0]),
                ]
                for i in range(len(few.names))
            ]
        )

    def preview_sample(self, counter: int) -> tuple[str, list[ImageU8]]:
        """Return reference, target, alpha, trimap and the object cut out of the target."""
        sample = self.maker.make_sample(counter)
        return sample.name, [
            darken_outside(sample.reference_rgb, sample.guidance),
            sample.rgb,
            grey_to_rgb(sample.alpha),
            grey_to_rgb(sample.trimap),
            composite_on_grey(sample.rgb, sample.alpha),
        ]


def _heat_map(values: Tensor) -> ImageU8:
    """Colour a map, [h,w] of any range, from its minimum (dark) to its maximum (bright)."""
    scaled = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
    coloured = cv2.applyColorMap(alpha_to_u8(scaled.float().cpu().numpy()), cv2.COLORMAP_INFERNO)
    return np.asarray(coloured[..., ::-1], np.uint8)


STAGE = MatteStage
