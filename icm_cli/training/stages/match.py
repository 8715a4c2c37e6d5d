"""The stage "match": a token-match head learns which thing is meant, on the tokens of pictures alone.

The backbone is frozen, so every picture is seen by it once and its tokens are kept in the run's folder. A sample is
then a mosaic of one to four pictures' tokens, of which one shows the reference's thing, or several, or none: hundreds
of times cheaper than a sample of pictures, and it asks nothing but which thing is meant.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from icm_cli.errors import ConfigError, ImageError
from icm_cli.files import atomic_write, combined_digest
from icm_cli.geometry import ImageU8
from icm_cli.model.contracts import Objects
from icm_cli.model.core import InContextMatting
from icm_cli.model.lite.finetuning import TERMS, losses
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

if TYPE_CHECKING:
    from icm_cli.events import TrainingListener
    from icm_cli.training.learner import Learner

KEPT_NAME = "tokens.pt"
"""File of the tokens in a run's folder."""
BEGIN_VIEWS = 400
"""Pictures whose tokens give the principal components that the head's projections begin with."""
TOLD_EVERY_S = 60.0
Views: TypeAlias = Mapping[Item, Sequence[View]]


class MatchStage(Stage[MosaicBatch]):
    """Mosaics of tokens in, which of them are the thing out."""

    learns: ClassVar[tuple[str, ...]] = ("head", "backbone")
    terms: ClassVar[tuple[str, ...]] = TERMS
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
        self.maker = SampleMaker(pool, settings.train)
        self.large_maker = SampleMaker(pool, replace(settings.train, canvas_px=LARGE * settings.train.canvas_px))
        self.shown = to_show(pool, config.views, config.most_views, settings.train.seed)
        self.shown_large = (
            to_show(pool, config.large_views, config.most_views, settings.train.seed + 1) if config.large_views else []
        )
        self.views: dict[Item, list[View]] = {}
        self.large_views: dict[Item, list[View]] = {}

    def module(self, model: InContextMatting) -> nn.Module:
        head, live_blocks = token_match_head(model, "match"), self.settings.train.match.live_blocks
        if not live_blocks:
            return TokenMatcher(head)
        backbone = stemmed(model.backbone)
        model.backbone.requires_grad_(False)
        backbone.last_blocks(live_blocks).requires_grad_(True)
        return TokenMatcher(head, backbone, live_blocks)

    def prepare(self, learner: Learner, folder: Path, listener: TrainingListener) -> None:
        path = folder / KEPT_NAME
        digest = views_digest(
            self.settings, [*self.shown, *self.shown_large], learner.weights_digest, embeds=self.embeds
        )
        views = kept_views(path, digest)
        if views is None:
            listener.on_notice(f"reading the tokens of {len(self.shown) + len(self.shown_large)} pictures into {path}")
            views = self._read(learner, self.maker, self.shown, listener)
            views += self._read(learner, self.large_maker, self.shown_large, listener)
            if learner.is_main:
                keep_views(path, digest, views)
        self.views = _by_item(self.shown, views[: len(self.shown)])
        self.large_views = _by_item(self.shown_large, views[len(self.shown) :])
        if not learner.is_from_checkpoint:
            assert isinstance(learner.model.head, TokenMatchHead)
            found = [view for view in views if view is not None]
            learner.model.head.initialise_from_pca(
                _some_tokens(found, self.settings.train.seed).to(learner.device.torch_device)
            )

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
        return losses(answer, batch.alpha, batch.valid, self.settings.train.match.presence)

    @torch.no_grad()
    def panel(self, learner: Learner, batch: MosaicBatch) -> ImageU8:
        """For each mosaic its true alpha, the coarse alpha, and what all comparisons together carry over."""
        few = batch.first(MOST_ROWS)
        return panel(few.alpha, self.answer(self.module(learner.model), few))

    def preview(self, counter: int) -> tuple[str, list[ImageU8]]:
        """A picture whose tokens are read, and its alpha."""
        item = self.shown[counter % len(self.shown)]
        scene = self.maker.view(item, np.random.default_rng((self.settings.train.seed, counter)))
        return f"{item.group} {item.name}", [scene.rgb, grey(scene.alpha)]

    def batch(self, counters: Sequence[int]) -> MosaicBatch:
        """Samples number ``counters``: the same for every run of a seed. All of them have one layout.

        Raises TrainingError where the pictures do not suffice for a mosaic.
        """
        config = self.settings.train.match
        rng = np.random.default_rng((self.settings.train.seed, 1, counters[0]))
        rows, columns, references = draw_layout(config, rng)
        shown = self.large_views if self.large_views and (rows, columns) == (1, 1) else self.views
        beside = self.large_views if self.large_views and rng.random() < 0.5 else self.views

        def as_reference(item: Item) -> View | None:
            view = _view(beside, item, rng)
            return view if view is not None and view.alpha.max() > 0.5 else None

        mosaics = [
            draw_mosaic(
                self.pool,
                config,
                rows * columns,
                references,
                rng,
                as_target=lambda item: _view(shown, item, rng),
                as_reference=as_reference,
            )
            for _ in counters
        ]
        batch = joined(mosaics, counters, rows, columns)
        return noisy(batch, config.feature_noise, rng) if config.feature_noise else batch

    def _read(
        self, learner: Learner, maker: SampleMaker, shown: Sequence[Item], listener: TrainingListener
    ) -> list[View | None]:
        """Show the backbone a picture after the other; None where one cannot be read."""
        views: list[View | None] = [None] * len(shown)
        objects = _in_use(learner) if self.embeds else None
        loader = DataLoader(
            _Scenes(maker, shown, self.settings.train.seed),
            batch_size=learner.device.auto_batch_size,
            collate_fn=list,
            num_workers=learner.workers,
            worker_init_fn=start_worker if learner.workers else None,
            multiprocessing_context="spawn" if learner.workers else None,
        )
        told = time.monotonic()
        for batch in loader:
            found = [each for each in batch if isinstance(each, _Scene)]
            for each in batch:
                if isinstance(each, str):
                    listener.on_notice(f"skipped: {each}")
            if found:
                for each, view in zip(found, _seen(learner, found, objects), strict=True):
                    views[each.index] = view
            if time.monotonic() - told > TOLD_EVERY_S:
                told = time.monotonic()
                listener.on_notice(f"{sum(view is not None for view in views)} of {len(views)} pictures are read")
        return views


