"""The stage "end-to-end": train token-match head and backbone on mosaics. Experimental: never measured on a GPU.

The mosaics are those of the stage "match", but every image is made and encoded for its step, so that no view is seen
twice and gradients reach the backbone. That needs a GPU, and worker processes that make the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from icm_cli.errors import ImageError
from icm_cli.geometry import ImageU8
from icm_cli.model.contracts import Backbone
from icm_cli.model.core import InContextMatting
from icm_cli.model.lite.finetuning import match_losses
from icm_cli.model.lite.head import TokenMatchHead
from icm_cli.training.batches import Batch, BatchMaker
from icm_cli.training.data.pool import TrainingItem, TrainingPool
from icm_cli.training.data.scenes import Scene, SceneMaker
from icm_cli.training.learner import Learner
from icm_cli.training.settings import MatchStageConfig, Settings, TrainConfig
from icm_cli.training.stages import PANEL_ROWS, Prediction
from icm_cli.training.stages.mosaics import (
    LARGE_FACTOR,
    ImageSource,
    Mosaic,
    MosaicLayout,
    MosaicStage,
    TokenMatcher,
    draw_mosaics,
    encode_scenes,
    render_mosaics,
    require_token_match_head,
    stack_scenes,
)


@dataclass(frozen=True)
class SceneBatch(Batch):
    """Images of B mosaics of ``rows`` times ``columns`` = T tiles, with R references each.

    is_positive: which tiles show the references' object, bool [B,T]; tiles: rgb uint8 [B,T,S,S,3], alpha uint8 and
    valid bool [B,T,S,S]; references: the same layers, [B,R,S',S',...].
    """

    rows: int
    columns: int
    is_positive: Tensor
    tiles: tuple[Tensor, ...]
    references: tuple[Tensor, ...]


@dataclass
class _BatchScenes:
    """Makes the scenes of one batch."""

    rng: np.random.Generator
    skipped: list[str] = field(default_factory=list)
    """Why images could not be read."""
    empty_alphas: list[Path] = field(default_factory=list)
    """Alphas without an object."""

    def make_source(self, maker: SceneMaker) -> ImageSource[Scene]:
        """Return a source that makes a new scene whenever an image is drawn."""
        one_view = {item: [item] for item in maker.pool}
        return ImageSource(maker.pool, one_view, partial(self._make_scene, maker))

    def _make_scene(self, maker: SceneMaker, item: TrainingItem) -> Scene | None:
        """Make a scene; None if its image cannot be read."""
        try:
            scene = maker.make_view(item, self.rng)
        except ImageError as error:
            self.skipped.append(str(error))
            return None
        if not scene.alpha.any():
            self.empty_alphas.append(item.alpha_file)
        return scene


class SceneMosaicMaker(BatchMaker[SceneBatch]):
    """Makes mosaics of new scenes."""

    def __init__(self, pool: TrainingPool, train: TrainConfig, config: MatchStageConfig) -> None:
        self._seed = train.seed
        self._config = config
        self._small = SceneMaker(pool, train)
        self._large = SceneMaker(pool, train, LARGE_FACTOR * train.canvas_px) if config.large_views_per_group else None

    def draw_mosaics(self, sample_numbers: Sequence[int]) -> tuple[list[Mosaic[Scene]], _BatchScenes]:
        """Draw the mosaics of a batch; return them and the maker of their scenes. Raises TrainingError."""
        rng = np.random.default_rng((self._seed, 1, sample_numbers[0]))
        scenes = _BatchScenes(rng)
        large = None if self._large is None else scenes.make_source(self._large)
        return draw_mosaics(self._config, scenes.make_source(self._small), large, len(sample_numbers), rng), scenes

    def make_batch(self, sample_numbers: Sequence[int]) -> SceneBatch:
        mosaics, scenes = self.draw_mosaics(sample_numbers)
        return SceneBatch(
            names=tuple(mosaic.name for mosaic in mosaics),
            sample_numbers=tuple(sample_numbers),
            skipped=tuple(scenes.skipped),
            empty_alphas=tuple(scenes.empty_alphas),
            rows=mosaics[0].rows,
            columns=mosaics[0].columns,
            is_positive=torch.tensor([mosaic.is_positive for mosaic in mosaics]),
            tiles=_stack_groups([mosaic.tiles for mosaic in mosaics]),
            references=_stack_groups([mosaic.references for mosaic in mosaics]),
        )


def _stack_groups(groups: Sequence[Sequence[Scene]]) -> tuple[Tensor, ...]:
    """Return the layers of B groups of T scenes, see :func:`stack_scenes`: [B,T,S,S,...] each."""
    layers = stack_scenes([scene for group in groups for scene in group])
    return tuple(layer.reshape(len(groups), -1, *layer.shape[1:]) for layer in layers)


class EndToEndMatcher(nn.Module):
    """Runs backbone and token-match head on images; see :class:`TokenMatcher`."""

    def __init__(self, backbone: Backbone, head: TokenMatchHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, batch: SceneBatch) -> Prediction:
        """Return the outputs of :class:`TokenMatcher`, the true alphas [B,nH,nW], and the valid tokens [B,H,W]."""
        tiles = encode_scenes(self.backbone, self.head, [layer.flatten(0, 1) for layer in batch.tiles])
        references = encode_scenes(self.backbone, self.head, [layer.flatten(0, 1) for layer in batch.references])
        layout = MosaicLayout(batch.names, batch.sample_numbers, batch.rows, batch.columns, batch.is_positive)
        tokens = layout.make_batch(tiles, references)
        return (*TokenMatcher(self.head)(tokens), tokens.alpha, tokens.valid)


class EndToEndStage(MosaicStage[SceneBatch]):
    """Predicts where the reference's object is, on mosaics of images."""

    trainable_parts = ("head", "backbone")

    def __init__(self, settings: Settings, pool: TrainingPool) -> None:
        super().__init__(settings, pool)
        self.maker: SceneMosaicMaker = SceneMosaicMaker(pool, settings.train, self._config)

    def select_module(self, model: InContextMatting) -> nn.Module:
        return EndToEndMatcher(model.backbone, require_token_match_head(model, "end-to-end"))

    def draw_scenes(self, sample_numbers: Sequence[int]) -> list[Mosaic[Scene]]:
        return self.maker.draw_mosaics(sample_numbers)[0]

    def compute_losses(self, prediction: Prediction, batch: SceneBatch) -> dict[str, Tensor]:
        del batch
        *outputs, truth, valid = prediction
        return match_losses(outputs, truth, valid, self._config.presence_weight)

    @torch.no_grad()
    def render_panel(self, learner: Learner, batch: SceneBatch) -> ImageU8:
        """Show for each mosaic: true alpha, predicted alpha, and the combined similarity map."""
        *outputs, truth, _ = self.predict(self.select_module(learner.model), batch.first_samples(PANEL_ROWS))
        return render_mosaics(truth, tuple(outputs))


STAGE = EndToEndStage
