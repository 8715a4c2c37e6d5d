"""The stage "match": train a token-match head to recognise the target object, on stored tokens.

The backbone is frozen, so that every image is encoded only once; its tokens are stored in the run's
folder. A sample is a mosaic of the tokens of one to four images. The reference's object is in one of
them, in several, or in none. This is hundreds of times faster per sample than training on images. Which
images have their tokens stored, and when they are replaced, is decided by
:mod:`icm_cli.training.stages.view_sets`.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from icm_cli.errors import ConfigError, ImageError, UsageError
from icm_cli.events import TrainingListener
from icm_cli.files import combined_digest
from icm_cli.geometry import HALF_U8, ImageU8
from icm_cli.model.contracts import Objects
from icm_cli.model.core import InContextMatting
from icm_cli.model.lite.finetuning import LOSS_TERMS, match_losses
from icm_cli.model.lite.head import TokenMatchHead
from icm_cli.training.batches import StepSampler, initialise_worker
from icm_cli.training.data.pool import TrainingItem, TrainingPool
from icm_cli.training.data.record import DataRecord
from icm_cli.training.data.samples import SampleMaker
from icm_cli.training.data.scenes import Scene
from icm_cli.training.learner import Learner
from icm_cli.training.settings import Settings
from icm_cli.training.stages.contract import PANEL_ROWS, Prediction, Stage
from icm_cli.training.stages.mosaics import (
    LARGE_FACTOR,
    Image,
    Mosaic,
    MosaicBatch,
    TokenMatcher,
    View,
    add_feature_noise,
    collate_mosaics,
    draw_layout,
    encode_views,
    fit_config_to_groups,
    render_mosaics,
    render_preview,
    require_token_match_head,
    sample_mosaic,
)
from icm_cli.training.stages.view_sets import AnyView, ViewFile, ViewPlan, ViewSet, load_views, save_views

TOKENS_FOLDER = "tokens"
"""Folder of the tokens in a run's folder."""
PCA_VIEWS = 400
"""Number of views whose principal components initialise the head's projections."""


