"""The stage "match": train a token-match head on stored tokens to recognise the target object.

The backbone is frozen, so that every image is encoded only once; its tokens are stored in the run's folder. A sample is
a mosaic of the tokens of one to four images. The reference's object is in one of them, in several, or in none. This is
hundreds of times faster per sample than training on images. :mod:`icm_cli.training.stages.view_sets` decides which
images have stored tokens, and when they are replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from icm_cli.errors import ConfigError, UsageError
from icm_cli.events import TrainingListener
from icm_cli.geometry import ImageU8
from icm_cli.model.core import InContextMatting
from icm_cli.model.lite.finetuning import match_losses
from icm_cli.model.lite.head import TokenMatchHead
from icm_cli.training.data.pool import TrainingItem, TrainingPool
from icm_cli.training.data.scenes import Scene
from icm_cli.training.learner import Learner
from icm_cli.training.settings import Settings
from icm_cli.training.stages import PANEL_ROWS, Prediction
from icm_cli.training.stages.mosaics import (
    ImageSource,
    ImageT,
    Mosaic,
    MosaicBatch,
    MosaicStage,
    TokenMatcher,
    View,
    add_feature_noise,
    collate_mosaics,
    draw_mosaics,
    render_mosaics,
    require_token_match_head,
)
from icm_cli.training.stages.view_sets import SceneDataset, ViewEncoder, ViewFile, ViewPlan, Views

PCA_VIEWS = 400
"""Number of views whose principal components initialise the head's projections."""