@dataclass(frozen=True)
class _Scene:
    index: int
    rgb: ImageU8
    alpha: ImageU8
    valid: np.ndarray


class _Scenes(Dataset["_Scene | str"]):
    """Picture number ``index``: an item's scene, with other things in it at times; a str says why it has none."""

    def __init__(self, maker: SampleMaker, shown: Sequence[Item], seed: int) -> None:
        self.maker, self.shown, self.seed = maker, shown, seed

    def __len__(self) -> int:
        return len(self.shown)

    def __getitem__(self, index: int) -> _Scene | str:
        try:
            scene = self.maker.view(self.shown[index], np.random.default_rng((self.seed, index)))
        except ImageError as error:
            return str(error)
        return _Scene(index, scene.rgb, scene.alpha, scene.valid)


def to_show(pool: Pool, views: int, most_views: int, seed: int) -> list[Item]:
    """Draw about ``views`` items of every group with ``seed``, each at most ``most_views`` times."""
    rng = np.random.default_rng((seed, 2))
    shown: list[Item] = []
    for items in pool.groups.values():
        count = min(views, most_views * len(items))
        shown += [items[index] for index in np.resize(rng.permutation(len(items)), count)]
    return shown


def views_digest(settings: Settings, shown: Sequence[Item], weights_digest: str, *, embeds: bool = False) -> str:
    """Hash of what decides the views: the backbone, what the decoder takes, the recipe of the scenes, which items, and
    the seed."""
    model, train = settings.model.as_dict(), settings.as_dict()["train"]
    decoder = [len(model["head"][name]) for name in ("skip_channels", "decoder_channels")]
    recipe = [
        *(model["backbone"], decoder, weights_digest),
        *(train[name] for name in ("canvas_px", "pairs", "augment", "seed")),
        *(train["match"][name] for name in ("large_views", "live_blocks")),
        model["objects"] if embeds else None,
    ]
    return combined_digest(json.dumps(recipe, sort_keys=True), *(f"{item.group} {item.name}" for item in shown))


def keep_views(path: Path, digest: str, views: Sequence[View | None]) -> None:
    """Write views, whole or not at all. Raises OutputError."""
    tensors = [tuple(getattr(view, each.name) for each in fields(View)) if view else None for view in views]
    with atomic_write(path) as file:
        torch.save({"digest": digest, "views": tensors}, file)


def kept_views(path: Path, digest: str) -> list[View | None] | None:
    """Read what :func:`keep_views` wrote, None where nothing is there or it was made of other pictures or settings."""
    try:
        stored: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError):
        return None
    return [View(*view) if view else None for view in stored["views"]] if stored["digest"] == digest else None


def _by_item(shown: Sequence[Item], views: Sequence[View | None]) -> dict[Item, list[View]]:
    """The views of each item that has any."""
    found: dict[Item, list[View]] = {}
    for item, view in zip(shown, views, strict=True):
        if view is not None:
            found.setdefault(item, []).append(view)
    return found


def _view(views: Views, item: Item, rng: np.random.Generator) -> View | None:
    of_item = views.get(item)
    return of_item[int(rng.integers(len(of_item)))] if of_item else None


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