class MatchStage(Stage[MosaicBatch]):
    """Predicts on mosaics of stored tokens where the reference's object is."""

    trainable_parts: ClassVar[tuple[str, ...]] = ("head",)
    loss_names: ClassVar[tuple[str, ...]] = LOSS_TERMS
    needs_embeddings: ClassVar[bool] = False
    """Whether views contain the object model's embedding of the image."""

    def __init__(self, settings: Settings, pool: TrainingPool) -> None:
        super().__init__(settings, pool)
        config, self._notice = fit_config_to_groups(settings.train.match, pool)
        self._config = config
        if (
            max(min(config.views_per_group, config.max_views_per_image * len(items)) for items in pool.groups.values())
            < 2
        ):
            raise UsageError(
                "no group has two views, a target and a reference; expected train.match.views_per_group of 2 or more, "
                "and train.match.max_views_per_image of 2 or more or groups of several images"
            )
        if config.large_views_per_group == 1 and config.layout_weights[0]:
            raise ConfigError(
                "train: match: large_views_per_group is 1, but a mosaic of one image needs another view as its "
                "reference; expected 2 or more, or 0, or 0 as the first of layout_weights"
            )
        large = replace(settings.train, canvas_px=LARGE_FACTOR * settings.train.canvas_px)
        self._makers = (SampleMaker(pool, settings.train), SampleMaker(pool, large))
        self._plan = ViewPlan(pool, config, settings.train.seed)
        self._encoder: _ViewEncoder | None = None
        self._views: dict[ViewFile, list[View | None]] = {}
        """Views of the files of the current view set and the next one."""
        self._set_number: int | None = None
        """Number of the current view set."""
        self._small = self._large = ViewSet[View](pool, {})
        self._previews: dict[int, list[Mosaic[Scene]]] = {}
        """The mosaics of the last batch of the preview, by the number of its first sample."""

    def select_module(self, model: InContextMatting) -> nn.Module:
        return TokenMatcher(require_token_match_head(model, "match"))

    def prepare(self, learner: Learner, folder: Path, first_step: int, listener: TrainingListener) -> None:
        if self._notice and learner.is_main:
            listener.on_notice(self._notice)
        objects = _copy_objects_for_inference(learner) if self.needs_embeddings else None
        self._encoder = _ViewEncoder(self.settings, self._makers, learner, objects, folder / TOKENS_FOLDER, listener)
        files = self._plan.files_of_set(self._plan.set_number(first_step))
        due = [*files, *self._plan.files_due(first_step)]
        self._views = self._encoder.prepare_views(due, learner.workers)
        if not learner.is_from_checkpoint and not first_step:
            assert isinstance(learner.model.head, TokenMatchHead)
            views = [view for file in files for view in self._views[file] if view is not None]
            tokens = _sample_tokens(views, self.settings.train.seed)
            learner.model.head.initialise_from_pca(tokens.to(learner.device.torch_device))

    def _load_views(self, files: Sequence[ViewFile]) -> None:
        """Load the views of files from the run's folder, or encode their images."""
        assert self._encoder is not None
        for file in files:
            if file not in self._views:
                self._views[file] = self._encoder.load_or_encode(file)

    def _use_view_set_of(self, step: int) -> None:
        """Use the view set of a step, and encode what the next one needs by this step."""
        self._load_views(self._plan.files_due(step))
        number = self._plan.set_number(step)
        if number == self._set_number:
            return
        files = self._plan.files_of_set(number)
        self._load_views(files)
        for file in [stored for stored in self._views if stored.rotation_part < number]:
            del self._views[file]
        self._small, self._large = (
            ViewSet(self.pool, {file: self._views[file] for file in files if file.is_large == is_large})
            for is_large in (False, True)
        )
        if self._set_number is not None and self._encoder is not None:
            self._encoder.remove_parts_before(number - 1)  # a resumed run may start from an earlier state
        self._set_number = number

    def make_batches(self, sampler: StepSampler, *, workers: int, pin: bool) -> Iterator[MosaicBatch]:
        """Yield batches in the order of the sampler. They are made in this process, which has the tokens."""
        del workers
        for counters in sampler:
            batch = self.make_batch(counters)
            yield batch.pin_memory() if pin else batch

    def predict(self, forward: nn.Module, batch: MosaicBatch) -> Prediction:
        prediction: Prediction = forward(batch)
        return prediction

    def compute_losses(self, prediction: Prediction, batch: MosaicBatch) -> dict[str, Tensor]:
        return match_losses(prediction, batch.alpha, batch.valid, self.settings.train.match.presence_weight)

    @torch.no_grad()
    def render_panel(self, learner: Learner, batch: MosaicBatch) -> ImageU8:
        """Show for each mosaic: true alpha, predicted alpha, and the combined similarity map."""
        few = batch.first_samples(PANEL_ROWS)
        return render_mosaics(few.alpha, self.predict(self.select_module(learner.model), few))

    def preview_sample(self, counter: int) -> tuple[str, list[ImageU8]]:
        """Return the references, the mosaic and its true alpha of a sample of the training."""
        size = self.settings.train.micro_batch_size or self.settings.train.batch_size
        first = counter - counter % size
        if first not in self._previews:
            self._previews = {first: self._draw_scenes(range(first, first + size))}
        mosaic = self._previews[first][counter - first]
        return mosaic.name, render_preview(mosaic)

    def _draw_scenes(self, counters: Sequence[int]) -> list[Mosaic[Scene]]:
        """Draw the mosaics of a batch, of scenes instead of tokens."""
        files = self._plan.files_of_set(self._plan.set_number(counters[0] // self.settings.train.batch_size))
        small, large = (
            ViewSet(
                self.pool,
                {file: [(file, i) for i in range(len(file.items))] for file in files if file.is_large == is_large},
            )
            for is_large in (False, True)
        )

        @functools.cache
        def make_scene(view: tuple[ViewFile, int]) -> Scene | None:
            file, index = view
            scene = _SceneDataset(self._makers, [file], self.settings.train.seed)[0, index]
            return scene if isinstance(scene, Scene) else None

        rng = self._batch_rng(counters)
        return self._draw_mosaics(counters, small, large, rng, make_scene, lambda scene: scene.alpha.max() > HALF_U8)

    def make_batch(self, counters: Sequence[int]) -> MosaicBatch:
        """Make samples number ``counters``, which are the same in every run with the same seed.

        All of them have the same layout. Raises TrainingError if the images do not suffice for a mosaic.
        """
        self._use_view_set_of(counters[0] // self.settings.train.batch_size)
        rng = self._batch_rng(counters)
        mosaics = self._draw_mosaics(
            counters, self._small, self._large, rng, lambda view: view, lambda view: bool(view.alpha.max() > 0.5)
        )
        batch = collate_mosaics(mosaics, counters)
        return add_feature_noise(batch, self._config.feature_noise, rng) if self._config.feature_noise else batch

    def _batch_rng(self, counters: Sequence[int]) -> np.random.Generator:
        return np.random.default_rng((self.settings.train.seed, 1, counters[0]))

    def _draw_mosaics(
        self,
        counters: Sequence[int],
        small: ViewSet[AnyView],
        large: ViewSet[AnyView],
        rng: np.random.Generator,
        load: Callable[[AnyView], Image | None],
        has_object: Callable[[Image], bool],
    ) -> list[Mosaic[Image]]:
        """Draw mosaics of the same layout. ``load`` returns the image of a view, or None if it cannot be read."""
        layout = draw_layout(self._config, rng)
        targets = large if large and layout[:2] == (1, 1) else small
        guides = large if large and rng.random() < 0.5 else small

        def draw_image(views: ViewSet[AnyView], item: TrainingItem) -> Image | None:
            view = views.draw_view(item, rng)
            return None if view is None else load(view)

        def draw_reference(item: TrainingItem) -> Image | None:
            image = draw_image(guides, item)
            return image if image is not None and has_object(image) else None

        return [
            sample_mosaic(
                targets.pool,
                self._config,
                layout,
                rng,
                as_target=lambda item: draw_image(targets, item),
                as_reference=draw_reference,
                reference_pool=guides.pool,
            )
            for _ in counters
        ]


class _ViewEncoder:
    """Encodes images with the backbone and stores their views in a run's folder."""

    def __init__(
        self,
        settings: Settings,
        makers: tuple[SampleMaker, SampleMaker],
        learner: Learner,
        objects: Objects | None,
        folder: Path,
        listener: TrainingListener,
    ) -> None:
        self._seed = settings.train.seed
        self._makers = makers
        self._learner = learner
        self._objects = objects
        self._folder = folder
        self._listener = listener
        data = DataRecord.from_files(makers[0].pool.files, DataRecord.load(folder.parent))
        self._recipe = _recipe_digest(settings, learner, data, needs_embeddings=objects is not None)
        if learner.is_main:
            folder.mkdir(exist_ok=True)

    def prepare_views(self, files: Sequence[ViewFile], workers: int) -> dict[ViewFile, list[View | None]]:
        """Return the views of files, None for an image that cannot be read, and report the progress.

        Each file is stored as soon as it is encoded, so that an interrupted run can be resumed.
        """
        views = {file: file_views for file in files if (file_views := self._load_file(file)) is not None}
        missing = [file for file in files if file not in views]
        if not missing:
            return views
        encoded = sum(len(file_views) for file_views in views.values())
        with self._listener.encoding_images(sum(len(file.items) for file in files), encoded):

            def report(count: int) -> None:
                nonlocal encoded
                encoded += count
                self._listener.on_encoding_progress(encoded)

            for file, file_views in self._encode(missing, workers, report):
                views[file] = self._store_file(file, file_views)
        return {file: views[file] for file in files}

    def load_or_encode(self, file: ViewFile) -> list[View | None]:
        """Return the views of a file, None for an image that cannot be read."""
        views = self._load_file(file)
        if views is None:
            ((_, views),) = self._encode([file], workers=0)
            views = self._store_file(file, views)
        return views

    def _load_file(self, file: ViewFile) -> list[View | None] | None:
        return load_views(self._folder / file.name, self._file_digest(file))

    def _store_file(self, file: ViewFile, views: list[View | None]) -> list[View | None]:
        """Write views to the run's folder, and return them memory-mapped, so that the system can free the memory."""
        if not self._learner.is_main:
            return views
        save_views(self._folder / file.name, self._file_digest(file), views)
        return self._load_file(file) or views

    def remove_parts_before(self, part: int) -> None:
        """Remove the files of earlier parts, which no view set needs any more."""
        if self._learner.is_main:
            for path in self._folder.glob("*.pt"):
                if path.name.partition("-")[0].isdigit() and int(path.name.partition("-")[0]) < part:
                    path.unlink(missing_ok=True)

    def _encode(
        self, files: Sequence[ViewFile], workers: int, report: Callable[[int], None] = lambda _: None
    ) -> Iterator[tuple[ViewFile, list[View | None]]]:
        """Yield the views of files, encoded in batches. ``report`` gets the number of images of each batch."""
        learner = self._learner
        scenes = _SceneDataset(self._makers, files, self._seed)
        loader = DataLoader(
            scenes,
            batch_sampler=scenes.list_batches(learner.device.auto_batch_size),
            collate_fn=list,
            num_workers=workers,
            worker_init_fn=initialise_worker if workers else None,
            multiprocessing_context="spawn" if workers else None,
            generator=torch.Generator(),  # leaves the default generator to the model
        )
        batches = iter(loader)
        for file in files:
            views: list[View | None] = []
            while len(views) < len(file.items):
                batch = next(batches)
                for scene in batch:
                    if isinstance(scene, str):
                        self._listener.on_notice(f"skipped: {scene}")
                readable = [scene for scene in batch if isinstance(scene, Scene)]
                encoded = _encode_scenes(learner, readable, self._objects) if readable else iter(())
                views += [None if isinstance(scene, str) else next(encoded) for scene in batch]
                report(len(batch))
            yield file, views

    def _file_digest(self, file: ViewFile) -> str:
        seed = file.scene_seed(self._seed, 0)
        return combined_digest(self._recipe, str(seed), *(f"{item.group} {item.name}" for item in file.items))


class _SceneDataset(Dataset["Scene | str"]):
    """Scenes of the items of files, with random distractors; for an unreadable item, a str with the reason."""

    def __init__(self, makers: tuple[SampleMaker, SampleMaker], files: Sequence[ViewFile], seed: int) -> None:
        self._makers = makers
        self._files = files
        self._seed = seed

    def list_batches(self, size: int) -> list[list[tuple[int, int]]]:
        """Return batches of (file number, item number), of at most ``size`` items of the same file."""
        return [
            [(number, index) for index in range(start, min(start + size, len(file.items)))]
            for number, file in enumerate(self._files)
            for start in range(0, len(file.items), size)
        ]

    def __getitem__(self, numbers: tuple[int, int]) -> Scene | str:
        file_number, index = numbers
        file = self._files[file_number]
        rng = np.random.default_rng(file.scene_seed(self._seed, index))
        try:
            scene = self._makers[file.is_large].make_view(file.items[index], rng)
        except ImageError as error:
            return str(error)
        return replace(scene, trimap=None, coarse=None)


def _recipe_digest(settings: Settings, learner: Learner, data: DataRecord, *, needs_embeddings: bool) -> str:
    """Return a digest of everything that determines a view, except its item and seed.

    That is the backbone, the inputs of the head's decoder, the recipe of the scenes, and the files of the data.
    """
    model, train = settings.model.as_dict(), settings.as_dict()["train"]
    decoder = [len(model["head"][name]) for name in ("skip_channels", "decoder_channels")]
    recipe = [
        *(model["backbone"], decoder, learner.weights_digest, data.digest),
        *(train[name] for name in ("canvas_px", "pairs", "augment", "seed")),
        model["objects"] if needs_embeddings else None,
    ]
    encoder = learner.model.objects if needs_embeddings else None
    frozen = () if encoder is None else (each for each in encoder.parameters() if not each.requires_grad)
    return combined_digest(json.dumps(recipe, sort_keys=True), *(each.cpu().numpy().tobytes() for each in frozen))


def _copy_objects_for_inference(learner: Learner) -> Objects | None:
    """Return a copy of the object model that is optimised for inference, several times faster."""
    objects = copy.deepcopy(learner.model.objects)
    if objects is not None:
        objects.optimise_for_inference()
        objects.set_dtype(learner.device.dtype, learner.device.transformer_dtype)
    return objects


@torch.no_grad()
def _encode_scenes(learner: Learner, scenes: Sequence[Scene], objects: Objects | None) -> Iterator[View]:
    """Yield the views of scenes, in half precision on the CPU."""
    device = learner.device.torch_device
    rgb, alpha, valid = (
        torch.from_numpy(np.stack([getattr(scene, name) for scene in scenes])).to(device)
        for name in ("rgb", "alpha", "valid")
    )
    image, alpha = rgb.permute(0, 3, 1, 2).float() / 255.0, alpha[:, None].float() / 255.0
    head = learner.model.head
    assert isinstance(head, TokenMatchHead)
    for view in encode_views(learner.model.backbone, head, image, alpha, valid, objects):
        yield View(
            view.feature.half().cpu(),
            tuple(scale.half().cpu() for scale in view.scales),
            view.alpha.half().cpu(),
            view.inside.cpu(),
            view.outside.cpu(),
            view.valid.cpu(),
            view.embedding.half().cpu(),
        )


def _sample_tokens(views: Sequence[View], seed: int) -> Tensor:
    """Return the tokens, float32 [N,C], of views drawn with ``seed``."""
    drawn = np.random.default_rng(seed).permutation(len(views))[:PCA_VIEWS]
    return torch.cat([views[index].feature.flatten(1).T.float() for index in drawn])


STAGE = MatchStage