class MatchStage(MosaicStage[MosaicBatch]):
    """Predicts where the reference's object is, on mosaics of stored tokens."""

    trainable_parts: ClassVar[tuple[str, ...]] = ("head",)
    needs_embeddings: ClassVar[bool] = False
    """Whether views contain the object model's embedding of the image."""

    def __init__(self, settings: Settings, pool: TrainingPool) -> None:
        super().__init__(settings, pool)
        config = self._config
        group_sizes = [len(items) for items in pool.groups.values()]
        if min(config.views_per_group, config.max_views_per_image * max(group_sizes)) < 2:
            raise UsageError(
                "no group has two views, a target and a reference; expected train.match.views_per_group of 2 or more, "
                "and train.match.max_views_per_image of 2 or more or groups of several images"
            )
        if config.large_views_per_group == 1 and config.layout_weights[0]:
            raise ConfigError(
                "train: match: large_views_per_group is 1, but a mosaic of one image needs another view as its "
                "reference; expected 2 or more, or 0, or 0 as the first of layout_weights"
            )
        self._plan = ViewPlan(pool, config, settings.train.seed)
        self._encoder: ViewEncoder | None = None
        self._views: dict[ViewFile, Views] = {}
        """Views of the files of the current view set and the next one."""
        self._set_number: int | None = None
        """Number of the current view set."""
        self._sources: tuple[ImageSource[View], ImageSource[View] | None] | None = None
        """Small and large views of the current view set."""
        self._empty_alphas: tuple[Path, ...] = ()
        """Alphas without an object in the current view set."""

    def select_module(self, model: InContextMatting) -> nn.Module:
        return TokenMatcher(require_token_match_head(model, "match"))

    def prepare(self, learner: Learner, folder: Path, first_step: int, listener: TrainingListener) -> None:
        super().prepare(learner, folder, first_step, listener)
        self._encoder = ViewEncoder(
            self.pool, self.settings, learner, folder, listener, needs_embeddings=self.needs_embeddings
        )
        files = self._plan.files_of_set(self._plan.set_number(first_step))
        due = [*files, *self._plan.files_due(first_step)]
        self._views = self._encoder.load_views(due, learner.workers, is_start=True)
        is_new_head = not learner.is_from_checkpoint and first_step == 0
        if is_new_head:
            self._initialise_head(learner, files)

    def _initialise_head(self, learner: Learner, files: Sequence[ViewFile]) -> None:
        """Initialise the projections of a new head by the principal components of the tokens of random views."""
        assert isinstance(learner.model.head, TokenMatchHead)
        views = [view for file in files for view in self._views[file] if view is not None]
        indices = np.random.default_rng(self.settings.train.seed).permutation(len(views))[:PCA_VIEWS]
        tokens = torch.cat([views[index].feature.flatten(1).T.float() for index in indices])
        learner.model.head.initialise_from_pca(tokens.to(learner.device.torch_device))

    def _load_views(self, files: Sequence[ViewFile]) -> None:
        """Load the views of files that are not in memory yet."""
        assert self._encoder is not None
        self._views |= self._encoder.load_views([file for file in files if file not in self._views])

    def _use_view_set_of(self, step: int) -> None:
        """Switch to the view set of a step, and load or encode the files of the next one that are due now."""
        self._load_views(self._plan.files_due(step))
        number = self._plan.set_number(step)
        if number == self._set_number:
            return
        files = self._plan.files_of_set(number)
        self._load_views(files)
        # A set consists of the parts from its own number on, so earlier parts are not needed any more.
        self._views = {file: views for file, views in self._views.items() if file.rotation_part >= number}
        self._sources = _split_by_size(self.pool, {file: self._views[file] for file in files}, lambda view: view)
        self._empty_alphas = tuple(
            item.alpha_file
            for file in files
            for item, view in zip(file.items, self._views[file], strict=True)
            if view is not None and not view.alpha.any()
        )
        if self._set_number is not None and self._encoder is not None:
            self._encoder.remove_parts_before(number - 1)  # a resumed run may need the set before
        self._set_number = number

    def make_batches(self, learner: Learner, first_step: int) -> Iterator[MosaicBatch]:
        """Yield the batches. They are made in this process, which has the tokens in memory, and not in workers."""
        return map(self.make_batch, learner.sample_numbers(first_step))

    def make_batch(self, sample_numbers: Sequence[int]) -> MosaicBatch:
        """Make the samples of these numbers, which are the same in every run with the same seed.

        All of them have the same layout. Raises TrainingError if there are too few images for a mosaic.
        """
        self._use_view_set_of(sample_numbers[0] // self.settings.train.batch_size)
        assert self._sources is not None
        rng = self._batch_rng(sample_numbers)
        mosaics = draw_mosaics(self._config, *self._sources, len(sample_numbers), rng)
        batch = collate_mosaics(mosaics, sample_numbers)
        if self._config.feature_noise:
            batch = add_feature_noise(batch, self._config.feature_noise, rng)
        return replace(batch, empty_alphas=self._empty_alphas)

    def compute_losses(self, prediction: Prediction, batch: MosaicBatch) -> dict[str, Tensor]:
        return match_losses(prediction, batch.alpha, batch.valid, self._config.presence_weight)

    @torch.no_grad()
    def render_panel(self, learner: Learner, batch: MosaicBatch) -> ImageU8:
        """Show for each mosaic: true alpha, predicted alpha, and the combined similarity map."""
        shown = batch.first_samples(PANEL_ROWS)
        return render_mosaics(shown.alpha, self.predict(self.select_module(learner.model), shown))

    def draw_scenes(self, sample_numbers: Sequence[int]) -> list[Mosaic[Scene]]:
        step = sample_numbers[0] // self.settings.train.batch_size
        files = self._plan.files_of_set(self._plan.set_number(step))
        scenes = SceneDataset(self.pool, self.settings, files)
        scene_keys = {file: [(number, index) for index in range(len(file.items))] for number, file in enumerate(files)}

        @functools.cache
        def make_scene(key: tuple[int, int]) -> Scene | None:
            return scenes[key][0]

        sources = _split_by_size(self.pool, scene_keys, make_scene)
        return draw_mosaics(self._config, *sources, len(sample_numbers), self._batch_rng(sample_numbers))

    def _batch_rng(self, sample_numbers: Sequence[int]) -> np.random.Generator:
        """Return the generator of the random numbers of a batch. Training and preview draw the same mosaics with it."""
        return np.random.default_rng((self.settings.train.seed, 1, sample_numbers[0]))


def _split_by_size(
    pool: TrainingPool, files: Mapping[ViewFile, Sequence[Any]], load: Callable[[Any], ImageT | None]
) -> tuple[ImageSource[ImageT], ImageSource[ImageT] | None]:
    """Return the source of small views, and that of large views if there are any.

    ``files``: for each file, what ``load`` needs to return the image of each of its items; None: it cannot be read.
    """
    small: dict[TrainingItem, list[Any]] = {}
    large: dict[TrainingItem, list[Any]] = {}
    for file, views_of_file in files.items():
        views = large if file.is_large else small
        for item, view in zip(file.items, views_of_file, strict=True):
            if view is not None:
                views.setdefault(item, []).append(view)
    return ImageSource(pool, small, load), ImageSource(pool, large, load) if large else None


STAGE = MatchStage
