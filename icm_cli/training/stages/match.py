"""The stage "match": a token-match head learns which thing is meant, on the tokens of pictures alone.

The backbone is frozen, so every picture is seen by it once and its tokens are kept in the run's folder. A sample is
then a mosaic of one to four pictures' tokens, of which one shows the reference's thing, or several, or none: hundreds
of times cheaper than a sample of pictures, and it asks nothing but which thing is meant. Which images have their tokens
kept, and when they are replaced, is decided by :mod:`icm_cli.training.stages.view_sets`.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from icm_cli.errors import ConfigError, ImageError
from icm_cli.files import combined_digest
from icm_cli.geometry import ImageU8
from icm_cli.model.contracts import Objects
from icm_cli.model.core import InContextMatting
from icm_cli.model.lite.finetuning import LOSS_TERMS, match_losses
from icm_cli.model.lite.head import TokenMatchHead
from icm_cli.training.batches import StepSampler, start_worker
from icm_cli.training.data.pool import Item, Pool
from icm_cli.training.data.samples import SampleMaker
from icm_cli.training.panels import MOST_ROWS, grey
from icm_cli.training.settings import Settings
from icm_cli.training.stages.contract import Answer, Stage
from icm_cli.training.stages.mosaics import (
    LARGE,
    MosaicBatch,
    TokenMatcher,
    View,
    draw_layout,
    draw_mosaic,
    joined,
    noisy,
    panel,
    stemmed,
    token_match_head,
    views_of,
)
from icm_cli.training.stages.view_sets import Chunk, ViewPlan, ViewSet, load_views, save_views

if TYPE_CHECKING:
    from icm_cli.events import TrainingListener
    from icm_cli.training.learner import Learner

TOKENS_FOLDER = "tokens"
"""Folder of the tokens in a run's folder."""
BEGIN_VIEWS = 400
"""Pictures whose tokens give the principal components that the head's projections begin with."""
TOLD_EVERY_S = 60.0


