"""The stage "joint": train the token-match head and the backbone on mosaics. Experimental: never measured on a GPU.

The mosaics are those of the stage "match", but every image is made and encoded for its step, so that no view is seen
twice and gradients reach the backbone. The stage is for GPUs: all images are stored on the training device, and samples
are made there (:mod:`icm_cli.training.data.device_scenes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from icm_cli.errors import ImageError
from icm_cli.events import TrainingListener
from icm_cli.geometry import ImageU8
from icm_cli.model.contracts import Backbone
from icm_cli.model.core import InContextMatting
from icm_cli.model.lite.finetuning import LOSS_TERMS, match_losses
from icm_cli.model.lite.head import TokenMatchHead
from icm_cli.training.batches import Batch, StepSampler
from icm_cli.training.data.device_scenes import DeviceScenes, ScenePlan
from icm_cli.training.data.pool import TrainingItem, TrainingPool
from icm_cli.training.data.samples import SampleMaker
from icm_cli.training.data.scenes import Scene
from icm_cli.training.learner import Learner
from icm_cli.training.settings import Settings
from icm_cli.training.stages import PANEL_ROWS, Prediction, Stage
from icm_cli.training.stages.mosaics import (
    LARGE_FACTOR,
    Mosaic,
    MosaicSampler,
    TokenMatcher,
    collate_mosaics,
    draw_layout,
    encode_views,
    fit_config_to_groups,
    render_mosaics,
    render_preview,
    require_token_match_head,
)


@dataclass(frozen=True)
class ImageBatch(Batch):
    """Images of mosaics of ``rows`` times ``columns`` = T tiles, with R references each.

    image uint8 [B,T,3,S,S], alpha uint8 and valid bool [B,T,S,S]; the same for the references, [B,R,...,S',S'];
    positive_tiles: for each mosaic the tiles that show the references' object.
    """

    rows: int
    columns: int
    positive_tiles: tuple[tuple[int, ...], ...]
    image: Tensor
    alpha: Tensor
    valid: Tensor
    reference_image: Tensor
    reference_alpha: Tensor
    reference_valid: Tensor


class JointMatcher(nn.Module):
    """Runs backbone and token-match head on images; see :class:`TokenMatcher`."""

    def __init__(self, backbone: Backbone, head: TokenMatchHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, batch: ImageBatch) -> Prediction:
        """Return the outputs of :class:`TokenMatcher`, the true alphas [B,nH,nW], and the valid tokens [B,H,W]."""
        tiles, references = (
            list(encode_views(self.backbone, self.head, *_flatten_images(*layers)))
            for layers in (
                (batch.image, batch.alpha, batch.valid),
                (batch.reference_image, batch.reference_alpha, batch.reference_valid),
            )
        )
        count = len(batch.names)
        tile_count, reference_count = len(tiles) // count, len(references) // count
        mosaics = [
            Mosaic(
                name,
                batch.rows,
                batch.columns,
                references[i * reference_count : (i + 1) * reference_count],
                tiles[i * tile_count : (i + 1) * tile_count],
                positive_tiles,
            )
            # (first_samples() shortens the names, but not positive_tiles)
            for i, (name, positive_tiles) in enumerate(zip(batch.names, batch.positive_tiles, strict=False))
        ]
        tokens = collate_mosaics(mosaics, batch.counters)
        return (*TokenMatcher(self.head)(tokens), tokens.alpha, tokens.valid)


class JointStage(Stage[ImageBatch]):
    """Predicts on mosaics of images where the reference's object is."""

    trainable_parts = ("head", "backbone")
    loss_names = LOSS_TERMS

    def __init__(self, settings: Settings, pool: TrainingPool) -> None:
        super().__init__(settings, pool)
        self._config, self._notice = fit_config_to_groups(settings.train.match, pool)
        self._scenes: DeviceScenes | None = None

    def select_module(self, model: InContextMatting) -> nn.Module:
        return JointMatcher(model.backbone, require_token_match_head(model, "joint"))

    def prepare(self, learner: Learner, folder: Path, first_step: int, listener: TrainingListener) -> None:
        del folder, first_step
        if self._notice and learner.is_main:
            listener.on_notice(self._notice)
        train = self.settings.train
        self._scenes = DeviceScenes(
            self.pool, train, learner.device.torch_device, side_px=train.match.max_image_px, notice=listener.on_notice
        )

    def make_batches(self, sampler: StepSampler, *, workers: int, pin: bool) -> Iterator[ImageBatch]:
        """Yield batches in the order of the sampler. They are made on the training device, without workers."""
        del workers, pin
        for counters in sampler:
            yield self.make_batch(counters)

    def predict(self, forward: nn.Module, batch: ImageBatch) -> Prediction:
        prediction: Prediction = forward(batch)
        return prediction

    def compute_losses(self, prediction: Prediction, batch: ImageBatch) -> dict[str, Tensor]:
        del batch
        *outputs, truth, valid = prediction
        return match_losses(tuple(outputs), truth, valid, self.settings.train.match.presence_weight)

    @torch.no_grad()
    def render_panel(self, learner: Learner, batch: ImageBatch) -> ImageU8:
        """Show for each mosaic: true alpha, predicted alpha, and the combined similarity map."""
        *outputs, truth, _ = self.predict(self.select_module(learner.model), batch.first_samples(PANEL_ROWS))
        return render_mosaics(truth, tuple(outputs))

    def preview_sample(self, counter: int) -> tuple[str, list[ImageU8]]:
        """Return the references, the mosaic and its true alpha of a sample like those of the training.

        Its images are made on the CPU, as for the stage "match".
        """
        train = self.settings.train
        maker, rng = SampleMaker(self.pool, train), np.random.default_rng((train.seed, 1, counter))

        def make_scene(item: TrainingItem) -> Scene | None:
            try:
                return maker.make_view(item, rng)
            except ImageError:
                return None

        layout = draw_layout(self._config, rng)
        mosaic = MosaicSampler(self.pool, self.pool, self._config, layout, rng, make_scene, make_scene).sample()
        return mosaic.name, render_preview(mosaic)

    def make_batch(self, counters: Sequence[int]) -> ImageBatch:
        """Make samples number ``counters``, which are the same in every run with the same seed.

        All of them have the same layout. Raises TrainingError if the images do not suffice for a mosaic.
        """
        assert self._scenes is not None
        scenes, train = self._scenes, self.settings.train
        config = self._config
        rng = np.random.default_rng((train.seed, 1, counters[0]))
        layout = rows, columns, _ = draw_layout(config, rng)
        large = LARGE_FACTOR * train.canvas_px if config.large_views_per_group else train.canvas_px
        tile_px = large if (rows, columns) == (1, 1) else train.canvas_px
        reference_px = large if rng.random() < 0.5 else train.canvas_px

        def plan_scene(item: TrainingItem, canvas_px: int) -> ScenePlan | None:
            return scenes.plan_scene(item, canvas_px, rng) if item in scenes.items else None

        sampler = MosaicSampler(
            self.pool,
            self.pool,
            config,
            layout,
            rng,
            lambda item: plan_scene(item, tile_px),
            lambda item: plan_scene(item, reference_px),
        )
        mosaics = [sampler.sample() for _ in counters]
        image, alpha, valid = scenes.render_scenes([plan for mosaic in mosaics for plan in mosaic.tiles], tile_px)
        references = scenes.render_scenes([plan for mosaic in mosaics for plan in mosaic.references], reference_px)
        layers = (layer.reshape(len(mosaics), -1, *layer.shape[1:]) for layer in (image, alpha, valid, *references))
        return ImageBatch(
            tuple(mosaic.name for mosaic in mosaics),
            tuple(counters),
            (),
            rows,
            columns,
            tuple(mosaic.positive_tiles for mosaic in mosaics),
            *layers,
        )


def _flatten_images(image: Tensor, alpha: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reshape layers [B,T,...] to [N,...]: image float32 0..1, alpha float32 [N,1,S,S] 0..1, valid."""
    return image.flatten(0, 1).float() / 255.0, alpha.flatten(0, 1)[:, None].float() / 255.0, valid.flatten(0, 1)


STAGE = JointStage