class MatchStage(Stage[MosaicBatch]):
    """Mosaics of tokens in, which of them are the thing out."""

    learns: ClassVar[tuple[str, ...]] = ("head", "backbone")
    terms: ClassVar[tuple[str, ...]] = LOSS_TERMS
    embeds: ClassVar[bool] = False
    """Whether views hold what the model's objects know of a picture."""

    def __init__(self, settings: Settings, pool: Pool) -> None:
        super().__init__(settings, pool)
        config = settings.train.match
        if config.large_views == 1 and config.layout_shares[0]:
            raise ConfigError(
                "train: match: large_views is 1, and a mosaic of one picture needs a second one as its reference; "
                "expected 2 or more, or 0, or no share of the first layout"
            )
        large = replace(settings.train, canvas_px=LARGE * settings.train.canvas_px)
        self._makers = (SampleMaker(pool, settings.train), SampleMaker(pool, large))
        self._plan = ViewPlan(pool, config, settings.train.seed)
        self._reader: _Reader | None = None
        self._read: dict[Chunk, list[View | None]] = {}
        """Views of the chunks that are in use or will be soon."""
        self._number: int | None = None
        """Number of the view set in use."""
        self._small = self._large = ViewSet(pool, {})

    def module(self, model: InContextMatting) -> nn.Module:
        head, live_blocks = token_match_head(model, "match"), self.settings.train.match.live_blocks
        if not live_blocks:
            return TokenMatcher(head)
        backbone = stemmed(model.backbone)
        model.backbone.requires_grad_(False)
        backbone.last_blocks(live_blocks).requires_grad_(True)
        return TokenMatcher(head, backbone, live_blocks)

    def prepare(self, learner: Learner, folder: Path, first_step: int, listener: TrainingListener) -> None:
        objects = _in_use(learner) if self.embeds else None
        self._reader = _Reader(self.settings, self._makers, learner, objects, folder / TOKENS_FOLDER, listener)
        chunks = self._plan.chunks_of_set(self._plan.set_number(first_step))
        self._load([*chunks, *self._plan.chunks_due(first_step)], workers=learner.workers)
        if not learner.is_from_checkpoint and not first_step:
            assert isinstance(learner.model.head, TokenMatchHead)
            found = [view for chunk in chunks for view in self._read[chunk] if view is not None]
            learner.model.head.initialise_from_pca(
                _some_tokens(found, self.settings.train.seed).to(learner.device.torch_device)
            )

    def _load(self, chunks: Sequence[Chunk], workers: int = 0) -> None:
        """Load the views of chunks from the run's folder, or read their images."""
        assert self._reader is not None
        missing = [chunk for chunk in chunks if chunk not in self._read]
        self._read |= dict(self._reader.views(missing, workers)) if missing else {}

    def _rotate(self, step: int) -> None:
        """Use the view set of a step, and read what the next one needs by this step."""
        self._load(self._plan.chunks_due(step))
        number = self._plan.set_number(step)
        if number == self._number:
            return
        chunks = self._plan.chunks_of_set(number)
        self._load(chunks)
        for chunk in [each for each in self._read if each.part < number]:
            del self._read[chunk]
        self._small, self._large = (
            ViewSet(self.pool, {chunk: self._read[chunk] for chunk in chunks if chunk.is_large == is_large})
            for is_large in (False, True)
        )
        if self._number is not None and self._reader is not None:
            self._reader.remove_parts_before(number - 1)  # the state that a resumed run starts from may be older
        self._number = number

    def batches(self, sampler: StepSampler, *, workers: int, pin: bool) -> Iterator[MosaicBatch]:
        """Batches are drawn here, for the tokens are here; ``workers`` read pictures, before."""
        del workers
        for counters in sampler:
            batch = self.batch(counters)
            yield batch.pin_memory() if pin else batch

    def answer(self, forward: nn.Module, batch: MosaicBatch) -> Answer:
        found: Answer = forward(batch)
        return found

    def losses(self, answer: Answer, batch: MosaicBatch) -> dict[str, Tensor]:
        return match_losses(answer, batch.alpha, batch.valid, self.settings.train.match.presence)

    @torch.no_grad()
    def panel(self, learner: Learner, batch: MosaicBatch) -> ImageU8:
        """For each mosaic its true alpha, the coarse alpha, and what all comparisons together carry over."""
        few = batch.first(MOST_ROWS)
        return panel(few.alpha, self.answer(self.module(learner.model), few))

    def preview(self, counter: int) -> tuple[str, list[ImageU8]]:
        """A picture whose tokens are read, and its alpha."""
        items = [item for chunk in self._plan.chunks_of_set(0) if not chunk.is_large for item in chunk.items]
        item = items[counter % len(items)]
        scene = self._makers[False].view(item, np.random.default_rng((self.settings.train.seed, counter)))
        return f"{item.group} {item.name}", [scene.rgb, grey(scene.alpha)]

    def batch(self, counters: Sequence[int]) -> MosaicBatch:
        """Samples number ``counters``: the same for every run of a seed. All of them have one layout.

        Raises TrainingError where the pictures do not suffice for a mosaic.
        """
        train, config = self.settings.train, self.settings.train.match
        self._rotate(counters[0] // train.batch_size)
        rng = np.random.default_rng((train.seed, 1, counters[0]))
        rows, columns, references = draw_layout(config, rng)
        targets = self._large if self._large and (rows, columns) == (1, 1) else self._small
        guides = self._large if self._large and rng.random() < 0.5 else self._small

        def as_reference(item: Item) -> View | None:
            view = guides.draw_view(item, rng)
            return view if view is not None and view.alpha.max() > 0.5 else None

        mosaics = [
            draw_mosaic(
                targets.pool,
                config,
                rows * columns,
                references,
                rng,
                as_target=lambda item: targets.draw_view(item, rng),
                as_reference=as_reference,
                reference_pool=guides.pool,
            )
            for _ in counters
        ]
        batch = joined(mosaics, counters, rows, columns)
        return noisy(batch, config.feature_noise, rng) if config.feature_noise else batch


class _Reader:
    """Shows images to the backbone, and keeps their views in a run's folder."""

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
        self._recipe = recipe_digest(settings, learner.weights_digest, embeds=objects is not None)
        if learner.is_main:
            folder.mkdir(exist_ok=True)

    def views(self, chunks: Sequence[Chunk], workers: int) -> Iterator[tuple[Chunk, list[View | None]]]:
        """Views of each chunk, None for an image that cannot be read. Each chunk is written as soon as it is read."""
        missing = []
        for chunk in chunks:
            if (views := load_views(self._folder / chunk.file_name, self._digest(chunk))) is None:
                missing.append(chunk)
            else:
                yield chunk, views
        count = sum(len(chunk.items) for chunk in missing)
        if count:
            self._listener.on_notice(f"reading the tokens of {count} pictures into {self._folder}")
        done, told = 0, time.monotonic()
        for chunk, views in self._read(missing, workers):
            done += len(views)
            if time.monotonic() - told > TOLD_EVERY_S:
                told = time.monotonic()
                self._listener.on_notice(f"{done} of {count} pictures are read")
            if self._learner.is_main:
                path, digest = self._folder / chunk.file_name, self._digest(chunk)
                save_views(path, digest, views)
                views = load_views(path, digest) or views  # from the file, the system may free their memory
            yield chunk, views

    def remove_parts_before(self, part: int) -> None:
        """Remove the files of parts that no view set needs any more."""
        if self._learner.is_main:
            for path in self._folder.glob("*.pt"):
                if path.name.partition("-")[0].isdigit() and int(path.name.partition("-")[0]) < part:
                    path.unlink(missing_ok=True)

    def _read(self, chunks: Sequence[Chunk], workers: int) -> Iterator[tuple[Chunk, list[View | None]]]:
        """Show the backbone the images of chunks."""
        learner = self._learner
        scenes = _Scenes(self._makers, chunks, self._seed)
        loader = DataLoader(
            scenes,
            batch_sampler=scenes.batches(learner.device.auto_batch_size),
            collate_fn=list,
            num_workers=workers,
            worker_init_fn=start_worker if workers else None,
            multiprocessing_context="spawn" if workers else None,
            generator=torch.Generator(),  # the default one is the model's
        )
        batches = iter(loader)
        for chunk in chunks:
            views: list[View | None] = []
            while len(views) < len(chunk.items):
                batch = next(batches)
                for each in batch:
                    if isinstance(each, str):
                        self._listener.on_notice(f"skipped: {each}")
                found = [each for each in batch if isinstance(each, _Scene)]
                seen = _seen(learner, found, self._objects) if found else iter(())
                views += [None if isinstance(each, str) else next(seen) for each in batch]
            yield chunk, views

    def _digest(self, chunk: Chunk) -> str:
        seed = chunk.view_seed(self._seed, 0)
        return combined_digest(self._recipe, str(seed), *(f"{item.group} {item.name}" for item in chunk.items))


@dataclass(frozen=True)
class _Scene:
    rgb: ImageU8
    alpha: ImageU8
    valid: np.ndarray


class _Scenes(Dataset["_Scene | str"]):
    """Scenes of the items of chunks, one after another, with other things in them at times; a str says why an item has
    none."""

    def __init__(self, makers: tuple[SampleMaker, SampleMaker], chunks: Sequence[Chunk], seed: int) -> None:
        self._makers = makers
        self._chunks = chunks
        self._seed = seed

    def batches(self, size: int) -> list[list[tuple[int, int]]]:
        """Numbers of chunks and items, at most ``size`` together and of one chunk."""
        return [
            [(number, index) for index in range(start, min(start + size, len(chunk.items)))]
            for number, chunk in enumerate(self._chunks)
            for start in range(0, len(chunk.items), size)
        ]

    def __getitem__(self, place: tuple[int, int]) -> _Scene | str:
        number, index = place
        chunk = self._chunks[number]
        rng = np.random.default_rng(chunk.view_seed(self._seed, index))
        try:
            scene = self._makers[chunk.is_large].view(chunk.items[index], rng)
        except ImageError as error:
            return str(error)
        return _Scene(scene.rgb, scene.alpha, scene.valid)


def recipe_digest(settings: Settings, weights_digest: str, *, embeds: bool = False) -> str:
    """Hash of what decides a view, except its item and seed: the backbone, what the decoder takes, and the recipe of
    the scenes."""
    model, train = settings.model.as_dict(), settings.as_dict()["train"]
    decoder = [len(model["head"][name]) for name in ("skip_channels", "decoder_channels")]
    recipe = [
        *(model["backbone"], decoder, weights_digest),
        *(train[name] for name in ("canvas_px", "pairs", "augment", "seed")),
        train["match"]["live_blocks"],
        model["objects"] if embeds else None,
    ]
    return combined_digest(json.dumps(recipe, sort_keys=True))


def _in_use(learner: Learner) -> Objects | None:
    """A copy of the model's objects as they see pictures when a folder is matted: several times faster."""
    objects = copy.deepcopy(learner.model.objects)
    if objects is not None:
        objects.optimise_for_inference()
        objects.set_dtype(learner.device.dtype, learner.device.transformer_dtype)
    return objects


@torch.no_grad()
def _seen(learner: Learner, scenes: Sequence[_Scene], objects: Objects | None) -> Iterator[View]:
    place = learner.device.torch_device
    image = torch.from_numpy(np.stack([each.rgb for each in scenes])).to(place).permute(0, 3, 1, 2).float() / 255.0
    alpha = torch.from_numpy(np.stack([each.alpha for each in scenes])).to(place)[:, None].float() / 255.0
    valid = torch.from_numpy(np.stack([each.valid for each in scenes])).to(place)
    head = learner.model.head
    assert isinstance(head, TokenMatchHead)
    live_blocks = learner.config.match.live_blocks
    for view in views_of(learner.model.backbone, head, image, alpha, valid, live_blocks, objects):
        yield View(
            view.feature.half().cpu(),
            tuple(scale.half().cpu() for scale in view.scales),
            view.alpha.half().cpu(),
            view.inside.cpu(),
            view.outside.cpu(),
            view.valid.cpu(),
            view.stem.half().cpu(),
            view.embedding.half().cpu(),
        )


def _some_tokens(views: Sequence[View], seed: int) -> Tensor:
    """Tokens [N,C] float32 of pictures drawn with ``seed``."""
    drawn = np.random.default_rng(seed).permutation(len(views))[:BEGIN_VIEWS]
    return torch.cat([views[index].feature.flatten(1).T.float() for index in drawn])


STAGE = MatchStage
